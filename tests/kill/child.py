"""The real runner, with a bomb in it: `python -m tests.kill.child PLAN -- FLAGS` dies at the n-th passage of a step; `--nursery` forks such runners from a
process that has imported everything already, so that two hundred lives fit into minutes. Nothing of this is in the code that ships."""
import faulthandler
import functools
import json
import os
import signal
import sys
import uuid


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Bomb:
    "Goes off at the n-th passage."
    def __init__(self, n: int): self.left = n

    def passed(self):
        self.left -= 1
        if self.left <= 0: die()


def wrap(owner, name: str, before=None, after=None):
    "Call `before(self, *args)` and `after(self, *args)` around a method, with the result kept."
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(self, *args, **kw):
        if before: before(self, *args, **kw)
        out = real(self, *args, **kw)
        if after: after(self, *args, **kw)
        return out
    setattr(owner, name, wrapped)


# ---- the steps of an order's life: (owner, method, before or after, of which call)

def _purpose(*wanted):
    return lambda self, *intents: bool(_intents(intents)) and str(_intents(intents)[0].purpose) in wanted


def _intents(args):
    return args[0] if args and isinstance(args[0], list | tuple) else args


def _fill(purpose, part=None):
    def is_it(desk, event, *_):
        from bnml.domain.orders import Fill
        order = desk.orders.get(event.client_id)
        if not isinstance(event, Fill) or order is None or str(order.intent.purpose) != purpose: return False
        return part is None or order.is_open == part
    return is_it


def _accepted(purpose):
    def is_it(desk, event, *_):
        order = desk.orders.get(event.client_id)
        return str(getattr(event, "status", "")) == "ACCEPTED" and order is not None and str(order.intent.purpose) == purpose
    return is_it


def _replacing(ledger, *intents):
    "A stop for a position that had one."
    first = _intents(intents)[0]
    if str(first.purpose) != "STOP": return False
    seen = ledger.__dict__.setdefault("_stopped", set())
    again = first.position_id in seen
    seen.add(first.position_id)
    return again


def _withdrawing(venue, client_id, *_):
    k = venue._known.get(client_id)
    return k is not None and str(k.intent.purpose) in ("STOP", "TARGET")


STEPS = {
    "before intent": ("ledger", "save_intents", "before", _purpose("ENTRY")),
    "after intent": ("ledger", "save_intents", "after", _purpose("ENTRY")),
    "sent, not answered": ("wire", "place", "after", _purpose("ENTRY")),
    "after send": ("venue", "submit", "after", _purpose("ENTRY")),
    "after accept": ("desk", "handle", "after", _accepted("ENTRY")),
    "after partial fill": ("desk", "handle", "after", _fill("ENTRY", True)),
    "after fill": ("desk", "handle", "after", _fill("ENTRY", False)),
    "between fill and protection": ("ledger", "save_intents", "before", _purpose("STOP")),
    "protection written": ("ledger", "save_intents", "after", _purpose("STOP")),
    "protection sent, not answered": ("wire", "place_pair", "after", _purpose("STOP")),
    "pair sent": ("venue", "submit_oco", "after", _purpose("STOP")),
    "during replace, before cancel": ("venue", "cancel", "before", _withdrawing),
    "during replace, after cancel": ("venue", "cancel", "after", _withdrawing),
    "during replace, before the new": ("ledger", "save_intents", "before", _replacing),
    "during replace, the new written": ("ledger", "save_intents", "after", _replacing),
    "during exit, before intent": ("ledger", "save_intents", "before", _purpose("EXIT")),
    "during exit, after intent": ("ledger", "save_intents", "after", _purpose("EXIT")),
    "during exit, after send": ("venue", "submit", "after", _purpose("EXIT")),
    "during exit, after fill": ("desk", "handle", "after", _fill("EXIT")),
    "a stop's fill": ("desk", "handle", "after", _fill("STOP")),
    "a target's fill": ("desk", "handle", "after", _fill("TARGET")),
    "before commit": ("ledger", "_write", "before", lambda ledger, *_: bool(ledger._size or ledger._orders)),
    "after commit": ("ledger", "_write", "after", lambda *_: True),
    "recovery, before": ("venue", "restore", "before", lambda *_: True),
    "recovery, after": ("venue", "restore", "after", lambda *_: True),
}


def owners() -> dict:
    "What can be wrapped."
    from bnml.trade.execution import ExecutionDesk
    from bnml.trade.ledger import Ledger
    from bnml.venue.binance import BinanceWire
    from bnml.venue.orders import CcxtExecution
    return {"ledger": Ledger, "desk": ExecutionDesk, "venue": CcxtExecution, "wire": BinanceWire}


def arm(step: str, n: int):
    "Lay the bomb."
    owner, method, when, matters = STEPS[step]
    bomb = Bomb(n)

    def look(*args, **kw):
        if matters(*args, **kw): bomb.passed()
    wrap(owners()[owner], method, **{when: look})


# ---- builds that are broken on purpose

def _no_recovery():
    import bnml.trade.assembly as room
    room.recover = lambda *_, **__: False


def _lazy_intent():
    "An intent waits in the buffer: it is not on the disk when the order leaves."
    from bnml.trade.ledger import INTENTS, Ledger, intent_row

    def save(self, intents):
        for i in intents: self._put(INTENTS, intent_row(i))
    Ledger.save_intents = save


def _random_ids():
    import bnml.trade as trade
    for name in ("execution", "sending", "entering", "protection"):
        room = __import__(f"bnml.trade.{name}", fromlist=["x"]) if _exists(f"{trade.__path__[0]}/{name}.py") else None
        if hasattr(room, "client_order_id"): room.client_order_id = lambda *_, **__: "b" + uuid.uuid4().hex[:20]


def _exists(path: str) -> bool: return os.path.exists(path)


def _swallowed_fill():
    "The first fill after a restart is taken for known."
    from bnml.domain.orders import Fill
    from bnml.venue.orders import CcxtExecution
    real, left = CcxtExecution.drain, [1]

    def drain(self):
        events = real(self)
        for e in [e for e in events if isinstance(e, Fill)][:left[0]]:
            events.remove(e)
            left[0] = 0
        return events
    CcxtExecution.drain = drain


def _resend():
    "What was written and has no answer is sent again, under a new name."
    from dataclasses import replace
    from bnml.domain.orders import Purpose
    from bnml.trade.execution import ExecutionDesk
    from bnml.trade.ledger import Ledger
    import bnml.trade.assembly as room
    real = room.recover

    def recover(desk: ExecutionDesk, ledger: Ledger, *args, **kw):
        lost = [o.intent for o in ledger.orders() if str(o.status) in ("PENDING", "SUBMITTED", "UNKNOWN") and o.intent.purpose == Purpose.ENTRY]
        out = real(desk, ledger, *args, **kw)
        for i in lost: desk.venue.submit(replace(i, client_id=i.client_id[:-2] + "zz"))
        return out
    room.recover = recover


def _bare_start():
    "Nothing is protected at a start."
    from bnml.trade.execution import ExecutionDesk
    import bnml.trade.assembly as room
    real = room.recover

    def recover(desk, *args, **kw):
        desk.drive = lambda h: None
        out = real(desk, *args, **kw)
        del desk.drive
        return out
    room.recover = recover


BROKEN = {"no recovery": _no_recovery, "lazy intent": _lazy_intent, "random ids": _random_ids, "swallowed fill": _swallowed_fill, "sent again": _resend, "bare start": _bare_start}


# ---- running

def impatient():
    "The venue's clock leaps here, so that it is looked at more often than a real one."
    import threading
    import time
    from bnml.venue import clock
    clock.LOOK_S = 0.05

    def keep(self):
        if time.monotonic() < self._pause_until or (self._asking and self._asking.is_alive()): return
        self._pause_until = time.monotonic() + 0.1
        self._asking = threading.Thread(target=self._measure, name="venue clock", daemon=True)
        self._asking.start()
    clock.VenueClock.keep = keep


def run(plan: dict, argv: list[str]) -> int:
    "The runner's own main, with what the plan wants of it."
    impatient()
    faulthandler.register(signal.SIGUSR1)  # a runner that hangs tells where
    if plan.get("broken"): BROKEN[plan["broken"]]()
    if plan.get("step"): arm(plan["step"], plan.get("n", 1))
    from bnml.runner import main
    return main(argv)


def warm():
    "Import what a live runner imports."
    import ccxt.pro  # noqa: F401
    import bnml.ops.desk, bnml.runner, bnml.trade.violations, bnml.venue.binance, bnml.venue.orders, bnml.venue.streams  # noqa: E401, F401
    import sqlalchemy.dialects.postgresql.psycopg, sqlalchemy.dialects.sqlite  # noqa: E401, F401
    from bnml.core.base import configure_log
    configure_log("info", json=True)
    compiled()


def compiled():
    "What numba compiles at the first bar is compiled here, once."
    import numpy as np
    from bnml.data.panel import Panel
    from bnml.domain.plan import ExitPlan
    from bnml.trade.scanner import Scanner, ScannerSettings
    from tests.kill.churn import Churn
    from tests.kill.stage import frame
    panel = Panel.from_frames({s: frame(0, 0, 120, np.random.default_rng(1)) for s in ("AAAUSDT", "BBBUSDT")}, "1m")
    scanner = Scanner(Churn(), panel, ExitPlan(), ScannerSettings(), 10.0)
    for row in (100, 119): scanner.scan_row(row)


def born(order: dict):
    "The child's life after the fork."
    for fd, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    code = 70
    try:
        code = run(order["plan"], order["argv"])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def nursery():
    "Read orders, fork, tell the process id; then tell how it ended."
    import select
    warm()
    print("warm", flush=True)
    alive = set()
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line: break
            if (pid := os.fork()) == 0: born(json.loads(line))
            alive.add(pid)
            print(json.dumps({"born": pid}), flush=True)
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                alive.discard(pid)
                print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
    for pid in alive: os.kill(pid, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "--nursery": nursery()
    else: sys.exit(run(json.loads(sys.argv[1]), sys.argv[sys.argv.index("--") + 1:]))
