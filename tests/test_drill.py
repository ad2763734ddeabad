"A sample of the fault drill against the real runner's process, and a client with faults of its own, which the judge must see."
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bnml.ops.drill import Play, clean, drill, passed, table
from bnml.ops.scenarios import SCENARIOS, chosen
from bnml.ops.stage import Stage

SAMPLE = ("unknown_executed:send", "dropped:replace", "fill_in_flight:cancel", "reset:query", "gap_through_stop_limit")
FIELDS = {"fault", "step", "duplicate_orders", "lost_fills", "unprotected_seconds", "ledger_difference", "recovered"}


def sinned(home: Path) -> dict:
    "What the judge says of a client that sends again under a new id and is deaf to its purchases."
    with Stage(home, seed=7, program=(str(Path(__file__).with_name("broken_client.py")),)) as stage:
        play = Play(stage, chosen(["unknown_executed:send"])[0])
        play.patience_s = 6.0
        return play.run()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    "(rows of the sample, the broken client's row), played side by side."
    with ThreadPoolExecutor(2) as pool:
        broken = pool.submit(sinned, tmp_path_factory.mktemp("broken"))
        sample = pool.submit(drill, chosen(SAMPLE), seed=7, lanes=1, home=tmp_path_factory.mktemp("sample"))
        return sample.result(), broken.result()


def test_a_sample_does_no_harm(played):
    rows, _ = played
    assert {f"{r['fault']}:{r['step']}" for r in rows} == {s.name for s in chosen(SAMPLE)}
    assert all(FIELDS <= r.keys() for r in rows)
    assert passed(rows, 5.0), table(rows, 5.0)


def test_a_broken_client_is_caught(played):
    _, row = played
    assert row["duplicate_orders"] >= 1 and row["lost_fills"] >= 1 and row["ledger_difference"] > 1
    assert row["unprotected_seconds"] > 5 and not row["recovered"]
    assert not clean(row, 5.0)


def test_the_list_is_what_was_asked_for():
    assert len({s.name for s in SCENARIOS}) == len(SCENARIOS) >= 40
