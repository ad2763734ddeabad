"A pair's training against the bare library fits in the same process, and the memory of training 16 and 64 symbols."
import os
import subprocess
import sys
import time

import numpy as np

from bnml.core.clock import to_ms
from bnml.data.synth import synth_bars
from bnml.ml.dataset import Dataset
from bnml.ml.evidence import chosen
from bnml.ml.fitting import fit_final, new_learner, sees, split, validate
from bnml.ml.material import Request, gather
from bnml.ml.options import ModelSettings
from bnml.ml.pair import train_pair

HOUR, FIRST = 3_600_000, to_ms("2024-01-01")
SETTINGS = ModelSettings(models=("rf", "xgb", "lgb", "seq"), threads=1, feature_limit=60, context="")


def rows_of(n: int = 9000, k: int = 60) -> Dataset:
    "9,000 rows of 60 columns, one of which knows something."
    rng = np.random.default_rng(7)
    X = rng.normal(size=(n, k)).astype(np.float32)
    r = 0.006 * (X[:, 4] + rng.normal(size=n)) / np.sqrt(2)
    y = np.where(r > 0.003, 1, np.where(r < -0.003, -1, 0)).astype(np.int8)
    start = FIRST + np.arange(n) * HOUR
    return Dataset("BENCH", 5, [f"f{i}" for i in range(k)], X, y, start, start + 6 * HOUR, r - 0.001, [], X, np.arange(n))


def bare(data: Dataset, settings: ModelSettings, seen, final) -> dict[str, float]:
    "Seconds of the same fits and nothing else, by learner: four folds and the final one."
    seconds = {}
    for name in settings.models:
        spent = 0.0
        for (train, _), model in [*zip(split(data, settings), seen.models), ((np.arange(len(data)), None), None)]:
            kept, scaler = (model.selection, model.scaler) if model else (final.selection, final.scaler)
            rounds = (model.rounds if model else seen.rounds)[name]
            columns, lags = sees(name, kept.columns, settings)
            X, y, w = data.inputs(train, columns, lags), data.y[train], data.weights(train, settings)
            learner = new_learner(name, settings, scaler.take(np.arange(len(columns))) if name == "seq" else None, rounds)
            begun = time.perf_counter()
            learner.fit(X, y, w)
            spent += time.perf_counter() - begun
        seconds[name] = round(spent, 3)
    return seconds


def fits() -> dict:
    "The folds, the decision and the final models on 9,000 × 60 rows, against the fits inside them."
    data = rows_of()
    validate(data, SETTINGS.model_copy(update={"trees": 3}))                     # compile and import
    begun = time.perf_counter()
    seen = validate(data, SETTINGS)
    chosen(seen, data, SETTINGS)
    final = fit_final(data, SETTINGS, seen.rounds)
    whole = time.perf_counter() - begun
    alone = bare(data, SETTINGS, seen, final)
    total = sum(alone.values())
    return {"rows": len(data), "columns": 60, "pipeline_s": round(whole, 2), "bare_fits_s": round(total, 2), "bare_by_learner_s": alone,
            "overhead_over_fits": round((whole - total) / total, 2), "aim": "at most 1.5"}


def one_pair() -> dict:
    "Everything from bars to manifest: features, labels, folds, evidence, audit."
    market = {"SYNUSDT": synth_bars("SYNUSDT", "1h", FIRST, FIRST + 9000 * HOUR, seed=7)}
    settings = SETTINGS.model_copy(update={"feature_limit": 50})
    begun, cpu = time.perf_counter(), time.process_time()
    result = train_pair(gather(market, "SYNUSDT", Request("1h"), settings), 5, Request("1h"), settings, None)
    return {"bars": 9000, "seconds": round(time.perf_counter() - begun, 2), "core_seconds": round(time.process_time() - cpu, 2),
            "audit_passed": result.manifest["audit"]["passed"], "aim": "at most 10 s on a core"}


PEAK = """
import json, resource, sys, tempfile
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.train import train
first, names = to_ms("2024-01-01"), [f"S{i}USDT" for i in range(int(sys.argv[1]))]
lake = Lake(tempfile.mkdtemp())
for n, s in enumerate(names): lake.write(s, "1h", synth_bars(s, "1h", first, first + 1500 * 3_600_000, seed=n), "bench")
settings = ModelSettings(horizons=(5,), trees=5, depth=3, n_splits=2, min_rows=500, threads=1, models=("lgb",), context="")
done = train(lake, settings, names, "1h", registry=Registry(tempfile.mkdtemp()))
assert not [r.error for r in done if r.error]
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def peaks() -> dict:
    "Peak memory in MiB of a process that trains so many symbols."
    def peak(symbols: int) -> float:
        done = subprocess.run([sys.executable, "-c", PEAK, str(symbols)], capture_output=True, text=True, check=True, env={**os.environ, "BNML_PROGRESS": "0"})
        return float(done.stdout.strip().splitlines()[-1])
    few, many = peak(16), peak(64)
    return {"16_symbols_mib": round(few, 1), "64_symbols_mib": round(many, 1), "growth_per_symbol_mib": round((many - few) / 48, 3)}


def run() -> dict:
    return {"fits": fits(), "pair": one_pair(), "memory": peaks()}
