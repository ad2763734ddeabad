"Two programs, one backtest: the engine and vectorbt agree wherever vectorbt can express the strategy."
from decimal import Decimal
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest

from bnml.core.base import shared
from bnml.core.clock import VirtualClock, to_ms
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.domain.market import free_instrument
from bnml.domain.plan import ExitPlan, FeeModel, SlippageModel
from bnml.lab.vector import action_matrix, backtest_vector
from bnml.ops.settings import Settings
from bnml.trade.assembly import assemble
from bnml.trade.breakers import CODES
from bnml.trade.rules import Crossover, RsiExtremes
from bnml.venue.fills import simulated
from bnml.venue.sim import SimVenue
from bnml.venue.spread import BarSpread, RecordedSpread

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT")
BALANCE, QUOTE, RTOL = 100_000, 1000.0, 1e-9


RULES = {"crossover": (Crossover(5, 20), 0.01), "rsi": (RsiExtremes(), 0.02)}  # with their stops


@pytest.fixture(scope="module")
def panel() -> Panel:
    "Five real pairs where they are, else five synthetic ones."
    folder = shared() and shared() / "data" / "binance"
    if folder and all((folder / f"{s}-1h.parquet").exists() for s in SYMBOLS):
        return Panel.from_frames({s: pd.read_parquet(folder / f"{s}-1h.parquet").set_index("open_time") for s in SYMBOLS}, "1h")
    return Panel.from_frames(synth_market(SYMBOLS, "1h", to_ms("2024-09-14"), to_ms("2025-10-01"), 7), "1h")


def plain(stop_pct: float, **costs) -> Settings:
    "What vectorbt can express: one entry, one fixed stop, a full exit, quote fees, no caps."
    return Settings(
        exits=dict(stop_atr=None, stop_pct=stop_pct, trail_after_atr=None, targets=(), time_stop_bars=None, hard_stop_pct=None),
        risk=dict(disable=CODES), sizing=dict(mode="fixed_quote", fixed_quote=QUOTE), costs=dict(participation=None, slippage_bps=2.0) | costs,
        execution=dict(entry="market") if costs else {},  # a bar's average may be beyond the limit of an entry, which vectorbt has not
        account=dict(start_balance=Decimal(BALANCE)))


@lru_cache(None)
def by_engine(rule, panel, fill="open", spread=None):
    "A rule through the engine on the simulated exchange, without filters."
    strategy, settings = RULES[rule][0], plain(RULES[rule][1], **({} if fill == "open" and spread is None else dict(fill=fill)))
    c, clock = settings.costs, VirtualClock(int(panel.times[0]))
    venue = simulated(fill, spread, {s: free_instrument(s) for s in panel.symbols}, {"USDT": settings.account.start_balance}, FeeModel(c.maker, c.taker),
                      SlippageModel(c.slippage_bps), c.latency_ms, c.participation, clock)
    return assemble(strategy, ReplayFeed(panel), venue, clock, None, settings).run()


@lru_cache(None)
def by_vector(rule, panel, fill="open", spread=None):
    strategy, stop_pct = RULES[rule]
    return backtest_vector(strategy, panel, quote_per_trade=QUOTE, start_balance=BALANCE, plan=ExitPlan(stop_atr=None, stop_pct=stop_pct),
                           slippage=SlippageModel(2.0), fill=fill, spread=spread)


def trades_of(rows) -> pd.DataFrame:
    "Trades of either program as one table."
    get = lambda t, k: t[k] if isinstance(t, dict) else getattr(t, k)
    names = ("symbol", "entry_time_ms", "exit_time_ms", "quantity", "entry_price", "exit_price", "fees", "pnl")
    table = pd.DataFrame([[get(t, k) for k in names] for t in rows], columns=names)
    return table.astype({k: float for k in names[3:]}).sort_values(["symbol", "entry_time_ms"], ignore_index=True)


@lru_cache(None)
def conflicts(rule, panel) -> tuple[int, int]:
    "(stops on the entry bar, BUY signals on the bar of a stop) among vectorbt's fills."
    run = by_vector(rule, panel)
    stops, entries = (run.fills[run.fills.reason == r] for r in ("STOP", "ENTRY"))
    bars, action = set(zip(entries.symbol, entries.row)), action_matrix(RULES[rule][0], panel)
    hit = list(zip(stops.symbol, stops.row))
    return sum(x in bars for x in hit), sum(action[row, panel.column(s)] == 1 for s, row in hit)


@pytest.mark.parametrize("rule", RULES)
def test_engine_and_vectorbt_agree(rule, panel):
    engine, vector = by_engine(rule, panel), by_vector(rule, panel)
    entry_bar_stops, _ = conflicts(rule, panel)
    assert len(vector.trades) >= 200 and entry_bar_stops >= 10, "the comparison must meet the hard cases"
    same(engine, vector, panel)


def recorded(panel) -> RecordedSpread:
    "Quotes in every third hour, spreads of 1 to 40 bps."
    rng = np.random.default_rng(5)
    return RecordedSpread({s: (panel.times[::3] + 1_000, rng.uniform(1, 40, len(panel.times[::3])) * 1e-4) for s in panel.symbols})


MODELS = {"vwap": ("vwap", lambda panel: None), "bar": ("open", lambda panel: BarSpread()), "both": ("vwap", lambda panel: BarSpread()), "quotes": ("open", recorded)}


@pytest.mark.parametrize("rule, model", [("rsi", "vwap"), ("crossover", "both"), ("rsi", "quotes")])
def test_engine_and_vectorbt_agree_on_every_model_of_fills(rule, model, panel):
    fill, make = MODELS[model]
    spread = make(panel)
    engine, vector = by_engine(rule, panel, fill, spread), by_vector(rule, panel, fill, spread)
    stops = int((vector.fills.reason == "STOP").sum())
    assert len(vector.trades) >= 200 and stops >= 50, "the comparison must meet the hard cases"
    same(engine, vector, panel)
    default = by_vector(rule, panel)
    assert vector.equity.equity.iloc[-1] != default.equity.equity.iloc[-1], "a model that changes nothing was not asked"
    if fill == "vwap":
        row = np.searchsorted(panel.times, [f.time_ms for f in engine.fills], side="right") - 1
        assert all(f.time_ms == panel.times[r] + panel.step - 1 for f, r in zip(engine.fills, row)), "no fill is known before its bar has closed"
        assert not {(s, r) for s, r, why in zip(vector.fills.symbol, vector.fills.row, vector.fills.reason) if why == "ENTRY"} & {
            (s, r) for s, r, why in zip(vector.fills.symbol, vector.fills.row, vector.fills.reason) if why == "STOP"}, "a stop woke in the bar of its entry"


def same(engine, vector, panel):
    "Trade by trade and close by close."
    mine, theirs = trades_of(engine.trades), trades_of(vector.trades)
    for name in ("symbol", "entry_time_ms", "exit_time_ms"):
        assert mine[name].tolist() == theirs[name].tolist(), name
    for name in ("quantity", "entry_price", "exit_price", "fees"):
        np.testing.assert_allclose(mine[name], theirs[name], rtol=RTOL, atol=0, err_msg=name)
    worth = (theirs.quantity * theirs.entry_price).to_numpy()  # a PnL near zero is a difference of two such amounts
    assert np.all(np.abs(mine.pnl - theirs.pnl) <= RTOL * np.maximum(np.abs(theirs.pnl), worth))
    assert engine.times.tolist() == (panel.times + panel.step).tolist()
    np.testing.assert_allclose(engine.equity, vector.equity.equity, rtol=RTOL, atol=0)


def test_the_default_is_the_simulator_itself():
    assert type(simulated("open", None, {}, {})) is SimVenue


def test_the_comparison_covers_buying_again_on_the_bar_of_a_stop(panel):
    "vectorbt alone would forget these signals: the two rows a bar are what keeps them."
    assert conflicts("rsi", panel)[1] >= 5


def test_a_difference_would_be_seen(panel):
    "One basis point more of slippage on one side is found."
    engine, strategy = by_engine("crossover", panel), RULES["crossover"][0]
    other = backtest_vector(strategy, panel, quote_per_trade=QUOTE, start_balance=BALANCE, plan=ExitPlan(stop_atr=None, stop_pct=0.01),
                            slippage=SlippageModel(2.0001))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(engine.equity, other.equity.equity, rtol=RTOL, atol=0)
