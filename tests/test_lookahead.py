"Nothing sees the future: every feature column on real candles, and three planted leaks that must be caught."
import numpy as np
import pandas as pd
import pytest

from bnml.core.base import Refused, shared
from bnml.data.synth import synth_bars
from bnml.domain.signal import Strategy, signals
from bnml.ml.audit import prefix_audit, refuse, strategy_prefix_audit
from bnml.ml.features import columns, matrix, names, warmup_bars

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


def test_every_column_at_fifty_bars(bars):
    whole = matrix(bars)
    for t in np.random.default_rng(5).integers(0, len(bars), 50):
        np.testing.assert_array_equal(matrix(bars[: t + 1])[-1], whole[t])


def test_prefix_audit_passes_every_column(bars):
    assert prefix_audit(matrix, bars, names("1h"), rows=20) == []


def test_warmup_is_enough_for_every_column(bars):
    whole, keep = matrix(bars), warmup_bars("1h")
    scale = np.maximum(np.nanmax(abs(whole), axis=0), 1e-6)  # a rare pattern may never occur
    for t in np.random.default_rng(6).integers(keep, len(bars), 20):
        gap = abs(matrix(bars[t - keep : t + 1])[-1] - whole[t]) / scale
        worst = int(np.argmax(gap))
        assert gap[worst] <= 1e-9, (columns("1h")[worst].name, t, gap[worst])


def test_holes_and_silence_leave_no_infinity(bars):
    rng = np.random.default_rng(7)
    some = bars[rng.random(len(bars)) > 0.05].copy()
    some.loc[rng.random(len(some)) < 0.2, "volume"] = 0.0
    whole = matrix(some)
    assert np.isfinite(whole[warmup_bars("1h") :]).all() and not np.isinf(whole).any()
    for t in rng.integers(0, len(some), 10):
        np.testing.assert_array_equal(matrix(some[: t + 1])[-1], whole[t])


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
