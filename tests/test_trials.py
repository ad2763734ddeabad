"The trial ledger keeps what was added: by several processes at once, and by one that is killed."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bnml.ml.trials import Trials
from tests import nursery

WRITER = """
import sys
from bnml.ml.trials import Trials
trials = Trials(sys.argv[1])
print("ready", flush=True)
first, last, step = map(int, sys.argv[2:])
for i in range(first, last, step):
    trials.add_many("BTCUSDT/5/1h", [dict(params={"i": i, "j": j}, score=i, sharpe_bar=j / 100, returns=[i, j]) for j in range(5)], "bars")
    print(i, flush=True)
"""


def start(*args) -> nursery.Child:
    return nursery.start("-c", WRITER, *args)


def pairs(root) -> set[tuple[int, int]]:
    with Trials(root) as trials:
        return {(t["params"]["i"], t["params"]["j"]) for t in trials.table()}


def test_processes_that_write_at_once(tmp_path):
    writers = [start(tmp_path / "new", first, 40, 2) for first in (0, 1, 0)]  # the third repeats the first
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert pairs(tmp_path / "new") == {(i, j) for i in range(40) for j in range(5)}
    with Trials(tmp_path / "new") as trials:
        assert trials.count("BTCUSDT/5/1h") == 200 and trials.returns("BTCUSDT/5/1h").shape == (2, 200)


def test_killed_at_any_moment(tmp_path):
    for round_, pause in enumerate((0.003, 0.011, 0.03)):
        writer = start(tmp_path, 1000 * round_, 10 ** 6, 1)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(pause)
        os.kill(writer.pid, signal.SIGKILL)
        said = [int(line) for line in writer.communicate()[0].split()]
        found = pairs(tmp_path)
        assert {(i, j) for i in said for j in range(5)} <= found, "what was acknowledged is there"
        assert len(found) % 5 == 0, "a batch is whole or absent"
    with Trials(tmp_path) as trials:
        assert trials.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert trials.add("BTCUSDT/5/1h", {"after": True})


def test_a_sweep_of_a_thousand_is_cheap(tmp_path):
    rng = np.random.default_rng(1)
    rows = [dict(params={"fast": i, "slow": i + 9}, score=0.1, sharpe_bar=0.01, returns=rng.normal(size=365)) for i in range(1000)]
    with Trials(tmp_path) as trials:
        begun = time.perf_counter()
        assert trials.add_many("BTCUSDT/*/1h", rows, "bars", "sweep") == 1000
        assert time.perf_counter() - begun < 2
        again = time.perf_counter()
        assert trials.add_many("BTCUSDT/*/1h", rows, "bars", "sweep") == 0
        assert time.perf_counter() - again < 2
        np.testing.assert_allclose(np.sort(trials.returns("BTCUSDT/7/1h")[0]), np.sort([r["returns"][0] for r in rows]), rtol=1e-6)


def test_the_runner_never_meets_it():
    code = "import sys, bnml.runner; sys.exit(any(m in sys.modules for m in ('bnml.ml.trials', 'bnml.ml.search', 'bnml.ml.overfit', 'optuna')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_trial_without_a_finite_score_is_still_a_trial(tmp_path):
    with Trials(tmp_path) as trials:
        trials.add("s", {"a": 1}, score=float("nan"), sharpe_bar=float("inf"))
        assert trials.count("s") == 1 and np.isnan(trials.sharpes("s")).all() and trials.table("s")[0]["score"] is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Exception, match="make the folder writable"):
        Trials(tmp_path)
    tmp_path.chmod(0o700)
