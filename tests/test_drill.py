"A sample of the fault drill against the real runner's process, and then a client with faults of its own, which the judge must see."
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from bnml.cli import main
from bnml.ops import drill as drilling
from bnml.ops.drill import Play, clean, passed, table
from bnml.ops.scenarios import SCENARIOS, chosen
from bnml.ops.stage import Stage

SAMPLE = ("unknown_executed:send", "fill_in_flight:cancel", "dropped:replace", "reset:query", "gap_through_stop_limit:stream")  # one of each step
FIELDS = {"fault", "step", "duplicate_orders", "lost_fills", "unprotected_seconds", "ledger_difference", "recovered", "outage"}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    "(rows of the sample, the row of the same runner once it sends again under a new id and is deaf to its purchases)."
    home = tmp_path_factory.mktemp("stage")
    with Stage(home, seed=7, stop_limit=True, program=(str(Path(__file__).with_name("broken_client.py")),)) as stage:
        rows = [Play(stage, s).run() for s in chosen(SAMPLE)]
        (home / "sin").touch()
        play = Play(stage, chosen(["unknown_executed:send"])[0])
        play.patience_s = 4.5
        broken = play.run()
        stage.process.kill()  # nobody needs its last word
        return rows, broken


def test_a_sample_does_no_harm(played):
    rows, _ = played
    assert [f"{r['fault']}:{r['step']}" for r in rows] == [s.name for s in chosen(SAMPLE)]
    assert all(FIELDS <= r.keys() for r in rows)
    assert passed(rows, 5.0), table(rows, 5.0)


def test_the_command_tells_what_was_played(played, own_home, monkeypatch):
    rows, broken = played
    for given, expected in ((rows, 0), ([*rows, broken], 77)):
        monkeypatch.setattr(drilling, "drill", lambda wanted, *a, **k: given[: len(wanted) + 1])
        with redirect_stdout(io.StringIO()) as out: code = main(["rehearse", "--drill", "--json", *(w for s in SAMPLE for w in ("--only", s))])
        assert code == expected and json.loads(out.getvalue())["faults"] == given


def test_a_broken_client_is_caught(played):
    _, row = played
    assert row["duplicate_orders"] >= 1 and row["lost_fills"] >= 1 and row["ledger_difference"] > 1
    assert row["unprotected_seconds"] > 5 and not row["recovered"]
    assert not clean(row, 5.0)


def test_the_list_is_what_was_asked_for():
    assert len({s.name for s in SCENARIOS}) == len(SCENARIOS) >= 40
    assert {s.step for s in chosen(SAMPLE)} == {s.step for s in SCENARIOS}
