"""What a report costs: wall seconds from the call to the page, of which how many make the page out of the executed notebook, and how heavy the page is.

Every template once, on 16 pairs × 9,000 hourly bars: a crossover's backtest and a paper session over all of them, two small trainings, the newest month swept."""
import json
import os
import tempfile
import time
from unittest.mock import patch

from bnml.core.base import jsonable
from bnml.core.clock import iso
from tests.bench.bench_walk_forward import HOUR, candles

ORDER = ("backtest", "training", "trading_day", "risk_audit", "universe", "last_month")
MOST_MIB = 6.0


def prepared(bars: int) -> str:
    "A home with something for every template; says whose candles they are."
    from bnml.cli_lab import run_backtest
    from bnml.data.lake import Lake
    from bnml.ml.options import ModelSettings
    from bnml.ml.registry import Registry
    from bnml.ml.train import train
    from bnml.ops.desk import open_station
    from bnml.ops.settings import load_settings
    frames, kind = candles(bars)
    for symbol, frame in frames.items(): Lake().write(symbol, "1h", frame, "bench")
    run_backtest(load_settings())
    small = ModelSettings(horizons=(5,), models=("lgb",), trees=20, depth=4, n_splits=3, threads=1, feature_limit=20)
    if bad := [r.error for r in train({s: frames[s].iloc[-4000:] for s in ("BTCUSDT", "ETHUSDT")}, small, ["BTCUSDT", "ETHUSDT"], "1h", registry=Registry()) if r.error]: raise RuntimeError(bad[0])
    end = int(frames["BTCUSDT"].index[-1].value // 10**6) + HOUR
    with open_station(None, {}, (end - 60 * 24 * HOUR, end)) as station: station.run()
    return f"{kind}, until {iso(end)}"


def report(template: str) -> dict:
    "One report: seconds in all, seconds of making the page, its weight."
    from bnml.ops.page import to_html
    from bnml.ops.report import run_report
    begun = time.perf_counter()
    made = run_report(template)
    seconds = time.perf_counter() - begun
    notebook = json.loads((made.folder / "report.ipynb").read_text())
    begun = time.perf_counter()
    page = to_html(notebook, template)
    return dict(seconds=seconds, page_seconds=time.perf_counter() - begun, html_mib=made.html.stat().st_size / 2**20, figures=page.count('class="figure"'))


def run(bars: int = 9_000) -> dict:
    "All six; the first one also pays for reading papermill."
    with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, {"BNML_HOME": home, "BNML__STRATEGY": "rules.crossover"}):
        begun = time.perf_counter()
        kind = prepared(bars)
        out = {"candles": kind, "pairs": 16, "bars": bars, "prepared_s": time.perf_counter() - begun, **{t: report(t) for t in ORDER}}
        heaviest = max(out[t]["html_mib"] for t in ORDER)
        return {**out, "heaviest_mib": heaviest, "aim": f"heaviest_mib <= {MOST_MIB:g}", "kept": heaviest <= MOST_MIB}


if __name__ == "__main__": print(json.dumps(jsonable(run()), indent=1))
