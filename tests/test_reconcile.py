"Planted differences come back under their own name with their own money: in made-up ledgers by chance, and in replays of the engine."
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings as hyp, strategies as st

from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.domain.market import default_instrument
from bnml.domain.plan import FeeModel
from bnml.lab.reconcile import CAUSES, reconcile
from bnml.lab.replay import instruments_for, replay
from bnml.lab.worlds import World, world
from bnml.trade.breakers import RiskSettings
from bnml.trade.exits import ExitSettings
from bnml.trade.ledger import Ledger
from bnml.trade.precheck import ExecutionSettings
from bnml.trade.rules import Crossover
from bnml.trade.scanner import ScannerSettings
from bnml.trade.sizing import SizingSettings

HOUR, RATE, FINE, COARSE = 3_600_000, 0.00075, Decimal("0.0001"), Decimal("0.25")
SYMBOLS, HOURS = ("AAAUSDT", "BBBUSDT", "CCCUSDT"), 400
PRICES = {s: 100 * np.exp(np.random.default_rng(i).normal(0, 0.01, HOURS).cumsum()) for i, s in enumerate(SYMBOLS)}
TIMES = pd.to_datetime(np.arange(HOURS) * HOUR, unit="ms", utc=True).rename("open_time")
PANEL = Panel.from_frames({s: pd.DataFrame(dict(open=p, high=p, low=p, close=p, volume=1.0), index=TIMES) for s, p in PRICES.items()}, "1h")


def trade(symbol, entry, leave, quantity=1.0, rate=RATE, slip=(0.0, 0.0), late=(0, 0), reason="SIGNAL"):
    "A trade at the opens of two hours, as the venue would book it."
    entry, leave = entry + late[0], leave + late[1]
    bought, sold = (float(PRICES[symbol][h]) * (1 + x) for h, x in zip((entry, leave), slip))
    fees = rate * quantity * (bought + sold)
    return dict(symbol=symbol, side="BUY", quantity=quantity, entry_time_ms=entry * HOUR + 250, entry_price=bought, exit_time_ms=leave * HOUR + 250, exit_price=sold,
                exit_reason=reason, fees=fees, pnl=quantity * (sold - bought) - fees, position_id=f"{symbol}{entry - late[0]}")


def verdict(t, reasons=""):
    at = pd.Timestamp(t["entry_time_ms"] // HOUR * HOUR - HOUR, unit="ms", tz="UTC")
    return dict(time=at, symbol=t["symbol"], allowed=not reasons, reasons=reasons, quantity=0.0, detail="")


VERDICTS = ["time", "symbol", "allowed", "reasons", "quantity", "detail"]
PLANTS = ("none", "silent", "denied", "lost", "late in", "late out", "fee", "price in", "price out", "lot", "new signal", "let in", "found", "size")
CAUSE = {"none": "", "silent": "signal", "denied": "filter", "lost": "missed", "late in": "timing", "late out": "timing", "fee": "fee", "price in": "price", "price out": "price",
         "lot": "filter", "new signal": "signal", "let in": "filter", "found": "extra", "size": "size"}
plans = st.lists(st.tuples(st.sampled_from(SYMBOLS), st.sampled_from(PLANTS), st.integers(1, 4), st.integers(1, 3), st.integers(2, 400), st.floats(0.0001, 0.02)), max_size=24)


def told(plan):
    "Two worlds that differ by the plan, and the money that each cause must have."
    there, here, said, meant, money = [], [], [], [], dict.fromkeys(CAUSES, 0.0)
    for n, (symbol, plant, held, late, quarters, x) in enumerate(plan):
        at = dict(symbol=symbol, entry=10 + 15 * n, leave=10 + 15 * n + held, quantity=quarters / 4)
        if plant == "lot": at["quantity"] += 0.0825
        base = trade(**at)
        other = {"late in": dict(late=(late, 5)), "late out": dict(late=(0, late)), "fee": dict(rate=RATE * (1 + 50 * x)), "price in": dict(slip=(x, 0)), "price out": dict(slip=(0, -x)),
                 "lot": dict(quantity=float(Decimal(repr(at["quantity"])) // COARSE * COARSE)), "size": dict(quantity=at["quantity"] + 0.1)}
        actual = trade(**{**at, **other.get(plant, {})})
        if plant not in ("new signal", "let in", "found"): here.append(base)
        if plant not in ("silent", "denied", "lost"): there.append(actual)
        if plant not in ("silent",): said.append(verdict(base, "DAILY_LOSS" if plant == "denied" else ""))
        if plant not in ("new signal",): meant.append(verdict(base, "DAILY_LOSS" if plant == "let in" else ""))
        if CAUSE[plant]: money[CAUSE[plant]] += (actual["pnl"] if plant not in ("silent", "denied", "lost") else 0.0) - (base["pnl"] if plant not in ("new signal", "let in", "found") else 0.0)
    venues = [{s: replace(default_instrument(s, 100.0), step=step) for s in SYMBOLS} for step in (COARSE, FINE)]
    worlds = [World(world(trades).trades, pd.DataFrame(v, columns=VERDICTS).astype({"allowed": bool, "time": "datetime64[ms, UTC]"}), None, i)
              for trades, v, i in zip((there, here), (said, meant), venues)]
    return *worlds, money


@hyp(max_examples=40, deadline=None)
@given(plans)
def test_random_differences_come_back(plan):
    there, here, money = told(plan)
    r = reconcile(there, here, "1h", PANEL)
    found = {(p.symbol, round(p.entry_time_ms / HOUR)): p.causes for p in r.pairs.itertuples()}
    wanted = {(symbol, 10 + 15 * n): CAUSE[plant] for n, (symbol, plant, *_) in enumerate(plan)}
    assert found == wanted
    assert r.pairs[list(CAUSES)].sum().to_dict() == pytest.approx(money, rel=1e-9, abs=1e-7)
    assert r.difference == pytest.approx(there.trades.pnl.sum() - here.trades.pnl.sum(), abs=1e-7)
    assert r.same == (not any(wanted.values())) and (not r.same or not r.alarms)


@hyp(max_examples=10, deadline=None)
@given(plans)
def test_a_telling_agrees_with_itself(plan):
    for one in told(plan)[:2]:
        r = reconcile(one, World(one.trades.sample(frac=1, random_state=3).reset_index(drop=True), one.verdicts, None, one.instruments), "1h", PANEL)
        assert r.same and r.difference == 0 and not r.alarms and (r.pairs[list(CAUSES)] == 0).all().all()


@hyp(max_examples=15, deadline=None)
@given(plans, st.floats(0.0001, 0.01), st.floats(0.0001, 0.01), st.integers(1, 3))
def test_several_differences_in_one_trade_add_up(plan, fee, slip, late):
    "Late, dearer and at another fee at once: each has its part, and the parts are the whole."
    for symbol, _, held, *_ in plan[:3]:
        base, actual = trade(symbol, 20, 20 + held), trade(symbol, 20, 20 + held, rate=RATE + fee, slip=(slip, 0.0), late=(0, late))
        row = reconcile([actual], [base], "1h", PANEL).pairs.iloc[0]
        moved, q = PRICES[symbol][20 + held + late] - PRICES[symbol][20 + held], 1.0
        assert row.timing == pytest.approx(q * moved * (1 - RATE), abs=1e-9)
        assert row.price == pytest.approx(-q * PRICES[symbol][20] * slip * (1 + RATE), abs=1e-9)
        assert row.fee == pytest.approx(-fee * q * (actual["entry_price"] + actual["exit_price"]), abs=1e-9)
        assert row[list(CAUSES)].sum() == pytest.approx(actual["pnl"] - base["pnl"], abs=1e-9)


# ---- the engine's own worlds ----

def bag(**x): return SimpleNamespace(**x)


def of(**costs):
    return bag(risk=RiskSettings(), sizing=SizingSettings(mode="fixed_quote", fixed_quote=500.0), exits=ExitSettings(), execution=ExecutionSettings(), scanner=ScannerSettings(),
               costs=bag(**{**dict(maker=0.001, taker=0.001, fee_asset="quote", slippage_bps=2.0, latency_ms=250, participation=0.1), **costs}), account=bag(quote="USDT", start_balance=Decimal(10_000)))


@pytest.fixture(scope="module")
def market():
    return Panel.from_frames(synth_market(["BTCUSDT", "SOLUSDT"], "1h", "2025-01-01", "2025-02-16"), "1h")


@pytest.fixture(scope="module")
def planned(market):
    return replay(Crossover(), market, of(), 336, audit=False)


def beside(market, planned, settings=None, strategy=None, **options):
    other = replay(strategy or Crossover(), market, settings or of(), 336, audit=False, **options)
    return reconcile(world(other, options.get("instruments")), world(planned, instruments_for(market, 336)), "1h", market)


def test_the_same_replay_twice_is_the_same(market, planned):
    r = beside(market, planned)
    assert len(r.pairs) == len(planned.result.trades) > 15 and r.same and r.difference == 0 and not r.alarms


def test_a_venue_with_another_fee(market, planned):
    r = beside(market, planned, of(maker=0.0015, taker=0.0015))
    assert set(r.totals.index) == {"fee"} and r.totals.trades["fee"] == len(r.pairs)
    assert r.totals.money["fee"] == pytest.approx(-0.5 * sum(float(t.fees) for t in planned.result.trades), rel=1e-6)


def test_a_venue_with_worse_prices(market, planned):
    r = beside(market, planned, of(slippage_bps=12.0))
    assert r.totals.index[0] == "price" and "timing" not in r.totals.index and "fee" not in r.totals.index and any("other prices" in a for a in r.alarms)


def test_a_venue_with_another_lot(market, planned):
    lots = {s: replace(i, step=i.step * 100, min_qty=i.step * 100) for s, i in instruments_for(market, 336).items()}
    r = beside(market, planned, instruments=lots)
    assert set(r.totals.index) == {"filter"} and r.totals.trades["filter"] > 15


def test_a_minimum_that_denies(market, planned):
    high = {s: replace(i, min_notional=Decimal(5_000)) if s == "SOLUSDT" else i for s, i in instruments_for(market, 336).items()}
    r = beside(market, planned, instruments=high)
    alone = r.pairs[r.pairs.twin == "expected"]
    assert set(alone.symbol) == {"SOLUSDT"} and set(alone.cause) == {"filter"} and alone.detail.str.startswith("denied: ").all()
    assert r.difference == pytest.approx(-sum(float(t.pnl) for t in planned.result.trades if t.symbol == "SOLUSDT"))


def test_a_strategy_that_is_silent(market, planned):
    class Mute(Crossover):
        def frame(self, symbol, bars):
            f = super().frame(symbol, bars)
            return replace(f, action=np.where(f.times == skipped, 0, f.action).astype(np.int8))
    first = planned.result.trades[3]
    skipped = first.entry_time_ms // HOUR * HOUR - HOUR
    gone = [t for t in planned.result.trades if t.entry_time_ms == first.entry_time_ms]
    r = beside(market, planned, strategy=Mute())
    lost = r.pairs[(r.pairs.twin == "expected") & (r.pairs.entry_time_ms == first.entry_time_ms)]
    assert set(lost.cause) == {"signal"} and lost.signal.sum() == pytest.approx(-sum(float(t.pnl) for t in gone))


def test_orders_that_are_late(market, planned):
    r = beside(market, planned, of(latency_ms=8_000))
    assert set(r.totals.index) <= {"timing"} and r.totals.trades["timing"] > 15 and any("at another moment" in a for a in r.alarms)
    assert beside(market, planned, of(latency_ms=400)).same


def test_a_ledger_beside_its_replay(market, planned, tmp_path):
    with_ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", "s", durable=False)
    with_ledger.begin(mode="paper", source="replay", strategy="rules.crossover", settings={}, balances={"USDT": Decimal(10_000)}, started_ms=0)
    replay(Crossover(), market, of(), 336, audit=False, ledger=with_ledger)
    r = reconcile(with_ledger, planned, "1h", market)
    with_ledger.close()
    assert r.same and len(r.pairs) == len(planned.result.trades)
