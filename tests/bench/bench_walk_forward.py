"A walk over 16 pairs × 9,000 bars with everything behind it: features, models of each term, the engine with its full risk path; training apart."
import os
import tempfile
import time
from pathlib import Path

import pandas as pd

from bnml.core.base import shared
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_market
from bnml.lab.replay import instruments_for, replay
from bnml.lab.walk_forward import models_for, open_ground
from bnml.ops.settings import load_settings
from bnml.trade.scanner import watch

SIXTEEN = ("BTCUSDT", "ETHUSDT", "BNBUSDT", "SOLUSDT", "XRPUSDT", "ADAUSDT", "DOGEUSDT", "LTCUSDT", "BCHUSDT", "TRXUSDT", "UNIUSDT", "AAVEUSDT", "NEARUSDT", "ARBUSDT", "OPUSDT", "PAXGUSDT")
HOUR = 3_600_000
# models that trade although they have not earned it: a walk that holds all the time would be measured too quick
EAGER = {"model.horizons": (5,), "model.require_edge": False, "model.edge_sigmas": 0.0, "model.edge_k": 0.05, "model.calibration": "none", "model.conformal_alpha": 0.0,
         "risk.drawdown_pause_hours": 24.0, "walk_forward.history_days": None, "walk_forward.trees": 20, "walk_forward.n_splits": 2}


def candles(bars: int) -> tuple[dict[str, pd.DataFrame], str]:
    "The newest hourly candles of sixteen pairs, real where they are at hand."
    folder = shared() and shared() / "data" / "binance"
    if folder and folder.is_dir():
        return {s: pd.read_parquet(folder / f"{s}-1h.parquet").set_index("open_time").iloc[-bars:] for s in SIXTEEN}, "real"
    start = to_ms("2024-09-14")
    return synth_market(SIXTEEN, "1h", start, start + bars * HOUR, 3), "synthetic"


def run(bars: int = 9_000, terms: int = 2, repeats: int = 2) -> dict:
    "Bars a second of the walk without training, and seconds a model of the training."
    frames, kind = candles(bars)
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(Path(folder) / "lake")
        for s, f in frames.items(): lake.write(s, "1h", f, "bench")
        end = int(frames["BTCUSDT"].index[-1].value // 10**6) + HOUR
        since = end - (bars // 2) * HOUR
        settings = load_settings(env={}, flags={**EAGER, "walk_forward.retrain_days": (bars // 2) / 24 / terms, "model.jobs": os.cpu_count() or 1})
        ground = open_ground(lake, settings, since, end)
        begun = time.perf_counter()
        strategy, trained = models_for(ground, settings, root=Path(folder) / "models")
        training, spent = time.perf_counter() - begun, []
        watch(ground.panel, strategy, lake)
        for _ in range(repeats + 1):
            begun, busy = time.perf_counter(), time.process_time()
            done = replay(strategy, ground.panel, settings, ground.start, ground.stop, audit=False, instruments=instruments_for(ground.panel, ground.start), data_id="bench")
            spent.append((time.perf_counter() - begun, time.process_time() - busy))
        seconds, cpu = (min(s) for s in zip(*spent[1:]))
    looked = len(ground.panel) * len(ground.panel.symbols)
    return {"candles": kind, "pairs": len(ground.panel.symbols), "bars": bars, "terms": len({t.turn for t in trained}), "models": sum(bool(t.version) for t in trained),
            "seconds_a_model": training / max(1, len(trained)), "symbol_bars_read": looked, "symbol_bars_traded": done.result.bars, "trades": done.metrics["trades"],
            "seconds": seconds, "cpu_seconds": cpu, "bars_per_s": looked / seconds, "traded_bars_per_s": done.result.bars / seconds, "bars_per_cpu_s": looked / cpu}


if __name__ == "__main__":
    import json
    print(json.dumps(run(), indent=1))
