"Live trading is locked: every lock is named, the exit code is 77, and nothing is asked of the network."
import os

import pytest

from bnml.cli import main
from bnml.core.base import source
from tests.nursery import run

OPEN = {"PAPER_ONLY": "0", "ALLOW_LIVE": "1", "EXCHANGE_API_KEY": "key-key-key", "EXCHANGE_API_SECRET": "secret-secret"}
# any socket to another machine ends the process with a code of its own
SPY = """
import runpy, socket, sys
def no(*a, **k):
    print("NETWORK", a, file=sys.stderr); sys.stderr.flush(); import os; os._exit(99)
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = no
sys.argv = ["bnml.runner", *sys.argv[1:]]
runpy.run_module("bnml.runner", run_name="__main__", alter_sys=True)
"""


def runner(*words, env=None):
    clean = {k: v for k, v in os.environ.items() if k not in OPEN and k != "IN_TEST"}
    done = run("-c", SPY, *words, cwd=source(), env={**clean, **(env or {})}, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_live_without_keys_says_the_agreed_line_and_every_other_lock():
    code, out, err = runner("--mode", "live")
    lines = err.splitlines()
    assert (code, out) == (77, "") and "NETWORK" not in err, err
    assert lines[0] == "mode=live requires env vars: EXCHANGE_API_KEY, EXCHANGE_API_SECRET"
    for lock in ("PAPER_ONLY=0", "ALLOW_LIVE=1", "mode: live in the settings file", "--mode live on the command", "exchange.testnet: false",
                 "models verified", "preflight", "kill switch released"):
        assert any(lock in line for line in lines[1:]), lock


@pytest.mark.parametrize("without", [*OPEN, "file", "kill"])
def test_one_shut_lock_is_enough(without, own_home):
    mode = "paper" if without == "file" else "live"
    (own_home / "bot.yaml").write_text(f"mode: {mode}\nstrategy: rules.crossover\nuniverse: {{symbols: [BTCUSDT]}}\n")
    if without == "kill":
        assert main(["kill-switch", "engage"]) == 0
    code, _, err = runner("--mode", "live", env={k: v for k, v in OPEN.items() if k != without})
    assert code == 77 and "NETWORK" not in err and "Traceback" not in err, err
    assert "CLOSED" in err or err.startswith("mode=live requires env vars: ")


def test_testnet_wants_keys_and_the_test_network():
    code, _, err = runner("--mode", "testnet")
    assert code == 77 and err.splitlines()[0] == "mode=testnet requires env vars: EXCHANGE_API_KEY, EXCHANGE_API_SECRET", err
