"Bybit and OKX by websocket: bars, prices and what happens to our orders, against a server on this machine that speaks as they do."
import asyncio
import time
from decimal import Decimal
from urllib.parse import urlsplit

import pytest

from bnml.core.clock import floor_ms
from bnml.domain.market import default_instrument
from bnml.domain.orders import Fill, OrderIntent, OrderType, Side, Status
from bnml.venue.ccxt import unified_socket
from bnml.venue.dialects import DIALECTS
from bnml.venue.orders import CcxtExecution
from bnml.venue.ports import OrderUpdate
from bnml.venue.unified import UnifiedWire
from bnml.venue.unified_market import UnifiedVenue
from bnml.venue.unified_streams import UnifiedMarketStream, UnifiedUserStream
from tests.foreign import Foreign
from tests.test_ccxt_orders import addresses
from tests.test_live import tape

MINUTE, SYMBOLS, WORDS = 60_000, ("SOLUSDT", "ETHUSDT"), {"key": "foreign-key-0123", "secret": "foreign-secret-4567", "password": "foreign-word-89"}
RULES = {s: default_instrument(s, 100.0) for s in SYMBOLS}


@pytest.fixture(params=("bybit", "okx"))
def venue(request):
    "Sixty minutes of two pairs, and thirty to come."
    start = floor_ms(int(time.time() * 1000), "1m")
    with Foreign(request.param, tape(start, [100 + k / 10 for k in range(30)], 60, SYMBOLS), RULES, {"USDT": Decimal(10_000)}, {WORDS["key"]: WORDS["secret"]}, password=WORDS["password"], start_ms=start + 5_000) as it:
        it.start = start
        yield it


def until(told, s=5.0):
    "Wait for something; its truth."
    end = time.monotonic() + s
    while not (found := told()) and time.monotonic() < end: time.sleep(0.01)
    return found


def line(venue, since_min=-1, **kw):
    "A line of bars that goes on after a minute."
    market = UnifiedVenue(venue.language, urls=venue.urls, gap_s=0)
    market.measure()
    return UnifiedMarketStream(market, RULES, "1m", dict.fromkeys(SYMBOLS, venue.start + since_min * MINUTE), venue.urls, **kw).start()


def minutes(bars, venue, n):
    "The next n bars by pair, as minutes since the start."
    got = [bars.get(timeout=3) for _ in range(n)]
    assert None not in got and bars.get(timeout=0.1) is None
    truth = {s: dict(zip(t[0].tolist(), t[1:, :].T.tolist())) for s in SYMBOLS for t in [venue.exchange.tape.klines(s, "1m", venue.clock.now(), venue.start - 60 * MINUTE, None, 1000)]}
    assert all([b.open, b.high, b.low, b.close, b.volume] == truth[b.symbol][b.open_time_ms][:5] for b in got)
    return {s: [(b.open_time_ms - venue.start) // MINUTE for b in got if b.symbol == s] for s in SYMBOLS}


@pytest.mark.parametrize("language", ("bybit", "okx"))
@pytest.mark.parametrize("testnet", (False, True))
def test_no_other_host_is_held(language, testnet):
    async def held():
        client = unified_socket(language, testnet, ("http://127.0.0.1:9001", "ws://127.0.0.1:9002", "ws://127.0.0.1:9003"), DIALECTS[language].intervals)
        try: return list(addresses(vars(client))), set(client.urls)
        finally: await client.close()
    found, kinds = asyncio.run(held())
    assert found and {urlsplit(a).hostname for a in found} == {"127.0.0.1"} and kinds == {"api"}, found


def test_bars_once_in_order_and_a_break_is_filled(venue):
    bars = line(venue, since_min=-4)
    try:
        assert until(lambda: bars.healthy and not bars.filling)
        assert minutes(bars, venue, 6) == dict.fromkeys(SYMBOLS, [-3, -2, -1])  # by REST
        for k in (1, 2): venue.jump(venue.start + k * MINUTE + 500)
        assert minutes(bars, venue, 4) == dict.fromkeys(SYMBOLS, [0, 1])
        asked = len([p for p, _ in venue.asked if "kline" in p or "candles" in p])
        venue.jump(venue.start + 3 * MINUTE + 500)
        assert minutes(bars, venue, 2) == dict.fromkeys(SYMBOLS, [2])
        assert len([p for p, _ in venue.asked if "kline" in p or "candles" in p]) == asked  # told, not asked for
        q = until(lambda: bars.quotes.get("SOLUSDT"))
        assert (q.bid, q.ask) == tuple(map(float, venue.exchange.touch("SOLUSDT")))
        venue.cut()
        venue.jump(venue.start + 6 * MINUTE + 500), bars.venue.measure()
        assert minutes(bars, venue, 6) == dict.fromkeys(SYMBOLS, [3, 4, 5]) and bars.breaks >= 1
        assert until(lambda: bars.healthy)
    finally: bars.stop()


def test_a_silent_line_is_dropped_and_prices_are_asked_for(venue):
    bars = line(venue, heartbeat_s=0.3)
    try:
        assert until(lambda: bars.healthy and bars.quotes)
        venue.mute = True
        assert until(lambda: not bars.healthy and bars.breaks, 4)
        assert bars.quotes == {} and bars.quote("SOLUSDT").bid == float(venue.exchange.touch("SOLUSDT")[0])
        venue.mute = False
        venue.cut()
        assert until(lambda: bars.healthy)
    finally: bars.stop()


def test_pongs_alone_are_silence(venue, monkeypatch):
    bars = line(venue, heartbeat_s=0.2, silent_s=0.8)
    try:
        assert until(lambda: bars.healthy)
        monkeypatch.setattr("tests.foreign_sockets.Socket.tell", lambda self: None)
        assert until(lambda: bars.breaks, 3)
    finally: bars.stop()


def test_a_fill_is_noticed_at_once_although_nobody_asks(venue):
    market = UnifiedVenue(venue.language, urls=venue.urls, gap_s=0, **WORDS)
    execution = CcxtExecution(UnifiedWire(market), poll_s=60, quiet_s=60)
    execution.stream = UnifiedUserStream(market, venue.urls).start()
    try:
        assert until(lambda: execution.stream.healthy)
        execution.submit(OrderIntent("b1", "SOLUSDT", Side.BUY, OrderType.LIMIT, Decimal("2"), Decimal("95"), position_id="p", created_ms=venue.clock.now(), reason="ENTRY"))
        end, events = time.monotonic() + 1.6, []
        while time.monotonic() < end: events += execution.drain(); time.sleep(0.01)
        assert [e.status for e in events if isinstance(e, OrderUpdate)] == [Status.ACCEPTED]
        asked = len(venue.asked)
        for _ in range(20): execution.drain(); time.sleep(0.01)
        assert len(venue.asked) == asked  # nothing happens, nothing is asked
        for t in venue.exchange.tickets.values(): assert t.open
        venue.price("SOLUSDT", 94, True)
        began, fills = time.monotonic(), []
        until(lambda: fills.extend(e for e in execution.drain() if isinstance(e, Fill)) or sum(f.quantity for f in fills) == 2, 3)
        assert time.monotonic() - began < 1 and sum(f.quantity for f in fills) == 2 and fills[0].client_id == "b1"
        execution.stream.take()
        venue.cut()
        assert until(lambda: execution.stream.breaks and None in execution.stream.take())
    finally: execution.stream.stop()


def test_a_wrong_key_is_no_healthy_line(venue):
    market = UnifiedVenue(venue.language, urls=venue.urls, gap_s=0, **WORDS | {"secret": "another"})
    stream = UnifiedUserStream(market, venue.urls).start()
    try: assert until(lambda: stream.breaks) and not stream.healthy and None in stream.take()
    finally: stream.stop()
