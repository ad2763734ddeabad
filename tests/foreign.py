"""Bybit v5 and OKX v5 on this machine (their websockets: foreign_sockets), as far as their public documentation shows a spot market and an account's orders.

Both languages stand before one exchange (that of the rehearsal): requests are proved by their signatures, answered from new to old, and told of a candle that is still forming. A pair has
a perpetual contract of the same name beside it, at another price, which nobody who trades spot may ever be told."""
import base64
import hashlib
import hmac
import json
import threading
from datetime import datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from urllib.parse import parse_qsl, urlsplit

from bnml.core.clock import interval_ms
from bnml.domain.plan import FeeModel
from bnml.venue.exchange import Exchange, read_order
from bnml.venue.street import VenueClock
from bnml.venue.tape import Moment, Tape
from bnml.venue.wire import ApiError, FillRule, Params, num
from tests.foreign_sockets import SOCKETS, Socket

D = Decimal
BYBIT_BARS = {"1": "1m", "3": "3m", "5": "5m", "15": "15m", "30": "30m", "60": "1h", "120": "2h", "240": "4h", "360": "6h", "720": "12h", "D": "1d", "W": "1w"}
OKX_BARS = {"1m": "1m", "3m": "3m", "5m": "5m", "15m": "15m", "30m": "30m", "1H": "1h", "2H": "2h", "4H": "4h", "6Hutc": "6h", "12Hutc": "12h", "1Dutc": "1d", "1Wutc": "1w"}
REFUSALS = {  # the exchange's words → the codes and words of the two languages
    "insufficient balance": ((170131, "Insufficient balance."), ("51008", "Order failed. Insufficient USDT balance in account")),
    "LOT_SIZE": ((170136, "Order quantity lower than the minimum."), ("51020", "Your order should meet or exceed the minimum order amount")),
    "NOTIONAL": ((170140, "Order value exceeded lower limit."), ("51020", "Your order should meet or exceed the minimum order amount")),
    "PRICE_FILTER": ((170134, "Order price decimal too long."), ("51006", "Order price is not within the price limit")),
    "Duplicate": ((170141, "Duplicate clientOrderId"), ("51016", "Client order ID already exists.")),
    "closed": ((170151, "Order type is not available for the moment"), ("51021", "Contract is pending list"))}


class No(Exception):
    "A refusal in the venue's words."
    def __init__(self, code, words): self.code, self.words = code, words


class Foreign:
    "A venue behind HTTP, with controls in this process."
    def __init__(self, language, panel, instruments, balances, keys, password="word", start_ms=None, fees=FeeModel(0.001, 0.001, "base"), spread_bps=1.0):
        tape = Tape(panel, dict(instruments))
        self.language, self.keys, self.password, self.rights = language, dict(keys), password, {"trade": True, "withdraw": False, "ip": ""}
        self.clock, self.lock, self.asked, self.down = VenueClock(tape.first_ms if start_ms is None else start_ms), threading.RLock(), [], []
        self.sockets, self.mute = [], False  # open websockets; do they say nothing, not even a pong
        self.exchange = Exchange(tape, instruments, balances, fees, spread_bps, start_ms=self.clock.now())
        self.exchange.advance(self.clock.now())
        self.speak = {"bybit": Bybit, "okx": Okx}[language](self)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"venue": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.urls = (self.url, self.url.replace("http", "ws"), self.url.replace("http", "ws"))

    def __enter__(self): return self

    def __exit__(self, *_): self.close()

    def close(self): self.cut(); self.server.shutdown(); self.server.server_close()

    def cut(self):
        "End every websocket without a word."
        for s in list(self.sockets): s.over = True

    def jump(self, to_ms):
        "Let market time pass."
        with self.lock:
            self.clock.jump(to_ms)
            self.exchange.advance(self.clock.now())

    def price(self, symbol, price, gap):
        "The market trades at a price, now."
        with self.lock:
            x = self.exchange
            x.advance(self.clock.now())
            x.happen(Moment(x.now_ms, symbol, D(str(price)), gap, float(x.size[symbol] / x.share / (3 * x.tape.steps + 1)), x.seen[symbol], False))

    def part(self, fraction):
        "The next fill comes in part."
        self.exchange.rules.append(rule := FillRule(fraction=D(fraction)))
        return rule

    def whole(self, rule):
        "Fills are whole again."
        if rule in self.exchange.rules: self.exchange.rules.remove(rule)

    def place(self, side, kind, symbol, qty, price, tif, client_id):
        "A new order; raises No."
        words = {"symbol": symbol, "side": side.upper(), "type": kind.upper(), "quantity": qty, "newClientOrderId": client_id}
        if kind.upper() == "LIMIT": words |= {"price": price, "timeInForce": tif}
        if client_id in self.exchange.by_client: self.refuse("Duplicate")
        try: return self.exchange.place(read_order(Params(words), self.exchange.new_client_id))
        except ApiError as e: self.refuse(e.msg)

    def cancel(self, client_id):
        "Withdraw; raises KeyError for what is not open."
        t = next(t for t in self.exchange.by_client[client_id] if t.open) if any(t.open for t in self.exchange.by_client.get(client_id, ())) else None
        if t is None: raise KeyError(client_id)
        self.exchange.cancel(t, "c")
        return t

    def refuse(self, words):
        found = next((v for k, v in REFUSALS.items() if k in words), ((170130, words), ("51000", words)))
        raise No(*found[self.language == "okx"])

    def candles(self, symbol, interval, first, last, most):
        "The newest `most` candles that open in [first, last], from new to old, the forming one among them: (row, is it over)."
        now, step = self.clock.now(), interval_ms(interval)
        found = self.exchange.tape.klines(symbol, interval, now, int(first), min(int(last), now), 1_000_000).T.tolist()
        return [([str(int(t)), *map(num, v)], int(t) + step <= now) for t, *v in found if first <= t <= last][-most:][::-1]

    def levels(self, symbol, way, n, extra=()): return [[num(p), num(q), *extra] for p, q in islice(self.exchange.levels(symbol, way), n)]

    def named(self, symbol): return symbol if symbol in self.exchange.last else None


class Handler(BaseHTTPRequestHandler):
    "HTTP around a venue."
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_): pass

    def do_GET(self):
        if self.headers.get("Upgrade", "").lower() == "websocket": return Socket(self, self.venue, urlsplit(self.path).path, SOCKETS[self.venue.language]).serve()
        self.reply(urlsplit(self.path).query)

    def do_POST(self): self.reply(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())

    def reply(self, raw):
        v, path = self.venue, urlsplit(self.path).path
        words = dict(parse_qsl(raw)) if self.command == "GET" else json.loads(raw or "{}")
        with v.lock:
            v.asked.append((path, words))
            v.exchange.advance(v.clock.now())
            body = v.down.pop(0) if v.down else self.control() if path == "/control" else v.speak.answer(self.command, path, words, raw, self.headers, self.path)
        out = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def control(self): return {"ends_ms": 0, "faults": [], "symbols": list(self.venue.exchange.tape.symbols)}


def ms(t): return str(t)


class Bybit:
    "Version 5, category spot."
    def __init__(self, venue): self.v = venue

    def answer(self, method, path, q, raw, head, _):
        stamp = self.v.clock.now()
        try:
            if method == "POST" or path.startswith(("/v5/order", "/v5/execution", "/v5/account", "/v5/user")): self.prove(raw, head)
            return {"retCode": 0, "retMsg": "OK", "result": getattr(self, path.removeprefix("/v5/").replace("/", "_").replace("-", "_"))(q), "retExtInfo": {}, "time": stamp}
        except No as e: return {"retCode": e.code, "retMsg": e.words, "result": {}, "retExtInfo": {}, "time": stamp}

    def prove(self, raw, head):
        key, at, window = (head.get(f"X-BAPI-{n}", "") for n in ("API-KEY", "TIMESTAMP", "RECV-WINDOW"))
        if key not in self.v.keys: raise No(10003, "API key is invalid.")
        signed = hmac.new(self.v.keys[key].encode(), f"{at}{key}{window}{raw}".encode(), hashlib.sha256).hexdigest()
        if signed != head["X-BAPI-SIGN"]: raise No(10004, "error sign! please check your signature generation algorithm.")
        if not self.v.clock.now() - int(window) <= int(at) < self.v.clock.now() + 1000: raise No(10002, "invalid request, please check your server timestamp or recv_window param.")

    def spot(self, q):
        if q.get("category", "linear") != "spot": raise No(10001, "this is a contract")
        if "symbol" in q and not self.v.named(q["symbol"]): raise No(10001, "Not supported symbols")

    def market_time(self, q): return {"timeSecond": str(self.v.clock.now() // 1000), "timeNano": f"{self.v.clock.now()}000000"}

    def market_instruments_info(self, q):
        self.spot(q)
        return {"category": "spot", "list": [{"symbol": i.symbol, "baseCoin": i.base, "quoteCoin": i.quote, "innovation": "0", "status": "Trading" if i.status == "TRADING" else "Closed", "marginTrading": "none",
                "lotSizeFilter": {"basePrecision": num(i.step), "quotePrecision": "0.0000001", "minOrderQty": num(i.min_qty), "maxOrderQty": num(i.max_qty), "minOrderAmt": num(i.min_notional), "maxOrderAmt": "8000000"},
                "priceFilter": {"tickSize": num(i.tick)}} for i in self.v.exchange.instruments.values()]}

    def market_kline(self, q):
        self.spot(q)
        first, last = int(q.get("start", 0)), int(q.get("end", 1 << 52))
        return {"category": "spot", "symbol": q["symbol"], "list": [[*row, "0"] for row, _ in self.v.candles(q["symbol"], BYBIT_BARS[q["interval"]], first, last, int(q.get("limit", 200)))]}

    def market_tickers(self, q):
        self.spot(q)
        return {"category": "spot", "list": [self.ticker(s) for s in self.v.exchange.tape.symbols if q.get("symbol", s) == s]}

    def ticker(self, s):
        (bid, bids), (ask, asks) = (self.v.levels(s, way, 1)[0] for way in ("SELL", "BUY"))
        return {"symbol": s, "bid1Price": bid, "bid1Size": bids, "ask1Price": ask, "ask1Size": asks, "lastPrice": num(self.v.exchange.last[s]), "turnover24h": num(self.v.exchange.tape.day(s, self.v.clock.now())["worth"])}

    def market_orderbook(self, q):
        self.spot(q)
        n = int(q.get("limit", 1))
        return {"s": q["symbol"], "b": self.v.levels(q["symbol"], "SELL", n), "a": self.v.levels(q["symbol"], "BUY", n), "ts": self.v.clock.now(), "u": 1, "seq": 1}

    def market_recent_trade(self, q):
        self.spot(q)
        found = self.v.exchange.tape.trades(q["symbol"], self.v.clock.now(), int(q.get("limit", 60)))
        return {"category": "spot", "list": [{"execId": ms(m.number), "symbol": q["symbol"], "price": num(m.price), "size": num(m.volume), "side": "Buy", "time": ms(m.time_ms), "isBlockTrade": False} for m in found[::-1]]}

    def user_query_api(self, q):
        may = self.v.rights
        return {"readOnly": int(not may["trade"]), "permissions": {"Spot": ["SpotTrade"], "Wallet": ["AccountTransfer", *["Withdraw"] * may["withdraw"]]}, "ips": [may["ip"] or "*"], "unified": 0, "uta": 1}

    def account_info(self, q): return {"marginMode": "REGULAR_MARGIN", "unifiedMarginStatus": 6}

    def account_wallet_balance(self, q):
        x = self.v.exchange
        return {"list": [{"accountType": "UNIFIED", "coin": [{"coin": a, "walletBalance": num(n), "locked": num(x.locked(a)), "availableToWithdraw": ""} for a, n in x.account.total.items()]}]}

    def order_create(self, q):
        self.spot(q)
        if q["orderType"] == "Market" and q.get("marketUnit") != "baseCoin" and q["side"] == "Buy": raise No(10001, "a market purchase here is counted in base coins")
        t = self.v.place(q["side"], q["orderType"], q["symbol"], q["qty"], q.get("price"), q.get("timeInForce", "GTC"), q["orderLinkId"])
        return {"orderId": str(t.id), "orderLinkId": t.client_id}

    def order_cancel(self, q):
        try: t = self.v.cancel(q["orderLinkId"])
        except KeyError: raise No(170213, "Order does not exist.") from None
        return {"orderId": str(t.id), "orderLinkId": t.client_id}

    def row(self, t):
        state = {"NEW": "New", "PARTIALLY_FILLED": "PartiallyFilled", "FILLED": "Filled", "CANCELED": "Cancelled" if not t.filled else "PartiallyFilledCanceled", "EXPIRED": "Cancelled"}[t.status]
        return {"orderId": str(t.id), "orderLinkId": t.client_id, "symbol": t.symbol, "price": num(t.price or 0), "qty": num(t.qty), "side": t.side.capitalize(), "orderType": t.type.capitalize(), "orderStatus": state,
                "avgPrice": num(t.worth / t.filled) if t.filled else "", "leavesQty": num(t.rest), "cumExecQty": num(t.filled), "cumExecValue": num(t.worth), "timeInForce": t.tif, "marketUnit": "baseCoin",
                "createdTime": ms(t.time_ms), "updatedTime": ms(t.updated_ms)}

    def rows(self, q, open_):
        self.spot(q)
        found = [t for t in self.v.exchange.tickets.values() if t.open == open_ and q.get("symbol", t.symbol) == t.symbol and q.get("orderLinkId", t.client_id) == t.client_id]
        return {"category": "spot", "list": [self.row(t) for t in found][::-1][: int(q.get("limit", 20))], "nextPageCursor": ""}

    def order_realtime(self, q): return self.rows(q, True)

    def order_history(self, q): return self.rows(q, False)

    def execution_list(self, q):
        t = self.v.exchange.tickets[int(q["orderId"])]
        return {"category": "spot", "list": [{"symbol": t.symbol, "orderId": str(t.id), "orderLinkId": t.client_id, "side": t.side.capitalize(), "execId": str(x.id), "execPrice": num(x.price), "execQty": num(x.qty), "execFee": num(x.fee),
                "feeCurrency": x.fee_asset, "execType": "Trade", "execTime": ms(x.time_ms), "isMaker": x.maker} for x in t.trades][::-1], "nextPageCursor": ""}


class Okx:
    "Version 5, SPOT."
    def __init__(self, venue): self.v = venue

    def answer(self, method, path, q, raw, head, whole):
        try:
            if path.startswith(("/api/v5/trade", "/api/v5/account")): self.prove(method, whole, raw if method == "POST" else "", head)
            name = path.removeprefix("/api/v5/").replace("/", "_").replace("-", "_")
            return {"code": "0", "msg": "", "data": getattr(self, f"{method.lower()}_{name}" if name == "trade_order" else name)(q)}
        except No as e:
            whole_order = path.startswith("/api/v5/trade") and method == "POST"
            return {"code": "1", "msg": "All operations failed", "data": [{"clOrdId": q.get("clOrdId", ""), "ordId": "", "sCode": e.code, "sMsg": e.words}]} if whole_order else {"code": e.code, "msg": e.words, "data": []}

    def prove(self, method, path, body, head):
        key, at, word = (head.get(f"OK-ACCESS-{n}", "") for n in ("KEY", "TIMESTAMP", "PASSPHRASE"))
        if key not in self.v.keys: raise No("50111", "Invalid OK-ACCESS-KEY")
        if word != self.v.password: raise No("50105", "OK-ACCESS-PASSPHRASE incorrect")
        signed = base64.b64encode(hmac.new(self.v.keys[key].encode(), f"{at}{method}{path}{body}".encode(), hashlib.sha256).digest()).decode()
        if signed != head["OK-ACCESS-SIGN"]: raise No("50113", "Invalid Sign")
        if abs(datetime.fromisoformat(at).timestamp() * 1000 - self.v.clock.now()) > 30_000: raise No("50102", "Timestamp request expired")

    def symbol(self, q):
        s = q["instId"].replace("-", "")
        if q["instId"].count("-") != 1 or not self.v.named(s): raise No("51001", "Instrument ID does not exist")
        return s

    def name(self, s): return f"{self.v.exchange.instruments[s].base}-{self.v.exchange.instruments[s].quote}"

    def public_time(self, q): return [{"ts": ms(self.v.clock.now())}]

    def public_instruments(self, q):
        assert q["instType"] == "SPOT", "only spot is asked for"
        return [{"instType": "SPOT", "instId": self.name(i.symbol), "baseCcy": i.base, "quoteCcy": i.quote, "tickSz": num(i.tick), "lotSz": num(i.step), "minSz": num(i.min_qty), "maxLmtSz": num(i.max_qty), "maxMktSz": "1000000",
                 "state": "live" if i.status == "TRADING" else "suspend"} for i in self.v.exchange.instruments.values()]

    def bars(self, q, most, oldest):
        s, now, bar = self.symbol(q), self.v.clock.now(), OKX_BARS[q["bar"]]
        first, last = max(int(q.get("before", -1)) + 1, now - oldest * interval_ms(bar)), int(q.get("after", 1 << 52)) - 1  # neither moment is included
        return [[*row, "0", "0", "1" if over else "0"] for row, over in self.v.candles(s, bar, first, last, min(int(q.get("limit", 100)), most))]

    def market_candles(self, q): return self.bars(q, 300, 1440)

    def market_history_candles(self, q): return self.bars(q, 100, 10**6)

    def ticker(self, s):
        (bid, bids), (ask, asks) = (self.v.levels(s, way, 1)[0] for way in ("SELL", "BUY"))
        return {"instType": "SPOT", "instId": self.name(s), "last": num(self.v.exchange.last[s]), "askPx": ask, "askSz": asks, "bidPx": bid, "bidSz": bids, "volCcy24h": num(self.v.exchange.tape.day(s, self.v.clock.now())["worth"]), "ts": ms(self.v.clock.now())}

    def market_ticker(self, q): return [self.ticker(self.symbol(q))]

    def market_tickers(self, q):
        assert q["instType"] == "SPOT", "only spot is asked for"
        return [*map(self.ticker, self.v.exchange.tape.symbols)]

    def market_books(self, q):
        s, n = self.symbol(q), int(q.get("sz", 1))
        return [{"asks": self.v.levels(s, "BUY", n, ("0", "1")), "bids": self.v.levels(s, "SELL", n, ("0", "1")), "ts": ms(self.v.clock.now())}]

    def market_trades(self, q):
        found = self.v.exchange.tape.trades(self.symbol(q), self.v.clock.now(), int(q.get("limit", 100)))
        return [{"instId": q["instId"], "side": "buy", "sz": num(m.volume), "px": num(m.price), "tradeId": ms(m.number), "ts": ms(m.time_ms)} for m in found[::-1]]

    def account_config(self, q):
        may = self.v.rights
        return [{"acctLv": "1", "perm": ",".join(["read_only", *["withdraw"] * may["withdraw"], *["trade"] * may["trade"]]), "ip": may["ip"]}]

    def account_balance(self, q):
        x = self.v.exchange
        return [{"details": [{"ccy": a, "eq": num(n), "cashBal": num(n), "availBal": num(n - x.locked(a)), "frozenBal": num(x.locked(a)), "availEq": ""} for a, n in x.account.total.items()], "uTime": ms(self.v.clock.now())}]

    def post_trade_order(self, q):
        if q["tdMode"] != "cash" or (q["ordType"] == "market" and q["side"] == "buy" and q.get("tgtCcy") != "base_ccy"): raise No("51000", "Parameter error")
        kind, tif = ("MARKET", "GTC") if q["ordType"] == "market" else ("LIMIT", {"ioc": "IOC", "fok": "FOK"}.get(q["ordType"], "GTC"))
        t = self.v.place(q["side"], kind, self.symbol(q), q["sz"], q.get("px"), tif, q["clOrdId"])
        return [{"clOrdId": t.client_id, "ordId": str(t.id), "tag": "", "sCode": "0", "sMsg": ""}]

    def trade_cancel_order(self, q):
        try: t = self.v.cancel(q["clOrdId"])
        except KeyError: raise No("51400", "Cancellation failed as the order has been filled, canceled or does not exist.") from None
        return [{"clOrdId": t.client_id, "ordId": str(t.id), "sCode": "0", "sMsg": ""}]

    def row(self, t):
        state = {"NEW": "live", "PARTIALLY_FILLED": "partially_filled", "FILLED": "filled"}.get(t.status, "canceled")
        return {"instType": "SPOT", "instId": self.name(t.symbol), "ordId": str(t.id), "clOrdId": t.client_id, "px": num(t.price) if t.price else "", "sz": num(t.qty), "side": t.side.lower(),
                "ordType": "ioc" if t.tif == "IOC" else t.type.lower(), "tgtCcy": "base_ccy" if t.type == "MARKET" else "", "accFillSz": num(t.filled), "avgPx": num(t.worth / t.filled) if t.filled else "", "state": state,
                "fee": "0", "feeCcy": "", "cTime": ms(t.time_ms), "uTime": ms(t.updated_ms), "fillTime": ms(t.trades[-1].time_ms) if t.trades else ""}

    def get_trade_order(self, q):
        found = self.v.exchange.by_client.get(q.get("clOrdId"), ())
        if not found: raise No("51603", "Order does not exist")
        return [self.row(found[-1])]

    def trade_orders_pending(self, q):
        return [self.row(t) for t in self.v.exchange.tickets.values() if t.open and q.get("instId", self.name(t.symbol)) == self.name(t.symbol)][::-1]

    def trade_fills_history(self, q):
        t = self.v.exchange.tickets[int(q["ordId"])]
        return [{"instType": "SPOT", "instId": self.name(t.symbol), "tradeId": str(x.id), "ordId": str(t.id), "clOrdId": t.client_id, "side": t.side.lower(), "fillPx": num(x.price), "fillSz": num(x.qty), "fee": num(-x.fee), "feeCcy": x.fee_asset,
                 "ts": ms(x.time_ms), "execType": "M" if x.maker else "T"} for x in t.trades][::-1]
