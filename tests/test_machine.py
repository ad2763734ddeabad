"Accounts in a market of gaps and holes, at a venue that loses answers, in a process that dies: whatever happens, limits hold, books balance and every coin is protected."
import logging
import os

import pytest
import structlog

from bnml.venue.sim import SimVenue
from tests.machine import desks, judge, paper
from tests.machine.rules import search
from tests.machine.world import World
from tests.once import once  # noqa: F401

FRESH = int(os.environ["BNML_SEED"])  # made and printed by conftest


@pytest.fixture(autouse=True)
def quiet():
    "Thousands of warnings are expected."
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("seed, examples, calm", [(4, 20, True), (4, 30, False)], ids=["calm", "faults"])
def test_accounts_of_a_fixed_seed(seed, examples, calm): search(seed, examples, calm=calm)


def test_accounts_of_a_fresh_seed():
    "Another one in each run."
    try: search(FRESH, 20)
    except BaseException as e:
        e.add_note(f"repeat with BNML_SEED={FRESH}")
        raise


def test_paper_is_taken_up_where_it_was_left(monkeypatch):
    "A simulated exchange forgets with its process; one that is not given its orders back is caught."
    paper.search(FRESH, 2, 20)
    restore = SimVenue.restore
    monkeypatch.setattr(SimVenue, "restore", lambda self, orders, balances: restore(self, [o for o in orders if not o.is_open], balances))
    with pytest.raises(AssertionError): paper.search(2, 8, 25)


def test_the_judge_knows_what_happened():
    "The days are no idle ones: fills, restarts, faults, raised stops, ends of several kinds."
    w = World("wide", "full")
    try:
        desks.day(w)
        ends = {r for (r,) in w.rows("select i.reason from intents i join fills f on f.client_id = i.client_id where i.side = 'SELL'")}
        assert len(w.x.fills) > 15 and len(ends) > 3, (len(w.x.fills), ends)
        assert w.disturbed and len(w.epochs) == 4 and sum("told double" in line for line in w.story) > 1
        assert judge.limits(w) == []
    finally: w.done()
