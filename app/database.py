"""PostgreSQL: one asyncpg pool, transactions in plain sight, and the driver's failures turned into 503.

SQLAlchemy defines the tables (models.py) and builds the statements whose shape depends on the request; asyncpg runs every
statement, because a retry through SQLAlchemy's own execution costs three to five times the CPU (benchmarks/README.md).
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol, Self

import asyncpg
from sqlalchemy.dialects.postgresql import asyncpg as sqlalchemy_asyncpg
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from app.config import Settings
from app.errors import DatabaseUnavailable, OutcomeUnknown

Record = Mapping[str, Any]


class Connection(Protocol):
    """What we use of asyncpg's connection, which carries no type information."""

    async def execute(self, sql: str, *args: object) -> str: ...
    async def executemany(self, sql: str, args: Sequence[Sequence[object]]) -> None: ...
    async def fetch(self, sql: str, *args: object) -> list[Record]: ...
    async def fetchrow(self, sql: str, *args: object) -> Record | None: ...
    async def fetchval(self, sql: str, *args: object) -> Any: ...


class LockTimeout(DatabaseUnavailable):
    """Another transaction held a row for longer than `lock_timeout`."""


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


@contextmanager
def committing() -> Iterator[None]:
    """Around a statement that commits. Raises OutcomeUnknown when the connection breaks in it."""
    try:
        yield
    except asyncpg.QueryCanceledError:
        raise  # the server says that it has rolled back
    except (*_LOST, asyncpg.OperatorInterventionError):  # a server that stops may have committed
        raise OutcomeUnknown from None


class Database:
    """The pool of connections of one process. It connects when first used, so the service starts without PostgreSQL."""

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        async def keep_session(_: object) -> None:
            """Nothing of ours outlives a transaction in a session: spare asyncpg's reset, a round trip a request."""

        pool = await asyncpg.create_pool(
            settings.database_url.get_secret_value(),
            min_size=0,
            max_size=settings.database_pool_size,
            timeout=settings.database_timeout_seconds,
            command_timeout=settings.database_timeout_seconds,
            reset=keep_session,
            server_settings={
                "application_name": "runs-api",
                "timezone": "UTC",  # how times are shown in documents that PostgreSQL makes
                "jit": "off",  # short statements: compiling them costs more than it saves
                "lock_timeout": "2s",  # the longest wait for a twin at the switch
                "statement_timeout": f"{int(settings.database_timeout_seconds * 1000)}ms",
                "idle_in_transaction_session_timeout": "10s",  # a frozen replica must not hold a run's row
            },
        )
        return cls(pool, settings.database_timeout_seconds)

    async def close(self) -> None:
        self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection whose statements commit by themselves. Raises DatabaseUnavailable."""
        connection = None
        try:
            connection = await self._pool.acquire(timeout=self._timeout)
            yield connection
        except (*_LOST, OutcomeUnknown) as lost:
            if connection is not None:
                # After a timeout asyncpg would wait for the server to confirm the cancellation: it may never answer.
                with suppress(asyncpg.InterfaceError):  # it broke, and the pool has taken it back
                    connection.terminate()
            raise (lost if isinstance(lost, OutcomeUnknown) else DatabaseUnavailable()) from None
        except asyncpg.LockNotAvailableError:
            raise LockTimeout from None
        except asyncpg.DeadlockDetectedError:
            raise Deadlock from None
        except _TRANSIENT:
            raise DatabaseUnavailable from None
        finally:
            if connection is not None:
                with suppress(*_LOST):  # it broke since; what was answered until then is still true
                    await self._pool.release(connection, timeout=self._timeout)

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
            except BaseException:
                await connection.execute("ROLLBACK")
                raise
            with committing():
                await connection.execute("COMMIT")
