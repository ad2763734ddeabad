"Other fills, from the settings to the report: both engines and paper obey, what was charged is told to the cent, and what can't act says so."
import json

import numpy as np
import pandas as pd
import pytest

from bnml.core.clock import to_ms
from tests.shell import forked
from tests.test_cli import answer, bnml

SPAN, RULE = ("--from", "2024-03-01", "--to", "2024-04-01"), ("--strategy", "rules.crossover")
MODELS = {"open": {}, "vwap": {"BNML__COSTS__FILL": "vwap"}, "bar": {"BNML__COSTS__SPREAD": "bar"}, "quotes": {"BNML__COSTS__SPREAD": "quotes", "BNML__COSTS__FILL": "vwap"}}


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    "Four months of two synthetic symbols, and quotes of one: 20 bps wide in each hour of March, as wide as 60 in its second half."
    home = tmp_path_factory.mktemp("fills")
    answer("data", "synth", "--symbols", "BTCUSDT,ETHUSDT", "--from", "2024-01-01", "--to", "2024-05-01", home=home)
    times = np.arange(to_ms("2024-03-01"), to_ms("2024-04-01"), 3_600_000)
    half = np.where(times < to_ms("2024-03-16"), 0.001, 0.003)
    pd.DataFrame(dict(time=times, bid=100 * (1 - half), ask=100 * (1 + half))).to_csv(home / "BTCUSDT-book.csv", index=False)
    (home / "ETHUSDT-book.csv").write_text("time,bid,ask\n2024-03-05,10,10.01\n")
    return home


def test_a_symbol_without_quotes_is_refused_by_name(lake):
    _, err = bnml("backtest", *SPAN, *RULE, home=lake, env=MODELS["quotes"], code=65, call=forked)
    assert "no quotes of BTCUSDT are recorded: import some with `bnml data quotes FILE --symbol BTCUSDT`" in err
    done = answer("data", "quotes", lake / "BTCUSDT-book.csv", home=lake)
    assert (done[0]["added"], done[0]["stored"]) == (31 * 24, 31 * 24)
    _, err = bnml("--mode", "paper", "--replay", "2024-03-01:2024-03-05", *RULE, home=lake, env=MODELS["quotes"], code=65, module="bnml.runner")
    assert "no quotes of ETHUSDT are recorded" in err
    answer("data", "quotes", lake / "ETHUSDT-book.csv", home=lake)


@pytest.mark.parametrize("model", MODELS)
def test_paper_is_the_backtest_in_every_model(lake, model, tmp_path):
    env = MODELS[model]
    first = answer("backtest", *SPAN, *RULE, "--out", tmp_path / "a", home=lake, env=env, call=forked)
    run = answer("--mode", "paper", "--replay", "2024-03-01:2024-04-01", *RULE, home=lake, module="bnml.runner", env=env)
    assert run["violations"] == 0 and run["fills"] > 20 and run["equity_end"] == pytest.approx(first["equity_end"], rel=1e-12)
    told = json.loads((tmp_path / "a/metrics.json").read_text())
    assert told["fill_model"].startswith("average price" if "vwap" in env.values() else "next open") and ("spread" in told["fill_model"]) == (len(env) > 0 and model != "vwap")
    if model == "quotes": assert answer("backtest", *SPAN, *RULE, "--engine", "vector", home=lake, env=env)["fill_model"] == told["fill_model"]


def test_the_day_tells_what_was_charged(lake, monkeypatch):
    "A day of the paper replay on recorded quotes: 20 bps until the 15th, 60 from the 16th, in each of which half is paid."
    monkeypatch.setenv("BNML_HOME", str(lake))
    from bnml.ops.subjects import open_day
    answer("--mode", "paper", "--replay", "2024-03-01:2024-04-01", *RULE, "--symbols", "BTCUSDT", home=lake, module="bnml.runner", env=MODELS["quotes"])
    seen = set()
    for k in range(2, 31):
        day = open_day(day=f"2024-03-{k:02d}", drift=False)
        for f, cost in zip(day.fills, day.costs.itertuples()):
            worth, wide = float(f.quantity * f.raw_price), 20 if k < 16 else 60
            assert cost.spread == pytest.approx(0 if f.maker else worth * wide / 2e4, rel=1e-9)
            if not f.maker: assert 1.99e-4 * worth <= cost.slippage <= 2.3e-4 * worth, "what is left is the slippage and a tick"
            seen.add((f.maker, wide))
    assert {(False, 20), (False, 60)} <= seen


@pytest.mark.parametrize("costs", [dict(fill="vwap"), dict(fill="vwap", spread="bar")], ids=["vwap", "both"])
def test_what_comes_later_changes_no_fill(costs):
    "Bars from a row on are exchanged: whatever had filled before is the same, to the last digit."
    from bnml.data.panel import Panel
    from bnml.data.synth import synth_market
    from bnml.lab.replay import replay
    from bnml.ops.settings import Settings
    from bnml.trade.rules import Crossover
    panel = Panel.from_frames(synth_market(["BTCUSDT", "ETHUSDT"], "1h", "2024-01-01", "2024-04-01", 3), "1h")
    told = lambda p, stop: replay(Crossover(5, 20), p, Settings(costs=costs), 600, stop, audit=False, data_id="x").result.fills
    whole = told(panel, None)
    for cut in (1000, 1001, 1500, 2000):
        other = panel.cut(0, len(panel))
        for x in (other.open, other.high, other.low, other.close): x[cut:] *= 3
        before = [f for f in whole if f.time_ms < panel.times[cut]]
        assert before and [f for f in told(other, None) if f.time_ms < panel.times[cut]] == before == told(panel, cut)


def test_a_sweep_says_that_it_fills_otherwise(lake):
    told = answer("sweep", "--symbols", "BTCUSDT", *SPAN, "-p", "fast=5", "-p", "slow=20", "--windows", "0", home=lake, env=MODELS["quotes"])
    words = ["the average price of a bar (costs.fill: vwap)", "half the spread (costs.spread: quotes)"]
    assert told["not_modelled"][-2:] == words and told["said"].endswith(f"leaves out {' and '.join(words)}")
