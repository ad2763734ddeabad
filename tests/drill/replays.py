"""Paper trading over months of real candles in the real runner process: no error, no violation, flat memory, and every loss explained.

`python -m tests.drill --only replays` runs all cases; `run_case` runs one. Without ../shared only the made-up collapse can run."""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from . import losses

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = f"{ROOT / 'tests' / 'drill' / 'always.py'}:Always"
RULES = ("rules.crossover", "rules.rsi_extremes", "rules.volatility_trigger")
NINE = ("BTCUSDT", "ETHUSDT", "BNBUSDT", "SOLUSDT", "XRPUSDT", "ADAUSDT", "DOGEUSDT", "LTCUSDT", "BCHUSDT")
SIXTEEN = (*NINE, "TRXUSDT", "UNIUSDT", "AAVEUSDT", "NEARUSDT", "ARBUSDT", "OPUSDT", "PAXGUSDT")
TAUGHT = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT")
STEP = {"5m": 300_000, "1h": 3_600_000}
RESUME = {"BNML__RISK__DRAWDOWN_PAUSE_HOURS": "24"}     # else a losing rule is halted for good and the rest of the period is empty


@dataclass(frozen=True)
class Case:
    "One period, one set of symbols, some strategies."
    interval: str
    symbols: tuple[str, ...]
    span: str                               # FROM:TO of --replay
    strategies: tuple[str, ...] = (*RULES, ALWAYS)
    folder: str = "binance"                 # of ../shared/data; "" = made up
    settings: dict = field(default_factory=dict)
    ends: dict = field(default_factory=dict)    # symbol → where its candles are cut: the coin that was traded ended there
    teach: str = ""                         # models are trained on the rows before this day


# models that trade although they have not earned it: what is tried here is the path, not the edge
EAGER = {"BNML__MODEL__HORIZONS": "[5]", "BNML__MODEL__REQUIRE_EDGE": "false", "BNML__MODEL__EDGE_SIGMAS": "0", "BNML__MODEL__EDGE_K": "0.05",
         "BNML__MODEL__CALIBRATION": "none", "BNML__MODEL__CONFORMAL_ALPHA": "0", "BNML__RISK__MIN_CONFIDENCE": "33"}

CASES = {
    "month-5m": Case("5m", NINE, "2025-08-01:2025-09-15", settings=RESUME),
    "half-year-5m": Case("5m", NINE, "2025-03-01:2025-09-01", ("rules.crossover",), settings=RESUME),      # the month's memory against six months'
    "half-year-1h": Case("1h", SIXTEEN, "2025-04-01:2025-09-30", settings=RESUME),
    "half-year-1h-models": Case("1h", TAUGHT, "2025-04-01:2025-09-30", ("ml",), settings=EAGER, teach="2025-04-01"),
    "collapse-om": Case("1h", ("OMUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT"), "2025-04-01:2025-05-01"),
    # after 2022-05-13 the ticker LUNAUSDT is another coin: its candles end where the old one was delisted
    "collapse-luna": Case("1h", ("LUNAUSDT", "USTUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT"), "2022-04-15:2022-06-15", folder="binance/history", ends={"LUNAUSDT": "2022-05-14"}),
    "collapse-ftt": Case("1h", ("FTTUSDT", "SRMUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT"), "2022-10-15:2022-12-31", folder="binance/history"),
    "collapse-made-up": Case("1h", ("GAPUSDT", "ENDUSDT", "BTCUSDT"), "2025-02-01:2025-03-01", (ALWAYS,), folder=""),
}


def made_up() -> dict[str, pd.DataFrame]:
    "GAP opens 70 % lower at the middle of each of three days and END 50 % lower twelve hours before its last bar; real hourly candles open where they closed."
    from bnml.data.synth import synth_market
    frames = synth_market(("GAPUSDT", "ENDUSDT", "BTCUSDT"), "1h", "2025-01-01", "2025-03-01", 11)
    prices = ["open", "high", "low", "close"]
    for day in ("2025-02-05 12:00", "2025-02-12 13:00", "2025-02-20 07:00"): frames["GAPUSDT"].loc[day:, prices] *= 0.3
    frames["ENDUSDT"].loc["2025-02-14 12:00":, prices] *= 0.5
    frames["ENDUSDT"] = frames["ENDUSDT"].loc[:"2025-02-14 23:00"]
    return frames


def candles(case: Case, shared: Path | None) -> dict[str, pd.DataFrame]:
    "The case's candles, cut where a coin ended."
    if not case.folder: return made_up()
    frames = {s: pd.read_parquet(shared / "data" / case.folder / f"{s}-{case.interval}.parquet").set_index("open_time") for s in case.symbols}
    return {s: f.loc[f.index < pd.Timestamp(case.ends[s], tz="UTC")] if s in case.ends else f for s, f in frames.items()}


def fill_lake(home: Path, case: Case, frames: dict[str, pd.DataFrame]):
    "The case's candles in a lake of its own."
    from bnml.data.lake import Lake
    lake = Lake(home / "data" / "lake")
    for s, f in frames.items(): lake.write(s, case.interval, f, "drill")


def environment(home: Path, case: Case) -> dict:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BNML__")}
    return {**kept, **case.settings, "BNML__DATA__INTERVAL": case.interval, "BNML_HOME": str(home), "IN_TEST": "1", "OMP_NUM_THREADS": "1", "BNML_PROGRESS": "0",
            "PYTHONPATH": str(ROOT)}


def _rss(pid: int) -> float | None:
    "Resident MiB of a process; None once it has gone."
    try:
        words = Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()
        return int(words[0]) / 1024 if words else None
    except (OSError, ValueError): return None


def watched(command: list[str], env: dict, home: Path) -> dict:
    "Run the runner; its answer, errors, processor time, and its memory when trading began and ended (the board says when)."
    board, trading, begun = home / "data" / "state" / "status.json", [], time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        p = subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=err, text=True)
        while p.poll() is None:
            try: said = json.loads(board.read_text())
            except (OSError, ValueError): said = {}
            if said.get("pid") == p.pid and said.get("running") and (rss := _rss(p.pid)): trading.append(rss)
            time.sleep(0.05)
        out.seek(0), err.seek(0)
        return {"code": p.returncode, "out": out.read(), "err": err.read(), "wall_s": time.monotonic() - begun,
                "rss_begin_mib": trading[0] if trading else None, "rss_end_mib": trading[-1] if trading else None}


def teach(case: Case, env: dict):
    "Publish models of the case's symbols; raises when one fails."
    command = [sys.executable, "-m", "bnml.cli", "train", "--symbols", ",".join(case.symbols), "--horizons", "5", "--to", case.teach, "--json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"training stopped with {done.returncode}: {done.stderr[-500:]}")


def audit(env: dict, session: str) -> dict:
    "What `bnml audit risk` says in a process of its own."
    done = subprocess.run([sys.executable, "-m", "bnml.cli", "audit", "risk", "--session", session, "--json"], env=env, cwd=ROOT, capture_output=True, text=True)
    said = json.loads(done.stdout) if done.stdout.strip() else {}
    return {"code": done.returncode, "findings": len(said.get("findings", ())), "first": (said.get("findings") or [{}])[0].get("message"), "error": done.stderr[-300:] if not said else None}


KEPT = 3.0 / 1024   # MiB that an order with its fills and verdicts may stay in memory for the summary
ROOM = 24.0         # MiB for caches that fill once


def one(case: Case, strategy: str, home: Path, env: dict, frames: dict) -> dict:
    "One strategy over one case, and everything that was wrong with it."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "bnml.runner", "--mode", "paper", "--strategy", strategy, "--symbols", ",".join(case.symbols), "--replay", case.span, "--json"]
    run = watched(command, env, home)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {"cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1), **{k: round(v, 1) for k in ("wall_s", "rss_begin_mib", "rss_end_mib") if (v := run[k]) is not None}}
    if run["code"]: return {**result, "failed": [f"the runner ended with {run['code']}: {run['err'][-400:]}"]}
    said = json.loads(run["out"])
    audited = audit(env, said["session"])
    told = losses.report(home / "data" / "state" / "ledger.db", frames, STEP[case.interval], said["session"])
    failed = [*told["broken"][:5]]
    if said["violations"]: failed.append(f"the summary counts {said['violations']} violations")
    if audited["code"]: failed.append(f"bnml audit risk ended with {audited['code']}: {audited['first'] or audited['error']}")
    if not said["orders"]: failed.append("it sent no order: nothing was tried")
    if said["unprotected_seconds_max"] > 5: failed.append(f"{said['unprotected_seconds_max']} s without a stop")
    grown = run["rss_end_mib"] - run["rss_begin_mib"] if run["rss_begin_mib"] is not None else 0.0
    if grown > ROOM + KEPT * said["orders"]: failed.append(f"memory grew by {grown:.0f} MiB over {said['orders']} orders")
    keys = ("bars", "signals", "orders", "fills", "trades", "violations", "equity_end", "max_drawdown", "unprotected_seconds_max", "open_positions")
    return {**result, **{k: said[k] for k in keys}, "audit": audited["code"], "rss_growth_mib": round(grown, 1), "losses": told, "failed": failed}


def run_case(name: str, shared: Path | None, strategies: tuple[str, ...] | None = None, span: str | None = None) -> dict[str, dict]:
    "Every strategy of a case in a home of its own."
    case = CASES[name]
    if span: case = Case(**{**vars(case), "span": span})
    if case.folder and shared is None: return {"skipped": f"{name} needs the candles of ../shared/data/{case.folder}"}
    frames, out = candles(case, shared), {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        env = environment(home, case)
        fill_lake(home, case, frames)
        if case.teach: teach(case, env)
        for strategy in strategies or case.strategies:
            out[strategy.rpartition("/")[2]] = one(case, strategy, home, env, frames)
            print(f"drill: replays {name} {strategy.rpartition('/')[2]}: {'; '.join(out[strategy.rpartition('/')[2]]['failed']) or 'passed'}", file=sys.stderr, flush=True)
    return out


def run(names: tuple[str, ...] = tuple(CASES)) -> dict:
    "All cases; `failed` lists what went wrong."
    from bnml.core.base import shared
    cases = {n: run_case(n, shared()) for n in names}
    failed = [f"{n} {s}: {f}" for n, x in cases.items() if "skipped" not in x for s, r in x.items() for f in r["failed"]]
    return {"cases": cases, "failed": failed, "skipped": [x["skipped"] for x in cases.values() if "skipped" in x]}


def main(names: list[str]) -> int:
    if unknown := [n for n in names if n not in CASES]: sys.exit(f"unknown case {unknown[0]!r}; use any of {', '.join(CASES)}")
    told = run(tuple(names) or tuple(CASES))
    print(json.dumps(told, indent=1, default=float))
    return 77 if told["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
