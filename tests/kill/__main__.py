"python -m tests.kill --kills 200 --database sqlite --seed 1 --json: kill the runner, compare, print figures; exit code 77 on any difference."
import argparse
import json
import secrets
import sys
from pathlib import Path

from .child import BROKEN, STEPS
from .suite import run


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m tests.kill", description="Kill the live runner at named steps and random moments, and compare its ledger with the venue's books.")
    p.add_argument("--kills", type=int, default=200, help="random moments")
    p.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    p.add_argument("--seed", type=int, help="default: a fresh one, printed")
    p.add_argument("--steps", default="all", help=f"all, none, or some of: {'; '.join(STEPS)}")
    p.add_argument("--repeats", type=int, default=1, help="passages at which a named step kills: the first, the second …")
    p.add_argument("--broken", choices=tuple(BROKEN), default="", help="a build that is broken on purpose")
    p.add_argument("--first", action="store_true", help="stop at the first problem")
    p.add_argument("--keep", type=Path, help="folder in which ledgers and logs stay")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    steps = {"all": tuple(STEPS), "none": ()}.get(a.steps) or tuple(s.strip() for s in a.steps.split(";") if s.strip() != "none")
    seed = secrets.randbelow(10**6) if a.seed is None else a.seed
    print(f"seed {seed}", file=sys.stderr)
    found = run(a.database, a.kills, seed, steps if a.steps != "none" else (), a.repeats, a.broken, lambda text: print(text, file=sys.stderr), a.keep, first=a.first)
    told = found.told()
    print(json.dumps(told, indent=1) if a.json else "\n".join(f"{k}: {v}" for k, v in told.items()))
    return 0 if found.good else 77


if __name__ == "__main__":
    sys.exit(main())
