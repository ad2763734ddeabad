"Many symbols say BUY at one close: their orders are written in one transaction, and whatever happens while they leave, none is lost, doubled or left bare."
import sqlite3
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal as D
from types import SimpleNamespace

import numpy as np
import pytest

from bnml.core.base import Retry
from bnml.domain.market import default_instrument
from bnml.domain.orders import Purpose, Status
from bnml.domain.plan import FeeModel
from bnml.domain.portfolio import Portfolio, identity_gap
from bnml.trade import sending
from bnml.trade.execution import ExecutionDesk
from bnml.trade.exits import ExitSettings
from bnml.trade.holding import guarded
from bnml.trade.ledger import Ledger
from bnml.trade.precheck import ExecutionSettings
from bnml.trade.recovery import recover, remembering
from bnml.venue.binance import BinanceWire
from bnml.venue.ccxt import CcxtVenue
from bnml.venue.gate import Key
from bnml.venue.orders import CcxtExecution
from bnml.venue.rehearsal import serve
from tests.quiet import MINUTE, START, VenueClock, purchase

SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT", "DDDUSDT", "EEEUSDT", "FFFUSDT")
START_BALANCES = {"USDT": D(100_000)}


class Died(BaseException):
    "The process is gone."


@pytest.fixture
def stage():
    "Six coins that stand at 100; fees of a tenth of a percent come out of what was bought."
    flat = np.full((200, len(SYMBOLS)), 100.0)
    panel = SimpleNamespace(symbols=SYMBOLS, interval="1m", times=START + np.arange(200) * MINUTE, open=flat, high=flat + 0.1, low=flat - 0.1, close=flat, volume=flat * 1e4)
    with serve(panel, {s: default_instrument(s, 100.0) for s in SYMBOLS}, START_BALANCES, {"k": Key("s")}, start_ms=START + 10 * MINUTE, fees=FeeModel(0.001, 0.001, "base")) as it: yield it


class Desk:
    "A desk at the rehearsal over a durable ledger, as a start makes it."
    def __init__(self, stage, path):
        self.stage, self.path = stage, path
        self.venue = CcxtExecution(BinanceWire(CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=2.0, key="k", secret="s")), poll_s=0)
        self.ledger = Ledger(f"sqlite:///{path}", "live", sole=True)
        self.ledger.begin("live", "live", "test", {}, START_BALANCES, START)
        self.desk = ExecutionDesk(self.venue, self.ledger, VenueClock(self.venue.wire), "named", ExitSettings(), MINUTE, lambda flat: None, ExecutionSettings(ask_s=0.01))
        remembering(self.desk)
        recover(self.desk, self.ledger, START_BALANCES)
        self.desk.at(START)
        self.told = []  # at each entry: (symbol, intents that another program reads on the disk)
        place = self.venue.wire.place
        self.venue.wire.place = lambda i: (self.told.append((i.symbol, self.on_disk("ENTRY"))), place(i))[1]

    def on_disk(self, purpose) -> int:
        with sqlite3.connect(self.path) as other: return other.execute("SELECT COUNT(*) FROM intents WHERE purpose = ?", (purpose,)).fetchone()[0]

    def burst(self):
        "Ten coins of each, allowed in one breath."
        p, v = purchase()
        with self.desk.together():
            for s in SYMBOLS: self.desk.enter(replace(p, symbol=s, signal=replace(p.signal, symbol=s)), replace(v, symbol=s))

    def settled(self):
        "Until the venue has no more to say and nothing is in doubt."
        for _ in range(200):
            self.desk.settle()
            self.desk.ask()
            if all(guarded(h, self.desk.orders) for h in self.desk.holdings.values()) and not self.desk.unsure: return self
        raise AssertionError({s: str(self.desk.orders[h.position_id].status) for s, h in self.desk.holdings.items()})

    def die(self):
        "As a kill would: nothing more is written."
        self.ledger._conn.close()
        self.ledger._conn.engine.dispose()
        self.ledger._owner.release()

    def bought(self) -> list[str]:
        "What the venue itself says was bought, once each, and holds a stop for each."
        books = self.stage.books()
        buys, stops = [o["symbol"] for o in books["orders"] if o["side"] == "BUY"], [o for o in books["orders"] if o["type"] == "STOP_LOSS" and o["status"] == "NEW"]
        assert len(buys) == len(set(buys)) and {o["symbol"] for o in stops} == set(self.desk.holdings)
        assert all(sum(D(o["origQty"]) for o in stops if o["symbol"] == s) == D("9.99") for s in self.desk.holdings)
        assert not any(identity_gap(START_BALANCES, self.desk.fills, Portfolio(self.venue.balances())).values())
        return buys


@contextmanager
def dying(monkeypatch, n: int, when: str):
    "The process ends before, or after, the n-th order is carried to the venue."
    real, count = CcxtExecution.submit, [0]
    def submit(self, intent):
        count[0] += 1
        if count[0] == n and when == "before": raise Died
        real(self, intent)
        if count[0] == n: raise Died
    with monkeypatch.context() as m:
        m.setattr(CcxtExecution, "submit", submit)
        with pytest.raises(Died): yield


def test_one_transaction_holds_all_before_the_first_leaves(stage, tmp_path):
    d, writes, real = Desk(stage, tmp_path / "ledger.db"), [], Ledger._write
    d.ledger._write = lambda *a: (writes.append(bool(d.ledger._size)), real(d.ledger, *a))[1]
    d.burst()
    assert d.told == [(s, 6) for s in SYMBOLS] and writes == [True]
    d.settled()
    assert d.bought() == [*SYMBOLS] and d.on_disk("STOP") == 6 * 3 and writes == [True, True]  # the stops of all, too
    d.ledger.close()


@pytest.mark.parametrize("n, when", [(1, "before"), (3, "before"), (3, "after"), (6, "after")])
def test_who_dies_while_they_leave_finds_each_again_and_sends_none_twice(stage, tmp_path, monkeypatch, n, when):
    d = Desk(stage, tmp_path / "ledger.db")
    with dying(monkeypatch, n, when): d.burst()
    d.die()
    left = SYMBOLS[: n - (when == "before")]
    after = Desk(stage, tmp_path / "ledger.db")
    assert len(after.desk.orders) >= 6 and {o.intent.symbol for o in after.desk.orders.values()} == set(SYMBOLS)
    states = {o.intent.symbol: (o.status, o.reason) for o in after.desk.orders.values() if o.intent.purpose == Purpose.ENTRY}
    assert all(states[s][0] == Status.FILLED for s in left) and all(states[s] == (Status.UNKNOWN, "NOT_FOUND") for s in SYMBOLS if s not in left)  # asked for, not sent
    monkeypatch.setattr(sending, "ASK_MS", 0)
    after.settled()
    states = {o.intent.symbol: (o.status, o.reason) for o in after.desk.orders.values() if o.intent.purpose == Purpose.ENTRY}
    assert all(states[s] == (Status.REJECTED, "NEVER_ARRIVED") for s in SYMBOLS if s not in left)
    assert after.bought() == [*left] and {*after.desk.holdings} == {*left} and after.told == []
    after.ledger.close()


def test_a_locked_ledger_lets_none_leave(stage, tmp_path):
    d = Desk(stage, tmp_path / "ledger.db")
    d.ledger._conn.exec_driver_sql("PRAGMA busy_timeout=50")
    d.ledger._conn.commit()
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Retry, match="saving the order .* for AAAUSDT and those of 5 more symbols: the ledger is locked by another process"): d.burst()
    other.execute("ROLLBACK")
    other.close()
    assert d.told == [] and stage.books()["orders"] == [] and not d.desk.holdings and not d.desk.orders
    d.burst()  # the same bar once more: other ids, for the first ones were never
    assert d.settled().bought() == [*SYMBOLS]
    d.ledger.close()


def test_a_switch_engaged_while_they_leave_stops_those_that_have_not_left(stage, tmp_path):
    d = Desk(stage, tmp_path / "ledger.db")
    d.desk.objects = lambda intent: "KILL_SWITCH" if len(d.told) >= 2 else ""
    d.burst()
    d.settled()
    assert d.bought() == [*SYMBOLS[:2]] and {*d.desk.holdings} == {*SYMBOLS[:2]}
    d.desk.remember()
    d.ledger.flush()
    d.die()
    after = Desk(stage, tmp_path / "ledger.db").settled()  # and a restart does not ask for them
    denied = {o.intent.symbol: o.reason for o in after.desk.orders.values() if o.status == Status.DENIED}
    assert denied == dict.fromkeys(SYMBOLS[2:], "KILL_SWITCH") and after.bought() == [*SYMBOLS[:2]]
    after.ledger.close()
