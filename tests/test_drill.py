"A sample of the fault drill as a user plays it, against the real runner's process, and a client with faults of its own, which the judge must see."
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bnml.ops.drill import Play, clean, passed, table
from bnml.ops.scenarios import SCENARIOS, chosen
from bnml.ops.stage import Stage

SAMPLE = ("unknown_executed:send", "fill_in_flight:cancel", "dropped:replace", "reset:query", "gap_through_stop_limit:stream")  # one of each step
FIELDS = {"fault", "step", "duplicate_orders", "lost_fills", "unprotected_seconds", "ledger_difference", "recovered", "outage"}


def sinned(home: Path) -> dict:
    "What the judge says of a client that sends again under a new id and is deaf to its purchases."
    with Stage(home, seed=7, program=(str(Path(__file__).with_name("broken_client.py")),)) as stage:
        play = Play(stage, chosen(["unknown_executed:send"])[0])
        play.patience_s = 6.0
        return play.run()


def rehearsed(home: Path) -> tuple[int, str]:
    "Exit code and output of the command."
    words = [sys.executable, "-m", "bnml.cli", "rehearse", "--drill", "--json", *(w for s in SAMPLE for w in ("--only", s))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150, env=os.environ | {"BNML_HOME": str(home)})
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    "((exit code, output) of the sample, the broken client's row), played side by side."
    with ThreadPoolExecutor(2) as pool:
        sample = pool.submit(rehearsed, tmp_path_factory.mktemp("sample"))
        broken = pool.submit(sinned, tmp_path_factory.mktemp("broken"))
        return sample.result(), broken.result()


def test_a_sample_does_no_harm(played):
    (code, output), _ = played
    rows = json.loads(output)["faults"]
    assert [f"{r['fault']}:{r['step']}" for r in rows] == [s.name for s in chosen(SAMPLE)]
    assert all(FIELDS <= r.keys() for r in rows)
    assert passed(rows, 5.0) and code == 0, table(rows, 5.0)


def test_a_broken_client_is_caught(played):
    _, row = played
    assert row["duplicate_orders"] >= 1 and row["lost_fills"] >= 1 and row["ledger_difference"] > 1
    assert row["unprotected_seconds"] > 5 and not row["recovered"]
    assert not clean(row, 5.0)


def test_the_list_is_what_was_asked_for():
    assert len({s.name for s in SCENARIOS}) == len(SCENARIOS) >= 40
    assert {s.step for s in chosen(SAMPLE)} == {s.step for s in SCENARIOS}
