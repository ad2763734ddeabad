"""Lines 2 to 5 of what trading must withstand, whole: faults, kills on both databases, state machines, long replays. One JSON summary; 77 when anything failed.

Example: make drill ARGS="--only kill-sqlite --only machine --kills 50"."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAILED = 77


def commands(a: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    "Part → what it is, and its command; each prints JSON and ends with 0 when all was well."
    seed = [] if a.seed is None else ["--seed", str(a.seed)]
    kill = lambda database: ["-m", "tests.kill", "--kills", str(a.kills), "--database", database, "--json", *seed]
    return {
        "faults": ("every fault at every step, over HTTP and websockets, against the real runner", ["-m", "bnml.cli", "rehearse", "--drill", "--json"]),
        "kill-sqlite": (f"kill -9 at {a.kills} moments and every named step, ledger in SQLite", kill("sqlite")),
        "kill-postgres": (f"kill -9 at {a.kills} moments and every named step, ledger in PostgreSQL", kill("postgres")),
        "machine": (f"state machines over risk, execution and venue, {a.examples} examples", ["-m", "tests.machine", "--examples", str(a.examples), *seed]),
        "replays": ("a month of 5m bars, half a year of 1h bars, the collapses", ["-m", "tests.drill.replays", *a.case]),
    }


def last_json(text: str):
    "The JSON document that ends a text; None where there is none."
    lines = text.splitlines()
    for start in (i for i, line in enumerate(lines) if line.startswith(("{", "["))):
        try: return json.loads("\n".join(lines[start:]))
        except ValueError: continue
    return None


def part(what: str, command: list[str], env: dict) -> dict:
    "One part in a process of its own; its progress goes to stderr as it comes."
    begun = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    return {"what": what, "seconds": round(time.monotonic() - begun, 1), "code": done.returncode, "passed": done.returncode == 0,
            "result": last_json(done.stdout), **({} if done.returncode == 0 else {"said": done.stdout[-2000:]})}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = tuple(commands(argparse.Namespace(seed=None, kills=0, examples=0, case=())))
    p.add_argument("--only", action="append", choices=parts, help="one part; may be given several times; default all")
    p.add_argument("--kills", type=int, default=200, help="random moments of each database")
    p.add_argument("--examples", type=int, default=300, help="examples of the state machines")
    p.add_argument("--case", action="append", default=[], help="one case of the replays; may be given several times")
    p.add_argument("--seed", type=int, help="of kills and machines; default a fresh one, printed by each")
    a = p.parse_args(argv)
    found, asked = {}, commands(a)
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "BNML_HOME": home, "IN_TEST": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for name in a.only or parts:
            print(f"drill: {name}: {asked[name][0]}", file=sys.stderr, flush=True)
            found[name] = part(*asked[name], env)
            print(f"drill: {name} {'passed' if found[name]['passed'] else 'FAILED'} after {found[name]['seconds']} s", file=sys.stderr, flush=True)
    failed = [n for n, x in found.items() if not x["passed"]]
    print(json.dumps({"passed": not failed, "failed": failed, "seconds": round(sum(x["seconds"] for x in found.values()), 1), "parts": found}, indent=1))
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
