"The same backtest twice is the same file, byte for byte; one candle that differs is another run."
import json

import pytest

from bnml.cli import main
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_market

FROM, TO = "2024-04-01", "2024-06-01"


@pytest.fixture
def lake(own_home):
    "Two synthetic symbols in a lake of their own."
    store = Lake()
    for symbol, bars in synth_market(["SYNAUSDT", "SYNBUSDT"], "1h", to_ms("2024-01-01"), to_ms(TO), 11).items():
        store.write(symbol, "1h", bars, "test")
    return store


def backtest(out, engine: str) -> bytes:
    "metrics.json of a run through the command."
    words = ["backtest", "--from", FROM, "--to", TO, "--strategy", "rules.crossover", "--engine", engine, "--out", str(out), "--json"]
    assert main(words) == 0
    return (out / "metrics.json").read_bytes()


@pytest.mark.parametrize("engine", ["replay", "vector"])
def test_the_same_run_twice_and_another_after_one_candle(lake, tmp_path, engine, capsys):
    first, second = backtest(tmp_path / "a", engine), backtest(tmp_path / "b", engine)
    assert first == second
    assert (tmp_path / "a" / "trades.csv").read_bytes() == (tmp_path / "b" / "trades.csv").read_bytes()
    bars = lake.read("SYNAUSDT", "1h")
    row = bars.index[2_500]
    bars.loc[row, "volume"] *= 1.01
    lake.write("SYNAUSDT", "1h", bars, "test", replace=True)
    changed = json.loads(backtest(tmp_path / "c", engine))
    assert changed["run_id"] != json.loads(first)["run_id"]
    assert json.loads(first)["trades"] > 5
