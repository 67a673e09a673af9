"""Wake-ups after a commit, for the loops of this process, for callers that wait for an assignment, and for other processes.

This file knows only names and events. Nothing depends on a wake-up: the loops also look by themselves.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID


class Turns:
    """Names that were woken and take turns. A name that was just served rests, and then comes after the others."""

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
        """Take the next name. A wake-up from now on asks for another turn."""
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


# Channels between processes.
WOKEN, TO_DELIVER, ASSIGNED, BULK_RETRY = "runs_woken", "runs_to_deliver", "runs_assigned", "runs_bulk_retry"


class Wakeups:
    """The wake-ups of one process. One that `settles` has the loops; others tell those that have."""

    def __init__(self, *, settles: bool = True) -> None:
        self._settles = settles
        self.placement = Turns()  # organizations
        self.large_placement = Turns()  # organizations with long passes
        self.collector = asyncio.Event()
        self.deliveries = asyncio.Event()  # set after a commit that left something to send
        self.dispatches = asyncio.Event()  # set after a commit that may have left something to tell Temporal
        self.bulk_retries = asyncio.Event()  # set after a commit that left runs to retry
        self.to_tell = asyncio.Event()
        self._untold: dict[str, set[str]] = defaultdict(set)
        self._callers: dict[UUID, set[asyncio.Event]] = defaultdict(set)
        self.stopping = False

    # --- the loops ---

    def wake(self, organization_id: str) -> None:
        """Called after a commit that may have left something to assign or to delete."""
        if self._settles:
            self.placement.wake(organization_id)
            self.collector.set()
            self.dispatches.set()
        else:
            self._tell(WOKEN, organization_id)

    def deliver(self) -> None:
        """Called after a commit that left something to send."""
        if self._settles:
            self.deliveries.set()
        else:
            self._tell(TO_DELIVER, "now")

    def bulk_retry(self) -> None:
        """Called after a commit that left runs to retry."""
        if self._settles:
            self.bulk_retries.set()
        else:
            self._tell(BULK_RETRY, "now")

    # --- other processes ---

    def _tell(self, channel: str, name: str) -> None:
        self._untold[channel].add(name)
        self.to_tell.set()

    def take_untold(self) -> dict[str, set[str]]:
        """Names to tell other processes since the last call, by channel."""
        taken, self._untold = self._untold, defaultdict(set)
        return taken

    def untell(self, taken: dict[str, set[str]]) -> None:
        """It could not be told: later."""
        for channel, names in taken.items():
            self._untold[channel] |= names

    def heard(self, channel: str, names: Iterable[str]) -> None:
        """What another process has told, or this one."""
        for name in names:
            if channel == WOKEN:
                self.wake(name)
            elif channel == TO_DELIVER:
                self.deliver()
            elif channel == BULK_RETRY:
                self.bulk_retry()
            elif channel == ASSIGNED:
                with suppress(ValueError):  # anybody who may connect can say anything
                    self.assigned([UUID(name)])

    def listens_to(self, *, answers: bool) -> list[str]:
        """The channels that concern this process."""
        return [*([WOKEN, TO_DELIVER, BULK_RETRY] if self._settles else []), *([ASSIGNED] if answers else [])]

    # --- callers that wait for a machine's next run; they hold no database connection meanwhile ---

    def awaited_machines(self) -> set[UUID]:
        """The machines for which callers wait in this process."""
        return set(self._callers)

    def assigned(self, machines: Iterable[UUID]) -> None:
        """Wake those who wait for one of these machines."""
        for machine in machines:
            for event in self._callers.get(machine, ()):
                event.set()

    def placed(self, machines: Iterable[UUID]) -> None:
        """Wake them here and, a moment later, in other processes."""
        self.dispatches.set()
        for machine in machines:
            self.assigned([machine])
            self._tell(ASSIGNED, str(machine))

    def stop(self) -> None:
        """End all waits, now and later: the process is about to end."""
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
