"The rehearsal venue over real HTTP and websockets, with ccxt as an independent client that knows Binance and not us."
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from decimal import Decimal
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import ccxt
import ccxt.pro
import numpy as np
import pytest
import websockets

from bnml.core.base import Refused, shared
from bnml.domain.market import default_instrument
from bnml.venue.faults import MARKET_FAULTS, REQUEST_FAULTS, STREAM_FAULTS
from bnml.venue.gate import Key, Meter
from bnml.venue.rehearsal import serve
from bnml.venue.wire import shape

HOUR, START, D = 3_600_000, 1_700_002_800_000 // 3_600_000 * 3_600_000, Decimal
SAMPLES = shared() / "data/api_samples" if shared() else None
needs_samples = pytest.mark.skipif(SAMPLES is None, reason="no recorded venue answers beside this checkout")
OPTIONS = {"defaultType": "spot", "fetchCurrencies": False, "fetchMargins": False, "fetchMarkets": {"types": ["spot"]}, "adjustForTimeDifference": True}


def stage(*bars, **options):
    "A rehearsal on bars of (open, high, low, close); the clock stands at the second one's open."
    o, h, l, c = (np.array(x, float)[:, None] for x in zip(*bars))
    panel = SimpleNamespace(symbols=("SOLUSDT",), interval="1h", times=START + np.arange(len(bars)) * HOUR, open=o, high=h, low=l, close=c, volume=np.full((len(bars), 1), 400.0))
    options = {"start_ms": START + HOUR, **options}
    return serve(panel, {"SOLUSDT": default_instrument("SOLUSDT", 100.0)}, {"USDT": D(1000), "SOL": D(10)}, {"KEY": Key("secret"), "READ": Key("secret", trade=False)}, **options)


QUIET = [(100, 101, 99, 100)] * 6
BARS = [(100, 101, 99, 100), (100, 104, 98, 103), (103, 104, 102, 103), (90, 91, 85, 88), (88, 89, 87, 88)]


def client(r, make=ccxt.binance, key="KEY", secret="secret"):
    "ccxt, with every address of it turned to the rehearsal."
    c = make({"apiKey": key, "secret": secret, "enableRateLimit": False, "timeout": 3000, "options": dict(OPTIONS)})
    def turned(x): return {k: turned(v) for k, v in x.items()} if isinstance(x, dict) else re.sub(r"^(http|ws)s?://[^/]+", lambda m: f"{m[1]}://{r.url[7:]}", x)
    c.urls["api"] = turned(c.urls["api"])
    return c


@pytest.fixture
def venue():
    with stage(*QUIET) as r: yield r


@pytest.fixture
def trader(venue):
    c = client(venue)
    c.load_time_difference()
    c.load_markets()
    return c


def placed(c, side="buy", type="limit", qty=1, price=99, **p): return c.create_order("SOL/USDT", type, side, qty, price if type == "limit" else None, p)


def test_ccxt_reads_the_market(trader):
    assert trader.fetch_ohlcv("SOL/USDT", "1h", limit=2)[0] == [START, 100, 101, 99, 100, 400]
    book = trader.fetch_order_book("SOL/USDT", 5)
    assert (book["bids"][0], book["asks"][0]) == ([99.995, 4], [100.005, 4])
    ticker, trades = trader.fetch_ticker("SOL/USDT"), trader.fetch_trades("SOL/USDT", limit=2)
    assert (ticker["last"], ticker["bid"], trades[-1]["price"]) == (100, 99.995, 100)
    market = trader.market("SOL/USDT")
    assert (market["precision"]["price"], market["precision"]["amount"], market["limits"]["cost"]["min"]) == (0.001, 0.01, 5)


def test_ccxt_trades_and_the_coins_add_up(trader, venue):
    resting = placed(trader, newClientOrderId="one")
    assert (resting["status"], trader.fetch_balance()["USDT"]) == ("open", {"free": 901, "used": 99, "total": 1000})
    edited = trader.edit_order(resting["id"], "SOL/USDT", "limit", "buy", 2, 98)
    assert [o["id"] for o in trader.fetch_open_orders("SOL/USDT")] == [edited["id"]] and edited["price"] == 98
    assert trader.cancel_order(edited["id"], "SOL/USDT")["status"] == "canceled"
    bought = placed(trader, type="market", qty=3)
    assert (bought["status"], bought["average"], bought["fees"]) == ("closed", 100.005, [{"currency": "SOL", "cost": 0.003}])
    ioc = placed(trader, qty=6, price=100.01, timeInForce="IOC")
    assert (ioc["status"], ioc["filled"]) == ("expired", 1)  # four were on the level, three were taken
    sold = placed(trader, side="sell", type="market", qty=2)
    paid = trader.create_market_buy_order_with_cost("SOL/USDT", 50)
    trades = trader.fetch_my_trades("SOL/USDT")
    assert {t["order"] for t in trades} == {bought["id"], ioc["id"], sold["id"], paid["id"]}
    want = {"SOL": D(10), "USDT": D(1000)}
    for t in (t["info"] for t in trades):
        sign = 1 if t["isBuyer"] else -1
        want["SOL"] += sign * D(t["qty"]); want["USDT"] -= sign * D(t["quoteQty"]); want[t["commissionAsset"]] -= D(t["commission"])
    assert {a: D(b["free"]) + D(b["locked"]) for a, b in venue.books()["balances"].items()} == want


@pytest.mark.parametrize("order, error", [
    (dict(qty=0.02), ccxt.BadRequest), (dict(qty=50), ccxt.InsufficientFunds), (dict(timeInForce="PO", price=101), ccxt.OrderImmediatelyFillable),
    (dict(side="sell", type="market", qty=0.001), ccxt.InvalidOrder), (dict(side="sell", price=99, stopPrice=120), ccxt.OrderImmediatelyFillable)])
def test_refusals_are_ccxts_own_errors(trader, venue, order, error):
    with pytest.raises(error): placed(trader, **order)
    assert not venue.books()["orders"]


def test_keys_and_time(trader, venue):
    for key, secret, error in (("KEY", "wrong", ccxt.AuthenticationError), ("nobody", "secret", ccxt.AuthenticationError)):
        with pytest.raises(error): client(venue, key=key, secret=secret).fetch_balance()
    reader = client(venue, key="READ")
    reader.load_time_difference()
    with pytest.raises(ccxt.AuthenticationError): placed(reader)
    assert reader.fetch_balance()["SOL"]["free"] == 10
    assert trader.sapi_get_account_apirestrictions()["enableWithdrawals"] is False
    venue.fault("clock_skew", skew_ms=60_000)
    with pytest.raises(ccxt.InvalidNonce): trader.fetch_balance()
    trader.load_time_difference()
    assert trader.fetch_balance()["SOL"]["free"] == 10


def test_an_id_is_unique_only_while_its_order_is_open(trader, venue):
    placed(trader, newClientOrderId="again")
    with pytest.raises(ccxt.InvalidOrder): placed(trader, newClientOrderId="again")
    for _ in range(2): placed(trader, type="market", newClientOrderId="twice")
    assert [o["clientOrderId"] for o in venue.books()["orders"]] == ["again", "twice", "twice"]
    with pytest.raises(ccxt.OrderNotFound): trader.cancel_order("77", "SOL/USDT")
    with pytest.raises(ccxt.OrderNotFound): trader.fetch_order("77", "SOL/USDT")


def oco(c, stop, limit=None, target=110):
    below = {"belowType": "STOP_LOSS", "belowStopPrice": stop} if limit is None else {"belowType": "STOP_LOSS_LIMIT", "belowStopPrice": stop, "belowPrice": limit, "belowTimeInForce": "GTC"}
    return c.private_post_orderlist_oco({"symbol": "SOLUSDT", "side": "SELL", "quantity": "4", "aboveType": "LIMIT_MAKER", "abovePrice": target, **below})


def states(r): return [(o["type"], o["status"], float(o["executedQty"])) for o in r.books()["orders"]]


def test_pairs_meet_the_market():
    with stage(*BARS) as r:
        c = client(r)
        c.load_time_difference()
        pair = oco(c, 99, target=106)
        assert pair["listOrderStatus"] == "EXECUTING" and c.fetch_balance()["SOL"]["used"] == 4
        r.jump(bars=1)
        assert states(r) == [("STOP_LOSS", "FILLED", 4), ("LIMIT_MAKER", "EXPIRED", 0)]
        c.load_time_difference()
        oco(c, 95, 94)
        r.jump(bars=2)  # from 103 to 90, past stop and limit: triggered, and no protection
        assert states(r)[2:] == [("STOP_LOSS_LIMIT", "NEW", 0), ("LIMIT_MAKER", "EXPIRED", 0)]
        c.load_time_difference()
        assert c.cancel_all_orders("SOL/USDT")[0]["info"]["orderReports"][0]["status"] == "CANCELED"


# what a fault does: the error that ccxt raises, and whether the order is in the books
OUTCOME = {"rate_limit": (ccxt.DDoSProtection, 0), "ban": (ccxt.DDoSProtection, 0), "server_error": (ccxt.ExchangeNotAvailable, 0), "busy": (ccxt.ExchangeError, 0),
           "unknown_executed": (ccxt.RequestTimeout, 1), "unknown_lost": (ccxt.RequestTimeout, 0), "unexpected_executed": (ccxt.OperationFailed, 1), "dropped": (ccxt.NetworkError, 1),
           "reset": (ccxt.NetworkError, 0), "empty": (None, 1), "cut": (None, 1), "slow": (ccxt.RequestTimeout, 1), "late": (ccxt.RequestTimeout, 1), "firewall": (ccxt.NetworkError, 0)}


def test_every_request_fault_has_its_outcome(trader, venue):
    assert set(OUTCOME) == set(REQUEST_FAULTS)
    trader.timeout = 300
    for n, (kind, (error, executed)) in enumerate(OUTCOME.items()):
        venue.fault(kind, step="send", wait_s=0.5)
        assert trader.fetch_balance()["SOL"]["free"] == 10, "a query meets no fault of sending"
        try:
            answer = placed(trader, qty=0.1, newClientOrderId=f"f{n}")
            assert error is None and not answer.get("id"), f"{kind}: ccxt made an order of {answer}"
        except ccxt.BaseError as e:
            assert error is not None and isinstance(e, error), f"{kind}: {type(e).__name__} {e}"
        except Exception as e:  # ccxt's own trap: an answer that is no JSON breaks its parser
            assert error is None, f"{kind}: {type(e).__name__} {e}"
        venue.jump(by_ms=0)
        assert sum(o["clientOrderId"] == f"f{n}" for o in venue.books()["orders"]) == executed, kind


@pytest.mark.parametrize("step, call", [("cancel", lambda c: c.cancel_order("1", "SOL/USDT")), ("query", lambda c: c.fetch_order("1", "SOL/USDT")), ("market", lambda c: c.fetch_ticker("SOL/USDT")),
                                        ("replace", lambda c: c.edit_order("1", "SOL/USDT", "limit", "buy", 1, 98))])
def test_faults_hit_the_step_they_name(trader, venue, step, call):
    placed(trader)
    venue.fault("dropped", step=step)
    with pytest.raises(ccxt.NetworkError): call(trader)
    first = venue.books()["orders"][0]["status"]
    assert first == ("CANCELED" if step in ("cancel", "replace") else "NEW")
    assert venue.books()["requests"][-1]["fault"] == "dropped"


def test_faults_of_the_market(trader, venue):
    assert {"partial_fill", "delayed_fill", "halt", "filter", "clock_skew"} == set(MARKET_FAULTS)
    venue.fault("partial_fill", fraction="0.5")
    assert placed(trader, type="market", qty=2)["filled"] == 1
    venue.fault("delayed_fill", delay_ms=60_000)
    late = placed(trader, type="market", qty=1, newClientOrderId="late")
    assert (late["status"], late["filled"]) == ("open", 0)
    venue.jump(by_ms=60_000)
    assert states(venue)[-1] == ("MARKET", "FILLED", 1)
    trader.load_time_difference()
    venue.fault("halt", symbol="SOLUSDT")
    with pytest.raises(ccxt.BaseError, match="Market is closed"): placed(trader)
    venue.tell("faults", "DELETE")
    venue.fault("filter", symbol="SOLUSDT", change={"min_notional": "50"})
    with pytest.raises(ccxt.BadRequest, match="NOTIONAL"): placed(trader, qty=0.4)
    venue.tell("faults", "DELETE")
    assert placed(trader, qty=0.4)["status"] == "open"


def test_weight_is_counted_and_a_ban_ends():
    with stage(*QUIET, meter=Meter(limit=100, patience=2, ban_ms=30_000)) as r:
        def status(path="/api/v3/exchangeInfo"):
            try:
                with urlopen(r.url + path) as a: return a.status, a.headers["x-mbx-used-weight-1m"]
            except HTTPError as e: return e.code, e.headers["Retry-After"] is not None
        assert [status() for _ in range(9)][3:] == [(200, "80"), (200, "100"), (429, True), (429, True), (418, True), (418, True)]
        r.jump(by_ms=60_000)
        assert status() == (200, "20")
        assert status("/api/v3/nothing")[0] == 404
        with pytest.raises(HTTPError, match="410"): urlopen(r.url + "/api/v3/userDataStream", data=b"")


def test_ccxt_pro_follows_account_and_market(venue):
    async def watch():
        c = client(venue, ccxt.pro.binance)
        try:
            await c.load_time_difference()
            await c.load_markets()
            async def told(coming, cause):
                task = asyncio.ensure_future(coming)
                while not task.done():
                    await asyncio.sleep(0.1)
                    if not task.done(): await asyncio.to_thread(cause)
                return task.result()
            def other(**p): return lambda: venue.tell("order", symbol="SOLUSDT", quantity="0.1", **p)
            (order, *_) = await told(c.watch_orders("SOL/USDT"), other(side="BUY", type="LIMIT", timeInForce="GTC", price="90"))
            assert (order["status"], order["price"], order["side"]) == ("open", 90, "buy")
            (trade, *_) = await told(c.watch_my_trades("SOL/USDT"), other(side="SELL", type="MARKET"))
            assert (trade["price"], trade["amount"], trade["fee"]["currency"]) == (99.995, 0.1, "USDT")
            balance = await told(c.watch_balance(), other(side="BUY", type="MARKET"))
            assert balance["USDT"]["used"] > 0
            own = await c.create_order_ws("SOL/USDT", "limit", "buy", 1, 95, {"newClientOrderId": "by-socket"})
            assert own["clientOrderId"] == "by-socket" and any(o["clientOrderId"] == "by-socket" for o in venue.books()["orders"])
            assert (await c.cancel_order_ws(own["id"], "SOL/USDT"))["status"] == "canceled"
            step = lambda: venue.jump(moments=1)
            candles = await told(c.watch_ohlcv_for_symbols([["SOL/USDT", "1h"]]), step)
            assert candles["SOL/USDT"]["1h"][-1][1] == 100
            assert (await told(c.watch_bids_asks(["SOL/USDT"]), step))["SOL/USDT"]["ask"] > 98
            assert (await told(c.watch_order_book("SOL/USDT", 100), step))["bids"][0][0] > 98
            venue.fault("ws_reset")
            with pytest.raises(ccxt.NetworkError): await asyncio.wait_for(c.watch_orders("SOL/USDT"), 3)
            await c.load_time_difference()
            (*_, back) = await told(c.watch_orders("SOL/USDT"), other(side="BUY", type="LIMIT", timeInForce="GTC", price="91"))
            assert back["status"] == "open"
        finally:
            await c.close()
    asyncio.run(watch())


def account_line(r):
    "The message that subscribes to the account."
    from bnml.venue.gate import sign, ws_payload
    p = {"apiKey": "KEY", "timestamp": str(r.tell(method="GET")["time_ms"])}
    return json.dumps({"id": "s", "method": "userDataStream.subscribe.signature", "params": p | {"signature": sign("secret", ws_payload(p))}})


async def heard(ws, seconds=0.25):
    "Every message that comes until it is quiet."
    out = []
    try:
        while True: out.append(json.loads(await asyncio.wait_for(ws.recv(), seconds)))
    except (TimeoutError, websockets.ConnectionClosed): return out


def test_a_jump_returns_after_everything_was_told():
    with stage(*BARS) as r:
        async def story():
            async with websockets.connect(f"{r.ws_url.removesuffix('/ws')}/stream?streams=solusdt@kline_1h/solusdt@trade") as market, websockets.connect(r.ws_api_url) as account:
                await account.send(account_line(r))
                assert json.loads(await account.recv())["result"] == {"subscriptionId": 0}
                await asyncio.to_thread(r.tell, "order", symbol="SOLUSDT", side="SELL", type="STOP_LOSS", quantity="1", stopPrice="99")
                now = await asyncio.to_thread(lambda: r.jump(bars=3))
                assert now >= START + 4 * HOUR
                rows = await heard(market)
                closed = [m["data"]["k"] for m in rows if m["stream"].endswith("kline_1h") and m["data"]["k"]["x"]]
                assert [(k["t"], float(k["c"])) for k in closed] == [(START + i * HOUR, c) for i, c in ((1, 103), (2, 103), (3, 88))]
                assert len({m["data"]["t"] for m in rows if m["stream"].endswith("trade")}) == 12  # 3 prices left of a bar, 4 of each of the next two, the open of the last
                told = [(m["event"]["e"], m["event"].get("x")) for m in await heard(account)]
                assert told.count(("executionReport", "TRADE")) == 1 and told[0] == ("executionReport", "NEW")
        asyncio.run(story())


def test_a_jump_waits_for_open_requests(trader, venue):
    venue.fault("slow", step="query", wait_s=0.6)
    answered = []
    asking = threading.Thread(target=lambda: answered.append(trader.fetch_balance()))
    asking.start()
    while not venue.tell(method="GET")["open_requests"]: time.sleep(0.01)
    venue.jump(bars=1)
    assert venue.tell(method="GET")["open_requests"] == 0
    asking.join(2)
    assert answered


def test_the_clock_runs_at_wall_speed_between_jumps(venue):
    def now(): return venue.tell(method="GET")["time_ms"]
    began, before, heard = time.monotonic(), now(), time.monotonic()
    time.sleep(0.3)
    asked, later, ended = time.monotonic(), now(), time.monotonic()
    assert asked - heard - 0.01 < (later - before) / 1000 < ended - began + 0.01  # however long an answer takes
    assert venue.jump(to_ms=START) >= before  # never back


def test_faults_of_the_streams(venue):
    async def events(kind, **values):
        async with websockets.connect(venue.ws_api_url) as ws:
            await ws.send(account_line(venue))
            await ws.recv()
            id = await asyncio.to_thread(lambda: venue.fault(kind, **values))
            def order(): venue.tell("order", symbol="SOLUSDT", side="BUY", type="MARKET", quantity="0.1")
            await asyncio.to_thread(order)
            out = [(m["event"]["e"][:4], m["event"].get("x", "")) for m in await heard(ws) if "event" in m]
            await asyncio.to_thread(lambda: venue.tell("faults", "DELETE"))
            try: await ws.ping()
            except websockets.ConnectionClosed: out.append("closed")
            return out
    new, trade, coins = ("exec", "NEW"), ("exec", "TRADE"), ("outb", "")
    want = {"duplicate": [new, new, trade, coins, coins], "reorder": [trade, new, coins, coins], "lost": [trade, coins, coins], "terminated": [("even", "")], "ws_silent": [], "ws_close": ["closed"], "ws_reset": ["closed"]}
    assert set(want) | {"ws_refuse"} == set(STREAM_FAULTS)
    for kind, expected in want.items(): assert asyncio.run(events(kind)) == expected, kind
    venue.fault("ws_refuse")
    async def connect():
        async with websockets.connect(venue.ws_url): return "in"
    with pytest.raises(websockets.InvalidStatus): asyncio.run(connect())
    assert asyncio.run(connect()) == "in"


def test_who_shouts_on_a_market_stream_is_shown_out(venue):
    async def shout():
        async with websockets.connect(venue.ws_url) as ws:
            for n in range(7): await ws.send(json.dumps({"method": "SUBSCRIBE", "params": ["solusdt@trade"], "id": n}))
            await heard(ws)
            return ws.close_code
    assert asyncio.run(shout()) == 1008


@needs_samples
def test_answers_have_the_shape_of_the_published_ones(trader, venue):
    def body(name): return json.loads((SAMPLES / f"nautilus/http_json/{name}_response.json").read_text())
    placed(trader, newClientOrderId="open")
    pairs = {"new_order_full": lambda: trader.private_post_order({"symbol": "SOLUSDT", "side": "BUY", "type": "MARKET", "quantity": "1"}), "order": lambda: trader.private_get_order({"symbol": "SOLUSDT", "origClientOrderId": "open"}),
             "open_orders": trader.private_get_openorders, "all_orders": lambda: trader.private_get_allorders({"symbol": "SOLUSDT"}), "account": trader.private_get_account,
             "account_trades": lambda: trader.private_get_mytrades({"symbol": "SOLUSDT"}), "klines": lambda: trader.public_get_klines({"symbol": "SOLUSDT", "interval": "1h"}),
             "depth": lambda: trader.public_get_depth({"symbol": "SOLUSDT"}), "trades": lambda: trader.public_get_trades({"symbol": "SOLUSDT"}), "book_ticker": lambda: trader.public_get_ticker_bookticker({"symbol": "SOLUSDT"}),
             "ticker_24hr": lambda: trader.public_get_ticker_24hr({"symbol": "SOLUSDT"}), "ticker_price": lambda: trader.public_get_ticker_price({"symbol": "SOLUSDT"}), "avg_price": lambda: trader.public_get_avgprice({"symbol": "SOLUSDT"}),
             "server_time": trader.public_get_time, "ping": trader.public_get_ping, "cancel_order": lambda: trader.private_delete_order({"symbol": "SOLUSDT", "origClientOrderId": "open"})}
    for name, ask in pairs.items():
        ask()
        ours, theirs = shape(json.loads(trader.last_http_response)), shape(body(name))
        assert ours == theirs, name


def test_only_this_machine_is_served():
    for host in ("0.0.0.0", "192.168.0.1", "example.org"):
        with pytest.raises(Refused, match="this machine only"): stage(*QUIET, host=host)


def test_the_command_opens_says_where_and_ends(tmp_path):
    words = [sys.executable, "-m", "bnml.cli", "rehearse", "--symbols", "SOLUSDT", "--port", "0", "--pace", "0.2", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "BNML_HOME": str(tmp_path)}) as p:
        try:
            text = ""
            while not text.rstrip().endswith("}"): text += p.stdout.readline() or pytest.fail(p.stderr.read())
            where = json.loads(text)
            assert {k for k in where if k.endswith("_url")} == {"rest_url", "ws_url", "ws_api_url", "control_url"}
            def now():
                with urlopen(where["rest_url"] + "/api/v3/time") as a: return json.load(a)["serverTime"]
            before = now()
            assert abs(before / 1000 - time.time()) < 3600
            time.sleep(0.6)
            assert now() - before > 60_000, "the pace jumps from close to close"
        finally:
            p.terminate()
            _, said = p.communicate(timeout=20)
        assert p.returncode == 0 and said.splitlines()[-1] == "the rehearsal is closed"


def test_the_runner_never_loads_it():
    code = ("import sys, bnml.runner, bnml.cli, bnml.ops.desk, bnml.trade.assembly\n"
            "print([m for m in sys.modules if m in ('fastapi', 'uvicorn', 'starlette') or m.startswith(('bnml.venue.rehearsal', 'bnml.venue.street', 'bnml.venue.exchange', 'bnml.venue.tape'))])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
