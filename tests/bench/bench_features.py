"""The feature matrix beside TA-Lib and pandas-ta-classic, in one process and on the same arrays."""
import json
import os
import sys
import time

import numpy as np
import pandas as pd

PATTERNS = (
    "DOJI DRAGONFLYDOJI GRAVESTONEDOJI HAMMER HANGINGMAN SPINNINGTOP MARUBOZU BELTHOLD ENGULFING HARAMI 3INSIDE 3OUTSIDE "
    "3WHITESOLDIERS 3BLACKCROWS MORNINGSTAR EVENINGSTAR"
).split()


def market(n_symbols: int, n_bars: int, seed: int = 1) -> np.ndarray:
    "Random bars (5, n_bars, n_symbols): open, high, low, close, volume."
    rng = np.random.default_rng(seed)
    shape = (n_bars, n_symbols)
    close = 100 * np.exp(rng.normal(0, 0.008, shape).cumsum(0))
    open_ = np.r_[close[:1], close[:-1]]
    high = np.maximum(open_, close) * np.exp(abs(rng.normal(0, 0.003, shape)))
    low = np.minimum(open_, close) * np.exp(-abs(rng.normal(0, 0.003, shape)))
    return np.stack([open_, high, low, close, rng.lognormal(3, 1, shape)])


def talib_indicators(talib, o, h, l, c, v) -> int:
    "TA-Lib's own indicators among the columns, their lines only; returns the number of calls."
    lines = [talib.EMA(c, timeperiod=n) for n in (9, 21, 50, 100, 200)]
    lines += [talib.MACD(c), talib.ADX(h, l, c), talib.PLUS_DI(h, l, c), talib.MINUS_DI(h, l, c)]
    lines += [talib.RSI(c, timeperiod=n) for n in (14, 7)]
    lines += [talib.STOCH(h, l, c, fastk_period=14), talib.WILLR(h, l, c), talib.CCI(h, l, c, timeperiod=20), talib.MFI(h, l, c, v)]
    lines += [talib.NATR(h, l, c), talib.TRANGE(h, l, c), talib.BBANDS(c, timeperiod=20)]
    lines += [talib.ATR(h, l, c, timeperiod=10), talib.EMA(c, timeperiod=20)]  # SuperTrend's and Keltner's
    lines += [talib.OBV(c, v), talib.AD(h, l, c, v), talib.BOP(o, h, l, c)]
    lines += [talib.ROCP(c, timeperiod=n) for n in (1, 4, 24)]
    lines += [talib.MAX(h, timeperiod=24), talib.MIN(l, timeperiod=24)]
    return len(lines + [getattr(talib, "CDL" + name)(o, h, l, c) for name in PATTERNS])


def talib_windows(talib, o, h, l, c, v) -> int:
    "The moving sums, averages and extremes the other columns are made of, as TA-Lib calls; returns their number."
    strength, flow = talib.RSI(c), talib.TYPPRICE(h, l, c) * v
    move = talib.ROCP(c, timeperiod=1)
    lines = [talib.SUM(v, timeperiod=n) for n in (20, 24, 100)] + [talib.SUM(flow, timeperiod=n) for n in (20, 24)]
    lines += [talib.SMA(v, timeperiod=n) for n in (5, 20, 50)] + [talib.SMA(talib.TRANGE(h, l, c), timeperiod=100)]
    lines += [talib.SMA(move * move, timeperiod=n) for n in (24, 240)]
    lines += [talib.SMA(lines[-2], timeperiod=240), talib.STDDEV(lines[-2], timeperiod=240)]
    lines += [f(x, timeperiod=n) for f in (talib.MAX, talib.MIN) for x in (strength, c) for n in (14, 50)]
    return len(lines) + 4


def talib_context(talib, c, other) -> int:
    "Slope, correlation and moves beside another pair's closes; returns the number of calls."
    own, theirs = talib.ROCP(c, timeperiod=1), talib.ROCP(other, timeperiod=1)
    lines = [f(theirs, own, timeperiod=n) for f in (talib.BETA, talib.CORREL) for n in (48, 240)]
    lines += [talib.ROCP(other, timeperiod=n) for n in (4, 24)] + [talib.ROCP(c, timeperiod=n) for n in (4, 24)]
    return len(lines + [talib.SUM(x * x, timeperiod=48) for x in (own, theirs)]) + 2


def pandas_ta_indicators(ta, frame: pd.DataFrame) -> None:
    "The same indicators from pandas-ta-classic, its TA-Lib shortcut switched off."
    o, h, l, c, v = (frame[k] for k in ("open", "high", "low", "close", "volume"))
    for n in (9, 20, 21, 50, 100, 200):
        ta.ema(c, length=n, talib=False)
    ta.macd(c, talib=False), ta.adx(h, l, c), ta.supertrend(h, l, c, length=10, multiplier=3.0)
    ta.rsi(c, length=14, talib=False), ta.rsi(c, length=7, talib=False)
    ta.stoch(h, l, c), ta.willr(h, l, c, talib=False), ta.cci(h, l, c, length=20, talib=False), ta.mfi(h, l, c, v, talib=False)
    ta.natr(h, l, c, talib=False), ta.atr(h, l, c, length=10, talib=False), ta.bbands(c, length=20, talib=False)
    ta.obv(c, v, talib=False), ta.ad(h, l, c, v, talib=False), ta.cmf(h, l, c, v), ta.kc(h, l, c)
    for n in (1, 4, 24):
        ta.roc(c, length=n, talib=False)


def fastest(work, times: int) -> float:
    "Seconds of the fastest of a few runs."
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def run(n_symbols: int = 50, n_bars: int = 10_000, repeats: int = 5) -> dict:
    "Seconds and ratios; bnml with one thread per core and with one, the others as they come (one thread)."
    import talib

    from bnml.data.panel import Panel
    from bnml.ml.families import names
    from bnml.ml.features import last_row, matrix_panel

    values = market(n_symbols, n_bars)
    times = 1_700_006_400_000 + np.arange(n_bars) * 3_600_000
    symbols = ["BTCUSDT"] + [f"S{j}USDT" for j in range(1, 100)]  # the first is the context of all
    panel = Panel(symbols[:n_symbols], "1h", times, values)
    pairs = [[np.ascontiguousarray(x[:, j]) for x in values] for j in range(n_symbols)]
    cores = os.cpu_count() or 1
    matrix_panel(panel, threads=1)  # loads the compiled kernels

    btc = pairs[0][3]
    calls = talib_indicators(talib, *pairs[0]) + talib_windows(talib, *pairs[0]) + talib_context(talib, btc, btc)
    ours = fastest(lambda: matrix_panel(panel, threads=cores), repeats)
    alone = fastest(lambda: matrix_panel(panel, threads=1), repeats)
    indicators = fastest(lambda: [talib_indicators(talib, *p) for p in pairs], repeats)
    windows = fastest(lambda: [talib_windows(talib, *p) + talib_context(talib, p[3], btc) for p in pairs], repeats)
    hundred = Panel(symbols, "1h", times[-3000:], np.tile(values[:, -3000:], 100 // n_symbols + 1)[:, :, :100])
    out = {
        "symbols": n_symbols, "bars": n_bars, "columns": len(names("1h")), "threads": cores, "talib_calls": calls, "talib_threads": 1,
        "bnml_s": ours, "bnml_one_thread_s": alone, "talib_s": indicators + windows, "talib_indicators_only_s": indicators,
        "ratio_talib": ours / (indicators + windows), "ratio_talib_one_thread": alone / (indicators + windows),
        "ratio_talib_indicators_only": ours / indicators, "last_row_100_pairs_s": fastest(lambda: last_row(hundred), repeats),
    }
    return out | pandas_ta(pairs, ours)


def pandas_ta(pairs: list, ours: float, share: int = 4) -> dict:
    "pandas-ta-classic on the first few pairs, scaled to all of them."
    try:
        import pandas_ta_classic as ta
    except ImportError:
        return {"pandas_ta_s": None, "pandas_ta_left_out": "pandas-ta-classic is not installed: it belongs to the bench extra"}
    index = pd.date_range("2023-01-01", periods=len(pairs[0][0]), freq="h")
    frames = [pd.DataFrame(dict(zip(("open", "high", "low", "close", "volume"), p)), index=index) for p in pairs[:share]]
    pandas_ta_indicators(ta, frames[0])
    taken = fastest(lambda: [pandas_ta_indicators(ta, f) for f in frames], 1) * len(pairs) / len(frames)
    return {"pandas_ta_s": taken, "pandas_ta_measured_pairs": len(frames), "times_faster_than_pandas_ta": taken / ours}


if __name__ == "__main__":
    json.dump(run(), sys.stdout, indent=1)
    print()
