"The live feed against the rehearsal venue: its stream closed, silent, repeated and torn, its clock jumping, and every bar there once and in order."
import threading
import time
from decimal import Decimal

import numpy as np
import pytest

from bnml.core.base import Retry
from bnml.data.lake import Lake
from bnml.data.panel import Panel
from bnml.data.stream import StreamFeed
from bnml.data.synth import synth_market
from bnml.domain.market import default_instrument
from bnml.venue.ccxt import CcxtVenue
from bnml.venue.clock import VenueClock
from bnml.venue.gate import Key
from bnml.venue.rehearsal import serve
from bnml.venue.streams import MarketStream

MINUTE, SYMBOLS = 60_000, ("BTCUSDT", "ETHUSDT", "SOLUSDT")
PAST = 30  # bars before the clock's time
WHOLE = Panel.from_frames(synth_market(SYMBOLS, "1m", "2025-03-01", "2025-03-01T04:00", 7), "1m")
LISTED = {s: default_instrument(s, float(WHOLE.close[0, j])) for j, s in enumerate(SYMBOLS)}
START = int(WHOLE.times[PAST])


@pytest.fixture
def stage():
    with serve(WHOLE, LISTED, {"USDT": Decimal(100_000)}, {"k": Key("s")}, start_ms=START + 1_000) as it: yield it


class Runner:
    "A feed on a thread of its own, and what it said."
    def __init__(self, stage, tmp_path, streaming=True, **kw):
        urls = (stage.url, stage.ws_url, stage.ws_api_url)
        venue = self.venue = CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=5)
        venue.measure()
        def lines(since): return MarketStream(venue, LISTED, "1m", since, urls, heartbeat_s=0.5)
        self.stage, self.events, self.looks, self.seen = stage, [], [], {}
        self.feed = StreamFeed(venue, Lake(tmp_path / "lake"), SYMBOLS, "1m", VenueClock(venue), lines if streaming else None, PAST, grace_s=0.2, straggler_s=1.0, **kw)
        self.feed.meanwhile = lambda left_s: self.looks.append(time.monotonic())
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def live(self):
        for kind, row in self.feed.events():
            self.events.append((kind, row, self.feed.late))
            if kind == "close": self.seen[row] = self.feed.panel.close[row].copy()

    def until(self, what, seconds=15.0):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"it did not happen: {self.events[-6:]}, {self.feed.health()}"
            time.sleep(0.02)

    def rows(self, n, seconds=15.0): self.until(lambda: sum(k == "close" for k, _, _ in self.events) >= n, seconds)

    def up(self): self.until(lambda: self.feed.stream and self.feed.stream.healthy and not self.feed.stream.filling and self.events, 30)

    def close(self):
        self.feed.stop()
        self.thread.join(15)
        assert not self.thread.is_alive()

    def agrees(self):
        "Every row opened and closed once, in order, and each as the tape has it."
        kinds = [(k, r) for k, r, _ in self.events]
        rows = sorted(self.seen)
        assert rows == list(range(PAST, PAST + len(rows)))
        assert kinds == [x for r in range(PAST, PAST + len(rows) + 1) for x in (("open", r), ("close", r))][: len(kinds)]
        tick = {s: float(i.tick) for s, i in LISTED.items()}
        for j, s in enumerate(SYMBOLS):
            np.testing.assert_allclose([self.seen[r][j] for r in rows], WHOLE.close[rows, j], atol=tick[s])
        return len(rows)


@pytest.fixture
def runner(stage, tmp_path):
    made = []
    def make(**kw):
        made.append(Runner(stage, tmp_path, **kw))
        return made[-1]
    yield make
    for r in made: r.close()


def test_bars_arrive_with_their_close_however_the_clock_runs(stage, runner):
    r = runner()
    r.up()
    assert r.feed.warmup_rows == PAST and not np.isnan(r.feed.panel.close[:PAST]).any()
    stage.jump(bars=1)
    began = time.monotonic()
    r.rows(1)
    assert time.monotonic() - began < 1.0  # a minute of the venue's time, and nobody slept through it
    stage.jump(bars=1)
    r.rows(2)
    assert [late for k, _, late in r.events if k == "close"] == [False, False]
    stage.jump(bars=5)
    r.rows(7)
    assert r.agrees() == 7
    quote, (price, _), book = r.feed.quote("BTCUSDT"), r.feed.last_trade("BTCUSDT"), r.feed.book("BTCUSDT")
    assert quote.bid < quote.ask and abs(price / quote.mid - 1) < 0.05 and book.bids[0][0] < book.asks[0][0] and r.feed.live
    until = r.venue.server_time_ms()
    r.until(lambda: abs(r.feed.clock.now_ms() - r.venue.server_time_ms()) < 1500 and r.feed.clock.now_ms() >= until)
    gaps = np.diff(r.looks)
    assert np.quantile(gaps, 0.95) < 0.2


@pytest.mark.parametrize("kind", ["ws_close", "ws_reset", "ws_silent"])
def test_a_broken_line_loses_no_bar(stage, runner, kind):
    r = runner()
    r.up()
    stage.jump(bars=1)
    r.rows(1)
    breaks = r.feed.stream.breaks
    stage.fault(kind)
    stage.jump(bars=5)  # five minutes of outage
    if kind == "ws_silent": r.until(lambda: r.feed.stream.breaks > breaks or len(r.seen) >= 6, 30)
    r.rows(6, 30)
    stage.tell("faults", "DELETE")
    r.up()
    stage.jump(bars=1)
    r.rows(7, 30)
    assert r.agrees() == 7
    lates = [late for k, _, late in r.events if k == "close"]
    assert not lates[0] and any(lates[1:5]) and not lates[-1]


def test_rest_alone_and_back_to_the_stream(stage, runner):
    stage.fault("ws_refuse", times=3)
    r = runner()
    r.until(lambda: r.events)
    stage.jump(bars=1)
    r.rows(1, 20)
    r.until(lambda: r.feed.stream.healthy, 30)
    stage.jump(bars=2)
    r.rows(3, 20)
    assert r.agrees() == 3


def test_repeated_and_lost_messages(stage, runner):
    r = runner()
    r.up()
    stage.fault("duplicate", step="market", times=500)
    stage.jump(bars=3)
    r.rows(3)
    stage.tell("faults", "DELETE")
    stage.fault("lost", step="market", symbol="ETHUSDT", times=8)  # two bars' messages of one symbol never come
    stage.jump(bars=2)
    r.rows(5, 20)
    assert r.agrees() == 5


def test_a_straggler_is_waited_for_and_filled_later(stage, runner):
    r = runner()
    r.up()
    real, deaf = r.venue.bars, [True]
    def bars(symbol, *a):
        if symbol == "SOLUSDT" and deaf[0]: raise Retry("SOLUSDT: no answer")
        return real(symbol, *a)
    r.venue.bars = bars
    stage.fault("lost", step="market", symbol="SOLUSDT", times=4)
    began = time.monotonic()
    stage.jump(bars=1)
    r.rows(1)
    assert 0.9 < time.monotonic() - began < 6 and np.isnan(r.seen[PAST]).tolist() == [False, False, True]
    deaf[0] = False
    stage.jump(bars=1)
    r.rows(2, 20)
    r.until(lambda: not np.isnan(r.feed.panel.close[PAST, 2]))
    np.testing.assert_allclose(r.feed.panel.close[PAST, 2], WHOLE.close[PAST, 2], atol=float(LISTED["SOLUSDT"].tick))
    assert r.feed.filled_late == 1 and not np.isnan(r.seen[PAST + 1]).any()


def test_a_venue_that_is_down_is_waited_for(stage, runner):
    r = runner(stale_after_bars=0.9)
    r.up()
    stage.fault("ws_close")
    stage.fault("ws_refuse", times=1000)
    stage.fault("server_error", times=1000)
    r.until(lambda: not r.feed.stream.healthy)
    r.venue._time.told(int(WHOLE.times[PAST]) + 2 * MINUTE)  # time passes, and nobody answers
    r.until(lambda: r.feed.health()["stale"])
    assert not any(k == "close" for k, _, _ in r.events)
    stage.tell("faults", "DELETE")
    stage.jump(bars=4)
    r.rows(4, 40)
    r.until(lambda: not r.feed.health()["stale"])
    assert r.agrees() == 4
