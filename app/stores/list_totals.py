"""Counts of long lists: each is made once for all callers that ask within a second.

A count of a million rows takes PostgreSQL longer than everything else that a page needs. Short lists are counted
each time: a caller that looks right after a write must find it counted.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Final

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
    """One count, made or in the making, and when it began."""

    __slots__ = ("began", "task")

    def __init__(self, task: "asyncio.Task[Total]") -> None:
        self.began = time.monotonic()
        self.task = task

    def known(self) -> Total | None:
        """What was counted, if that is done and there are many."""
        if not self.task.done() or self.task.cancelled() or self.task.exception() is not None:
            return None
        total = self.task.result()
        return total if total.rows > EXACT else None

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
        shared, is_own = self._shared.get(key), False
        if shared is not None and (total := shared.fresh()) is not None:
            return total, False
        if shared is None or shared.task.done():
            shared, is_own = _Shared(asyncio.create_task(_awaited(count))), True
            shared.task.add_done_callback(_looked_at)
            self._shared[key] = shared
            while len(self._shared) > MOST:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        # Whoever goes away does not take the count from the others.
        return await asyncio.shield(shared.task), is_own


async def _awaited(count: Callable[[], Awaitable[Total]]) -> Total:
    return await count()


def _looked_at(task: "asyncio.Task[Total]") -> None:
    """Nobody may be left who waits for it: asyncio would complain of a failure that nobody saw."""
    if not task.cancelled():
        task.exception()
