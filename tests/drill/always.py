"A strategy that wants to be in the market at every bar: whatever falls, it holds it."
import numpy as np

from bnml.domain.signal import Strategy, signals


class Always(Strategy):
    "BUY on every bar, never SELL: only stops, targets and limits take it out."
    name, warmup_bars = "always", 60

    def frame(self, symbol, bars):
        return signals(symbol, bars, np.ones(len(bars), bool), np.zeros(len(bars), bool), confidence=80.0, reason=self.name)
