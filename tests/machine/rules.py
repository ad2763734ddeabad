"Anything may happen at any moment: what may, and what must hold after it."
import os
from collections import Counter

import numpy as np
from hypothesis import HealthCheck, Phase, seed as with_seed, settings as hyp, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from . import judge
from .line import FAULTS
from .world import EXITS, LIMITS, SYMBOLS, WARM, World

EASY = st.sampled_from(["flat", "up", "down", "up", "down", "leap", "dip"])
HARD = st.sampled_from(["flat", "leap", "dip", "gap", "wide", "crash", "none"])
SAID = st.sampled_from([(1, 90.0), (1, 90.0), (0, 0.0), (1, 40.0), (-1, 80.0)])
EACH = lambda x: st.tuples(*[x] * len(SYMBOLS)).map(lambda t: dict(zip(SYMBOLS, t)))
FAULT = st.sampled_from([(call, kind) for call, kinds in FAULTS.items() for kind in kinds])
KINDS = {kind for kinds in FAULTS.values() for kind in kinds}
MIDST = st.sampled_from(["", "", "", "", "restart", "wait", "close", "pause", "away"])


class Account(RuleBasedStateMachine):
    "An account in a market of gaps and holes, at a venue that loses answers, in a process that dies."
    faulty, counted = True, Counter()

    def __init__(self):
        super().__init__()
        self.w = None

    @initialize(limits=st.sampled_from(list(LIMITS)), exits=st.sampled_from(list(EXITS)), fee=st.sampled_from(["quote", "base"]), participation=st.sampled_from([None, None, 0.1]),
                oco=st.booleans(), live=st.booleans())
    def begin(self, limits, exits, fee, participation, oco, live):
        self.w = World(limits, exits, fee, participation, oco, live=live)
        self._row(dict.fromkeys(SYMBOLS, "flat"), dict.fromkeys(SYMBOLS, (1, 90.0)), 1e9, "")

    def _row(self, shapes, said, volume, midst):
        w = self.w
        self.values = np.array([w.shape(s, shapes[s], volume) for s in SYMBOLS]).T
        w.open(dict(zip(SYMBOLS, self.values[0])))
        for ms in (1000, 1000, 2000): w.tend(ms)
        self._happens(midst, None)
        w.close(self.values, said)
        judge.at_close(w)

    @rule(shapes=EACH(EASY), said=EACH(SAID), midst=MIDST)
    def easy(self, shapes, said, midst): self._row(shapes, said, 1e9, midst)

    @rule(shapes=EACH(EASY), said=EACH(SAID))
    def easier(self, shapes, said): self._row(shapes, said, 1e9, "")

    @rule(shapes=EACH(HARD), said=EACH(SAID), volume=st.sampled_from([1e9, 1e9, 1e4, 0.0]), midst=MIDST)
    def hard(self, shapes, said, volume, midst): self._row(shapes, said, volume, midst)

    @rule(fault=FAULT, more=st.lists(FAULT, max_size=2), shapes=EACH(EASY), said=EACH(SAID))
    def troubled(self, fault, more, shapes, said):
        for call, kind in (fault, *more) if self.faulty else (): self.w.faults[call].append(kind)
        self._row(shapes, said, 1e9, "")

    @rule(n=st.integers(1, 14), kind=st.sampled_from(["crash", "crash", "disk"]), shapes=EACH(HARD), said=EACH(SAID))
    def deadly(self, n, kind, shapes, said):
        if self.faulty: self.w.fuse, self.w.fuse_kind = n, kind
        self._row(shapes, said, 1e9, "")

    @rule(what=st.sampled_from(["restart", "restart", "pause", "resume", "resume", "close", "kill", "release", "release", "dear", "cheap", "thin", "deep", "change"]),
          limits=st.sampled_from(list(LIMITS)), exits=st.sampled_from(list(EXITS)), symbol=st.sampled_from((None, *SYMBOLS)))
    def between(self, what, limits, exits, symbol):
        if what == "change": self.w.restart(limits, exits)
        else: self._happens(what, symbol)

    def _happens(self, what, symbol):
        w = self.w
        if what == "restart": w.restart(*w.profile)
        elif what == "away": w.away()
        elif what == "wait":
            for ms in (1000, 5000, 70_000, 600_000): w.tend(ms)
        elif what in ("dear", "cheap"): w.spread = {"dear": 50.0, "cheap": 2.0}[what]
        elif what in ("thin", "deep"): w.depth = {"thin": 1000.0, "deep": 1e9}[what]
        elif what in ("kill", "release"): w.killed = what == "kill"
        elif what:
            w.command(what, symbol)
            if what in ("pause", "resume"): w.paused = what == "pause"  # whoever dies over it hears it again before anything is bought
            w.tend_now()

    @invariant()
    def holds(self):
        if self.w is None: return
        self.w.steps += 1
        judge.every_step(self.w)

    def teardown(self):
        if self.w is None: return
        try:
            if self.w.engine is not None: self.finish()
            w = self.w
            self.counted.update(accounts=1, rows=len(w.panel) - WARM, entries=len(w.pcts), orders=len(w.x.attempts), fills=len(w.x.fills), starts=len(w.epochs),
                                deaths=sum(" died" in s or "disk is full" in s for s in w.story), faults=sum(any(f" {k} " in s for k in KINDS) for s in w.story))
        finally:
            if os.environ.get("BNML_STORY"): print("\n".join(self.w.story))
            self.w.done()

    def finish(self): judge.at_the_end(self.w)


def search(seed: int, examples: int, steps: int = 30, calm: bool = False, shrink: bool = False):
    "Play accounts until one breaks."
    class Played(Account): faulty = not calm

    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    bounds = hyp(max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False, report_multiple_bugs=False, phases=phases,
                 suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(with_seed(seed)(Played), settings=bounds)
