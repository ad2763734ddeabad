"The execution desk at a venue that times out, part-fills, refuses and answers late, twice and out of order: what is bought is protected or sold, and nothing is sent twice."
import logging
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from hypothesis import HealthCheck, given, settings as hyp, strategies as st

from bnml.core.base import Retry, Unknown
from bnml.core.clock import VirtualClock
from bnml.data.panel import Panel
from bnml.domain.market import Quote, default_instrument
from bnml.domain.orders import Fill, Order, OrderIntent, OrderType, Purpose, Side, Status
from bnml.domain.plan import ExitPlan
from bnml.domain.signal import Action, Proposal, Signal, Verdict
from bnml.trade.engine import Engine
from bnml.trade.execution import ExecutionDesk
from bnml.trade.exits import ExitSettings
from bnml.trade.holding import Forgetful
from bnml.trade.ledger import Ledger
from bnml.trade.recovery import recover, remembering
from bnml.venue.ports import UNKNOWN_ORDER, OrderUpdate
from bnml.venue.sim import SimVenue

D, HOUR, SYMBOL = Decimal, 3_600_000, "SOLUSDT"
SOL = default_instrument(SYMBOL, 100.0)


@pytest.fixture(autouse=True)
def quiet():
    "Many warnings are expected."
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


class Truth:
    "What is at the venue of one order."
    def __init__(self, intent, twin=None): self.intent, self.filled, self.open, self.twin, self.end = intent, D(0), True, twin, None

    @property
    def left(self): return self.intent.quantity - self.filled


class Moody:
    "A venue whose every answer is drawn; its own books are exact. Coins are promised once: a sale beyond what is free is refused."
    latency_ms, instrument = 0, staticmethod(lambda symbol: SOL)

    def __init__(self, draw, pairs):
        self.draw, self.can_oco, self.calm, self.ms = draw, pairs, False, 0
        self.books, self.sent, self.waiting, self.told, self.coins, self.cash = {}, Counter(), [], [], D(0), D(100_000)

    def fate(self, *kinds): return "ok" if self.calm else self.draw(st.sampled_from(("ok", "ok", *kinds)))

    def say(self, e): self.waiting.append(e)

    def note(self, cid, status, reason=""): self.say(OrderUpdate(cid, status, self.ms, reason))

    def free(self, asset):
        held = [t for t in self.books.values() if t.open and t.intent.side == Side.SELL]
        locked = sum((t.left for t in held if t.twin is None or t.intent.purpose == Purpose.STOP or not self.books[t.twin].open), D(0))
        return self.coins - locked if asset == "SOL" else self.cash

    def submit(self, intent): self._take((intent,))

    def submit_oco(self, stop, target): self._take((stop, target))

    def _take(self, intents):
        for i in intents: self.sent[i.client_id] += 1
        fate = self.fate("away", "lost", "unheard", "refused")
        if fate == "away": raise Retry("503")
        if fate == "lost": raise Unknown("dropped on the way")
        short = intents[0].side == Side.SELL and intents[0].quantity > self.free("SOL")
        if short or fate == "refused":
            for i in intents: self.note(i.client_id, Status.REJECTED, "INSUFFICIENT_BALANCE" if short else "FILTER")
            return
        for i in intents: self.books[i.client_id] = Truth(i, next((j.client_id for j in intents if j is not i), None))
        for i in intents: self.note(i.client_id, Status.ACCEPTED)
        for i in intents: self._trade(self.books[i.client_id])
        if fate == "unheard": raise Unknown("the answer was lost")

    def _trade(self, t):
        "What fills at once."
        i = t.intent
        if i.type not in (OrderType.MARKET, OrderType.LIMIT): return
        share = D(1) if self.calm else D(self.draw(st.sampled_from(("0", "0.003", "0.3", "1", "1"))))
        cut = (t.left * share).quantize(D("0.01"))
        if cut and cut < t.left and not self.calm and self.draw(st.booleans()): self.fill(t, cut / 2 // D("0.01") * D("0.01"))
        if share and t.left: self.fill(t, min(t.left, max(cut - t.filled, D("0.01"))))
        if t.open: self.finish(t, Status.EXPIRED)

    def fill(self, t, quantity):
        if not quantity: return
        t.filled += quantity
        sign = 1 if t.intent.side == Side.BUY else -1
        self.coins += sign * quantity
        self.cash -= sign * quantity * 100
        assert self.coins >= 0
        self.say(Fill(f"{t.intent.client_id}-{t.filled}", t.intent.client_id, SYMBOL, t.intent.side, quantity, D(100), D(0), "USDT", self.ms))
        if not t.left: t.open, t.end = False, Status.FILLED

    def finish(self, t, status): t.open, t.end = False, status; self.note(t.intent.client_id, status)

    def cancel(self, cid):
        fate = self.fate("away", "lost", "unheard")
        if fate == "away": raise Retry("503")
        if fate == "lost": raise Unknown("dropped on the way")
        t = self.books.get(cid)
        if t is None or not t.open: self.note(cid, t.end if t else Status.REJECTED, UNKNOWN_ORDER)
        for x in (t, t and t.twin and self.books[t.twin]) if t and t.open else ():
            if x and x.open: self.finish(x, Status.CANCELED)
        if fate == "unheard": raise Unknown("the answer was lost")

    def order(self, cid):
        if self.fate("away") == "away": raise Retry("503")
        t = self.books.get(cid)
        return t and Order(t.intent, t.end or (Status.PARTIALLY_FILLED if t.filled else Status.ACCEPTED), t.filled, t.filled * 100, self.ms)

    def open_orders(self, symbol=None): return [Order(t.intent, Status.ACCEPTED, t.filled) for t in self.books.values() if t.open]

    def balances(self): return {"USDT": self.cash, "SOL": self.coins}

    def drain(self):
        "Some of what waits, shuffled, with repetitions."
        if self.calm: said, self.waiting = self.waiting, []
        else:
            n = self.draw(st.integers(0, len(self.waiting)))
            said = self.draw(st.permutations(self.waiting[:n])) if n < 7 else self.waiting[:n]
            self.waiting = self.waiting[n:]
            if self.told and self.draw(st.integers(0, 9)) == 0: said = [*said, self.told[-1]]
        self.told += said
        return list(said)

    def move(self):
        "The market touches a stop or a target, whole or in part; a target's part ends its stop, as on Binance."
        rest = [t for t in self.books.values() if t.open]
        if not rest or self.draw(st.integers(0, 4)): return
        t, whole = self.draw(st.sampled_from(rest)), self.draw(st.booleans())
        twin = t.twin and self.books[t.twin]
        if twin and twin.open: self.finish(twin, Status.CANCELED)
        self.fill(t, t.left if whole else (t.left / 2 // D("0.01")) * D("0.01"))


def bought(v): return sum((t.filled for t in v.books.values() if t.intent.side == Side.BUY), D(0))


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "stops"])
@hyp(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_bought_is_protected_or_sold(pairs, data):
    v = Moody(data.draw, pairs)
    clock = SimpleNamespace(now_ms=lambda: v.ms)
    desk = ExecutionDesk(v, Forgetful(), clock, "moody", ExitSettings(), HOUR)
    first = dict(desk.portfolio.balances)
    for k in range(data.draw(st.integers(5, 25))):
        held = desk.holdings.get(SYMBOL)
        wish = data.draw(st.sampled_from(("none", "none", "enter", "raise", "leave")))
        if wish == "enter" and held is None:
            desk.at(k * HOUR)
            p = Proposal(SYMBOL, k * HOUR, Signal(SYMBOL, k * HOUR, Action.BUY, 90.0), D(100), 2.0, 1.0, 2.0, ExitPlan(), D(10))
            desk.enter(p, Verdict(p.proposal_id, SYMBOL, 0, True, (), D(10)))
        elif held and held.exits and wish == "raise" and not held.leaving: desk.raise_stop(held, held.exits.stop + 0.5)
        elif held and held.exits and wish == "leave": desk.leave(held, "SIGNAL")
        v.move()
        desk.tend(lambda s: Quote(s, v.ms, 100.0, 100.1))
        v.ms += data.draw(st.sampled_from((100, 500, 3_000, 20_000)))
    v.calm = True
    for _ in range(300): desk.tend(lambda s: Quote(s, v.ms, 100.0, 100.1)); v.ms += 500
    desk.tidy()
    for _ in range(100): desk.tend(lambda s: Quote(s, v.ms, 100.0, 100.1)); v.ms += 500
    assert max(v.sent.values(), default=1) == 1, "an id was sent twice"
    assert desk.portfolio.balances.get("SOL", 0) == v.coins and desk.portfolio.balances["USDT"] == v.cash, "a fill was lost or made up"
    sold = sum((t.filled for t in v.books.values() if t.intent.side == Side.SELL), D(0))
    stops = sum((t.left for t in v.books.values() if t.open and t.intent.purpose == Purpose.STOP), D(0))
    crumbs = sum(desk.dust.values(), D(0))
    assert bought(v) == sold + stops + crumbs, (bought(v), sold, stops, crumbs, desk.holdings)
    assert crumbs * 100 < 5 and not [t for t in v.books.values() if t.open and t.intent.purpose in (Purpose.ENTRY, Purpose.EXIT)]
    assert first["USDT"] == 100_000 and not desk.unsure


def flat(*bars):
    values = np.array([[100, 101, 99, 100, v] if low is None else [100, 100, low, low, v] for low, v in bars], float).T[:, :, None]
    return Panel((SYMBOL,), "1h", np.arange(len(bars)) * HOUR, values)


class Process:
    "A desk over the simulated exchange, and its ledger."
    def __init__(self, url, panel, now=0):
        start = {"USDT": D(10_000)}
        self.panel, self.clock, self.ledger = panel, VirtualClock(now), Ledger(url, "s")
        self.ledger.begin("paper", "replay", "test", {}, start, 0)
        self.venue = SimVenue({SYMBOL: replace(SOL, oco=False)}, start, clock=self.clock, participation=0.1)
        self.desk = ExecutionDesk(self.venue, self.ledger, self.clock, "test", ExitSettings(), HOUR)
        remembering(self.desk)
        recover(self.desk, self.ledger, start)

    def bar(self, row):
        self.clock.set_ms(row * HOUR); self.desk.at(row * HOUR)
        self.venue.begin_bar(self.panel, row); self.desk.settle()
        self.venue.finish_bar(self.panel, row); self.clock.set_ms((row + 1) * HOUR)
        self.desk.settle(); self.desk.remember(); self.ledger.flush()


@pytest.mark.parametrize("cut", [False, True], ids=["one process", "two"])
def test_a_touched_stop_does_not_wait_for_its_trigger_again(tmp_path, cut):
    "A lone stop is touched in a bar without volume; then the price is back above it, and the process may have died: it sells at the open after a bar with volume."
    panel, url = flat((None, 1e6), (None, 1e6), (95, 0.0), (None, 1e6), (None, 1e6)), f"sqlite:///{tmp_path}/l.db"
    p = Process(url, panel)
    p.bar(0)
    proposal = Proposal(SYMBOL, 0, Signal(SYMBOL, 0, Action.BUY, 90.0), D(100), 2.0, 1.0, 2.0, ExitPlan(), D(10))
    p.desk.enter(proposal, Verdict(proposal.proposal_id, SYMBOL, 0, True, (), D(10)))
    p.bar(1); p.bar(2)
    assert [o.reason for o in p.desk.orders.values() if o.intent.purpose == Purpose.STOP] == ["TRIGGERED"]
    if cut: p.ledger.close(); p = Process(url, panel, 3 * HOUR)
    p.bar(3); p.bar(4)
    assert [(f.side, f.time_ms // HOUR) for f in p.desk.fills] == [("BUY", 1), ("SELL", 4)] and not p.desk.holdings
    p.ledger.close()


@pytest.mark.parametrize("says, reason", [(D("-5"), "that -5 USDT are free"), (D("NaN"), "that NaN USDT are free"), (Retry("503"), "does not say")])
def test_an_absurd_balance_buys_nothing(says, reason):
    "A named refusal in the place of a size; and a good answer is a number."
    def free(asset):
        if isinstance(says, Exception): raise says
        return says
    engine = SimpleNamespace(venue=SimpleNamespace(free=free), quote="USDT", feed=SimpleNamespace(late=False, barred=lambda s: ""))
    why = Engine._money(engine)
    assert reason in why
    p = Proposal(SYMBOL, 0, Signal(SYMBOL, 0, Action.BUY, 90.0), D(100), 2.0, 1.0, 2.0, ExitPlan(), D(10))
    v = Engine._refused(engine, p, SOL, 96.0, why)
    assert (v.allowed, v.reasons) == (False, ("BALANCE_UNKNOWN",))
    says = D(70)
    assert Engine._money(engine) == 70.0


def test_nothing_is_bought_on_old_news_or_against_the_venues_rules():
    p = Proposal(SYMBOL, 0, Signal(SYMBOL, 0, Action.BUY, 90.0), D(100), 2.0, 1.0, 2.0, ExitPlan(), D(10))
    halted = SimVenue({SYMBOL: replace(SOL, status="BREAK")}, {"USDT": D(10_000)}, clock=VirtualClock())
    desk = ExecutionDesk(halted, Forgetful(), VirtualClock(), "test")
    said = lambda late: Engine._refused(SimpleNamespace(feed=SimpleNamespace(late=late, barred=lambda s: ""), desk=desk), p, SOL, 96.0).reasons
    assert (said(True), said(False)) == (("LATE",), ("SYMBOL_STATUS",))
