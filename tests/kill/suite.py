"The whole of it: named steps, then random moments, on SQLite or PostgreSQL."
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.postgres import NoServer, emptied, postgres

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
    "Named kills, then random ones; what was found, also when a part of it failed."
    found, began, told = Found(name, seed), time.monotonic(), []

    def report(text: str):
        for p in found.problems[len(told):]: told.append(p); say(p)
        say(f"{round(time.monotonic() - began)} s, {text}: {len(found.problems)} problems")
    jobs = [(s, 1 + r) for r in range(repeats) for s in steps] + [(None, n) for n in range(kills)]
    try:
        with (nullcontext(keep) if keep else TemporaryDirectory(prefix="bnml-kill-", ignore_cleanup_errors=True)) as folder, database(name) as fresh:
            folder = Path(folder)
            folder.mkdir(exist_ok=True)
            with nullcontext(nursery) if nursery else closing(Nursery(folder)) as nursery:
                turn = 0
                while jobs and not (first and found.problems):
                    guarded(found, f"seed {seed}, scene {turn}", lambda: play(jobs, seed * 1000 + turn, folder / f"{turn}", nursery, fresh, found, broken, report, first))
                    turn += 1
            found.problems += [f"a secret is in {p}" for p in secrets_in(folder)]
    except NoServer: raise
    except Exception as e: failed(found, "the end", e)
    found.seconds = round(time.monotonic() - began, 1)
    return found


def failed(found: Found, where: str, e: Exception):
    "A failure of ours is a problem like any other; the figures so far stay."
    traceback.print_exception(e)
    found.add(where, [f"died: {type(e).__name__}: {e}"])


def guarded(found: Found, where: str, do: Callable[[], None]):
    try: do()
    except NoServer: raise
    except Exception as e: failed(found, where, e)


def play(jobs: list, seed: int, folder: Path, nursery: Nursery, fresh: Callable, found: Found, broken: str, report: Callable, first: bool):
    "Kills on one venue and ledger, until there were enough or no runner lives there any more; what is begun is taken off the list."
    with scene(seed, folder, nursery, fresh(), found, broken) as it:
        for _ in range(min(EACH, len(jobs))):
            step, n = jobs.pop(0)
            alive = named_kill(it, step, n) if step else random_kill(it, n)
            report(f"{step} ({n})" if step else f"random kill {n}")
            if not alive or (first and found.problems): return
        last(it)


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
