"A walk trains on the way: the same twice, blind to what comes after each turn, and deaf to a registry that offers it the future."
import json
from pathlib import Path

import numpy as np
import pytest

from bnml.cli import main
from bnml.core.base import Refused
from bnml.core.clock import iso, to_ms
from bnml.data.lake import Lake
from bnml.data.synth import synth_market
from bnml.lab.terms import turning_points
from bnml.lab.walk_forward import models_for, open_ground, walk_forward
from bnml.ml.audit import strategy_prefix_audit
from bnml.ml.registry import Registry
from bnml.ops.settings import load_settings
from bnml.trade.renewed import Chosen, Renewed
from tests import nursery

FROM, TURN, TO, DAY = "2024-05-18", "2024-05-25", "2024-06-01", 86_400_000
# models that trade although they have not earned it: what is tried here is the way, not the edge
EAGER = {"model.horizons": (3,), "model.min_rows": 500, "model.feature_limit": 8, "model.edge_k": 0.05, "model.require_edge": False, "model.edge_sigmas": 0.0,
         "model.min_trades": 5, "model.min_confidence": 0.0, "model.calibration": "none", "model.conformal_alpha": 0.0, "model.context": "", "model.threads": 1, "model.jobs": 1,
         "walk_forward.trees": 3, "walk_forward.n_splits": 2, "walk_forward.history_days": 45, "walk_forward.retrain_days": 7, "risk.min_confidence": 20.0, "risk.leader": "SYNUSDT"}


def fill(home: Path, spoilt_from: str | None = None) -> Lake:
    "A lake of one synthetic coin; from a moment on its prices may be others."
    lake, bars = Lake(home / "data" / "lake"), synth_market(["SYNUSDT"], "1h", "2024-01-01", TO, 7)["SYNUSDT"].copy()
    if spoilt_from:
        rows = bars.index >= spoilt_from
        bars.loc[rows, ["open", "high", "low", "close"]] *= np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, rows.sum())))[:, None]
    lake.write("SYNUSDT", "1h", bars, "synthetic")
    return lake


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    "(lake, settings, folder of the models, strategy, what was trained, panel) of two terms."
    home = tmp_path_factory.mktemp("walk")
    lake, settings = fill(home), load_settings(env={}, flags=EAGER)
    ground = open_ground(lake, settings, to_ms(FROM), to_ms(TO))
    strategy, trained = models_for(ground, settings, root=home / "models")
    return lake, settings, home / "models", strategy, trained, ground.panel


def test_no_model_knows_a_bar_that_it_judges(walked):
    *_, strategy, trained, panel = walked
    assert [(iso(t.turn)[:10], bool(t.version)) for t in trained] == [(FROM, True), (TURN, True)] and trained[0].version != trained[1].version
    assert all(b.last_label_end_ms < turn for turn, term in strategy.terms for b in term.bundles["SYNUSDT"])
    assert strategy_prefix_audit(strategy, "SYNUSDT", panel.frame("SYNUSDT"), 6) == []


def test_what_comes_after_a_turn_changes_nothing_before_it(walked, tmp_path):
    "Trained from scratch on a lake whose prices are others from the second turn on: the same models, the same signals until then."
    _, settings, _, strategy, trained, panel = walked
    ground = open_ground(fill(tmp_path, TURN), settings, to_ms(FROM), to_ms(TO))
    other, again = models_for(ground, settings, root=tmp_path / "models")
    assert [t.version for t in again] == [t.version for t in trained]
    ours, theirs = strategy.frame("SYNUSDT", panel.frame("SYNUSDT")), other.frame("SYNUSDT", ground.panel.frame("SYNUSDT"))
    before = ours.times < to_ms(TURN)
    assert (ours.action[before] == theirs.action[before]).all() and (ours.confidence[before] == theirs.confidence[before]).all()
    assert np.count_nonzero(ours.action[before]) > 10 and (ours.confidence[~before] != theirs.confidence[~before]).any()


def test_a_registry_that_offers_the_future(walked, tmp_path, monkeypatch):
    "A model of all bars is put in force beside the others: as of a turn nobody finds it, and where it is pressed on us it is refused (77)."
    lake, settings, folder, _, trained, _ = walked
    turn, registry = to_ms(FROM), Registry(folder)
    prophet = trained[1].version                             # it knows the first week of the walk
    registry.put_in_force("SYNUSDT", 3, prophet)
    assert registry.find("SYNUSDT", 3) == prophet and registry.find("SYNUSDT", 3, turn) is None
    both = Chosen(folder, {("SYNUSDT", 3): [prophet, trained[0].version]})
    assert Renewed(both, ["SYNUSDT"], "1h", (3,), (turn,)).models[f"{FROM}T00:00:00Z"] == {"SYNUSDT": [trained[0].version]}
    monkeypatch.setattr(Chosen, "find", lambda self, symbol, horizon, as_of_ms=None: prophet)
    with pytest.raises(Refused, match="knows prices up to 2024-05-2") as e: Renewed(both, ["SYNUSDT"], "1h", (3,), (turn,))
    assert e.value.exit_code == 77


def test_one_command_twice_gives_the_same_file(own_home, monkeypatch, capsys):
    fill(own_home)
    for name, value in EAGER.items(): monkeypatch.setenv("BNML__" + name.upper().replace(".", "__"), json.dumps(value) if isinstance(value, (tuple, bool)) else "null" if value is None else str(value))
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", nursery.kernel)
    assert main(["walk-forward", "--from", FROM, "--to", "2024-05-20", "--json", "--report", "--out", str(own_home / "a")]) == 0
    assert "1 pairs, retrained every 7 days" in Path(json.loads(capsys.readouterr().out)["report"]).read_text()
    walk_forward(Lake(), load_settings(), FROM, "2024-05-20", audit=False).save(own_home / "b")    # the models are found again
    found = [(own_home / name / "metrics.json").read_bytes() for name in ("a", "b")]
    m = json.loads(found[0])
    assert found[0] == found[1] and (own_home / "a" / "trades.csv").read_bytes() == (own_home / "b" / "trades.csv").read_bytes()
    assert m["trades"] > 3 and m["walk_forward"]["models"] == 1 and m["pbo"] is None and "nothing to choose" in m["why_nan"]["pbo"] and 0 <= m["deflated_sharpe"] <= 1
    assert "1 pairs, retrained every 7 days (1 models, 1 of which trade)" in m["headline"] and m["survivorship"]["warning"] == ""
    assert main(["walk-forward", "--from", FROM, "--retrain", "often"]) == 2
    assert main(["walk-forward", "--from", "2023-01-01", "--to", "2023-02-01"]) == 65
    assert "nothing in the lake was traded" in capsys.readouterr().err


def test_turns_are_a_month_apart_unless_told_otherwise():
    s = load_settings(env={})
    assert [iso(t)[:10] for t in turning_points(to_ms("2025-03-01"), to_ms("2025-09-30"), int(s.walk_forward.retrain_days * DAY), 3_600_000)] == [
        "2025-03-01", "2025-03-31", "2025-04-30", "2025-05-30", "2025-06-29", "2025-07-29", "2025-08-28", "2025-09-27"]
