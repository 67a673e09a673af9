"""Counts of long lists: each is made once for all callers that ask within a second.

A count of a million rows takes PostgreSQL longer than everything else that a page needs. Short lists are counted
each time: a caller that looks right after a write must find it counted.
"""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Final

from app.stores.single_flight import SingleFlight

# Up to here a count is exact to the moment, and made with the page.
EXACT: Final = 10_000

# How old a shared count may be, and how long one may take.
SECONDS: Final = 1.0

# An estimate is made if counting takes too long. Counting is not tried again for this long.
ESTIMATE_SECONDS: Final = 60.0

# Lists that are remembered in one process; each takes about a kilobyte.
MOST: Final = 1000


@dataclass(frozen=True, slots=True)
class Total:
    """How many rows a list has, or about how many."""

    rows: int
    is_estimate: bool = False


class _Shared:
    """The count of one list, and when it began."""

    __slots__ = ("began", "flight")

    def __init__(self) -> None:
        self.began = 0.0
        self.flight: SingleFlight[Total] = SingleFlight()

    def known(self) -> Total | None:
        """The count, if it is done and the list is long."""
        total = self.flight.last
        return total if total is not None and total.rows > EXACT else None

    def fresh(self) -> Total | None:
        """The same, if it may be shown still."""
        total = self.known()
        if total is None:
            return None
        return total if time.monotonic() - self.began < (ESTIMATE_SECONDS if total.is_estimate else SECONDS) else None


class SharedCounts:
    """The counts of one process, by list and filter; the organization is part of every filter."""

    def __init__(self) -> None:
        self._shared: OrderedDict[Hashable, _Shared] = OrderedDict()

    def is_long(self, key: Hashable) -> bool:
        """Whether the list was long when it was last counted."""
        shared = self._shared.get(key)
        return shared is not None and shared.known() is not None

    async def get(self, key: Hashable, count: Callable[[], Awaitable[Total]]) -> tuple[Total, bool]:
        """The count, not older than it may be; and whether it began after this call did. Raises what `count` raises."""
        shared = self._shared.get(key)
        if shared is not None and (total := shared.fresh()) is not None:
            return total, False
        if shared is None:
            shared = self._shared[key] = _Shared()
            while len(self._shared) > MOST:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        is_own = not shared.flight.is_under_way
        if is_own:
            shared.began = time.monotonic()
        return await shared.flight.join(count), is_own
