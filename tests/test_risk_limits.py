"Whatever is proposed, filled and lost, in whatever market and under whatever limits: what risk let through stands up to the auditor's own arithmetic."
from decimal import Decimal

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bnml.core.clock import VirtualClock
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.domain.market import default_instrument
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.signal import Strategy, signals
from bnml.ops.settings import Settings
from bnml.trade.assembly import assemble
from bnml.trade.ledger import Ledger
from bnml.trade.risk import Risk
from bnml.trade.violations import recompute
from bnml.venue.sim import SimVenue
from tests.once import once  # noqa: F401

T, H, ROWS, WARM = 1_740_960_000_000, 3_600_000, 150, 30  # Monday 2025-03-03
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT")


def market(seed: int, vol: float, common: float, drift: float, gaps: float) -> Panel:
    "Four symbols that share a factor, with jumps."
    rng = np.random.default_rng(seed)
    r = vol * (common * rng.normal(size=(ROWS, 1)) + (1 - common) * rng.normal(size=(ROWS, 4))) + drift
    r += np.where(rng.random((ROWS, 4)) < gaps, rng.normal(0, 12 * vol, (ROWS, 4)), 0.0)
    close = 100 * np.exp(np.cumsum(r, axis=0))
    open_ = np.vstack([close[:1], close[:-1]]) * np.exp(vol * 0.2 * rng.normal(size=(ROWS, 4)))
    high, low = np.maximum(open_, close) * np.exp(vol * rng.random((ROWS, 4))), np.minimum(open_, close) * np.exp(-vol * rng.random((ROWS, 4)))
    return Panel(SYMBOLS, "1h", T + H * np.arange(ROWS), np.stack([open_, high, low, close, rng.lognormal(8, 1, (ROWS, 4))]))


class Dice(Strategy):
    "Buys and sells by lot."
    name, warmup_bars = "dice", WARM

    def __init__(self, seed: int, eager: float): self.seed, self.eager = seed, eager

    def frame(self, symbol, bars):
        rng = np.random.default_rng([self.seed, *map(ord, symbol)])
        lot, ready = rng.random(ROWS)[: len(bars)], np.arange(len(bars)) >= WARM
        return signals(symbol, bars, (lot < self.eager) & ready, (lot > 0.95) & ready, confidence=rng.uniform(20, 100, ROWS)[: len(bars)])


share, hours = st.floats(0.1, 1.0), st.sampled_from([0.0, 2.0, 12.0, 48.0])
LIMITS = st.fixed_dictionaries({}, optional=dict(
    max_positions=st.integers(1, 4), min_confidence=st.floats(0, 90), max_exposure=share, max_symbol_exposure=share, max_cluster_exposure=share,
    cluster_correlation=st.floats(0.1, 0.95), max_leader_correlation=st.floats(0.1, 1), max_volatility_ratio=st.floats(1.01, 4), volatility_resume=st.floats(0.3, 1),
    daily_loss_pct=st.floats(0.2, 10), weekly_loss_pct=st.floats(0.2, 20), max_drawdown_pct=st.floats(0.5, 15), drawdown_resume=st.floats(0, 0.99),
    drawdown_pause_hours=hours, max_consecutive_losses=st.integers(1, 5), loss_pause_hours=hours, max_stops=st.integers(1, 5), max_symbol_stops=st.integers(1, 3),
    stop_window_hours=st.sampled_from([3.0, 24.0]), stop_pause_hours=hours, cooldown_minutes=st.sampled_from([0.0, 60.0, 300.0]),
    global_cooldown_minutes=st.sampled_from([0.0, 30.0, 180.0]), max_orders_per_minute=st.integers(1, 4), max_orders_per_hour=st.integers(1, 4),
    max_orders_per_day=st.integers(1, 20), max_price_jump_pct=st.floats(0.2, 10)))
MARKETS = st.builds(dict, seed=st.integers(0, 10**6), vol=st.floats(0.001, 0.05), common=st.floats(0, 1), drift=st.floats(-0.01, 0.005), gaps=st.sampled_from([0.0, 0.02]))


def run(limits: dict, prices: dict, eager: float, fraction: float, participation, fee_asset: str):
    "A whole run, cut in two by a restart of risk; its violations and its ledger."
    panel, balances = market(**prices), {"USDT": Decimal(10_000)}
    s = Settings.model_validate({"risk": dict(correlation_bars=20, volatility_bars=5, volatility_base_bars=20) | limits, "data": {"interval": "1h"},
                                 "sizing": {"mode": "fixed_fraction", "fixed_fraction": fraction}, "costs": {"fee_asset": fee_asset, "participation": participation}})
    clock, ledger = VirtualClock(T), Ledger("sqlite://", "p", durable=False)
    venue = SimVenue({x: default_instrument(x, 100.0) for x in SYMBOLS}, balances, FeeModel(asset=fee_asset), SlippageModel(), participation=participation, clock=clock)
    ledger.begin("paper", "replay", "dice", s, balances, T)
    engine = assemble(Dice(prices["seed"], eager), ReplayFeed(panel, WARM), venue, clock, ledger, s)
    engine.scanner.scan_all()
    for row in range(WARM, ROWS):
        if row == (WARM + ROWS) // 2: restart(engine)
        engine.step(row)
    ledger.end(clock.now_ms(), venue.balances())
    return recompute(ledger, "p", panel), ledger


def restart(engine):
    "Risk forgets all but what the ledger kept."
    engine.risk = Risk(engine.risk.settings, engine.ledger, engine.clock)
    engine.desk.on_closed = engine.risk.on_trade_closed


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(LIMITS, MARKETS, st.floats(0.02, 0.6), st.floats(0.02, 0.4), st.sampled_from([None, 0.02]), st.sampled_from(["quote", "base"]))
@example({}, dict(seed=1, vol=0.03, common=0.9, drift=-0.004, gaps=0.02), 0.5, 0.2, None, "quote")
@example(dict(max_drawdown_pct=1.0, drawdown_resume=0.9), dict(seed=2, vol=0.02, common=0.5, drift=0.0, gaps=0.0), 0.5, 0.2, None, "quote")
def test_no_allowed_order_breaks_a_limit(limits, prices, eager, fraction, participation, fee_asset):
    found, _ = run(limits, prices, eager, fraction, participation, fee_asset)
    assert found == []


def test_the_lots_are_not_all_denied():
    "The property would hold of a risk that never says yes: over a handful of seeds most codes were heard, and orders were sent."
    said, sent = set(), 0
    tight = dict(max_positions=2, max_cluster_exposure=0.2, cluster_correlation=0.3, max_leader_correlation=0.8, max_volatility_ratio=1.5, daily_loss_pct=2.0,
                 max_consecutive_losses=2, loss_pause_hours=2, max_stops=2, max_symbol_stops=1, stop_pause_hours=2, max_orders_per_hour=1, max_price_jump_pct=8)
    for seed in range(4):
        _, ledger = run(tight, dict(seed=seed, vol=0.02, common=0.5, drift=0.0, gaps=0.01), 0.3, 0.15, None, "quote")
        said |= {r for v in ledger.verdicts() for r in v.reasons}
        sent += sum(v.allowed for v in ledger.verdicts())
    assert sent > 40
    assert {"MAX_POSITIONS", "MAX_CLUSTER_EXPOSURE", "LEADER_CORRELATION", "VOLATILITY", "DAILY_LOSS", "CONSECUTIVE_LOSSES", "STOPLOSS_GUARD", "SYMBOL_STOPS",
            "MAX_ORDERS_PER_HOUR", "PRICE_JUMP", "COOLDOWN", "LOW_CONFIDENCE"} <= said
