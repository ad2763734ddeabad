"Desks that neglect one duty, and a day at the venue on which every duty is called for."
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal

from bnml.domain.orders import Fill
from bnml.trade import covering, exits, recovery
from bnml.trade.execution import ExecutionDesk as Desk
from bnml.trade.ledger import Ledger
from bnml.venue.account import Account

from . import judge
from .scenes import A, B, BUY, C, SELL, bars
from .world import World


def calm_day(w: World):
    "Nothing goes wrong: bought, raised, stopped out, sold in parts, sold by a signal, timed out."
    bars(w, ("flat", {A: BUY, B: BUY}), ("flat", {}), ("up", {C: BUY}), ("up", {}), ("leap", {}), ("leap", {}), ({A: "dip", C: "gap"}, {}), ("flat", {B: SELL}))
    bars(w, ("flat", {A: BUY, B: BUY}), *[({A: s, B: s}, {}) for s in ("flat", "up", "flat") * 5])
    judge.at_the_end(w)


def day(w: World):
    "Told twice, unanswered, lost, killed, restarted; in between, whatever a calm day has."
    w.faults["drain"].append("double")
    bars(w, ("flat", {A: BUY, B: BUY}), ("flat", {}))
    bars(w, ("up", {C: BUY}), ("up", {}))
    w.restart(*w.profile)
    w.faults["submit"].append("executed")
    bars(w, ("leap", {}), ("flat", {}))
    w.faults["submit"].append("lost")
    bars(w, ("leap", {}), ("flat", {}), ("flat", {}))
    w.fuse, w.fuse_kind = 4, "crash"
    bars(w, ("leap", {}), ({A: "dip", C: "gap"}, {}), ("flat", {}), ("flat", {B: SELL}), ("flat", {}))
    w.faults["submit"].append("executed")
    bars(w, ("flat", {A: BUY}), ("flat", {A: BUY}), ("flat", {A: BUY, C: BUY}))
    w.restart(*w.profile)
    bars(w, ("flat", {A: BUY, B: BUY, C: BUY}), *[("flat", {})] * 6, ("flat", {A: BUY, B: BUY}), ("wide", {}))
    judge.at_the_end(w)


def spent() -> str:
    "Both days, at a desk that is broken: what is noticed, or nothing."
    for story, exits in ((calm_day, "full"), (day, "full")):
        w = World("wide", exits)
        try: story(w)
        except Exception as e: return f"{story.__name__}: {type(e).__name__} {e}"
        finally: w.done()
    return ""


@contextmanager
def patched(where, name, make):
    "An attribute made anew out of the old one."
    old = getattr(where, name)
    setattr(where, name, make(old))
    try: yield
    finally: setattr(where, name, old)


def _resend(old):
    "Unknown? Once more."
    def send(self, *intents):
        old(self, *intents)
        if any(type(e).__name__ == "OrderUpdate" and e.status == "UNKNOWN" for e in self._own): self.venue.submit(intents[0])
    return send


def _resend_anew(old):
    "Unknown? Once more, by another name."
    def send(self, *intents):
        old(self, *intents)
        if len(intents) > 1 or not any(type(e).__name__ == "OrderUpdate" and e.status == "UNKNOWN" for e in self._own): return
        old(self, replace(intents[0], client_id=self._id(intents[0].symbol, intents[0].purpose), position_id=intents[0].position_id))
    return send


def _swallow(old):
    "Every third fill is not heard."
    count = [0]
    def handle(self, e):
        if isinstance(e, Fill):
            count[0] += 1
            if count[0] % 3 == 0: return None
        return old(self, e)
    return handle


def _forget_booked(old):
    "A fill that is told twice counts twice."
    def handle(self, e):
        if isinstance(e, Fill): self.booked.discard(e.fill_id)
        return old(self, e)
    return handle


def _low(old):
    "The stop stands a little lower than planned."
    return lambda self, h, quantity, price, number, trigger, limit: old(self, h, quantity, price, number, round_tick(trigger * Decimal("0.9"), h.instrument.tick), limit)


def round_tick(x: Decimal, tick: Decimal) -> Decimal: return x - x % tick


def _twice(old):
    "Each leg is laid two times."
    def place(self, h, quantity, *rest):
        old(self, h, quantity, *rest)
        old(self, h, quantity, *rest)
    return place


def _half(old):
    "Half of the coins are enough to protect."
    return lambda h, orders: old(h, orders) - h.quantity / 2


def _up(old):
    "One step more than was judged."
    def enter(self, p, v): return old(self, p, replace(v, quantity=v.quantity + self.venue.instrument(p.symbol).step))
    return enter


def _free(old):
    "Fees are somebody else's."
    return lambda self, fill: old(self, replace(fill, fee=Decimal(0)))


def _double(old):
    "The venue's clerk books some fills twice."
    def settle(self, fill, base, quote):
        old(self, fill, base, quote)
        if fill.side == "SELL": old(self, fill, base, quote)
    return settle


def _held_back(old):
    "Written when there is time: the intent is on its way to the disk when the order leaves."
    def save(self, intents):
        self.durable = False
        try: return old(self, intents)
        finally: self.durable = True
    return save


def _penniless(old):
    "The portfolio of the first day."
    def count(desk, ledger, balances):
        old(desk, ledger, balances)
        desk.portfolio = replace(desk.portfolio, balances=dict(balances))
    return count


def _fall(old):
    "A trailing stop that follows downwards."
    def move(self, h, stop):
        if not h.exits.trailed: return old(self, h, stop)
        h.exits, h.replace = replace(h.exits, stop=h.exits.stop * 0.97), True
        self.drive(h)
    return move


# what is broken → how
DUTIES = {
    "no protection is laid": lambda: patched(Desk, "_cover", lambda old: lambda self, h: None),
    "half of the coins are protected": lambda: patched(covering, "uncovered", _half),
    "protection covers twice": lambda: patched(Desk, "_place", _twice),
    "a stop below the planned stop": lambda: patched(Desk, "_place", _low),
    "an id is sent again": lambda: patched(Desk, "_depart", _resend),
    "an order is sent again by another id": lambda: patched(Desk, "_depart", _resend_anew),
    "a fill is swallowed": lambda: patched(Desk, "handle", _swallow),
    "a fill is booked twice": lambda: patched(Desk, "handle", _forget_booked),
    "a size is rounded up": lambda: patched(Desk, "enter", _up),
    "a fee is forgotten by the ledger": lambda: patched(Ledger, "add_fill", _free),
    "a fee is forgotten by the venue": lambda: patched(Account, "settle", lambda old: lambda self, fill, *a: old(self, replace(fill, fee=Decimal(0)), *a)),
    "the venue books a fill twice": lambda: patched(Account, "settle", _double),
    "the intent is written later": lambda: patched(Ledger, "save_intents", _held_back),
    "a restart forgets the desk": lambda: patched(recovery, "_load", lambda old: lambda desk, saved: None),
    "a restart forgets what it bought": lambda: patched(recovery, "_count", _penniless),
    "a stop falls": lambda: patched(Desk, "raise_stop", _fall),
    "the time stop is forgotten": lambda: patched(exits, "open_state", lambda old: lambda *a, **k: replace(old(*a, **k), last_ms=None)),
}
