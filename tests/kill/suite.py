"The whole of it: named steps, then random moments, on SQLite or PostgreSQL."
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.postgres import emptied, postgres

from .child import STEPS
from .lives import Found, Nursery, named_kill, random_kill, scene, secrets_in

EACH = 25  # kills on one venue and ledger; then both begin anew, with another market


@contextmanager
def database(name: str):
    "A function that gives the URL of an empty ledger: None = SQLite in the runner's home."
    if name == "sqlite": yield lambda: None; return
    with postgres() as url: yield lambda: emptied(url)


def run(
    name: str = "sqlite",
    kills: int = 200,
    seed: int = 0,
    steps: Sequence[str] = tuple(STEPS),
    repeats: int = 1,
    broken: str = "",
    say: Callable[[str], None] = lambda text: None,
    keep: Path | None = None,
    nursery: Nursery | None = None,
    first: bool = False,  # the first problem is enough
) -> Found:
    "Named kills, then random ones; what was found."
    found, began, told = Found(name, seed), time.monotonic(), []

    def report(text: str):
        for p in found.problems[len(told):]: told.append(p); say(p)
        say(f"{text}: {len(found.problems)} problems")
    with (nullcontext(keep) if keep else TemporaryDirectory(prefix="bnml-kill-")) as folder, database(name) as fresh:
        folder, turn = Path(folder), 0
        folder.mkdir(exist_ok=True)
        own = None if nursery else Nursery(folder)
        nursery = nursery or own
        try:
            plans = [(s, 1 + r) for r in range(repeats) for s in steps]
            for some in [plans[i:i + EACH] for i in range(0, len(plans), EACH)]:
                with scene(seed * 1000 + turn, folder / f"{turn}", nursery, fresh(), found, broken) as it:
                    for step, n in some:
                        if not named_kill(it, step, n) or (first and found.problems): break
                        report(f"{step} ({n})")
                turn += 1
            done = 0
            while done < kills:
                with scene(seed * 1000 + turn, folder / f"{turn}", nursery, fresh(), found, broken) as it:
                    for _ in range(min(EACH, kills - done)):
                        if not random_kill(it, done) or (first and found.problems): done = kills; break
                        done += 1
                        report(f"{done} of {kills} killed")
                    else:
                        last(it)
                turn += 1
        finally:
            if own: own.close()
        found.problems += [f"a secret is in {p}" for p in secrets_in(folder)]
    found.seconds = round(time.monotonic() - began, 1)
    return found


def last(it):
    "After the last kill: one more start, compared, and its journal against its ledger."
    from bnml.trade.journal import read_lines

    from .lives import readied
    if not readied(it, f"seed {it.found.seed}, the last start"): return
    it.compare(f"seed {it.found.seed}, the last start")
    told = read_lines(it.home / "data/journal")
    if not told: return
    _, rows = it.look()
    fills, written = sorted(f["fill_id"] for f in rows["fills"]), sorted(l["fill_id"] for l in told if l["event"] == "fill")
    if fills != written: it.found.add("the journal", [f"journal: {len(written)} fills, {len(fills)} in the ledger, {len(set(fills) ^ set(written))} differ"])
