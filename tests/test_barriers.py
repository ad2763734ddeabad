"A barrier label is the engine's own trade: the same signals through risk, execution and exits end at the same bar with the same money."
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from bnml.core.base import shared
from bnml.core.clock import VirtualClock, to_ms
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_bars
from bnml.domain.market import free_instrument
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.signal import Strategy, signals
from bnml.ml.barriers import barrier_labels
from bnml.ops.settings import Settings
from bnml.trade.assembly import assemble
from bnml.trade.breakers import CODES
from bnml.venue.sim import SimVenue

SYMBOL = "SOLUSDT"


class Every(Strategy):
    "BUY on bars drawn beforehand."
    name, warmup_bars = "every", 60

    def __init__(self, chosen: set): self.chosen = chosen

    def frame(self, symbol, bars):
        buy = np.array([int(t) in self.chosen for t in bars.index.as_unit("ms").asi8], bool)
        return signals(symbol, bars, buy, np.zeros(len(bars), bool))


def candles(n):
    "Real hours where they are, else synthetic ones."
    file = shared() and shared() / "data" / "binance" / f"{SYMBOL}-1h.parquet"
    if file and file.exists():
        return pd.read_parquet(file).set_index("open_time").iloc[:n]
    return synth_bars(SYMBOL, "1h", to_ms("2024-09-14"), to_ms("2024-09-14") + n * 3_600_000)


def traded(bars, chosen, horizon, stop_atr, target_atr):
    "The engine's trades on the simulated exchange, without filters."
    s = Settings(exits=dict(stop_atr=stop_atr, trail_after_atr=None, targets=((target_atr, 1.0),), time_stop_bars=horizon, hard_stop_pct=None),
                 risk=dict(disable=CODES), sizing=dict(mode="fixed_quote", fixed_quote=1000.0), costs=dict(participation=None, maker=0.0005, taker=0.001, slippage_bps=3.0),
                 account=dict(start_balance=Decimal(100_000)))
    panel, c = Panel.from_frames({SYMBOL: bars}, "1h"), s.costs
    clock = VirtualClock(int(panel.times[0]))
    venue = SimVenue({SYMBOL: free_instrument(SYMBOL)}, {"USDT": s.account.start_balance}, FeeModel(c.maker, c.taker), SlippageModel(c.slippage_bps), c.latency_ms, None, clock)
    trades = assemble(Every(chosen), ReplayFeed(panel), venue, clock, None, s).run().trades
    return s.exits.plan(), FeeModel(c.maker, c.taker), SlippageModel(c.slippage_bps), trades


@pytest.mark.parametrize("horizon, stop_atr, target_atr", [(1, 0.5, 0.5), (5, 1.0, 1.5), (30, 2.0, 2.0)])
def test_labels_are_the_engines_trades(horizon, stop_atr, target_atr):
    bars = candles(1500)
    times = bars.index.as_unit("ms").asi8
    chosen = set(np.random.default_rng(horizon).choice(times[60:-horizon - 2], 250, replace=False).tolist())
    plan, fees, slippage, trades = traded(bars, chosen, horizon, stop_atr, target_atr)
    labels = barrier_labels(bars, horizon, "1h", plan, fees, slippage)
    row, met = {int(t): i for i, t in enumerate(times)}, []
    for t in trades:
        i = row[t.entry_time_ms // 3_600_000 * 3_600_000] - 1           # entered at the open after its signal
        spent = float(t.quantity) * float(t.entry_price) * (1 + fees.taker)
        assert labels.valid[i] and float(t.pnl) / spent == pytest.approx(labels.net[i], abs=1e-9)
        assert 0 <= t.exit_time_ms - labels.end[i] <= (0 if labels.hit[i] else 1000)    # a market order arrives a little after the open
        met.append(int(labels.hit[i]))
    assert len(met) >= 40 and set(met) == {-1, 0, 1}
