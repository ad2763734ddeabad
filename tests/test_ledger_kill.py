"A kill -9 in the middle of trading: every intent that was said to be saved is in the ledger."
import os
import signal

from bnml.trade.ledger import Ledger
from tests import nursery

WRITER = """
import sys
from decimal import Decimal
from bnml.domain.orders import OrderIntent, OrderType, Side
from bnml.domain.signal import Verdict
from bnml.trade.ledger import Ledger

ledger = Ledger(sys.argv[1], "killed")
for k in range(10**9):
    ledger.add_verdict(Verdict(f"BTCUSDT-{k}", "BTCUSDT", k, True, (), Decimal(1)))
    ledger.save_intent(OrderIntent(f"b{k}", "BTCUSDT", Side.BUY, OrderType.MARKET, Decimal(1), created_ms=k))
    print(f"b{k}", flush=True)
"""


def test_every_intent_that_was_saved_survives_a_kill(tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    writer = nursery.start("-c", WRITER, url)
    said = [writer.stdout.readline().strip() for _ in range(200)]
    os.kill(writer.pid, signal.SIGKILL)
    said += writer.stdout.read().split()
    assert writer.wait() == -signal.SIGKILL
    with Ledger(url, "killed") as ledger:
        kept = [i.client_id for i in ledger.intents()]
        judged = {v.time_ms for v in ledger.verdicts()}
    assert said[0] == "b0" and len(said) >= 200
    assert set(said) <= set(kept)
    assert set(kept) <= {f"b{t}" for t in judged}, "an intent without the verdict that allowed it"


def test_a_restart_goes_on_where_the_kill_left_off(tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    writer = nursery.start("-c", WRITER, url)
    for _ in range(5):
        writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    with Ledger(url, "killed") as ledger:
        first = ledger.intents()[0]
        ledger.save_intent(first)
        assert [i.client_id for i in ledger.intents()].count("b0") == 1
