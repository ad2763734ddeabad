"A strategy that is always busy: it buys and sells by the minute of the hour, whatever the market does."
import numpy as np

from bnml.domain.signal import Strategy, signals

PERIOD, HELD = 6, 4  # minutes of a round, and of them held


class Churn(Strategy):
    "Every symbol in a rhythm of its own."
    name, warmup_bars = "churn", 20

    def frame(self, symbol, bars):
        minute = bars.index.as_unit("ms").asi8 // 60_000
        phase = (minute + 2 * sum(symbol.encode())) % PERIOD
        return signals(symbol, bars, phase < 2, phase == HELD, np.float64(90.0))
