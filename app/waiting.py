"""Long polling: callers that wait for an assignment hold no database connection while they wait."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from uuid import UUID


class Waiters:
    """Who waits in this process, by machine."""

    def __init__(self) -> None:
        self._events: dict[UUID, set[asyncio.Event]] = defaultdict(set)

    def machines(self) -> set[UUID]:
        return set(self._events)

    def assigned(self, machines: Iterable[UUID]) -> None:
        """Wake those who wait for one of these machines."""
        for machine in machines:
            for event in self._events.get(machine, ()):
                event.set()

    async def wait(self, machine_id: UUID, seconds: float) -> None:
        """Until the machine may have got a run, or the time is over."""
        event = asyncio.Event()
        self._events[machine_id].add(event)
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return
        finally:
            self._events[machine_id].discard(event)
            if not self._events[machine_id]:
                del self._events[machine_id]
