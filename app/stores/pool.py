"""A pool of connections to PostgreSQL, which parties use in turns. It knows the parties' names and nothing else of them."""

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from math import exp
from typing import Any

from app.limits.fair_queue import FairQueue
from app.telemetry import metrics

# The party of the current task: an organization, a background loop, or "" for a request that is not authenticated yet.
party: ContextVar[str] = ContextVar("party", default="")

# A connection that was idle for longer may have been forgotten by a firewall on the way.
IDLE_SECONDS = 300.0


# A party counts as asking if it has used a connection within this many seconds.
ASKING_SECONDS = 1.0
# A party has no limit of its own if its statements take at most CHEAP_SECONDS, or at most COSTLY_TIMES as long as those of
# another party: in the second case the database is slow for all parties.
CHEAP_SECONDS = 0.02
COSTLY_TIMES = 4.0
REMEMBERED_SECONDS = 2.0  # the weight of a statement in its party's cost falls to a third in this time
MOST_PARTIES = 1000  # parties with remembered costs


class Cost:
    """How long a party's statements take: a mean weighted with the time, so that many short ones do not hide a long one."""

    __slots__ = ("_squares", "_sum", "seconds", "seen")

    def __init__(self) -> None:
        self.seconds = self.seen = self._sum = self._squares = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Add a statement, or the statements of a transaction, that held a connection for `seconds`."""
        left = exp((self.seen - now) / REMEMBERED_SECONDS)
        self._sum = self._sum * left + seconds
        self._squares = self._squares * left + seconds * seconds
        self.seconds = self._squares / self._sum if self._sum else 0.0
        self.seen = now


class NoneFreeError(TimeoutError):
    """No connection came free in time."""


def is_organization(name: str) -> bool:
    """Whether a party is an organization: the name of a background loop has a space, and no organization's id has one."""
    return name != "" and " " not in name


class Pool:
    """Connections, the last used first; made when they are needed.

    If all connections are in use, the next free one goes to the party with the fewest, and among equals to the party that was
    served longest ago. So the crowd of one party keeps another waiting for one release at most. A party alone may use all.

    While other parties ask, too, a party with costly statements may hold fewer connections at once, down to one. Costly
    statements take the database's processors: the other parties would find a connection and then wait all the same.

    asyncpg's own pool costs a task, two timers and a wrapper around each statement every time it is used, a good part of a
    plain retry (benchmarks/README.md), and resets the session, in which nothing of ours outlives a transaction.
    """

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int, timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._size = self._free = size
        self._held: dict[str, int] = {}
        # Tasks wait only while no connection is free, or while their party has as many as it may have.
        self._waiting: FairQueue[None] = FairQueue()
        self._idle: list[tuple[Any, float]] = []
        self._open: dict[Any, tuple[str, float]] = {}  # the party of each, now or last, and since when
        self._waited: set[Any] = set()  # in use by a statement that waited for a lock
        self._costs: dict[str, Cost] = {}  # by organization; the one seen last is at the end
        self._outdated: set[Any] = set()  # in use, and not to be used again

    async def acquire(self) -> Any:
        """Raises TimeoutError when none comes free in time, and whatever connecting raises."""
        name = party.get()
        if self._free and (name not in self._held or (name not in self._waiting and self._may_hold_more(name))):
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
                now = time.monotonic()
                if not connection.is_closed() and now - since < IDLE_SECONDS:
                    self._open[connection] = name, now
                    return connection
                self._discard(connection)
            connection = await self._connect()
            self._open[connection] = name, time.monotonic()
            return connection
        except BaseException:
            self._pass_on(name)
            raise

    def release(self, connection: Any) -> None:
        """Take it back, or throw it away if it is closed or in the middle of something."""
        name, since = self._open[connection]
        now = time.monotonic()
        if connection.is_closed() or connection.is_in_transaction() or connection in self._outdated:
            self._discard(connection)
        else:
            self._idle.append((connection, now))
        if is_organization(name) and connection not in self._waited:
            self._note_cost(name, now - since, now)
        self._waited.discard(connection)
        self._pass_on(name)

    def has_waited(self, connection: Any) -> None:
        """Note that this connection waited for a lock: that costs the database nothing."""
        self._waited.add(connection)

    # --- what statements cost -----------------------------------------------------------------------------------------

    def _note_cost(self, name: str, seconds: float, now: float) -> None:
        cost = self._costs.pop(name, None) or Cost()
        cost.add(seconds, now)
        self._costs[name] = cost
        if len(self._costs) > MOST_PARTIES:
            del self._costs[next(iter(self._costs))]

    def _may_hold_more(self, name: str) -> bool:
        """Whether a party that holds connections may have one more, when one is free."""
        cost = self._costs.get(name)
        if cost is None or cost.seconds <= CHEAP_SECONDS:
            return True
        since = time.monotonic() - ASKING_SECONDS
        lightest = cost.seconds
        for other in reversed(self._costs):
            found = self._costs[other]
            if found.seen < since:
                break
            lightest = min(lightest, found.seconds)
        costly = max(CHEAP_SECONDS, COSTLY_TIMES * lightest)
        return cost.seconds <= costly or self._held[name] < max(1, int(self._size * CHEAP_SECONDS / cost.seconds / 2))

    # --- turns --------------------------------------------------------------------------------------------------------

    def drop_idle(self) -> None:
        """Close the idle connections."""
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
        try:
            await self._waiting.wait(name, None, self._timeout, partial(self._pass_on, name))
        except TimeoutError:
            raise NoneFreeError from None

    def _pass_on(self, name: str) -> None:
        """Give the party's connection to the next party, or make it free."""
        self._held[name] -= 1
        if not self._held[name]:
            del self._held[name]
        self._free += 1
        while self._free and (following := self._next()) is not None:
            if self._waiting.serve(following, next(iter(self._waiting.of(following)))):
                self._free -= 1
                self._held[following] = self._held.get(following, 0) + 1

    def _next(self) -> str | None:
        """The waiting party with the fewest connections, among the parties that may have more.

        A party that has reached its own limit holds connections, and each release of one looks again.
        """
        fewest: tuple[int, str] | None = None
        for name in self._waiting:
            held = self._held.get(name, 0)
            if held == 0:
                return name
            if (fewest is None or held < fewest[0]) and self._may_hold_more(name):
                fewest = held, name
        return None if fewest is None else fewest[1]

    def _discard(self, connection: Any) -> None:
        connection.terminate()
        del self._open[connection]
        self._outdated.discard(connection)

    def close(self) -> None:
        """Break every connection off."""
        for connection in self._open:
            connection.terminate()
