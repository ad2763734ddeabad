"Published models asked together: the same as alone, as in training and as ONNX Runtime; and nothing that was tampered with is read."
import json
import pickle
import shutil
from hashlib import sha256

import numpy as np
import pytest

from bnml.core.base import BadData, Refused
from bnml.core.clock import to_ms
from bnml.data.panel import Panel
from bnml.data.synth import synth_bars
from bnml.domain.plan import ExitPlan
from bnml.ml.arena import Arena
from bnml.ml.bundle import manifest_id, open_bundle
from bnml.ml.features import last_rows, matrix_panel
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.train import train
from bnml.trade.learned import Learned
from bnml.trade.scanner import Scanner

HOUR, FIRST, N = 3_600_000, to_ms("2024-01-01"), 3000
SYMBOLS, FILES = ("BTCUSDT", "SYNUSDT"), ("rf.onnx", "xgb.onnx", "lgb.onnx", "seq.onnx")
BARS = {s: synth_bars(s, "1h", FIRST, FIRST + N * HOUR, seed=3 + i) for i, s in enumerate(SYMBOLS)}
SMALL = ModelSettings(models=("rf", "xgb", "lgb", "seq"), horizons=(1, 5), trees=8, n_splits=2, min_rows=500, feature_limit=12, threads=1, jobs=1,
                      require_edge=False, lstm={"epochs": 4})


def reseal(folder, **changes):
    "By someone who knows how ids are made."
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["files"] = {name: sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    manifest["id"] = manifest_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.rename(folder.parent / manifest["id"])


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    "Two symbols, two horizons, four learners; their rules replaced by eager ones, so that there are decisions to compare."
    found = Registry(tmp_path_factory.mktemp("models"))
    results = train(BARS, SMALL, list(SYMBOLS), "1h", to_ms=FIRST + 2800 * HOUR, registry=found)
    assert not any(r.error for r in results), [r.error for r in results]
    for r in results:
        folder = found.folder(r.symbol, r.horizon, r.version)
        decision = json.loads((folder / "manifest.json").read_text())["decision"]
        eager = {**decision, "rule": {"threshold": 0.25, "margin": 0.0}, "conformal": {"alpha": 0.4, "quantile": 0.74}}
        (found.pair(r.symbol, r.horizon) / "current").write_text(reseal(folder, decision=eager).name)
    return found


@pytest.fixture(scope="module")
def bundles(registry):
    return [registry.load(s, h) for s in SYMBOLS for h in (1, 5)]


@pytest.fixture
def folder(registry, bundles, tmp_path):
    "A copy to break."
    return shutil.copytree(bundles[2].folder, tmp_path / bundles[2].version)


def test_all_four_learners_are_published_and_answer_as_onnxruntime(bundles):
    for b in bundles:
        assert sorted(b.weights) == ["lgb", "rf", "seq", "xgb"] and b.lags == 6
        assert b.verify() < 1e-6
        assert all(m["gap"] < 1e-5 for m in b.manifest["models"].values())


def test_the_arena_says_of_every_row_what_each_bundle_says_of_the_frame(bundles):
    X, arena = matrix_panel(Panel.from_frames(BARS, "1h"), threads=1), Arena(bundles, SYMBOLS)
    alone = [(b.predict_proba(X[SYMBOLS.index(b.symbol)]), *b.decide(X[SYMBOLS.index(b.symbol)])) for b in bundles]
    for row in range(2700, N):
        action, confidence, proba = arena.decide(X[:, row + 1 - arena.lags:row + 1])
        for i, (p, a, c) in enumerate(alone):
            assert np.array_equal(proba[i], p[row], equal_nan=True) and (action[i], confidence[i]) == (a[row], c[row])
    assert {a for _, actions, _ in alone for a in actions[2700:].tolist()} == {-1, 0, 1}
    assert any((b.rule.decide(p)[0] != a).any() for b, (p, a, _) in zip(bundles, alone))               # and abstention


def test_a_scan_after_each_bar_is_the_batch(registry):
    "The runner's way, one row at a time over a growing panel, against the backtest's, one frame for all; Bitcoin beside."
    market = Panel.from_frames(BARS, "1h")
    batch, live = (Scanner(Learned(registry, list(SYMBOLS), "1h", (1, 5)), market, ExitPlan()) for _ in range(2))
    batch.scan_all()
    for row in range(2880, N):
        live.scan_row(row)
    for name, tolerance in (("action", 0), ("confidence", 1e-6)):
        assert np.abs(getattr(live.signals, name)[2880:N].astype(float) - getattr(batch.signals, name)[2880:]).max() <= tolerance
    assert (live.signals.horizon[2880:N] == batch.signals.horizon[2880:]).all()
    assert len(np.unique(batch.signals.action[2880:])) > 1 and live.strategy._held[1] is not None      # decisions, by the arena


def test_newest_rows_are_enough(bundles):
    "Features of the last rows alone give the whole history's probabilities."
    market, arena = Panel.from_frames(BARS, "1h"), Arena(bundles, SYMBOLS)
    whole = arena.predict(matrix_panel(market, threads=1)[:, -arena.lags:])
    assert np.abs(arena.predict(last_rows(market, arena.lags, threads=1)) - whole).max() < 1e-6


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
def test_one_flipped_byte_in_any_file_is_refused(folder, place):
    names = sorted(p.name for p in folder.iterdir() if p.name != "training.json")
    assert {*FILES, "manifest.json"} <= set(names)
    for name in names:
        sound = (folder / name).read_bytes()
        raw = bytearray(sound)
        raw[int(len(raw) * place)] ^= 1
        (folder / name).write_bytes(raw)
        with pytest.raises(BadData, match=name) as e:
            open_bundle(folder)
        assert e.value.exit_code == 65 and "bnml train" in str(e.value)
        (folder / name).write_bytes(sound)
    assert open_bundle(folder).verify() < 1e-6


class Bomb:
    "A pickle that would leave a trace."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_model_is_refused_and_never_run(folder, tmp_path, protocol):
    (folder / "lgb.onnx").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol))
    with pytest.raises(Refused, match="lgb.onnx is no ONNX file") as e:
        open_bundle(reseal(folder)).verify()
    assert e.value.exit_code == 77 and not (tmp_path / "ran").exists()


def test_a_model_under_another_name_than_onnx_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "rf.onnx").rename(folder / "rf.joblib")
    files = {("rf.joblib" if name == "rf.onnx" else name): sha for name, sha in manifest["files"].items()}
    with pytest.raises(Refused, match="no rf.onnx") as e:
        open_bundle(reseal(folder, files=files))
    assert e.value.exit_code == 77


@pytest.mark.parametrize("changes, named", [({"format": 1}, "format 1, this code reads format 2"), ({"libraries": {"onnxruntime": "9.0.0"}}, "onnxruntime 9.0.0")])
def test_another_format_or_library_is_refused_by_name(folder, changes, named):
    with pytest.raises(Refused, match=named) as e:
        open_bundle(reseal(folder, **changes))
    assert e.value.exit_code == 77


def test_another_schema_is_refused_by_name(folder):
    with pytest.raises(Refused, match="feature schema .* features are now 0123456789abcdef") as e:
        open_bundle(folder, "0123456789abcdef")
    assert e.value.exit_code == 77


def test_a_model_that_answers_otherwise_than_its_file_is_found(folder, monkeypatch):
    "What `bnml models verify` is for: the flat reading of a file against ONNX Runtime's."
    bundle = open_bundle(folder)
    bundle.pack.values[:] *= 1.001
    with pytest.raises(BadData, match="differ by .* from what ONNX Runtime reads"):
        bundle.verify()
