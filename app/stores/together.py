"""Calls of one kind that meet go together: many of them through one statement, each with its own answer.

While a set is under way, further calls wait. When it returns, the waiting calls go as the next set. A call that finds no set
under way never waits. Parties take turns, and two calls with a common mark never go in one set. This file does not know the
contents of calls.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from app.stores.pool import party as pool_party
from app.telemetry import metrics, tracing

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Work = Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]]

MOST = 64

# If a set takes longer, perhaps because it waits for something that another transaction holds, the next one goes beside it.
SLOW_SECONDS = 0.05
AT_ONCE = 4

# The party for which sets ask the pool for connections.
PARTY = "sets"


class SetFailed(Exception):
    """A set of several calls failed; which of them was to blame, if any, is not known."""


@dataclass(slots=True, eq=False)
class _Call:
    work: Work[Any, Any]
    item: Any
    marks: Sequence[Hashable]
    answer: "asyncio.Future[Any]"
    span: Any


class Together(Generic[Item, Answer]):
    """The calls of one kind. `may_be_of_others`: whether a call that failed in a set is to be tried again alone."""

    def __init__(self, name: str, may_be_of_others: Callable[[Exception], bool]) -> None:
        self._name = name
        self._may_be_of_others = may_be_of_others
        self._waiting: dict[Hashable, list[_Call]] = {}  # by party, in the order of their turns
        self._sets: set[asyncio.Task[None]] = set()

    async def __call__(
        self, work: Work[Item, Answer], item: Item, party: Hashable, marks: Sequence[Hashable] = ()
    ) -> Answer:
        """What `work` answers for this item, alone or with others. Raises what it raises.

        A set is done by the `work` of one of its calls, outside of any request: in a context of its own.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call = _Call(work, item, marks, answer, tracing.current())
        self._waiting.setdefault(party, []).append(call)
        if not self._sets:
            self._begin()
        try:
            return await answer
        except SetFailed as failed:
            error = failed.__cause__
        assert isinstance(error, Exception)  # noqa: S101
        if not self._may_be_of_others(error):
            raise error
        [found] = await work([item])
        return found

    async def close(self) -> None:
        """Wait for the calls that have come so far."""
        while self._sets:
            await asyncio.wait(self._sets)

    def _begin(self) -> None:
        """Run the next sets, one after the other, until no call waits."""
        context = Context()
        context.run(pool_party.set, PARTY)
        task = asyncio.get_running_loop().create_task(self._go_on(), context=context)
        self._sets.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._sets.discard(task)
        if task.cancelled():  # the loop ends
            for call in (call for calls in self._waiting.values() for call in calls):
                call.answer.cancel()
        elif self._waiting and not self._sets:
            self._begin()

    async def _go_on(self) -> None:
        while calls := self._next():
            slow = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._go_beside)
            try:
                await self._do(calls)
            finally:
                slow.cancel()

    def _go_beside(self) -> None:
        if self._waiting and len(self._sets) < AT_ONCE:
            self._begin()

    def _next(self) -> list[_Call]:
        """Those that go now: one call of each party in turn, as long as there are any that may go."""
        chosen: list[_Call] = []
        marks: set[Hashable] = set()
        turns = deque(self._waiting)
        while turns and len(chosen) < MOST:
            party = turns.popleft()
            calls = self._waiting.pop(party)
            call = _take(calls, marks)
            if calls:
                self._waiting[party] = calls  # behind the others
            if call is not None:
                chosen.append(call)
                marks.update(call.marks)
                if calls:
                    turns.append(party)
        return chosen

    async def _do(self, calls: Sequence[_Call]) -> None:
        metrics.set_size.observe(len(calls), self._name)
        if tracing.tracer is not None:
            tracing.speak_for([call.span for call in calls])
        try:
            answers = await calls[0].work([call.item for call in calls])
            answered = list(zip(calls, answers, strict=True))
        except asyncio.CancelledError:
            for call in calls:
                call.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - it is the callers'
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error if len(calls) == 1 else _failed(error))
            return
        for call, answer in answered:
            if not call.answer.done():
                call.answer.set_result(answer)


def _take(calls: list[_Call], marks: set[Hashable]) -> _Call | None:
    """Take the first call without any of these marks, among as many as a set may have. Calls that were given up are dropped."""
    calls[:] = [call for call in calls if not call.answer.done()]
    for place, call in enumerate(calls[:MOST]):
        if marks.isdisjoint(call.marks):
            return calls.pop(place)
    return None


def _failed(error: Exception) -> SetFailed:
    failed = SetFailed()
    failed.__cause__ = error
    return failed
