"""What the venue has against what the ledger says. The venue's books are read by its control, the ledger's tables by plain SQL: nothing of the trading code
judges itself."""
import json
from collections import Counter, defaultdict
from decimal import Decimal

import sqlalchemy as sa

from bnml.domain.orders import Purpose, client_order_id

D, ZERO = Decimal, Decimal(0)
OVER = {"FILLED", "CANCELED", "EXPIRED", "REJECTED", "DENIED"}
ASKING_MS = 600_000  # venue time for which "I don't know" is an honest word about an order that the venue has not: it may still be on its way
NAMES = {"NEW": {"ACCEPTED", "PENDING_CANCEL"}, "PARTIALLY_FILLED": {"PARTIALLY_FILLED", "PENDING_CANCEL"}, "FILLED": {"FILLED"}, "CANCELED": {"CANCELED"},
         "EXPIRED": {"EXPIRED", "CANCELED"}, "REJECTED": {"REJECTED"}}


class Books:
    "The ledger's tables of one session."
    def __init__(self, url: str, session: str):
        self.engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.pool.NullPool)
        self.session = session

    def read(self) -> dict[str, list[dict]]:
        "All at one moment; empty before the tables are made."
        with self.engine.connect() as conn:
            if conn.dialect.name == "postgresql": conn.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            if not sa.inspect(conn).has_table("alembic_version"): return {}
            rows = {t: [dict(r) for r in conn.execute(sa.text(f"SELECT * FROM {t} WHERE session = :s"), {"s": self.session}).mappings()]
                    for t in ("intents", "orders", "fills", "verdicts", "state")}
            rows["sessions"] = [dict(r) for r in conn.execute(sa.text("SELECT * FROM sessions WHERE id = :s"), {"s": self.session}).mappings()]
        return rows


def _balances(start, trades) -> dict:
    "What the fills make of the first balances."
    out = defaultdict(Decimal, start)
    for f in trades:
        base, quote = f["symbol"][:-4], f["symbol"][-4:]
        sign = 1 if f["side"] == "BUY" else -1
        out[base] += sign * D(f["quantity"])
        out[quote] -= sign * D(f["quantity"]) * D(f["price"])
        out[f["fee_asset"]] -= D(f["fee"])
    return {a: q for a, q in out.items() if q}


def differences(books: dict, rows: dict, namespace: str | None = None) -> list[str]:
    "Every way in which the two do not tell the same story."
    if not rows: return ["the ledger has no tables"] if books["orders"] else []
    found = []
    theirs, ours = {}, {i["client_id"]: i for i in rows["intents"]}
    for o in books["orders"]:
        if o["clientOrderId"] in theirs: found.append(f"duplicate: two orders at the venue are called {o['clientOrderId']}")
        theirs[o["clientOrderId"]] = o
    states = {o["client_id"]: o for o in rows["orders"]}
    for cid, o in theirs.items():
        if cid not in ours: found.append(f"orphan: {o['side']} {o['type']} {o['symbol']} {cid} is not in the ledger"); continue
        state = states.get(cid, {"status": "PENDING", "filled": "0"})
        if state["status"] not in NAMES[o["status"]] or D(state["filled"]) != D(o["executedQty"]):
            found.append(f"state: {ours[cid]['purpose']} {cid} is {state['status']} {state['filled']} in the ledger, {o['status']} {o['executedQty']} at the venue")
    for cid in set(ours) - set(theirs):
        asking = books.get("time_ms", 0) - ours[cid].get("created_ms", 0) <= ASKING_MS
        if (status := states.get(cid, {"status": "PENDING"})["status"]) not in OVER | ({"UNKNOWN"} if asking else set()): found.append(f"state: {ours[cid]['purpose']} {cid} is {status} in the ledger and unknown at the venue")
    return found + _trades(books, rows) + _doubles(rows, states, theirs) + (_ids(rows, namespace) if namespace else [])


def _trades(books: dict, rows: dict) -> list[str]:
    "Fills and balances, digit by digit."
    found, by_id = [], {o["orderId"]: o["clientOrderId"] for o in books["orders"]}
    have = Counter((f["fill_id"], f["client_id"], D(f["quantity"]), D(f["price"]), D(f["fee"]), f["fee_asset"]) for f in rows["fills"])
    want = Counter((f"{t['symbol']}-{t['id']}", by_id[t["orderId"]], D(t["qty"]), D(t["price"]), D(t["commission"]), t["commissionAsset"]) for t in books["trades"])
    found += [f"lost fill: {k[0]} of {k[1]}, {k[2]} at {k[3]}" for k in want - have] + [f"invented fill: {k[0]} of {k[1]}" for k in have - want]
    if not rows["sessions"]: return found + (["the session was never begun"] if books["orders"] else [])
    start = {a: D(v) for a, v in json.loads(rows["sessions"][0]["balances"]).items()}
    folded, there = _balances(start, rows["fills"]), {a: D(b["free"]) + D(b["locked"]) for a, b in books["balances"].items()}
    for asset in sorted({*folded, *there}):
        if (gap := there.get(asset, ZERO) - folded.get(asset, ZERO)): found.append(f"balance: {asset} differs by {gap}")
    return found


def _doubles(rows: dict, states: dict, theirs: dict) -> list[str]:
    "One bar allows one entry, and one verdict sends one."
    allowed = Counter((v["symbol"], v["time_ms"]) for v in rows["verdicts"] if v["allowed"])
    found = [f"duplicate: {n} entries were allowed for {s} at {t}" for (s, t), n in allowed.items() if n > 1]
    sent = Counter(i["symbol"] for i in rows["intents"] if i["purpose"] == "ENTRY")
    judged = Counter(s for s, _ in allowed)
    return found + [f"duplicate: {n} entries of {s} and {judged[s]} verdicts that allowed one" for s, n in sent.items() if n > judged[s]]


def _ids(rows: dict, namespace: str) -> list[str]:
    "A client id can be made again from what it stands for."
    bars = defaultdict(list)
    for v in rows["verdicts"]:
        if v["allowed"]: bars[v["symbol"]].append(v["time_ms"])
    def can(i): return any(client_order_id(namespace, i["symbol"], t + shift, Purpose.ENTRY, n) == i["client_id"] for t in bars[i["symbol"]] for shift in (0, 60_000) for n in range(2))
    return [f"id: {i['client_id']} of {i['symbol']} can't be made again" for i in rows["intents"] if i["purpose"] == "ENTRY" and not can(i)]


def bare(books: dict, smallest: Decimal = D(6)) -> dict[str, Decimal]:
    "Coins at the venue that no open sell order with a stop, and no order that is selling, stands for; worth less than an order may be is a crumb."
    out = {}
    prices = {}
    for o in books["orders"]:
        if D(o["executedQty"]): prices[o["symbol"]] = D(o["cummulativeQuoteQty"]) / D(o["executedQty"])
    for symbol, price in prices.items():
        b = books["balances"].get(symbol[:-4])
        if b is None: continue
        left = D(b["free"]) + D(b["locked"])
        for o in books["orders"]:
            if o["symbol"] == symbol and o["side"] == "SELL" and o["status"] in ("NEW", "PARTIALLY_FILLED") and (o["type"].startswith("STOP_LOSS") or o["type"] == "MARKET"):
                left -= D(o["origQty"]) - D(o["executedQty"])
        if left * price > smallest: out[symbol] = left
    return out


def given_up(rows: dict) -> set[str]:
    "Sales by the runner's own watch of positions that it had not even tried to protect: a start that protects first knows none."
    tried = {i["position_id"] for i in rows.get("intents", ()) if i["purpose"] == "STOP"}
    return {i["client_id"] for i in rows.get("intents", ()) if i.get("reason") == "UNPROTECTED" and i["position_id"] not in tried}
