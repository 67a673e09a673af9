"""`python -m benchmarks.unplaced` is `python -m app serve` without placement, to see what that costs."""

import sys

from app.background import Background
from app.cli import main


async def nothing(self: Background) -> None:
    """In place of a pass."""


if __name__ == "__main__":
    Background._place = nothing  # type: ignore[method-assign] # no setting turns this off
    sys.exit(main(["serve"]))
