"The account, its market and its process: everything that the state machine pushes around."
import shutil
import sqlite3
import tempfile
from collections import deque
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bnml.core.base import Retry, StorageError
from bnml.core.clock import VirtualClock
from bnml.data.panel import Panel
from bnml.domain.market import Book, Quote, default_instrument
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.domain.signal import Strategy
from bnml.ops.settings import Settings
from bnml.trade import ledger
from bnml.trade.assembly import assemble
from bnml.trade.ledger import Ledger
from bnml.venue.sim import SimVenue

from .line import Crash, Exchange, Line

HOUR, T0, WARM = 3_600_000, 1_735_768_800_000, 40     # 2025-01-01 22:00 UTC less the warm-up: midnight is near
SYMBOLS, PRICES = ("BTCUSDT", "SOLUSDT", "DOGEUSDT"), (60_000.0, 150.0, 0.1)
START = {"USDT": Decimal(10_000)}

# shape → open, high, low, close against the last close; None = no bar
SHAPES = {
    "flat": (1, 1.002, 0.998, 1), "up": (1.001, 1.02, 0.999, 1.015), "down": (0.999, 1.001, 0.985, 0.99), "leap": (1.04, 1.09, 1.03, 1.08),
    "gap": (0.9, 0.91, 0.87, 0.88), "crash": (0.97, 0.98, 0.6, 0.65), "wide": (1, 1.12, 0.9, 1.01), "dip": (1, 1.004, 0.955, 1.0), "brink": (0.999, 1, 0.9604, 0.9605), "back": (1, 1.042, 1, 1.041), "none": None}

WIDE = dict(max_positions=3, min_confidence=0, max_exposure=1, max_symbol_exposure=1, daily_loss_pct=100, weekly_loss_pct=100, max_drawdown_pct=100,
            max_consecutive_losses=1000, cooldown_minutes=0, max_orders_per_day=1000, max_spread_bps=1000)
LIMITS = {
    "wide": WIDE,
    "default": {},
    "tight": dict(max_positions=2, min_confidence=50, max_exposure=0.5, max_symbol_exposure=0.3, daily_loss_pct=2, weekly_loss_pct=3, max_drawdown_pct=8,
                  max_consecutive_losses=2, loss_pause_hours=3, cooldown_minutes=120, max_orders_per_day=4, max_spread_bps=20),
    "few": WIDE | dict(max_positions=1, max_orders_per_day=3, cooldown_minutes=90, max_consecutive_losses=1, loss_pause_hours=2),
}
EXITS = {
    "plain": dict(stop_atr=None, stop_pct=0.04, trail_after_atr=None, targets=[], time_stop_bars=8),
    "full": dict(stop_atr=2.0, stop_pct=0.04, trail_after_atr=0.5, trail_step_atr=0.0, time_stop_bars=10),
    "short": dict(stop_atr=None, stop_pct=0.08, trail_after_atr=0.2, targets=[[0.5, 0.5], [2.0, 1.0]], time_stop_bars=3, hard_stop_pct=0.05),
}


def settings_of(limits: str, exits: str, fee_asset: str = "quote", extra: dict | None = None) -> Settings:
    "The settings of one process."
    body = {"risk": {"leader": ""} | LIMITS[limits] | {"max_data_age_s": 1e9}, "exits": EXITS[exits], "data": {"interval": "1h"}, "costs": {"fee_asset": fee_asset},
            "sizing": {"mode": "fixed_fraction", "fixed_fraction": 0.2, "max_position": 0.3, "active": 0.95, "reserve": 0.0, "buffer": 0.02}}
    return Settings.model_validate({k: v | (extra or {}).get(k, {}) for k, v in body.items()} | {k: v for k, v in (extra or {}).items() if k not in body})


class Script(Strategy):
    "Says what it is told to say."
    name, warmup_bars = "script", 1

    def __init__(self, lines): self._lines = lines

    def version(self): return "script"

    def scan(self, panel, stop):
        said = self._lines.get(stop - 1, {})
        action, sure = np.zeros(len(panel.symbols), np.int8), np.zeros(len(panel.symbols))
        for j, s in enumerate(panel.symbols): action[j], sure[j] = said.get(s, (0, 0.0))
        return SimpleNamespace(action=action, confidence=sure, horizon=np.full(len(panel.symbols), -1), reason=["script"] * len(panel.symbols))


class HandFeed:
    "A live feed moved by hand."
    fast, late = False, False

    def __init__(self, panel, world, warmup_rows):
        self.panel, self.world, self.warmup_rows, self.live = panel, world, warmup_rows, world.live
        self.meanwhile = lambda left: None

    def quote(self, symbol):
        price, wide = self.world.last[symbol], self.world.spread
        return Quote(symbol, self.world.clock.now_ms(), price * (1 - wide / 2e4), price * (1 + wide / 2e4), 1e6 / price, 1e6 / price)

    def book(self, symbol):
        price, now, depth = self.world.last[symbol], self.world.clock.now_ms(), self.world.depth
        return Book(symbol, now, ((price * 0.9999, depth / price),), ((price * 1.0001, depth / price),)) if self.live else None

    def last_trade(self, symbol): return (self.world.last[symbol] * self.world.traded, self.world.clock.now_ms()) if self.live else None

    def barred(self, symbol): return ""

    def stop(self): pass


class Wall:
    "The clock as a process sees it: it goes by itself."
    def __init__(self, clock): self._clock = clock

    def now_ms(self): return self._clock.now_ms()

    def wait(self, seconds, meanwhile=None): raise AssertionError("nobody waits here")

    def interrupt(self): pass


class Street(SimVenue):
    "The simulated exchange, on which a market order trades whenever it arrives."
    def _ready(self, request):
        begun, self._begun = self._begun, max(self._begun, request.arrives_ms)
        try: return super()._ready(request)
        finally: self._begun = begun


class Mortal(Ledger):
    "A ledger whose process, or disk, may die before or after each transaction."
    world, _texts = None, {}

    def __init__(self, *args):
        real, name = ledger.statements, "statements"
        setattr(ledger, name, lambda conn: self._texts or self._texts.update(real(conn)) or self._texts)  # the same text for every process: half of its start
        try: super().__init__(*args)
        finally: setattr(ledger, name, real)

    def _write(self, *args):
        busy = self._size or self._orders or self._state
        if busy and self.world: self.world.spark(self)
        super()._write(*args)
        if busy and self.world: self.world.spark(self)


def folder() -> Path:
    "Where ledgers of examples live: memory, where there is some."
    return Path(tempfile.mkdtemp(prefix="machine-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


@lru_cache
def _empty() -> Path:
    "A ledger without rows, made once."
    path = folder() / "empty.db"
    Ledger(f"sqlite:///{path}", "s").close()
    return path


def _history(twins: bool) -> Panel:
    "Quiet bars before the first event; twins move as the leader does."
    rng = np.random.default_rng(5)
    times = T0 - WARM * HOUR + HOUR * np.arange(WARM)
    close = np.array(PRICES) * np.exp(rng.normal(0, 0.006, (WARM, 1 if twins else 3)) * np.ones(3))
    close[-1] = PRICES
    open_ = np.vstack([close[:1], close[:-1]])
    return Panel(SYMBOLS, "1h", times, np.stack([open_, np.maximum(open_, close) * 1.003, np.minimum(open_, close) * 0.997, close, np.full_like(close, 1e9) / close]))


class World:
    "A venue that lives on, a process that dies, and the market between them."

    def __init__(self, limits="wide", exits="plain", fee_asset="quote", participation=None, oco=True, extra=None, live=False, twins=False):
        self.live, self.depth, self.traded = live, 1e9, 1.0             # a venue's feed; quote in its book; last trade over last close
        self.clock, self.panel, self.oco, self.fee_asset, self.extra = VirtualClock(T0), _history(twins), oco, fee_asset, extra
        self.last = dict(zip(SYMBOLS, PRICES))
        instruments = {s: replace(default_instrument(s, p), oco=oco) for s, p in self.last.items()}
        costs = settings_of(limits, exits, fee_asset).costs
        sim = Street(instruments, START, FeeModel(costs.maker, costs.taker, fee_asset), SlippageModel(costs.slippage_bps), costs.latency_ms, participation, self.clock)
        self.x = Exchange(sim, START)
        self.lines, self.spread, self.killed, self.paused, self.inbox = {}, 2.0, False, False, deque()
        self.faults = {call: deque() for call in ("submit", "cancel", "order", "balances", "drain")}
        self.fuse, self.fuse_kind, self.steps, self.mark, self.judged = None, "crash", 0, 0, 0
        self.open_row, self.quiet = None, {s: 0 for s in SYMBOLS}       # rows since something was wrong with a symbol
        self.pcts, self.spans, self.blind_since = {}, {}, None          # entry → planned loss, longest life; since when something is not told
        self.disturbed, self.blind, self.epochs, self.story = False, [], [], []
        self.dir = folder()
        self.path = self.dir / "ledger.db"
        shutil.copy(_empty(), self.path)
        self.reader = sqlite3.connect(self.path)
        self.engine = None
        self.start(limits, exits)

    # faults
    def fault(self, call: str):
        "The next fault of a call; the process may die here too."
        self.spark()
        if not self.faults[call]: return None
        self.upset()
        return self.faults[call].popleft()

    def spark(self, ledger=None):
        "One more moment at which the process may die."
        if self.fuse is None: return
        if self.fuse_kind == "disk" and ledger is None: return
        self.fuse -= 1
        if self.fuse > 0: return
        self.fuse = None
        self.upset()
        if self.fuse_kind == "disk": raise StorageError("saving: the disk is full, nothing was sent")
        raise Crash()

    def upset(self):
        "Something went wrong: rest begins anew."
        self.disturbed = True
        self.quiet = {s: 0 for s in SYMBOLS}

    def say(self, *words): self.story.append(f"{(self.clock.now_ms() - T0) / 1000:.3f} " + " ".join(map(str, words)))

    def fresh(self) -> list:
        "What this process has not been told yet."
        events, self.mark = self.x.diary[self.mark:], len(self.x.diary)
        return events

    def rows(self, query: str, *args) -> list:
        "What stands on the disk, read by somebody else."
        return self.reader.execute(query, args).fetchall()

    def witness(self, intents):
        "What leaves must be on the disk, and allowed."
        for i in intents:
            assert self.rows("select 1 from intents where client_id = ?", i.client_id), f"{i.purpose} {i.client_id} leaves before it is written down"
            if i.purpose != "ENTRY": continue
            self.pcts[i.client_id], self.spans[i.client_id] = self.settings.exits.stop_pct, self.settings.exits.time_stop_bars
            assert not (self.killed or self.paused), f"an entry in {i.symbol} leaves while {'killed' if self.killed else 'paused'}"

    @property
    def plans(self) -> dict:
        "Position → (price of its first fill before slippage, planned loss)."
        out = {}
        for f in self.x.fills.values():
            if f.client_id in self.pcts: out[f.client_id] = min(float(f.raw_price), out.get(f.client_id, (1e99,))[0]), self.pcts[f.client_id]
        return out

    def untold(self) -> list: return self.line.untold()

    def look(self):
        "Since when the process is not told everything."
        events = self.untold()
        if events and self.blind_since is None: self.blind_since = min(e.time_ms for e in events)
        if events or self.blind_since is None: return
        self.blind.append((self.blind_since, self.clock.now_ms()))
        self.blind_since = None

    # process
    def start(self, limits: str, exits: str):
        "A process begins; a venue that does not answer lets it try again."
        self.settings = settings_of(limits, exits, self.fee_asset, self.extra)
        self.profile = limits, exits
        self.epochs.append((self.clock.now_ms(), self.settings))
        for _ in range(8):
            try: return self._start()
            except (Retry, StorageError, Crash): self.bury()
        raise AssertionError("the process does not start")

    def _start(self):
        self.ledger = Mortal(f"sqlite:///{self.path}", "s")
        self.ledger.world = self
        self.ledger.begin("paper", "hand", "script", self.settings.model_dump(mode="json"), START, T0)
        self.line = Line(self.x, self)
        done = len(self.panel) - (self.open_row is not None)
        feed = HandFeed(self.panel, self, done)
        self.engine = assemble(Script(self.lines), feed, self.line, Wall(self.clock), self.ledger, self.settings, lambda: self.killed, self)
        if self.open_row is not None: self.engine.open_row(self.open_row)

    def take(self):
        "The engine's inbox: what was not done when the process died comes again."
        return list(self.inbox)

    def obeyed(self, commands):
        for c in commands: self.inbox.remove(c)

    def bury(self):
        "The process is gone: what was not on the disk is lost."
        if self.ledger: self.ledger._conn.close()
        self.engine, self.ledger = None, None

    def run(self, call) -> bool:
        "Let the process do something; when it dies, another takes over. True: it did not die."
        try: call()
        except Crash: why = "died"
        except StorageError as e: why = str(e)
        else: why = ""
        self.look()
        if not why: return True
        self.say(why)
        self.restart(*self.profile)
        return False

    def restart(self, limits: str, exits: str):
        self.say("restart", limits, exits)
        self.bury()
        self.upset()
        self.clock.set_ms(self.clock.now_ms() + 1)
        self.start(limits, exits)

    def command(self, name: str, symbol=None): self.inbox.append(SimpleNamespace(name=name, symbol=symbol))

    # market
    def open(self, opens: dict):
        "A row opens; `opens`: symbol → price, or NaN."
        t = int(self.panel.times[-1]) + HOUR
        self.open_row = self.panel.open_row(t, np.array([opens[s] for s in SYMBOLS]))
        self.clock.set_ms(max(t, self.clock.now_ms()))
        self.say("open", opens)
        self.x.sim.begin_bar(self.panel, self.open_row)
        if self.engine is None: return self.start(*self.profile)        # it was away when the last bar closed
        self.run(lambda: self.engine.open_row(self.open_row))

    def away(self):
        "The process is gone until the next bar opens; the venue is not."
        self.say("away")
        self.bury()
        self.upset()

    def tend(self, ms: int):
        "Time goes by within the bar."
        self.clock.set_ms(self.clock.now_ms() + ms)
        self.tend_now()

    def tend_now(self):
        "Whatever the process does between two bars; False: there is none, or it died."
        if self.engine is None: return False
        def look():
            if hasattr(self.engine, "tend"): return self.engine.tend()
            self.engine.poll(True)
            self.engine.desk.settle()
        return self.run(look)

    def close(self, values: np.ndarray, said: dict, late_ms: int = 0):
        "The row closes with these (5, s) values, and is told so late; `said`: symbol → (action, confidence)."
        row, self.open_row = self.open_row, None
        self.panel.close_row(row, values)
        self.lines[row] = said
        self.last |= {s: float(values[3, j]) for j, s in enumerate(SYMBOLS) if values[3, j] == values[3, j]}
        self.clock.set_ms(max(int(self.panel.times[row]) + HOUR, self.clock.now_ms()))
        if late_ms: self.clock.set_ms(self.clock.now_ms() + late_ms)
        self.say("close", said)
        self.x.sim.finish_bar(self.panel, row)
        for cid in self.x.slow: self.x.sim.cancel(cid)
        self.x.slow.clear()
        self.x.pull()
        def act():
            self.engine.scanner.scan_row(row)
            self.engine.close_row(row)
        if self.engine is not None: self.run(act)
        rich = self.x.sim.participation is None or self.volume >= 1e9
        for j, s in enumerate(SYMBOLS): self.quiet[s] = self.quiet[s] + 1 if rich and values[3, j] == values[3, j] else 0

    def bar(self, shapes: dict, volume: float = 1e9, said: dict | None = None, tends=(1000, 1000, 2000), late_ms=0):
        "A whole row."
        values = np.array([self.shape(s, shapes.get(s, "flat"), volume) for s in SYMBOLS]).T
        self.open(dict(zip(SYMBOLS, values[0])))
        for ms in tends: self.tend(ms)
        self.close(values, said or {}, late_ms)

    def shape(self, symbol: str, name: str, volume: float) -> list[float]:
        "(open, high, low, close, volume) of a symbol's next bar."
        self.volume = volume
        if SHAPES[name] is None: return [np.nan] * 5
        i, last = self.x.sim.instruments[symbol], self.last[symbol]
        tick = float(i.tick)
        return [max(tick, round(last * k / tick) * tick) for k in SHAPES[name]] + [volume / last]

    def heal(self):
        "No fault from here on, and what was held back is told."
        self.steps += 100
        for q in self.faults.values(): q.clear()
        self.fuse = None

    def done(self):
        if self.engine is not None: self.bury()
        self.reader.close()
        shutil.rmtree(self.dir, ignore_errors=True)
