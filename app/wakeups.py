"""Who is woken after a commit: the loops of this process, callers that wait for an assignment, and other processes.

It knows only names and events, not what anybody does once awake. Nothing depends on a wake-up: the loops also look.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID


class Turns:
    """Names that were woken, each served in its turn. One that was just served rests, and then comes after the others."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self._queue: dict[str, None] = {}
        self._resting: dict[str, bool] = {}  # and whether it wants another turn

    def wake(self, name: str) -> None:
        if name in self._resting:
            self._resting[name] = True
        else:
            self._queue[name] = None
            self.event.set()

    def take(self) -> str | None:
        """Whose turn it is. What wakes it from now on asks for another turn."""
        if not self._queue:
            return None
        name = next(iter(self._queue))
        del self._queue[name]
        return name

    def rest(self, name: str, seconds: float, *, again: bool) -> None:
        """No turn for it before; then one if it wants it `again` or was woken since it was taken."""
        self._resting[name] = again or name in self._queue
        self._queue.pop(name, None)
        asyncio.get_running_loop().call_later(seconds, self._rested, name)

    def _rested(self, name: str) -> None:
        if self._resting.pop(name):
            self.wake(name)


class Wakeups:
    """The wake-ups of one process."""

    def __init__(self) -> None:
        self.placement = Turns()  # of organizations
        self.large_placement = Turns()  # of those whose passes take long
        self.collector = asyncio.Event()
        self.deliveries = asyncio.Event()  # set after a commit that left something to send
        self._callers: dict[UUID, set[asyncio.Event]] = defaultdict(set)
        self.stopping = False

    # --- the loops ---

    def wake(self, organization_id: str) -> None:
        """Called after a commit that may have left something to assign or to delete."""
        self.placement.wake(organization_id)
        self.collector.set()

    # --- callers that wait for a machine's next run; they hold no database connection meanwhile ---

    def awaited_machines(self) -> set[UUID]:
        """The machines that somebody waits for in this process."""
        return set(self._callers)

    def assigned(self, machines: Iterable[UUID]) -> None:
        """Wake those who wait for one of these machines."""
        for machine in machines:
            for event in self._callers.get(machine, ()):
                event.set()

    def stop(self) -> None:
        """Nobody waits any longer, now or later: the process is about to end."""
        self.stopping = True
        self.assigned(self.awaited_machines())

    @contextmanager
    def listen(self, machine_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set when the machine may have got a run. Listen first, then look: nothing falls in between."""
        event = asyncio.Event()
        self._callers[machine_id].add(event)
        try:
            yield event
        finally:
            self._callers[machine_id].discard(event)
            if not self._callers[machine_id]:
                del self._callers[machine_id]
