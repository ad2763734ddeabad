"python -m tests.machine --examples 2000 --seed 7: as long as one likes, in the market of gaps, with a venue that loses answers and a process that dies. BNML_STORY=1 prints what each account went through."
import argparse
import json
import logging
import os
import secrets
import sys
import time
import traceback

os.environ.setdefault("IN_TEST", "1")

import structlog

from . import paper
from .rules import Account, search


def main() -> int:
    "Search; what broke is told on stderr, figures are JSON, and the exit code is 77 when anything did."
    parser = argparse.ArgumentParser(prog="python -m tests.machine", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="accounts to play (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="things that happen to one, at most (default %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="default: a fresh one, printed")
    parser.add_argument("--calm", action="store_true", help="without faults: the strictest judge")
    parser.add_argument("--paper", action="store_true", help="paper accounts that are killed and taken up again, each beside a twin that is not")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print(f"seed {asked.seed}; repeat with: python -m tests.machine --examples {asked.examples} --steps {asked.steps} --seed {asked.seed}" + " --calm" * asked.calm + " --paper" * asked.paper,
          file=sys.stderr, flush=True)
    start, broken = time.process_time(), ""
    try: paper.search(asked.seed, asked.examples, asked.steps, shrink=True) if asked.paper else search(asked.seed, asked.examples, asked.steps, calm=asked.calm, shrink=True)
    except Exception as e:
        traceback.print_exc()
        broken = f"{type(e).__name__}: {e}"
    figures = {k: int(v) for k, v in (paper.Twins if asked.paper else Account).counted.items()}
    print(json.dumps({"passed": not broken, "broken": broken, "seed": asked.seed, "cpu_s": round(time.process_time() - start, 1), **figures}))
    return 77 if broken else 0


if __name__ == "__main__": sys.exit(main())
