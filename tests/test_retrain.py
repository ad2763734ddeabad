"Champion and challenger with real processes: what is worse never trades, what is better does, and a death in between changes nothing."
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from bnml.cli import main
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
from bnml.ml.contest import RetrainSettings
from bnml.ml.material import Material, Request
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.tasks import make_task, run_task
from bnml.ops import retrain as rooms
from bnml.ops.retrain import journal, retrain
from bnml.ops.settings import Settings
from bnml.trade.learned import Learned
from tests import nursery

HOUR, FIRST, N = 3_600_000, to_ms("2024-01-01"), 2800
MODEL = dict(models=("lgb",), trees=10, depth=3, calibration="sigmoid", n_splits=2, min_rows=500, feature_limit=20, threads=1, jobs=1, horizons=(1,), context="", min_trades=5,
             edge_k=0.1, require_edge=False, min_confidence=0, conformal_alpha=0.0)
SETTINGS = Settings(model=ModelSettings(**MODEL), retrain=RetrainSettings(window_bars=800))
ENV = {"BNML__RETRAIN__WINDOW_BARS": "800"} | {f"BNML__MODEL__{k.upper()}": json.dumps(v) if not isinstance(v, str) else v for k, v in MODEL.items()}


def predictable(seed: int = 3):
    "Bars whose next move leans against the last one: something can be learnt."
    bars = synth_bars("SYNUSDT", "1h", FIRST, FIRST + N * HOUR, seed=seed)
    noise = np.random.default_rng(seed).normal(0, 0.006, N)
    moves = np.zeros(N)
    for i in range(1, N): moves[i] = -0.3 * moves[i - 1] + noise[i]
    close = 100 * np.exp(np.cumsum(moves))
    bars["close"], bars["open"] = close, np.concatenate([[100.0], close[:-1]])
    bars["high"], bars["low"] = bars[["open", "close"]].max(axis=1) * 1.001, bars[["open", "close"]].min(axis=1) * 0.999
    return bars


@pytest.fixture(scope="module")
def bars():
    return {"SYNUSDT": predictable()}


class Shuffled(Material):
    "Material whose labels have nothing to do with its rows."
    def labels(self, horizon, asked, settings):
        found = super().labels(horizon, asked, settings)
        rows = np.flatnonzero(found.valid)
        found.y[rows] = found.y[np.random.default_rng(1).permutation(rows)]
        return found


def trained(bars, registry, shuffled: bool, to: int) -> str:
    "A version that knows rows before `to`."
    with pytest.MonkeyPatch.context() as m:
        if shuffled: m.setattr("bnml.ml.tasks.gather", lambda *a: Shuffled(**vars(gather(*a))))
        from bnml.ml.material import gather
        done = run_task(make_task(bars, "SYNUSDT", 1, Request("1h", to_ms=FIRST + to * HOUR), SETTINGS.model, registry, publish=False))
    assert not done.error, done.error
    return done.version


@pytest.fixture(scope="module")
def shelf(bars, tmp_path_factory):
    "Puts a version on a registry's empty shelf; each is trained once."
    made = {}

    def put(registry, shuffled: bool, to: int) -> str:
        if (shuffled, to) not in made:
            root = tmp_path_factory.mktemp("models")
            made[shuffled, to] = root, trained(bars, Registry(root), shuffled, to)
        root, version = made[shuffled, to]
        shutil.copytree(root, registry.root, dirs_exist_ok=True)
        return registry.put_in_force("SYNUSDT", 1, version)
    return put


def test_a_better_challenger_takes_over_and_can_be_sent_back(bars, own_home, shelf):
    registry = Registry()
    planted = shelf(registry, True, 1900)
    found = retrain(SETTINGS, ["SYNUSDT"], bars, registry)[0]
    assert (found.outcome, found.champion) == ("published", planted), found
    assert found.gain > 0 and max(found.gain_sigma, found.net_sigma) >= 2 and registry.current("SYNUSDT", 1) == found.challenger
    assert found.rows >= 790
    assert main(["models", "rollback", "SYNUSDT", "--horizon", "1"]) == 0 and Registry().current("SYNUSDT", 1) == planted


def test_a_worse_challenger_is_staged_and_never_trades(bars, own_home, shelf, monkeypatch):
    registry = Registry()
    champion = shelf(registry, False, 1900)
    bad = lambda task: run_task(make_task(bars, "SYNUSDT", 1, task.asked, task.settings, registry, publish=False))

    def shuffling(task):
        from bnml.ml.material import gather
        with monkeypatch.context() as m:
            m.setattr("bnml.ml.tasks.gather", lambda *a: Shuffled(**vars(gather(*a))))
            return bad(task)

    monkeypatch.setattr(rooms, "run_task", shuffling)
    for _ in range(2):
        found = retrain(SETTINGS, ["SYNUSDT"], bars, registry)[0]
        assert (found.outcome, registry.current("SYNUSDT", 1)) == ("staged", champion), found
    assert found.gain < 0 and found.challenger in registry.ids("SYNUSDT", 1)


def test_without_a_champion_chance_must_be_beaten(bars, own_home, monkeypatch):
    registry = Registry()
    found = retrain(SETTINGS, ["SYNUSDT"], bars, registry)[0]
    assert (found.outcome, found.champion) == ("published", None) and "no champion" in found.why, found


def test_the_judged_bars_are_new_to_both(bars, own_home, shelf):
    registry = Registry()
    shelf(registry, True, 2200)      # later than the window's start at 2000
    retrain(SETTINGS, ["SYNUSDT"], bars, registry)
    begun = next(r for r in journal() if r["event"] == "begin")
    cut = to_ms(begun["to"])
    versions = [registry.training("SYNUSDT", 1, v)["manifest"]["last_label_end_ms"] for v in registry.ids("SYNUSDT", 1)]
    assert len(versions) == 2 and max(versions) < cut <= FIRST + 2201 * HOUR


def test_a_strategy_keeps_the_models_that_it_began_with(bars, own_home, shelf):
    registry = Registry()
    old = shelf(registry, True, 1900)
    running = Learned(registry, ["SYNUSDT"], "1h", (1,))
    before = running.frame("SYNUSDT", bars["SYNUSDT"])
    new = retrain(SETTINGS, ["SYNUSDT"], bars, registry)[0].challenger
    after = running.frame("SYNUSDT", bars["SYNUSDT"])
    assert running.models == {"SYNUSDT": [old]} and (before.action == after.action).all() and (before.confidence == after.confidence).all()
    assert Learned(registry, ["SYNUSDT"], "1h", (1,)).models == {"SYNUSDT": [new]} and new != old


# processes

def start(*flags, **env):
    return nursery.start("-m", "bnml.cli", "retrain", *flags, "--json", env={**os.environ, **ENV, **env}, start_new_session=True)


def wait_for(event: str, process, seconds: float = 120):
    "Until the journal says so, looking as often as can be."
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any(r["event"] == event for r in journal()): return True
        time.sleep(0.0005)
    return any(r["event"] == event for r in journal())


@pytest.fixture
def filled(bars, own_home, shelf):
    "A lake, and a champion that knows nothing."
    Lake().write("SYNUSDT", "1h", bars["SYNUSDT"], "synth")
    registry = Registry()
    return shelf(registry, True, 1900)


def test_killed_anywhere_the_champion_or_the_winner_stands(filled):
    champion = filled
    for event in ("begin", "staged", "judged"):
        process = start("--once", "--symbols", "SYNUSDT")
        assert wait_for(event, process), process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        now, judged = Registry().current("SYNUSDT", 1), [r for r in journal() if r["event"] == "judged"]
        assert now == champion or (judged and judged[-1]["better"] and now == judged[-1]["challenger"])
        assert event == "judged" or now == champion
        assert Registry().load("SYNUSDT", 1).version == now
        if now == champion: (rooms.journal_file()).rename(rooms.journal_file().with_suffix(f".{event}"))
    process = start("--once", "--symbols", "SYNUSDT")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    done = json.loads(out)[0]
    assert done["outcome"] in ("published", "kept", "waiting") and Registry().current("SYNUSDT", 1) != champion
    assert Registry().verify()


def test_a_round_that_hangs_is_cut_and_touches_nothing(filled):
    Registry()
    with open(Registry().root / ".lock", "w") as held:          # whoever holds the registry's lock makes the round hang
        fcntl.flock(held, fcntl.LOCK_EX)
        process = start("--symbols", "SYNUSDT", BNML__RETRAIN__TIMEOUT_S="15")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "was killed after 15 s" in err, err
    assert [r["event"] for r in journal()][-1] == "killed" and "begin" in [r["event"] for r in journal()]
    assert Registry().current("SYNUSDT", 1) == filled
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert not left


def test_one_at_a_time(filled):
    with rooms.sole_retrainer():
        process = start("--once", "--symbols", "SYNUSDT")
        _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "another `bnml retrain` is at work" in err and "Traceback" not in err


def test_no_data_says_one_sentence(own_home):
    process = start("--once")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 65 and len(err.strip().splitlines()) == 1 and "bnml data" in err and not out.strip()
