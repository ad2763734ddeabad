"Training: goes on after a kill, the same in one process, two, or a cluster; one failure is one sentence, and the others finish."
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, get_context

import numpy as np
import pytest

from bnml.core.base import Unreachable, source
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_market
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.tasks import Request, make_task, run_cluster, run_local
from bnml.ml.train import summary, train
from tests import nursery

HOUR, FIRST = 3_600_000, to_ms("2024-01-01")
SYMBOLS = ["AUSDT", "BUSDT", "CUSDT"]
SMALL = dict(horizons=(2, 5), trees=6, depth=3, n_splits=2, min_rows=500, feature_limit=10, threads=1, models=("rf", "lgb", "seq"), context="AUSDT", lstm={"epochs": 3})
ENV = {f"BNML__MODEL__{name}".upper(): ",".join(map(str, v)) if isinstance(v, tuple) else str(v)
       for key, value in SMALL.items() for name, v in ([(f"{key}__{k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)])}


@pytest.fixture(scope="module")
def market():
    return synth_market(SYMBOLS, "1h", FIRST, FIRST + 1700 * HOUR, 7)


@pytest.fixture
def lake(market, own_home):
    "A lake in the test's own home."
    for symbol, bars in market.items(): Lake().write(symbol, "1h", bars, "synthetic market, seed 7")
    return Lake()


def told(root) -> dict:
    "What every manifest in force says, without the moment and the code (which someone may be editing while this runs)."
    registry = Registry(root)
    found = {pair: registry.load(*pair).manifest for pair in registry.pairs()}
    return {pair: {k: v for k, v in m.items() if k not in ("id", "created_at", "code", "inputs")} for pair, m in found.items()}


def start(home, *words):
    "`bnml train` in a process of its own."
    env = {**os.environ, **ENV, "BNML_HOME": str(home), "IN_TEST": "1"}
    return nursery.start("-m", "bnml.cli", "train", "--json", *words, env=env)


@pytest.fixture(scope="module")
def whole(market, tmp_path_factory):
    "What one process makes that nobody kills: the measure of the others."
    return told_by(market, tmp_path_factory.mktemp("whole"))


def test_killed_and_started_again(lake, own_home, whole):
    "Finished pairs are kept, the rest is made, and all is as if nothing had happened."
    process, done = start(own_home, "--jobs", "1"), own_home / "data" / "models"
    until = time.monotonic() + 120
    while len(list(done.glob("*/*/current"))) < 2 and time.monotonic() < until and process.poll() is None: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in done.glob("*/*/current")}
    assert 2 <= len(before) < 6
    again = start(own_home, "--jobs", "1")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    rows = json.loads(out)
    kept = {(r["symbol"], r["horizon"]) for r in rows if r["reused"]}
    assert len(rows) == 6 and kept <= {(p.parts[-3], int(p.parts[-2])) for p in before}
    assert len(kept) >= 1 and all(p.stat().st_mtime_ns == before[p] for p in before if (p.parts[-3], int(p.parts[-2])) in kept)
    assert told(done) == whole


def told_by(market, root) -> dict:
    "The manifests of a training that nobody killed."
    results = train(market, ModelSettings(**SMALL), SYMBOLS, "1h", registry=Registry(root))
    assert not [r.error for r in results if r.error]
    return told(root)


def test_two_processes_make_what_one_makes(market, whole, tmp_path):
    results = train(market, ModelSettings(**SMALL), SYMBOLS[:2], "1h", registry=Registry(tmp_path / "two"), jobs=2)
    assert [(r.symbol, r.horizon, r.error) for r in results] == [(s, h, "") for s in SYMBOLS[:2] for h in (2, 5)]
    assert told(tmp_path / "two") == {pair: said for pair, said in whole.items() if pair[0] in SYMBOLS[:2]}


def deadly(task):
    "Work that ends its process for one symbol, slowly enough that a neighbour is under way."
    if task.symbol == "BUSDT": os._exit(9)
    time.sleep(0.3)
    return task.symbol


def tasks_of(symbols=SYMBOLS):
    return [make_task({}, s, 5, Request("1h"), ModelSettings(**SMALL)) for s in symbols]


@pytest.fixture(scope="module")
def forks():
    "Processes whose libraries were read before they began: cheap ones, for tests in which many die."
    found = get_context("forkserver")
    found.set_forkserver_preload(["distributed", __name__])
    forkserver.ensure_running()
    return found


def test_a_dead_process_costs_its_own_task_only(forks, monkeypatch):
    monkeypatch.setattr("bnml.ml.tasks._pool", lambda jobs: ProcessPoolExecutor(jobs, forks))
    done = list(run_local(tasks_of([*SYMBOLS, "DUSDT", "EUSDT"]), 2, work=deadly))
    bad = [r for r in done if not isinstance(r, str)]
    assert sorted(r for r in done if isinstance(r, str)) == ["AUSDT", "CUSDT", "DUSDT", "EUSDT"]
    assert len(bad) == 1 and bad[0].symbol == "BUSDT" and bad[0].exit_code == 65 and "died (killed, or out of memory)" in bad[0].error


def slow(task):
    "Work that says whose process does it, and does not end."
    with open(os.environ["BNML_PIDS"], "a") as f: f.write(f"{os.getpid()}\n")
    time.sleep(600)


def alive(pid):
    "Does the process still run?"
    try:
        with open(f"/proc/{pid}/stat") as f: return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks /proc which processes run")
def test_workers_leave_with_a_parent_that_is_killed(tmp_path):
    pids = tmp_path / "pids"
    pids.touch()
    parent = subprocess.Popen([sys.executable, "-c", "from test_training import *; list(run_local(tasks_of(), 2, slow))"],
                              cwd=os.path.dirname(__file__), env={**os.environ, "BNML_PIDS": str(pids), "PYTHONPATH": str(source())})
    deadline = time.monotonic() + 90
    while pids.read_text().count("\n") < 2 and time.monotonic() < deadline: time.sleep(0.2)
    parent.kill()
    parent.wait()
    workers, deadline = [int(p) for p in pids.read_text().split()], time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline: time.sleep(0.2)
    assert len(workers) == 2 and not any(map(alive, workers))


@pytest.fixture(scope="module")
def cluster(forks):
    distributed = pytest.importorskip("distributed")
    import dask
    with dask.config.set({"distributed.scheduler.allowed-failures": 1, "distributed.worker.multiprocessing-method": forks.get_start_method()}):  # two deaths convict
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as found: yield found


def test_a_cluster_makes_what_one_process_makes(market, whole, tmp_path, cluster):
    results = train(market, ModelSettings(**SMALL), SYMBOLS[:2], "1h", registry=Registry(tmp_path / "dask"), scheduler=cluster.scheduler_address)
    assert not [r.error for r in results if r.error] and len(results) == 4
    assert told(tmp_path / "dask") == {pair: said for pair, said in whole.items() if pair[0] in SYMBOLS[:2]}


def test_a_worker_that_dies_does_not_end_the_others(cluster):
    done = list(run_cluster(tasks_of(), cluster.scheduler_address, work=deadly))
    bad = [r for r in done if not isinstance(r, str)]
    assert sorted(r for r in done if isinstance(r, str)) == ["AUSDT", "CUSDT"]
    assert len(bad) == 1 and bad[0].symbol == "BUSDT" and "every worker that trained it died" in bad[0].error


def test_a_cluster_without_workers_is_named():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, processes=True) as empty:
        done = list(run_cluster(tasks_of(), empty.scheduler_address, patience_s=0.5))
        assert [r.exit_code for r in done] == [69] * 3 and all(f"no worker is left at {empty.scheduler_address}" in r.error for r in done)


def test_nobody_listens():
    with pytest.raises(Unreachable, match="no Dask scheduler answers at tcp://127.0.0.1:9") as e:
        list(run_cluster(tasks_of(), "tcp://127.0.0.1:9", patience_s=1.0))
    assert e.value.exit_code == 69


def test_one_failure_is_one_sentence_and_the_others_are_published(lake, own_home):
    Lake().write("NEWUSDT", "1h", Lake().read("AUSDT", "1h").iloc[-120:], "young")
    process = start(own_home, "--horizons", "5", "--jobs", "1")
    out, err = process.communicate(timeout=200)
    rows = {r["symbol"]: r for r in json.loads(out)}
    assert process.returncode == 65 and err.count("\n") == 1 and "1 of 4 trainings failed; NEWUSDT: 120 bars of 1h" in err, err
    assert all(rows[s]["published"] and not rows[s]["error"] for s in SYMBOLS)
    assert {s for s, _ in Registry().pairs()} == set(SYMBOLS)


def test_bad_columns_and_gaps_are_survived(market):
    "A column that never varies, an empty one, a hole in the bars and a symbol that begins late."
    still = {s: b.copy() for s, b in market.items()}
    still["AUSDT"]["volume"] = 0.0                                                    # every column of volume is constant or empty
    still["BUSDT"] = still["BUSDT"].drop(still["BUSDT"].index[1000:1040])
    still["CUSDT"] = still["CUSDT"].iloc[600:]
    results = train(still, ModelSettings(**{**SMALL, "horizons": (5,), "models": ("lgb",)}), SYMBOLS, "1h")
    assert not [r.error for r in results if r.error]
    a, b, c = (r.report for r in results)
    assert a["put_aside"]["not_finite"] or a["put_aside"]["useless"]
    assert b["gaps"]["missing_bars"] >= 40 and c["learnt_rows"] < a["learnt_rows"]


def test_a_single_class_says_what_to_do(market):
    result, = train(market, ModelSettings(**{**SMALL, "horizons": (2,), "edge_k": 9.0}), ["AUSDT"], "1h")
    assert result.exit_code == 65 and "every label is 0: lower model.edge_k" in result.error


def test_young_symbols_trade_on_the_pooled_model(market, tmp_path):
    "Trained over all, compared with each, lent to who has none of its own, and never silently."
    settings, registry = ModelSettings(**{**SMALL, "horizons": (5,), "models": ("rf", "lgb")}), Registry(tmp_path)
    young = {**market, "NEWUSDT": market["CUSDT"].iloc[-400:]}
    results = train(young, settings, [*SYMBOLS, "NEWUSDT"], "1h", registry=registry, pooled=True)
    rows = {r["symbol"]: r for r in summary(results)}
    assert "400 bars of 1h, 500 labelled rows are needed" in rows["NEWUSDT"]["error"] and rows["POOLED"]["published"]
    assert all(rows[s]["pooled_log_loss"] > 0 and rows[s]["ensemble_log_loss"] > 0 for s in SYMBOLS)
    assert registry.load("POOLED", 5).manifest["pooled"] and registry.readiness(["NEWUSDT"], [5])[0]["state"] == "missing"
    lent, = registry.readiness(["NEWUSDT"], [5], pooled="fallback")
    assert lent["state"] == "ready" and lent["pooled"] and "the pooled one stands in" in lent["reason"]


def test_barrier_labels_train_too(market, tmp_path):
    result, = train(market, ModelSettings(**{**SMALL, "horizons": (5,), "labels": "barrier"}), ["AUSDT"], "1h", registry=Registry(tmp_path))
    assert not result.error and result.manifest["label_kind"] == "barrier" and result.report["label_kind"] == "barrier"


def test_a_search_is_counted_and_kept_from_the_test_fold(market, tmp_path):
    "Two trials: in the ledger, in the report, and the same best the second time without trying again."
    settings = ModelSettings(**{**SMALL, "horizons": (5,), "models": ("lgb",), "search": {"trials": 2, "storage": f"sqlite:///{tmp_path}/o.db"}})
    first, = train(market, settings, ["AUSDT"], "1h", registry=Registry(tmp_path / "a"))
    assert not first.error and len(first.report["trials"]["search"]) == 2
    assert first.manifest["overfit"]["trials"] == 2 + len(first.report["trials"]["rules"])
    again, = train(market, settings, ["AUSDT"], "1h", registry=Registry(tmp_path / "a"), reuse=False)
    assert again.version == first.version


def test_training_json_has_what_the_report_asks_for(market):
    result, = train(market, ModelSettings(**{**SMALL, "horizons": (5,)}), ["AUSDT"], "1h")
    report = result.report
    assert {"label_balance", "sample_weights", "gaps", "folds", "calibration", "confusion", "features", "put_aside", "stability", "weights", "rounds",
            "settled", "slices", "learning_curve", "trials", "record", "label_kind", "learnt_rows", "skipped"} <= set(report)
    assert {r["model"] for r in report["folds"]} == {"rf", "lgb", "seq", "ensemble", "logistic", "dummy"}
    test = next(r for r in report["folds"] if r["role"] == "test")
    assert all(r["last_end_ms"] < test["test_from"] for r in report["record"])
    assert set(result.manifest["metrics"]["test"]) == {"ensemble", "logistic", "dummy"} and np.isfinite(result.manifest["metrics"]["test"]["ensemble"]["brier"])
