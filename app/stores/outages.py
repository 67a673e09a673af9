"""Whether a store can be used, as the service's last check found: one log line when it is lost, one when it is back.

The checks (stores/health.py) are made beside requests, so a request pays nothing for them.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from app.telemetry import metrics

log = logging.getLogger("app.stores")

# So long after an outage a call can still fail that began in it.
AFTERMATH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a store cannot be used: the word that readiness shows, and the cause that the log adds to it."""

    reason: str
    cause: str | None = None


class Outage:
    """The outage of one store, if there is one now."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._began: float | None = None  # in time.monotonic(); None: the store can be used
        self._ended = -AFTERMATH_SECONDS
        self.suspected = asyncio.Event()  # a call has failed: check the store soon

    @property
    def level(self) -> int:
        """The level of a line about a failed call. During an outage it is debug: the outage has its own line."""
        is_over = self._began is None and time.monotonic() - self._ended >= AFTERMATH_SECONDS
        return logging.WARNING if is_over else logging.DEBUG

    def checked(self, problem: Problem | None) -> None:
        """Note what a check found, and log a change."""
        metrics.dependency_up.set(float(problem is None), self._store)
        if problem is not None and self._began is None:
            self._began = time.monotonic()
            line = {"event": "store_lost", "store": self._store, "reason": problem.reason}
            log.error(line | ({} if problem.cause is None else {"cause": problem.cause}))
        elif problem is None and self._began is not None:
            seconds = round(time.monotonic() - self._began, 1)
            self._began, self._ended = None, time.monotonic()
            log.warning({"event": "store_back", "store": self._store, "seconds": seconds})
