"""PostgreSQL: one pool of asyncpg connections, transactions in plain sight, and the driver's failures turned into 503.

SQLAlchemy defines the tables (models.py) and builds the statements whose shape depends on the request; asyncpg runs every
statement, because a retry through SQLAlchemy's own execution costs three to five times the CPU (benchmarks/README.md).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import asyncpg

from app.config import Settings
from app.errors import DatabaseUnavailable, OutcomeUnknown, Refusal
from app.stores.pool import Pool
from app.stores.statements import Statement

Record = Mapping[str, Any]


class Connection:
    """A connection of ours: it runs statements (statements.py), with their parameters by name.

    Text is for BEGIN, COMMIT and what an operator would type; its parameters are $1, $2, ...
    """

    __slots__ = ("driver",)

    def __init__(self, driver: Any) -> None:
        self.driver = driver  # asyncpg's, which carries no type information

    async def execute(self, sql: Statement | str, /, *args: object, **values: object) -> str:
        """Run it; returns its command tag, like `UPDATE 1`."""
        text, arguments = _prepared(sql, args, values)
        tag: str = await self.driver.execute(text, *arguments)
        return tag

    async def fetch(self, sql: Statement | str, /, *args: object, **values: object) -> list[Record]:
        """All rows."""
        text, arguments = _prepared(sql, args, values)
        rows: list[Record] = await self.driver.fetch(text, *arguments)
        return rows

    async def fetchrow(self, sql: Statement | str, /, *args: object, **values: object) -> Record | None:
        """The first row."""
        text, arguments = _prepared(sql, args, values)
        row: Record | None = await self.driver.fetchrow(text, *arguments)
        return row

    async def fetchval(self, sql: Statement | str, /, *args: object, **values: object) -> Any:
        """The first column of the first row."""
        text, arguments = _prepared(sql, args, values)
        return await self.driver.fetchval(text, *arguments)


def _prepared(
    sql: Statement | str, args: Sequence[object], values: Mapping[str, object]
) -> tuple[str, Sequence[object]]:
    return (sql, args) if isinstance(sql, str) else (sql.sql, sql.arguments(values))


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

# How often a connection that only listens is tried.
LISTEN_CHECK_SECONDS = 5.0

UniqueViolation = asyncpg.UniqueViolationError


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

    def __init__(self, settings: Settings) -> None:
        connect = partial(
            asyncpg.connect,
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
        url, direct_url = settings.database_url, settings.database_direct_url or settings.database_url
        self._pool = Pool(
            partial(connect, url.get_secret_value()), settings.database_pool_size, settings.database_timeout_seconds
        )
        self._connect_directly = partial(connect, direct_url.get_secret_value())

    def close(self) -> None:
        """Break every connection off, also what is under way."""
        self._pool.close()

    async def listen(self, channels: Sequence[str], heard: Callable[[str, list[str]], None]) -> None:
        """Hand on what is told on these channels, until cancelled or the connection is lost. Raises DatabaseUnavailable.

        It has a connection of its own: LISTEN lasts as long as its session.
        """
        connection = None
        try:
            connection = await self._connect_directly()
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _: lost.set())
            for channel in channels:
                await connection.add_listener(channel, lambda _, __, name, told: heard(name, told.split(",")))
            while not lost.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LISTEN_CHECK_SECONDS):
                        await lost.wait()
                await connection.execute("SELECT 1")  # whoever is silent may be gone
        except (*_LOST, asyncpg.PostgresError):
            raise DatabaseUnavailable from None
        finally:
            if connection is not None:
                connection.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection whose statements commit by themselves. Raises DatabaseUnavailable."""
        connection = None
        try:
            connection = await self._pool.acquire()
            yield Connection(connection)
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
        except (Refusal, asyncpg.PostgresError):
            raise  # the server has answered: nothing is under way
        except Exception:
            if connection is not None:
                connection.terminate()  # a defect of ours, perhaps in the middle of a statement
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
                # What went wrong first is what is told. If this fails too, the pool throws the connection away.
                with suppress(*_LOST, asyncpg.PostgresError):
                    await connection.execute("ROLLBACK")
                raise
            with committing():
                await connection.execute("COMMIT")
