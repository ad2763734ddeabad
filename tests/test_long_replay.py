"Weeks of paper trading in the runner's own process: no error, no violation, flat memory, every loss explained; and the arithmetic that explains them is itself put to the test."
import json
import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from bnml.core.base import shared

from tests.drill import losses
from tests.drill.replays import ALWAYS, CASES, ROOM, candles, environment, fill_lake, one, run_case

HOUR, T0 = 3_600_000, 1_740_787_200_000


def real(folder="binance"):
    "Where the real candles are, or a skip that says so."
    if not (shared() and (shared() / "data" / folder).is_dir()): pytest.skip(f"real candles are not here: ../shared/data/{folder} is missing")
    return shared()


def sound(found, violations=0):
    assert found["failed"] == [] and found["violations"] == violations and found["audit"] == 0
    assert found["losses"]["broken"] == [] and found["losses"]["mark_error"] < 1e-9


def test_nine_pairs_of_five_minutes_by_a_rule():
    found = run_case("month-5m", real(), ("rules.crossover",), "2025-09-01:2025-09-06")["rules.crossover"]
    sound(found)
    assert found["bars"] == 9 * 5 * 288 and found["trades"] > 100 and found["rss_growth_mib"] < ROOM


def test_a_real_collapse_costs_what_was_planned_and_no_more():
    "OMUSDT lost nine tenths within three hours of 2025-04-13, while the strategy wanted to hold it at every bar."
    found = run_case("collapse-om", real(), (ALWAYS,), "2025-04-11:2025-04-16")["always.py:Always"]
    sound(found)
    day = found["losses"]["worst_day"]
    assert day["loss"] <= max(day["budget"], day["carried_risk"]) + day["gap"] + day["costs"] and found["max_drawdown"] < 0.05
    assert found["losses"]["worst_at_the_low"]["at_the_low"] >= found["losses"]["worst_trade"]["loss"] > 0  # candles do not say how fast the fall was; the report does


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    "A market with three falls of 70 % between two bars and a symbol that ends half-way, traded once: (home, report, candles)."
    case, home = CASES["collapse-made-up"], tmp_path_factory.mktemp("gaps")
    frames = candles(case, None)
    fill_lake(home, case, frames)
    found = one(case, ALWAYS, home, environment(home, case), frames)
    return home / "data" / "state" / "ledger.db", found, frames


def test_a_gap_costs_more_than_planned_by_the_gap_and_nothing_else(gaps):
    _, found, frames = gaps
    sound(found)
    worst = found["losses"]["worst_trade"]
    assert worst["symbol"] == "GAPUSDT" and worst["gap"] > 10 * worst["planned"] and worst["loss"] <= worst["planned"] + worst["gap"] + worst["costs"] + 1e-6
    day = found["losses"]["worst_day"]
    assert day["loss"] > day["budget"] and day["beyond"] == 0  # more than the budget, by the gap alone


def test_a_delisted_symbol_is_traded_to_its_end_and_stays_at_its_last_price(gaps):
    ledger, found, frames = gaps
    end = int(frames["ENDUSDT"].index[-1].value // 10**6) + HOUR
    s = losses.Session(ledger, frames, HOUR)
    mine = [p for p in s.positions if p.symbol == "ENDUSDT"]
    assert mine and max(p.buys[0]["time_ms"] for p in mine) > end - 48 * HOUR and losses.after_the_end(s) == []
    assert all(f["time_ms"] <= end for p in mine for f in (*p.buys, *p.sells))


DAMAGE = {
    "an exit below its stop and its bar's open": ("UPDATE fills SET raw_price = raw_price * 0.9, price = price * 0.9 WHERE fill_id IN (SELECT fill_id FROM fills JOIN intents USING (client_id) WHERE purpose = 'STOP' LIMIT 1)", "filled"),
    "more bought than was judged": ("UPDATE verdicts SET quantity = quantity * 0.5 WHERE allowed", "planned"),
    "no plan at all": ("UPDATE verdicts SET stop = price WHERE allowed", "planned"),
    "an equity that was not there": ("UPDATE equity SET equity = equity + 5 WHERE time_ms = (SELECT max(time_ms) FROM equity)", "equity is"),
    "a fee that nobody wrote down": ("UPDATE fills SET fee = '0' WHERE n = (SELECT min(n) FROM fills)", "equity is"),
    "a purchase after the end": ("UPDATE intents SET created_ms = created_ms + 5184000000 WHERE purpose = 'ENTRY' AND n = (SELECT max(n) FROM intents WHERE purpose = 'ENTRY' AND symbol = 'ENDUSDT')", "bought at"),
    "a day's budget of nothing": ("UPDATE sessions SET settings = json_set(settings, '$.risk.daily_loss_pct', 0.1)", "day of"),
    "a week's budget of nothing": ("UPDATE sessions SET settings = json_set(settings, '$.risk.weekly_loss_pct', 0.1)", "week of"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_checker_sees_what_has_no_excuse(gaps, what, tmp_path):
    ledger, _, frames = gaps
    copy = tmp_path / "ledger.db"
    with sqlite3.connect(ledger) as a, sqlite3.connect(copy) as b: a.backup(b)
    sql, said = DAMAGE[what]
    with sqlite3.connect(copy) as con: assert con.execute(sql).rowcount > 0
    broken = losses.report(copy, frames, HOUR)["broken"]
    assert any(said in b for b in broken), broken


def by_hand(folder, exit_raw, exit_open):
    "One position in a ledger written by hand: 2 coins at 100 with a stop at 95, sold by the stop in the third bar."
    path = Path(folder) / "hand.db"
    settings = {"risk": {"daily_loss_pct": 5, "weekly_loss_pct": 10}, "account": {"quote": "USDT"}}
    with sqlite3.connect(path) as con:
        con.executescript("""CREATE TABLE sessions (id, settings, balances, started_ms); CREATE TABLE equity (session, time_ms, equity);
            CREATE TABLE intents (session, n, client_id, symbol, purpose, position_id, stop_price, created_ms);
            CREATE TABLE fills (session, n, fill_id, client_id, symbol, side, quantity, price, raw_price, fee, time_ms);
            CREATE TABLE verdicts (session, n, symbol, allowed, time_ms, price, stop, quantity);""")
        con.execute("INSERT INTO sessions VALUES ('s', ?, ?, 0)", (json.dumps(settings), json.dumps({"USDT": "1000"})))
        con.execute("INSERT INTO verdicts VALUES ('s', 1, 'AUSDT', 1, ?, '100', 95.0, '2')", (T0,))
        for n, (cid, why, stop, t) in enumerate([("e", "ENTRY", None, 1), ("g", "STOP", "95", 1)], 2):
            con.execute("INSERT INTO intents VALUES ('s', ?, ?, 'AUSDT', ?, 'e', ?, ?)", (n, cid, why, stop, T0 + t * HOUR))
        for n, (cid, side, price, t) in enumerate([("e", "BUY", "100", HOUR + 250), ("g", "SELL", str(exit_raw), 3 * HOUR - 1)], 4):
            con.execute("INSERT INTO fills VALUES ('s', ?, ?, ?, 'AUSDT', ?, '2', ?, ?, '0.2', ?)", (n, cid, cid, side, price, price, T0 + t))
        worth = [1000.0, 1000 - 0.2, 1000 - 0.4 + 2 * (exit_raw - 100)]
        con.executemany("INSERT INTO equity VALUES ('s', ?, ?)", [(T0 + (k + 1) * HOUR, w) for k, w in enumerate(worth)])
    index = pd.DatetimeIndex(pd.to_datetime([T0 + k * HOUR for k in range(3)], unit="ms", utc=True))
    return path, {"AUSDT": pd.DataFrame({"open": [100.0, 100, exit_open], "low": [99.0, 99, 80], "close": [100.0, 100, 85]}, index=index)}


@pytest.mark.parametrize("exit_raw, exit_open, planned, gap, late", [(95.0, 99.0, 10.0, 0.0, 0.0), (90.0, 90.0, 10.0, 10.0, 0.0), (90.0, 99.0, 10.0, 0.0, 10.0)])
def test_a_trade_taken_apart_by_hand(exit_raw, exit_open, planned, gap, late, tmp_path):
    "Sold at the stop; sold at an open 5 below the stop; sold 5 below the stop in a bar that opened above it, which nothing excuses."
    ledger, frames = by_hand(tmp_path, exit_raw, exit_open)
    told = losses.report(ledger, frames, HOUR)
    t = told["worst_trade"]
    assert (t["planned"], t["gap"], t["late"], t["costs"]) == (planned, gap, late, pytest.approx(0.4))
    assert t["loss"] == pytest.approx(2 * (100 - exit_raw) + 0.4) and t["at_the_low"] == pytest.approx(2 * (100 - 80) + 0.4)
    assert bool(told["broken"]) == bool(late)
