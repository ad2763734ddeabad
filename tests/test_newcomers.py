"A symbol that is listed while the runner trades: it joins between two bars, once it can be judged, and nothing that is held notices."
import threading
import time
from decimal import Decimal

import numpy as np
import pytest

from bnml.core.clock import floor_ms
from bnml.data.panel import Panel
from bnml.domain.market import default_instrument
from bnml.domain.orders import Purpose
from bnml.domain.plan import FeeModel
from bnml.ops.desk import open_station
from bnml.venue.gate import Key
from bnml.venue.rehearsal import serve

MINUTE, BEFORE, NEED = 60_000, 60, 11  # five windows of two bars, and the bar that is judged
KEYS = {"EXCHANGE_API_KEY": "rehearsed-key-0123", "EXCHANGE_API_SECRET": "rehearsed-secret-4567"}
STRATEGY = '''
import numpy as np
from bnml.domain.signal import Strategy, signals

class Greedy(Strategy):
    "Wants everything, at every bar, as soon as it may."
    name, warmup_bars = "greedy", 5
    def frame(self, symbol, bars):
        return signals(symbol, bars, np.arange(len(bars)) >= 0, np.zeros(len(bars), bool))
'''


@pytest.fixture
def stage():
    "SOLUSDT since an hour ago, and NEWUSDT, whose first bar opens two minutes from now."
    start = floor_ms(int(time.time() * 1000), "1m")
    n = BEFORE + 60
    values = np.stack([np.full((n, 2), x) for x in (100.0, 100.1, 99.9, 100.0, 1e6)])
    values[3, ::2] = 100.05
    values[:, : BEFORE + 2, 1] = np.nan
    panel = Panel(("SOLUSDT", "NEWUSDT"), "1m", start + (np.arange(n) - BEFORE) * MINUTE, values)
    listed = {s: default_instrument(s, 100.0) for s in panel.symbols}
    with serve(panel, listed, {"USDT": Decimal(10_000)}, {KEYS["EXCHANGE_API_KEY"]: Key(KEYS["EXCHANGE_API_SECRET"])}, start_ms=start + 5_000, fees=FeeModel(0.001, 0.001, "base")) as it: yield it


def within(seconds, what, why):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"{why} did not come"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("mode", ["testnet", "paper"])
def test_a_listing_that_appears_is_traded_without_a_restart(stage, own_home, monkeypatch, mode):
    for k, v in KEYS.items(): monkeypatch.setenv(k, v)
    (own_home / "greedy.py").write_text(STRATEGY)
    monkeypatch.syspath_prepend(str(own_home))
    flags = {"mode": mode, "strategy": "greedy:Greedy", "data.source": "live", "data.interval": "1m", "data.history_bars": 40, "data.grace_s": 0.2, "universe.dynamic": True, "universe.min_quote_volume": 1.0,
             "universe.refresh_s": 1, "exchange.testnet": mode == "testnet", "exchange.rest_url": stage.url, "exchange.ws_url": stage.ws_url, "exchange.ws_api_url": stage.ws_api_url, "scanner.atr_bars": 2, "scanner.turnover_bars": 2,
             "exits.stop_atr": 20.0, "exits.trail_after_atr": None, "exits.hard_stop_pct": None, "risk.leader": "", "risk.max_spread_bps": 100.0, "risk.max_depth_share": 1.0, "risk.cooldown_minutes": 0}
    with open_station(flags=flags) as station:
        first, feed, desk = station.engine, station.engine.feed, station.engine.desk
        assert feed.panel.symbols == ("SOLUSDT",)
        runner = threading.Thread(target=station.run, daemon=True)
        runner.start()
        alive = lambda: feed.stream and feed.stream.healthy and not feed.stream.filling
        def bar(n=1):
            within(20, lambda: alive() and len(feed.panel) > station.engine.row + 1, "the stream and an open row")
            time.sleep(0.1)  # for what is done at its open
            done = station.done
            stage.jump(bars=n)
            within(20, lambda: station.done >= done + n, f"bar {done + n}")
        try:
            for _ in range(2): bar()
            within(20, lambda: desk.holdings.get("SOLUSDT") and desk.holdings["SOLUSDT"].legs and "SOLUSDT" in desk.portfolio.positions, "SOLUSDT and its stop")
            held = [l.stop for l in desk.holdings["SOLUSDT"].legs]
            bar(3)
            within(20, lambda: feed.health()["newcomers"] == ["NEWUSDT"], "the listing")  # it is known, and far too young
            bar(NEED - 4)                                                               # one bar short of enough
            time.sleep(1.2)                                                             # a look of the universe's watch, and one more
            assert feed.watch.ready is None and station.engine is first and feed.panel.symbols == ("SOLUSDT",)
            bar()
            within(20, lambda: feed.watch.ready or station.engine is not first, "a history that suffices")
            if station.engine is first: bar()
            within(20, lambda: station.engine is not first, "the newcomer")
            for _ in range(3):
                bar()
                if "NEWUSDT" in desk.holdings: break
            within(20, lambda: desk.holdings.get("NEWUSDT") and desk.holdings["NEWUSDT"].legs, "NEWUSDT and its stop")
            bar()
        finally:
            station.stop()
            runner.join(30)
        assert not runner.is_alive() and feed.panel.symbols == ("SOLUSDT", "NEWUSDT") and feed.health()["newcomers"] == []
        assert station.engine.desk is desk and station.engine.risk is first.risk
        listed_ms = int(feed.panel.times[np.flatnonzero(~np.isnan(feed.panel.close[:, 1]))[0]])
        entry = next(o for o in desk.orders.values() if o.intent.symbol == "NEWUSDT" and o.intent.purpose == Purpose.ENTRY)
        asked = [v.time_ms for v in station.engine.verdicts if v.symbol == "NEWUSDT"]
        assert asked[0] >= listed_ms + NEED * MINUTE and entry.intent.created_ms >= asked[0] + MINUTE  # nobody was asked before its history sufficed
        rows = (feed.panel.times[:station.engine.row + 1] >= listed_ms)
        assert not np.isnan(feed.panel.close[:station.engine.row + 1][rows]).any() and (np.diff(station.result.times) == MINUTE).all()
        assert [l.stop for l in desk.holdings["SOLUSDT"].legs] == held and all(desk.orders[c].is_open for c in held)  # the stop that was there is there
        told = station.summary()
        assert (told["symbols"], told["violations"], told["equity_start"]) == (["SOLUSDT", "NEWUSDT"], 0, 10_000.0)
        if mode == "testnet":
            there = {o["clientOrderId"] for o in stage.books()["orders"] if o["status"] == "NEW"}
            assert {*held, *(l.stop for l in desk.holdings["NEWUSDT"].legs)} <= there
