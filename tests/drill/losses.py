"""What a session lost, and by whose doing: planned risk, the gap that a bar made, or costs.

Reads the ledger's rows with sqlite3 and the candles with pandas; nothing of bnml is imported, so that nothing of it can be wrong in the same way.
Of each position: entry × (price − first stop) is what was planned; below the stop in force an exit may fill only as far as its own bar opened
there; fees and slippage are the costs. What is lost beyond the three has no excuse. `at_the_low` is the loss had every stop been filled at its bar's low:
candles do not say how fast a fall was. Of each day and week: the loss from the period's first equity
may not exceed the budget (or the risk that was open when the period began, for nothing has to be bought to lose it), the same gaps and costs."""
import json
import math
import sqlite3
from bisect import bisect_right
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

D, DAY, WEEK, MONDAY = Decimal, 86_400_000, 604_800_000, 345_600_000
HAIR = 1e-9  # relative: floats added in another order


def rows(con: sqlite3.Connection, table: str, session: str) -> list[dict]:
    order = {"equity": "time_ms"}.get(table, "n")
    found = con.execute(f"SELECT * FROM {table} WHERE session = ? ORDER BY {order}", (session,))
    names = [c[0] for c in found.description]
    return [dict(zip(names, r)) for r in found]


class Candles:
    "Opens and last closes of many symbols by time."
    def __init__(self, frames: dict[str, pd.DataFrame], step: int):
        self.step, self.times, self.open, self.low, self.close = step, {}, {}, {}, {}
        for symbol, f in frames.items():
            self.times[symbol] = f.index.as_unit("ms").asi8
            self.open[symbol], self.low[symbol], self.close[symbol] = (f[k].to_numpy() for k in ("open", "low", "close"))

    def bar(self, symbol: str, t: int) -> tuple[float, float]:
        "(open, low) of the bar that `t` is in; NaN where there is none."
        k = bisect_right(self.times[symbol], t) - 1
        there = k >= 0 and t < self.times[symbol][k] + self.step
        return (float(self.open[symbol][k]), float(self.low[symbol][k])) if there else (float("nan"), float("nan"))

    def last_close(self, symbol: str, t: int) -> float:
        "Close of the newest bar that was over at `t`."
        k = bisect_right(self.times[symbol], t - self.step) - 1
        return float(self.close[symbol][k]) if k >= 0 else float("nan")

    def end(self, symbol: str) -> int:
        "When the last bar was over."
        return int(self.times[symbol][-1]) + self.step


class Position:
    "One position's rows."
    def __init__(self, entry: dict):
        self.entry, self.symbol, self.buys, self.sells, self.stops, self.verdict = entry, entry["symbol"], [], [], [], None

    def stop(self, t: int) -> float | None:
        "The highest stop asked for until `t`, the first one when none was yet."
        asked = [s for at, s in self.stops if at <= t]
        return max(asked) if asked else self.stops[0][1] if self.stops else None

    def held(self, t: int) -> float:
        return float(sum(D(f["quantity"]) for f in self.buys if f["time_ms"] <= t) - sum(D(f["quantity"]) for f in self.sells if f["time_ms"] <= t))


class Session:
    "A session of a ledger in SQLite, and the candles it saw."
    def __init__(self, ledger: Path, frames: dict[str, pd.DataFrame], step: int, session: str | None = None):
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as con:
            con.row_factory = None
            name = session or con.execute("SELECT id FROM sessions ORDER BY started_ms DESC, id DESC LIMIT 1").fetchone()[0]
            self.head = dict(zip(("settings", "balances"), map(json.loads, con.execute("SELECT settings, balances FROM sessions WHERE id = ?", (name,)).fetchone())))
            self.intents, self.fills, self.verdicts, equity = (rows(con, t, name) for t in ("intents", "fills", "verdicts", "equity"))
        self.candles, self.risk = Candles(frames, step), self.head["settings"]["risk"]
        self.times, self.equity = [e["time_ms"] for e in equity], np.array([e["equity"] for e in equity])
        self.positions, self.ticks = self._positions(), self._ticks()

    def _ticks(self) -> dict[str, float]:
        "The grid that a symbol's stops and fills stand on: their greatest common divisor."
        seen = defaultdict(list)
        for x in (*((i["symbol"], i["stop_price"]) for i in self.intents), *((f["symbol"], f["price"]) for f in self.fills)):
            if x[1]: seen[x[0]].append(D(x[1]))
        fine = {s: min(x.as_tuple().exponent for x in xs) for s, xs in seen.items()}
        return {s: math.gcd(*(int(x.scaleb(-fine[s])) for x in xs)) * 10.0 ** fine[s] for s, xs in seen.items()}

    def _positions(self) -> list[Position]:
        by_id, allowed = {}, defaultdict(list)
        for v in self.verdicts:
            if v["allowed"]: allowed[v["symbol"]].append(v)
        intents = {i["client_id"]: i for i in self.intents}
        for i in self.intents:
            if i["purpose"] != "ENTRY": continue
            p = by_id[i["position_id"]] = Position(i)
            known = [v for v in allowed[i["symbol"]] if v["time_ms"] + self.candles.step <= i["created_ms"]]
            p.verdict = known[-1] if known else None
        for i in self.intents:
            if i["purpose"] == "STOP" and i["position_id"] in by_id: by_id[i["position_id"]].stops.append((i["created_ms"], float(i["stop_price"])))
        for f in self.fills:
            i = intents[f["client_id"]]
            p = by_id[i["position_id"]]
            (p.buys if i["purpose"] == "ENTRY" else p.sells).append({**f, "own_stop": float(i["stop_price"]) if i["purpose"] == "STOP" else None, "why": i["purpose"]})
        for p in by_id.values(): p.stops.sort()
        return [p for p in by_id.values() if p.buys]


def _costs(f: dict) -> tuple[float, float]:
    "(fee, slippage) of a fill in quote; fees are taken in quote."
    sign = 1 if f["side"] == "BUY" else -1
    return float(f["fee"]), float((D(f["price"]) - D(f["raw_price"] or f["price"])) * D(f["quantity"])) * sign


def trade(s: Session, p: Position) -> dict:
    "One position's loss, taken apart; `beyond` is what nothing explains."
    bought, raw_in = sum(float(f["quantity"]) for f in p.buys), sum(float(f["quantity"]) * float(f["raw_price"]) for f in p.buys)
    first = p.stops[0][1] if p.stops else 0.0
    gap = late = costs = made = deeper = 0.0
    for f in p.buys: costs += sum(_costs(f))
    for f in p.sells:
        q, raw, stop, (opened, low) = float(f["quantity"]), float(f["raw_price"]), f["own_stop"] or p.stop(f["time_ms"]) or 0.0, s.candles.bar(p.symbol, f["time_ms"])
        costs += sum(_costs(f))
        made += q * raw
        gap += q * max(0.0, first - min(opened, first))
        deeper += q * max(0.0, raw - low) if f["why"] == "STOP" else 0.0
        late += q * max(0.0, min(stop, opened) - raw)         # filled worse than the stop and worse than its bar's open: nobody's gap
    left = float(sum(D(f["quantity"]) for f in p.buys) - sum(D(f["quantity"]) for f in p.sells))
    last = s.candles.last_close(p.symbol, s.times[-1])
    gap += left * max(0.0, first - last)                      # not sold: where the last bar left it
    planned = raw_in - first * bought
    loss = raw_in - made - left * last + costs
    v, slack = p.verdict, HAIR * raw_in
    judged = (float(v["price"]) - v["stop"]) * float(v["quantity"]) if v and v["stop"] is not None else 0.0
    began = float(p.buys[0]["raw_price"])
    stretch = max(1.0, began / float(v["price"])) if v else 1.0                              # the same distance, from a fill above the close
    dearer = sum(float(f["quantity"]) * max(0.0, float(f["raw_price"]) - began) for f in p.buys)   # what had to wait for volume, after the stop was set
    return {"symbol": p.symbol, "opened_ms": p.buys[0]["time_ms"], "closed_ms": p.sells[-1]["time_ms"] if p.sells and left <= 1e-9 * bought else None,
            "exit": p.sells[-1]["why"] if p.sells else None, "loss": loss, "planned": planned, "gap": gap, "costs": costs, "at_the_low": loss + deeper, "late": late, "left": left,
            "beyond": max(0.0, loss - planned - gap - costs - slack), "over_judged": max(0.0, planned - judged * stretch - dearer - s.ticks[p.symbol] * bought - slack)}


def _gaps(s: Session, begin: int, end: int, at: int) -> float:
    "Quote lost below the stops in force in (begin, end], and what at `at` still stood below them unsold."
    total = 0.0
    for p in s.positions:
        for f in p.sells:
            stop = f["own_stop"] or p.stop(f["time_ms"]) or 0.0
            if begin < f["time_ms"] <= end: total += float(f["quantity"]) * max(0.0, stop - float(f["raw_price"]))
        q = p.held(at - 1)
        if q > 0: total += q * max(0.0, (p.stop(at - 1) or 0.0) - s.candles.last_close(p.symbol, at))
    return total


def period(s: Session, begin: int, length: int, pct: float) -> dict | None:
    "The deepest loss of a day or a week against what it may be; None where it lost nothing."
    low, high = bisect_right(s.times, begin), bisect_right(s.times, begin + length - 1)
    if high <= low: return None
    start = float(s.equity[low - 1]) if low else float(s.equity[0])
    k = low + int(np.argmin(s.equity[low:high]))
    worst, at = start - float(s.equity[k]), s.times[k]
    if worst <= 0: return None
    carried = sum(q * max(0.0, s.candles.last_close(p.symbol, begin) - (p.stop(begin) or 0.0)) for p in s.positions if (q := p.held(begin - 1)) > 0)
    costs = sum(sum(_costs(f)) for p in s.positions for f in (*p.buys, *p.sells) if begin <= f["time_ms"] < begin + length)
    gaps, budget = _gaps(s, begin - 1, at, at), start * pct / 100
    return {"begin_ms": begin, "loss": worst, "budget": budget, "carried_risk": carried, "gap": gaps, "costs": costs,
            "beyond": max(0.0, worst - max(budget, carried) - gaps - costs - HAIR * start)}


def marked(s: Session) -> float:
    "Largest relative difference between the recorded equity and cash plus coins at their last known closes."
    moves = sorted(((f["time_ms"], f) for f in s.fills), key=lambda x: x[0])
    quote, cash, coins, k, worst = s.head["settings"]["account"]["quote"], 0.0, defaultdict(float), 0, 0.0
    cash = float(s.head["balances"][quote])
    for t, said in zip(s.times, s.equity):
        while k < len(moves) and moves[k][0] < t:
            f, sign = moves[k][1], 1 if moves[k][1]["side"] == "BUY" else -1
            cash -= sign * float(f["quantity"]) * float(f["price"]) + float(f["fee"])
            coins[f["symbol"]] += sign * float(f["quantity"])
            k += 1
        worth = cash + sum(q * s.candles.last_close(c, t) for c, q in coins.items() if abs(q) > 1e-12)
        worst = max(worst, abs(worth - said) / said)
    return worst


def after_the_end(s: Session) -> list[str]:
    "Entries and fills in a symbol whose candles had ended."
    out = [f"{i['symbol']} bought at {i['created_ms']}" for i in s.intents if i["purpose"] == "ENTRY" and i["created_ms"] > s.candles.end(i["symbol"])]
    return out + [f"{f['symbol']} filled at {f['time_ms']}" for f in s.fills if f["time_ms"] > s.candles.end(f["symbol"])]


def report(ledger: Path, frames: dict[str, pd.DataFrame], step: int, session: str | None = None) -> dict:
    "Everything above, with the worst of each; `broken` lists what had no excuse."
    s = Session(ledger, frames, step, session)
    trades, begun = [trade(s, p) for p in s.positions], s.times[0]
    days = [d for b in range(begun // DAY * DAY, s.times[-1], DAY) if (d := period(s, b, DAY, s.risk["daily_loss_pct"]))]
    weeks = [w for b in range((begun - MONDAY) // WEEK * WEEK + MONDAY, s.times[-1], WEEK) if (w := period(s, b, WEEK, s.risk["weekly_loss_pct"]))]
    peak = np.maximum.accumulate(s.equity)
    broken = [f"trade {k}: {t['symbol']} opened {t['opened_ms']}, {key} {t[key]:.6f}" for t in trades for k, key in (("lost", "beyond"), ("filled", "late"), ("planned", "over_judged")) if t[key] > 0]
    broken += [f"{k} of {d['begin_ms']}: {d['beyond']:.6f} beyond budget, gaps and costs" for k, x in (("day", days), ("week", weeks)) for d in x if d["beyond"] > 0]
    broken += after_the_end(s)
    if (off := marked(s)) > 1e-6: broken.append(f"equity is {off:.2e} away from cash and coins at the last prices")
    worst = lambda x, key="loss": max(x, key=lambda d: d[key], default=None)
    return {"positions": len(trades), "worst_trade": worst(trades), "largest_gap": worst(trades, "gap"), "worst_at_the_low": worst(trades, "at_the_low"), "worst_day": worst(days), "worst_week": worst(weeks),
            "max_drawdown_pct": 100 * float(((peak - s.equity) / peak).max()), "mark_error": off, "broken": broken}
