"The screening kernel and vectorbt make the same trades, over thousands of random configurations of every rule."
import numpy as np
import pandas as pd
import pytest

from bnml.core.base import BnmlError
from bnml.data.panel import Panel
from bnml.domain.plan import ExitPlan, SlippageModel
from bnml.lab import confirm as confirming
from bnml.lab.confirm import confirm
from bnml.lab.lines import CLOSE, EXITS, LINE_RULES, grid, tape
from bnml.lab.sweep import FIGURES, screen
from bnml.lab.vector import action_matrix, backtest_vector
from bnml.trade.rules import Crossover, RsiExtremes

MARKETS, EACH, BARS = 12, 100, 260  # × the rules: 4,800 configurations


def market(rng, bars: int = BARS):
    "A wild market: 3 % bars, gaps of 1 %, ranges that reach far, and prices on a coarse grid so that levels are met exactly."
    close = 100 * np.exp(rng.normal(0, 0.03, bars).cumsum())
    start = np.concatenate(([100.0], close[:-1])) * np.exp(rng.normal(0, 0.01, bars) * (rng.random(bars) < 0.5))
    high, low = (f(start, close) * np.exp(s * rng.exponential(0.015, bars)) for f, s in ((np.maximum, 1), (np.minimum, -1)))
    values = np.round(np.stack([start, high, low, close, rng.random(bars) + 1]), 1)
    return tape(Panel(["AUSDT"], "1h", 1_735_689_600_000 + 3_600_000 * np.arange(bars), values[:, :, None]), "AUSDT")


def configurations(rng, rule: str, count: int) -> pd.DataFrame:
    "Random parameters and exits, each exit there half of the time."
    whole = lambda low, high: rng.integers(low, high, count)
    fast = whole(1, 25)
    rows = dict(ema=dict(fast=fast, slow=fast + whole(1, 40)), sma=dict(fast=fast, slow=fast + whole(1, 40)),
                rsi=dict(bars=whole(2, 20), low=rng.uniform(15, 50, count), high=rng.uniform(50, 85, count)),
                breakout=dict(enter=whole(1, 30), leave=whole(1, 30)))[rule]
    reach = dict(stop=(0.003, 0.2), stop_atr=(0.3, 5), target=(0.003, 0.3), target_atr=(0.3, 8))
    return pd.DataFrame(rows | {k: np.where(rng.random(count) < 0.5, np.round(rng.uniform(*reach[k], count), 3), np.nan) for k in EXITS})


@pytest.mark.parametrize("rule", LINE_RULES)
def test_every_trade_of_thousands_of_configurations(rule):
    rng, seen = np.random.default_rng(len(rule)), dict(trades=0, inside=0, entry_bar=0)
    for _ in range(MARKETS):
        t, configs = market(rng), configurations(rng, rule, EACH)
        start = int(rng.choice([0, rng.integers(1, 60)]))
        costs = dict(fee=float(rng.choice([0, 0.001, 0.02])), slippage=float(rng.choice([0, 0.0002, 0.01])))
        end = len(t) - int(rng.integers(0, 20))
        table, theirs = screen(t, rule, configs, spans=[(start, end)], **costs), confirm(t, rule, configs, start=start, end=end, **costs)
        returns = np.stack([c.returns for c in theirs])
        with np.errstate(invalid="ignore"): sharpe = returns.mean(axis=1) / returns.std(axis=1, ddof=1)
        np.testing.assert_allclose(table.total_return, [c.equity[-1] / 10_000 - 1 for c in theirs], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(table.sharpe_bar, np.where(returns.any(axis=1), sharpe, np.nan), rtol=1e-7, atol=1e-9)
        assert table.trades.tolist() == [len(c.book) for c in theirs]
        for book in (c.book for c in theirs):
            seen["trades"] += len(book)
            seen["inside"] += int(book[:, 7].sum())
            seen["entry_bar"] += int(((book[:, 7] == 1) & (book[:, 0] == book[:, 1])).sum())
    assert seen["trades"] > 3000 and seen["inside"] > 2000 and seen["entry_bar"] > 300, f"the comparison must meet the hard cases: {seen}"


@pytest.mark.parametrize("strategy, rule, asked", [(Crossover(5, 20), "ema", dict(fast=5, slow=20)), (RsiExtremes(35, 65, 9), "rsi", dict(bars=9, low=35, high=65))])
def test_the_kernel_trades_the_rules_that_trade(strategy, rule, asked):
    "The same strategy through `backtest_vector`: one door for signals, another for the kernel, the same bars, prices and stops."
    t = market(np.random.default_rng(3), 900)
    panel, first = t.panel, strategy.warmup_bars - 1
    run = backtest_vector(action_matrix(strategy, panel), panel, plan=ExitPlan(stop_atr=2.0, stop_pct=0.04), slippage=SlippageModel(2.0))
    mine = confirm(t, rule, grid(rule, **asked, stop=0.04, stop_atr=2.0), start=first)[0].trades
    theirs = pd.DataFrame(run.trades)
    assert len(mine) >= 10 and mine.inside.sum() >= 5
    assert panel.times[mine.entry_row].tolist() == (theirs.entry_time_ms // panel.step * panel.step).tolist()
    np.testing.assert_allclose(mine.entry_price, theirs.entry_price, rtol=1e-12)
    np.testing.assert_allclose(mine.exit_price, theirs.exit_price, rtol=1e-12)


def test_a_difference_is_refused(monkeypatch):
    "A kernel that pays one part in a million more in fees is found by the first configuration."
    t, configs = market(np.random.default_rng(5)), grid("ema", fast=3, slow=9, stop=0.02)
    honest = confirming.kernel_books
    monkeypatch.setattr(confirming, "kernel_books", lambda *a, fee, **k: honest(*a, fee=fee * (1 + 1e-6), **k))
    with pytest.raises(BnmlError, match="AUSDT ema .* trades are not vectorbt's .* differ by"):
        confirm(t, "ema", configs)


def test_threads_and_chunks_change_nothing():
    t, g = market(np.random.default_rng(6), 400), grid("sma", fast=range(2, 12), slow=range(12, 40, 3), stop=[None, 0.05])
    one = screen(t, "sma", g, threads=1)
    pd.testing.assert_frame_equal(one, screen(t, "sma", g, threads=4, memory_mib=7 * 8 * 400 / 2**20))
    assert list(one.columns[-len(FIGURES):]) == list(FIGURES) and np.isfinite(t.prices[CLOSE]).all()
