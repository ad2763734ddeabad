"Bybit and OKX by configuration: the same commands and the same engine, with exchange.id set to another venue and a server on this machine in its place."
import json
import time
from decimal import Decimal

import pytest

from bnml.cli import main
from bnml.core.base import Refused, Retry, Skip
from bnml.core.clock import floor_ms, iso
from bnml.core.secrets import SECRETS
from bnml.data.lake import Lake
from bnml.data.stream import StreamFeed
from bnml.domain.market import default_instrument
from bnml.ops.desk import open_station
from bnml.venue.ccxt import unified_client
from bnml.venue.clock import VenueClock
from bnml.venue.ports import MarketData
from bnml.venue.unified_market import Tickers, UnifiedVenue
from tests.foreign import Foreign
from tests.test_ccxt_orders import addresses
from tests.test_live import STRATEGY, tape
from urllib.parse import urlsplit

MINUTE, BORN, SYMBOLS = 60_000, 1_300, ("SOLUSDT", "ETHUSDT")
KEYS = {"EXCHANGE_API_KEY": "foreign-key-0123", "EXCHANGE_API_SECRET": "foreign-secret-4567"}
WORD = {"EXCHANGE_API_PASSPHRASE": "foreign-word-89"}
PATH = [100, 100, 100.2, 100.5, 100.8, *[100.8] * 6, 100.6, 100.3, 100.0, *[100] * 40]


@pytest.fixture(params=("bybit", "okx"))
def venue(request):
    "Thirteen hundred minutes of two pairs, and a market that goes on."
    start = floor_ms(int(time.time() * 1000), "1m")
    with Foreign(request.param, tape(start, PATH, BORN, SYMBOLS), {s: default_instrument(s, 100.0) for s in SYMBOLS}, {"USDT": Decimal(10_000)}, {KEYS["EXCHANGE_API_KEY"]: KEYS["EXCHANGE_API_SECRET"]},
                 password=WORD["EXCHANGE_API_PASSPHRASE"], start_ms=start + 5_000) as it:
        it.start = start
        yield it


def market(venue, **kw): return UnifiedVenue(venue.language, urls=venue.urls, gap_s=0, **kw)


def settings(venue, mode="paper", **more) -> dict:
    where = dict(zip(("rest_url", "ws_url", "ws_api_url"), venue.urls)) | {"id": venue.language, "testnet": mode == "testnet"}
    return {"mode": mode, "strategy": "steps:Steps", "exchange": where, "universe": {"symbols": ["SOLUSDT"]}, "data": {"source": "live", "interval": "1m", "history_bars": 120, "grace_s": 0.1},
            "exits": {"targets": [[30.0, 1.0]], "stop_atr": 20.0, "trail_after_atr": None, "hard_stop_pct": None}, "risk": {"max_spread_bps": 100.0, "leader": "", "max_volatility_ratio": 1000.0, "max_depth_share": 1.0}, **more}


@pytest.fixture
def home(own_home, venue, monkeypatch):
    for name in [n for own, others in SECRETS.items() for n in (own, *others)]: monkeypatch.delenv(name, raising=False)
    for name, value in (KEYS | WORD).items(): monkeypatch.setenv(name, value)
    (own_home / "steps.py").write_text(STRATEGY)
    monkeypatch.syspath_prepend(str(own_home))
    (own_home / "bot.yaml").write_text(json.dumps(settings(venue)))
    return own_home


# ---- no other host

@pytest.mark.parametrize("language", ("bybit", "okx"))
@pytest.mark.parametrize("testnet", (False, True))
def test_no_other_host_is_held(language, testnet):
    client = unified_client(language, testnet, 1, "k", "s", "w", ("http://127.0.0.1:9001", "ws://127.0.0.1:9002", "ws://127.0.0.1:9003"))
    found = list(addresses(vars(client)))
    assert found and {urlsplit(a).hostname for a in found} == {"127.0.0.1"} and set(client.urls) == {"api"}, found
    assert client.has["fetchCurrencies"] is False and client.session.max_redirects == 0


# ---- market data

def test_closed_bars_of_any_age_and_none_that_is_forming(venue):
    "Thirteen hundred bars need five pages at OKX, of two calls; the newest that is given out is the one before the forming one."
    m = market(venue)
    assert isinstance(m, MarketData)
    bars = m.bars("SOLUSDT", "1m", venue.start - 2_000 * MINUTE, 5_000)
    assert [b.open_time_ms for b in bars] == list(range(venue.start - BORN * MINUTE, venue.start, MINUTE))
    truth = venue.exchange.tape.klines("SOLUSDT", "1m", venue.clock.now(), venue.start - BORN * MINUTE, None, 10_000)
    assert [(b.open, b.high, b.low, b.close, b.volume) for b in bars] == [tuple(v) for v in truth[1:, :-1].T.tolist()]
    assert [b.open_time_ms for b in m.bars("SOLUSDT", "1m", venue.start - 700 * MINUTE, 350)] == list(range(venue.start - 700 * MINUTE, venue.start - 350 * MINUTE, MINUTE))
    assert m.bars("SOLUSDT", "1m", venue.start) == []
    hours = m.bars("SOLUSDT", "6h", venue.start - 1_300 * MINUTE)
    assert hours and all(b.open_time_ms % (6 * 3_600_000) == 0 and b.open_time_ms + 6 * 3_600_000 <= venue.clock.now() for b in hours)


def test_prices_book_trades_rules_and_time(venue):
    m = market(venue)
    q, b = m.quote("SOLUSDT"), m.book("SOLUSDT", 5)
    assert (q.bid, q.ask) == tuple(map(float, venue.exchange.touch("SOLUSDT"))) == (b.bids[0][0], b.asks[0][0]) and len(b.bids) == len(b.asks) == 5
    trades = m.trades("SOLUSDT", 3)
    assert len(trades) == 3 and [t for _, t in trades] == sorted(t for _, t in trades) and trades[-1][0] == float(venue.exchange.last["SOLUSDT"])
    assert set(m.volumes()) == set(m.quotes()) == set(SYMBOLS) and all(v > 0 for v in m.volumes().values())
    rules, truth = m.instruments()["SOLUSDT"], venue.exchange.instruments["SOLUSDT"]
    assert (rules.tick, rules.step, rules.min_qty, rules.status) == (truth.tick, truth.step, truth.min_qty, "TRADING")
    assert abs(m.server_time_ms() - venue.clock.now()) < 2_000
    with pytest.raises(Skip, match=f"not listed at {venue.language}"): m.bars("NOPEUSDT", "1m", 0)


@pytest.mark.parametrize("body", ["", "{}", '{"retCode": 0, "result": {}}', '{"code": "0", "data": null}', '{"retCode": 0, "result": {"list": [["17"', "<html>502</html>"])
def test_a_cut_off_answer_is_asked_for_again(venue, body):
    m = market(venue)
    m.instruments(), m.measure()
    for ask in (lambda: m.bars("SOLUSDT", "1m", venue.start - 5 * MINUTE), lambda: m.quote("SOLUSDT"), lambda: m.book("SOLUSDT"), lambda: m.trades("SOLUSDT"), m.server_time_ms):
        venue.down.append(body)
        with pytest.raises(Retry): ask()
        assert not venue.down
    assert m.quote("SOLUSDT").bid > 0


def test_a_feed_without_a_stream_gives_every_bar_once(venue, tmp_path):
    m = market(venue)
    feed = StreamFeed(m, Lake(tmp_path / "lake"), ["SOLUSDT"], "1m", VenueClock(m), lambda since: Tickers(m), 60, grace_s=0.1, straggler_s=0.5)
    assert len(feed.panel) == 60 and feed.panel.times[-1] == venue.start - MINUTE
    seen = []
    for kind, row in feed.events():
        seen.append((kind, int(feed.panel.times[row]), float(feed.panel.open[row, 0])))
        if len(seen) == 7: break
        if kind == "open": venue.jump(venue.start + (len(seen) // 2 + 1) * MINUTE + 2_000), m.measure()
    assert [(k, (t - venue.start) // MINUTE) for k, t, _ in seen] == [(k, i) for i in range(3) for k in ("open", "close")] + [("open", 3)]
    assert all(99 < price < 102 for *_, price in seen)
    assert feed.last_trade("SOLUSDT") and feed.book("SOLUSDT")


# ---- commands

def test_fetch_fills_the_lake_and_mixes_no_venues(venue, home, capsys):
    fetch = ["data", "fetch", "--symbols", "SOLUSDT,NOPEUSDT", "--interval", "1m", "--from", iso(venue.start - 400 * MINUTE), "--json"]
    assert main(fetch) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["symbol"], r["added"], r["missing"]) for r in rows] == [("SOLUSDT", 400, 0), ("NOPEUSDT", 0, 0)] and "not listed" in rows[1]["skipped"]
    other = {"bybit": "okx", "okx": "bybit"}[venue.language]
    for id in (other, "binance"):
        (home / "bot.yaml").write_text(json.dumps(settings(venue) | {"exchange": settings(venue)["exchange"] | {"id": id}}))
        assert main(fetch) == 77 and f"holds bars of {venue.language}" in capsys.readouterr().err


@pytest.mark.parametrize("may, code, says", [({}, 0, "may trade, may not withdraw"), ({"trade": False}, 77, "read-only"), ({"withdraw": True}, 77, "the key may withdraw")])
def test_keys_check_asks_the_venue(venue, home, capsys, monkeypatch, may, code, says):
    venue.rights |= may
    assert main(["keys", "check", "--venue"]) == code and says in capsys.readouterr().out
    if may: return
    monkeypatch.setenv("EXCHANGE_API_KEY", "somebody-elses-key")
    assert main(["keys", "check", "--venue"]) == 77 and "does not know this key" in capsys.readouterr().out
    monkeypatch.delenv("EXCHANGE_API_PASSPHRASE")
    monkeypatch.setenv("EXCHANGE_API_KEY", KEYS["EXCHANGE_API_KEY"])
    found, out = main(["keys", "check", "--venue"]), capsys.readouterr().out
    assert (found, "signs with a passphrase" in out) == ((77, True) if venue.language == "okx" else (0, False))


def test_the_doctor_looks_at_the_venue(venue, home, capsys):
    main(["doctor", "--json"])
    found = {f["part"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["venue"]["finding"] == f"{venue.language} answers" and found["leader"]["level"] == "ok"


# ---- the engine

def drive(venue, flags, minutes, env=None):
    "Bars close one after the other while the engine waits for them."
    with open_station(None, flags, cycles=minutes, killed={"engaged": False, "reason": None}, evidence=lambda s: (True, "earned")) as station:
        waiting, ports = station.ports.feed.meanwhile, station.ports
        def on(left_s):
            waiting(left_s)
            over = ports.feed._next + MINUTE + 500
            bare = [h for h in station.engine.desk.holdings.values() if h.bare_ms is not None]
            if left_s > 1 and venue.clock.now() < over and not bare: venue.jump(over), ports.door.market.measure()  # a minute never passes in a moment while a position waits for its watchdog
        ports.feed.meanwhile = on
        station.run()
        return station.summary(), ports, [*station.ledger.fills()], station.engine.positions()


def test_paper_trades_the_venues_bars(venue, home):
    told, ports, fills, held = drive(venue, {}, 8)
    assert (told["bars"], told["violations"], ports.source) == (8, 0, "rehearsal")
    assert fills, told["denied"]
    assert all(99 < f.price < 102 for f in fills) and not any("/order/" in p or "/trade/" in p for p, _ in venue.asked)


def test_live_trades_through_the_same_desk(venue, home, monkeypatch):
    "Every lock open: bought by a limit order at the venue, guarded by the local watchdog, and the warning says so."
    for name, value in {"PAPER_ONLY": "0", "ALLOW_LIVE": "1"}.items(): monkeypatch.setenv(name, value)
    (home / "bot.yaml").write_text(json.dumps(settings(venue, "live")))
    told, ports, fills, held = drive(venue, {"mode": "live"}, 8)
    sent = [t for t in venue.exchange.tickets.values()]
    assert f"no stop rests at {venue.language}" in ports.warning
    assert sent, told["denied"]
    assert {t.type for t in sent} <= {"LIMIT", "MARKET"} and [f.quantity for f in fills] == [x.qty for t in sent for x in t.trades]
    assert [o.status for o in sent if o.side == "BUY"] == ["FILLED"] and len(held) <= 1
    assert 0 < told["unprotected_seconds_max"] <= 5  # until the watchdog had its eye on it
    assert told["violations"] == 1  # and the audit, which trusts in resting stops alone, says that there was none: no promotion on such a ledger


def test_live_is_refused_without_the_passphrase(venue, home, monkeypatch):
    for name, value in {"PAPER_ONLY": "0", "ALLOW_LIVE": "1"}.items(): monkeypatch.setenv(name, value)
    (home / "bot.yaml").write_text(json.dumps(settings(venue, "live")))
    monkeypatch.delenv("EXCHANGE_API_PASSPHRASE")
    if venue.language == "bybit": return
    with pytest.raises(Refused, match="keys: missing EXCHANGE_API_PASSPHRASE"): drive(venue, {"mode": "live"}, 1)
