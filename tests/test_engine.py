"One loop for every mode: leaps change nothing, a restart changes nothing, nothing fills on the signal's bar, every coin has a stop, the books balance."
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st

from bnml.core.base import shared
from bnml.core.clock import VirtualClock
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.domain.filters import round_quantity
from bnml.domain.market import default_instrument
from bnml.domain.orders import Purpose, Side
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.portfolio import identity_gap
from bnml.domain.signal import Strategy, signals
from bnml.lab.replay import replay
from bnml.ops.settings import Settings
from bnml.trade.assembly import assemble
from bnml.trade.ledger import Ledger
from bnml.trade.protection import fits, stop_prices
from bnml.trade.rules import Crossover
from bnml.venue.sim import SimVenue
from tests.once import once  # noqa: F401

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT")
START, H = 400, 3_600_000


@pytest.fixture(scope="module")
def panel() -> Panel:
    "Two months of five real pairs where they are, else of five synthetic ones."
    folder = shared() and shared() / "data" / "binance"
    if folder and all((folder / f"{s}-1h.parquet").exists() for s in SYMBOLS):
        return Panel.from_frames({s: pd.read_parquet(folder / f"{s}-1h.parquet").set_index("open_time")[-1500:] for s in SYMBOLS}, "1h")
    return Panel.from_frames(synth_market(SYMBOLS, "1h", "2025-06-01", "2025-08-03", 7), "1h")


def engine(panel, rows=(START, None), ledger=None, strategy=None, settings=None, instruments=None, fees=FeeModel(), participation=0.1):
    "An engine over rows of a panel, as a runner's replay has it."
    clock = VirtualClock(int(panel.times[rows[0]]))
    instruments = instruments or {s: default_instrument(s, float(panel.open[START, j])) for j, s in enumerate(panel.symbols)}
    venue = SimVenue(instruments, {"USDT": Decimal(10_000)}, fees, SlippageModel(2.0), 250, participation, clock)
    return assemble(strategy or Crossover(), ReplayFeed(panel, *rows), venue, clock, ledger, settings or Settings())


def same(a, b):
    "Two runs with one story."
    assert a.fills == b.fills
    assert [(o.intent, o.status, o.filled) for o in a.orders] == [(o.intent, o.status, o.filled) for o in b.orders]
    assert a.verdicts == b.verdicts
    assert a.summary() == b.summary()
    assert np.array_equal(a.equity, b.equity) and np.array_equal(a.times, b.times)


@pytest.fixture(scope="module")
def run(panel):
    return engine(panel).run()


@pytest.fixture(scope="module")
def month(panel):
    "Thirty days, bar by bar."
    return engine(panel, (START, START + 720)).run(leap=False)


VARIANTS = {
    "default": ({}, {}),
    "thin": ({}, {"participation": 1e-6}),
    "base fees": ({}, {"fees": FeeModel(asset="base")}),
    "tight": ({"exits": {"stop_atr": 1.0, "trail_after_atr": 0.5, "trail_step_atr": 0.0, "time_stop_bars": 7, "hard_stop_pct": 0.01}}, {}),
    "breakers": ({"risk": {"daily_loss_pct": 0.3, "weekly_loss_pct": 0.6, "max_drawdown_pct": 1.0, "drawdown_pause_hours": 30.0, "max_consecutive_losses": 2}}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_leaps_equal_bar_by_bar(panel, name):
    sections, options = VARIANTS[name]
    settings = Settings(**sections)
    fast, slow = (engine(panel, settings=settings, **options).run(leap) for leap in (True, False))
    same(fast, slow)
    assert fast.visited < slow.visited and len(fast.fills) > 10
    if name == "breakers": assert {"DAILY_LOSS", "CONSECUTIVE_LOSSES"} & set(fast.denied)


def test_backtest_and_runner_replay_are_one(panel, run, tmp_path):
    "A month by lab.replay, and the same month as the runner plays it: with a durable ledger, an inbox and a status."
    stop = START + 720
    instruments = {s: default_instrument(s, float(panel.open[START, j])) for j, s in enumerate(panel.symbols)}
    backtest = replay(Crossover(), panel, Settings(), START, stop, instruments=instruments).result
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", "paper")
    ledger.begin("paper", "replay", "rules.crossover", Settings(), {"USDT": Decimal(10_000)}, int(panel.times[START]))
    runner = engine(panel, (START, stop), ledger)
    seen = []
    runner.inbox, runner.on_status = SimpleNamespace(take=lambda: ()), lambda e, row: seen.append(row)
    paper = runner.run()
    same(backtest, paper)
    assert ledger.fills() == backtest.fills and [o.intent for o in ledger.orders()] == [o.intent for o in backtest.orders]
    assert seen[-1] <= stop - 1 and len(seen) == paper.visited
    ledger.close()


def test_no_fill_on_the_signal_bar(panel, run):
    intents = {o.intent.client_id: o.intent for o in run.orders}
    entries = [f for f in run.fills if intents[f.client_id].purpose == Purpose.ENTRY]
    assert entries
    for f in entries:
        row = panel.row(f.time_ms // H * H)
        assert f.time_ms > intents[f.client_id].created_ms and intents[f.client_id].created_ms <= panel.times[row]
        assert float(f.raw_price) == panel.open[row, panel.column(f.symbol)]


@pytest.mark.parametrize("cuts", [(500,), (437, 438, 811)])
def test_a_restart_gives_the_same_fills(panel, month, tmp_path, cuts):
    "Killed without a goodbye between two bars, taken up by a new process from the ledger alone."
    whole, stop = month, START + 720
    edges = [START, *(c + 100 for c in cuts), stop]
    for a, b in zip(edges, edges[1:]):
        ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", "s")
        ledger.begin("paper", "replay", "rules.crossover", {}, {"USDT": Decimal(10_000)}, 0)
        part = engine(panel, (a, b), ledger)
        result = part.run(leap=False)
        ledger._conn.close()  # no flush, no end: what counts is on the disk already
    assert result.fills == whole.fills
    assert {o.intent.client_id: o.status for o in result.orders} == {o.intent.client_id: o.status for o in whole.orders}
    assert result.equity_end == whole.equity_end and result.unprotected_seconds_max == whole.unprotected_seconds_max


class Wild(Strategy):
    "Signals out of a seed."
    name, warmup_bars = "wild", 0

    def __init__(self, seed: int, often: float, ahead: int | None = None): self.seed, self.often, self.ahead = seed, often, ahead

    def frame(self, symbol, bars):
        r = np.random.default_rng([self.seed, *symbol.encode()]).random((3, len(bars)))
        found = signals(symbol, bars, r[0] < self.often, r[1] < self.often / 2)
        return found if self.ahead is None else replace(found, horizon=(1 + r[2] * self.ahead).astype(np.int32))


def wild_panel(seed: int, sigma: float, holes: float) -> Panel:
    "Three random walks with leaps and missing bars."
    r, n, s = np.random.default_rng(seed), 160, 3
    close = np.array([60_000.0, 150.0, 0.1]) * np.exp(np.cumsum(r.standard_t(3, (n, s)) * sigma, axis=0))
    open_ = np.vstack([close[:1], close[:-1]]) * np.exp(r.normal(0, sigma / 2, (n, s)))
    high = np.maximum(open_, close) * np.exp(np.abs(r.normal(0, sigma, (n, s))))
    low = np.minimum(open_, close) * np.exp(-np.abs(r.normal(0, sigma, (n, s))))
    values = np.stack([open_, high, low, close, r.lognormal(6, 1, (n, s))])
    values[:, r.random((n, s)) < holes] = np.nan
    values[:, 0] = np.stack([open_, high, low, close, close])[:, 0]
    return Panel(("BTCUSDT", "SOLUSDT", "DOGEUSDT"), "1h", 1_735_689_600_000 + np.arange(n) * H, values)


def guarded(e) -> None:
    "At the end of a row: every coin that the venue could take a stop for has one, unless it is on its way out."
    stops = [o for o in e.venue.open_orders() if o.intent.purpose == Purpose.STOP]
    for h in e.desk.holdings.values():
        if h.exits is None or h.leaving or h.stopped: continue
        mine = [o for o in stops if o.intent.symbol == h.symbol]
        bare = round_quantity(h.instrument, h.quantity - sum((o.remaining for o in mine), Decimal(0)), market=True)
        at = mine[0].intent.stop_price if mine else stop_prices(h.instrument, h.exits.stop)[0]  # a higher stop is on its way from here
        assert not fits(h.instrument, bare, at), f"{bare} {h.symbol} are held without a stop"


@pytest.mark.parametrize("cut", [None, 90, 91, 117])
def test_the_horizon_is_the_time_stop(tmp_path, cut):
    "Every position ends at the open that its signal looked to, or before: by the fast path, bar by bar, and across a restart."
    panel, strategy = wild_panel(5, 0.003, 0.0), Wild(5, 0.2, 12)
    exits = {"stop_atr": 50.0, "trail_after_atr": None, "targets": [], "hard_stop_pct": None, "time_stop_bars": 4}
    settings = Settings(risk={"min_confidence": 0, "cooldown_minutes": 0, "max_orders_per_day": 1000, "max_consecutive_losses": 10_000}, exits=exits)
    horizon = {s: strategy.frame(s, panel.frame(s)).horizon for s in panel.symbols}
    instruments = {s: default_instrument(s, p) for s, p in zip(panel.symbols, (60_000.0, 150.0, 0.1))}
    make = lambda rows=(20, None), ledger=None: engine(panel, rows, ledger, strategy, settings, instruments, participation=None)
    whole = make().run(leap=False)
    if cut is None:
        same(make().run(), whole)
    else:
        for rows in ((20, cut), (cut, None)):
            ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", "s")
            ledger.begin("paper", "replay", "wild", {}, {"USDT": Decimal(10_000)}, 0)
            part = make(rows, ledger).run(leap=False)
            ledger._conn.close()
        assert part.fills == whole.fills
    timed = [t for t in whole.trades if t.exit_reason == "TIME_STOP"]
    for t in timed:
        entry, left = (panel.row(ms // H * H) for ms in (t.entry_time_ms, t.exit_time_ms))
        assert left - entry == horizon[t.symbol][entry - 1]
    assert {panel.row(t.exit_time_ms // H * H) - panel.row(t.entry_time_ms // H * H) for t in timed} - {4} and len(timed) > 5


@hyp(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10_000), st.sampled_from([0.003, 0.01, 0.04]), st.sampled_from([0.0, 0.05]), st.sampled_from([0.02, 0.2]),
       st.sampled_from(["quote", "base"]), st.sampled_from([None, 0.1, 0.001]), st.sampled_from([None, 2, 12]))
def test_books_balance_and_stops_hold(seed, sigma, holes, often, fee_asset, participation, ahead):
    panel = wild_panel(seed, sigma, holes)
    settings = Settings(risk={"min_confidence": 0, "cooldown_minutes": 0, "max_orders_per_day": 1000, "max_drawdown_pct": 100, "daily_loss_pct": 100, "weekly_loss_pct": 100,
                              "max_consecutive_losses": 10_000})
    instruments = {s: default_instrument(s, p) for s, p in zip(panel.symbols, (60_000.0, 150.0, 0.1))}
    make = lambda: engine(panel, (20, None), None, Wild(seed, often, ahead), settings, instruments, FeeModel(asset=fee_asset), participation)
    e, stops = make(), {}

    def watch(e, row):
        guarded(e)
        for h in e.desk.holdings.values():
            if h.exits:
                assert h.exits.stop >= stops.get(h.position_id, 0.0), "a stop fell"
                stops[h.position_id] = h.exits.stop
        assert e.desk.portfolio.balances == {k: v for k, v in e.venue.balances().items()} or not any(
            v - e.desk.portfolio.balances.get(k, 0) for k, v in e.venue.balances().items())

    e.on_status = watch
    slow, fast = e.run(leap=False), make().run()
    same(fast, slow)
    gaps = identity_gap({"USDT": Decimal(10_000)}, slow.fills, e.desk.portfolio)
    assert not any(gaps.values()), gaps
    sold = sum((f.quantity for f in slow.fills if f.side == Side.SELL), Decimal(0))
    assert sold <= sum((f.quantity for f in slow.fills if f.side == Side.BUY), Decimal(0))
    if slow.fills and participation is None: assert 0 < slow.unprotected_seconds_max <= 1.0  # a thin market sells, and protects, in parts
