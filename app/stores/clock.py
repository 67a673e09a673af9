"""The database's clock, read from here without asking it each time.

Replicas run on machines of their own, and a machine's clock may be hours off. What is signed with a time must be right for the
reader, and all replicas must agree. So the time of the database counts, as it does for all times that are stored.
"""

import logging
import time

log = logging.getLogger("app.clock")

OFF_SECONDS = 5.0  # seconds that the machine's clock may differ before it is logged
SLOW_SECONDS = 1.0  # a measurement that took longer says too little if there is another

# This clock goes on while the machine is suspended, and it cannot be set.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def steady() -> float:
    """Seconds of a clock that cannot be set; it begins anywhere."""
    return time.clock_gettime(_STEADY)


class DatabaseClock:
    """The database's time, in seconds since 1970. Until it was measured it is the machine's own."""

    def __init__(self) -> None:
        self._ahead_of_steady: float | None = None
        self._is_off = False

    def measured(self, database_seconds: float, began: float, ended: float) -> None:
        """The database said this time between these two moments of `steady`."""
        if self._ahead_of_steady is not None and ended - began > SLOW_SECONDS:
            return
        self._ahead_of_steady = database_seconds - (began + ended) / 2
        is_off = abs(self.offset) > OFF_SECONDS
        if is_off != self._is_off:
            self._is_off = is_off
            if is_off:
                log.warning({"event": "clock_off", "offset_seconds": round(self.offset, 1)})
            else:
                log.info({"event": "clock_right", "offset_seconds": round(self.offset, 1)})

    def now(self) -> float:
        """The time of the database."""
        return time.time() if self._ahead_of_steady is None else steady() + self._ahead_of_steady

    @property
    def offset(self) -> float:
        """How many seconds the database's clock is ahead of this machine's; 0 if that is not known."""
        return self.now() - time.time()
