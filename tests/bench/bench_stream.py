"""Websocket events a second that the market stream handles without falling behind: klines and book tickers of 100 symbols from a server in a process of its own.

Every message carries the moment of its sending; the lag is how old it is when it has been handled. The server writes ready frames, so that it is
not what is measured; at each rate a pause of 10 ms separates the bundles, as a venue's own ticks do, and the flood sends as fast as the socket takes."""
import asyncio
import base64
import hashlib
import json
import struct
import subprocess
import sys
import time

import numpy as np

SYMBOLS, MINUTE, SECONDS, PAUSE_S = 100, 60_000, 3.0, 0.01
NAMES = tuple(f"S{k:02d}USDT" for k in range(SYMBOLS))
RATES = (2_000, 5_000, 10_000, 20_000)
AIM_PER_S, BEHIND_MS = 5_000, 250.0


def frame(text: str, kind: int = 1) -> bytes:
    "A server's frame."
    body = text.encode()
    return bytes([0x80 | kind, len(body)] if len(body) < 126 else [0x80 | kind, 126]) + (b"" if len(body) < 126 else struct.pack(">H", len(body))) + body


def kline(name: str, ms: int, t: int, closed: bool) -> str:
    return (f'{{"e":"kline","E":{ms},"s":"{name}","k":{{"t":{t},"T":{t + MINUTE - 1},"s":"{name}","i":"1m","f":1,"L":9,"o":"100.00","c":"100.10","h":"100.20","l":"99.90",'
            f'"v":"12.3","n":9,"x":{"true" if closed else "false"},"q":"1230.1","V":"6.1","Q":"610.2","B":"0"}}}}')


def ticker(name: str, ms: int) -> str: return f'{{"u":{ms},"s":"{name}","b":"100.00","B":"3.1","a":"100.01","A":"2.2"}}'


class Line:
    "One client's socket: the handshake, what it subscribed to, and bundles of messages."
    def __init__(self, reader, writer):
        self.reader, self.writer, self.bars, self.quotes, self.k, self.first = reader, writer, [], [], 0, int(time.time() * 1000) // MINUTE * MINUTE

    async def open(self):
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        key = next(line.split(":", 1)[1].strip() for line in head.splitlines() if line.lower().startswith("sec-websocket-key"))
        token = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
        self.writer.write(f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {token}\r\n\r\n".encode())

    async def listen(self):
        "Subscriptions are confirmed, pings answered."
        while True:
            kind, size = await self.reader.readexactly(2)
            size &= 127
            if size == 126: size = struct.unpack(">H", await self.reader.readexactly(2))[0]
            elif size == 127: size = struct.unpack(">Q", await self.reader.readexactly(8))[0]
            mask, body = await self.reader.readexactly(4), await self.reader.readexactly(size)
            body = bytes(b ^ mask[i % 4] for i, b in enumerate(body))
            if kind & 15 == 8: return
            if kind & 15 == 9: self.writer.write(bytes([0x8A, len(body)]) + body)
            if kind & 15 == 1: self.subscribe(json.loads(body))

    def subscribe(self, asked: dict):
        for name in asked.get("params", ()):
            symbol, _, what = name.partition("@")
            (self.bars if what.startswith("kline") else self.quotes).append(symbol.upper())
        self.writer.write(frame(json.dumps({"result": None, "id": asked["id"]})))

    def bundle(self, n: int) -> bytes:
        "The next n messages in turn; the tenth of a symbol's bar is its last."
        out, ms, mine = [], int(time.time() * 1000), [*((True, s) for s in self.bars), *((False, s) for s in self.quotes)]
        for _ in range(n if mine else 0):
            bar, symbol = mine[self.k % len(mine)]
            turn = self.k // len(mine)
            self.k += 1
            out.append(frame(kline(symbol, ms, self.first + turn // 10 * MINUTE, turn % 10 == 9) if bar else ticker(symbol, ms)))
        return b"".join(out)


async def serve() -> None:
    "Floods at the rate that stdin names, 0 = silence, -1 = as fast as the socket takes."
    lines, rate = [], [0]

    async def client(reader, writer):
        line = Line(reader, writer)
        await line.open()
        lines.append(line)
        try: await line.listen()
        except (asyncio.IncompleteReadError, ConnectionError): pass
        finally: lines.remove(line)

    async def flood():
        due, done = time.monotonic(), 0
        while True:
            live = [x for x in lines if x.bars or x.quotes]
            if not live or not rate[0]: due = time.monotonic(); await asyncio.sleep(PAUSE_S); continue
            n = 200 if rate[0] < 0 else int(rate[0] * PAUSE_S / len(live))
            for x in live:
                x.writer.write(x.bundle(n))
                await x.writer.drain()
            due += PAUSE_S
            await asyncio.sleep(max(0.0, due - time.monotonic()) if rate[0] > 0 else 0)
            due = max(due, time.monotonic() - 1.0)

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    task, loop = asyncio.create_task(flood()), asyncio.get_running_loop()
    while word := await loop.run_in_executor(None, sys.stdin.readline): rate[0] = int(word)
    task.cancel()


def stream_of(port: int):
    "The client's stream, counting what it has handled and how old each message was."
    from bnml.domain.market import default_instrument
    from bnml.venue.ccxt import CcxtVenue
    from bnml.venue.streams import MarketStream

    class Counting(MarketStream):
        handled, lags = 0, []

        def _mine(self, m):
            ours = super()._mine(m)
            if ours:
                self.handled += 1
                if self.handled % 10 == 0: self.lags.append(time.time() * 1000 - (m.get("E") or m["u"]))
            return ours

    urls = (f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}/ws", f"ws://127.0.0.1:{port}/ws-api/v3")
    return Counting(CcxtVenue(rest_url=urls[0]), {s: default_instrument(s, 100.0) for s in NAMES}, "1m", {}, urls)


def at_rate(stream, tell, rate: int, seconds: float = SECONDS) -> dict:
    "Handled a second, and how old the messages were; bars are taken and quotes read meanwhile, as the engine does."
    stream.handled, stream.lags, bars = 0, [], 0
    begun, worked = time.perf_counter(), time.process_time()
    tell(rate)
    while time.perf_counter() - begun < seconds:
        time.sleep(0.02)
        while stream.get() is not None: bars += 1
        for s in NAMES[:5]: stream.quote(s)
    taken, cpu, lags, n = time.perf_counter() - begun, time.process_time() - worked, np.array(stream.lags), stream.handled
    tell(0)
    time.sleep(0.5)
    return {"sent_per_s": rate if rate > 0 else "flood", "handled_per_s": round(n / taken), "closed_bars": bars, "lag_ms": {"median": round(float(np.median(lags)), 1), "p99": round(float(np.quantile(lags, 0.99)), 1)},
            "cpu_share": round(cpu / taken, 2), "events_per_cpu_s": round(n / cpu), "behind": bool(np.median(lags[-max(1, len(lags) // 10):]) > BEHIND_MS)}


def run(seconds: float = SECONDS) -> dict:
    "Every rate, then the flood."
    from bnml.core.base import configure_log
    configure_log("error")
    server = subprocess.Popen([sys.executable, "-m", "tests.bench.bench_stream", "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def tell(rate): server.stdin.write(f"{rate}\n"); server.stdin.flush()
    try:
        stream = stream_of(json.loads(server.stdout.readline())["port"]).start()
        begun = time.monotonic()
        while not stream.healthy and time.monotonic() - begun < 30: time.sleep(0.05)
        if not stream.healthy: raise RuntimeError("the stream did not begin")
        rates = [at_rate(stream, tell, r, seconds) for r in (*RATES, -1)]
        stream.stop()
        kept = [r["handled_per_s"] for r in rates if not r["behind"]]
        return {"symbols": SYMBOLS, "rates": rates, "kept_up_with_per_s": max(kept, default=0), "aim_per_s": AIM_PER_S}
    finally:
        server.stdin.close()
        server.wait(30)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]: asyncio.run(serve())
    else: print(json.dumps(run(), indent=1))
