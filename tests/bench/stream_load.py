"How many market events a second the stream takes, against a server on the loopback that talks as fast as it is listened to."
import asyncio
import json
import subprocess
import sys
import time

STEP, START = 60_000, 1_767_225_600_000  # a minute; 2026-01-01


def messages(symbols: list[str], bars: int = 20, updates: int = 25) -> list[str]:
    "What a venue says of these symbols: quotes, forming bars, and each bar's close."
    out, number = [], 0
    for bar in range(bars):
        t = START + bar * STEP
        for k in range(updates):
            last, now = k == updates - 1, t + (STEP - 1 if k == updates - 1 else k * STEP // updates)
            for j, s in enumerate(symbols):
                number += 1
                price = 100 + j + bar * 0.01 + k * 0.0001
                out.append(json.dumps({"u": number, "s": s, "b": f"{price - 0.01:.8f}", "B": "31.21000000", "a": f"{price + 0.01:.8f}", "A": "40.66000000"}, separators=(",", ":")))
                out.append(json.dumps({"e": "kline", "E": now, "s": s, "k": {"t": t, "T": t + STEP - 1, "s": s, "i": "1m", "f": 100, "L": 200, "o": f"{100 + j:.8f}", "c": f"{price:.8f}",
                                       "h": f"{price + 1:.8f}", "l": f"{99 + j:.8f}", "v": "1000.00000000", "n": 100, "x": last, "q": "1.0", "V": "500.0", "Q": "0.5", "B": "0"}}, separators=(",", ":")))
    return out


async def talk(symbols: list[str]):
    "Serve: confirm what is subscribed, then, when every line is up, say everything on the line that asked for it, in the order of its time."
    from websockets.asyncio.server import serve
    told, lines = messages(symbols), {}
    async def line(ws):
        names = []
        async for text in ws:
            request = json.loads(text)
            names += request["params"]
            await ws.send(json.dumps({"result": None, "id": request["id"]}))
            lines.update(dict.fromkeys(names, ws))
            if len(lines) == 2 * len(symbols): ws.talk = asyncio.create_task(speak())
    async def speak():
        await asyncio.sleep(1.0)
        for text in told:
            m = json.loads(text)
            kind = "kline_1m" if "k" in m else "bookTicker"
            await lines[f"{m['s'].lower()}@{kind}"].send(text)
    async with serve(line, "127.0.0.1", 0, compression=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()


class Still:
    "As much of a venue as a line needs; REST has nothing."
    testnet, keys, signing, offset_ms = False, ("", ""), {}, 0
    def server_time_ms(self): return START
    now_ms = server_time_ms
    def saw(self, ms): pass
    def bars(self, *a): return []


def measure_stream(n_symbols: int = 100) -> dict:
    "Events a second of wall and of our own processor time, and whether every bar came once and in order."
    from bnml.domain.market import Instrument
    from bnml.venue.streams import MarketStream
    symbols = [f"C{i}USDT" for i in range(n_symbols)]
    total = len(messages(symbols))
    server = subprocess.Popen([sys.executable, __file__, *symbols], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        urls = (f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}/ws", f"ws://127.0.0.1:{port}/ws-api/v3")
        stream = MarketStream(Still(), {s: Instrument(s, s[:-4], "USDT") for s in symbols}, "1m", dict.fromkeys(symbols, START - STEP), urls)
        count, mine = [0, 0.0], stream._mine
        def counted(m):
            count[0] += 1
            if count[0] == 2 * -(-n_symbols // 100) + 1: count[1] = time.perf_counter(), time.thread_time()
            if count[0] >= total: count.append((time.perf_counter(), time.thread_time()))
            return mine(m)
        stream._mine = counted
        stream.start()
        bars = []
        while len(bars) < 20 * n_symbols and (bar := stream.get(30)): bars.append((bar.symbol, bar.open_time_ms))
        wait = time.monotonic() + 5
        while len(count) < 3 and time.monotonic() < wait: time.sleep(0.01)
        stream.stop()
    finally: server.kill()
    expected = {(s, START + b * STEP) for s in symbols for b in range(20)}
    whole = len(bars) == len(expected) and set(bars) == expected
    (w0, c0), (w1, c1) = count[1], count[-1]
    return {"events": total, "symbols": n_symbols, "events_per_s": round(total / (w1 - w0)), "events_per_cpu_s": round(total / (c1 - c0)), "complete": whole}


if __name__ == "__main__": asyncio.run(talk(sys.argv[1:]))
