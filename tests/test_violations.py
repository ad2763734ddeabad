"Risk is switched off one check at a time: the audit, which knows nothing of risk, finds each hole, and nothing in a run with every check on."
import ast
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from bnml.core.clock import VirtualClock
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.domain.filters import round_quantity
from bnml.domain.market import Book, Quote, default_instrument
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.signal import Strategy, signals
from bnml.ops.settings import Settings
from bnml.trade.bounds import CODES
from bnml.trade.ledger import Ledger
from bnml.trade.sizing import Size
from bnml.trade.violations import recompute
from tests.once import once  # noqa: F401

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


SHORT = 24 + 11 * 24  # rows within which every check is put to work: past a Monday
# every limit out of the way; a case tightens one
WIDE = dict(max_positions=6, min_confidence=0, max_exposure=1, max_symbol_exposure=1, max_spread_bps=1000, daily_loss_pct=100, weekly_loss_pct=100,
            max_drawdown_pct=100, max_consecutive_losses=1000, cooldown_minutes=0, max_orders_per_day=1000, max_price_gap_pct=100,
            max_cluster_exposure=1, max_leader_correlation=1, max_volatility_ratio=1e9, max_price_jump_pct=1e6, max_orders_per_minute=1000, max_orders_per_hour=1000,
            max_stops=1000, max_symbol_stops=1000, correlation_bars=20, volatility_bars=5, volatility_base_bars=20, max_depth_share=1)
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
    "MAX_ORDERS_PER_MINUTE": dict(max_orders_per_minute=1),
    "MAX_ORDERS_PER_HOUR": dict(max_orders_per_hour=1),
    "MAX_CLUSTER_EXPOSURE": dict(max_cluster_exposure=0.3, cluster_correlation=0.2),
    "LEADER_CORRELATION": dict(max_leader_correlation=0.3),
    "VOLATILITY": dict(max_volatility_ratio=1.3, volatility_resume=0.7),
    "PRICE_JUMP": dict(max_price_jump_pct=0.8),
    "GLOBAL_COOLDOWN": dict(global_cooldown_minutes=240),
    "STOPLOSS_GUARD": dict(max_stops=2, stop_pause_hours=12),
    "SYMBOL_STOPS": dict(max_symbol_stops=1, stop_pause_hours=24),
}


def begin(panel: Panel, feed, risk: dict, clock=None, sizing=None):
    "An engine over a session of its own."
    settings = Settings.model_validate({
        "risk": WIDE | risk, "data": {"interval": "1h"},
        "sizing": {"mode": "fixed_fraction", "fixed_fraction": 0.15, "active": 0.98, "reserve": 0.0, "buffer": 0.01} | (sizing or {})})
    balances, clock = {"USDT": Decimal(10_000)}, clock or VirtualClock(int(panel.times[0]))
    instruments = {s: default_instrument(s, float(panel.open[0, j])) for j, s in enumerate(panel.symbols)}
    venue = sim.SimVenue(instruments, balances, FeeModel(), SlippageModel(), clock=clock)
    ledger = Ledger("sqlite://", "t", durable=False)
    ledger.begin("paper", "replay", "eager", settings, balances, int(panel.times[0]))
    return assembly.assemble(Eager(), feed, venue, clock, ledger, settings)


def finish(engine):
    "What the audit finds, and what was traded."
    ledger = engine.ledger
    ledger.end(engine.clock.now_ms(), engine.venue.balances())
    return recompute(ledger, "t", engine.panel), ledger


def trade(stop=SHORT, **risk):
    "A run through the engine until a row; what the audit finds, and what was traded."
    engine = begin(market(), ReplayFeed(market(), 24, stop), risk)
    engine.run()
    return finish(engine)


def test_nothing_is_found_within_wide_limits():
    found, ledger = trade(stop=None)
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


# --- what only a live feed knows -------------------------------------------------------------------------------------------------------------------

class Street(ReplayFeed):
    "A replay that says it is live: quotes, books and trades, some of them missing, thin, old or far away."
    fast, live, late = False, True, False

    def __init__(self, panel, **bad):
        super().__init__(panel, 24, 120 if "long" in bad else 80)
        self.bad, self.row, self.at = bad, 24, {}  # at: row → what happens before it closes

    def events(self):
        for kind, row in super().events():
            self.row, self.late = row, "late" in self.bad and row % 3 == 0
            if kind == "close" and row in self.at: self.at[row]()
            yield kind, row

    def _now(self): return int(self.panel.times[self.row]) + self.panel.step - (60_000 if self.row % 2 and "old" in self.bad else 0)

    def _price(self, symbol): return float(self.panel.close[self.row, self.panel.column(symbol)])

    def quote(self, symbol):
        if "blind" in self.bad and self.row % 2: return None
        return Quote(symbol, self._now(), self._price(symbol) * 0.9999, self._price(symbol) * (1.003 if "wide" in self.bad and self.row % 2 else 1.0001))

    def book(self, symbol):
        if "bookless" in self.bad and self.row % 2: return None
        price, worth = self._price(symbol), 2_000.0 if "thin" in self.bad and self.row % 2 else 1e6
        return Book(symbol, self._now(), ((price, 1.0),), ((price, worth / price / 2), (price * 1.001, worth / price / 2), (price * 1.1, 1e9)))

    def last_trade(self, symbol):
        if "tradeless" in self.bad and self.row % 2: return None
        return self._price(symbol) * (1.05 if "apart" in self.bad and self.row % 2 else 1.0), self._now()


STREET = {
    "a spread too wide": ("WIDE_SPREAD", "wide", dict(max_spread_bps=20)),
    "no quote": ("WIDE_SPREAD", "blind", {}),
    "a book too thin": ("BOOK_DEPTH", "thin", dict(max_depth_share=0.25)),
    "no book": ("BOOK_DEPTH", "bookless", {}),
    "a trade far away": ("PRICE_GAP", "apart", dict(max_price_gap_pct=1)),
    "no trade": ("PRICE_GAP", "tradeless", {}),
    "bars caught up": ("LATE_DATA", "late", {}),
    "no history of the leader": ("VOLATILITY", "long", dict(volatility_base_bars=80)),
}


def walk(bad: str, risk: dict, monkeypatch, change=lambda engine: None):
    "A run on the street; the engine's own look at late feeds is out of the way, so that risk's is seen."
    engine = begin(market(), Street(market(), **{bad: True}), risk)
    if hasattr(type(engine), "_refused"): monkeypatch.setattr(type(engine), "_refused", lambda *a: None)
    change(engine)
    engine.run()
    return finish(engine)


@pytest.mark.parametrize("case", STREET)
def test_what_a_live_feed_does_not_show_is_a_no(case, monkeypatch):
    code, bad, limits = STREET[case]
    found, ledger = walk(bad, limits, monkeypatch)
    assert found == [] and any(v.reasons == (code,) for v in ledger.verdicts()) and any(v.allowed for v in ledger.verdicts())
    found, _ = walk(bad, limits | dict(disable=(code,)), monkeypatch)
    assert {v.code for v in found} == {code}


def test_an_old_quote_is_no_quote(monkeypatch):
    found, ledger = walk("old", {}, monkeypatch)
    denied = {v.reasons for v in ledger.verdicts() if not v.allowed}
    assert found == [] and denied == {("WIDE_SPREAD", "BOOK_DEPTH")}  # a minute is too old for a quote and a book, not for a trade


def test_a_doubted_model_is_asked_for_more(monkeypatch):
    def doubt(engine): engine.risk.doubt = lambda symbol, bar_ms: (30.0, "drift")
    found, ledger = walk("", dict(min_confidence=30), monkeypatch, doubt)
    assert found == [] and any(v.reasons == ("MODEL_DEGRADED",) for v in ledger.verdicts())
    found, _ = walk("", dict(min_confidence=30, disable=("MODEL_DEGRADED",)), monkeypatch, doubt)
    assert {v.code for v in found} == {"MODEL_DEGRADED"}


@pytest.mark.parametrize("hours", [None, 30])
def test_an_entry_during_a_hold_from_outside_is_found(hours, monkeypatch):
    until = hours and int(market().times[40]) + hours * 3_600_000
    def pause(engine): engine.feed.at[40] = lambda: engine.risk.hold("PAUSED", "by an operator", until)
    def broken(engine): pause(engine); monkeypatch.setattr(engine.risk, "reasons", lambda now: ())
    found, ledger = walk("", {}, monkeypatch, pause)
    held = [v.time_ms for v in ledger.verdicts() if "PAUSED" in v.reasons]
    assert found == [] and held and (not until or max(held) < until) and any(v.allowed for v in ledger.verdicts())
    found, _ = walk("", {}, monkeypatch, broken)
    assert {v.code for v in found} == {"PAUSED"}


# --- sizes that nothing but risk would stop ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code, fraction, sizing", [("BUCKETS", 0.15, dict(active=0.3)), ("BUCKETS", 0.15, dict(active=0.4, reserve=0.5)), ("NO_CASH", 0.6, {})])
def test_a_size_beyond_the_means_is_found(code, fraction, sizing, monkeypatch):
    def careless(s, instrument, price, atr, equity, *a): return Size(round_quantity(instrument, Decimal(fraction * equity) / price, market=True), "careless")
    monkeypatch.setattr("bnml.trade.engine.size", careless)
    def run(**risk):
        engine = begin(market(), ReplayFeed(market(), 24, 200), risk, sizing=sizing)
        engine.run()
        return finish(engine)
    found, ledger = run()
    assert found == [] and any(code in v.reasons for v in ledger.verdicts())
    beside = {"MAX_EXPOSURE", "BUCKETS"} if code == "NO_CASH" else set()  # more than there is, is more than both allow
    found, _ = run(disable=(code, *beside))
    assert code in {v.code for v in found} <= {code, *beside}


# --- the audit looks with its own eyes ---------------------------------------------------------------------------------------------------------------

def test_the_auditor_shares_no_code_with_whom_it_audits():
    rooms, seen = ["trade.violations"], set()
    while rooms:
        room = rooms.pop()
        if room in seen or not room.startswith("trade."): continue
        seen.add(room)
        tree = ast.parse((Path(assembly.__file__).parents[1] / (room.replace(".", "/") + ".py")).read_text())
        rooms += [f"trade.{n.module}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
    assert seen & {"trade.risk", "trade.checks", "trade.breakers", "trade.bounds", "trade.view", "trade.sizing", "trade.engine", "trade.execution", "trade.exits"} == set()
    assert {"trade.books", "trade.moments", "trade.entries", "trade.pauses"} <= seen


def test_every_code_that_can_be_switched_off_is_looked_for():
    planted = set(TIGHT) | {c for c, *_ in STREET.values()} | {"MODEL_DEGRADED", "BUCKETS", "NO_CASH"}
    elsewhere = {"ALREADY_HELD", "STALE_DATA"}  # planted in the rooms: an engine never gets so far
    assert planted | elsewhere == set(CODES)
