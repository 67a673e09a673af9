"""Measure, print the tables, and write them as JSON.

`python -m benchmarks compare FOLDER [GROUP ...]` measures this checkout and another one in turns, and prints the ratios.
`python -m benchmarks release FOLDER NAME` does so for the release before, and adds a row to results/releases.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from benchmarks.compare import checkout, compare, in_turns, row
from benchmarks.groups import GROUPS, LONG
from benchmarks.load import Pressure
from benchmarks.world import World

RESULTS = Path(__file__).with_name("results")
RELEASES = RESULTS / "releases.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all but {', '.join(LONG)}"
    )
    parser.add_argument("--seconds", type=float, default=1.8, help="of each measurement, after 0.5 s of warm-up")
    parser.add_argument("--rounds", type=int, default=0, help="default: 5 for retry, 1 for sustained, 3 for the others")
    parser.add_argument(
        "--connections",
        type=_numbers,
        default=(1, 4, 16, 64),
        help="those of `sets`, as 1,4,16,64; the others take 16 if it is one of them, else the last",
    )
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS.name}/latest.json if all groups ran")
    chosen = parser.parse_args()
    names, other, name_of_release = chosen.groups, None, None
    if names[:1] == ["release"] and len(names) == 3:
        name_of_release = names[2]
        names = ["compare", names[1], "release"]
    if names[:1] == ["compare"]:
        if len(names) < 2:
            parser.error("compare needs the folder of another checkout")
        try:
            other, names = checkout(names[1]), names[2:] or ["retry"]
        except ValueError as problem:
            parser.error(str(problem))
    if unknown := set(names) - set(GROUPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")

    began = time.monotonic()
    several = chosen.connections
    pressure = Pressure(16 if 16 in several else several[-1], chosen.seconds, several=several)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        if other is not None:
            _in_turns(folder, other, names, pressure, chosen.rounds, name_of_release)
            results = []
        else:
            results = _measured(folder, names or [name for name in GROUPS if name not in LONG], pressure, chosen.rounds)
    say(f"{time.monotonic() - began:.0f} s")

    file = chosen.json or (None if names or other else RESULTS / "latest.json")
    if file is not None:
        document = {
            "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
            "seconds": chosen.seconds,
            "groups": [result.as_json() for result in results],
        }
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"written to {file}")
    return 0


def _measured(folder: Path, names: list[str], pressure: Pressure, rounds: int) -> list[measure.Result]:
    results = []
    with World(folder) as world:
        for name in names:
            say(f"{name} ...")
            group = GROUPS[name](world, pressure)
            results.append(measure.run(group, rounds or group.rounds, say))
            print("\n" + measure.table(results[-1]), flush=True)
    return results


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _in_turns(
    folder: Path, other: Path, names: list[str], pressure: Pressure, rounds: int, release: str | None
) -> None:
    for side in ("ours", "other"):
        (folder / side).mkdir()
    with World(folder / "ours") as ours, World(folder / "other", root=other) as theirs:
        for name in names:
            say(f"{name} ...")
            groups = GROUPS[name](ours, pressure), GROUPS[name](theirs, pressure)
            seen = in_turns(*groups, rounds or groups[0].rounds, say)
            print("\n" + compare(groups[0], seen), flush=True)
            if release is not None:
                line, slower = row(release, seen)
                with RELEASES.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                say("\n".join([f"a row was added to {RELEASES}", *slower]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
