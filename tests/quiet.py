"A rehearsal of one coin that stands at 100, for tests that look at orders and not at prices."
from decimal import Decimal
from types import SimpleNamespace

import numpy as np

from bnml.domain.market import default_instrument
from bnml.domain.plan import ExitPlan, FeeModel
from bnml.domain.signal import Action, Proposal, Signal, Verdict
from bnml.venue.gate import Key
from bnml.venue.rehearsal import serve

D, MINUTE, SYMBOL, START = Decimal, 60_000, "SOLUSDT", 1_700_000_040_000 // 60_000 * 60_000


def market(n=200):
    flat = np.full((n, 1), 100.0)
    return SimpleNamespace(symbols=(SYMBOL,), interval="1m", times=START + np.arange(n) * MINUTE, open=flat, high=flat + 0.1, low=flat - 0.1, close=flat, volume=np.full((n, 1), 1e6))


def served(**coins):
    "The venue, with dollars and these coins in the account; fees of a tenth of a percent come out of what was bought."
    return serve(market(), {SYMBOL: default_instrument(SYMBOL, 100.0)}, {"USDT": D(100_000), **coins}, {"k": Key("s")}, start_ms=START + 10 * MINUTE, fees=FeeModel(0.001, 0.001, "base"))


class VenueClock:
    "The venue's time."
    def __init__(self, wire): self.now_ms = wire.now_ms


def purchase() -> tuple[Proposal, Verdict]:
    "Ten coins at 100, and risk's consent."
    p = Proposal(SYMBOL, START, Signal(SYMBOL, START, Action.BUY, 90.0), D(100), 2.0, 1.0, 2.0, ExitPlan(), D(10))
    return p, Verdict(p.proposal_id, SYMBOL, START, True, (), D(10))
