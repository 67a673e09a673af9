"""`python -m benchmarks.unplaced` is `python -m app serve` without placement, to see what that costs."""

import sys

from app import background
from app.cli import main
from app.services import Services

LOOPS = background.loops


def without_placement(services: Services) -> list[background.Loop]:
    """The other loops."""
    return [loop for loop in LOOPS(services) if loop.name not in ("placement", "large_placement", "look_around")]


if __name__ == "__main__":
    background.loops = without_placement  # no setting turns this off
    sys.exit(main(["serve"]))
