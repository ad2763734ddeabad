"""`lab.sweeps`' sweep of EMA pairs beside raw vectorbt, in one process on the same arrays."""
import gc
import json
import statistics
import tempfile
import time

import numpy as np
import pandas as pd
import vectorbt as vbt

from bnml.core.clock import to_ms
from bnml.data.synth import synth_bars
from bnml.lab.sweeps import crossings, sweep_crossover
from bnml.lab.vector import ENGINE
from bnml.ml.indicators import ema
from bnml.ml.trials import Trials

FEE, SLIPPAGE, CASH = 0.001, 0.0002, 10_000.0


def pairs(count: int) -> tuple[list[int], list[int]]:
    "`count` pairs of a fast and a slower window."
    every = [(fast, slow) for fast in range(3, 60) for slow in range(fast + 2, fast + 200, 8)]
    return [f for f, _ in every[:count]], [s for _, s in every[:count]]


def raw_simulation(close, open_, up, down):
    "vectorbt's Portfolio over ready crossings and its total return: the part that vectorbt must do."
    index = pd.to_datetime(np.arange(len(close)), unit="h")
    price = np.append(open_[1:], np.nan)[:, None]
    pf = vbt.Portfolio.from_signals(
        pd.Series(close, index=index), pd.DataFrame(up, index=index), pd.DataFrame(down, index=index), price=price, fees=FEE,
        slippage=SLIPPAGE, init_cash=CASH, freq="1h", max_orders=2 * int(up.sum()) + 1, engine=ENGINE)
    return pf.total_return().to_numpy(), pf.trades.closed.count().to_numpy()


def raw_sweep(close, open_, fasts, slows):
    "The sweep as vectorbt's documentation writes it: MA.run, crossings, Portfolio, total return."
    series = pd.Series(close, index=pd.to_datetime(np.arange(len(close)), unit="h"))
    fast, slow = (vbt.MA.run(series, window, ewm=True, short_name=name) for window, name in ((fasts, "fast"), (slows, "slow")))
    return raw_simulation(close, open_, fast.ma_crossed_above(slow).to_numpy(), fast.ma_crossed_below(slow).to_numpy())


def timed(work, repeats: int = 3) -> tuple[float, object]:
    "Median seconds after one warm-up, and the last result."
    result, spent = work(), []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        result = work()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent), result


def run(combinations: int = 1000, bars: int = 10_000, repeats: int = 3) -> dict:
    "Seconds, combinations a second and ratios; refuses to time answers that differ."
    start = to_ms("2024-01-01")
    frame = synth_bars("BTCUSDT", "1h", start, start + bars * 3_600_000, 7)
    close, open_ = frame.close.to_numpy(), frame.open.to_numpy()
    fasts, slows = pairs(combinations)
    with tempfile.TemporaryDirectory() as folder, Trials(folder) as ledger:  # counting the trials is part of the time
        ours, table = timed(lambda: sweep_crossover(close, open_, fasts, slows, fee=FEE, slippage=SLIPPAGE, cash=CASH, ledger=ledger), repeats)
    averages = {n: ema(close, n) for n in {*fasts, *slows}}
    up, down = crossings(*(np.column_stack([averages[n] for n in side]) for side in (fasts, slows)))
    simulation, (returns, trades) = timed(lambda: raw_simulation(close, open_, up, down), repeats)
    np.testing.assert_allclose(table.total_return, returns, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(table.trades, trades)
    whole, _ = timed(lambda: raw_sweep(close, open_, fasts, slows), repeats)
    return dict(combinations=len(fasts), bars=bars, trades=int(trades.sum()), engine=ENGINE, sweep_s=ours,
                sweep_per_s=len(fasts) / ours, raw_s=whole, raw_simulation_s=simulation, ratio=ours / whole,
                ratio_to_simulation_alone=ours / simulation, aim="ratio <= 1.2")


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
