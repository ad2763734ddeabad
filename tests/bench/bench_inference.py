"After a bar close: every model of a universe asked at once, beside each model's own predict_proba in a loop; loading, memory, exactness."
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

SYMBOLS, HORIZONS, KEPT, LAGS, WIDE, ROWS = 400, (1, 5, 30), 50, 6, 16, 9_000


def teach() -> tuple[dict, np.ndarray]:
    "The four learners in full size on made-up rows, their files, and the full feature matrix."
    from bnml.ml.convert import to_onnx
    from bnml.ml.families import names
    from bnml.ml.models import MODELS, make_model
    from bnml.ml.sequence import lagged
    rng = np.random.default_rng(7)
    full = rng.normal(size=(ROWS, len(names("1h")))).astype(np.float32)
    z = full[:, 1] + 0.5 * full[:, 4] * full[:, 7] + 2 * rng.normal(size=ROWS)
    y, out = np.digitize(z, [-1.2, 1.2]) - 1, {}
    for name in MODELS:
        columns, lags = (list(range(WIDE)), LAGS) if name == "seq" else (list(range(KEPT)), 1)
        X = lagged(full[:, columns], np.arange(ROWS), lags)
        model = make_model(name, lags=lags).fit(X, y)
        out[name] = {"model": model, "X": X, "file": to_onnx(model, X.shape[1]), "facts": {"classes": [-1, 0, 1], "lags": lags, "columns": columns}}
    return out, full


def publish(root: Path, taught: dict, seed: int = 7) -> None:
    "A bundle for every symbol and horizon; equal files are links, so that the disk holds them once."
    from bnml.core.base import canonical_json, sha256_file
    from bnml.ml.bundle import FORMAT, installed, manifest_id
    from bnml.ml.versions import schema_today
    schema = schema_today("1h")
    for name, t in taught.items():
        (root / f"{name}.onnx").write_bytes(t["file"])
    files = {f"{name}.onnx": sha256_file(root / f"{name}.onnx") for name in taught}
    knots = np.linspace(0, 1, 40).tolist()
    tables = {"sigmoid": [[0.9, 0.05]] * 3, "isotonic": [[knots, [k ** 1.1 for k in knots]]] * 3, "none": []}
    rng = np.random.default_rng(seed)
    for number in range(SYMBOLS * len(HORIZONS)):
        method = list(tables)[number % 3]
        decision = {"weights": dict(zip(taught, rng.dirichlet(np.ones(len(taught))).tolist())), "calibrator": {"method": method, "tables": tables[method]},
                    "conformal": {"alpha": 0.2, "quantile": 0.7}, "rule": {"threshold": 0.4, "margin": 0.05}}
        manifest = {"format": FORMAT, "symbol": f"S{number // len(HORIZONS):03d}USDT", "horizon": HORIZONS[number % len(HORIZONS)], "interval": "1h",
                    "warmup_bars": 800, "last_label_end_ms": 10**12, "features": schema["names"][:KEPT], "schema": schema, "edge": {"net_return": 0.001},
                    "models": {n: t["facts"] for n, t in taught.items()}, "decision": decision, "files": files,
                    "libraries": {"onnxruntime": installed("onnxruntime")}, "settings": {f"setting_{i}": i for i in range(200)}}
        manifest["id"] = manifest_id(manifest)
        folder = root / "bundles" / manifest["id"]
        folder.mkdir(parents=True)
        for name in files:
            os.link(root / name, folder / name)
        (folder / "manifest.json").write_text(canonical_json(manifest))


def best(work, times: int) -> float:
    "Milliseconds of the fastest of a few runs."
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return 1e3 * min(taken)


def resident() -> float:
    "The process's largest memory so far, MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def load(root: Path) -> dict:
    "In a process of its own, as the runner does it: open, check, read, ask; the first bundle is loaded before the clock starts."
    from bnml.ml.arena import Arena
    from bnml.ml.bundle import open_bundle
    from bnml.ml.versions import schema_today
    folders, schema = sorted((root / "bundles").iterdir()), schema_today("1h")
    X = np.random.default_rng(1).normal(size=(SYMBOLS, LAGS, len(schema["names"]))).astype(np.float32)
    Arena([open_bundle(folders[0], schema["hash"])]).decide(X[:1], threads=2)
    before, begun, worked = resident(), time.perf_counter(), time.process_time()
    bundles = [open_bundle(folder, schema["hash"]) for folder in folders]
    opened = time.perf_counter()
    arena = Arena(bundles)
    loaded, held, worked = time.perf_counter(), resident() - before, time.process_time() - worked
    cores = os.cpu_count() or 1
    return {"bundles": len(bundles), "models": len(arena.pack), "open_s": opened - begun, "load_s": loaded - begun, "load_cpu_s": worked, "target_load_s": 10.0,
            "peak_mib_per_bundle": held / len(bundles), "target_mib_per_bundle": 3.0, "arrays_mib_per_bundle": arena.pack.bytes / len(bundles) / 2**20,
            "decide_ms": best(lambda: arena.decide(X, threads=cores), 7), "decide_one_thread_ms": best(lambda: arena.decide(X), 3),
            "predict_only_ms": best(lambda: arena.model_probas(X, threads=cores), 5), "target_decide_ms": 300.0}


def loops(taught: dict, full: np.ndarray, sample: int = 40) -> dict:
    "One row through each model's own predict_proba, and through four ONNX Runtime sessions that stay in the cache (4,800 would not), scaled up."
    from bnml.ml.bundle import session
    scale, rows = SYMBOLS * len(HORIZONS) / sample, {name: [t["X"][i:i + 1] for i in range(100, 100 + sample)] for name, t in taught.items()}
    sessions = {name: session(t["file"]) for name, t in taught.items()}
    own = {name: scale * best(lambda: [t["model"].predict_proba(x) for x in rows[name]], 2) for name, t in taught.items()}
    onnx = {name: scale * best(lambda: [s.run(["probabilities"], {"X": x}) for x in rows[name]], 2) for name, s in sessions.items()}
    return {"loop_ms": sum(own.values()), "loop_ms_by_model": own, "four_onnx_sessions_loop_ms": sum(onnx.values()), "loop_measured_bundles": sample}


def exactness(taught: dict, full: np.ndarray) -> dict:
    "Largest difference from training-time probabilities and from ONNX Runtime, and the time of a long frame."
    from bnml.ml.bundle import session
    from bnml.ml.flat import join, predict, read_onnx
    pack = join([read_onnx(t["file"], t["facts"]["classes"], t["facts"]["columns"], t["facts"]["lags"]) for t in taught.values()])
    said, own, onnx = predict(pack, full[None]), 0.0, 0.0
    for p, t in zip(said, taught.values()):
        own = max(own, np.nanmax(np.abs(p - t["model"].predict_proba(t["X"]))))
        onnx = max(onnx, np.abs(p[LAGS:] - session(t["file"]).run(["probabilities"], {"X": t["X"][LAGS:]})[0]).max())
    frames = [(session(t["file"]), t["X"][LAGS:]) for t in taught.values()]
    return {"gap_training": own, "target_gap_training": 1e-5, "gap_onnxruntime": onnx, "frame_rows": ROWS, "frame_ms": best(lambda: predict(pack, full[None]), 3),
            "frame_onnx_ms": best(lambda: [s.run(["probabilities"], {"X": X}) for s, X in frames], 3)}


def run() -> dict:
    "Everything; bundles lie in a temporary folder."
    warnings.filterwarnings("ignore", message="X does not have valid feature names")
    with tempfile.TemporaryDirectory() as folder:
        taught, full = teach()
        publish(Path(folder), taught)
        done = subprocess.run([sys.executable, "-m", "tests.bench.bench_inference", folder], stdout=subprocess.PIPE, text=True, check=True)
        out = {"symbols": SYMBOLS, "horizons": len(HORIZONS), "learners": len(taught), **json.loads(done.stdout), **loops(taught, full), **exactness(taught, full)}
    out["file_kib_per_bundle"] = sum(len(t["file"]) for t in taught.values()) / 1024
    return out | {"times_faster_than_loop": out["loop_ms"] / out["decide_ms"], "target_times_faster": 10.0}


if __name__ == "__main__":
    json.dump(load(Path(sys.argv[1])) if sys.argv[1:] else run(), sys.stdout, indent=1, default=float)
    print()
