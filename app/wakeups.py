"""Who is woken after a commit: the loops of this process, and callers that wait for an assignment.

It knows only names and events, not what anybody does once awake. Nothing depends on a wake-up: the loops also poll.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID


class Wakeups:
    """The wake-ups of one process."""

    def __init__(self) -> None:
        self.placement = asyncio.Event()
        self.collector = asyncio.Event()
        self.deliveries = asyncio.Event()  # set after a commit that left something to send
        self._organizations: set[str] = set()
        self.look_around_at = 0.0
        self._callers: dict[UUID, set[asyncio.Event]] = defaultdict(set)
        self.stopping = False

    # --- the loops ---

    def wake(self, organization_id: str) -> None:
        """Called after a commit that may have left something to assign or to delete."""
        self.wake_placement(organization_id)
        self.collector.set()

    def wake_placement(self, organization_id: str) -> None:
        """Called after a commit that may have left something to assign."""
        self._organizations.add(organization_id)
        self.placement.set()

    def take_organizations(self) -> set[str]:
        """The organizations that were woken since the last call."""
        taken, self._organizations = self._organizations, set()
        return taken

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
