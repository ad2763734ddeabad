"A period in which a traded symbol misses bars: refused in one sentence, or allowed and worn in red."
import json
from pathlib import Path

import pytest

from bnml import cli
from bnml.core.base import BadData
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
from bnml.lab.backtest import backtest
from bnml.lab.backtest_page import open_run
from bnml.ops.settings import load_settings
from bnml.trade.rules import Crossover

SPAN = ("--symbols", "SOLUSDT", "--from", "2024-02-10", "--to", "2024-02-12")
MISSING = "SOLUSDT misses 2 of its 1h bars in this period, the first at 2024-02-11T05:00:00Z"


def test_refused_unless_gaps_are_allowed(own_home, monkeypatch, capsys):
    "Two hours are not there: no backtest, no walk, no page, until gaps are allowed; then figures and a red banner name them. Beside the hole nothing is said."
    def told(*words, code=0, says=()):
        capsys.readouterr()
        got = cli.main([*words, "--json"] if not code else list(words))
        out, err = capsys.readouterr()
        assert got == code and all(x in err for x in says) and (not code or err.count("\n") == 1 and "Traceback" not in err), err[-2000:]
        return None if code else json.loads(out)

    bars = synth_bars("SOLUSDT", "1h", "2024-01-01", "2024-03-01", 7)
    Lake().write("SOLUSDT", "1h", bars.drop(bars.loc["2024-02-11T05:00Z":"2024-02-11T06:00Z"].index), "with a hole")
    Lake().write("ENDUSDT", "1h", bars[:"2024-02-10T12:00Z"], "ended")
    told("walk-forward", *SPAN, code=65, says=[MISSING])
    monkeypatch.setenv("BNML__STRATEGY", "rules.crossover")
    told("backtest", *SPAN, code=65, says=[MISSING, "`bnml data fetch --symbols SOLUSDT --interval 1h --from 2024-02-11T05:00:00Z`", "--allow-gaps"])
    assert not list((own_home / "data").glob("backtests/*"))
    assert told("backtest", *SPAN[:3], "2024-02-11T07:00:00Z", *SPAN[4:])["gaps"] == {}
    made = told("backtest", *SPAN, "--allow-gaps")
    assert made["gaps"] == {"SOLUSDT": {"missing": 2, "first": "2024-02-11T05:00:00Z", "gaps": 1, "longest": 2}}
    asked = (Crossover(), Lake(), ["SOLUSDT"], "1h", "2024-02-10", "2024-02-12", load_settings())      # as in a notebook
    with pytest.raises(BadData, match="SOLUSDT misses 2 .* or go on all the same with allow_gaps=True"): backtest(*asked)
    assert backtest(*asked, allow_gaps=True).metrics["gaps"] == made["gaps"]
    with pytest.raises(BadData, match="SOLUSDT misses 2 .* -p allow_gaps=true"): open_run(made["folder"])      # what the page's first cell asks
    html = Path(told("report", "backtest", "-p", f"run_dir={made['folder']}", "-p", "allow_gaps=true")["html"])
    assert '<p class="line bad"><b>Data gaps: SOLUSDT misses 2 bars from 2024-02-11T05:00:00Z;' in html.read_text()
    assert '<p class="line bad"><b>survivorship: left out is who was traded in this period and ended within it, 1 in all: ENDUSDT (until 2024-02-10).' in html.read_text()
    assert json.loads(html.with_name("metrics.json").read_text())["gaps"] == made["gaps"]
