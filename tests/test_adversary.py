"Attempts to break the trading core: holes, silence, collapses, tiny prices, coarse ticks, fees in odd coins, restarts, lies about time, and a cheat in the ledger."
import shutil
import sqlite3
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st

from bnml.core.base import BadData, shared
from bnml.core.clock import VirtualClock
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.domain.filters import round_quantity
from bnml.domain.market import default_instrument
from bnml.domain.orders import Purpose, Status
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.portfolio import identity_gap
from bnml.domain.signal import Strategy, signals
from bnml.ops.settings import Settings
from bnml.trade.assembly import assemble
from bnml.trade.books import Books
from bnml.trade.breakers import Breakers, RiskSettings, observe, observe_one
from bnml.trade.ledger import Ledger
from bnml.trade.protection import fits
from bnml.trade.rules import Crossover
from bnml.trade.violations import audit, recompute
from bnml.venue.sim import SimVenue
from tests.once import once  # noqa: F401

HOUR, T0, START = 3_600_000, 1_735_689_600_000, 24
LOOSE = dict(max_positions=6, min_confidence=0, max_exposure=1, max_symbol_exposure=1, daily_loss_pct=100, weekly_loss_pct=100, max_drawdown_pct=100,
             max_consecutive_losses=1000, cooldown_minutes=0, max_orders_per_day=1000)
STOP_LIMITS = frozenset({"MARKET", "LIMIT", "STOP_LIMIT", "TARGET"})


class Dice(Strategy):
    "Throws dice that depend on the bar's time alone: causal, and busy."
    name, warmup_bars = "dice", 1

    def __init__(self, seed=1, buy=0.15, sell=0.05):
        self.seed, self.buy, self.sell = seed, buy, sell

    def frame(self, symbol, bars):
        hour = (bars.index.as_unit("ms").asi8 - T0 + 10_000 * HOUR) // HOUR % 20_000
        dice, sure = np.random.default_rng([self.seed, *symbol.encode()]).random((2, 20_000))[:, hour]
        return signals(symbol, bars, dice > 1 - self.buy, dice < self.sell, confidence=20 + 80 * sure, reason=self.name)


class At(Strategy):
    "Buys at the bars it is told."
    name, warmup_bars = "at", 1

    def __init__(self, *rows):
        self.rows = rows

    def frame(self, symbol, bars):
        row = (bars.index.as_unit("ms").asi8 - T0) // HOUR
        return signals(symbol, bars, np.isin(row, self.rows), np.zeros(len(bars), bool))


def frame(rows, times=None) -> pd.DataFrame:
    "Bars out of (open, high, low, close, volume)."
    index = pd.to_datetime(T0 + HOUR * np.arange(len(rows)) if times is None else times, unit="ms", utc=True).rename("open_time")
    return pd.DataFrame(np.asarray(rows, float), columns=["open", "high", "low", "close", "volume"], index=index)


def wild(seed, n=130, symbols=("BTCUSDT", "PEPEUSDT", "OMUSDT"), thin=False, holes=True) -> Panel:
    "Jumps, gaps at the open, silent bars, holes, listings and delistings."
    rng, frames = np.random.default_rng(seed), {}
    for symbol, price in zip(symbols, (60_000.0, 1.1e-5, 6.3)):
        step = rng.normal(0, 0.01, n) + np.where(rng.random(n) < 0.02, rng.normal(0, 0.25, n), 0)
        close = price * np.exp(np.cumsum(step))
        open_ = np.concatenate(([price], close[:-1])) * np.exp(np.where(rng.random(n) < 0.1, rng.normal(0, 0.05, n), 0))
        high, low = np.maximum(open_, close) * (1 + abs(rng.normal(0, 0.005, n))), np.minimum(open_, close) * (1 - abs(rng.normal(0, 0.005, n)))
        volume = rng.lognormal(0, 1, n) * (3e3 if thin else 1e8) / price * (rng.random(n) > 0.05)
        there = rng.random(n) > (0.1 if holes else 0)
        if holes and rng.random() < 0.5: there[(a := rng.integers(0, n - 20)) : a + rng.integers(1, 20)] = False
        if holes and rng.random() < 0.3: there[rng.integers(n // 2, n) :] = False
        if holes and rng.random() < 0.3: there[: rng.integers(0, n // 3)] = False
        frames[symbol] = frame(np.column_stack([open_, high, low, close, volume]))[there]
    return Panel.from_frames(frames, "1h")


def plausible(panel) -> dict:
    "Instruments fitted to each symbol's first price."
    first = lambda x: float(x[np.isfinite(x)][0])
    return {s: default_instrument(s, first(panel.open[:, j])) for j, s in enumerate(panel.symbols)}


class Watch:
    "Looks at every visited close for coins without a stop, double orders, overselling and books that differ."
    def __init__(self, venue):
        self.venue, self.bad = venue, []

    def __call__(self, e, row):
        said, kept = self.venue.balances(), e.desk.portfolio.balances
        if any(x < 0 or x != kept.get(a, 0) for a, x in said.items()): self.bad.append((row, "balances", said, kept))
        if not np.isfinite(e.equity): self.bad.append((row, "equity", e.equity))
        for h in e.desk.holdings.values(): self.look(e, row, h)

    def look(self, e, row, h):
        v, mine = self.venue, lambda i: i.symbol == h.symbol and i.purpose in (Purpose.STOP, Purpose.EXIT)
        covered = sum((r.open_qty for r in v._resting.values() if mine(r.intent)), Decimal(0)) + sum((i.quantity for q in v._requests for i in q.intents if mine(i)), Decimal(0))
        entries = [o for o in v.open_orders(h.symbol) if o.intent.purpose == Purpose.ENTRY]
        if len(entries) > 1: self.bad.append((row, "double entry", h.symbol))
        if covered > h.quantity and h.instrument.base not in e.desk.portfolio.fees: self.bad.append((row, "oversold", h.symbol, covered, h.quantity))
        close = e.panel.close[row, e.column[h.symbol]]
        bare = round_quantity(h.instrument, max(h.quantity - covered, Decimal(0)), market=True)
        worth = Decimal(repr(min(float(close), h.exits.stop) * 0.98)) if h.exits and close == close else Decimal(0)
        if fits(h.instrument, bare, worth): self.bad.append((row, "naked", h.symbol, h.quantity, bare))


def machine(panel, strategy, settings, rows=(START, None), ledger=None, instruments=None, balances=None):
    "An engine and what watches it."
    clock, c = VirtualClock(int(panel.times[rows[0]])), settings.costs
    venue = SimVenue(instruments or plausible(panel), balances or {"USDT": Decimal(10_000)}, FeeModel(c.maker, c.taker, c.fee_asset),
                     SlippageModel(c.slippage_bps), c.latency_ms, c.participation, clock)
    watch = Watch(venue)
    return assemble(strategy, ReplayFeed(panel, *rows), venue, clock, ledger, settings, on_status=watch), watch


def story(r) -> dict:
    "All that a run says about itself."
    return dict(orders=[(o.intent, o.status, o.filled, o.updated_ms, o.reason) for o in r.orders], fills=r.fills, verdicts=r.verdicts, trades=r.trades,
                equity=r.equity.tolist(), times=r.times.tolist(), summary=r.summary(), dust=r.dust, open=r.open_positions)


def book(panel, settings, balances=None, start=START, url="sqlite://") -> Ledger:
    "A ledger whose session has begun."
    ledger = Ledger(url, "t", durable=False)
    ledger.begin("paper", "replay", "x", settings, balances or {"USDT": Decimal(10_000)}, int(panel.times[start]))
    return ledger


def proven(panel, strategy, settings, instruments=None, balances=None, start=START):
    "Run with every eye open: leaps, bar by bar, audit."
    ledger = book(panel, settings, balances, start)
    e, watch = machine(panel, strategy, settings, (start, None), ledger, instruments, balances)
    run = e.run()
    ledger.end(e.clock.now_ms(), e.venue.balances())
    other, slowly = machine(panel, strategy, settings, (start, None), None, instruments, balances)
    mine, theirs = story(run), story(other.run(leap=False))
    for k in mine: assert repr(mine[k]) == repr(theirs[k]), k
    assert watch.bad == slowly.bad == []
    assert not any(identity_gap(balances or {"USDT": Decimal(10_000)}, run.fills, e.desk.portfolio).values())
    return run, recompute(ledger, "t", panel), e


@hyp(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.sampled_from(["quote", "base", "BNB"]), st.sampled_from([None, 0.1, 0.02]), st.booleans(), st.booleans())
def test_no_market_breaks_it(seed, asset, participation, thin, loose):
    "Leaps equal steps, every coin is covered, nothing is sent twice, the books balance, and the audit has nothing to say."
    symbols = ("BNBUSDT" if asset == "BNB" else "BTCUSDT", "PEPEUSDT", "OMUSDT")
    settings = Settings.model_validate(dict(risk=LOOSE if loose else {}, costs=dict(fee_asset=asset, participation=participation)))
    _, found, _ = proven(wild(seed, symbols=symbols, thin=thin), Dice(seed), settings)
    crumbs = {"UNPROTECTED", "ALREADY_HELD"} if participation else set()  # a thin market leaves crumbs that no venue takes: the audit knows no filters
    assert {v.code for v in found} <= crumbs, found


@hyp(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.integers(40, 125))
def test_the_future_can_be_anything(seed, cut):
    "What happened until a close is the same whatever comes after it: another market, or none."
    panel, settings = wild(seed), Settings.model_validate(dict(risk=LOOSE))
    rng = np.random.default_rng(seed + 1)
    changed = Panel(panel.symbols, "1h", panel.times, panel._block.copy())
    changed._block[:4, cut:] *= np.exp(rng.normal(0, 0.5, (1, len(panel) - cut, 1)))
    changed._block[4, cut:] *= rng.random((len(panel) - cut, 1))
    runs = [machine(p, Dice(seed), settings, (START, stop), instruments=plausible(panel))[0].run() for p, stop in ((panel, None), (changed, None), (panel, cut))]
    known = int(panel.times[cut])
    for a in runs[1:]:
        for x, y in ((runs[0].fills, a.fills), (runs[0].verdicts, a.verdicts)):
            until = lambda rows: [r for r in rows if (r.time_ms + HOUR if hasattr(r, "allowed") else r.time_ms) <= known - (not hasattr(r, "allowed"))]
            assert until(x) == until(y)
        assert runs[0].equity[: cut - START].tolist() == a.equity[: cut - START].tolist()


@hyp(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.integers(30, 125), st.sampled_from([None, 0.1]))
def test_a_restart_anywhere_changes_nothing(seed, cut, participation):
    "Orders, fills, verdicts and equity of two processes are those of one."
    panel, settings = wild(seed), Settings.model_validate(dict(risk=LOOSE, costs=dict(participation=participation)))
    whole = machine(panel, Dice(seed), settings, ledger=book(panel, settings))[0].run()
    ledger = book(panel, settings)
    machine(panel, Dice(seed), settings, (START, min(cut, len(panel) - 2)), ledger)[0].run()
    second, watch = machine(panel, Dice(seed), settings, (min(cut, len(panel) - 2), None), ledger)
    rest = second.run()
    assert [(f.client_id, f.quantity, f.price, f.time_ms) for f in rest.fills] == [(f.client_id, f.quantity, f.price, f.time_ms) for f in whole.fills]
    assert rest.equity.tolist() == whole.equity[-len(rest.equity) :].tolist() and watch.bad == []
    assert [(v["symbol"], v["time_ms"], bool(v["allowed"])) for v in ledger.rows("verdicts")] == [(v.symbol, v.time_ms, v.allowed) for v in whole.verdicts]


def flat(n, price=100.0, volume=1e6):
    "Bars around one price."
    return [(price, price * 1.01, price * 0.99, price, volume)] * n


def test_an_entry_does_not_outlive_its_bar():
    "Five bars without a candle, then twice the price: what was sized for 100 is not bought at 200."
    bars = frame(flat(40))
    hole = pd.concat([bars[:31], bars[36:] * [2, 2, 2, 2, 1]])
    panel = Panel.from_frames({"SOLUSDT": hole, "BTCUSDT": frame(flat(40))}, "1h")
    run, found, _ = proven(panel, At(30), Settings.model_validate(dict(risk=LOOSE)))
    assert [(o.intent.symbol, o.status) for o in run.orders if o.intent.purpose == Purpose.ENTRY] == [("BTCUSDT", Status.FILLED), ("SOLUSDT", Status.CANCELED)]
    assert found == [] and run.open_positions[0]["symbol"] == "BTCUSDT"
    for cut in (31, 32, 33):  # nor does a restart revive it
        settings = Settings.model_validate(dict(risk=LOOSE))
        ledger = book(panel, settings)
        machine(panel, At(30), settings, (START, cut), ledger)[0].run()
        assert machine(panel, At(30), settings, (cut, None), ledger)[0].run().fills == run.fills


def test_a_slow_entry_stops_buying():
    "In a silent market an order waits for its bar, not for ever; a hold in between is not undermined."
    panel = Panel.from_frames({"SOLUSDT": frame(flat(30) + flat(2, volume=0.0) + flat(8, 103.0))}, "1h")
    for entry, end in (("market", Status.CANCELED), ("limit_ioc", Status.EXPIRED)):
        run, _, _ = proven(panel, At(30), Settings.model_validate(dict(risk=LOOSE, execution=dict(entry=entry))))
        assert run.fills == [] and [o.status for o in run.orders] == [end]


def test_a_stop_is_not_withdrawn_where_none_can_be_placed():
    "The trailing stop is to be raised while the symbol has no candle: the old one stands until the new one can."
    rise = [(100 + k, 101.5 + k, 99.5 + k, 101 + k, 1e6) for k in range(12)]
    bars = frame(flat(30) + rise + flat(4, 111.0))
    panel = Panel.from_frames({"SOLUSDT": bars.drop(bars.index[36:38]), "BTCUSDT": frame(flat(46))}, "1h")
    run, found, _ = proven(panel, At(29), Settings.model_validate(dict(risk=LOOSE, exits=dict(targets=()))))
    assert found == [] and run.reprotect_seconds_max <= 1 and sum(o.intent.purpose == Purpose.STOP for o in run.orders) > 4


def test_a_fee_may_eat_the_position():
    "BNB is held as a position, and the venue takes another symbol's fee from it: what is left is still protected and sold."
    falls = flat(33) + [(100, 100, 80, 80, 1e6)] + flat(6, 80.0)
    panel = Panel.from_frames({"BNBUSDT": frame(flat(30, 600.0) + [(600, 640, 598, 638, 1e6)] * 3 + flat(7, 640.0)), "SOLUSDT": frame(falls)}, "1h")
    settings = Settings.model_validate(dict(risk=LOOSE, costs=dict(fee_asset="BNB")))
    seen = 0
    for seed in range(12):
        run, found, e = proven(wild(seed, symbols=("BNBUSDT", "PEPEUSDT", "OMUSDT")), Dice(seed), settings)
        seen += any(f.fee_asset == "BNB" and f.symbol != "BNBUSDT" for f in run.fills)
        stuck = [o for o in run.orders if o.intent.purpose == Purpose.EXIT and o.status == Status.REJECTED]
        assert len(stuck) <= 2, "a sale that was refused is tried again with what is there"
    assert seen and proven(panel, At(29, 31), settings)[1] == []


def test_a_coin_without_a_price_is_no_hole_in_the_account():
    "A fee pool whose pair is listed later: equity stays a number, and the drawdown halt works."
    late = frame(flat(40, 600.0))[30:]
    fall = frame(flat(26) + [(100 * 0.9**k, 100 * 0.9**k, 90 * 0.9**k, 90 * 0.9**k, 1e6) for k in range(14)])
    panel = Panel.from_frames({"SOLUSDT": fall, "BNBUSDT": late}, "1h")
    settings = Settings.model_validate(dict(risk={**LOOSE, "max_drawdown_pct": 0.5}, exits=dict(stop_pct=0.5, stop_atr=None, hard_stop_pct=0.5)))
    run, found, e = proven(panel, Dice(1, 1.0, 0.0), settings, balances={"USDT": Decimal(10_000), "BNB": Decimal("0.5")})
    assert np.isfinite(run.equity).all() and np.isfinite(e.risk.breakers.marks.peak)
    assert run.denied["MAX_DRAWDOWN"] > 0 and found == []


@pytest.mark.parametrize("kinds", [frozenset(), STOP_LIMITS], ids=["stop", "stop-limit"])
def test_a_gap_below_the_stop_ends_the_position(kinds):
    "Also where the venue has only stop-limits, and the price leaps over the limit."
    crash = flat(33) + [(50, 51, 49, 50, 1e6)] + [(50 - k, 50.5 - k, 48 - k, 49 - k, 1e6) for k in range(8)]
    panel = Panel.from_frames({"SOLUSDT": frame(crash)}, "1h")
    instruments = {s: replace(i, order_types=kinds) for s, i in plausible(panel).items()}
    exits = dict(hard_stop_pct=None, time_stop_bars=None, targets=())
    run, found, _ = proven(panel, At(30), Settings.model_validate(dict(risk=LOOSE, exits=exits)), instruments)
    assert len(run.trades) == 1 and run.open_positions == [] and found == []
    assert run.trades[0].exit_time_ms < T0 + 35 * HOUR and run.trades[0].exit_price > 48


def test_nothing_is_sold_for_nothing():
    "One tick is the price: slippage rounds down to no less."
    coarse = flat(32, 0.0006) + flat(10, 0.0001)
    panel = Panel.from_frames({"SOLUSDT": frame([(o, h, l, c, 1e12) for o, h, l, c, _ in coarse])}, "1h")
    i = {"SOLUSDT": replace(plausible(panel)["SOLUSDT"], tick=Decimal("0.0001"), min_price=Decimal("0.0001"))}
    run, _, _ = proven(panel, Dice(4, 0.5, 0.1), Settings.model_validate(dict(risk=LOOSE)), i)
    assert run.fills and min(f.price for f in run.fills) == Decimal("0.0001")


class Early(Strategy):
    "Dates each signal one bar before it could be known."
    name, warmup_bars = "early", 1

    def frame(self, symbol, bars):
        up = bars.close > bars.open
        return signals(symbol, bars.shift(freq="-1h"), up, ~up)


def test_a_lie_about_time_is_refused():
    with pytest.raises(BadData, match="times are not those of its bars"):
        machine(wild(1), Early(), Settings())[0].run()


class Together(Strategy):
    "Every symbol at once, every six bars."
    name, warmup_bars = "together", 1

    def frame(self, symbol, bars):
        row = (bars.index.as_unit("ms").asi8 - T0) // HOUR
        return signals(symbol, bars, row % 6 == 0, row % 6 == 5)


@pytest.mark.parametrize("code, limits", [
    ("NO_CASH", dict(max_exposure=1)), ("MAX_EXPOSURE", dict(max_exposure=0.25)), ("MAX_POSITIONS", dict(max_positions=2)),
    ("DAILY_LOSS", dict(daily_loss_pct=0.8)), ("MAX_ORDERS_PER_DAY", dict(max_orders_per_day=2))])
def test_entries_of_one_bar_share_one_limit(code, limits):
    "Proposals of the same close see each other: together they keep what each would keep alone."
    sizing = dict(mode="fixed_quote", fixed_quote=4500, max_position=1, active=1, reserve=0, buffer=0) if code == "NO_CASH" else dict(mode="fixed_fraction", fixed_fraction=0.1)
    settings = Settings.model_validate(dict(risk=LOOSE | limits, sizing=sizing))
    run, found, _ = proven(wild(5, holes=False), Together(), settings)
    per_bar = pd.Series([v.time_ms for v in run.verdicts if v.allowed]).value_counts()
    assert found == [] and len(run.fills) > 10
    assert per_bar.max() >= 2 if code != "MAX_ORDERS_PER_DAY" else run.denied[code] > 0
    if code != "NO_CASH": assert run.denied[code] > 0


@hyp(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(50, 150)), min_size=70, max_size=140), st.integers(0, 6), st.lists(st.integers(1, 90), max_size=4))
def test_days_and_weeks_begin_at_midnight_utc(points, shift, cuts):
    "Marks after any cutting of the curve are those of a count by hand."
    times = T0 + shift * 86_400_000 + HOUR * np.cumsum([h for h, _ in points])
    equity = np.array([e for _, e in points])
    whole, pieces, one = (Breakers(RiskSettings()) for _ in range(3))
    observe(whole, times, equity)
    edges = sorted({0, len(times), *(min(c, len(times)) for c in cuts)})
    for a, b in zip(edges, edges[1:]): observe(pieces, times[a:b], equity[a:b])
    for t, e in zip(times.tolist(), equity.tolist()): observe_one(one, t, e)
    assert whole.marks.dump() == pieces.marks.dump() == one.marks.dump() and whole.holds == pieces.holds == one.holds
    for mark, rule in ((one.marks.day, "D"), (one.marks.week, "W-SUN")):  # a week begins on Monday
        at = pd.to_datetime(times, unit="ms")
        begin = at[-1].to_period(rule).start_time
        before = np.flatnonzero(at <= begin)
        assert mark == equity[before[-1] if len(before) else 0]


FOLDER = shared() and shared() / "data" / "binance"
real = pytest.mark.skipif(not FOLDER or not FOLDER.exists(), reason="no real candles here")


def candles(symbol, since, until):
    path = next(p for p in (FOLDER / f"{symbol}-1h.parquet", FOLDER / "history" / f"{symbol}-1h.parquet") if p.exists())
    return pd.read_parquet(path).set_index("open_time").loc[since:until]


@real
@pytest.mark.parametrize("kinds", [frozenset(), STOP_LIMITS], ids=["stop", "stop-limit"])
@pytest.mark.parametrize("symbol, since, until", [("OMUSDT", "2025-04-01", "2025-05-01"), ("LUNAUSDT", "2022-05-01", "2022-06-15"), ("PEPEUSDT", "2025-01-01", "2025-02-10")])
def test_real_collapses(symbol, since, until, kinds):
    "90 % in an hour, a coin that went to nothing and came back as another, and prices of 1e-5."
    panel = Panel.from_frames({symbol: candles(symbol, since, until)}, "1h")
    instruments = {s: replace(i, order_types=kinds) for s, i in plausible(panel).items()}
    run, found, _ = proven(panel, Dice(5, 0.3, 0.02), Settings.model_validate(dict(risk=LOOSE)), instruments)
    assert found == [] and len(run.fills) > 20 and min(f.price for f in run.fills) > 0
    assert run.unprotected_seconds_max == 0.25 and np.isfinite(run.equity).all()


def traded(folder, since, fills):
    "Five real pairs through the engine from a day on: the panel, and a ledger that can be tampered with."
    if not FOLDER or not FOLDER.exists(): pytest.skip("no real candles here")
    names = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT")
    panel = Panel.from_frames({s: candles(s, since, "2025-09-30") for s in names}, "1h")
    settings, start = Settings(), 300
    path = folder / "ledger.db"
    ledger = book(panel, settings, start=start, url=f"sqlite:///{path}")
    e, watch = machine(panel, Crossover(), settings, (start, None), ledger)
    run = e.run()
    ledger.end(e.clock.now_ms(), e.venue.balances())
    assert watch.bad == [] and len(run.fills) > fills
    ledger.close()
    return panel, path


@pytest.fixture(scope="module")
def five(tmp_path_factory): return traded(tmp_path_factory.mktemp("five"), "2025-05-20", 200)


@pytest.fixture(scope="module")
def few(tmp_path_factory): return traded(tmp_path_factory.mktemp("few"), "2025-08-24", 40)


@pytest.fixture(scope="module")
def books(five):
    "The four months as the audit reads them: what is asked of them then are other limits."
    panel, path = five
    with Ledger(f"sqlite:///{path}", "t") as ledger: return Books(ledger, panel)


def test_an_honest_replay_has_no_violation(five, few):
    for panel, path in (five, few): assert recompute(f"sqlite:///{path}", "t", panel) == []


CHEATS = {
    "FILL_OUTSIDE_BAR": "update fills set raw_price = '1' where rowid = (select max(rowid) from fills)",
    "SAME_BAR_FILL": "update fills set time_ms = time_ms - 7200000 where client_id = (select client_id from intents where purpose = 'ENTRY' limit 1)",
    "UNPROTECTED": "update orders set accepted_ms = accepted_ms + 60000 where client_id in (select client_id from intents where purpose = 'STOP')",
    "NO_VERDICT": "delete from verdicts where allowed = 1 and n = (select max(n) from verdicts where allowed = 1)",
    "BALANCE": "update fills set fee = '0' where rowid = (select max(rowid) from fills)",
    "EQUITY": "update equity set equity = equity * 1.001 where time_ms = (select max(time_ms) from equity)",
    "UNKNOWN_FILL": "update fills set client_id = 'ghost' where rowid = (select max(rowid) from fills)",
}


@pytest.mark.parametrize("code", CHEATS)
def test_a_cheat_is_found(few, code, tmp_path):
    panel, path = few
    forged = shutil.copy(path, tmp_path / "forged.db")
    with sqlite3.connect(forged) as db: assert db.execute(CHEATS[code]).rowcount >= 1
    assert code in {v.code for v in recompute(f"sqlite:///{forged}", "t", panel)}


@pytest.mark.parametrize("limits, code", [(dict(max_positions=1), "MAX_POSITIONS"), (dict(max_exposure=0.05), "MAX_EXPOSURE"), (dict(daily_loss_pct=0.05), "DAILY_LOSS"),
                                          (dict(cooldown_minutes=10_000), "COOLDOWN"), (dict(min_confidence=99), "LOW_CONFIDENCE"), (dict(max_unprotected_s=0.1), "UNPROTECTED")])
def test_limits_that_did_not_hold_are_found(books, limits, code):
    assert code in {v.code for v in audit(books, Settings().risk.model_dump() | limits)}
