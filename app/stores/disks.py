"""Disks that are full: what PostgreSQL and the folder of the files have no room for any more.

Reads go on, so a full disk takes no replica out of service. Readiness, a gauge and the log tell of it.
"""

import logging
import time

from app.telemetry import metrics

log = logging.getLogger("app.disks")

FULL = "disk_full"

# A write that failed for want of room counts for this many seconds: a look at the disk may find room that this write did not.
REMEMBERED_SECONDS = 30.0


class Disk:
    """The state of the disk of a store."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._seen_full = False  # at the last look
        self._refused_until = 0.0  # in time.monotonic()
        self._told = False

    @property
    def is_full(self) -> bool:
        return self._seen_full or time.monotonic() < self._refused_until

    def refused(self) -> None:
        """There was no room for a write."""
        self._refused_until = time.monotonic() + REMEMBERED_SECONDS
        self._tell()

    def seen(self, *, full: bool) -> None:
        """So it was at a look."""
        self._seen_full = full
        self._tell()

    def _tell(self) -> None:
        is_full = self.is_full
        metrics.disk_is_full.set(float(is_full), self._store)
        if is_full != self._told:
            self._told = is_full
            line = {"store": self._store} | ({"event": "disk_full"} if is_full else {"event": "disk_has_room"})
            log.log(logging.ERROR if is_full else logging.INFO, line)
