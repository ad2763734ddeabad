"The shell, from an empty folder to a report: what a user types, what he gets, and what a slip answers."
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bnml.core.base import source
from tests.nursery import start
from tests.shell import forked, here, process

SMALL = {"BNML__MODEL__TREES": "20", "BNML__MODEL__DEPTH": "4", "BNML__MODEL__MODELS": "lgb", "BNML__MODEL__N_SPLITS": "2", "BNML__MODEL__HORIZONS": "5", "BNML__MODEL__JOBS": "1", "BNML__MODEL__THREADS": "1"}
METRICS = ("run_id", "total_return", "cagr", "sharpe", "sortino", "calmar", "max_drawdown", "trades", "win_rate", "profit_factor", "fees",
           "exposure", "benchmark_return")
RUN = ("bars", "signals", "orders", "fills", "denied", "equity_start", "equity_end", "max_drawdown", "fees", "ready_s",
       "unprotected_seconds_max", "violations")


def bnml(*words, home, code=0, module="bnml.cli", env=None, call=here):
    "stdout and stderr of a command that must end with `code`; `call` says in which process."
    got, out, err = call([*map(str, words)], home, module, env)
    assert got == code, f"{words}: exit {got}\n{out[-2000:]}\n{err[-2000:]}"
    assert "Traceback" not in err, err
    return out, err


def answer(*words, **kw):
    "The JSON document on stdout."
    return json.loads(bnml(*words, "--json", **kw)[0])


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    "A home with a synthetic market of two symbols and seven months."
    home = tmp_path_factory.mktemp("home")
    done = answer("data", "synth", "--symbols", "BTCUSDT,ETHUSDT", "--from", "2024-01-01", "--to", "2024-08-01", home=home)
    assert [d["rows"] for d in done] == [213 * 24] * 2
    return home


def test_a_rule_from_backtest_to_paper_replay(lake, tmp_path):
    span = ("--from", "2024-06-01", "--to", "2024-07-01")
    first = answer("backtest", *span, "--strategy", "rules.crossover", "--out", tmp_path / "a", home=lake, call=forked)
    assert set(METRICS) <= set(first) and first["trades"] > 0
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"metrics.json", "trades.csv", "equity.parquet", "verdicts.parquet"}
    answer("backtest", *span, "--strategy", "rules.crossover", "--out", tmp_path / "b", home=lake, call=forked)
    assert (tmp_path / "a/metrics.json").read_bytes() == (tmp_path / "b/metrics.json").read_bytes()
    run = answer("--mode", "paper", "--replay", "2024-06-01:2024-07-01", "--strategy", "rules.crossover", home=lake, module="bnml.runner")
    assert set(RUN) <= set(run) and run["violations"] == 0 and run["fills"] > 0 and run["unprotected_seconds_max"] > 0
    assert run["equity_end"] == pytest.approx(first["equity_end"], rel=1e-12) and run["bars"] == 2 * 30 * 24
    columns = ["symbol", "side", "quantity", "entry_time", "entry_price", "exit_time", "exit_price", "exit_reason", "fees", "pnl"]
    assert set(columns) <= set(next(csv.DictReader(open(tmp_path / "a/trades.csv"))))


def test_vector_says_what_it_leaves_out(lake, tmp_path):
    told = answer("backtest", "--from", "2024-06-01", "--to", "2024-07-01", "--strategy", "rules.crossover", "--engine", "vector", "--out", tmp_path / "v", home=lake)
    assert told["not_modelled"] and json.loads((tmp_path / "v/metrics.json").read_text())["not_modelled"] == told["not_modelled"]


def test_models_from_training_to_trading(lake):
    rows = answer("train", "--to", "2024-06-01", home=lake, env=SMALL)
    assert all(r["error"] is None or r["error"] == "" for r in rows) and all(r["version"] for r in rows)
    assert {r["state"] for r in answer("models", "verify", home=lake)} == {"ready"}
    told = answer("backtest", "--from", "2024-06-01", "--to", "2024-07-15", home=lake, env=SMALL)
    assert set(METRICS) <= set(told)
    run = answer("--replay", "2024-06-01:2024-07-15", home=lake, module="bnml.runner", env=SMALL, call=forked)
    assert run["equity_end"] == pytest.approx(told["equity_end"], rel=1e-12)
    _, said = bnml("backtest", "--from", "2024-05-01", "--to", "2024-06-15", home=lake, code=77, env=SMALL)
    assert "train with `--to 2024-05-01`" in said and said.count("\n") == 1


def test_audits(lake, tmp_path):
    assert answer("audit", "data", home=lake)["passed"]
    assert answer("audit", "lookahead", "--symbols", "BTCUSDT", "--strategy", "rules.crossover", home=lake)["passed"]
    assert answer("audit", "leakage", "--symbols", "BTCUSDT", home=lake)["passed"]
    (tmp_path / "peek.py").write_text(
        "from bnml.domain.signal import Strategy, signals\n"
        "class Peek(Strategy):\n"
        "    name = 'peek'\n"
        "    def frame(self, symbol, bars):\n"
        "        c = bars.close\n"
        "        return signals(symbol, bars, c.shift(-1) > c * 1.005, c.shift(-1) < c * 0.995)\n")
    out, said = bnml("audit", "lookahead", "--symbols", "BTCUSDT", "--strategy", f"{tmp_path}/peek.py:Peek", "--json", home=lake, code=77, call=forked)
    assert json.loads(out)["passed"] is False and "audit lookahead" in said


def test_a_session_is_audited_from_its_ledger(lake):
    answer("--replay", "2024-06-01:2024-06-15", "--strategy", "rules.crossover", home=lake, module="bnml.runner")
    assert answer("audit", "risk", home=lake)["passed"]


def test_synthetic_paper_runs_some_bars_and_leaves_its_state(lake):
    run = answer("--mode", "mock", "--cycles", "3", "--strategy", "rules.crossover", home=lake, module="bnml.runner", env={"BNML__DATA__PACE_S": "0"})
    assert run["bars"] == 6 and run["source"] == "synthetic"
    status = answer("status", home=lake)
    assert status["alive"] is False and status["equity"] == run["equity_end"] and status["session"] == run["session"]
    for name in ("state/open_positions.json", "metrics/latest_scan.csv", "metrics/latest_opportunities.csv"):
        assert (lake / "data" / name).is_file(), name


@pytest.mark.parametrize("words, code, said", [
    (("backtest", "--from", "2030-01-01", "--to", "2030-02-01", "--strategy", "rules.crossover"), 65, "it holds 2024-01-01"),
    (("backtest", "--from", "2024-03-01", "--to", "2024-02-01", "--strategy", "rules.crossover"), 2, "is empty"),
    (("backtest", "--symbols", "BTCUSD", "--strategy", "rules.crossover"), 65, "did you mean BTCUSDT?"),
    (("backtest", "--strategy", "rules.crosover"), 78, "did you mean rules.crossover?"),
    (("backtest", "--interval", "1x"), 78, "1x"),
    (("backtest", "--from", "yesterday", "--strategy", "rules.crossover"), 2, "is not a time"),
    (("data", "import", "nowhere.csv"), 2, "nowhere.csv"),
    (("data", "import", "NOWHEREUSDT-1h.csv"), 2, "NOWHEREUSDT-1h.csv"),
    (("config", "check", "--config", "nowhere.yaml"), 78, "nowhere.yaml"),
    (("trade", "place", "BTCUSDT", "--quote", "0"), 2, "sizes are above 0"),
    (("report", "backtest", "-p", "speed=1"), 2, "has no parameter 'speed'"),
    (("analyze-last-month", "--days", "0"), 2, "a period of 0 days is none"),
    (("analyze-last-month", "--fetch", "--symbols", ","), 2, "no symbol is named in"),
    (("data", "lst"), 2, "lst"),
])
def test_a_slip_is_answered_by_one_sentence(lake, words, code, said):
    out, err = bnml(*words, home=lake, code=code)
    assert said in err, err


@pytest.mark.parametrize("words, code", [(("backtest", "--symbols", "BTCUSD", "--strategy", "rules.crossover"), 65), (("config", "check", "--config", "nowhere.yaml"), 78), (("data", "lst"), 2)])
def test_a_process_ends_with_the_code_of_its_command(lake, words, code):
    assert bnml(*words, home=lake, code=code, call=forked) == bnml(*words, home=lake, code=code)


def test_runner_slips(lake):
    assert "is not a range" in bnml("--replay", "2024", home=lake, code=2, module="bnml.runner")[1]
    assert "unknown" in bnml("--strategy", "rules.nothing", "--replay", "2024-06-01:2024-06-02", home=lake, code=78, module="bnml.runner")[1]
    bnml("--speed", "3", home=lake, code=2, module="bnml.runner", call=process)


def test_a_running_loop_is_watched_steered_and_stopped(lake):
    env = {**os.environ, "BNML_HOME": str(lake), "BNML__DATA__PACE_S": "0.05"}
    loop = start("-m", "bnml.runner", "--mode", "mock", "--strategy", "rules.crossover(fast=3, slow=8)", "--json", cwd=source(), env=env)
    try:
        wait_for(lambda: answer("status", home=lake)["alive"])
        assert "another runner" in bnml("--mode", "mock", home=lake, code=75, module="bnml.runner")[1]
        held = wait_for(lambda: answer("status", home=lake)["open_positions"])
        assert all(0 < p["stop"] and p["entry_price"] > 0 for p in held)
        answer("kill-switch", "engage", "--reason", "drill", home=lake)
        wait_for(lambda: answer("status", home=lake)["state"] == "HALTED")
        answer("trade", "close", "--all", home=lake)
        wait_for(lambda: not answer("status", home=lake)["open_positions"])
    finally:
        loop.send_signal(signal.SIGTERM)
        out, err = loop.communicate(timeout=30)
        answer("kill-switch", "release", home=lake)
    assert loop.returncode == 0 and "SIGTERM: stopping" in err and "Traceback" not in err, err
    run = json.loads(out)
    assert run["violations"] == 0 and run["open_positions"] == 0 and run["equity_end"] > 0
    assert answer("status", home=lake)["alive"] is False


def wait_for(what, seconds=60):
    "Ask until there is an answer."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what(): return found
        time.sleep(0.3)
    raise AssertionError("nothing came in time")


def test_the_runner_lets_no_guest_in(lake):
    code = ("import runpy, sys\nsys.argv = ['bnml.runner', '--replay', '2024-06-01:2024-06-20', '--strategy', 'rules.crossover']\n"
            "try: runpy.run_module('bnml.runner', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as e: assert e.code == 0\n"
            "guests = 'vectorbt plotly ipywidgets papermill nbdev fastcore matplotlib sklearn xgboost lightgbm ccxt'.split()\n"
            "print('guests:', [g for g in guests if g in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source(), env={**os.environ, "BNML_HOME": str(lake)})
    assert "guests: []" in done.stdout, done.stdout + done.stderr
