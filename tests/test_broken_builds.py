"Builds that are broken on purpose: every check of risk removed in turn, every duty of the desk neglected. What is not found here would not be found at all."
import ast
import inspect
from contextlib import contextmanager

import pytest

from bnml.core.base import source
from bnml.trade import breakers, checks, risk
from bnml.trade.bounds import CODES
from bnml.trade.engine import Engine
from tests.machine import desks, scenes
from tests.once import once  # noqa: F401


@contextmanager
def without_check(code):
    "Risk, less one of its checks."
    kept = checks.CHECKS[code]
    checks.CHECKS[code] = lambda ask: None
    try: yield
    finally: checks.CHECKS[code] = kept


@contextmanager
def without_hold(code):
    "Risk that never pauses for one reason."
    hold, reasons = breakers.Breakers.hold, risk.Risk.reasons
    breakers.Breakers.hold = lambda self, c, *rest: None if c == code else hold(self, c, *rest)
    risk.Risk.reasons = lambda self, now: tuple(c for c in reasons(self, now) if c != code)
    try: yield
    finally: breakers.Breakers.hold, risk.Risk.reasons = hold, reasons


@contextmanager
def without_refusal(code):
    "An engine that does not refuse for one reason of its own."
    real = Engine._refused
    Engine._refused = lambda self, *args: None if (v := real(self, *args)) is not None and code in v.reasons else v
    try: yield
    finally: Engine._refused = real


def calls(name: str):
    "Every call of that name in what ships, with its first argument."
    for path in (source() / "bnml").rglob("*.py"):
        if not any(mark + name + "(" in (text := path.read_text()) for mark in ". "): continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and node.args and getattr(node.func, "attr", getattr(node.func, "id", "")) == name: yield node.args[0]


def test_every_check_has_a_story():
    "A check, hold or refusal that is new asks for a story in which it alone has something to do: tests/machine/scenes.py."
    assert checks.CHECKS.keys() - scenes.CHECKS.keys() == set()
    assert set(CODES) - scenes.CHECKS.keys() - scenes.HOLDS.keys() == set()
    holds = {x.value for x in calls("hold") if isinstance(x, ast.Constant)} | {*breakers.HALTING}
    assert {"PAUSED", "RECONCILE", "DAILY_LOSS"} <= holds and holds - scenes.HOLDS.keys() == set()
    refusals = {c.value for x in calls("no") if isinstance(x, ast.List) for c in x.elts}
    assert all(code in inspect.getsource(Engine._refused) for code in refusals) and refusals == scenes.REFUSALS.keys()


@pytest.mark.parametrize("code", scenes.CHECKS)
def test_a_check_that_is_removed_is_missed(code):
    bad, said = scenes.found(scenes.CHECKS[code])
    assert bad == set() and code in said, f"with every check: found {bad}, risk said {said}"
    with without_check(code), without_hold(code if code == "VOLATILITY" else ""): bad, _ = scenes.found(scenes.CHECKS[code])  # its hold would say the same
    assert bad, f"nobody noticed that {code} is not checked"
    if code != "NO_QUANTITY": assert code in bad, f"found {bad} instead"  # an order of nothing is refused before it is sent


@pytest.mark.parametrize("code", scenes.HOLDS)
def test_a_hold_that_is_never_set_is_missed(code):
    bad, said = scenes.found(scenes.HOLDS[code])
    assert bad == set() and code in said, f"with every hold: found {bad}, risk said {said}"
    with without_hold(code): bad, _ = scenes.found(scenes.HOLDS[code])
    assert bad & {code, "AssertionError"}, f"nobody noticed that {code} is never set: {bad}"


@pytest.mark.parametrize("code", scenes.REFUSALS)
def test_a_refusal_that_is_left_out_is_missed(code):
    bad, said = scenes.found(scenes.REFUSALS[code])
    assert bad == set() and code in said, f"with every refusal: found {bad}, risk said {said}"
    with without_refusal(code): bad, _ = scenes.found(scenes.REFUSALS[code])
    assert bad == {"AssertionError"}, f"nobody noticed that {code} is not refused: {bad}"


def test_a_desk_that_does_its_duties_is_not_blamed():
    assert desks.spent() == ""


@pytest.mark.parametrize("broken", desks.DUTIES)
def test_a_duty_that_is_neglected_is_noticed(broken):
    with desks.DUTIES[broken](): assert desks.spent(), f"nobody noticed that {broken}"
