"Every lock of live trading closed alone, all others open, before an exchange on this machine that would take the order: 77, exactly that lock, nothing in the exchange's books."
import json
import os
import sys
import time
from dataclasses import dataclass, field

import pytest

from bnml.core.base import source
from bnml.ops.kill import engage
from bnml.ops.settings import load_settings
from bnml.ops.status import read_status, set_kill
from bnml.runner import main
from bnml.trade.ledger import Ledger
from bnml.venue.gate import Key
from tests import nursery
from tests.test_live import KEYS, OPEN, STRATEGY, SYMBOL, rehearse, settings

KEY = KEYS["EXCHANGE_API_KEY"]
# what cannot be arranged from outside: a full disk, and an exchange on this machine that counts as the venue's own
FULL = "import shutil, collections; shutil.disk_usage = lambda p: collections.namedtuple('u', 'total used free')(1, 1, 2**20)"
REAL = "import bnml.ops.evidence as e; e.rehearsing = lambda s: False"
RUN = "import runpy, sys; sys.argv = ['bnml.runner', *sys.argv[1:]]; runpy.run_module('bnml.runner', run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def stage():
    with rehearse() as it: yield it


@pytest.fixture(autouse=True)
def untouched(stage):
    "Whatever is refused, the venue never hears of an order; its keys and its market are as they were."
    yield
    assert stage.books()["orders"] == []
    stage.street.gate.keys.clear()
    stage.street.gate.keys[KEY] = Key(KEYS["EXCHANGE_API_SECRET"])
    stage.tell("faults", "DELETE")


@dataclass
class Case:
    "What is changed from a start that is open."
    closed: str                                      # the lock
    says: str = ""                                   # what is found
    env: dict = field(default_factory=dict)          # None = not set
    words: tuple = ("--mode", "live")
    more: dict = field(default_factory=dict)         # settings
    before: str = ""                                 # code in the runner's process, before it starts


def written(home, stage, case):
    own = json.loads(settings(stage))
    for name, value in case.more.items(): own[name] = {**own.get(name, {}), **value} if isinstance(value, dict) else value
    (home / "bot.yaml").write_text(json.dumps(own))
    (home / "steps.py").write_text(STRATEGY)


def started(home, case):
    "The runner's process."
    env = {k: v for k, v in os.environ.items() if k not in OPEN} | OPEN | {"BNML_HOME": str(home), "PYTHONPATH": str(home)} | case.env
    how = ["-c", f"{case.before}\n{RUN}"] if case.before else ["-m", "bnml.runner"]
    return nursery.start(*how, *case.words, "--json", cwd=source(), env={k: v for k, v in env.items() if v is not None})


def shut(err) -> list[str]:
    "The closed locks' lines."
    return [line.removeprefix("CLOSED").strip() for line in err.splitlines() if line.startswith("CLOSED")]


def refused(code, out, err, case):
    assert (code, out) == (77, "") and "Traceback" not in err, (code, out, err)
    assert f"mode=live is locked: {case.closed}" in err.splitlines(), err
    [line] = shut(err)
    assert line.startswith(case.closed + ": ") and case.says in line, err
    assert not any(v in err for v in KEYS.values())


LOCAL = {
    "PAPER_ONLY is 1": Case("PAPER_ONLY=0", "is 1", {"PAPER_ONLY": "1"}),
    "ALLOW_LIVE is odd": Case("ALLOW_LIVE=1", "is yes", {"ALLOW_LIVE": "yes"}),
    "the file says paper": Case("mode: live in the settings file", "says paper", more={"mode": "paper"}),
    "--mode is not said": Case("--mode live on the command", "says nothing", words=()),
    "exchange.testnet": Case("exchange.testnet: false", "is true", more={"exchange": {"testnet": True}}),
    "no models": Case("models verified", "1 of 1 are not ready", more={"strategy": "ml", "model": {"horizons": [5]}}),
    "the disk is full": Case("preflight", "only 1 MiB free", before=FULL),
    "no evidence": Case("evidence", "0 of 180 days", before=REAL),
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_lock_on_this_machine(own_home, stage, name):
    written(own_home, stage, LOCAL[name])
    process = started(own_home, LOCAL[name])
    out, err = process.communicate(timeout=60)
    refused(process.returncode, out, err, LOCAL[name])


def test_without_keys_their_line_comes_first_and_all_others_are_open(own_home, stage):
    written(own_home, stage, Case(""))
    process = started(own_home, Case("", env={"EXCHANGE_API_SECRET": None}))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 77 and shut(err) == [] and err.splitlines()[0] == "mode=live requires env vars: EXCHANGE_API_SECRET", err
    assert sum(line.startswith("open") for line in err.splitlines()) == 9


def test_the_kill_switch_in_its_file(own_home, stage):
    case = Case("kill switch released", "engaged (drill)")
    written(own_home, stage, case)
    set_kill(True, "drill")
    process = started(own_home, case)
    out, err = process.communicate(timeout=60)
    refused(process.returncode, out, err, case)


# ---- other ways to close the same locks, and what only the venue can open; the runner's own entry point, in this process

AGAIN = {
    "PAPER_ONLY is not set": Case("PAPER_ONLY=0", "not set, so 1", {"PAPER_ONLY": None}),
    "nothing is named": Case("preflight", "universe.symbols is empty", more={"universe": {"symbols": []}}),
    "a risk check is off": Case("preflight", "turns off WIDE_SPREAD", more={"risk": {"disable": ["WIDE_SPREAD"]}}),
    "an override without ALLOW_UNPROVEN": Case("evidence", "ALLOW_UNPROVEN=1", words=("--mode", "live", "--unproven", "drill"), before=REAL),
    "ALLOW_UNPROVEN without a reason": Case("evidence", "set promotion.override", {"ALLOW_UNPROVEN": "1"}, before=REAL),
}

def keyed(**may): return lambda stage: stage.street.gate.keys.update({KEY: Key(KEYS["EXCHANGE_API_SECRET"], **may)})


VENUE = {
    "an unknown key": (Case("key permissions", "does not know this key"), lambda stage: stage.street.gate.keys.clear()),
    "a read-only key": (Case("key permissions", "read-only"), keyed(trade=False)),
    "a key that may withdraw": (Case("key permissions", "the key may withdraw"), keyed(withdraw=True)),
    "a symbol that is not listed": (Case("symbols", "NOPEUSDT is not listed", more={"universe": {"symbols": [SYMBOL, "NOPEUSDT"]}}), lambda stage: None),
    "a symbol that is halted": (Case("symbols", f"{SYMBOL} is halted"), lambda stage: stage.fault("halt", symbol=SYMBOL, times=0)),
    "a clock that is wrong": (Case("clock", "more than exchange.max_clock_skew_s allows (70)", more={"exchange": {"max_clock_skew_s": 70.0}}), lambda stage: stage.fault("clock_skew", skew_ms=-300_000, times=0)),
}


@pytest.fixture
def runner(own_home, stage, monkeypatch, capsys):
    "The runner in this process: (exit code, stdout, stderr)."
    monkeypatch.syspath_prepend(str(own_home))
    def run(case):
        written(own_home, stage, case)
        for name, value in {**OPEN, **case.env}.items(): monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        if case.before: monkeypatch.setattr("bnml.ops.evidence.rehearsing", lambda s: False)
        code = main([*case.words, "--json"])
        return code, *capsys.readouterr()
    yield run
    sys.modules.pop("steps", None)


@pytest.mark.parametrize("name", AGAIN)
def test_a_lock_closed_in_another_way(runner, name): refused(*runner(AGAIN[name]), AGAIN[name])


def test_the_kill_switch_in_the_ledger_alone(own_home, stage, runner):
    written(own_home, stage, case := Case("kill switch released", "engaged (drill)"))
    engage(load_settings(), "drill")
    set_kill(False)
    refused(*runner(case), case)


@pytest.mark.parametrize("name", VENUE)
def test_a_lock_at_the_venue(runner, stage, monkeypatch, name):
    case, arrange = VENUE[name]
    if case.closed == "clock": monkeypatch.setattr("bnml.ops.preflight.rehearsing", lambda s: False)  # a rehearsal's clock may be any
    arrange(stage)
    refused(*runner(case), case)


def test_a_venue_that_does_not_answer_is_a_closed_lock(runner, stage):
    dead = "127.0.0.1:9"
    code, _, err = runner(Case("", more={"exchange": {"rest_url": f"http://{dead}", "ws_url": f"ws://{dead}/ws", "ws_api_url": f"ws://{dead}/ws-api/v3"}}))
    assert code == 77 and [line.split(":")[0] for line in shut(err)] == ["rehearsal", "venue answers"] and "can't be evaluated" in err, err


# ---- the override, through a real start

def test_an_override_starts_and_stands_in_the_ledger_and_on_every_screen(own_home, stage):
    case = Case("", env={"ALLOW_UNPROVEN": "1"}, words=("--mode", "live", "--unproven", "drill of the lock"), before=REAL)
    written(own_home, stage, case)
    process, end = started(own_home, case), time.monotonic() + 60
    try:
        while not (read_status()["alive"] and read_status()["pid"] == process.pid):
            assert time.monotonic() < end and process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        assert "LIVE WITHOUT EVIDENCE: OVERRIDDEN (drill of the lock); backtest: 0 of 180 days" in read_status()["warning"]
        process.terminate()
        out, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None: process.kill()
    assert process.returncode == 0 and "warning: LIVE WITHOUT EVIDENCE" in err, err
    with Ledger(None, json.loads(out)["session"]) as book: said = book.load_state("unproven")
    assert len(said) == 1 and said[0]["note"].startswith("OVERRIDDEN (drill of the lock)") and said[0]["time"].startswith("20")
