"""Long polling: callers that wait for an assignment hold no database connection while they wait."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID


class Waiters:
    """Who waits in this process, by machine."""

    def __init__(self) -> None:
        self._events: dict[UUID, set[asyncio.Event]] = defaultdict(set)
        self.stopping = False

    def machines(self) -> set[UUID]:
        return set(self._events)

    def assigned(self, machines: Iterable[UUID]) -> None:
        """Wake those who wait for one of these machines."""
        for machine in machines:
            for event in self._events.get(machine, ()):
                event.set()

    def stop(self) -> None:
        """Nobody waits any longer, now or later: the process is about to end."""
        self.stopping = True
        self.assigned(self.machines())

    @contextmanager
    def listen(self, machine_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set when the machine may have got a run. Listen first, then look: nothing falls in between."""
        event = asyncio.Event()
        self._events[machine_id].add(event)
        try:
            yield event
        finally:
            self._events[machine_id].discard(event)
            if not self._events[machine_id]:
                del self._events[machine_id]
