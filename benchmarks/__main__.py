"""`python -m benchmarks [GROUP ...]`: measure, print the tables, and write them as JSON."""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from benchmarks.groups import GROUPS
from benchmarks.load import Pressure
from benchmarks.world import World

RESULTS = Path(__file__).with_name("results")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--seconds", type=float, default=1.8, help="of each measurement, after 0.5 s of warm-up")
    parser.add_argument("--rounds", type=int, default=0, help="default: 5 for retry, 3 for the others")
    parser.add_argument("--connections", type=int, default=16, help="where a group does not vary them")
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS.name}/latest.json if all groups ran")
    chosen = parser.parse_args()
    if unknown := set(chosen.groups) - set(GROUPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")

    began = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder, World(Path(folder)) as world:
        for name in chosen.groups or GROUPS:
            say(f"{name} ...")
            group = GROUPS[name](world, Pressure(chosen.connections, chosen.seconds))
            results.append(measure.run(group, chosen.rounds or (5 if name == "retry" else 3), say))
            print("\n" + measure.table(results[-1]), flush=True)
    say(f"{time.monotonic() - began:.0f} s")

    document = {
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "seconds": chosen.seconds,
        "groups": [result.as_json() for result in results],
    }
    file = chosen.json or (None if chosen.groups else RESULTS / "latest.json")
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"written to {file}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
