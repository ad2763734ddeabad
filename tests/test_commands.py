"An operator's word through a crash: what was to stop the buying stops it after the restart, wherever the process died; what was to buy buys once at most."
import pytest

from bnml.ops import watch
from bnml.ops.desk import open_station
from bnml.ops.status import Board, inbox, send, take
from bnml.ops.watch import Operator
from bnml.trade.ledger import Ledger

FLAGS = {"data.source": "synthetic", "data.pace_s": 0, "data.history_bars": 100, "universe.symbols": "BTCUSDT", "strategy": "rules.crossover"}


class Died(BaseException):
    "The process is gone: nothing below runs any more."


def watched(settings, ports, session): return Operator(Board(session, "paper", settings.strategy, every_s=0.0), every_s=0.0)


def die(*_): raise Died


def life(monkeypatch, *words, before_writing=False, before_forgetting=False) -> tuple:
    "One runner that hears these words, and dies where it is told to: (holds that stand, wishes, files that wait)."
    with open_station(flags=FLAGS, cycles=1, watch=watched) as station:
        for w in words: send(w)
        with monkeypatch.context() as m:
            if before_writing: m.setattr(station.ledger, "_write", die)
            if before_forgetting: m.setattr(watch, "obeyed", die)
            try: station.engine.poll(between=True)
            except Died: station.ledger._rows, station.ledger._orders, station.ledger._state = {t: [] for t in station.ledger._rows}, {}, {}
        e = station.engine
        return e.risk.reasons(0), e.closing, [c.name for c in take()]


@pytest.mark.parametrize("where", ["before_writing", "before_forgetting"])
def test_a_pause_outlives_a_crash(own_home, monkeypatch, where):
    life(monkeypatch)
    life(monkeypatch, "pause", **{where: True})
    written = "PAUSED" in ((Ledger(None, "paper-synthetic").load_state("risk") or {}).get("holds") or {})
    assert written == (where == "before_forgetting") and [p.name.split("-")[1] for p in inbox().glob("*.json")] == ["pause.json"]
    assert life(monkeypatch) == (("PAUSED",), [], [])  # heard again, and now it may go
    assert life(monkeypatch) == (("PAUSED",), [], [])
    placed = [code for _, code, _ in Ledger(None, "paper-synthetic").load_state("risk")["placed"]]
    assert placed == ["PAUSED"]  # once, however often it was heard
    assert life(monkeypatch, "resume")[0] == ()


def test_a_flattening_outlives_a_crash_and_a_stop_does_not(own_home, monkeypatch):
    life(monkeypatch)
    assert life(monkeypatch, "close", "flatten", "stop", before_writing=True)[2] == ["close", "flatten", "stop"]
    reasons, closing, waiting = life(monkeypatch)
    assert (closing, waiting) == ([None], [])  # everything is to be sold at the next close


def test_what_was_taken_back_holds_nobody(own_home, monkeypatch):
    life(monkeypatch)
    life(monkeypatch, "pause", "resume", before_forgetting=True)
    assert life(monkeypatch) == ((), [], [])


def test_another_session_s_pause_waits_for_it(own_home, monkeypatch):
    life(monkeypatch)
    life(monkeypatch, "pause", before_writing=True)
    Operator(Board("replay-1", "paper", "demo"), every_s=0.0).take()
    assert [c.name for c in take()] == ["pause"] and life(monkeypatch) == (("PAUSED",), [], [])


def test_a_purchase_is_heard_once_at_most(own_home, monkeypatch):
    life(monkeypatch)
    assert life(monkeypatch, "place", before_writing=True)[2] == []
