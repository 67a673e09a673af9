"""A pool of connections to PostgreSQL."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

# A connection that was idle for longer may have been forgotten by a firewall on the way.
IDLE_SECONDS = 300.0


class Pool:
    """Connections, the last used first; made when they are needed.

    asyncpg's own pool costs a task, two timers and a wrapper around each statement every time it is used, a good part of a
    plain retry (benchmarks/README.md), and resets the session, in which nothing of ours outlives a transaction.
    """

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int, timeout: float) -> None:
        self._connect = connect
        self._turns = asyncio.Semaphore(size)
        self._timeout = timeout
        self._idle: list[tuple[Any, float]] = []
        self._open: set[Any] = set()

    async def acquire(self) -> Any:
        """Raises TimeoutError when none comes free in time, and whatever connecting raises."""
        if self._turns.locked():
            async with asyncio.timeout(self._timeout):
                await self._turns.acquire()
        else:
            await self._turns.acquire()  # at once
        try:
            while self._idle:
                connection, since = self._idle.pop()
                if not connection.is_closed() and time.monotonic() - since < IDLE_SECONDS:
                    return connection
                self._discard(connection)
            connection = await self._connect()
            self._open.add(connection)
            return connection
        except BaseException:
            self._turns.release()
            raise

    def release(self, connection: Any) -> None:
        """Take it back, or throw it away if it is closed or in the middle of something."""
        if connection.is_closed() or connection.is_in_transaction():
            self._discard(connection)
        else:
            self._idle.append((connection, time.monotonic()))
        self._turns.release()

    def _discard(self, connection: Any) -> None:
        connection.terminate()
        self._open.discard(connection)

    def close(self) -> None:
        """Break every connection off."""
        for connection in self._open:
            connection.terminate()
