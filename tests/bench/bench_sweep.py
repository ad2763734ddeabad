"""`lab.sweep` beside raw vectorbt in one run: 10,000 EMA pairs × 9,000 bars × 5 symbols, counted in the ledger.

vectorbt would need minutes and gigabytes for all of them, so it gets an even sample of the same pairs on the same bars, a hundred of each symbol at once; both
sides are measured in combinations for each second of processor time, so that a busy machine favours neither. The sampled answers are compared first."""
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from bnml.core.clock import to_ms
from bnml.data.panel import Panel
from bnml.data.synth import synth_market

SYMBOLS = ("AUSDT", "BUSDT", "CUSDT", "DUSDT", "EUSDT")
FEE, SLIPPAGE, CASH, START = 0.001, 0.0002, 10_000.0, to_ms("2024-01-01")


def market(bars: int) -> Panel:
    return Panel.from_frames(synth_market(SYMBOLS, "1h", START, START + bars * 3_600_000, 7), "1h")


def configurations(count: int):
    "`count` pairs of a fast and a slower window."
    from bnml.lab.lines import grid
    return grid("ema", fast=range(3, 60), slow=range(5, 260)).iloc[:count]


def clocked(work) -> tuple[float, float, object]:
    "Processor seconds, wall seconds, result."
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def kernel_run(combinations: int, bars: int, stop: float | None) -> dict:
    "The whole sweep: lines, walk, figures, one trial for each configuration and symbol in the ledger."
    from bnml.lab.lines import tape
    from bnml.lab.sweep import cores, screen
    from bnml.lab.tally import tally
    from bnml.ml.trials import Trials
    panel, configs = market(bars), configurations(combinations)
    if stop: configs = configs.assign(stop=stop)
    screen(tape(panel, SYMBOLS[0]), "ema", configs.iloc[:2])  # compiled, or read from the cache
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def work(ledger):
        for s in SYMBOLS:
            t = tape(panel, s)
            table = screen(t, "ema", configs, fee=FEE, slippage=SLIPPAGE, cash=CASH)
            if ledger: tally(ledger, t, "ema", table, fee=FEE, slippage=SLIPPAGE)
            yield table

    with tempfile.TemporaryDirectory() as folder, Trials(folder) as ledger:
        alone, alone_wall, _ = clocked(lambda: [t.total_return.sum() for t in work(None)])
        cpu, wall, tables = clocked(lambda: [t[["fast", "slow", "total_return", "trades"]].iloc[::len(t) // 100] for t in work(ledger)])
        counted = ledger.count()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(combinations=len(configs) * len(SYMBOLS), counted=counted, threads=cores(), cpu_s=cpu, wall_s=wall, without_ledger_cpu_s=alone,
                without_ledger_wall_s=alone_wall, peak_mib=peak / 1024, grew_mib=(peak - before) / 1024,
                sample=[dict(fast=t.fast.tolist(), slow=t.slow.tolist(), total_return=t.total_return.tolist(), trades=t.trades.tolist()) for t in tables])


def same_answers(panel: Panel, sample: list[dict], stop: float | None):
    "Refuse to time answers that differ: the sample through vectorbt on the kernel's own signals, trade by trade."
    import pandas as pd
    from bnml.lab.confirm import confirm
    from bnml.lab.lines import EXITS, tape
    for symbol, asked in zip(SYMBOLS, sample):
        configs = pd.DataFrame(dict(fast=asked["fast"], slow=asked["slow"])).assign(**{k: np.nan for k in EXITS} | {"stop": stop or np.nan})
        found = confirm(tape(panel, symbol), "ema", configs, fee=FEE, slippage=SLIPPAGE, cash=CASH)
        np.testing.assert_allclose([c.equity[-1] / CASH - 1 for c in found], asked["total_return"], rtol=1e-9, atol=1e-12)
        assert [len(c.book) for c in found] == asked["trades"]


def vectorbt_run(bars: int, sample: list[dict], stop: float | None) -> dict:
    "The sample as vectorbt's documentation writes it: MA.run, crossings, Portfolio, total return."
    import pandas as pd
    import vectorbt as vbt
    from bnml.lab.vector import ENGINE
    panel, index = market(bars), pd.to_datetime(np.arange(bars), unit="h")
    same_answers(panel, sample, stop)
    spent, walled, parts = 0.0, 0.0, dict(signals=0.0, simulation=0.0)
    for j, asked in enumerate(sample):
        close, price = pd.Series(panel.close[:, j], index=index), np.append(panel.open[1:, j], np.nan)[:, None]
        ranges = dict(open=panel.open[:, [j]], high=panel.high[:, [j]], low=panel.low[:, [j]])
        levels = dict(sl_stop=stop, stop_entry_price="price", stop_exit_price="stopmarket", **ranges) if stop else {}

        def signals():
            fast, slow = (vbt.MA.run(close, asked[k], ewm=True, short_name=k) for k in ("fast", "slow"))
            return fast.ma_crossed_above(slow).to_numpy(), fast.ma_crossed_below(slow).to_numpy()

        def simulation(up, down):
            pf = vbt.Portfolio.from_signals(close, pd.DataFrame(up, index=index), pd.DataFrame(down, index=index), price=price, fees=FEE, slippage=SLIPPAGE,
                                            init_cash=CASH, freq="1h", max_orders=2 * int(up.sum()) + 1, engine=ENGINE, **levels)
            return pf.total_return().to_numpy()

        if not j: simulation(*signals())
        for part, work in (("signals", signals), ("simulation", lambda: simulation(*found))):
            cpu, wall, found = clocked(work)
            spent, walled, parts[part] = spent + cpu, walled + wall, parts[part] + cpu
    return dict(engine=ENGINE, cpu_s=spent, wall_s=walled, simulation_cpu_s=parts["simulation"], combinations=sum(len(a["fast"]) for a in sample),
                peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def apart(what: str, **asked) -> dict:
    "One side in a process of its own, so that its peak memory is its own."
    done = subprocess.run([sys.executable, "-m", "tests.bench.bench_sweep", what], input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def side(combinations: int, bars: int, stop: float | None) -> dict:
    mine = apart("kernel", combinations=combinations, bars=bars, stop=stop)
    sample = mine.pop("sample")
    theirs = apart("vectorbt", bars=bars, sample=sample, stop=stop)
    per = lambda r, k="cpu_s": r["combinations"] / r[k]
    return dict(lab_sweep=mine, vectorbt=theirs, sample=f"{theirs['combinations']:,} of the {mine['combinations']:,} for vectorbt",
                per_cpu_s=per(mine), vectorbt_per_cpu_s=per(theirs), ratio=per(mine) / per(theirs),
                ratio_without_ledger=per(mine, "without_ledger_cpu_s") / per(theirs), ratio_wall=per(mine, "wall_s") / per(theirs, "wall_s"), ratio_to_simulation_alone=per(mine) / per(theirs, "simulation_cpu_s"))


def run(combinations: int = 10_000, bars: int = 9_000) -> dict:
    "Without and with a stop inside the bar."
    return dict(bars=bars, symbols=len(SYMBOLS), plain=side(combinations, bars, None), with_stop=side(combinations, bars, 0.03),
                aim="ratio >= 30, peak_mib <= 512")


if __name__ == "__main__":
    if len(sys.argv) > 1: print(json.dumps(dict(kernel=kernel_run, vectorbt=vectorbt_run)[sys.argv[1]](**json.load(sys.stdin))))
    else: print(json.dumps(run(), indent=1))
