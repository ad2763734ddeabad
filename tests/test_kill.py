"""Kill -9 of the live runner: a sample of the steps of an order's life and of random moments, at a fixed seed and at a fresh one that is printed, and
builds that are broken on purpose, which the same judge must name. The whole: `python -m tests.kill --kills 200 --database sqlite|postgres`."""
import secrets
import subprocess
import sys
import time
from decimal import Decimal

import pytest

from bnml.core.base import source
from tests.kill import lives
from tests.kill.child import BROKEN, STEPS
from tests.kill.judge import bare, differences, given_up
from tests.kill.lives import Nursery
from tests.kill.suite import run
from tests.postgres import NoServer

SAMPLE = {"sqlite": ("sent, not answered", "after partial fill", "during replace, before the new"),
          "postgres": ("after intent", "between fill and protection", "during exit, after intent")}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    "One warm process for all runners of this file."
    it = Nursery(tmp_path_factory.mktemp("nursery"))
    yield it
    it.close()


@pytest.mark.parametrize("database", SAMPLE)
def test_a_sample_of_steps_and_moments(tmp_path, nursery, database):
    "Steps at a fixed seed on SQLite, at a fresh one on PostgreSQL."
    seed, steps = 1 if database == "sqlite" else secrets.randbelow(10**6), SAMPLE[database]
    print(f"repeat with: python -m tests.kill --kills 1 --steps '{'; '.join(steps)}' --database {database} --seed {seed}")
    try: found = run(database, kills=1, seed=seed, steps=steps, keep=tmp_path / "kill", nursery=nursery)
    except NoServer as e: pytest.skip(str(e))
    assert found.good, f"seed {seed}: {found.problems}"
    assert found.kills == len(steps) + 1 and found.fills > 0 and found.worst_protection_s <= 5.0


def test_a_part_that_fails_is_a_problem_and_the_figures_stay(tmp_path):
    class Barren:
        def bear(self, order): raise OSError("no more processes")
    found = run("sqlite", kills=1, seed=1, steps=(), keep=tmp_path / "kill", nursery=Barren())
    assert not found.good and "no more processes" in found.problems[0] and found.told()["seconds"] > 0


CAUGHT = {"no recovery": ("after fill", ("orphan", "state", "balance", "lost fill", "bare", "died")), "lazy intent": ("sent, not answered", ("orphan",)),
          "sent again": ("after intent", ("orphan", "duplicate")), "swallowed fill": ("after fill", ("lost fill", "balance", "state")),
          "random ids": ("after intent", ("can't be made again",)), "bare start": ("between fill and protection", ("bare",))}


@pytest.mark.parametrize("build", CAUGHT)
def test_a_broken_build_is_caught(tmp_path, nursery, build, monkeypatch):
    step, words = CAUGHT[build]
    monkeypatch.setattr(lives, "AGREED_S", 4.0)  # books that never agree are waited for in full, and a sound build needs 2.5 s
    found = run("sqlite", kills=0, seed=3, steps=(step,), broken=build, keep=tmp_path / "kill", nursery=nursery, first=True)
    assert not found.good and any(w in p for w in words for p in found.problems), found.problems


# ---- the judge itself, on books that are made up

ORDER = {"symbol": "AAAUSDT", "orderId": 1, "clientOrderId": "e1", "side": "BUY", "type": "LIMIT", "status": "FILLED", "origQty": "2", "executedQty": "2", "cummulativeQuoteQty": "200"}
TRADE = {"symbol": "AAAUSDT", "id": 7, "orderId": 1, "qty": "2", "price": "100", "commission": "0.002", "commissionAsset": "AAA"}
STOP = {"symbol": "AAAUSDT", "orderId": 2, "clientOrderId": "s1", "side": "SELL", "type": "STOP_LOSS", "status": "NEW", "origQty": "1.99", "executedQty": "0", "cummulativeQuoteQty": "0"}


def books(**change):
    return {"orders": [ORDER, STOP], "trades": [TRADE], "balances": {"USDT": {"free": "800", "locked": "0"}, "AAA": {"free": "0.008", "locked": "1.99"}}} | change


def rows(**change):
    fill = {"fill_id": "AAAUSDT-7", "client_id": "e1", "symbol": "AAAUSDT", "side": "BUY", "quantity": "2", "price": "100", "fee": "0.002", "fee_asset": "AAA"}
    return {"intents": [{"client_id": "e1", "symbol": "AAAUSDT", "purpose": "ENTRY"}, {"client_id": "s1", "symbol": "AAAUSDT", "purpose": "STOP"}],
            "orders": [{"client_id": "e1", "status": "FILLED", "filled": "2"}, {"client_id": "s1", "status": "ACCEPTED", "filled": "0"}], "fills": [fill],
            "verdicts": [{"symbol": "AAAUSDT", "time_ms": 0, "allowed": 1}], "state": [], "sessions": [{"id": "x", "balances": '{"USDT": "1000"}'}]} | change


def test_the_judge_is_content_with_two_books_that_agree():
    assert differences(books(), rows()) == [] and bare(books()) == {}


@pytest.mark.parametrize("theirs, ours, says", [
    (books(orders=[ORDER, ORDER | {"orderId": 3}, STOP]), rows(), "duplicate: two orders"),
    (books(orders=[ORDER, STOP, STOP | {"clientOrderId": "x9", "orderId": 9}]), rows(), "orphan"),
    (books(), rows(fills=[]), "lost fill"),
    (books(trades=[]), rows(), "invented fill"),
    (books(balances={"USDT": {"free": "799", "locked": "0"}, "AAA": {"free": "1.998", "locked": "0"}}), rows(), "balance: USDT"),
    (books(), rows(orders=[{"client_id": "e1", "status": "ACCEPTED", "filled": "0"}, {"client_id": "s1", "status": "ACCEPTED", "filled": "0"}]), "state: ENTRY"),
    (books(), rows(verdicts=[{"symbol": "AAAUSDT", "time_ms": 0, "allowed": 1}] * 2), "duplicate: 2 entries were allowed"),
    (books(orders=[ORDER]), rows(), "unknown at the venue"),
    (books(orders=[ORDER], time_ms=10**7), rows(orders=[{"client_id": "e1", "status": "FILLED", "filled": "2"}, {"client_id": "s1", "status": "UNKNOWN", "filled": "0"}]), "is UNKNOWN"),
    (books(), {}, "no tables")])
def test_the_judge_names_each_way_of_differing(theirs, ours, says):
    assert any(says in d for d in differences(theirs, ours)), differences(theirs, ours)


def test_the_judge_sees_coins_without_a_stop():
    assert bare(books(orders=[ORDER, STOP | {"type": "LIMIT_MAKER"}])) == {"AAAUSDT": Decimal("1.998")}


def test_the_judge_sees_a_sale_that_a_stop_would_have_spared():
    sale, stop = {"client_id": "x1", "purpose": "EXIT", "reason": "UNPROTECTED", "position_id": "e1"}, {"client_id": "s1", "purpose": "STOP", "position_id": "e1"}
    assert given_up({"intents": [sale]}) == {"x1"} and given_up({"intents": [stop, sale]}) == given_up({}) == set()


def test_every_named_step_of_the_issue_is_there():
    for word in ("before intent", "after intent", "after send", "after accept", "after partial fill", "between fill and protection", "during replace", "during exit"):
        assert any(s.startswith(word) for s in STEPS), word
    assert set(CAUGHT) == set(BROKEN)


# ---- two runners

def test_the_second_runner_on_a_ledger_is_refused(own_home, tmp_path):
    "Another home, the same ledger: 77, with process, host, since when and the way out; nothing is left behind."
    shared, first, second = tmp_path / "shared", tmp_path / "one", tmp_path / "two"
    shared.mkdir()
    def start(home):
        home.mkdir()
        (home / "bot.yaml").write_text(f"mode: paper\nstrategy: rules.crossover\nuniverse: {{symbols: [BTCUSDT]}}\ndata: {{source: synthetic, interval: 1m, pace_s: 0.2, history_bars: 100}}\n"
                                       f"storage: {{database_url: 'sqlite:///{shared}/ledger.db'}}\n")
        env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "BNML_HOME": str(home), "PYTHONPATH": str(source()), "IN_TEST": "1"}
        return subprocess.Popen([sys.executable, "-m", "bnml.runner", "--json"], cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    a = start(first)
    try:
        end = time.monotonic() + 40
        while not (first / "data/state/status.json").exists(): assert time.monotonic() < end and a.poll() is None, a.stderr.read(); time.sleep(0.05)
        b = start(second)
        _, err = b.communicate(timeout=40)
        said = [l for l in err.splitlines() if "another runner" in l]
        assert b.returncode == 77 and len(said) == 1, (b.returncode, err)
        assert f"process {a.pid} on " in said[0] and "since 20" in said[0] and "stop it first" in said[0] and "Traceback" not in err
        assert not list((second / "data").rglob("*.db")) and not list(second.rglob("*.db.lock"))
        a.kill()
        a.wait()
        c = subprocess.run([sys.executable, "-m", "bnml.runner", "--json", "--cycles", "1", "--config", str(second / "bot.yaml")], cwd=second, capture_output=True, text=True, timeout=60,
                           env={"PATH": "/usr/bin:/bin", "HOME": str(second), "BNML_HOME": str(second), "PYTHONPATH": str(source()), "IN_TEST": "1"})
        assert c.returncode == 0, c.stderr[-2000:]
    finally:
        if a.poll() is None: a.kill()
        a.communicate()
    assert sorted(p.name for p in shared.iterdir()) == ["ledger.db"]
