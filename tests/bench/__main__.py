"Speed against the raw libraries and a peer, in one process, as one JSON document: `make bench`, `make bench ARGS=features`."
import argparse
import importlib
import json
import os
import platform
import sys
import tempfile

PARTS = ("features", "vector", "sweep", "replay", "ledger", "orders", "stream", "inference", "training", "walk_forward", "report")


def main() -> None:
    "Run the named parts, or all; progress on stderr, JSON on stdout."
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], help=f"any of {', '.join(PARTS)}; none = all")
    asked = parser.parse_args().parts or PARTS
    if unknown := [p for p in asked if p not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; use any of {', '.join(PARTS)}")
    result = {"machine": {"python": platform.python_version(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")}}
    with tempfile.TemporaryDirectory() as home:
        os.environ["BNML_HOME"] = home
        for part in asked:
            print(f"bench: {part}", file=sys.stderr, flush=True)
            result[part] = importlib.import_module(f"tests.bench.bench_{part}").run()
    print(json.dumps(result, indent=1, default=float))


if __name__ == "__main__":
    main()
