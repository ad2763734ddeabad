"A symbol that is looked at and not traded: seen by the strategy in every engine, by nothing else, and never ahead of its time."
import json

import numpy as np
import pandas as pd
import pytest

from bnml.cli import main
from bnml.core.base import BadData, Refused
from bnml.core.clock import to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_market
from bnml.lab.replay import replay
from bnml.lab.vector import action_matrix
from bnml.ops.desk import open_station
from bnml.ops.market import open_market
from bnml.ops.settings import Settings, load_settings
from bnml.trade.scanner import Scanner

FROM, TO = to_ms("2024-02-01"), to_ms("2024-04-01")
CODE = '''
import numpy as np
import pandas as pd
from bnml.domain.signal import Strategy, signals, times_of

class Follow(Strategy):
    "Buys a coin a bar after Bitcoin has risen by half a percent."
    name, warmup_bars, context, ahead = "follow", 4, ("BTCUSDT",), 0
    def look(self, panel, stop):
        self._btc = pd.Series(panel.along("BTCUSDT")[:stop], panel.times[:stop])
    def frame(self, symbol, bars):
        move = np.log(self._btc).diff(4).shift(-self.ahead).reindex(times_of(bars)).to_numpy()
        return signals(symbol, bars, move > 0.005, move < -0.005)

class Peek(Follow):
    name, ahead = "peek", 1
'''


@pytest.fixture
def lake(tmp_path, monkeypatch):
    "Two coins to trade and Bitcoin, which nobody asked to trade."
    (tmp_path / "followers.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bot.yaml").write_text("strategy: followers:Follow\nuniverse: {symbols: [ADAUSDT, ETHUSDT]}\ndata: {interval: 1h, source: replay}\n")
    store = Lake()
    for symbol, bars in synth_market(["ADAUSDT", "ETHUSDT", "BTCUSDT"], "1h", to_ms("2024-01-01"), TO, 3).items():
        store.write(symbol, "1h", bars, "test")
    return store


def test_every_engine_sees_it_and_none_trades_it(lake, tmp_path):
    m = open_market(load_settings(), FROM, TO)
    assert m.symbols == m.panel.symbols == ("ADAUSDT", "ETHUSDT") and m.panel.everything[-1] == "BTCUSDT" and set(m.instruments) == set(m.symbols)
    run = replay(m.strategy, m.panel, load_settings(), m.start, m.stop, instruments=m.instruments)
    slow = Scanner(m.strategy, m.panel, load_settings().exits.plan())
    for row in range(m.start, m.start + 60): slow.scan_row(row)
    span = slice(m.start, m.start + 60)
    assert (slow.signals.action[span] == action_matrix(m.strategy, m.panel)[span]).all() and slow.signals.action[span].any()
    with open_station(span=(FROM, TO)) as station:
        paper = station.run()
        shown = station.summary()
    assert [(t.symbol, t.entry_time_ms, t.pnl) for t in paper.trades] == [(t.symbol, t.entry_time_ms, t.pnl) for t in run.result.trades] != []
    assert {f.symbol for f in paper.fills} <= set(m.symbols) and shown["symbols"] == list(m.symbols) and shown["violations"] == 0
    assert "BTCUSDT" not in run.params["symbols"] and run.metrics["symbol_bars"] == 2 * (m.stop - m.start)


@pytest.mark.parametrize("engine", ["replay", "vector"])
def test_its_bars_belong_to_the_run(lake, tmp_path, engine):
    "Another candle of the watched symbol is another run; the same run is the same."
    def once(name):
        words = ["backtest", "--from", "2024-02-01", "--to", "2024-04-01", "--engine", engine, "--out", str(tmp_path / name), "--json"]
        assert main(words) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())
    first = once("a")
    assert once("b") == first and first["trades"] > 3
    bars = lake.read("BTCUSDT", "1h")
    bars.iloc[1000, 4] *= 1.01
    lake.write("BTCUSDT", "1h", bars, "test", replace=True)
    assert once("c")["run_id"] != first["run_id"]


def test_one_that_reads_its_next_bar_is_refused(lake):
    with pytest.raises(Refused, match="BTCUSDT|other symbols' bars"):
        open_market(load_settings(flags={"strategy": "followers:Peek"}), FROM, TO)


def test_without_its_bars_there_is_no_market(lake):
    import shutil
    shutil.rmtree(lake.store("BTCUSDT", "1h").folder)
    with pytest.raises(BadData, match="look at BTCUSDT, and the lake has no 1h bars of it: run `bnml data fetch"):
        open_market(load_settings(), FROM, TO)


def test_the_synthetic_paper_feed_grows_it(lake):
    with open_station(flags={"data.source": "synthetic", "data.pace_s": 0, "data.history_bars": 100}, cycles=5) as station:
        station.run()
        panel = station.engine.panel
        session = station.session
    assert panel.symbols == ("ADAUSDT", "ETHUSDT") and np.isfinite(panel.along("BTCUSDT")[-6:-1]).all()
    with open_station(flags={"data.source": "synthetic", "data.pace_s": 0, "data.history_bars": 100}, cycles=2) as again:
        assert again.session == session
        again.run()
