"Models: refused by name when they do not fit, whole after a kill, honest about noise, the same every time."
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from bnml.core.base import BadData, Refused, canonical_json
from bnml.core.clock import to_ms
from bnml.data.synth import synth_bars
from bnml.ml.bundle import manifest_id
from bnml.ml.dataset import Dataset, prepare
from bnml.ml.evidence import chosen
from bnml.ml.fitting import validate
from bnml.ml.labels import Labels
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.scores import log_loss, sequential
from bnml.ml.train import train
from bnml.trade.learned import Learned
from tests import nursery

HOUR, FIRST = 3_600_000, to_ms("2024-01-01")
BARS = {"SYNUSDT": synth_bars("SYNUSDT", "1h", FIRST, FIRST + 2400 * HOUR, seed=7)}
SMALL = dict(horizons=(5,), trees=10, n_splits=2, min_rows=500, feature_limit=10, threads=1)


def publish(root, seed=7):
    "A small model of the synthetic market."
    result, = train(BARS, ModelSettings(**SMALL, seed=seed), ["SYNUSDT"], "1h", registry=Registry(root))
    assert not result.error, result.error
    return result.version


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "A registry with one published model; tests copy it before they break it."
    root = tmp_path_factory.mktemp("models")
    return root, publish(root)


@pytest.fixture
def registry(shelf, tmp_path):
    root, version = shelf
    subprocess.run(["cp", "-a", str(root), str(tmp_path / "models")], check=True)
    return Registry(tmp_path / "models"), version


def trade(registry):
    "What the runner does with a model: load it and ask it."
    return Learned(registry, ["SYNUSDT"], "1h").frame("SYNUSDT", BARS["SYNUSDT"])


def reseal(registry, version, **changes):
    "A manifest changed by someone who knows how ids are made."
    folder = registry.folder("SYNUSDT", 5, version)
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["id"] = manifest_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    folder.rename(folder.parent / manifest["id"])
    (registry.pair("SYNUSDT", 5) / "current").write_text(manifest["id"])


def test_a_sound_model_predicts(registry):
    assert len(trade(registry[0])) == 2400


@pytest.mark.parametrize("name", ["rf.onnx", "xgb.onnx", "lgb.onnx", "manifest.json"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_flipped_byte_is_refused(registry, name, place):
    found, version = registry
    path = found.folder("SYNUSDT", 5, version) / name
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * place)] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadData, match=name) as e:
        trade(found)
    assert e.value.exit_code == 65 and "bnml train" in str(e.value)


def test_other_features_are_refused(registry):
    found, version = registry
    schema = found.load("SYNUSDT", 5).manifest["schema"]
    reseal(found, version, schema={**schema, "hash": "0" * 12})
    with pytest.raises(Refused, match="feature schema 000000000000") as e:
        trade(found)
    assert e.value.exit_code == 77


@pytest.mark.parametrize("changes, named", [({"format": 0}, "format 0"), ({"libraries": {"onnxruntime": "2.1.0"}}, "onnxruntime 2.1.0"),
                                            ({"libraries": {"onnxruntime": "1.998.0"}}, "onnxruntime 1.998.0")])
def test_other_versions_are_refused(registry, changes, named):
    found, version = registry
    reseal(found, version, **changes)
    with pytest.raises(Refused, match=named) as e:
        trade(found)
    assert e.value.exit_code == 77
    assert [row["state"] for row in found.verify()] == ["refused"]


def test_a_missing_model_is_named_with_its_remedy(tmp_path):
    with pytest.raises(Refused, match="bnml train --symbols SYNUSDT --horizons 5") as e:
        trade(Registry(tmp_path))
    assert e.value.exit_code == 77


KILLED = """
import os
import bnml.ml.registry
calls = 0
def deadly(real):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == {at}: os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return wrapped
os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
from pathlib import Path
manifest = bnml.ml.registry.Registry({root!r}).load("SYNUSDT", 5).manifest
folder = bnml.ml.registry.Registry({root!r}).folder("SYNUSDT", 5, manifest["id"])
models = {{name: (folder / f"{{name}}.onnx").read_bytes() for name in manifest["models"]}}
fresh = {{k: v for k, v in manifest.items() if k not in ("id", "created_at", "files", "format")}} | {{"note": "newer"}}
print(bnml.ml.registry.Registry({root!r}).publish(fresh, models, {{}}))
"""


def test_a_kill_while_publishing_leaves_a_whole_model(registry, tmp_path):
    "Killed at every flush and every rename in turn, until one run gets through."
    found, old = registry
    survived = False
    for at in range(1, 40):
        root = tmp_path / f"attempt{at}"
        subprocess.run(["cp", "-a", str(found.root), str(root)], check=True)
        code = KILLED.format(at=at, root=str(root))
        done = nursery.run("-c", code)
        bundle = Registry(root).load("SYNUSDT", 5)              # whole, whichever it is
        assert len(bundle.predict_proba(np.zeros((1, len(bundle.manifest["schema"]["names"]))))) == 1
        if done.returncode == 0:
            survived = True
            assert bundle.version == done.stdout.strip() != old
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert all(row["state"] == "ready" for row in Registry(root).verify())
    assert survived and at > 12


def made_up(strength, seed, n=2500, k=15):
    "Rows of which one column leads the next hour's return, by `strength`."
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, k))
    r = 0.008 * (strength * X[:, 3] + rng.normal(size=n)) / np.hypot(strength, 1)
    y = np.where(r > 0.005, 1, np.where(r < -0.005, -1, 0)).astype(np.int8)
    times = np.arange(n) * HOUR
    labels = Labels(y, np.ones(n, bool), times, times + 2 * HOUR, np.full(n, 0.005), r, r - 0.002, 1, 0.002)
    return prepare("MADEUP", X, [f"f{i}" for i in range(k)], labels, ModelSettings(min_rows=500))


def test_a_planted_feature_is_found():
    data, settings = made_up(1.0, 1), ModelSettings(**SMALL)
    seen = validate(data, settings)
    assert all(kept.columns[0] == 3 for kept in seen.kept)
    tested = seen.fold == seen.last
    assert chosen(seen, data, settings)[1].choice.edge > 0.001
    assert all(log_loss(data.y[tested], p[tested]) < log_loss(data.y[tested], seen.dummy[tested]) - 0.02 for p in seen.proba.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_shuffled_labels_carry_no_edge(seed):
    "The same rows with labels and returns shuffled in blocks: nothing is better than the dummy, and no trade pays."
    data, rng = made_up(1.0, seed), np.random.default_rng(seed)
    blocks = np.array_split(np.arange(len(data)), 60)
    order = np.concatenate([blocks[i] for i in rng.permutation(60)])
    mixed = Dataset(**{**vars(data), "y": data.y[order], "net": data.net[order]})
    settings = ModelSettings(**SMALL, require_edge=False)
    seen = validate(mixed, settings)
    tested = seen.fold == seen.last
    assert all(log_loss(mixed.y[tested], p[tested]) > log_loss(mixed.y[tested], seen.dummy[tested]) - 0.01 for p in seen.proba.values())
    decider, _ = chosen(seen, mixed, settings)
    action = decider.decide(seen.proba)[0]
    trades = mixed.net[sequential(np.flatnonzero((action == 1) & tested), 1)]
    assert len(trades) == 0 or trades.mean() - mixed.net[tested].mean() < 3 * mixed.net[tested].std() / np.sqrt(len(trades))


AGAIN = """
import sys; sys.path.insert(0, {tests!r})
import test_models, tempfile
root = tempfile.mkdtemp()
print(test_models.publish(root))
print(test_models.told(root))
"""


def told(root):
    "What a manifest says, without the time and the code (which someone may be editing while this runs)."
    manifest = Registry(root).load("SYNUSDT", 5).manifest
    return canonical_json({k: v for k, v in manifest.items() if k not in ("id", "created_at", "code", "inputs")})


def test_another_process_makes_the_same_model(shelf):
    code = AGAIN.format(tests=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "12", "IN_TEST": "1"})
    assert json.loads(done.stdout.strip().split("\n")[-1]) == json.loads(told(shelf[0]))


LIGHT = """
import sys
from bnml.core.clock import to_ms
from bnml.data.synth import synth_bars
from bnml.ml.registry import Registry
from bnml.trade.learned import Learned
from tests import nursery
bars = synth_bars("SYNUSDT", "1h", to_ms("2024-01-01"), to_ms("2024-06-01"), seed=7)
assert Learned(Registry({root!r}), ["SYNUSDT"], "1h").frame("SYNUSDT", bars).confidence.max() > 0
print(sorted({{"sklearn", "xgboost", "lightgbm", "skl2onnx", "onnxmltools", "vectorbt", "plotly", "nbdev", "fastcore"}} & set(sys.modules)))
"""


def test_predicting_loads_no_learner(registry):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(root=str(registry[0].root))], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "[]"
