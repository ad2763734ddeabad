"A ledger that can't be written: before an order nothing is sent, after it the order is found again by its client id."
import os
import resource
import sqlite3
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from bnml.core.base import Retry, StorageError
from bnml.domain.orders import Purpose
from bnml.domain.portfolio import Portfolio, identity_gap
from bnml.trade.commands import obey
from bnml.trade.execution import ExecutionDesk
from bnml.trade.exits import ExitSettings
from bnml.trade.holding import guarded
from bnml.trade.ledger import Ledger
from bnml.trade.recovery import recover, remembering
from bnml.venue.binance import BinanceWire
from bnml.venue.ccxt import CcxtVenue
from bnml.venue.orders import CcxtExecution
from tests.postgres import NoServer, emptied, postgres
from tests.quiet import MINUTE, START, SYMBOL, D, VenueClock, purchase, served


@pytest.fixture
def stage():
    with served() as it: yield it


@pytest.fixture(scope="module")
def server():
    try:
        with postgres() as found: yield found
    except NoServer as e:
        yield str(e)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path, server):
    if request.param == "sqlite": return f"sqlite:///{tmp_path}/ledger.db"
    return emptied(server) if "://" in server else pytest.skip(server)


class Desk:
    "A desk at the rehearsal over a durable ledger, as a start makes it."
    def __init__(self, stage, url):
        self.venue = CcxtExecution(BinanceWire(CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=2.0, key="k", secret="s")), poll_s=0)
        self.ledger = Ledger(url, "live", sole=True)
        balances = self.venue.balances()
        self.ledger.begin("live", "live", "test", {}, balances, START)
        self.start = {"USDT": D(100_000)}
        self.desk = ExecutionDesk(self.venue, self.ledger, VenueClock(self.venue.wire), "named", ExitSettings(), MINUTE, lambda flat: None)
        remembering(self.desk)
        recover(self.desk, self.ledger, self.start)
        self.desk.at(START)
        patience = "PRAGMA busy_timeout=50" if url.startswith("sqlite") else "SET lock_timeout TO '50ms'"
        self.ledger._conn.exec_driver_sql(patience)
        self.ledger._conn.commit()

    def enter(self):
        return self.desk.enter(*purchase())

    def settle(self, until):
        end = time.monotonic() + 10
        while not until():
            assert time.monotonic() < end
            self.desk.settle()
            time.sleep(0.02)

    def die(self):
        "As a kill would: nothing more is written."
        self.ledger._conn.close()
        self.ledger._conn.engine.dispose()
        self.ledger._owner.release()


@contextmanager
def locked(url):
    "Another program holds the ledger."
    if url.startswith("sqlite"):
        other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")
        return other.close()
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as conn:
        conn.exec_driver_sql("LOCK TABLE intents, orders, fills, state IN ACCESS EXCLUSIVE MODE")
        yield
    engine.dispose()


@contextmanager
def full(path):
    "No file of this process may grow beyond what the ledger's has."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wal = f"{path}-wal"
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(wal) if os.path.exists(wal) else os.path.getsize(path), hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def orders(stage): return stage.books()["orders"]


def buys(d):
    "A purchase, until it is protected."
    h = d.enter()
    d.settle(lambda: guarded(h, d.desk.orders))
    d.ledger.close()


def begins_anew(stage, url):
    "The next start finds nothing at the venue or in the books, and buys."
    after = Desk(stage, url)
    assert after.desk.holdings == {} and orders(stage) == []
    buys(after)


def test_a_locked_ledger_sends_nothing(stage, url):
    d = Desk(stage, url)
    with locked(url), pytest.raises(Retry, match="saving the order .* for SOLUSDT: the ledger is locked by another process"):
        d.enter()
    assert orders(stage) == []
    d.die()
    begins_anew(stage, url)


def test_a_ledger_that_is_closed_after_a_refused_order_can_be_opened(stage, url):
    "What was to be remembered of the order that never was does not trouble the next start."
    d = Desk(stage, url)
    with locked(url), pytest.raises(Retry): d.enter()
    d.ledger.close()
    begins_anew(stage, url)


def test_a_full_disk_sends_nothing(stage, tmp_path):
    d = Desk(stage, f"sqlite:///{tmp_path}/ledger.db")
    with full(tmp_path / "ledger.db"), pytest.raises(StorageError, match="can't be written .* nothing was sent"):
        d.enter()
    assert orders(stage) == []
    h = d.desk.holdings.pop(SYMBOL, None)
    assert h is None or not d.ledger.intents()
    d.die()
    buys(Desk(stage, f"sqlite:///{tmp_path}/ledger.db"))


def found_again(stage, url):
    "The next start takes the order up, books its fill once and protects it."
    after = Desk(stage, url)
    h = after.desk.holdings[SYMBOL]
    after.settle(lambda: guarded(h, after.desk.orders))
    books = stage.books()
    entries = [o for o in after.desk.orders.values() if o.intent.purpose == Purpose.ENTRY]
    assert len(entries) == 1 == sum(o["side"] == "BUY" for o in books["orders"])
    after.desk.remember()
    after.ledger.flush()
    told = sorted((f.client_id, f.quantity, f.price) for f in after.ledger.fills())
    ids = {o["orderId"]: o["clientOrderId"] for o in books["orders"]}
    assert told == sorted((ids[t["orderId"]], D(t["qty"]), D(t["price"])) for t in books["trades"]) and told
    assert identity_gap(after.start, after.desk.fills, Portfolio(after.venue.balances())) == {a: 0 for a in ("USDT", "SOL")}
    assert {o["clientOrderId"] for o in books["orders"]} == set(after.desk.orders)
    stops = [o for o in books["orders"] if o["type"] == "STOP_LOSS" and o["status"] == "NEW"]
    assert sum(D(o["origQty"]) for o in stops) == D("9.99")
    after.ledger.close()


def test_an_order_before_the_lock_is_found_again(stage, url):
    d = Desk(stage, url)
    d.enter()
    with locked(url), pytest.raises(Retry):
        d.settle(lambda: False)  # its fill wants a stop, whose intent can't be written
    assert [o["side"] for o in orders(stage)] == ["BUY"]
    d.die()
    found_again(stage, url)


def test_a_command_between_two_bars_writes_a_sale_and_what_it_made_of_the_position_together(stage, tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    d = Desk(stage, url)
    h = d.enter()
    d.settle(lambda: guarded(h, d.desk.orders))
    d.desk.remember()
    d.ledger.flush()
    d.desk.leave(h, "OPERATOR")
    d.settle(lambda: SYMBOL not in d.desk.holdings)  # sold, and heard; nothing of it is on the disk yet
    inbox = SimpleNamespace(take=lambda: [SimpleNamespace(name="resume", symbol=None)], obeyed=lambda commands: None)
    obey(SimpleNamespace(inbox=inbox, risk=SimpleNamespace(lift=lambda code: None), desk=d.desk, ledger=d.ledger, closing=[], driven=False), between=True)
    d.die()
    sent = len(orders(stage))
    after = Desk(stage, url)
    assert after.desk.holdings == {} == after.desk.portfolio.positions
    after.desk.settle()
    assert len(orders(stage)) == sent and len(after.desk.fills) == 2
    after.ledger.close()


def test_an_order_before_the_disk_was_full_is_found_again(stage, tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    d = Desk(stage, url)
    d.enter()
    with full(tmp_path / "ledger.db"), pytest.raises(StorageError):
        d.settle(lambda: False)
    assert [o["side"] for o in orders(stage)] == ["BUY"]
    d.die()
    found_again(stage, url)


def test_a_lost_server_is_one_sentence_and_a_new_connection_owns_the_ledger_anew(stage, url):
    if url.startswith("sqlite"): pytest.skip("SQLite has no server")
    d = Desk(stage, url)
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as conn:
        conn.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name LIKE 'bnml-runner%%'")
    engine.dispose()
    with pytest.raises(Retry, match="no connection to the ledger"): d.enter()
    assert orders(stage) == []
    d.die()
    found = Desk(stage, url)
    assert not found.desk.holdings
    found.ledger.close()


class Died(BaseException):
    "The process is gone."


def test_a_stop_in_doubt_after_a_restart_is_laid_anew_and_its_position_is_not_sold(stage, tmp_path, monkeypatch):
    url, real = f"sqlite:///{tmp_path}/ledger.db", CcxtExecution.submit
    d = Desk(stage, url)
    d.enter()
    d.die()  # bought, and nobody heard of it
    stage.jump(bars=1)  # bare for far longer than allowed

    def die(self, intent, *more):
        if intent.side == "SELL": raise Died
        return real(self, intent)
    with monkeypatch.context() as m:
        m.setattr(CcxtExecution, "submit", die)
        m.setattr(CcxtExecution, "submit_oco", die)
        second = Desk.__new__(Desk)
        with pytest.raises(Died): second.__init__(stage, url)  # the stop is written, and not sent
        second.die()
    third = Desk(stage, url)
    third.desk.patience_ms = 1000
    h, seen = third.desk.holdings[SYMBOL], []
    end = time.monotonic() + 10
    while not guarded(h, third.desk.orders) and not h.leaving and time.monotonic() < end:
        third.desk.tend(lambda symbol: None)
        seen += [third.desk.orders[l.stop].reason for l in h.legs]
        time.sleep(0.05)
    assert seen[0] == "NOT_FOUND" and not h.leaving and guarded(h, third.desk.orders)
    sells = [o for o in orders(stage) if o["side"] == "SELL"]
    stops = [o for o in sells if o["type"].startswith("STOP_LOSS")]
    assert {o["status"] for o in sells} == {"NEW"} and sum(D(o["origQty"]) for o in stops) == h.quantity == third.desk.portfolio.positions[SYMBOL].quantity
    third.ledger.close()
