"Paper trading killed and taken up again, beside a twin that never died: a simulated exchange forgets with its process, so ledger and bars alone must bring the same account back."
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, Phase, seed as with_seed, settings as hyp, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from bnml.core.clock import VirtualClock
from bnml.domain.market import default_instrument
from bnml.domain.orders import Purpose, Status
from bnml.domain.plan import FeeModel, SlippageModel
from bnml.trade.assembly import assemble
from bnml.trade.ledger import Ledger
from bnml.venue.fills import simulated
from bnml.venue.spread import BarSpread

from .rules import EACH, EASY, SAID
from .world import EXITS, HOUR, LIMITS, PRICES, SHAPES, START, SYMBOLS, T0, HandFeed, Script, _history, folder, settings_of


HARD = st.sampled_from(["flat", "leap", "dip", "gap", "wide", "crash"])  # a bar for everybody: an entry that waits for a price is not carried over a restart
RARELY = st.sampled_from([False] * 14 + [True])


class Desk:
    "One paper account: its ledger outlives its process, its exchange does not."
    live, spread, depth, traded = False, 2.0, 1e9, 1.0

    def __init__(self, limits: str, exits: str, fee: str, participation, oco: bool, fill: str = "open", wide: bool = False):
        self.settings, self.made, self.panel, self.lines, self.clock = settings_of(limits, exits, fee), (fee, participation, oco, fill, wide), _history(False), {}, VirtualClock(T0)
        self.last, self.dir, self.ledger, self.closed = dict(zip(SYMBOLS, PRICES)), folder(), None, len(self.panel)
        self.begin()

    def begin(self):
        "A process begins with what is on the disk; the one before was killed."
        if self.ledger: self.ledger._conn.close()
        fee, participation, oco, fill, wide = self.made
        costs, listed = self.settings.costs, {s: replace(default_instrument(s, p), oco=oco) for s, p in zip(SYMBOLS, PRICES)}
        self.ledger = Ledger(f"sqlite:///{self.dir / 'ledger.db'}", "s")
        self.ledger.begin("paper", "hand", "script", self.settings.model_dump(mode="json"), START, T0)
        sim = simulated(fill, BarSpread() if wide else None, listed, START, FeeModel(costs.maker, costs.taker, fee), SlippageModel(costs.slippage_bps), costs.latency_ms, participation, self.clock)
        self.engine = assemble(Script(self.lines), HandFeed(self.panel, self, self.closed), sim, self.clock, self.ledger, self.settings)

    def row(self, values: np.ndarray, said: dict, dies: bool):
        "A whole row; `dies`: the process is killed between its open and its close."
        row = self.panel.open_row(int(self.panel.times[-1]) + HOUR, values[0])
        self.clock.set_ms(max(int(self.panel.times[row]), self.clock.now_ms()))
        self.engine.open_row(row)
        if dies: self.begin(); self.engine.open_row(row)
        self.panel.close_row(row, values)
        self.lines[row] = said
        self.last |= {s: float(values[3, j]) for j, s in enumerate(SYMBOLS) if values[3, j] == values[3, j]}
        self.engine.scanner.scan_row(row)
        self.closed = len(self.panel)
        self.engine.close_row(row)

    def told(self) -> dict:
        "What must not depend on how often it died: a stop whose number a death kept back is withdrawn and placed anew, so what counts is what it sells and where."
        d, x = self.engine.desk, self.engine.venue
        return {"fills": [(f.time_ms // HOUR, f.symbol, f.side, f.quantity, f.price, f.fee) for f in d.fills], "balances": {a: x for a, x in d.portfolio.balances.items() if x},
                "coins": {a: q for a, q in x.balances().items() if q}, "open": Counter((o.intent.symbol, o.intent.purpose, o.intent.quantity - o.filled, o.intent.price, o.intent.stop_price) for o in x.open_orders()),
                "stops": {s: h.exits and h.exits.stop for s, h in d.holdings.items()}, "risk": {k: v for k, v in self.engine.risk.snapshot().items() if k in ("losses", "marks")}}

    def over(self):
        self.ledger._conn.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def sound(d: Desk):
    "However it died: the exchange has what the desk counts, nothing is below zero, no fill is there twice, and stops sell all that was bought."
    desk, x = d.engine.desk, d.engine.venue
    mine, theirs = ({a: q for a, q in b.items() if q} for b in (desk.portfolio.balances, x.balances()))
    assert mine == theirs and all(q > 0 for q in theirs.values()), f"the desk counts {mine}, the exchange {theirs}"
    assert len({f.fill_id for f in desk.fills}) == len(desk.fills)
    for h in desk.holdings.values():
        if not h.exits or h.leaving: continue
        open_ = [o for o in x.open_orders(h.symbol) if o.intent.purpose == Purpose.STOP]
        assert sum(o.intent.quantity - o.filled for o in open_) + x.instrument(h.symbol).step > h.quantity, f"{h.quantity} {h.symbol} are held, {open_} sell them"


def taken_back(d: Desk) -> bool:
    "Is an order withdrawn that has not arrived yet? A ledger knows that it was sent, not whether it came to trade in between."
    return any(d.engine.desk.orders[i.client_id].status == Status.PENDING_CANCEL for r in d.engine.venue._requests for i in r.intents)


class Twins(RuleBasedStateMachine):
    "The same bars and signals, for one that is killed and one that is not."
    counted = Counter()

    def __init__(self):
        super().__init__()
        self.both, self.died = (), False

    @initialize(limits=st.sampled_from(list(LIMITS)), exits=st.sampled_from(list(EXITS)), fee=st.sampled_from(["quote", "base"]), participation=st.none(), oco=st.booleans(),
                fill=st.sampled_from(["open", "vwap"]), wide=st.booleans())
    def begin(self, **made): self.both = Desk(**made), Desk(**made)

    def _row(self, shapes, said, volume, dies):
        mortal, twin = self.both
        values = np.full((5, len(SYMBOLS)), np.nan)
        for j, s in enumerate(SYMBOLS):
            if (shape := SHAPES[shapes[s]]) is None: continue
            tick, last = float(twin.engine.venue.instrument(s).tick), twin.last[s]
            values[:, j] = [*(max(tick, round(last * k / tick) * tick) for k in shape), volume / last]
        mortal.row(values, said, dies), twin.row(values, said, False)
        self.died = self.died or dies
        self.counted.update(rows=1, deaths=int(dies))

    @rule(shapes=EACH(EASY), said=EACH(SAID), dies=RARELY)
    def easy(self, shapes, said, dies): self._row(shapes, said, 1e9, dies)

    @rule(shapes=EACH(HARD), said=EACH(SAID), volume=st.sampled_from([1e9, 1e9, 1e4]), dies=RARELY)
    def hard(self, shapes, said, volume, dies): self._row(shapes, said, volume, dies)

    @rule()
    def restart(self):
        self.died = self.died or taken_back(self.both[0])
        self.both[0].begin()
        self.counted.update(restarts=1)

    @invariant()
    def same(self):
        if not self.both: return
        sound(self.both[0])
        if self.died: return  # what was on its way within the bar is sent anew, under other names and a little later
        one, other = (d.told() for d in self.both)
        for what in other: assert one[what] == other[what], f"{what} after a restart: {one[what]}, and without: {other[what]}"

    def teardown(self):
        if self.both: self.counted.update(accounts=1, fills=len(self.both[1].engine.desk.fills))
        for d in self.both: d.over()


def search(seed: int, examples: int, steps: int = 30, shrink: bool = False):
    "Play twins until they differ."
    bounds = hyp(max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False, report_multiple_bugs=False,
                 phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate], suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(with_seed(seed)(Twins), settings=bounds)
