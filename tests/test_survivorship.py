"What died in 2022 is held to its last bar and paid for; what came back under LUNA's name is another instrument. Numbers worked out by hand from the real candles."
import json
import math

import numpy as np
import pandas as pd
import pytest

from bnml.cli import main
from bnml.core.base import shared
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_market
from bnml.lab.artifacts import load_run
from bnml.lab.backtest import backtest, caveats
from bnml.lab.backtest_page import banner, verdict_line
from bnml.lab.survivorship import hold, left_out, lives, universe_then, warning
from bnml.lab.walk_forward import open_ground
from bnml.ml.labels import make_labels
from bnml.ml.features import matrix
from bnml.ml.material import Request, gather
from bnml.ml.options import ModelSettings
from bnml.ops.settings import load_settings
from bnml.trade.rules import Crossover

from tests.drill.always import Always

FROM, TO, LUNA_ENDS, LUNA2_BEGINS = "2022-04-01", "2023-01-01", to_ms("2022-05-13"), to_ms("2022-05-31 06:00")


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    "The real candles of nineteen pairs, from half a year before to the end of 2022."
    folder = shared() and shared() / "data" / "binance" / "history"
    if not (folder and folder.is_dir()): pytest.skip("real candles are not here: ../shared/data/binance/history is missing")
    store = Lake(tmp_path_factory.mktemp("lake"))
    for path in sorted(folder.glob("*-1h.parquet")):
        store.write(path.name.partition("-")[0], "1h", pd.read_parquet(path).set_index("open_time")["2022-01-01":"2022-12-31"], path.name)
    return store


def test_equal_weight_of_then_loses_what_was_lost(lake):
    "100,000 in each of nineteen pairs on 2022-04-01: LUNA was bought at 103.02 and ended at 0.00005, FTT at 48.82 and 1.4322, UST at 0.9996 and 0.363505, SRM at 3.234 and 0.24308."
    then = [s for s, why in universe_then(load_settings().universe, lake, "1h", FROM).items() if not why]
    assert len(then) == 19 and {"LUNAUSDT", "FTTUSDT", "USTUSDT", "SRMUSDT"} < set(then)
    panel, start, stop = lake.panel(then, "1h", FROM, TO)
    book = hold(panel, start, stop, 1_900_000)
    # 100,000 / 103.02 x 0.00005 = 0.0485; 100,000 / 48.82 x 1.4322 = 2,933.63; 100,000 / 0.9996 x 0.363505 = 36,365.05; 100,000 / 3.234 x 0.24308 = 7,516.39
    lost = {"LUNAUSDT": -99_999.95, "FTTUSDT": -97_066.37, "USTUSDT": -63_634.95, "SRMUSDT": -92_483.61}
    assert {s: round(float(book.pnl[s]), 2) for s in lost} == lost
    assert "LUNA2USDT" not in book.index and len(book) == 19 and bool(book.ended[list(lost)].all()) and not book.ended["BTCUSDT"]
    assert [pd.Timestamp(book["last"][s], unit="ms").isoformat() for s in lost] == ["2022-05-13T00:00:00", "2022-11-15T04:00:00", "2022-05-12T23:00:00", "2022-11-28T01:00:00"]


def test_today_s_universe_warns_and_then_s_does_not(lake):
    settings = load_settings()
    today, then = (open_ground(lake, settings, to_ms(FROM), to_ms(TO), u) for u in ("today", "then"))
    assert {"FTTUSDT", "USTUSDT", "SRMUSDT", "LUNAUSDT"} <= set(today.missing) and not set(today.missing) & set(today.panel.symbols)
    assert "LUNA2USDT" in today.panel.symbols and {"LUNAUSDT", "LUNA2USDT", "FTTUSDT"} < set(then.panel.symbols) and then.missing == {}
    assert "FTTUSDT (until 2022-11-15)" in warning(today.missing) and "LUNAUSDT (until 2022-05-13)" in warning(today.missing) and warning(then.missing) == ""
    assert left_out(lake, "1h", ["BTCUSDT"], to_ms("2022-11-01"), to_ms(TO)) == {"FTTUSDT": "2022-11-15T04:00:00Z", "SRMUSDT": "2022-11-28T01:00:00Z"}


def test_a_plain_backtest_says_who_was_left_out(lake):
    "Bitcoin and Ether, chosen today, over 2022: whoever died on the way is named with its last bar; LUNA too, though another coin bears its name in the same file. With all of them there is nothing to say."
    alone = backtest(Crossover(), lake, ["BTCUSDT", "ETHUSDT"], "1h", FROM, TO, load_settings(), audit=False).metrics
    died = {"LUNAUSDT": "2022-05-13T00:00:00Z", "USTUSDT": "2022-05-12T23:00:00Z", "USDCUSDT": "2022-09-26T02:00:00Z", "FTTUSDT": "2022-11-15T04:00:00Z", "SRMUSDT": "2022-11-28T01:00:00Z"}
    assert alone["survivorship"]["left_out"] == died and alone["warnings"] == [warning(died)] and "LUNAUSDT (until 2022-05-13)" in alone["warnings"][0] and "FTTUSDT (until 2022-11-15)" in alone["warnings"][0]
    said = lambda symbols, **more: caveats(lake, symbols, "1h", to_ms(FROM), to_ms(TO), load_settings(flags=more).universe)
    assert list(said(["BTCUSDT"], **{"universe.exclude": ["UST", "USDC", "SRM", "FTT"]})["survivorship"]["left_out"]) == ["LUNAUSDT"]     # what the rules never had is not missed
    assert set(said(["BTCUSDT"], **{"universe.dynamic": True})["survivorship"]["left_out"]) == {"LUNAUSDT", "FTTUSDT", "SRMUSDT"}          # nor is money that is called a coin
    assert said(["BTCUSDT", *died]) == {"gaps": {}, "survivorship": {"left_out": {}, "warning": ""}, "warnings": []}


def test_the_command_warns_and_so_does_the_page(own_home, capsys):
    "The same without real candles, through the command: in metrics.json, on the screen and in the page's banner and verdict; without the coin that ended nothing is said."
    market = synth_market(["STAYUSDT", "ENDUSDT"], "1h", "2024-01-01", "2024-03-01", 7)
    for s, bars in {"STAYUSDT": market["STAYUSDT"], "ENDUSDT": market["ENDUSDT"][:"2024-02-10"]}.items(): Lake().write(s, "1h", bars, "synthetic")
    words = ["backtest", "--strategy", "rules.crossover", "--from", "2024-02-01", "--to", "2024-02-20", "--out", str(own_home / "run")]
    def told(*more):
        assert main([*words, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out), load_run(own_home / "run")
    both, run = told()
    assert both["warnings"] == [] and both["survivorship"] == {"left_out": {}, "warning": ""} and banner(run).markup == ""
    alone, run = told("--symbols", "STAYUSDT")
    assert alone["survivorship"]["left_out"] == {"ENDUSDT": "2024-02-10T23:00:00Z"} and run.metrics["warnings"] == alone["warnings"] == [alone["survivorship"]["warning"]]
    assert banner(run).markup.startswith('<p class="line bad"><b>survivorship: left out is') and "ENDUSDT (until 2024-02-10)" in verdict_line(run).markup
    assert main([*words, "--symbols", "STAYUSDT"]) == 0 and capsys.readouterr().out.startswith(alone["warnings"][0] + "\n")


def test_no_return_crosses_luna_s_gap(lake):
    panel, start, stop = lake.panel(["LUNAUSDT"], "1h", FROM, TO)
    old, new = (panel.times[~np.isnan(panel.close[:, j])] for j in (0, 1))
    assert panel.symbols == ("LUNAUSDT", "LUNA2USDT") and (old[-1], new[0]) == (LUNA_ENDS, LUNA2_BEGINS)
    moves = [np.abs(np.diff(np.log(panel.frame(s).close.to_numpy()))).max() for s in panel.symbols]
    raw = lake.read("LUNAUSDT", "1h", FROM, TO).close.to_numpy()
    assert max(moves) < 3.1 and np.abs(np.diff(np.log(raw))).max() > 11  # the raw series jumps by a factor of 170,000


def test_no_feature_and_no_label_crosses_it(lake):
    "What a model of August learns of LUNA is what it would learn had the first coin never been."
    asked, settings = Request("1h", None, to_ms("2022-10-01")), ModelSettings(min_rows=500, context="")
    learnt = gather(lake, "LUNAUSDT", asked, settings)
    alone = pd.read_parquet(shared() / "data/binance/history/LUNAUSDT-1h.parquet").set_index("open_time")["2022-05-31":"2022-09-30"]
    assert learnt.bars.index[0] == alone.index[0] and len(learnt.bars) == len(alone)
    np.testing.assert_array_equal(learnt.features("1h"), np.asarray(matrix(alone, "1h", None), np.float32))
    ours, own = learnt.labels(5, asked, settings), make_labels(alone, 5, "1h")
    assert (ours.y.tolist(), ours.end.tolist()) == (own.y.tolist(), own.end.tolist()) and ours.start.min() == LUNA2_BEGINS


def test_no_position_crosses_it(lake):
    "A strategy that wants to hold LUNA at every bar, with no rule of risk in its way but the stop."
    s = load_settings(flags={"risk.disable": ["LEADER_CORRELATION", "PRICE_JUMP"], "costs.participation": None})
    run = backtest(Always(), lake, ["LUNAUSDT"], "1h", "2022-05-06", "2022-06-10", s)
    fills = [(f.symbol, f.time_ms) for f in run.result.fills]
    assert fills and {name for name, _ in fills} == {"LUNAUSDT", "LUNA2USDT"}
    assert max(t for name, t in fills if name == "LUNAUSDT") <= LUNA_ENDS + 3_600_000 and min(t for name, t in fills if name == "LUNA2USDT") >= LUNA2_BEGINS
    assert all((t.entry_time_ms < LUNA2_BEGINS) == (t.exit_time_ms < LUNA2_BEGINS) for t in run.result.trades)
    assert max(run.result.equity) < 12_000  # nobody gained 17 million percent


def test_a_made_up_coin_that_ends(tmp_path):
    "The same without real candles: 5,000 in each of two coins, one of which ends at a tenth of its price."
    lake, market = Lake(tmp_path), synth_market(["STAYUSDT", "ENDUSDT"], "1h", "2024-01-01", "2024-02-01", 7)
    end = market["ENDUSDT"][:"2024-01-15"].copy()
    end.iloc[-1, [1, 2, 3]] = [end.open.iloc[-1], float(end.open.iloc[0]) / 10, float(end.open.iloc[0]) / 10]
    for s, bars in {"STAYUSDT": market["STAYUSDT"], "ENDUSDT": end}.items(): lake.write(s, "1h", bars, "synthetic")
    panel, start, stop = lake.panel(["STAYUSDT", "ENDUSDT"], "1h", "2024-01-01", "2024-02-01")
    book = hold(panel, start, stop, 10_000)
    assert round(float(book.pnl["ENDUSDT"]), 2) == -4_500.0 and math.isclose(book.worth["STAYUSDT"], 5_000 * market["STAYUSDT"].close.iloc[-1] / market["STAYUSDT"].open.iloc[0])
    assert [s for s, x in lives(panel, start, stop).items() if x.ended] == ["ENDUSDT"]
