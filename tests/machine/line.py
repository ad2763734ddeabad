"A line to the simulated exchange that loses answers, delays, doubles and mixes what it tells, and never lies about what truly happened."
from collections import Counter, deque
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

from bnml.core.base import Refused, Retry, Unknown
from bnml.domain.orders import Fill, Order, OrderIntent, Side, Status
from bnml.venue.sim import SimVenue

FAULTS = {
    "submit": ("lost", "executed", "retry", "reject"),
    "cancel": ("lost", "executed", "retry", "slow"),
    "order": ("retry",),
    "balances": ("retry",),
    "drain": ("delay", "double", "shuffle"),
}


class Crash(BaseException):
    "The process dies here: no except clause, no flush, no goodbye."


class Exchange:
    "The venue itself: it outlives every process, and its diary is the truth."

    def __init__(self, sim: SimVenue, start: dict[str, Decimal]):
        self.sim, self.start = sim, {a: Fraction(x) for a, x in start.items()}
        self.diary: list = []                       # every event that truly happened
        self.fills: dict[str, Fill] = {}
        self.attempts: Counter = Counter()          # client id → how often it was sent, arrived or not
        self.intents: dict[str, OrderIntent] = {}
        self.slow: list[str] = []                   # cancels that arrive at the end of the bar

    def pull(self) -> list:
        "What has happened since the last look."
        events = self.sim.drain()
        self.diary += events
        for e in events:
            if isinstance(e, Fill):
                assert e.fill_id not in self.fills, f"the venue made fill {e.fill_id} twice"
                self.fills[e.fill_id] = e
        return events

    def identity(self) -> dict[str, Fraction]:
        "Balances as start, fills and fees make them."
        out = dict(self.start)
        for f in self.fills.values():
            i, sign = self.sim.instruments[f.symbol], 1 if f.side == Side.BUY else -1
            for asset, x in ((i.base, sign * Fraction(f.quantity)), (i.quote, -sign * Fraction(f.quantity) * Fraction(f.price)), (f.fee_asset, -Fraction(f.fee))):
                out[asset] = out.get(asset, Fraction(0)) + x
        return out

    def held(self, symbol: str) -> Decimal:
        return self.sim.account.total.get(self.sim.instruments[symbol].base, Decimal(0))

    def selling(self, symbol: str, stops_only: bool = False) -> Decimal:
        "Base that open sell orders hold, a pair once; `stops_only`: that a fall, or the next price, sells."
        legs, groups = [(r.intent, r.open_qty) for r in self.sim._resting.values()], {}
        legs += [(i, i.quantity) for q in self.sim._requests for i in q.intents]
        for i, q in legs:
            if i.symbol != symbol or i.side != Side.SELL or (stops_only and i.purpose == "TARGET"): continue
            key = i.group or i.client_id
            groups[key] = max(groups.get(key, Decimal(0)), q)
        return sum(groups.values(), Decimal(0))

    def open_entries(self) -> list[OrderIntent]:
        return [o.intent for o in self.sim.open_orders() if o.intent.side == Side.BUY]


class Line:
    "One process's connection: the port that the engine knows."

    latency_ms = 250

    def __init__(self, exchange: Exchange, world):
        self.x, self.world, self.can_oco = exchange, world, world.oco
        self.queue: deque = deque()
        self.held: list[tuple[int, object]] = []    # (step at which it is told, event)

    # sending
    def submit(self, intent: OrderIntent): self._send((intent,), lambda: self.x.sim.submit(intent))

    def submit_oco(self, stop: OrderIntent, target: OrderIntent): self._send((stop, target), lambda: self.x.sim.submit_oco(stop, target))

    def _send(self, intents, call):
        fault = self.world.fault("submit")
        self.world.say("send", fault, *(f"{i.purpose} {i.client_id[:8]} {i.quantity} {i.stop_price or i.price or ''}" for i in intents))
        self.world.witness(intents)
        for i in intents:
            self.x.attempts[i.client_id] += 1
            self.x.intents[i.client_id] = i
            if i.client_id in self.x.sim._orders: raise Refused(f"client id {i.client_id} was sent before")
        if fault == "retry": raise Retry("the venue is away, nothing was sent")
        if fault == "lost": raise Unknown("no answer")
        if fault == "reject":
            for i in intents:
                self.x.sim._take_in(i, self.x.sim._time())
                self.x.sim._say(i.client_id, Status.REJECTED, self.x.sim._time(), "SYMBOL_STATUS")
            return
        call()
        self.world.spark()
        if fault == "executed": raise Unknown("no answer, yet it arrived")

    def cancel(self, client_id: str):
        fault = self.world.fault("cancel")
        self.world.say("cancel", fault, client_id[:8])
        if fault == "retry": raise Retry("the venue is away, nothing was sent")
        if fault == "lost": raise Unknown("no answer")
        if fault == "slow": return self.x.slow.append(client_id)
        self.x.sim.cancel(client_id)
        self.world.spark()
        if fault == "executed": raise Unknown("no answer, yet it arrived")

    # hearing
    def drain(self) -> list:
        self.x.pull()
        due = [e for step, e in self.held if step <= self.world.steps]
        self.held = [(step, e) for step, e in self.held if step > self.world.steps]
        events = due + list(self.queue) + self.world.fresh()
        self.queue.clear()
        fault = self.world.fault("drain") if events else None
        if fault == "delay":
            self.held += [(self.world.steps + 2, e) for e in events]
            return []
        if fault == "double":
            self.held += [(self.world.steps + 1, e) for e in events]
            events = [e for e in events for _ in (0, 1)]
        events = events[::-1] if fault == "shuffle" else events
        for e in events: self.world.say("told", fault, e.client_id[:8], getattr(e, "status", "fill"), getattr(e, "reason", "") or getattr(e, "quantity", ""))
        return events

    def untold(self) -> list: return [e for _, e in self.held] + list(self.queue)

    def restore(self, orders, balances):
        "A new process: what its ledger does not know of an order is told again from the order's own page."
        known = {o.intent.client_id: o for o in orders}
        self.world.mark = len(self.x.diary)
        for e in self.x.diary:
            o = known.get(e.client_id)
            if o is None: continue
            true = self.x.sim._orders.get(e.client_id)
            if o.is_open or (true and true.filled != o.filled): self.queue.append(e)

    # asking
    def order(self, client_id: str) -> Order | None:
        self._ask("order")
        self.x.pull()
        found = self.x.sim.order(client_id)
        self.world.say("asked", client_id[:8], found and found.status)
        return replace(found, status=Status.ACCEPTED) if found and found.status == Status.SUBMITTED else found  # it waits there for a price

    def open_orders(self, symbol=None):
        self._ask("order")
        return self.x.sim.open_orders(symbol)

    def balances(self):
        self._ask("balances")
        return self.x.sim.balances()

    def free(self, asset: str):
        self._ask("balances")
        return self.x.sim.free(asset)

    def _ask(self, what: str):
        if self.world.fault(what) == "retry": raise Retry("the venue does not answer")

    def instrument(self, symbol: str): return self.x.sim.instrument(symbol)
