"What must be true of an account whatever happened to it: arithmetic over the venue's diary and the disk, with nothing of risk or execution in it."
from decimal import Decimal
from fractions import Fraction

from bnml.domain.orders import Fill, Purpose, Side
from bnml.trade.books import Books
from bnml.trade.ledger import Ledger, read_fill
from bnml.trade.violations import audit

from .world import HOUR, SYMBOLS, World


def sellable(i, quantity: Decimal, price: float) -> bool:
    "Would the venue take a sale of it?"
    whole = quantity - quantity % i.step
    return whole >= i.min_qty and whole > 0 and float(whole) * price >= float(i.min_notional or 0) * 2.5  # a stop stands below the price


def once(w: World):
    "No client id twice, no event made up, nothing below zero, the identity of the balances."
    again = [c for c, n in w.x.attempts.items() if n > 1]
    assert not again, f"sent twice: {again}"
    made, said = w.x.identity(), w.x.sim.account.total
    assert all(made.get(a, 0) == Fraction(x) for a, x in said.items()), f"the venue's balances {said} are not what its fills make: {made}"
    assert all(x >= 0 for x in said.values()) and all(w.x.sim.account.free(a) >= 0 for a in said), f"more than there was: {said}"
    for s in SYMBOLS:
        assert w.x.selling(s) <= w.x.held(s) or w.untold(), f"{w.x.selling(s)} {s} are for sale, {w.x.held(s)} are held"
        assert sum(i.symbol == s for i in w.x.open_entries()) <= 1, f"two entries wait in {s}"


def written(w: World):
    "Every fill on the disk happened so, once."
    cols = "fill_id, client_id, symbol, side, quantity, price, fee, fee_asset, time_ms, maker, raw_price"
    rows = [dict(zip(cols.split(", "), r)) for r in w.rows(f"select {cols} from fills")]
    for r in rows:
        f = read_fill(r)
        assert w.x.fills.get(f.fill_id) == f, f"the ledger has {f}, the venue {w.x.fills.get(f.fill_id)}"
    return {r["fill_id"] for r in rows}


def covered(w: World, symbol: str, price: float):
    "A fall, or the next price, sells every coin that can be sold."
    i, bare = w.x.sim.instruments[symbol], w.x.held(symbol) - w.x.selling(symbol, stops_only=True)
    assert not sellable(i, bare, price), f"{bare} of {w.x.held(symbol)} {symbol} stand without a stop"


def settled(w: World):
    "At rest: the process knows what the venue knows."
    lost = w.x.fills.keys() - written(w)
    assert not lost, f"fills that nobody wrote down: {sorted(lost)}"
    mine, said = w.engine.desk.portfolio.balances, w.x.sim.balances()
    assert {a: x for a, x in mine.items() if x} == {a: x for a, x in said.items() if x}, f"the desk counts {mine}, the venue {said}"


def planned(w: World):
    "No stop stands below the plan, and none below the one before it."
    best = {}
    for i in w.x.intents.values():
        if i.purpose != Purpose.STOP or i.position_id not in w.plans: continue
        price, pct = w.plans[i.position_id]
        least = Decimal(repr(price * (1 - pct))) - w.x.sim.instruments[i.symbol].tick
        assert i.stop_price >= max(least, best.get(i.position_id, 0)), f"a stop of {i.symbol} at {i.stop_price}; the plan says {least}, the last one was {best.get(i.position_id)}"
        best[i.position_id] = i.stop_price


def unhurried(w: World):
    "In peace nobody sells coins that another order holds, and nobody outlives his time."
    news, w.judged = w.x.diary[w.judged:], len(w.x.diary)
    for e in news:
        if isinstance(e, Fill) or e.reason != "INSUFFICIENT_BALANCE": continue
        i = w.x.intents[e.client_id]
        if i.side != Side.SELL: continue
        assert w.quiet[i.symbol] < 2 and w.disturbed, f"{i.purpose} {i.quantity} {i.symbol} was more than was free"
    for f in w.x.fills.values():
        if f.client_id not in w.spans or w.quiet[f.symbol] < 4: continue
        age = (w.clock.now_ms() - f.time_ms) / HOUR
        if age < w.spans[f.client_id] + 4: continue
        later = [g for g in w.x.fills.values() if g.symbol == f.symbol and g.side == Side.BUY and g.time_ms > f.time_ms]
        assert later or not sellable(w.x.sim.instruments[f.symbol], w.x.held(f.symbol), w.last[f.symbol]), f"{f.symbol} is held for {age:.0f} bars"


# what a process can't obey while it has not been told
UNTOLD = {"DAILY_LOSS", "WEEKLY_LOSS", "MAX_DRAWDOWN", "CONSECUTIVE_LOSSES", "COOLDOWN", "MAX_EXPOSURE", "MAX_POSITIONS", "NO_CASH", "MAX_SYMBOL_EXPOSURE"}


def limits(w: World) -> list:
    "The auditor's findings, each entry by the limits that held when it was sent."
    book = Ledger(f"sqlite:///{w.path}", "s")
    try:
        books, found = Books(book, w.panel), []
        promptly = {} if w.disturbed else {"max_unprotected_s": 1.0}    # nothing goes wrong: twice the latency is enough
        for k, (since, s) in enumerate(w.epochs):
            until = w.epochs[k + 1][0] if k + 1 < len(w.epochs) else float("inf")
            mine = [v for v in audit(books, s.risk.model_dump() | promptly) if since <= v.time_ms < until or not k and v.time_ms < since]
            if k: mine = _fair(w, books, k, mine)
            found += mine
    finally: book.close()
    return [v for v in found if not excused(w, v)]


def _fair(w: World, books, k: int, found: list) -> list:
    "A breach of limits that were looser then is none of this process."
    if all(s.risk == w.epochs[k][1].risk for _, s in w.epochs[:k]): return found
    past = {"MAX_DRAWDOWN", "CONSECUTIVE_LOSSES"}
    if not any(v.code in past or "used up before" in v.detail for v in found): return found
    loose = {n: max(s.risk.model_dump()[n] for _, s in w.epochs[:k + 1]) for n in ("daily_loss_pct", "weekly_loss_pct", "max_drawdown_pct", "max_consecutive_losses")}
    loose |= {n: min(s.risk.model_dump()[n] for _, s in w.epochs[:k + 1]) for n in ("loss_pause_hours", "drawdown_pause_hours")}
    also = {(v.code, v.time_ms, v.symbol) for v in audit(books, w.epochs[k][1].risk.model_dump() | loose)}
    return [v for v in found if (v.code, v.time_ms, v.symbol) in also or v.code not in past and "used up before" not in v.detail]


def excused(w: World, v) -> bool:
    "Nobody obeys what he has not been told, and an outage of the venue is the venue's."
    if v.code in ("UNPROTECTED", "EQUITY"): return w.disturbed
    return v.code in UNTOLD and any(a <= v.time_ms <= b for a, b in w.blind)


def every_step(w: World):
    once(w)
    written(w)
    planned(w)
    unhurried(w)


def at_close(w: World):
    "After a row: whoever had two rows in peace is protected."
    for s in SYMBOLS:
        if w.quiet[s] >= 3 and w.engine and not w.untold(): covered(w, s, w.last[s])
    if min(w.quiet.values()) >= 3 and w.engine and not w.untold(): settled(w)


def at_the_end(w: World):
    "Peace, and then everything adds up."
    w.heal()
    for _ in range(4): w.bar({})
    every_step(w)
    settled(w)
    for s in SYMBOLS: covered(w, s, w.last[s])
    w.ledger.flush()
    found = limits(w)
    assert not found, "\n".join(map(str, found[:5]))
