"Builds that are broken on purpose: every check of risk removed in turn, every duty of the desk neglected. What is not found here would not be found at all."
from contextlib import contextmanager

import pytest

from bnml.trade import breakers, checks, risk
from bnml.trade.bounds import CODES
from tests.machine import desks, scenes


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


def test_every_check_has_a_story():
    "A check that is new asks for a story in which it alone has something to do: tests/machine/scenes.py."
    assert checks.CHECKS.keys() - scenes.CHECKS.keys() == set()
    assert set(CODES) - scenes.CHECKS.keys() - scenes.HOLDS.keys() == set()
    assert {"KILL_SWITCH", "PAUSED"} < scenes.HOLDS.keys()


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


def test_a_desk_that_does_its_duties_is_not_blamed():
    assert desks.spent() == ""


@pytest.mark.parametrize("broken", desks.DUTIES)
def test_a_duty_that_is_neglected_is_noticed(broken):
    with desks.DUTIES[broken](): assert desks.spent(), f"nobody noticed that {broken}"
