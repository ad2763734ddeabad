"Nothing sees the future: every feature column on real candles, the context's included, and planted leaks that must be caught."
import numpy as np
import pandas as pd
import pytest

from bnml.core.base import Refused, shared
from bnml.data.panel import Panel
from bnml.data.synth import synth_bars
from bnml.domain.signal import Strategy, signals
from bnml.ml.audit import prefix_audit, refuse, strategy_prefix_audit
from bnml.ml.context import COLUMNS_BESIDE
from bnml.ml.families import columns, names, warmup_bars
from bnml.ml.features import last_rows, matrix, matrix_panel

FROM, HOUR = 1_700_006_400_000, 3_600_000


def candles(symbol, rows):
    "Real hours, or the synthetic market where there are none."
    path = shared() and shared() / f"data/binance/{symbol}-1h.parquet"
    if not path or not path.exists():
        return synth_bars(symbol, "1h", FROM, FROM + rows * HOUR)
    bars = pd.read_parquet(path)
    return (bars.set_index("open_time") if "open_time" in bars else bars)[["open", "high", "low", "close", "volume"]][-rows:]


@pytest.fixture(scope="module", params=["BTCUSDT", "SOLUSDT", "DOGEUSDT"])
def bars(request):
    return candles(request.param, 6000)


@pytest.fixture(scope="module")
def btc():
    return candles("BTCUSDT", 6000)


def test_every_column_at_fifty_bars(bars, btc):
    whole = matrix(bars, context=btc)
    for t in np.random.default_rng(5).integers(0, len(bars), 50):
        np.testing.assert_array_equal(matrix(bars[: t + 1], context=btc[: t + 1])[-1], whole[t])


def test_prefix_audit_passes_every_column(bars, btc):
    assert prefix_audit(lambda b: matrix(b, context=btc), bars, names("1h"), rows=20) == []


def test_warmup_is_enough_for_every_column(bars, btc):
    whole, keep = matrix(bars, context=btc), warmup_bars("1h")
    scale = np.maximum(np.nanmax(abs(whole), axis=0), 1e-6)  # a rare pattern may never occur
    for t in np.random.default_rng(6).integers(keep, len(bars), 20):
        gap = abs(matrix(bars[t - keep : t + 1], context=btc)[-1] - whole[t]) / scale
        worst = int(np.argmax(gap))
        assert gap[worst] <= 1e-9, (columns("1h")[worst].name, t, gap[worst])


def test_holes_and_silence_leave_no_infinity(bars, btc):
    rng = np.random.default_rng(7)
    some = bars[rng.random(len(bars)) > 0.05].copy()
    some.loc[rng.random(len(some)) < 0.2, "volume"] = 0.0
    whole = matrix(some, context=btc)
    assert np.isfinite(whole[warmup_bars("1h") :]).all() and not np.isinf(whole).any()
    for t in rng.integers(0, len(some), 10):
        np.testing.assert_array_equal(matrix(some[: t + 1], context=btc)[-1], whole[t])


def test_batch_prefix_and_streaming_agree_beside_the_context(bars, btc):
    "A frame, a panel with the context traded, one with it watched, and the newest rows."
    some, held = bars.drop(bars.index[[50, 5997]]), btc.drop(btc.index[[0, 3000, 5990]])
    frame = matrix(some, context=held)
    traded = Panel.from_frames({"ALTUSDT": some, "BTCUSDT": held}, "1h")
    watched = Panel.from_frames({"ALTUSDT": some}, "1h").watch({"BTCUSDT": held})
    there = ~np.isnan(traded.close[:, 0])
    np.testing.assert_array_equal(matrix_panel(traded, 1)[0][there], frame)
    np.testing.assert_array_equal(matrix_panel(watched, 1)[0][there], frame)
    for stop in (6000, 5500):
        np.testing.assert_array_equal(last_rows(watched, 3, 1, stop=stop)[0], last_rows(traded, 3, 1, stop=stop)[0])
        whole = matrix_panel(watched, 1)[0, stop - 3 : stop]
        np.testing.assert_allclose(last_rows(watched, 3, 1, stop=stop)[0], whole, rtol=1e-9, atol=1e-9)


def bent(context, t, seed=9):
    "The context with every price after row t changed."
    rng, out = np.random.default_rng(seed), context.copy()
    out.iloc[t + 1 :, :4] *= np.exp(rng.normal(0, 0.1, len(out) - t - 1))[:, None]
    return out


def after_bending(fn, bars, context, rows=8):
    "Columns that change at or before a row when only the context's later rows do."
    found, whole = set(), fn(bars, context)
    for t in np.random.default_rng(8).integers(300, len(bars) - 1, rows):
        now = fn(bars, bent(context, t))[: t + 1]
        found |= set(np.flatnonzero(~((now == whole[: t + 1]) | (np.isnan(now) & np.isnan(whole[: t + 1]))).all(axis=0)).tolist())
    return sorted(found)


def test_later_rows_of_the_context_do_not_matter(bars, btc):
    assert after_bending(lambda b, c: matrix(b, context=c), bars, btc) == []
    planted = after_bending(lambda b, c: matrix(b, context=c.shift(-1).dropna()), bars, btc)
    assert planted and {names("1h")[j] for j in planted} <= set(COLUMNS_BESIDE)


@pytest.mark.parametrize("prices, volumes", [(1000.0, 7.0), (1024.0, 8.0)])
def test_no_raw_price_or_volume_enters(bars, btc, prices, volumes):
    "Other units, same features; a power of two rounds nothing, so not even a candle rule's tie falls the other way."
    dearer = bars * [prices, prices, prices, prices, volumes]
    itself = bars.close.equals(btc.close)
    one, two = matrix(bars, context=btc), matrix(dearer, context=dearer if itself else btc / 64)
    assert (np.isnan(one) == np.isnan(two)).all()
    far = abs(one - two) > 1e-6 * np.maximum(np.nanmax(abs(one), axis=0), 1e-6)
    ties = np.array([c.family in ("pattern", "adx") and prices == 1000.0 for c in columns("1h")])
    assert not far[:, ~ties].any() and far[:, ties].sum() < 0.01 * far[:, ties].size + 1, [names("1h")[j] for j in np.flatnonzero(far.any(axis=0))]


WANTED = {
    96: "ema", 97: "macd", 98: "adx", 99: "supertrend", 100: "rsi", 101: "stochastic", 102: "williams", 103: "cci", 104: "mfi", 105: "atr",
    106: "bollinger", 107: "keltner", 108: "volatility", 109: "obv", 110: "volume", 111: "accumulation", 112: "vwap", 113: "roc",
    114: "range_24h", 115: "pattern", 116: "ema_spread", 117: "divergence", 118: "confluence",
}


def test_every_wished_family_is_there_with_formula_and_source():
    known = {c.family for c in columns("1h")}
    assert set(WANTED.values()) | {"context"} <= known, set(WANTED.values()) - known
    assert all(c.formula and c.source and c.warmup >= c.lead >= 0 for c in columns("1h"))
    assert {"ema_9_dist", "ema_21_dist", "ema_50_dist", "ema_100_dist", "ema_200_dist", "roc_1h", "roc_4h", "roc_1d"} <= set(names("1h"))


def with_leak(leak):
    "bnml's matrix with one more column."
    return lambda bars: np.column_stack([matrix(bars), leak(bars)])


LEAKS = {
    "centred_window": lambda b: b.close.rolling(9, center=True).mean() / b.close,
    "scaler_on_all_rows": lambda b: (b.volume - b.volume.mean()) / b.volume.std(),
    "unshifted_higher_timeframe": lambda b: b.close.resample("4h").transform("last") / b.close,
}


@pytest.mark.parametrize("name", LEAKS)
def test_planted_leak_is_caught_and_named(name):
    bars = candles("ETHUSDT", 1500)
    found = prefix_audit(with_leak(LEAKS[name]), bars, names("1h") + [name])
    assert [f.where for f in found] == [name]
    assert 0 <= found[0].row < len(bars) and found[0].time_ms == bars.index.as_unit("ms").asi8[found[0].row]
    with pytest.raises(Refused, match=name):
        refuse(found, "these features")


class Peeks(Strategy):
    "Buys when the next close is higher."
    name, warmup_bars = "peeks", 1

    def frame(self, symbol, bars):
        after = bars.close.shift(-1)
        return signals(symbol, bars, after > bars.close, after < bars.close)


def test_a_strategy_that_peeks_is_refused():
    found = strategy_prefix_audit(Peeks(), "ETHUSDT", candles("ETHUSDT", 500))
    with pytest.raises(Refused, match="peeks action"):
        refuse(found, "strategy peeks")
