"A home of its own for every test, and no way out of the machine."
import os
import secrets
import socket

import pytest

LOOPBACK = ("127.", "::1", "localhost")


def pytest_configure(config):
    "One fresh seed a run, the same for every worker."
    os.environ.setdefault("BNML_SEED", str(secrets.randbelow(2**32)))


# the files that take longest: each worker takes a file at a time, and one that comes last leaves the other worker without work
LONG = ("reports", "kill", "training", "leaks", "live", "ccxt_rehearsal", "machine", "long_replay", "panel_browser", "bad_input", "cli", "drift", "retrain", "search", "models",
        "stream_feed", "adversary", "honest_scores", "drill", "schedule", "rehearsal", "gaps", "ccxt_orders", "foreign", "engine", "violations", "overfit", "conformance", "floors",
        "arena", "config", "context", "walk_forward", "waiting", "live_locks", "ledger_faults", "broken_builds")


def pytest_collection_modifyitems(items):
    "Long files first (xdist hands them out in this order, see the Makefile)."
    place = {f"test_{name}": n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"the fresh seed of this run; repeat it with BNML_SEED={os.environ['BNML_SEED']}")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "Tests never write into the checkout's data or reports."
    monkeypatch.setenv("BNML_HOME", str(tmp_path))
    monkeypatch.setenv("IN_TEST", "1")
    for name in [n for n in os.environ if n.startswith("BNML__")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def no_outside():
    "Any connection to another machine fails the test that tried it."
    real = socket.socket.connect

    def connect(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        if not str(host).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {host}: tests stay on this machine")
        return real(self, address)

    socket.socket.connect = connect
    yield
    socket.socket.connect = real
