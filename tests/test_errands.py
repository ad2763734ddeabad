"Orders by hand without a runner: the command opens the same desk for one purchase, one sale or one halt, and leaves a protected position behind."
import json
import sys
from decimal import Decimal

import pytest

from bnml.cli import main
from bnml.ops.status import read_status
from bnml.trade.ledger import Ledger
from tests.test_live import KEYS, OPEN, STRATEGY, SYMBOL, open_sells, rehearse, settings

D = Decimal


@pytest.fixture
def stage():
    "The account holds coins of its owner's: a BTC, and three of the very coin that is traded."
    with rehearse(BTC=D(1), SOL=D(3)) as it: yield it


@pytest.fixture
def bnml(own_home, stage, monkeypatch, capsys):
    "A command in this process: (exit code, its JSON)."
    (own_home / "bot.yaml").write_text(settings(stage))
    (own_home / "steps.py").write_text(STRATEGY)
    monkeypatch.syspath_prepend(str(own_home))
    monkeypatch.delitem(sys.modules, "steps", raising=False)
    def run(*words, **env):
        for name, value in {**OPEN, **env}.items(): monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = main([*words, "--json"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return code, json.loads(out) if out.strip() else {"error": err}
    yield run
    sys.modules.pop("steps", None)


def total(books, coin) -> Decimal:
    "Free and locked."
    b = books["balances"][coin]
    return D(b["free"]) + D(b["locked"])


def test_bought_protected_and_sold_without_a_runner_and_the_owner_s_coins_stay(own_home, stage, bnml):
    code, said = bnml("trade", "place", SYMBOL, "--quote", "300", "--mode", "live")
    assert (code, said["allowed"], said["session"]) == (0, True, "live-binance-rehearsal"), said
    books, status = stage.books(), read_status()
    held = D(said["held"])
    stops = open_sells(books)
    assert len(books["trades"]) == 1 and 0 < held <= D(books["trades"][0]["qty"]) and stops and sum(D(o["origQty"]) for o in stops if o["type"].startswith("STOP_LOSS")) <= held
    assert status["external"]["coins"] == {"BTC": "1", "SOL": "3"} and 9_990 < status["equity"] <= 10_000, status  # neither the BTC nor the SOL is equity
    with Ledger(None, said["session"]) as ledger: assert ledger.sessions()[-1]["balances"] == {"USDT": D(10_000)}

    code, said = bnml("kill-switch", "engage", "--mode", "live", "--reason", "drill")
    assert code == 0 and said["engaged"] and 0 <= said["halt"]["ms"] < 5_000 and open_sells(stage.books()), said  # protection stays
    code, said = bnml("trade", "close", SYMBOL, "--mode", "live")  # a halt keeps nobody from selling
    books = stage.books()
    assert (code, said["left"]) == (0, []) and not open_sells(books)
    bought, sold = (sum(D(t["qty"]) for t in books["trades"] if t["isBuyer"] is side) for side in (True, False))
    assert bought >= sold > held * D("0.99") and total(books, "BTC") == 1 and D(3) <= total(books, "SOL") < D("3.01")
    assert not [p for p in own_home.rglob("*") if p.is_file() and any(v.encode() in p.read_bytes() for v in KEYS.values())]


def test_locks_risk_and_a_flattening_halt_without_a_runner(stage, bnml):
    assert bnml("trade", "place", SYMBOL, "--quote", "300", "--mode", "live", ALLOW_LIVE="0")[0] == 77
    assert bnml("trade", "place", SYMBOL, "--quote", "300")[0] == 77  # live has to be said on the command too
    code, said = bnml("trade", "place", SYMBOL, "--quote", "9000", "--mode", "live")
    assert code == 77 and "MAX_SYMBOL_EXPOSURE" in said["reasons"], said
    assert stage.books()["orders"] == []
    assert bnml("trade", "place", SYMBOL, "--quote", "300", "--mode", "live")[0] == 0
    code, said = bnml("kill-switch", "engage", "--flatten", "--mode", "live", ALLOW_LIVE="0")
    assert code == 0 and said["engaged"] and said["halt"]["ms"] is None and "ALLOW_LIVE=1" in said["halt"]["why"] and open_sells(stage.books())
    assert "`bnml kill-switch engage --flatten --mode live` again from a shell in which these are put right" in said["halt"]["why"] and "open    " not in said["halt"]["why"]
    code, said = bnml("kill-switch", "engage", "--flatten", "--mode", "live")
    books = stage.books()
    assert code == 0 and said["halt"]["ms"] is not None and said["halt"]["flatten"] and not open_sells(books), said
    assert D(3) <= total(books, "SOL") < D("3.01")
