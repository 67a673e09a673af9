"""Waiting for something to hold: polled with a deadline, never slept for."""

import time
from collections.abc import Callable
from typing import Any

DEADLINE = 15.0

# Longer than any test: what happens is owed to the wake-up after a commit, never to polling.
NEVER = 3600


def until(condition: Callable[[], Any], seconds: float = DEADLINE, *, what: str = "the condition") -> Any:
    """Poll until it holds; fail the test at the deadline."""
    end = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not hold within {seconds} s")
        time.sleep(0.02)
