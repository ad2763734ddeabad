"Risk is switched off one check at a time: the audit, which knows nothing of risk, finds each hole, and nothing in a run with every check on."
from decimal import Decimal
from functools import lru_cache

import numpy as np
import pytest

from bnml.core.clock import VirtualClock
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.domain.market import default_instrument
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.signal import Strategy, signals
from bnml.ops.settings import Settings
from bnml.trade.ledger import Ledger
from bnml.trade.violations import recompute

assembly = pytest.importorskip("bnml.trade.assembly")
sim = pytest.importorskip("bnml.venue.sim")

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "ADAUSDT", "LTCUSDT")


class Eager(Strategy):
    "Buys and sells often, sure of itself or not: something for every check to stop."
    name, warmup_bars = "eager", 20

    def frame(self, symbol, bars):
        rng = np.random.default_rng([ord(c) for c in symbol])
        dice, ready = rng.random(len(bars)), np.arange(len(bars)) >= self.warmup_bars
        return signals(symbol, bars, (dice > 0.9) & ready, (dice < 0.05) & ready, confidence=rng.uniform(20, 100, len(bars)), reason=self.name)


@lru_cache
def market() -> Panel:
    return Panel.from_frames(synth_market(SYMBOLS, "1h", "2025-01-01", "2025-01-29"), "1h")


# every limit out of the way; a case tightens one
WIDE = dict(max_positions=6, min_confidence=0, max_exposure=1, max_symbol_exposure=1, max_spread_bps=1000, daily_loss_pct=100, weekly_loss_pct=100,
            max_drawdown_pct=100, max_consecutive_losses=1000, cooldown_minutes=0, max_orders_per_day=1000, max_price_gap_pct=100)
TIGHT = {
    "MAX_POSITIONS": dict(max_positions=1),
    "LOW_CONFIDENCE": dict(min_confidence=60),
    "MAX_EXPOSURE": dict(max_exposure=0.3),
    "MAX_SYMBOL_EXPOSURE": dict(max_symbol_exposure=0.1),
    "WIDE_SPREAD": dict(max_spread_bps=1),
    "DAILY_LOSS": dict(daily_loss_pct=0.5),
    "WEEKLY_LOSS": dict(weekly_loss_pct=0.5),
    "MAX_DRAWDOWN": dict(max_drawdown_pct=0.5),
    "CONSECUTIVE_LOSSES": dict(max_consecutive_losses=2),
    "COOLDOWN": dict(cooldown_minutes=24 * 60),
    "MAX_ORDERS_PER_DAY": dict(max_orders_per_day=1),
}


def trade(**risk):
    "A whole run through the engine; what the audit finds, and what was traded."
    settings = Settings.model_validate({
        "risk": WIDE | risk, "data": {"interval": "1h"},
        "sizing": {"mode": "fixed_fraction", "fixed_fraction": 0.15, "active": 0.98, "reserve": 0.0, "buffer": 0.01}})
    panel, balances = market(), {"USDT": Decimal(10_000)}
    clock = VirtualClock(int(panel.times[0]))
    instruments = {s: default_instrument(s, float(panel.open[0, j])) for j, s in enumerate(panel.symbols)}
    venue = sim.SimVenue(instruments, balances, FeeModel(), SlippageModel(), clock=clock)
    ledger = Ledger("sqlite://", "t", durable=False)
    ledger.begin("paper", "replay", "eager", settings, balances, int(panel.times[0]))
    engine = assembly.assemble(Eager(), ReplayFeed(panel, 24), venue, clock, ledger, settings)
    engine.run()
    ledger.end(clock.now_ms(), venue.balances())
    return recompute(ledger, "t", panel), ledger


def test_nothing_is_found_within_wide_limits():
    found, ledger = trade()
    assert found == []
    assert len(ledger.fills()) > 200


@pytest.mark.parametrize("code", TIGHT)
def test_a_check_keeps_its_limit(code):
    found, ledger = trade(**TIGHT[code])
    assert found == []
    assert any(code in v.reasons for v in ledger.verdicts()), "the case never put the check to work"


@pytest.mark.parametrize("code", TIGHT)
def test_a_check_that_is_switched_off_is_found_missing(code):
    found, _ = trade(**TIGHT[code], disable=(code,))
    assert {v.code for v in found} == {code}
