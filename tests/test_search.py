"A search is continued to the total that was asked for: after a kill, by several processes, on SQLite and on PostgreSQL, and without Optuna."
import json
import os
import signal
import sqlite3

import pytest
import sqlalchemy as sa

from bnml.core.base import BadData, ConfigError, Retry, Unreachable
from bnml.ml.options import SearchSettings
from bnml.ml.search import search
from bnml.ml.space import Real, Whole
from bnml.ml.trials import Trials
from tests import nursery
from tests.test_ledger_pg import server, url  # noqa: F401  fixtures: a PostgreSQL server, an empty schema

SPACE = {"depth": Whole(2, 10), "rate": Real(0.01, 1.0, log=True)}

WORKER = """
import json, math, os, sys, time
if sys.argv[4] == "hide":
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "optuna": raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
    sys.meta_path.insert(0, Hidden())
    for name in [n for n in sys.modules if n.split(".")[0] == "optuna"]: del sys.modules[name]
from bnml.ml.options import SearchSettings
from bnml.ml.search import search
from bnml.ml.space import Real, Whole
storage, total, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
def evaluate(params, report):
    loss = (params["depth"] - 6) ** 2 / 10 + math.log10(params["rate"] / 0.1) ** 2
    for fold in range(3):
        report(fold, loss + fold / 100)
        time.sleep(pause)
    print("done", flush=True)
    return loss
best = search(evaluate, {"depth": Whole(2, 10), "rate": Real(0.01, 1.0, log=True)}, SearchSettings(trials=total, storage=storage or None), "BTCUSDT/5/1h", data_id="bars")
print(json.dumps([best.by, best.value, best.params, [h["params"] for h in best.history]]), flush=True)
"""


def start(storage: str, total: int, pause: float = 0.0, mode: str = "", home=None) -> nursery.Child:
    return nursery.start("-c", WORKER, storage, total, pause, mode, env={**os.environ, **({"BNML_HOME": str(home)} if home else {})})


def answer(worker: nursery.Child) -> list:
    out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err[-1500:]
    return json.loads(out.splitlines()[-1])


def kill_after(worker: nursery.Child, trials: int):
    for _ in range(trials):
        assert worker.stdout.readline() == "done\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()


def killed_and_whole(storage_a, storage_b, home) -> tuple[list, list]:
    "The same search, once killed twice and continued, once left alone."
    for trials in (3, 2):
        kill_after(start(storage_a, 14, 0.02, home=home / "a"), trials)
    return answer(start(storage_a, 14, home=home / "a")), answer(start(storage_b, 14, home=home / "b"))


def test_killed_and_continued_is_as_if_it_had_not_been(tmp_path):
    broken, whole = killed_and_whole("", "", tmp_path)
    assert broken == whole and len(whole[3]) == 14 and whole[0] == "tpe"
    for home in ("a", "b"):
        with Trials(tmp_path / home / "data" / "models" / "trials") as trials:
            assert trials.count("BTCUSDT/5/1h") == 14


def test_killed_and_continued_on_postgresql(url, tmp_path):
    kill_after(start(url, 12, 0.02, home=tmp_path), 4)
    found = answer(start(url, 12, home=tmp_path))
    assert found[0] == "tpe" and len(found[3]) == 12
    assert found[1:] == answer(start("", 12, home=tmp_path / "other"))[1:], "the database does not change what is found"


def test_several_machines_on_one_study(url, tmp_path):
    "Each with a home, and so a ledger, of its own."
    workers = [start(url, 10, 0.01, home=tmp_path / str(i)) for i in range(3)]
    found = [answer(w) for w in workers]
    assert all(10 <= len(f[3]) <= 12 for f in found), "no more than each one's last beyond the total"
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as conn:
        assert conn.exec_driver_sql("SELECT COUNT(*) FROM studies").scalar() == 1
        assert conn.exec_driver_sql("SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')").scalar() == max(len(f[3]) for f in found)
    engine.dispose()
    with Trials(tmp_path / "0" / "data" / "models" / "trials") as trials:
        assert trials.count("BTCUSDT/5/1h") >= 10, "a ledger counts what the others tried, too"


def test_without_optuna_a_grid(tmp_path):
    kill_after(start("", 12, 0.02, "hide", tmp_path), 3)
    with Trials(tmp_path / "data" / "models" / "trials") as trials:
        before = trials.count()
    last = start("", 12, 0.0, "hide", tmp_path)
    out, err = last.communicate(timeout=120)
    by, value, params, every = json.loads(out.splitlines()[-1])
    assert by == "grid" and before >= 2 and len(every) == 9  # three points a dimension fit into twelve
    assert params == {"depth": 6, "rate": pytest.approx(0.1)} and value == pytest.approx(0, abs=1e-9)
    assert out.count("done") == 9 - before, "what the ledger knows is not evaluated again"


def test_the_same_seed_finds_the_same_and_another_seed_another(tmp_path):
    bowl = lambda params, report: (params["depth"] - 6) ** 2 + params["rate"]
    with Trials(tmp_path) as ledger:
        run = lambda name, seed: search(bowl, SPACE, SearchSettings(trials=8, storage=f"sqlite:///{tmp_path}/{name}.db"), "s", ledger, seed).history
        one, two, other = run("a", 7), run("b", 7), run("c", 8)
    assert one == two and one[0]["params"] != other[0]["params"]


def test_bad_trials_are_pruned_and_counted(tmp_path):
    def slow(params, report):
        for fold in range(4):
            report(fold, params["depth"])
            steps.append(fold)
        return params["depth"]
    steps = []
    with Trials(tmp_path) as ledger:
        best = search(slow, SPACE, SearchSettings(trials=30, storage=f"sqlite:///{tmp_path}/p.db"), "s", ledger)
        states = [h["state"] for h in best.history]
        assert states.count("pruned") >= 3 and len(steps) < 4 * 30 and ledger.count("s") == 30 and best.value == 2


def test_a_timeout_begins_no_new_trial(tmp_path):
    with Trials(tmp_path) as ledger:
        best = search(lambda p, r: p["rate"], SPACE, SearchSettings(trials=500, timeout_s=0.3, storage=f"sqlite:///{tmp_path}/t.db"), "s", ledger)
        assert 1 <= best.n_trials < 500


def test_a_trial_that_cannot_be_judged_does_not_end_the_search(tmp_path):
    def moody(params, report):
        if params["depth"] > 6: raise BadData("one class only")
        return float("nan") if params["depth"] == 3 else params["depth"]
    with Trials(tmp_path) as ledger:
        best = search(moody, SPACE, SearchSettings(trials=20, storage=f"sqlite:///{tmp_path}/m.db"), "s", ledger)
        assert best.params["depth"] in (2, 4) and {h["state"] for h in best.history} >= {"complete", "fail"} and ledger.count("s") == 20


def test_new_data_is_a_new_study(tmp_path):
    calls = []
    count = lambda params, report: calls.append(1) or params["rate"]
    with Trials(tmp_path) as ledger:
        for data in ("september", "october", "october"):
            search(count, SPACE, SearchSettings(trials=5, storage=f"sqlite:///{tmp_path}/n.db"), "s", ledger, data_id=data)
        assert len(calls) == 10 and ledger.count("s") == 10


@pytest.mark.parametrize(("storage", "error", "said"), [
    ("postgresql://me:hush@127.0.0.1:1/x", Unreachable, "does not answer"), ("sqlite:////nowhere/at/all.db", Unreachable, "does not answer"),
    ("sqlite:///{here}/broken.db", BadData, "no sound search database"), ("bogus", ConfigError, "no database URL"), ("nosuch://x", ConfigError, "no database URL")])
def test_a_database_that_is_gone_or_broken(tmp_path, storage, error, said):
    (tmp_path / "broken.db").write_bytes(b"nonsense" * 400)
    with Trials(tmp_path) as ledger, pytest.raises(error, match=said) as caught:
        search(lambda p, r: 1.0, SPACE, SearchSettings(trials=2, storage=storage.format(here=tmp_path)), "s", ledger)
    assert "hush" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_database_that_gets_locked_or_lost_on_the_way(tmp_path, monkeypatch):
    import bnml.ml.storage as room
    monkeypatch.setattr(room, "PATIENCE_S", 0.2)
    path = tmp_path / "l.db"
    holder = sqlite3.connect(path, isolation_level=None)
    def lock(params, report):
        holder.execute("BEGIN EXCLUSIVE")
        return 1.0
    with Trials(tmp_path) as ledger:
        with pytest.raises(Retry, match="locked by another process") as caught:
            search(lock, SPACE, SearchSettings(trials=2, storage=f"sqlite:///{path}"), "s", ledger)
        assert caught.value.exit_code == 75
        holder.execute("ROLLBACK")
        holder.close()
        assert search(lambda p, r: 1.0, SPACE, SearchSettings(trials=3, storage=f"sqlite:///{path}"), "s", ledger).n_trials == 3, "afterwards it goes on"
