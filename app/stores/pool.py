"""A pool of connections to PostgreSQL, shared out among parties: it knows names, not what they stand for."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from app.telemetry import metrics

# For whom the current task asks for connections: an organization, a background loop, or "" for requests that have not told yet.
party: ContextVar[str] = ContextVar("party", default="")

# A connection that was idle for longer may have been forgotten by a firewall on the way.
IDLE_SECONDS = 300.0


class NoneFreeError(TimeoutError):
    """No connection came free in time."""


class Pool:
    """Connections, the last used first; made when they are needed.

    When all are in use, the next one that comes free goes to the party that has the fewest, and among equals to the one that
    was served longest ago: nobody's crowd keeps another waiting for more than one release. A party that is alone may use all.

    asyncpg's own pool costs a task, two timers and a wrapper around each statement every time it is used, a good part of a
    plain retry (benchmarks/README.md), and resets the session, in which nothing of ours outlives a transaction.
    """

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int, timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._free = size
        self._held: dict[str, int] = {}
        # Who waits, by party; whom was served longest ago comes first. Only while nothing is free.
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}
        self._idle: list[tuple[Any, float]] = []
        self._open: dict[Any, str] = {}  # and for whom each is in use, or was last
        self._outdated: set[Any] = set()  # in use, and not to be used again

    async def acquire(self) -> Any:
        """Raises TimeoutError when none comes free in time, and whatever connecting raises."""
        name = party.get()
        if self._free:
            self._free -= 1
            self._held[name] = self._held.get(name, 0) + 1
            metrics.pool_wait.at_once += 1
        else:
            began = time.monotonic()
            try:
                await self._turn(name)
            finally:
                metrics.pool_wait.observe(time.monotonic() - began)
        try:
            while self._idle:
                connection, since = self._idle.pop()
                if not connection.is_closed() and time.monotonic() - since < IDLE_SECONDS:
                    self._open[connection] = name
                    return connection
                self._discard(connection)
            connection = await self._connect()
            self._open[connection] = name
            return connection
        except BaseException:
            self._pass_on(name)
            raise

    def release(self, connection: Any) -> None:
        """Take it back, or throw it away if it is closed or in the middle of something."""
        name = self._open[connection]
        if connection.is_closed() or connection.is_in_transaction() or connection in self._outdated:
            self._discard(connection)
        else:
            self._idle.append((connection, time.monotonic()))
        self._pass_on(name)

    def drop_idle(self) -> None:
        """Throw away the connections that nobody uses."""
        while self._idle:
            self._discard(self._idle.pop()[0])

    def renew(self) -> None:
        """No connection that is open now is used again after its present use."""
        self.drop_idle()
        self._outdated = set(self._open)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        return len(self._open) - len(self._idle)

    async def _turn(self, name: str) -> None:
        """Wait until the party is given a connection."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, {})[turn] = None
        try:
            async with asyncio.timeout(self._timeout):
                await turn
        except BaseException as gone:
            if turn.cancelled():
                self._forget(name, turn)
            else:  # given in the very moment when this task gave up
                self._pass_on(name)
            if isinstance(gone, TimeoutError):
                raise NoneFreeError from None
            raise

    def _forget(self, name: str, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(name, {})
        if waiting.pop(turn, turn) is None and not waiting:
            del self._waiting[name]

    def _pass_on(self, name: str) -> None:
        """What the party had goes to the next one, or is free."""
        self._held[name] -= 1
        if not self._held[name]:
            del self._held[name]
        while self._waiting:
            following = self._next()
            waiting = self._waiting.pop(following)
            turn = next(iter(waiting))
            del waiting[turn]
            if waiting:
                self._waiting[following] = waiting  # behind the others
            if not turn.cancelled():
                self._held[following] = self._held.get(following, 0) + 1
                turn.set_result(None)
                return
        self._free += 1

    def _next(self) -> str:
        """The waiting party with the fewest connections. Those that have any are never more than there are connections."""
        fewest: tuple[int, str] | None = None
        for name in self._waiting:
            held = self._held.get(name, 0)
            if held == 0:
                return name
            if fewest is None or held < fewest[0]:
                fewest = held, name
        assert fewest is not None  # noqa: S101 - called only when somebody waits
        return fewest[1]

    def _discard(self, connection: Any) -> None:
        connection.terminate()
        del self._open[connection]
        self._outdated.discard(connection)

    def close(self) -> None:
        """Break every connection off."""
        for connection in self._open:
            connection.terminate()
