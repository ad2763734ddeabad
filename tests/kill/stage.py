"The exchange of the rehearsal: a rough market, fast minutes, and books of its own."
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pandas as pd

from bnml.core.clock import floor_ms
from bnml.data.panel import Panel
from bnml.domain.market import default_instrument
from bnml.domain.plan import FeeModel
from bnml.venue.gate import Key, Meter
from bnml.venue.rehearsal import Rehearsal, serve
from bnml.venue.wire import ApiError

D, MINUTE = Decimal, 60_000
SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT")
KEYS = {"EXCHANGE_API_KEY": "killed-key-0123456789", "EXCHANGE_API_SECRET": "killed-secret-abcdefghij"}
START = {"USDT": D(100_000)}


def frame(start_ms: int, before: int, after: int, rng: np.random.Generator) -> pd.DataFrame:
    "A walk with a little wind at its back, so that a hundred round trips don't end the account."
    n = before + after
    step = rng.normal(0.0004, 0.0025, n) * np.where(rng.random(n) < 0.05, 3, 1)
    close = 100 * np.exp(np.cumsum(step))
    open_ = np.concatenate([[100.0], close[:-1]])
    high = np.maximum(open_, close) * (1 + rng.exponential(0.0008, n))
    low = np.minimum(open_, close) * (1 - rng.exponential(0.0008, n))
    times = start_ms + (np.arange(n) - before) * MINUTE
    index = pd.DatetimeIndex(times.astype("datetime64[ms]"), tz="UTC", name="open_time")
    return pd.DataFrame({"open": open_, "high": high, "low": low, "close": close, "volume": 1e6}, index)


@contextmanager
def stage(seed: int, ahead: int = 3000, before: int = 300):
    "A rehearsal on a market of a seed; the third symbol knows stop-limit orders only."
    rng, start = np.random.default_rng(seed), floor_ms(int(time.time() * 1000), "1m")
    panel = Panel.from_frames({s: frame(start, before, ahead, rng) for s in SYMBOLS}, "1m")
    rules = {s: default_instrument(s, 100.0) for s in SYMBOLS}
    rules[SYMBOLS[2]] = replace(rules[SYMBOLS[2]], order_types=frozenset({"MARKET", "LIMIT", "STOP_LIMIT", "TARGET"}))
    with serve(panel, rules, START, {KEYS["EXCHANGE_API_KEY"]: Key(KEYS["EXCHANGE_API_SECRET"])}, start_ms=start + 1000, fees=FeeModel(0.001, 0.001, "base"),
               seed=seed, steps=2, meter=Meter(10**9)) as it:
        leaping(it.street.gate)
        yield it


def leaping(gate):
    "A minute passes in no time here, so a request that was signed just before is not too old; other tests look at that."
    prove = gate.prove
    def proven(*args):
        try: prove(*args)
        except ApiError as e:
            if e.code != -1021: raise
    gate.prove = proven


class Market(threading.Thread):
    "Lets minutes pass at the venue while it is let go; now and then a fill comes in parts or late."
    def __init__(self, venue: Rehearsal, rng: random.Random, pause_s: float = 0.25):
        super().__init__(daemon=True)
        self.venue, self.rng, self.pause_s = venue, rng, pause_s
        self.bars, self.error = 0, None
        self._go, self._still, self._end = threading.Event(), threading.Event(), False
        self.jumped = threading.Event()  # a minute has just begun to pass

    def run(self):
        while not self._end:
            if not self._go.wait(0.1): continue
            self._still.clear()
            try: self.minute()
            except Exception as e: self.error = e
            self._still.set()
            time.sleep(self.pause_s * (0.5 + self.rng.random()))

    def minute(self):
        "One minute, with or without a fault of the market."
        if self.rng.random() < 0.2: self.venue.fault("partial_fill", symbol=self.rng.choice(SYMBOLS), times=1, fraction="0.4")
        if self.rng.random() < 0.1: self.venue.fault("delayed_fill", symbol=self.rng.choice(SYMBOLS), times=1, delay_ms=3000)
        self.jumped.set()
        self.venue.jump(bars=1)
        self.bars += 1

    def let(self, go: bool):
        "Go on, or stand still; standing still returns when it does."
        if go: self._still.clear(); self._go.set(); return
        self._go.clear()
        if self.is_alive(): time.sleep(0.01); self._still.wait(40)

    def end(self):
        self._go.clear()
        self._end = True
        self.join(60)
