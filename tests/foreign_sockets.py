"""The websockets of Bybit v5 and OKX v5 beside their REST, as far as their public documentation shows candles, best prices and an account's orders."""
import base64
import hashlib
import hmac
import json
import select
import struct

from bnml.core.clock import interval_ms

LOOK_S = 0.03  # between two looks at the market


def accept(key): return base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()


class Socket:
    "One connection, served until either side leaves it."
    def __init__(self, handler, venue, path, words):
        self.handler, self.venue, self.path, self.words = handler, venue, path, words(self)
        self.topics, self.proved, self.over = {}, False, False  # topic → what was told of it last

    def serve(self):
        h = self.handler
        h.send_response(101)
        for k, v in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept(h.headers["Sec-WebSocket-Key"]))): h.send_header(k, v)
        h.end_headers()
        h.close_connection = True
        self.venue.sockets.append(self)
        try:
            while not self.over:
                if select.select([h.connection], [], [], LOOK_S)[0]: self.read()
                if not self.venue.mute: self.tell()
        except (OSError, ConnectionError, ValueError): pass
        finally: self.venue.sockets.remove(self)

    def exactly(self, n):
        if len(got := self.handler.connection.recv(n, 0x100)) < n: raise ConnectionError  # MSG_WAITALL
        return got

    def read(self):
        first, second = self.exactly(2)
        n = second & 127
        if n > 125: n = struct.unpack(">H" if n == 126 else ">Q", self.exactly(2 if n == 126 else 8))[0]
        mask, body = self.exactly(4), self.exactly(n) if n else b""
        text = bytes(b ^ mask[i % 4] for i, b in enumerate(body))
        if first & 15 == 8: raise ConnectionError
        if first & 15 == 1 and not self.venue.mute: self.words.answer(text.decode())

    def send(self, message):
        body = (message if isinstance(message, str) else json.dumps(message)).encode()
        n = len(body)
        self.handler.connection.sendall(bytes([0x81]) + (bytes([n]) if n < 126 else struct.pack(">BH", 126, n) if n < 65_536 else struct.pack(">BQ", 127, n)) + body)

    def tell(self):
        "Everything that is new."
        with self.venue.lock:
            self.venue.exchange.advance(self.venue.clock.now())
            found = [m for topic, last in list(self.topics.items()) for m in self.words.news(topic, last)]
        for m in found: self.send(m)

    def candles(self, last, symbol, interval):
        "Candles that closed since, oldest first, each once, then the forming one when it has changed: (row, is it over)."
        step, now = interval_ms(interval), self.venue.clock.now()
        since = last.setdefault("closed", now // step * step - step)
        rows = self.venue.candles(symbol, interval, since + step, now, 1000)[::-1]
        for row, over in rows:
            if over: last["closed"] = int(row[0])
            elif row == last.get("row"): continue
            else: last["row"] = row
            yield row, over

    def orders(self, last):
        "Orders that changed."
        first, seen = "orders" not in last, last.setdefault("orders", {})
        for t in list(self.venue.exchange.tickets.values()):
            if seen.get(t.id) == (state := (t.status, t.filled)): continue
            seen[t.id] = state
            if not first: yield t


class BybitSocket:
    "v5/public/spot and v5/private."
    def __init__(self, socket): self.s = socket

    def answer(self, text):
        q, s = json.loads(text), self.s
        public = "public" in s.path
        say = lambda ok, words="", op=q["op"]: s.send({"success": ok, "ret_msg": words, "op": op, "conn_id": "c", **({"req_id": q["req_id"]} if "req_id" in q else {})})
        if q["op"] == "ping": return say(True, "pong") if public else s.send({"op": "pong", "args": [str(s.venue.clock.now())], "conn_id": "c"})
        if q["op"] == "auth":
            key, expires, sign = q["args"]
            secret, now = s.venue.keys.get(key, ""), s.venue.clock.now()
            s.proved = bool(secret) and now < int(expires) <= now + 60_000 and sign == hmac.new(secret.encode(), f"GET/realtime{expires}".encode(), hashlib.sha256).hexdigest()
            return say(s.proved, "" if s.proved else "Params Error")
        if q["op"] != "subscribe" or len(q["args"]) > 10 or not (public or s.proved): return say(False, "Invalid Request")
        for topic in q["args"]:
            known = topic == "order" if not public else topic.split(".")[0] in ("kline", "orderbook") and s.venue.named(topic.split(".")[-1])
            if not known: return say(False, f"error:handler not found,topic:{topic}")
        s.topics |= {t: {} for t in q["args"]}
        say(True, "subscribe" if public else "")

    def news(self, topic, last):
        from tests.foreign import BYBIT_BARS
        s, kind, symbol = self.s, topic.split(".")[0], topic.split(".")[-1]
        now = s.venue.clock.now()
        if kind == "kline":
            name = topic.split(".")[1]
            for row, over in s.candles(last, symbol, BYBIT_BARS[name]):
                k = dict(zip(("open", "high", "low", "close", "volume"), row[1:]))
                yield {"topic": topic, "type": "snapshot", "ts": now, "data": [{"start": int(row[0]), "end": int(row[0]) + interval_ms(BYBIT_BARS[name]) - 1, "interval": name, **k, "turnover": "0", "confirm": over, "timestamp": now}]}
        elif kind == "orderbook":
            b, a = s.venue.levels(symbol, "SELL", 1), s.venue.levels(symbol, "BUY", 1)
            if (b, a) != last.get("book"): yield {"topic": topic, "type": "snapshot", "ts": now, "data": {"s": symbol, "b": b, "a": a, "u": 1, "seq": 1}, "cts": now}
            last["book"] = b, a
        elif kind == "order":
            for t in s.orders(last): yield {"id": "1", "topic": "order", "creationTime": now, "data": [{**s.venue.speak.row(t), "category": "spot"}]}


class OkxSocket:
    "ws/v5/public, ws/v5/business (candles) and ws/v5/private."
    def __init__(self, socket): self.s = socket

    def answer(self, text):
        s = self.s
        if text == "ping": return s.send("pong")
        q, place = json.loads(text), self.s.path.rpartition("/")[2]
        if q["op"] == "login":
            a, v = q["args"][0], s.venue
            sign = base64.b64encode(hmac.new(v.keys.get(a["apiKey"], "").encode(), f"{a['timestamp']}GET/users/self/verify".encode(), hashlib.sha256).digest()).decode()
            code, words = next((x for bad, *x in ((a["apiKey"] not in v.keys, "60005", "Invalid apiKey"), (a["passphrase"] != v.password, "60024", "Wrong passphrase"), (a["sign"] != sign, "60007", "Invalid sign"),
                                                  (abs(int(a["timestamp"]) * 1000 - v.clock.now()) > 30_000, "60006", "Timestamp request expired")) if bad), ("0", ""))
            s.proved = code == "0"
            return s.send({"event": "login" if s.proved else "error", "code": code, "msg": words, "connId": "c"})
        for a in q["args"]:
            kind = a["channel"]
            known = {"public": kind == "tickers", "business": kind.startswith("candle"), "private": kind == "orders" and s.proved}[place]
            if not known or (place != "private" and not s.venue.named(a["instId"].replace("-", ""))):
                s.send({"event": "error", "code": "60018", "msg": f"Wrong URL or channel:{kind},instId:{a.get('instId')} doesn't exist.", "connId": "c"})
                continue
            s.topics[json.dumps(a)] = {}
            s.send({"event": "subscribe", "arg": a, "connId": "c"})

    def news(self, topic, last):
        from tests.foreign import OKX_BARS
        s, a = self.s, json.loads(topic)
        symbol = a.get("instId", "").replace("-", "")
        if a["channel"].startswith("candle"):
            for row, over in s.candles(last, symbol, OKX_BARS[a["channel"].removeprefix("candle")]): yield {"arg": a, "data": [[*row, "0", "0", "1" if over else "0"]]}
        elif a["channel"] == "tickers":
            t = s.venue.speak.ticker(symbol)
            if (state := (t["bidPx"], t["bidSz"], t["askPx"], t["askSz"])) != last.get("state"): yield {"arg": a, "data": [t]}
            last["state"] = state
        else:
            for t in s.orders(last): yield {"arg": a, "data": [s.venue.speak.row(t)]}


SOCKETS = {"bybit": BybitSocket, "okx": OkxSocket}
