"A bar may last an hour: whoever waits for it hears an operator, shows that he lives, and goes when he is told."
import json
import os
import signal
import threading
import time

import pytest

from bnml.core.base import source
from bnml.core.clock import RealClock
from bnml.data.lake import Lake
from bnml.data.polling import PollingFeed
from bnml.data.synth_venue import SynthMarket
from bnml.ops.status import read_status, send, set_kill
from bnml.trade.ledger import Ledger
from tests.nursery import start


@pytest.fixture
def loop(own_home):
    "A runner on the synthetic market with bars of twenty seconds, waiting for its first one."
    env = {**os.environ, "BNML_HOME": str(own_home), "BNML__DATA__PACE_S": "20", "BNML__DATA__HISTORY_BARS": "200"}
    process = start("-m", "bnml.runner", "--mode", "mock", "--strategy", "rules.crossover", "--symbols", "BTCUSDT", "--json", cwd=source(), env=env)
    try:
        within(20, lambda: read_status()["alive"] or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        yield process
    finally:
        if process.poll() is None: process.kill()
        process.communicate()


def within(seconds: float, what):
    "The first true answer, and it must come in time."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what(): return found
        time.sleep(0.05)
    raise AssertionError(f"nothing came in {seconds} s; the status is {read_status()}")


def ended(process, seconds: float) -> dict:
    "What a runner says at its end, which must come in time and in order."
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert read_status()["alive"] is False and read_status()["running"] is False
    return json.loads(out)


def test_it_lives_listens_and_stops_between_two_bars(loop):
    ages = []
    for _ in range(13):
        ages.append(read_status()["age_s"])
        assert read_status()["alive"]
        time.sleep(0.25)
    assert max(ages) < 2.5 and read_status()["bars"] == 0 and 0 < read_status()["next_bar_s"] < 20
    send("pause")
    within(3, lambda: read_status()["paused"] and read_status()["state"] == "REDUCING")
    send("resume")
    send("close", "BTCUSDT")
    within(3, lambda: not read_status()["paused"] and read_status()["closing"] == ["BTCUSDT"])
    set_kill(True, "drill")
    within(3, lambda: read_status()["state"] == "HALTED" and read_status()["reasons"] == ["KILL_SWITCH"])
    send("stop")
    told = ended(loop, 3)
    assert (told["bars"], told["violations"]) == (0, 0)
    with Ledger(session=told["session"]) as book: assert book.load_state("closing") == ["BTCUSDT"]  # the next run sells it


def test_a_signal_ends_the_wait(loop):
    loop.send_signal(signal.SIGTERM)
    assert ended(loop, 3)["bars"] == 0


def live(tmp_path) -> PollingFeed:
    "A venue in this process on the wall clock; its bar closes at midnight."
    clock = RealClock()
    return PollingFeed(SynthMarket(["BTCUSDT"], clock), Lake(tmp_path / "lake"), ["BTCUSDT"], "1d", clock, history_bars=5)


@pytest.mark.parametrize("who", ["the one who waits", "another thread"])
def test_a_live_feed_asleep_stops_at_once(tmp_path, who):
    feed, looks = live(tmp_path), []
    feed.meanwhile = lambda left_s: looks.append(left_s) or (who == "the one who waits" and len(looks) == 2 and feed.stop())
    if who == "another thread": threading.Timer(1.2, feed.stop).start()
    began = time.monotonic()
    assert [kind for kind, _ in feed.events()] == ["open"]
    waits = [left for left in looks if left > 0]
    assert 1 <= time.monotonic() - began < 3 and len(waits) == 2 and 0.9 < waits[0] - waits[1] < 2
