"""PostgreSQL: one pool of asyncpg connections, transactions in plain sight, and the driver's failures turned into 503.

SQLAlchemy defines the tables (models.py) and builds the statements whose shape depends on the request; asyncpg runs every
statement, because a retry through SQLAlchemy's own execution costs three to five times the CPU (benchmarks/README.md).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Protocol

import asyncpg
import orjson
from sqlalchemy.dialects.postgresql import asyncpg as sqlalchemy_asyncpg
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from app.config import Settings
from app.errors import DatabaseUnavailable, OutcomeUnknown

Record = Mapping[str, Any]


class Connection(Protocol):
    """What we use of asyncpg's connection, which carries no type information."""

    async def execute(self, sql: str, *args: object) -> str: ...
    async def fetch(self, sql: str, *args: object) -> list[Record]: ...
    async def fetchrow(self, sql: str, *args: object) -> Record | None: ...
    async def fetchval(self, sql: str, *args: object) -> Any: ...


class LockTimeout(DatabaseUnavailable):
    """Another transaction held a row for longer than `lock_timeout`, or one after the other until `statement_timeout`."""


class Deadlock(DatabaseUnavailable):
    """Two transactions wait for each other, or would: this one gives way, and can be done again."""


# PostgreSQL or the way to it failed; the same request may succeed later. Anything else is a defect of ours and a 500.
_LOST = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError, asyncpg.InternalClientError)
_TRANSIENT = (
    asyncpg.TransactionRollbackError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)

UniqueViolation = asyncpg.UniqueViolationError

_DIALECT = sqlalchemy_asyncpg.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy leaves dialects untyped


def sql(statement: ClauseElement) -> tuple[str, list[object]]:
    """A SQLAlchemy Core statement as asyncpg takes it: text with $1, $2, ... and the values in that order."""
    compiled = statement.compile(dialect=_DIALECT)
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - what a dialect makes of anything but DDL
    return str(compiled), [compiled.params[name] for name in compiled.positiontup or ()]


def json_text(value: object) -> str | None:
    """A value as asyncpg takes it for a `json` column; None is NULL."""
    return None if value is None else orjson.dumps(value).decode()


@contextmanager
def committing() -> Iterator[None]:
    """Around a statement that commits. Raises OutcomeUnknown when the connection breaks in it."""
    try:
        yield
    except asyncpg.QueryCanceledError:
        raise  # the server says that it has rolled back
    except (*_LOST, asyncpg.OperatorInterventionError):  # a server that stops may have committed
        raise OutcomeUnknown from None


# A connection that was idle for longer may have been forgotten by a firewall on the way.
IDLE_SECONDS = 300.0


class _Pool:
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


class Database:
    """The pool of connections of one process. It connects when first used, so the service starts without PostgreSQL."""

    def __init__(self, settings: Settings) -> None:
        connect = partial(
            asyncpg.connect,
            settings.database_url.get_secret_value(),
            timeout=settings.database_timeout_seconds,
            command_timeout=settings.database_timeout_seconds,
            server_settings={
                "application_name": "runs-api",
                "timezone": "UTC",  # how times are shown in documents that PostgreSQL makes
                # Plans are kept. One made while a table was empty, as the deletion list often is, would read all of it once it
                # is full; everything here has an index.
                "enable_seqscan": "off",
                "jit": "off",  # short statements: compiling them costs more than it saves
                "lock_timeout": "2s",  # the longest wait for a twin at the switch
                # Before our own patience ends: the server's word says that nothing was done, our silence says nothing.
                "statement_timeout": f"{int(settings.database_timeout_seconds * 900)}ms",
                "idle_in_transaction_session_timeout": "10s",  # a frozen replica must not hold a run's row
            },
        )
        self._pool = _Pool(connect, settings.database_pool_size, settings.database_timeout_seconds)

    def close(self) -> None:
        """Break every connection off, also what is under way."""
        self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection whose statements commit by themselves. Raises DatabaseUnavailable."""
        connection = None
        try:
            connection = await self._pool.acquire()
            yield connection
        except (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError):
            raise LockTimeout from None
        except asyncpg.DeadlockDetectedError:
            raise Deadlock from None
        except _TRANSIENT:
            raise DatabaseUnavailable from None
        except (*_LOST, OutcomeUnknown, asyncio.CancelledError) as lost:
            # Perhaps in the middle of a statement: asyncpg would wait for the server to confirm that it has stopped, and it
            # may never answer.
            if connection is not None:
                connection.terminate()
            if isinstance(lost, _LOST):
                raise DatabaseUnavailable from None
            raise
        finally:
            if connection is not None:
                self._pool.release(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction that commits when the block ends and rolls back when it raises.

        Raises DatabaseUnavailable (nothing changed), LockTimeout, or OutcomeUnknown when the connection broke in COMMIT.
        """
        async with self.connection() as connection:
            await connection.execute("BEGIN")
            try:
                yield connection
            except _LOST:
                raise  # the server rolls back when the connection is gone
            except Exception:
                await connection.execute("ROLLBACK")
                raise
            with committing():
                await connection.execute("COMMIT")
