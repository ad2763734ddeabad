"""From a bar's close to the orders it leads to: 100 symbols, the whole engine, ccxt and a durable ledger, against the rehearsal in a process of its own.

Ours = wall time less the time in which a request waits for the venue's answer; an order that waits behind others carries their share. On a machine that does
other things too, our share of the processor (cpu) is the surer figure: both are from the close to the order on the wire."""
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from decimal import Decimal

import numpy as np

SYMBOLS, MINUTE, HISTORY = 100, 60_000, 300
NAMES = tuple(f"S{k:02d}USDT" for k in range(SYMBOLS))
BUSY = 1e7  # volume above which a symbol is wanted
AIM_MS = 250.0  # ours, p99


def serve() -> None:
    "The exchange: flat prices, an account that never runs out, and no limit on requests; says where it is and waits for its end."
    from types import SimpleNamespace

    from bnml.domain.market import default_instrument
    from bnml.domain.plan import FeeModel
    from bnml.venue.gate import Key, Meter
    from bnml.venue.rehearsal import serve as open_rehearsal

    class Free(Meter):
        def count(self, kind, window_ms, now_ms, more=0): return 0

    now = int(time.time() * 1000) // MINUTE * MINUTE
    flat = np.full((600, SYMBOLS), 100.0)
    panel = SimpleNamespace(symbols=NAMES, interval="1m", times=now + (np.arange(600) - 10) * MINUTE, open=flat, high=flat, low=flat, close=flat, volume=flat * 1e7)
    with open_rehearsal(panel, {s: default_instrument(s, 100.0) for s in NAMES}, {"USDT": Decimal(10**7)}, {"k": Key("s")}, start_ms=int(time.time() * 1000),
                        fees=FeeModel(0.001, 0.001, "quote"), meter=Free()) as r:
        print(json.dumps({"url": r.url}), flush=True)
        sys.stdin.read()


class Waits:
    "Seconds in which requests waited for their answers."
    def __init__(self): self.seconds, self.requests, self._real = 0.0, 0, http.client.HTTPConnection.getresponse

    def __enter__(self):
        def timed(conn):
            begun = time.perf_counter()
            try: return self._real(conn)
            finally: self.seconds, self.requests = self.seconds + time.perf_counter() - begun, self.requests + 1
        http.client.HTTPConnection.getresponse = timed
        return self

    def __exit__(self, *_): http.client.HTTPConnection.getresponse = self._real


def market(wanted: int):
    "A panel of past minutes that goes on growing, with a small walk around 100; `wanted` symbols are busy."
    from bnml.data.feed import Stoppable
    from bnml.data.panel import Panel
    rng = np.random.default_rng(5)
    now = int(time.time() * 1000) // MINUTE * MINUTE

    volume = np.where(np.arange(SYMBOLS) < wanted, 2.0, 0.5) * BUSY

    def values(n):
        close = 100 + 0.05 * rng.standard_normal((n, SYMBOLS))
        open_ = 100 + 0.05 * rng.standard_normal((n, SYMBOLS))
        return np.stack([open_, np.maximum(open_, close) + 0.05, np.minimum(open_, close) - 0.05, close, np.tile(volume, (n, 1))])

    class Growing(Stoppable):
        warmup_rows = HISTORY

        def __init__(self): self.panel = Panel(NAMES, "1m", now - (np.arange(HISTORY)[::-1] + 1) * MINUTE, values(HISTORY))

        def next(self):
            "Open the next bar; returns its row and what it will close with."
            bar = values(1)[:, 0]
            return self.panel.open_row(int(self.panel.times[len(self.panel) - 1]) + MINUTE, bar[0]), bar

    return Growing()


def wide(settings: dict) -> dict:
    "Every check at work, none in the way; names that this version does not have are left out."
    from bnml.trade.breakers import RiskSettings
    return {k: v for k, v in settings.items() if k in RiskSettings.model_fields}


def engine_at(url: str, home: str, wanted: int):
    "An engine over the rehearsal that buys `wanted` symbols on one bar and sells them on the next."
    from bnml.core.clock import RealClock
    from bnml.ops.settings import Settings
    from bnml.trade.assembly import assemble
    from bnml.trade.ledger import Ledger
    from bnml.trade.rules import Crossover
    from bnml.venue.binance import BinanceWire
    from bnml.venue.ccxt import CcxtVenue
    from bnml.venue.orders import CcxtExecution

    class Turns(Crossover):
        "The work of two averages, then: buy what is busy on even bars, sell it on odd ones."
        name = "turns"

        def events(self, o, h, l, c, v):
            _, _, level = super().events(o, h, l, c, v)
            turn, busy = np.arange(len(c)) % 2 == 0, v > BUSY
            return turn & busy, ~turn & busy, np.full(len(c), 80.0)

    risk = wide(dict(max_positions=SYMBOLS, max_exposure=1.0, max_symbol_exposure=1.0, max_cluster_exposure=1.0, max_leader_correlation=1.0, daily_loss_pct=100, weekly_loss_pct=100,
                     max_drawdown_pct=100, max_consecutive_losses=10**9, cooldown_minutes=0, max_orders_per_day=10**9, max_orders_per_minute=10**9, max_orders_per_hour=10**9,
                     max_stops=10**9, max_symbol_stops=10**9, max_data_age_s=1e9, max_price_gap_pct=50, max_volatility_ratio=1e9))
    s = Settings.model_validate(dict(mode="paper", data=dict(interval="1m"), account=dict(start_balance="10000000"), risk=risk, costs=dict(participation=None),
                                     sizing=dict(mode="fixed_quote", fixed_quote=1000, max_position=1.0, active=1.0, reserve=0.0, buffer=0.0)))
    market_door = CcxtVenue(rest_url=url, gap_s=0, key="k", secret="s")
    market_door.measure()
    venue, feed = CcxtExecution(BinanceWire(market_door), poll_s=3600, quiet_s=3600), market(wanted)
    ledger = Ledger(f"sqlite:///{home}/{wanted}.db", "bench")
    ledger.begin("paper", "bench", "turns", s.model_dump(mode="json"), {"USDT": Decimal(10**7)}, RealClock().now_ms())
    return assemble(Turns(), feed, venue, RealClock(), ledger, s), feed, ledger


def bursts(url: str, home: str, wanted: int, bars: int) -> dict:
    """Wall and own milliseconds from the close to each order on the wire, over the bars that buy; `entries` counts the orders that the close asks for alone,
    the rest protect what they have bought, which is told by their fills."""
    from bnml.domain.orders import Purpose
    engine, feed, ledger = engine_at(url, home, wanted)
    sent, whole, cpu, asked = [], [], [], 0
    wire = engine.venue.wire
    with Waits() as waits:
        def mark(order, *_): sent.append((time.perf_counter() - begun[0], waits.seconds - begun[1], time.process_time() - worked, order.purpose == Purpose.ENTRY))
        for name in ("place", "place_pair"):
            real = getattr(wire, name)
            setattr(wire, name, lambda *a, real=real: (mark(*a), real(*a))[1])
        begun, worked, first = (0.0, 0.0), 0.0, 2
        for k in range(2 * bars + first):
            row, bar = feed.next()
            engine.open_row(row)
            begun, before, worked, n = (time.perf_counter(), waits.seconds), len(sent), time.process_time(), waits.requests
            feed.panel.close_row(row, bar)
            engine.scanner.scan_row(row)
            engine.close_row(row)
            if row % 2 == 0 and k >= first:
                whole.append((time.perf_counter() - begun[0], waits.seconds - begun[1]))
                cpu.append(time.process_time() - worked)
                asked += waits.requests - n
            else: del sent[before:]
        held = len(engine.desk.holdings)
    ledger.close()
    if not sent: raise RuntimeError(f"no order left: {engine.result().denied}")
    q = lambda x, p: round(1e3 * float(np.quantile(x, p)), 2)
    wall, waited, work, entry = map(np.array, zip(*sent))
    own = wall - waited
    whole_wall, whole_own = np.array([a for a, _ in whole]), np.array([a - b for a, b in whole])
    return {"symbols": SYMBOLS, "signals_a_bar": wanted, "bars": len(whole), "orders": len(sent), "requests": asked, "held_at_the_end": held,
            "wall_ms": {"median": q(wall, 0.5), "p99": q(wall, 0.99)}, "ours_ms": {"median": q(own, 0.5), "p99": q(own, 0.99)},
            "cpu_ms": {"median": q(work, 0.5), "p99": q(work, 0.99)},
            "entries": {"orders": int(entry.sum()), **{name: {"median": q(x[entry], 0.5), "p99": q(x[entry], 0.99)} for name, x in (("wall_ms", wall), ("ours_ms", own), ("cpu_ms", work))}},
            "first_order_ours_ms": round(1e3 * float(min(own)), 2), "whole_close": {"wall_ms": q(whole_wall, 0.5), "ours_ms": q(whole_own, 0.5), "ours_p99_ms": q(whole_own, 0.99),
            "cpu_ms": round(1e3 * statistics.median(cpu), 1), "cpu_p99_ms": q(cpu, 0.99)}, "ours_share": round(float(whole_own.sum() / whole_wall.sum()), 3),
            "ours_ms_per_order": round(1e3 * float(whole_own.sum()) / len(sent), 2), "aim_p99_ms": AIM_MS}


def measure(wanted: int, bars: int) -> dict:
    "One engine with a fresh account of its own: a ledger that has not seen another's trades would buy nothing there."
    server = subprocess.Popen([sys.executable, "-m", "tests.bench.bench_orders", "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        with tempfile.TemporaryDirectory() as home: return bursts(url, home, wanted, bars)
    finally:
        server.stdin.close()
        server.wait(30)


def run(bars: int = 15) -> dict:
    "Five signals among a hundred symbols, as the default limit of positions allows, twenty, and a hundred at once."
    from bnml.core.base import configure_log
    configure_log("error")
    return {name: measure(wanted, n) for name, wanted, n in (("five_signals", 5, 2 * bars), ("twenty_signals", 20, bars), ("hundred_signals", SYMBOLS, max(2, bars // 3)))}


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]: serve()
    else: print(json.dumps(run(), indent=1))
