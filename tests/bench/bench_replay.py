"The engine with its full risk path over twenty symbols, signals made beforehand; beside backtesting.py on the same bars."
import gc
import statistics
import time
import warnings
from decimal import Decimal

import pandas as pd

from bnml.core.clock import VirtualClock, to_ms
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.domain.market import default_instrument
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.ml.indicators import ema
from bnml.ops.settings import Settings
from bnml.trade.assembly import assemble, round_trip_bps
from bnml.trade.rules import Crossover
from bnml.trade.scanner import Scanner
from bnml.venue.sim import SimVenue

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT", "BNBUSDT", "ADAUSDT", "LTCUSDT", "BCHUSDT", "LINKUSDT", "AVAXUSDT", "DOTUSDT",
           "TRXUSDT", "XLMUSDT", "ATOMUSDT", "UNIUSDT", "ETCUSDT", "FILUSDT", "NEARUSDT", "AAVEUSDT")
CASES = {"slow": (200, 800), "middle": (100, 400), "busy": (24, 96)}  # averages that cross: fewer or more orders a bar


def market(bars: int) -> Panel:
    start = to_ms("2023-01-01")
    return Panel.from_frames(synth_market(SYMBOLS, "1h", start, start + bars * 3_600_000, 3), "1h")


def engine(strategy, panel: Panel, scanner: Scanner, settings: Settings, start: int):
    "The default settings: every risk check, OCO pairs, trailing, partial targets, time and hard stop."
    clock, c = VirtualClock(int(panel.times[start])), settings.costs
    instruments = {s: default_instrument(s, float(panel.open[start, j])) for j, s in enumerate(panel.symbols)}
    venue = SimVenue(instruments, {"USDT": Decimal(10_000)}, FeeModel(c.maker, c.taker), SlippageModel(c.slippage_bps), c.latency_ms, c.participation, clock)
    return assemble(strategy, ReplayFeed(panel, start), venue, clock, None, settings, scanner=scanner)


def timed(make, repeats: int = 3) -> tuple[float, float, object]:
    "Median wall and processor seconds after one warm-up, and the last result."
    result, spent = make().run(), []
    for _ in range(repeats):
        runner = make()
        gc.collect()
        start = time.perf_counter(), time.process_time()
        result = runner.run()
        spent.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return *(statistics.median(x) for x in zip(*spent)), result


def case(panel: Panel, fast: int, slow: int, repeats: int) -> dict:
    settings, strategy = Settings(), Crossover(fast, slow)
    scanner = Scanner(strategy, panel, settings.exits.plan(), settings.scanner, round_trip_bps(settings.costs))
    scanner.scan_all()
    start = min(strategy.warmup_bars, len(panel) // 2)
    seconds, cpu, r = timed(lambda: engine(strategy, panel, scanner, settings, start), repeats)
    return {"rule": f"ema {fast}/{slow}", "symbol_bars": r.bars, "seconds": seconds, "cpu_seconds": cpu, "bars_per_s": r.bars / seconds, "orders": len(r.orders), "fills": len(r.fills),
            "trades": len(r.trades), "verdicts": len(r.verdicts), "rows_visited": r.visited, "us_per_order": seconds / max(1, len(r.orders)) * 1e6}


def peer(panel: Panel, fast: int, slow: int, symbols: int = 4) -> dict:
    "backtesting.py, one symbol after another: the same crossing, a fixed stop, no risk, no filters, no partial targets."
    from backtesting import Backtest, Strategy
    from backtesting.lib import crossover

    class Cross(Strategy):
        def init(self):
            self.fast, self.slow = (self.I(lambda x, n=n: ema(x, n), self.data.Close, name=f"ema{n}") for n in (fast, slow))

        def next(self):
            if crossover(self.fast, self.slow) and not self.position: self.buy(size=0.2, sl=self.data.Close[-1] * 0.95)
            elif crossover(self.slow, self.fast) and self.position: self.position.close()

    spent, trades = 0.0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for symbol in panel.symbols[:symbols]:
            bars = panel.frame(symbol)
            bars = pd.DataFrame(bars.to_numpy(), index=bars.index.tz_localize(None), columns=["Open", "High", "Low", "Close", "Volume"])
            test = Backtest(bars, Cross, cash=1e9, commission=0.001, finalize_trades=True)
            start = time.perf_counter()
            trades += int(test.run()["# Trades"])
            spent += time.perf_counter() - start
    return {"rule": f"ema {fast}/{slow}", "symbol_bars": symbols * len(panel), "seconds": spent, "bars_per_s": symbols * len(panel) / spent, "trades": trades}


def run(bars: int = 20_000, repeats: int = 3) -> dict:
    "Bars a second at three densities of trading, and the peer's at the same rules."
    panel = market(bars)
    ours = {name: case(panel, *rule, repeats) for name, rule in CASES.items()}
    out = {"symbols": len(panel.symbols), "bars": bars, "aim_bars_per_s": 500_000, "floor_bars_per_s": 150_000, **ours}
    try:
        out["backtesting.py"] = {name: peer(panel, *rule) for name, rule in CASES.items() if name != "middle"}
    except ModuleNotFoundError as e:
        out["backtesting.py"] = f"skipped: {e.name} is not installed (bench extra)"
    return out


if __name__ == "__main__":
    import json
    print(json.dumps(run(), indent=1))
