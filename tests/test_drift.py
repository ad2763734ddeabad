"Drift on a real market and in the engine: quiet stays quiet, a change is found, and what follows is the same in every mode and across a restart."
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bnml.core.base import shared
from bnml.core.clock import VirtualClock, to_ms
from bnml.core.num import D
from bnml.data.feed import ReplayFeed
from bnml.data.panel import Panel
from bnml.data.synth import synth_bars
from bnml.domain.market import default_instrument
from bnml.ml.drift import DriftSettings, make_reference
from bnml.ml.families import names
from bnml.ml.features import matrix
from bnml.ml.health import DriftState, Level, fold, measure
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.train import train
from bnml.trade.assembly import assemble
from bnml.trade.breakers import RiskSettings
from bnml.trade.exits import ExitSettings
from bnml.trade.precheck import ExecutionSettings
from bnml.trade.learned import Learned
from bnml.trade.ledger import Ledger
from bnml.trade.scanner import ScannerSettings
from bnml.trade.sizing import SizingSettings
from bnml.venue.sim import SimVenue

HOUR = 3_600_000


def louder(bars: pd.DataFrame, row: int, times: float) -> pd.DataFrame:
    "The same market, jumping so much farther from a row on."
    old = bars["close"].to_numpy()
    moves = np.diff(np.log(old), prepend=np.log(old[0])) * np.where(np.arange(len(old)) < row, 1, times)
    close, out = old[0] * np.exp(np.cumsum(moves)), bars.copy()
    for name in ("open", "high", "low", "close"):
        wick = np.log(bars[name].to_numpy() / old) * np.where(np.arange(len(old)) < row, 1, times)
        out[name] = close * np.exp(wick)
    out["high"], out["low"] = out[["open", "high", "low", "close"]].max(axis=1), out[["open", "high", "low", "close"]].min(axis=1)
    return out


def levels(bars: pd.DataFrame, split: int, rows, columns) -> list[Level]:
    "The state after each look, the reference being what lies before the split."
    X, close, s = matrix(bars, interval="1h")[:, columns], bars["close"].to_numpy(), DriftSettings()
    reference = make_reference(X[1000:split], [names("1h")[c] for c in columns], np.zeros(split - 1000, np.int8), close=close[:split])
    state, out = DriftState(), []
    for r in rows:
        state = fold(state, measure(reference, X[r - s.window_bars:r], close[r - s.window_bars:r], settings=s), r * HOUR, HOUR, s)
        out.append(state.level)
    return out


def real(symbol: str) -> pd.DataFrame:
    root = shared()
    path = root / "data" / "binance" / f"{symbol}-1h.parquet" if root else None
    if path is None or not path.is_file(): pytest.skip("real candles are not on this machine")
    return pd.read_parquet(path).set_index("open_time")[["open", "high", "low", "close", "volume"]].astype(float)


def usable(bars: pd.DataFrame) -> np.ndarray:
    return np.flatnonzero(np.isfinite(matrix(bars, interval="1h")[1000:]).all(axis=0))[::2]


PAIRS = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "LTCUSDT", "DOGEUSDT"]


def test_stretches_of_the_same_real_market_raise_no_alarm():
    "Any stretch of what the reference was made from is the same market: 50 looks a pair, in random places."
    rng, degraded, watch, looks = np.random.default_rng(5), 0, 0, 0
    for symbol in PAIRS:
        bars = real(symbol)
        found = levels(bars, len(bars), sorted(rng.integers(1600, len(bars), 50).tolist()), usable(bars))
        degraded, watch, looks = degraded + found.count(Level.DEGRADED), watch + found.count(Level.WATCH), looks + len(found)
    assert looks == 300 and degraded == 0
    assert watch / looks <= 0.15, f"{watch} of {looks} looks said watch"


def test_the_year_after_training_is_rarely_degraded():
    "Real markets do change; the learned half and the other are still mostly alike."
    found = []
    for symbol in PAIRS:
        bars = real(symbol)
        found += levels(bars, 5000, range(5500, len(bars), 48), usable(bars))
    assert found.count(Level.DEGRADED) / len(found) <= 0.03


@pytest.mark.parametrize("times", [6.0, 0.15])
def test_a_real_market_that_changes_its_temper_is_found(times):
    for symbol in PAIRS[:3]:
        bars = louder(real(symbol), 6000, times)
        found = levels(bars, 5000, range(6500, 7500, 24), usable(bars))
        assert Level.DEGRADED in found[:10], f"{symbol}: {found}"


# the engine

FIRST = to_ms("2024-01-01")
START, END = 3300, 4300


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    "A model, and the market that it met: the same until row 3400, four times as loud after."
    calm = synth_bars("SYNUSDT", "1h", FIRST, FIRST + END * HOUR, seed=7)
    registry = Registry(tmp_path_factory.mktemp("models"))
    quick = ModelSettings(models=("lgb",), trees=8, n_splits=2, min_rows=500, feature_limit=30, threads=1, jobs=1, horizons=(3,), require_edge=False,
                          min_trades=5, min_confidence=0, context="", conformal_alpha=0.0)
    done = train({"SYNUSDT": calm}, quick, ["SYNUSDT"], "1h", to_ms=FIRST + START * HOUR, registry=registry)
    assert not done[0].error, done[0].error
    panel = Panel.from_frames({"SYNUSDT": louder(calm, 3400, 6.0)}, "1h")
    return SimpleNamespace(registry=registry, panel=panel)


def settings(**drift):
    costs = SimpleNamespace(maker=0.001, taker=0.001, slippage_bps=2.0)
    return SimpleNamespace(risk=RiskSettings(min_confidence=0, cooldown_minutes=0), sizing=SizingSettings(), exits=ExitSettings(), execution=ExecutionSettings(), scanner=ScannerSettings(half_turnover=1),
                           costs=costs, account=SimpleNamespace(quote="USDT"), drift=DriftSettings(**drift))


class Growing(ReplayFeed):
    "A complete panel told bar by bar, as a venue would."
    fast = False

    def events(self):
        for row in range(self.start_row, self.stop_row):
            yield "open", row
            yield "close", row


def engine(m, s, rows=(START, END), ledger=None, kind=ReplayFeed, **kw):
    panel, clock = m.panel, VirtualClock(int(m.panel.times[rows[0]]))
    venue = SimVenue({"SYNUSDT": default_instrument("SYNUSDT", float(panel.open[START, 0]))}, {"USDT": D(10_000)}, clock=clock)
    return assemble(Learned(m.registry, ["SYNUSDT"], "1h", (3,)), kind(panel, *rows), venue, clock, ledger, s, **kw)


def told(result):
    return result.fills, result.verdicts, result.equity.tolist()


def test_a_degraded_model_is_denied_by_name(market):
    free, held = engine(market, settings(enabled=False)).run(), engine(market, settings(on_degraded="stop")).run()
    assert "MODEL_DEGRADED" not in free.denied and held.denied["MODEL_DEGRADED"] > 0
    first = next(v for v in held.verdicts if "MODEL_DEGRADED" in v.reasons)
    assert first.time_ms > market.panel.times[3400] and "volatility" in first.detail
    after = [v for v in held.verdicts if v.time_ms >= first.time_ms + 80 * HOUR]
    assert after and not any(v.allowed for v in after)


def test_raising_asks_for_more_confidence(market):
    some = engine(market, settings(on_degraded="raise", raise_confidence=45.0)).run()
    doubted = [v for v in some.verdicts if "MODEL_DEGRADED" in v.reasons]
    assert doubted and all("< 45" in v.detail for v in doubted)
    assert engine(market, settings(raise_confidence=0.0)).run().denied["MODEL_DEGRADED"] == 0


def test_leaps_rows_and_events_agree(market):
    s = settings(on_degraded="stop")
    leap, rows, events = engine(market, s).run(), engine(market, s).run(leap=False), engine(market, s, kind=Growing).run()
    assert told(leap) == told(rows) == told(events) and leap.denied["MODEL_DEGRADED"]


def test_the_state_survives_a_restart_and_retraining_is_asked_for_once(market, tmp_path):
    s, asked = settings(on_degraded="stop"), []
    ask = lambda symbol, state: asked.append((symbol, state.level))
    whole = engine(market, s, kind=Growing)
    whole.run()
    url, verdicts = f"sqlite:///{tmp_path}/ledger.db", []
    for rows in ((START, 3700), (3700, END)):
        ledger = Ledger(url, "s", durable=False)
        ledger.begin("paper", "replay", "ml", {}, {"USDT": D(10_000)}, 0)
        part = engine(market, s, rows, ledger, Growing, ask=ask)
        verdicts += part.run().verdicts
        ledger.close()
    dump = lambda e: json.dumps(e.trust.records["SYNUSDT"].dump())
    assert dump(part) == dump(whole) and part.trust.states()["SYNUSDT"].level == Level.DEGRADED
    assert verdicts == whole.verdicts
    assert asked == [("SYNUSDT", Level.DEGRADED)]
    assert len(part.trust.records["SYNUSDT"].done) > 20
