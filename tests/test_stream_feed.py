"The live feed against the rehearsal venue: its stream closed, silent, repeated and torn, its clock jumping, and every bar there once and in order."
import asyncio
import json
import tempfile
import threading
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.server import serve as websockets_serve

from bench.stream_load import Still, measure_stream
from bnml.core.base import Retry, shared
from bnml.core.clock import VirtualClock
from bnml.data.lake import Lake
from bnml.data.listing import UniverseHistory, UniverseWatch, live_universe
from bnml.data.panel import Panel
from bnml.data.stream import StreamFeed
from bnml.data.synth import synth_market
from bnml.domain.market import Bar, default_instrument
from bnml.domain.plan import ExitPlan
from bnml.domain.signal import Action, Proposal, Signal
from bnml.ops.desk import open_station
from bnml.ops.settings import UniverseSettings
from bnml.venue.ccxt import CcxtVenue, rest_client
from bnml.venue.clock import VenueClock
from bnml.venue.gate import Key
from bnml.venue.public import read_book, read_trades, read_volumes
from bnml.venue.rehearsal import serve
from bnml.venue.streams import MarketStream, Sequence, payload

MINUTE, SYMBOLS = 60_000, ("BTCUSDT", "ETHUSDT", "SOLUSDT")
PAST = 30  # bars before the clock's time
WHOLE = Panel.from_frames(synth_market(SYMBOLS, "1m", "2025-03-01", "2025-03-01T04:00", 7), "1m")
LISTED = {s: default_instrument(s, float(WHOLE.close[0, j])) for j, s in enumerate(SYMBOLS)}
START = int(WHOLE.times[PAST])


@pytest.fixture
def stage():
    with serve(WHOLE, LISTED, {"USDT": Decimal(100_000)}, {"k": Key("s")}, start_ms=START + 1_000) as it: yield it


class Runner:
    "A feed on a thread of its own, and what it said."
    def __init__(self, stage, tmp_path, streaming=True, straggler_s=1.0, **kw):
        urls = (stage.url, stage.ws_url, stage.ws_api_url)
        venue = self.venue = CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=5)
        venue.measure()
        def lines(since): return MarketStream(venue, LISTED, "1m", since, urls, heartbeat_s=0.5)
        self.stage, self.events, self.looks, self.seen = stage, [], [], {}
        self.feed = StreamFeed(venue, Lake(tmp_path / "lake"), SYMBOLS, "1m", VenueClock(venue), lines if streaming else None, PAST, grace_s=0.2, straggler_s=straggler_s, **kw)
        self.feed.meanwhile = lambda left_s: self.looks.append(time.monotonic())
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def live(self):
        for kind, row in self.feed.events():
            self.events.append((kind, row, self.feed.late))
            if kind == "close": self.seen[row] = self.feed.panel.close[row].copy()

    def until(self, what, seconds=15.0):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"it did not happen: {self.events[-6:]}, {self.feed.health()}"
            time.sleep(0.02)

    def rows(self, n, seconds=15.0): self.until(lambda: sum(k == "close" for k, _, _ in self.events) >= n, seconds)

    def up(self): self.until(lambda: self.feed.stream and self.feed.stream.healthy and not self.feed.stream.filling and self.events, 30)

    def close(self):
        self.feed.stop()
        self.thread.join(15)
        assert not self.thread.is_alive()

    def agrees(self):
        "Every row opened and closed once, in order, and each as the tape has it."
        kinds = [(k, r) for k, r, _ in self.events]
        rows = sorted(self.seen)
        assert rows == list(range(PAST, PAST + len(rows)))
        assert kinds == [x for r in range(PAST, PAST + len(rows) + 1) for x in (("open", r), ("close", r))][: len(kinds)]
        tick = {s: float(i.tick) for s, i in LISTED.items()}
        for j, s in enumerate(SYMBOLS):
            np.testing.assert_allclose([self.seen[r][j] for r in rows], WHOLE.close[rows, j], atol=tick[s])
        return len(rows)


@pytest.fixture
def runner(stage, tmp_path):
    made = []
    def make(**kw):
        made.append(Runner(stage, tmp_path, **kw))
        return made[-1]
    yield make
    for r in made: r.close()


def test_bars_arrive_with_their_close_however_the_clock_runs(stage, runner):
    r = runner()
    r.up()
    assert r.feed.warmup_rows == PAST and not np.isnan(r.feed.panel.close[:PAST]).any()
    stage.jump(bars=1)
    began = time.monotonic()
    r.rows(1)
    assert time.monotonic() - began < 10  # a minute of the venue's time, and nobody slept through it
    stage.jump(bars=1)
    r.rows(2)
    assert [late for k, _, late in r.events if k == "close"] == [False, False]
    stage.jump(bars=5)
    r.rows(7)
    assert r.agrees() == 7
    quote, (price, _), book = r.feed.quote("BTCUSDT"), r.feed.last_trade("BTCUSDT"), r.feed.book("BTCUSDT")
    assert quote.bid < quote.ask and abs(price / quote.mid - 1) < 0.05 and book.bids[0][0] < book.asks[0][0] and r.feed.live
    until = r.venue.server_time_ms()
    r.until(lambda: abs(r.feed.clock.now_ms() - r.venue.server_time_ms()) < 1500 and r.feed.clock.now_ms() >= until)
    r.until(lambda: len(r.looks) > 20)
    gaps = np.diff(r.looks)
    assert np.median(gaps) < 0.2  # somebody looks several times a second


@pytest.mark.parametrize("kind", ["ws_close", "ws_reset", "ws_silent"])
def test_a_broken_line_loses_no_bar(stage, runner, kind):
    r = runner()
    r.up()
    stage.jump(bars=1)
    r.rows(1)
    breaks = r.feed.stream.breaks
    stage.fault(kind)
    stage.jump(bars=5)  # five minutes of outage
    if kind == "ws_silent": r.until(lambda: r.feed.stream.breaks > breaks or len(r.seen) >= 6, 30)
    r.rows(6, 30)
    stage.tell("faults", "DELETE")
    r.up()
    stage.jump(bars=1)
    r.rows(7, 30)
    assert r.agrees() == 7
    lates = [late for k, _, late in r.events if k == "close"]
    assert not lates[0] and any(lates[1:5]) and not lates[-1]


def test_rest_alone_and_back_to_the_stream(stage, runner):
    stage.fault("ws_refuse", times=3)
    r = runner()
    r.until(lambda: r.events)
    stage.jump(bars=1)
    r.rows(1, 20)
    r.until(lambda: r.feed.stream.healthy, 30)
    stage.jump(bars=2)
    r.rows(3, 20)
    assert r.agrees() == 3


def test_repeated_and_lost_messages(stage, runner):
    r = runner()
    r.up()
    stage.fault("duplicate", step="market", times=500)
    stage.jump(bars=3)
    r.rows(3)
    stage.tell("faults", "DELETE")
    stage.fault("lost", step="market", symbol="ETHUSDT", times=8)  # two bars' messages of one symbol never come
    stage.jump(bars=2)
    r.rows(5, 20)
    assert r.agrees() == 5


def test_a_straggler_is_waited_for_and_filled_later(stage, runner):
    r = runner()
    r.up()
    real, deaf = r.venue.bars, [True]
    def bars(symbol, *a):
        if symbol == "SOLUSDT" and deaf[0]: raise Retry("SOLUSDT: no answer")
        return real(symbol, *a)
    r.venue.bars = bars
    stage.fault("lost", step="market", symbol="SOLUSDT", times=4)
    began = time.monotonic()
    stage.jump(bars=1)
    r.rows(1)
    assert 0.9 < time.monotonic() - began < 6 and np.isnan(r.seen[PAST]).tolist() == [False, False, True]
    deaf[0] = False
    stage.jump(bars=1)
    r.rows(2, 20)
    r.until(lambda: not np.isnan(r.feed.panel.close[PAST, 2]))
    np.testing.assert_allclose(r.feed.panel.close[PAST, 2], WHOLE.close[PAST, 2], atol=float(LISTED["SOLUSDT"].tick))
    assert r.feed.filled_late == 1 and not np.isnan(r.seen[PAST + 1]).any()


def test_a_venue_that_is_down_is_waited_for(stage, runner):
    r = runner(stale_after_bars=0.9)
    r.up()
    stage.fault("ws_close")
    stage.fault("ws_refuse", times=1000)
    stage.fault("server_error", times=1000)
    r.until(lambda: not r.feed.stream.healthy)
    r.venue._time.told(int(WHOLE.times[PAST]) + 2 * MINUTE)  # time passes, and nobody answers
    r.until(lambda: r.feed.health()["stale"])
    assert not any(k == "close" for k, _, _ in r.events)
    stage.tell("faults", "DELETE")
    stage.jump(bars=4)
    r.rows(4, 40)
    r.until(lambda: not r.feed.health()["stale"])
    assert r.agrees() == 4


# ---- who is traded

def test_a_halted_symbol_is_barred_and_not_waited_for(stage, tmp_path, runner):
    rules = UniverseSettings(dynamic=True, min_quote_volume=1.0, refresh_s=1)
    history = UniverseHistory("rehearsal", tmp_path)
    market = CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=5)
    assert sorted(s for s, why in live_universe(rules, market.instruments(), market.volumes()).items() if not why) == sorted(SYMBOLS)
    r = runner(watch=UniverseWatch(rules, market, SYMBOLS, 0.1, history), straggler_s=30.0)
    r.up()
    stage.jump(bars=1)
    r.rows(1)
    assert r.feed.health()["barred"] == {}
    r.until(history.lines)  # the watch asks in the background: this is its first answer
    stage.fault("halt", symbol="ETHUSDT")
    r.until(lambda: r.feed.barred("ETHUSDT") == "not traded now: BREAK")
    stage.fault("lost", step="market", symbol="ETHUSDT", times=4)
    began = time.monotonic()
    stage.jump(bars=1)
    r.rows(2)
    assert time.monotonic() - began < 15 and r.feed.barred("BTCUSDT") == ""  # a straggler would have been waited for twice as long
    stage.tell("faults", "DELETE")
    r.until(lambda: r.feed.barred("ETHUSDT") == "")
    assert [e["symbols"] for e in history.lines()] == [sorted(SYMBOLS), ["BTCUSDT", "SOLUSDT"], sorted(SYMBOLS)]


def test_a_delisted_symbol_that_is_held_keeps_its_column(stage, tmp_path):
    venue = CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=5)
    feed = StreamFeed(venue, Lake(tmp_path / "lake"), ["BTCUSDT"], "1m", VenueClock(venue), None, PAST, grace_s=0.1, straggler_s=0.2, held=["LUNAUSDT"])
    assert feed.panel.symbols == ("BTCUSDT", "LUNAUSDT") and "-1121" in feed.barred("LUNAUSDT")
    events = feed.events()
    next(events)
    stage.jump(bars=1)
    assert next(events) == ("close", PAST) and np.isnan(feed.panel.close[PAST]).tolist() == [False, True]
    assert feed.quote("LUNAUSDT") is None and feed.book("LUNAUSDT") is None and feed.last_trade("LUNAUSDT") is None
    feed.close()


# ---- order, whatever the wire does

bars = st.integers(1, 12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("AB"), bars, st.booleans()), max_size=60), st.sets(bars))
def test_bars_leave_in_order_and_once(said, unknown_to_rest):
    "Messages of two symbols in any order, repeated, with holes; after each one REST may answer for the open gaps, and knows some bars."
    def bar(s, t): return Bar(s, t * 10, 1.0, 1.0, 1.0, 1.0, float(t))
    sequence, out, newest = Sequence(10, {"A": 0, "B": 0}), [], {"A": 0, "B": 0}
    def fill(s): out.extend(sequence.filled(s, [bar(s, t) for t in range(1, newest[s]) if t not in unknown_to_rest]))
    for s, t, answer in said:
        newest[s] = max(newest[s], t)
        out.extend(sequence.offer(bar(s, t)))
        if answer and s in sequence.held: fill(s)
    for s in "AB":
        if s in sequence.held: fill(s)
        times = [b.open_time_ms // 10 for b in out if b.symbol == s]
        assert times == sorted(set(times)) and max(times, default=0) == newest[s]
        told = {t for x, t, _ in said if x == s}
        assert set(range(1, newest[s])) - unknown_to_rest <= set(times) | {newest[s]} and set(times) <= told | set(range(1, newest[s]))


class Wall(VirtualClock):
    def sleep(self, seconds): time.sleep(seconds)


class Silent:
    "A venue that lists three symbols and answers nothing more than its history."
    def __init__(self, clock): self.clock, self.over = clock, False
    def server_time_ms(self): return self.clock.now_ms()
    def bars(self, symbol, interval, since, limit):
        if self.over: raise Retry("no answer")
        j = SYMBOLS.index(symbol)
        rows = [i for i in range(PAST) if WHOLE.times[i] >= since][:limit]
        return [Bar(symbol, int(WHOLE.times[i]), *(float(x[i, j]) for x in (WHOLE.open, WHOLE.high, WHOLE.low, WHOLE.close, WHOLE.volume))) for i in rows]


class Told:
    healthy, breaks, filling = True, 0, frozenset()
    def __init__(self, said): self.said = iter(said)
    def start(self): return self
    def stop(self): pass
    def quote(self, symbol): return None
    def last(self, symbol): return None
    def get(self, timeout=None):
        i, j = next(self.said, (None, None))
        if i is None:
            if timeout: time.sleep(0.001)
            return None
        return Bar(SYMBOLS[j], int(WHOLE.times[PAST + i]), *(float(x[PAST + i, j]) for x in (WHOLE.open, WHOLE.high, WHOLE.low, WHOLE.close, WHOLE.volume)))


@settings(max_examples=25, deadline=None)
@given(st.permutations([(i, j) for i in range(5) for j in range(3)]), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=8))
def test_the_panel_is_whole_in_whatever_order_bars_come(said, again):
    with tempfile.TemporaryDirectory() as folder:
        clock = Wall(START)
        venue = Silent(clock)
        feed = StreamFeed(venue, Lake(Path(folder)), SYMBOLS, "1m", clock, lambda since: Told([*said, *again]), PAST, straggler_s=0.02)
        venue.over = True
        clock.set_ms(START + 5 * MINUTE)
        rows = []
        for kind, row in feed.events():
            if kind == "close": rows.append(row)
            if len(rows) == 5: feed.stop()
        for _ in range(3): feed._listen(0.0)  # the rest of what was said, repeated or late
        assert rows == list(range(PAST, PAST + 5))
        np.testing.assert_array_equal(feed.panel.close[PAST : PAST + 5], WHOLE.close[PAST : PAST + 5])


# ---- many symbols

def test_four_hundred_symbols_in_few_messages():
    "Eight lines, one message each, no more than two hundred streams on one: within five messages a second and the venue's limits."
    asked, ready = [], threading.Event()
    async def talk(stop):
        async def line(ws):
            async for text in ws:
                request = json.loads(text)
                asked.append((id(ws), time.monotonic(), request["method"], request["params"]))
                await ws.send(json.dumps({"result": None, "id": request["id"]}))
        async with websockets_serve(line, "127.0.0.1", 0) as server:
            port.append(server.sockets[0].getsockname()[1])
            ready.set()
            while not stop.is_set(): await asyncio.sleep(0.02)
    port, stop = [], threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(talk(stop)), daemon=True)
    thread.start()
    assert ready.wait(10)
    names = [f"C{i}USDT" for i in range(400)]
    urls = (f"http://127.0.0.1:{port[0]}", f"ws://127.0.0.1:{port[0]}/ws", f"ws://127.0.0.1:{port[0]}/ws-api/v3")
    stream = MarketStream(Still(), {s: default_instrument(s, 1.0) for s in names}, "1m", dict.fromkeys(names, 0), urls).start()
    end = time.monotonic() + 30
    while not stream.healthy and time.monotonic() < end: time.sleep(0.02)
    stream.stop(), stop.set(), thread.join(10)
    assert len(asked) == 8 and {m for _, _, m, _ in asked} == {"SUBSCRIBE"}
    per_line = Counter(ws for ws, *_ in asked)
    assert max(per_line.values()) <= 5 and all(len(p) <= 200 for *_, p in asked)
    assert sorted(x for *_, p in asked for x in p) == sorted([f"{s.lower()}@kline_1m" for s in names] + [f"{s.lower()}@bookTicker" for s in names])


def test_five_thousand_events_a_second_on_one_core():
    told = measure_stream(20)
    assert told["complete"] and told["events_per_cpu_s"] >= 5_000, told


# ---- what the venue really said

SAMPLES = shared() / "data/api_samples" if shared() else None
needs_samples = pytest.mark.skipif(SAMPLES is None, reason="no recorded venue answers beside this checkout")


def line(symbol):
    "A stream that nobody connects, to hand messages to."
    stream = MarketStream(Still(), {symbol: default_instrument(symbol, 1.0)}, "1m", {symbol: 0})
    stream._loop = SimpleNamespace(create_task=lambda job: job.close())  # fetches are asked for, and never made
    stream.healthy = True
    return stream


@needs_samples
def test_recorded_streams_leave_the_last_quote_and_the_forming_bar():
    stream = line("NKNUSDT")
    messages = [json.loads(x) for x in (SAMPLES / "ws-combined-stream-2021-10-12.jsonl").read_text().splitlines()]
    taken = Counter(stream._mine(payload(m)) for m in messages)
    tickers = [m["data"] for m in messages if m["stream"] == "nknusdt@bookTicker"]
    bars = [m["data"] for m in messages if m["stream"].startswith("nknusdt@kline")]
    assert taken == {True: sum(m["stream"].endswith("@bookTicker") or "@kline" in m["stream"] for m in messages), False: sum("@depth" in m["stream"] or "rade" in m["stream"] for m in messages)}
    quote = stream.quote("NKNUSDT")
    assert (quote.bid, quote.ask, quote.bid_qty) == tuple(float(tickers[-1][k]) for k in "baB")
    assert stream.last("NKNUSDT") == (0.3528, 1633998523963, 0.3527, 1633998480000) and len(bars) == 1 and stream.get() is None
    stream._mine(bars[0] | {"k": bars[0]["k"] | {"x": True}})
    assert stream.get() is None and stream._bars.held["NKNUSDT"][0].close == 0.3528  # years after the last bar: what lies between is fetched first


@needs_samples
def test_recorded_books_trades_and_tickers():
    for name in ("NKNUSDT", "LRCBTC", "RUNEEUR"):
        body = json.loads((SAMPLES / f"depth-{name}-limit1000-2021-10-12.json").read_text())
        book = read_book(name, body, 5)
        assert len(book.bids) == len(body["bids"]) and book.bids[0] == tuple(map(float, body["bids"][0])) and book.bids[0][0] < book.asks[0][0]
    def body(name): return json.loads((SAMPLES / f"nautilus/http_json/{name}_response.json").read_text())
    assert read_trades("BNBBTC", body("trades")) == [(4.000001, 1499865549590)]
    ticker = body("ticker_24hr")
    assert read_volumes(ticker if isinstance(ticker, list) else [ticker])["BNBBTC"] == 15.3
    assert read_book("BNBBTC", body("depth"), 1).asks == ((4.000002, 12.0),)


@pytest.mark.parametrize("change", [{"h": "NaN"}, {"l": "-1"}, {"c": "x"}, {"v": "-5"}, {"h": "0.1"}, {"o": None}])
def test_an_impossible_closed_bar_is_refused_by_name_and_asked_for(change, capsys):
    stream, asked = line("BTCUSDT"), []
    stream._gap = asked.append
    k = {"t": 60_000, "x": True, "o": "1", "c": "1", "h": "1", "l": "1", "v": "1"}
    stream._mine({"e": "kline", "E": 119_999, "s": "BTCUSDT", "k": k | change})
    assert asked == ["BTCUSDT"] and stream.get() is None
    stream._mine({"u": 1, "s": "BTCUSDT", "b": "2", "B": "1", "a": "1", "A": "1"})  # crossed
    assert stream.quote("BTCUSDT") is None and stream.quote("BTCUSDT") is None


# ---- nobody else is asked

def test_markets_are_loaded_from_the_given_server_alone(stage):
    "With keys, ccxt would ask sapi, fapi and dapi for currencies and margins."
    venue = CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=5, key="k", secret="s")
    venue._client.load_markets()
    venue.instruments()
    asked = {r["request"] for r in stage.books()["requests"]}
    assert asked == {"GET /api/v3/exchangeInfo"}, asked


def test_the_test_network_has_no_sapi():
    client = rest_client(True, None, 1, "k", "s")
    spot = {k: v for k, v in client.urls["api"].items() if k in ("public", "private", "v1") or k.startswith("sapi")}
    assert set(spot) == {"public", "private", "v1"} and {urlsplit(v).hostname for v in spot.values()} == {"testnet.binance.vision"}
    assert not client.options["fetchCurrencies"] and not client.options["fetchMargins"] and client.options["fetchMarkets"]["types"] == ["spot"]


# ---- the whole of it

def test_a_dynamic_universe_trades_at_a_venue(own_home):
    "Paper on a venue's bars: chosen by its listings, every close a scan, a halt named in the verdicts and in the feed's health."
    symbols = ("BTCUSDT", "ETHUSDT", "USDCUSDT")
    panel = Panel.from_frames(synth_market(symbols, "1m", "2025-03-01", "2025-03-01T05:00", 7), "1m")
    listed = {s: default_instrument(s, float(panel.close[0, j])) for j, s in enumerate(symbols)}
    with serve(panel, listed, {"USDT": Decimal(100_000)}, {"k": Key("s")}, start_ms=int(panel.times[200]) + 1_000) as stage:
        flags = {"data.source": "live", "data.interval": "1m", "data.history_bars": 150, "data.grace_s": 0.2, "strategy": "rules.crossover", "universe.dynamic": True, "universe.min_quote_volume": 1.0,
                 "universe.refresh_s": 1, "exchange.rest_url": stage.url, "exchange.ws_url": stage.ws_url, "exchange.ws_api_url": stage.ws_api_url}
        with open_station(flags=flags, cycles=4) as station:
            feed = station.engine.feed
            assert feed.panel.symbols == ("BTCUSDT", "ETHUSDT") and feed.warmup_rows >= 150 and not np.isnan(feed.panel.close).any()
            runner = threading.Thread(target=station.run, daemon=True)
            runner.start()
            end = time.monotonic() + 60
            while not (feed.stream and feed.stream.healthy and not feed.stream.filling) and time.monotonic() < end: time.sleep(0.02)
            stage.jump(bars=1)
            stage.fault("halt", symbol="ETHUSDT")
            while feed.barred("ETHUSDT") != "not traded now: BREAK" and time.monotonic() < end: time.sleep(0.02)
            assert feed.health()["barred"] == {"ETHUSDT": "not traded now: BREAK"}
            for _ in range(3):
                done = station.done
                stage.jump(bars=1)
                while station.done == done and runner.is_alive() and time.monotonic() < end: time.sleep(0.02)
            runner.join(20)
            assert not runner.is_alive() and station.done == 4
            barred = Proposal("ETHUSDT", 0, Signal("ETHUSDT", 0, Action.BUY, 90.0), Decimal(1), 1.0, 1.0, 1.0, ExitPlan(), Decimal(1))
            feed.watch.out["ETHUSDT"], feed.late = "not traded now: BREAK", False
            said = station.engine._refused(barred, listed["ETHUSDT"], 0.5)
            assert (said.allowed, said.reasons, said.detail) == (False, ("SYMBOL_STATUS",), "not traded now: BREAK")
    (written,) = (own_home / "data" / "universe").glob("*.jsonl")
    assert written.name == "binance-rehearsal.jsonl"
