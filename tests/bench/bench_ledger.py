"Durable intents per second: the ledger beside raw sqlite3 with the same rows, the same schema and the same promises to the disk."
import sqlite3
import tempfile
import time
from dataclasses import replace
from decimal import Decimal
from statistics import median

from bnml.domain.orders import OrderIntent, OrderType, Side
from bnml.trade.ledger import Ledger, intent_row
from bnml.trade.tables import connect

INTENT = OrderIntent("b0", "BTCUSDT", Side.BUY, OrderType.MARKET, Decimal("0.01388"), created_ms=1_740_787_200_000, reason="rules.crossover")


def _rate(save, intents) -> float:
    "Intents a second through `save`, each on the disk before the next."
    start = time.perf_counter()
    for i in intents:
        save(i)
    return len(intents) / (time.perf_counter() - start)


def _raw(folder: str):
    "The least that sqlite3 itself can do: one insert and one commit an intent."
    connect(f"sqlite:///{folder}/raw.db").close()  # the same tables
    db = sqlite3.connect(f"{folder}/raw.db")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    names = ["session", "n", *intent_row(INTENT)]
    sql = f"INSERT INTO intents ({','.join(names)}) VALUES ({','.join('?' * len(names))})"

    def save(i):
        db.execute(sql, ("s", 1, *intent_row(i).values()))
        db.commit()
    return save


def run(n: int = 200, rounds: int = 15) -> dict:
    "Both sides take turns and the median of the rounds counts: the disk is shared and noisy."
    with tempfile.TemporaryDirectory() as folder:
        ledger, raw = Ledger(f"sqlite:///{folder}/ledger.db", "bench"), _raw(folder)
        ours, theirs = [], []
        for r in range(rounds):
            intents = [replace(INTENT, client_id=f"b{r}x{k}", position_id=f"b{r}x{k}") for k in range(n)]
            theirs.append(_rate(raw, intents))
            ours.append(_rate(ledger.save_intent, intents))
        ledger.close()
    return {"ledger_intents_per_s": round(median(ours)), "sqlite3_intents_per_s": round(median(theirs)),
            "ratio": round(median(b / a for a, b in zip(ours, theirs)), 2)}


if __name__ == "__main__":
    import json
    print(json.dumps(run()))
