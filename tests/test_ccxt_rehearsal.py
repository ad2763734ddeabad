"ccxt against the rehearsal: every fault of a request met by every step of an order, streams that break, and the venue's own books as the judge."
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bnml.core.base import Refused, Retry, Unknown
from bnml.domain.orders import TERMINAL, Fill, OrderIntent, OrderType, Purpose, Side
from bnml.domain.portfolio import Portfolio, identity_gap
from bnml.trade.execution import ExecutionDesk
from bnml.trade.exits import ExitSettings
from bnml.trade.holding import Forgetful, guarded
from bnml.venue.binance import BinanceWire
from bnml.venue.ccxt import CcxtVenue
from bnml.venue.faults import REQUEST_FAULTS
from bnml.venue.orders import CcxtExecution
from bnml.venue.streams import MarketStream, UserStream
from tests.quiet import MINUTE, START, SYMBOL, D, VenueClock, purchase, served


@pytest.fixture
def stage():
    with served(SOL=D(1000)) as it: yield it


def door(stage, **kw): return CcxtVenue(rest_url=stage.url, gap_s=0, timeout_s=10, key="k", secret="s", **kw)


def plant(stage, venue, kind, **kw):
    "A fault; only where an answer comes too late is there little patience with it, for a busy machine may take its time."
    if kind == "late": venue.wire.venue._client.timeout = 400
    return stage.fault(kind, **kw)


def order(cid, kind="MARKET", side="BUY", qty="2", price=None, stop=None, **kw):
    return OrderIntent(cid, SYMBOL, Side(side), OrderType(kind), D(qty), price and D(price), stop and D(stop), position_id="p", **kw)


def pair(a, b):
    same = dict(side="SELL", qty="1", group=a)
    return order(a, "STOP", stop="95", purpose=Purpose.STOP, **same), order(b, "TARGET", price="110", purpose=Purpose.TARGET, **same)


STEPS = {"send": lambda v: v.submit(order("x1")), "send pair": lambda v: v.submit_oco(*pair("x1", "x2")), "cancel pair": lambda v: v.cancel("t"), "query": lambda v: v.drain()}


def agrees(venue, events, books):
    "Whether what we were told is what the venue has: no order twice, every state, every trade once."
    orders = {o["clientOrderId"]: o for o in books["orders"]}
    assert len(orders) == len(books["orders"])
    mine = {cid: (k.filled, k.status not in TERMINAL) for cid, k in venue._known.items() if cid in orders}
    theirs = {cid: (D(o["executedQty"]), o["status"] in ("NEW", "PARTIALLY_FILLED")) for cid, o in orders.items()}
    told = sorted((e.fill_id, e.quantity, e.fee) for e in events if isinstance(e, Fill))
    return mine == theirs and told == sorted((f"{SYMBOL}-{t['id']}", D(t["qty"]), D(t["commission"])) for t in books["trades"])


SILENT = ("unknown_executed", "unknown_lost", "dropped", "reset", "empty", "cut", "late")  # that leave a sender without an answer
PAIRS = [(kind, step) for kind in REQUEST_FAULTS for step in STEPS if kind in SILENT or step in ("send", "query")]


@pytest.mark.parametrize("kind, step", PAIRS)
def test_no_fault_doubles_or_loses(stage, kind, step):
    venue = CcxtExecution(BinanceWire(door(stage)), poll_s=0.05)
    venue.submit(order("rest", "LIMIT", price="90"))
    venue.submit(order("early"))
    venue.submit_oco(*pair("s", "t"))
    events = venue.drain()
    time.sleep(0.03)
    plant(stage, venue, kind, step=step.split()[0], wait_s=0.8)
    try: STEPS[step](venue)
    except (Retry, Unknown): pass
    for cid in ("x1", "x2"):
        if cid in venue._known:
            with pytest.raises(Refused): venue.submit(order(cid))
    settled, end = time.monotonic() + (1.0 if kind == "late" else 0.1), time.monotonic() + 20
    while time.monotonic() < settled or not agrees(venue, events, books := stage.books()):
        assert time.monotonic() < end, "our view and the venue's never agreed"
        events += venue.drain()
        time.sleep(0.03)
    assert any(r["fault"] == kind for r in books["requests"])
    assert sum(r["request"].startswith(("POST", "DELETE")) for r in books["requests"]) == 3 + (step != "query")  # nothing was sent again


@pytest.mark.parametrize("kind", ["", "unknown_executed", "dropped", "cut"])
def test_a_desk_trades_there(stage, kind):
    "Entry, pair, a part of the targets, the stop; every send but the first meets the fault."
    venue = CcxtExecution(BinanceWire(door(stage)), poll_s=0)
    start, closed = venue.balances(), []
    desk = ExecutionDesk(venue, Forgetful(), VenueClock(venue.wire), "rehearsed", ExitSettings(), MINUTE, closed.append)
    desk.at(START)
    if kind: plant(stage, venue, kind, step="send", times=2)
    h = desk.enter(*purchase())
    def settle(until):
        end = time.monotonic() + 20
        while not until():
            assert time.monotonic() < end
            desk.settle(), desk.ask()
    settle(lambda: guarded(h, desk.orders) and h.bare_ms is None)
    books = stage.books()
    assert sum(D(o["origQty"]) for o in books["orders"] if o["type"] == "STOP_LOSS") <= D("9.99") == h.quantity  # a tenth of a percent was the fee
    stage.tell("price", symbol=SYMBOL, price="104.5", gap=False)
    settle(lambda: len(desk.fills) >= 2)
    stage.tell("price", symbol=SYMBOL, price="80", gap=False)
    settle(lambda: closed)
    assert not venue.open_orders() and len(desk.fills) == len(stage.books()["trades"])
    assert identity_gap(start, desk.fills, Portfolio(venue.balances())) == {a: 0 for a in start}
    ids = [o["clientOrderId"] for o in stage.books()["orders"]]
    assert len(ids) == len(set(ids)) and set(ids) <= set(desk.orders)


def test_a_changed_filter_is_heard_of(stage):
    venue = CcxtExecution(BinanceWire(door(stage)))
    assert venue.instrument(SYMBOL).step == D("0.01")
    stage.fault("filter", symbol=SYMBOL, change={"step": "1", "min_qty": "1"})
    venue.submit(order("a", qty="1.5"))
    assert venue.drain()[0].reason == "LOT_SIZE" and venue.instrument(SYMBOL).step == 1
    stage.fault("halt", symbol=SYMBOL)
    venue.submit(order("b", qty="1"))
    assert venue.drain()[0].reason == "SYMBOL_STATUS" and venue.instrument(SYMBOL).status == "BREAK"


def test_a_skewed_clock_is_measured_again(stage):
    venue = CcxtExecution(BinanceWire(door(stage)))
    venue.balances()
    stage.fault("clock_skew", skew_ms=-60_000)
    assert venue.balances()["SOL"] == 1000
    venue.submit(order("a"))
    assert len(venue.drain()) == 2


# ---- streams

@pytest.fixture
def streams(stage):
    urls = (stage.url, stage.ws_url, stage.ws_api_url)
    venue = CcxtExecution(BinanceWire(door(stage)), poll_s=60, quiet_s=60)
    slow = door(stage)
    venue.stream = UserStream(slow, urls, heartbeat_s=0.5).start()
    bars = MarketStream(slow, {SYMBOL: venue.instrument(SYMBOL)}, "1m", {SYMBOL: START + 6 * MINUTE}, urls, heartbeat_s=0.5).start()
    wait(lambda: venue.stream.healthy and bars.healthy, 30)
    yield venue, bars
    venue.stream.stop()
    bars.stop()


def wait(until, seconds=10.0):
    "Until something holds."
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def told(venue, n, seconds=10.0):
    "The next n events, and none beyond."
    found = []
    wait(lambda: found.extend(venue.drain()) or len(found) >= n, seconds)
    time.sleep(0.15)
    return [e.fill_id if isinstance(e, Fill) else str(e.status) for e in found + venue.drain()]


def numbers(bars, n, seconds=10.0):
    "The next n bars, and none beyond."
    found = []
    wait(lambda: found.extend(b for b in [bars.get(0.05)] if b) or len(found) >= n, seconds)
    return [(b.open_time_ms - START) // MINUTE for b in found + [b for b in [bars.get(0.2)] if b]]


def test_what_streams_tell(stage, streams):
    venue, bars = streams
    assert numbers(bars, 3) == [7, 8, 9]  # what closed before we listened
    stage.jump(bars=2)
    assert numbers(bars, 2) == [10, 11] and bars.quotes[SYMBOL].bid < bars.quotes[SYMBOL].ask
    venue.submit(order("a", "LIMIT", price="90"))
    venue.submit_oco(*pair("s", "t"))
    assert told(venue, 3) == ["ACCEPTED"] * 3
    polls = sum(r["request"].startswith("GET /api/v3/o") for r in stage.books()["requests"])
    stage.tell("price", symbol=SYMBOL, price="89")
    assert sorted(told(venue, 3)) == ["CANCELED", "SOLUSDT-1", "SOLUSDT-2"]
    assert sum(r["request"].startswith("GET /api/v3/o") for r in stage.books()["requests"]) == polls  # by the stream alone


@pytest.mark.parametrize("kind", ["ws_close", "ws_reset", "ws_silent", "terminated"])
def test_a_break_loses_nothing(stage, streams, kind):
    venue, bars = streams
    numbers(bars, 3)
    venue.submit(order("a", "LIMIT", price="90"))
    told(venue, 1)
    before = venue.stream.breaks
    fault = stage.fault(kind)
    stage.tell("price", symbol=SYMBOL, price="89")  # nobody hears it
    stage.jump(bars=3)
    if kind == "ws_silent": wait(lambda: venue.stream.breaks > before and bars.breaks, 15); stage.tell("faults", "DELETE", id=fault)
    assert told(venue, 1, 30) == ["SOLUSDT-1"] and venue.stream.breaks > before
    assert numbers(bars, 3, 30) == [10, 11, 12]


def test_what_happens_while_the_line_is_down(stage, streams):
    "Asking right after the break is not enough: asked again once the line stands."
    venue, bars = streams
    bars.stop()
    venue.submit(order("a", "LIMIT", price="90"))
    told(venue, 1)
    stage.fault("ws_refuse", times=2)
    stage.fault("ws_close")
    wait(lambda: venue.stream.breaks == 3)
    assert venue.drain() == [] and not venue.stream.healthy
    stage.tell("price", symbol=SYMBOL, price="89")
    assert told(venue, 1, 30) == ["SOLUSDT-1"]


def test_events_twice_in_disorder_and_lost(stage, streams):
    venue, _ = streams
    for n, kind in enumerate(("duplicate", "reorder", "lost")):
        stage.fault(kind, times=2)
        venue.submit(order(f"a{n}", "LIMIT", price="90"))
        stage.tell("price", symbol=SYMBOL, price="89")
        if kind == "lost": time.sleep(0.2); venue._next = 0.0  # the round of questions that comes each half minute
        assert told(venue, 2) == ["ACCEPTED", f"SOLUSDT-{n + 1}"]
        stage.tell("faults", "DELETE")
        stage.tell("price", symbol=SYMBOL, price="100")


@pytest.mark.parametrize("kind, words", [("server_error", "Service Unavailable"), ("ban", "banned until"), ("unknown_lost", "-1007")])
def test_a_subscription_that_is_refused_is_asked_for_again(stage, streams, monkeypatch, kind, words):
    "The venue's own words are told, a ban stops every request of this machine, and a line that was calm before comes again at once."
    (venue, _), said = streams, []
    monkeypatch.setattr("bnml.venue.streams._log", SimpleNamespace(warning=lambda what, stream="", why="", **more: said.append(why), debug=lambda *a, **k: None))
    stage.fault(kind, step="stream", wait_s=2)
    stage.fault("ws_close")
    wait(lambda: any(words in why for why in said))
    with venue.stream.venue.governor._book() as b: assert (b["ban"] > time.time()) == (kind == "ban")
    assert not any("KeyError" in why for why in said)
    began = time.monotonic()
    wait(lambda: venue.stream.healthy)
    assert time.monotonic() - began < 5


def test_replay_needs_no_venue():
    "Neither ccxt nor a websocket is imported where no venue is asked."
    code = "import sys, bnml.runner, bnml.ops.desk; print([m for m in ('ccxt', 'ccxt.pro', 'aiohttp', 'bnml.venue.ccxt', 'bnml.venue.orders', 'bnml.venue.streams') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
