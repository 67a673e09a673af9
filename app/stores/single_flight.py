"""Single flight: one call for all callers that ask while it is under way."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """One call at a time. A caller that gives up does not end the call for the others.

    The owner decides how long a result is good.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None

    @property
    def is_under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def last(self) -> T | None:
        """The result of the last call; None if it failed, if a call is under way, or if there was none."""
        task = self._task
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    async def again(self) -> T:
        """The result of the last call, which must have begun. Raises whatever it raised."""
        if self._task is None:
            raise RuntimeError("no call has begun")
        return await asyncio.shield(self._task)

    async def join(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of the call that is under way, or else of this one. Raises whatever the call raises."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(_awaited(call))
            self._task.add_done_callback(_look_at)
        return await asyncio.shield(self._task)


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


def _look_at(task: "asyncio.Task[T]") -> None:
    """Take the exception: if every caller has given up, asyncio would complain that it was never read."""
    if not task.cancelled():
        task.exception()
