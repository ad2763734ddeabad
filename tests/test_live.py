"Live trading as a user would rehearse it: the runner as a process of its own, every lock open, and an exchange on this machine that keeps its own books."
import json
import os
import subprocess
import sys
import threading
import time
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from bnml.cli import main
from bnml.core.base import Refused, configure_log, source
from bnml.core.clock import floor_ms
from bnml.data.panel import Panel
from bnml.domain.market import default_instrument
from bnml.domain.plan import FeeModel
from bnml.ops.desk import open_station
from bnml.ops.evidence import evidence_lock
from bnml.ops.kill import Latch, switch
from bnml.ops.settings import load_settings
from bnml.ops.status import Board, kill_file, kill_state, read_status
from bnml.ops.watch import Operator, sole_runner
from bnml.trade.ledger import Ledger
from bnml.venue.gate import Key
from bnml.venue.rehearsal import serve
from tests.kill.lives import LOOSE

D, MINUTE, SYMBOL = Decimal, 60_000, "SOLUSDT"
KEYS = {"EXCHANGE_API_KEY": "rehearsed-key-0123", "EXCHANGE_API_SECRET": "rehearsed-secret-4567"}
OPEN = {"PAPER_ONLY": "0", "ALLOW_LIVE": "1", **KEYS}
STRATEGY = '''
import numpy as np
from bnml.domain.signal import Strategy, signals

class Steps(Strategy):
    "Buys after two rising closes, sells after two falling ones."
    name, warmup_bars = "steps", 3
    def frame(self, symbol, bars):
        c = bars["close"].to_numpy()
        up, down = np.zeros(len(c), bool), np.zeros(len(c), bool)
        up[2:] = (c[2:] > c[1:-1] * 1.001) & (c[1:-1] > c[:-2] * 1.001)
        down[2:] = (c[2:] < c[1:-1] * 0.999) & (c[1:-1] < c[:-2] * 0.999)
        return signals(symbol, bars, up, down)
'''


def tape(start_ms: int, closes_after: list[float], before: int = 250, symbols=(SYMBOL,)) -> Panel:
    "Quiet minutes up to the start, then the closes that a test wants."
    closes = np.concatenate([np.full(before, 100.0) + 0.02 * (np.arange(before) % 2), closes_after])
    opens = np.concatenate([[100.0], closes[:-1]])
    times = start_ms + (np.arange(len(closes)) - before) * MINUTE
    high, low = np.maximum(opens, closes) * 1.0005, np.minimum(opens, closes) * 0.9995
    frame = pd.DataFrame({"open": opens, "high": high, "low": low, "close": closes, "volume": 1e6}, pd.DatetimeIndex(times.astype("datetime64[ms]"), tz="UTC", name="open_time"))
    return Panel.from_frames(dict.fromkeys(symbols, frame), "1m")


def rehearse(symbols=(SYMBOL,), **coins):
    "A market that rises for some minutes, stays, and falls, and an account that also holds these coins."
    start = floor_ms(int(time.time() * 1000), "1m")
    path = [100, 100, 100.2, 100.5, 100.8, *[100.8] * 6, 100.6, 100.3, 100.0, *[100] * 200]
    return serve(tape(start, path, symbols=symbols), {s: default_instrument(s, 100.0) for s in symbols}, {"USDT": D(10_000), **coins}, {KEYS["EXCHANGE_API_KEY"]: Key(KEYS["EXCHANGE_API_SECRET"])},
                 start_ms=start + 5000, fees=FeeModel(0.001, 0.001, "base"))


@pytest.fixture
def stage():
    with rehearse() as it: yield it


def settings(stage, mode="live", **more) -> str:
    where = {"rest_url": stage.url, "ws_url": stage.ws_url, "ws_api_url": stage.ws_api_url, "testnet": mode == "testnet"}
    own = {"mode": mode, "strategy": "steps:Steps", "exchange": where, "universe": {"symbols": [SYMBOL]}, "data": {"interval": "1m", "history_bars": 120, "grace_s": 0.2},
           "exits": {"targets": [[30.0, 1.0]], "stop_atr": 20.0, "trail_after_atr": None, "hard_stop_pct": None}, "risk": {"max_spread_bps": 100.0, "leader": "", "max_volatility_ratio": 1000.0, "max_depth_share": 1.0}, **more}
    return json.dumps(own)


class Runner:
    "A live runner in a process of its own."
    def __init__(self, home, stage, mode="live", words=(), env=None, **more):
        (home / "bot.yaml").write_text(settings(stage, mode, **more))
        (home / "steps.py").write_text(STRATEGY)
        kept = {k: v for k, v in os.environ.items() if k not in OPEN}
        self.process = subprocess.Popen([sys.executable, "-m", "bnml.runner", "--mode", mode, "--json", *words], cwd=source(), text=True,
                                        env={**kept, "BNML_HOME": str(home), "PYTHONPATH": str(home), **OPEN, **(env or {})}, stdout=subprocess.PIPE, stderr=(home / "err.txt").open("w"))
        self.home, self.stage = home, stage

    @property
    def err(self) -> str: return (self.home / "err.txt").read_text()

    def within(self, seconds, what, why=""):
        "The first true answer."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what(): return found
            assert self.process.poll() is None, self.err
            time.sleep(0.05)
        raise AssertionError(f"{why or 'nothing'} did not come in {seconds} s: {read_status()}\n{self.err[-3000:]}")

    def ready(self):
        self.within(40, lambda: read_status()["alive"] and read_status()["pid"] == self.process.pid, "the runner")
        return self

    def minute(self):
        "Let a minute pass at the venue, and the runner close its bar."
        bars = read_status().get("bars", 0)
        self.stage.jump(bars=1)
        self.within(20, lambda: read_status().get("bars", 0) > bars, "the bar")

    def end(self) -> dict:
        "SIGTERM, and its last word."
        if self.process.poll() is None: self.process.terminate()
        out, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0 and "Traceback" not in self.err, self.err
        return json.loads(out)

    def __enter__(self): return self

    def __exit__(self, *_):
        if self.process.poll() is None: self.process.kill()
        self.process.communicate()


def open_sells(books) -> list[dict]:
    return [o for o in books["orders"] if o["side"] == "SELL" and o["status"] == "NEW"]


@pytest.mark.parametrize("mode", ["live", "testnet"])
def test_it_enters_protects_and_exits(own_home, stage, mode):
    with Runner(own_home, stage, mode).ready() as r:
        for _ in range(8):
            if not stage.books()["trades"]: r.minute()
        r.within(10, lambda: open_sells(stage.books()), "protection")
        books = stage.books()
        entry = D(books["trades"][0]["qty"])
        assert sum(D(o["origQty"]) for o in open_sells(books) if o["type"].startswith("STOP_LOSS")) <= entry
        assert read_status()["mode"] == mode and read_status()["feed"] == "rehearsal"
        for _ in range(12):
            if all(t["isBuyer"] for t in stage.books()["trades"]): r.minute()
        r.within(10, lambda: not read_status()["open_positions"], "the end of the position")
        told = r.end()
    books = stage.books()
    assert not open_sells(books) and told["violations"] == 0 and told["session"] == f"{mode}-binance-rehearsal"
    with Ledger(None, told["session"]) as ledger:
        assert [s["source"] for s in ledger.sessions()] == ["rehearsal"]
        mine = sorted((f.client_id, f.quantity, f.price) for f in ledger.fills())
    assert mine == sorted((o["clientOrderId"], D(t["qty"]), D(t["price"])) for t in books["trades"] for o in books["orders"] if o["orderId"] == t["orderId"])
    assert len({o["clientOrderId"] for o in books["orders"]}) == len(books["orders"])
    assert 0 < told["unprotected_seconds_max"] <= 5.0


def test_a_question_that_waits_for_its_turn_holds_nobody(own_home, stage):
    "The venue has asked for a pause of 50 s, and its lines broke: what was missed waits to be asked for, and a runner that is told to stop does not wait with it."
    with Runner(own_home, stage).ready() as r:
        r.within(20, lambda: stage.tell("", "GET")["lines"], "the market's line")
        [counter] = (own_home / "data" / "state").glob("weight-*")
        counter.write_text(json.dumps(json.loads(counter.read_text()) | {"pause": time.time() + 50}).ljust(240))
        stage.fault("ws_close")
        r.within(20, lambda: "the line broke" in r.err, "the break")
        time.sleep(1.0)                              # long enough for the next line to be laid and to find bars missing
        r.end()                                      # within 30 s


def bnml(home, *words, **env):
    "A command beside the runner: (exit code, its JSON)."
    kept = {k: v for k, v in os.environ.items() if k not in OPEN}
    done = subprocess.run([sys.executable, "-m", "bnml.cli", *words, "--json"], cwd=source(), text=True, capture_output=True,
                          env={**kept, "BNML_HOME": str(home), "PYTHONPATH": str(home), **OPEN, **env})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}


def test_a_person_buys_halts_and_no_secret_is_written(own_home, stage):
    with Runner(own_home, stage).ready() as r:
        code, said = bnml(own_home, "trade", "place", SYMBOL, "--quote", "300")
        assert (code, said["allowed"]) == (0, True), said
        r.within(15, lambda: open_sells(stage.books()), "protection")
        code, said = bnml(own_home, "kill-switch", "engage", "--reason", "drill", PAPER_ONLY="1", ALLOW_LIVE="0", EXCHANGE_API_KEY="", EXCHANGE_API_SECRET="")  # the runner asks, so this shell need not be allowed to
        assert code == 0 and said["engaged"] and said["halt"]["ms"] is not None and said["halt"]["ms"] < 5000, said
        assert open_sells(stage.books())  # protection stays
        code, said = bnml(own_home, "trade", "place", SYMBOL, "--quote", "100")
        assert code == 77 and "KILL_SWITCH" in said["reasons"]
        r.end()
    assert bnml(own_home, "kill-switch", "status")[1]["engaged"]
    with Runner(own_home, stage) as again:
        again.process.wait(30)
        assert again.process.returncode == 77 and "kill switch released" in again.err
    with_keys = [p for p in own_home.rglob("*") if p.is_file() and any(v.encode() in p.read_bytes() for v in KEYS.values())]
    assert not with_keys


MANY = tuple(f"A{chr(65 + k)}AUSDT" for k in range(24))


def test_a_kill_switch_in_the_middle_of_a_burst(own_home, monkeypatch, capsys):
    "Twenty-four symbols say BUY at one close, and half of their entries are slow to fill; while the eighth is on its way, the command engages the switch."
    for name, value in OPEN.items(): monkeypatch.setenv(name, value)
    configure_log()  # the runner is a thread here: its lines belong on stderr, as every command's do
    (own_home / "steps.py").write_text(STRATEGY)
    monkeypatch.syspath_prepend(str(own_home))
    monkeypatch.delitem(sys.modules, "steps", raising=False)
    middle, stations, sent = threading.Event(), [], []

    def operator(s, ports, session): return Operator(Board(session, "live", "steps", every_s=0.0), every_s=0.0, latch=Latch(s))

    def run():
        with sole_runner(), open_station(None, {"mode": "live"}, None, None, operator, None, evidence_lock) as station:
            execution = station.engine.venue
            real = execution.submit
            def submit(intent):
                real(intent)
                if intent.side != "BUY": return
                sent.append(time.monotonic())
                if len(sent) == 8: middle.set(); assert waited(lambda: kill_state()["engaged"])
            execution.submit = submit
            stations.append(station)
            station.run()

    with rehearse(MANY) as stage:
        own = json.loads(settings(stage))
        own |= {"universe": {"symbols": list(MANY)}, "risk": LOOSE | {"max_positions": 24}, "sizing": {"mode": "fixed_fraction", "fixed_fraction": 0.01}, "execution": {"entry": "limit_ioc"}}
        (own_home / "bot.yaml").write_text(json.dumps(own))
        runner = threading.Thread(target=run, daemon=True)
        runner.start()
        assert waited(lambda: stations and read_status()["alive"], 40)
        try:
            for symbol in MANY[::2]: stage.fault("delayed_fill", symbol=symbol, times=1, delay_ms=30_000)
            for _ in range(6):
                if middle.is_set(): break
                bars = stations[0].engine.row
                stage.jump(bars=1)
                assert waited(lambda: middle.is_set() or stations[0].engine.row > bars)
            assert middle.is_set(), "there was no burst"
            resting = sum(o["side"] == "BUY" and o["status"] == "NEW" for o in stage.books()["orders"])
            assert resting
            capsys.readouterr()
            asked = time.monotonic()
            assert main(["kill-switch", "engage", "--mode", "live", "--reason", "burst", "--json"]) == 0
            said, took = json.loads(capsys.readouterr().out), time.monotonic() - asked
            books = stage.books()
            ms = said["halt"]["ms"]
            buys = [o for o in books["orders"] if o["side"] == "BUY"]
            assert len(buys) == 8 and not [o for o in buys if o["status"] in ("NEW", "PARTIALLY_FILLED")], buys  # asked of the venue's own books
            assert said["engaged"] and ms is not None and 0 <= ms < 5_000, said
            burst = [v for v in stations[0].engine.verdicts]
            assert len(burst) == 24 and sum(v.allowed for v in burst) == 8 and all(v.reasons == ("KILL_SWITCH",) for v in burst[8:])
            assert {o["symbol"] for o in open_sells(books)} == {t["symbol"] for t in books["trades"]} and len(books["trades"]) == 8 - resting  # protection stays
            for _ in range(2):  # the market goes on rising
                row = stations[0].engine.row
                stage.jump(bars=1)
                assert waited(lambda: stations[0].engine.row > row)
            assert len([o for o in stage.books()["orders"] if o["side"] == "BUY"]) == 8 and len(stations[0].engine.verdicts) > 24
        finally:
            if stations: stations[0].stop()
            runner.join(20)
            sys.modules.pop("steps", None)
        with capsys.disabled(): print(f"\n  a burst of {len(burst)} proposals, switch engaged after {len(sent)} entries, {resting} of them resting: none open at the venue {ms} ms after the runner heard of it, {took:.2f} s after the command began")
        kill_file().unlink()  # somebody tidies up: the ledger remembers
        with pytest.raises(Refused, match="kill switch released"): open_station(None, {"mode": "live"}, killed=switch(load_settings(flags={"mode": "live"})), evidence=evidence_lock)
        assert len(stage.books()["orders"]) == len(books["orders"])


def waited(what, seconds=20.0) -> bool:
    "Did it come true?"
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end: time.sleep(0.01)
    return bool(found)


def test_a_read_only_or_strange_key_is_refused(own_home, stage):
    with Runner(own_home, stage, env={"EXCHANGE_API_KEY": "somebody-elses"}) as r:
        r.process.wait(40)
        assert r.process.returncode == 77 and "does not know this key" in r.err and "somebody-elses" not in r.err
    stage.street.gate.keys[KEYS["EXCHANGE_API_KEY"]] = Key(KEYS["EXCHANGE_API_SECRET"], withdraw=True)
    with Runner(own_home, stage) as r:
        r.process.wait(40)
        assert r.process.returncode == 77 and "the key may withdraw" in r.err
