"""PostgreSQL: one pool of asyncpg connections, transactions in plain sight, and the driver's failures turned into 503.

SQLAlchemy defines the tables (models.py) and builds the statements that depend on the request; asyncpg runs every
statement, because a retry through SQLAlchemy's own execution costs three to five times the CPU (benchmarks/README.md).

One file: every failure of the driver is turned into a refusal here, whatever was asked of it.
"""

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from time import perf_counter
from typing import Any

import asyncpg

from app.config import Settings
from app.database_url import DatabaseUrl
from app.errors import DatabaseUnavailable, OutcomeUnknown, Refusal
from app.stores import disks, setup
from app.stores.clock import DatabaseClock, steady
from app.stores.list_totals import SharedCounts
from app.stores.outages import Outage
from app.stores.pool import NoneFreeError, Pool
from app.stores.statements import Statement
from app.telemetry import metrics, tracing

log = logging.getLogger("app.database")

Record = Mapping[str, Any]


class Connection:
    """A connection of ours: it runs statements (statements.py), with their parameters by name. Text is for BEGIN and COMMIT."""

    __slots__ = ("_after", "driver")

    def __init__(self, driver: Any) -> None:
        self.driver = driver  # asyncpg's, which carries no type information
        self._after: list[Callable[[], None]] = []

    def execute(self, sql: Statement | str, /, **values: object) -> Awaitable[str]:
        """Run it; returns its command tag, like `UPDATE 1`."""
        return _run(self.driver.execute, sql, values)

    def fetch(self, sql: Statement | str, /, **values: object) -> Awaitable[list[Record]]:
        """All rows."""
        return _run(self.driver.fetch, sql, values)

    def fetchrow(self, sql: Statement | str, /, **values: object) -> Awaitable[Record | None]:
        """The first row."""
        return _run(self.driver.fetchrow, sql, values)

    def fetchval(self, sql: Statement | str, /, **values: object) -> Awaitable[Any]:
        """The first column of the first row."""
        return _run(self.driver.fetchval, sql, values)

    def after_commit(self, tell: Callable[[], None]) -> None:
        """Call it when what was done here is committed: for what is only logged and counted. It must not fail."""
        self._after.append(tell)

    def committed(self) -> None:
        """Call the functions of `after_commit`: the transaction is committed."""
        for tell in self._after:
            tell()
        self._after.clear()


async def _run(call: Callable[..., Awaitable[Any]], sql: Statement | str, values: Mapping[str, object]) -> Any:
    if isinstance(sql, str):
        name, text, arguments = _WORDS.get(sql.partition(" ")[0], "other"), sql, []
    else:
        name, text, arguments = sql.name, sql.sql, sql.arguments(values)
    span = None if tracing.tracer is None else tracing.statement(name)
    began = perf_counter()
    try:
        found = await call(text, *arguments)
    except BaseException as error:
        if span is not None:
            tracing.fail(span, error)
        raise
    finally:
        metrics.statements.observe(perf_counter() - began, name)
    if span is not None:
        span.end()
    return found


_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

# Names of what has none.
_WORDS = {word: word for word in ("BEGIN", "COMMIT", "ROLLBACK", "SET", "SELECT", "INSERT", "UPDATE", "DELETE")}


class LockTimeout(DatabaseUnavailable):
    """Another transaction held a row for longer than `lock_timeout`."""

    kind = "lock_timeout"


class StatementTimeout(LockTimeout):
    """A statement took longer than `statement_timeout`: rows were held one after the other, or the database is slow."""

    kind = "statement_timeout"


class Deadlock(DatabaseUnavailable):
    """Two transactions wait for each other, or would: this one gives way, and can be done again."""

    kind = "deadlock"


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

# How often a connection that only listens is tried. With its timeout and a second try it is back within 10 s of a failover.
LISTEN_CHECK_SECONDS = 3.0

# The schema is not the one that this version needs, or its role lacks rights: not our defect, and not for the caller to mend.
_UNMIGRATED = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InsufficientPrivilegeError,
)

UniqueViolation = asyncpg.UniqueViolationError
QueryCanceled = asyncpg.QueryCanceledError  # a statement took longer than it may

# Another transaction was in the way; the same transaction may succeed later.
IN_THE_WAY = (
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.DeadlockDetectedError,
    asyncpg.ForeignKeyViolationError,
    asyncpg.RestrictViolationError,  # the same, of RESTRICT, since PostgreSQL 18
)


@contextmanager
def committing() -> Iterator[None]:
    """Around a statement that commits. Raises OutcomeUnknown when the connection breaks in it."""
    try:
        yield
    except asyncpg.QueryCanceledError:
        raise  # the server says that it has rolled back
    except (*_LOST, asyncpg.OperatorInterventionError):  # a server that stops may have committed
        metrics.commits_given_up.add()
        raise OutcomeUnknown from None


READ_ONLY = "read_only"  # the kind of a failure: the server takes no writes, as a standby
_OF_OLD_CONNECTIONS = frozenset({READ_ONLY, "lost", "stopping"})  # kinds that a new connection may not meet


def may_be_of_others(error: Exception) -> bool:
    """Whether what one statement did for several callers can go well for each of them alone: PostgreSQL or the connection
    refused it, and nothing was committed."""
    if isinstance(error, (OutcomeUnknown, Unreachable, setup.Unfit)):
        return False
    if isinstance(error, DatabaseUnavailable):
        return error.kind != "pool_exhausted"
    return isinstance(error, asyncpg.PostgresError)


# Revisions of later versions that this process has warned of.
_NEWER_TOLD: set[str] = set()


class Unreachable(DatabaseUnavailable):
    """No connection could be made. `cause` says why in our words; `is_wrong`: it will not get better by itself."""

    def __init__(self, kind: str, cause: str, *, is_wrong: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.cause = cause
        self.is_wrong = is_wrong


class Servers:
    """The servers that a URL names. The server that was connected to last is tried first."""

    def __init__(self, url: str) -> None:
        self._url = DatabaseUrl.parse(url)
        self._order: list[tuple[str, int | None]] = list(self._url.servers)

    async def connect(self, seconds: float, statement_seconds: float) -> Any:
        """asyncpg's connection to the first server that accepts one. Each server gets an equal part of `seconds`: one that
        is silent must not use up the time of the others. Raises Unreachable."""
        each = min(seconds / max(1, len(self._order)), self._url.connect_timeout or seconds)
        if not self._order:
            return await self._connect_to(None, None, each, statement_seconds)
        if self._url.is_balanced:
            random.shuffle(self._order)
        failed: list[Unreachable] = []
        for server in list(self._order):
            try:
                connection = await self._connect_to(*server, each, statement_seconds)
            except Unreachable as problem:
                failed.append(problem)
            else:
                # Another task may have changed the order meanwhile.
                self._order.sort(key=lambda other, good=server: other != good)  # type: ignore[misc]
                return connection
        # A server that will not get better by itself counts only if there is no other.
        raise min(failed, key=lambda problem: (problem.kind != READ_ONLY, problem.is_wrong))

    async def _connect_to(self, host: str | None, port: int | None, seconds: float, statement_seconds: float) -> Any:
        try:
            return await asyncpg.connect(
                self._url.dsn, host=host, port=port, timeout=seconds, command_timeout=statement_seconds
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no connection, and its text may show the URL
            raise _unreachable(error) from None


async def connect(url: str, seconds: float, statement_seconds: float) -> Any:
    """One connection of asyncpg. Raises Unreachable."""
    return await Servers(url).connect(seconds, statement_seconds)


async def is_pooled(connection: Any) -> bool:
    """Whether a pooler stands in between: it tells its clients another process number than the server's own."""
    told: int = connection.get_server_pid()
    behind: int = await connection.fetchval("SELECT pg_backend_pid()")
    return told != behind


def _read_only() -> Unreachable:
    return Unreachable(READ_ONLY, "the server takes no writes: it is a standby, or default_transaction_read_only is on")


async def _must_take_writes(connection: Any) -> None:
    """Raises Unreachable for a standby and the like."""
    _check_takes_writes(is_read_only=await connection.fetchval(setup.IS_READ_ONLY.sql))


def _check_takes_writes(*, is_read_only: bool) -> None:
    if is_read_only:
        raise _read_only()


def _unreachable(error: Exception) -> Unreachable:
    """The class of the cause. Never the driver's text, which can hold parts of the URL."""
    match error:
        case asyncpg.TargetServerAttributeNotMatched():
            return _read_only()
        case (
            asyncpg.UndefinedObjectError()
            | asyncpg.InvalidParameterValueError()
            | asyncpg.CantChangeRuntimeParamError()
            | asyncpg.ProtocolViolationError()
        ):
            return Unreachable(
                "parameters", "the server refuses a setting in the parameters of its query; look at them", is_wrong=True
            )
        case asyncpg.InvalidAuthorizationSpecificationError():
            return Unreachable("authentication", "the server refuses the role or its password", is_wrong=True)
        case asyncpg.InvalidCatalogNameError():
            return Unreachable("no_database", "the database does not exist; create it", is_wrong=True)
        case asyncpg.InsufficientPrivilegeError():
            return Unreachable("privileges", "the role may not connect to this database (GRANT CONNECT)", is_wrong=True)
        case asyncpg.TooManyConnectionsError():
            return Unreachable("connections", "the server has no connection left")
        case asyncpg.CannotConnectNowError():
            return Unreachable("starting", "the server is starting or stopping")
        case TimeoutError():
            return Unreachable("timeout", "no answer in time; look at host, port and firewall")
        case ConnectionRefusedError():
            return Unreachable("refused", "nothing listens there; start PostgreSQL, or look at host and port")
        case socket.gaierror():
            return Unreachable("host_name", "its host name cannot be resolved")
        case ssl.SSLError() | FileNotFoundError() | PermissionError():
            return Unreachable("tls", "TLS, a socket or a file that it names cannot be used; look at its parameters")
        case ValueError() | OverflowError():
            return Unreachable(
                "url",
                "it cannot be read; percent-encode special characters in user and password, and look at its parameters",
                is_wrong=True,
            )
        case _:
            return Unreachable("lost", f"the connection failed ({type(error).__name__})")


def _unavailable(error: BaseException) -> DatabaseUnavailable:
    """A failure of a connection that was there, with its class for the log."""
    failed = DatabaseUnavailable()
    match error:
        case NoneFreeError():
            failed.kind = "pool_exhausted"
        case TimeoutError():
            failed.kind = "timeout"
        case asyncpg.InvalidAuthorizationSpecificationError():
            failed.kind = "authentication"
        case asyncpg.DiskFullError():
            failed.kind = disks.FULL
        case asyncpg.InsufficientResourcesError():
            failed.kind = "resources"
        case asyncpg.OperatorInterventionError():
            failed.kind = "stopping"
        case asyncpg.ReadOnlySQLTransactionError():
            failed.kind = READ_ONLY
        case asyncpg.TransactionRollbackError():
            failed.kind = "rolled_back"
        case _:
            failed.kind = "lost"
    return failed


class Database:
    """The pool of connections of one process, and its counts of long lists.

    It connects when first used, so the service starts without PostgreSQL.
    """

    def __init__(self, settings: Settings) -> None:
        self._servers = Servers(settings.database_url.get_secret_value())
        self._patience = settings.database_timeout_seconds
        self._told: str | None = None  # why it is unfit, if that has been said and nothing has been better since
        direct_url = settings.database_direct_url or settings.database_url
        self._listening_servers = Servers(direct_url.get_secret_value())
        self._listening_lost = asyncio.Event()
        self.clock = DatabaseClock()
        self.disk = disks.Disk("database")
        self.outage = Outage("database")
        self._pool = Pool(self._connect, settings.database_pool_size, self._patience)
        self.counts = SharedCounts()

    async def check(self) -> None:
        """Connect once. Raises DatabaseUnavailable, with Unfit and Unreachable, and leaves it to the caller to tell."""
        try:
            (await self._connect()).terminate()
        except (*_TRANSIENT, *_LOST) as error:
            raise _unavailable(error) from None

    async def _connect(self) -> Any:
        """A connection to a database that fits, with the settings that its role carries. Raises DatabaseUnavailable."""
        driver = await self._servers.connect(self._patience, self._patience)
        try:
            began = steady()
            try:
                rows = await driver.fetch(setup.FITS.sql, *setup.FITS.arguments({"names": setup.CHECKED}))
            except asyncpg.UndefinedTableError:
                raise setup.NotMigrated("the database has not been migrated") from None
            except asyncpg.InsufficientPrivilegeError:
                raise setup.NotMigrated("the role may not read the tables") from None
            self.clock.measured(rows[0]["now"], began, steady())
            _check_takes_writes(is_read_only=rows[0]["is_read_only"])
            revision = setup.check_schema(rows[0])
            setup.check_session(rows, self._patience)
            # JSON comes and goes as bytes: as text it would take up to four times as much memory.
            await driver.set_type_codec("json", schema="pg_catalog", encoder=bytes, decoder=bytes, format="binary")
        except BaseException:
            driver.terminate()
            raise
        if setup.is_newer(revision) and revision not in _NEWER_TOLD:
            _NEWER_TOLD.add(revision)
            log.warning({"event": "database_is_newer", "revision": revision, "known": setup.known_revisions()[-1]})
        self._told = None
        return driver

    def _tell_unfit(self, unfit: setup.Unfit) -> None:
        """One line, until it has been mended or something else is wrong."""
        if unfit.reason != self._told:
            log.error({"event": "database_unfit", "reason": unfit.reason, "fix": unfit.line})
        self._told = unfit.reason

    async def measure_clock(self) -> None:
        """Compare the machine's clock with the database's. Raises DatabaseUnavailable."""
        async with self.connection() as connection:
            began = steady()
            self.clock.measured(await connection.fetchval(setup.NOW), began, steady())

    async def look_at_disk(self) -> None:
        """Find out whether PostgreSQL's disk is full. Only a temporary file is written. Raises DatabaseUnavailable."""
        try:
            async with self.transaction() as connection:
                await connection.execute(setup.LITTLE_MEMORY)
                await connection.fetchval(setup.TEMPORARY_FILE)
        except DatabaseUnavailable as failed:
            if failed.kind != disks.FULL:
                raise
        else:
            self.disk.seen(full=False)

    async def ready(self) -> None:
        """Whether a connection of the pool can read and may write. Raises DatabaseUnavailable, with Unfit."""
        try:
            await self._ask_ready()
        except DatabaseUnavailable as failed:
            if failed.kind not in _OF_OLD_CONNECTIONS:
                raise
            await self._ask_ready()  # on a new connection: the old one may lead to a server that was replaced

    async def _ask_ready(self) -> None:
        async with self.connection() as connection:
            await connection.fetch(setup.READABLE)
            if await connection.fetchval(setup.IS_READ_ONLY):
                raise asyncpg.ReadOnlySQLTransactionError

    def _give_up_read_only(self) -> None:
        """The server of a connection takes no writes any more. All other connections may be to the same one."""
        self._pool.renew()
        self._listening_lost.set()
        if self._told != READ_ONLY:
            log.error(
                {
                    "event": "database_read_only",
                    "effect": "connections are given up, and made again until one leads to a server that takes writes",
                }
            )
        self._told = READ_ONLY

    def at_most_ms(self, seconds: float) -> int:
        """A statement_timeout of `seconds`, or the timeout of all statements if that is less."""
        return min(int(seconds * 1000), setup.statement_timeout_ms(self._patience))

    def connections(self) -> tuple[int, int]:
        """How many are idle, and how many in use."""
        return self._pool.idle, self._pool.used

    def close(self) -> None:
        """Break every connection off, also what is under way."""
        self._pool.close()

    async def listen(self, channels: Sequence[str], heard: Callable[[str, list[str]], None]) -> None:
        """Hand on what is told on these channels, until cancelled or the connection is lost. Raises DatabaseUnavailable.

        It has a connection of its own: LISTEN lasts as long as its session.
        """
        connection = None
        try:
            self._listening_lost = lost = asyncio.Event()
            connection = await self._listening_servers.connect(self._patience, self._patience)
            connection.add_termination_listener(lambda _: lost.set())
            await _must_take_writes(connection)
            for channel in channels:
                await connection.add_listener(channel, lambda _, __, name, told: heard(name, told.split(",")))
            while not lost.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LISTEN_CHECK_SECONDS):
                        await lost.wait()
                await _must_take_writes(connection)  # a server that is silent may be gone, and a standby tells nothing
        except (*_LOST, asyncpg.PostgresError) as error:
            raise _unavailable(error) from None
        finally:
            if connection is not None:
                connection.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection on which each statement commits by itself. Raises DatabaseUnavailable."""
        connection = None
        try:
            connection = await self._pool.acquire()
            own = Connection(connection)
            yield own
            own.committed()
        except asyncpg.LockNotAvailableError:
            self._pool.has_waited(connection)
            raise LockTimeout from None
        except asyncpg.QueryCanceledError:
            raise StatementTimeout from None
        except _UNMIGRATED as missing:
            unfit = setup.NotMigrated(f"a table, a column or a right is missing ({type(missing).__name__})")
            self._tell_unfit(unfit)
            raise unfit from None
        except setup.Unfit as unfit:
            self._tell_unfit(unfit)
            raise
        except asyncpg.DeadlockDetectedError:
            raise Deadlock from None
        except asyncpg.ReadOnlySQLTransactionError as error:
            self._give_up_read_only()
            raise _unavailable(error) from None
        except _TRANSIENT as error:
            if isinstance(error, asyncpg.DiskFullError):
                self.disk.refused()
            raise _unavailable(error) from None
        except (*_LOST, OutcomeUnknown, asyncio.CancelledError) as lost:
            # Perhaps in the middle of a statement: asyncpg would wait for the server to confirm that it has stopped, and it
            # may never answer.
            if connection is not None:
                connection.terminate()
                if isinstance(lost, TimeoutError):
                    self._pool.drop_idle()  # they may be silent, too: one timeout for all of them is enough
            if isinstance(lost, _LOST):
                raise _unavailable(lost) from None
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
    async def transaction(self, *, plans_see_values: bool = False, snapshot: bool = False) -> AsyncIterator[Connection]:
        """A transaction that commits when the block ends and rolls back when it raises.

        `plans_see_values`: PostgreSQL may plan its statements for the values of a call. This is for statements with a best
        index that depends on the values; it costs a round trip, and often a new plan for each call.
        `snapshot`: it only reads, and all of its statements see the database as it was at one moment.
        Raises DatabaseUnavailable (nothing changed), LockTimeout, or OutcomeUnknown when the connection broke in COMMIT.
        """
        async with self.connection() as connection:
            await connection.execute(_SNAPSHOT if snapshot else "BEGIN")
            try:
                if plans_see_values:
                    await connection.execute("SET LOCAL plan_cache_mode = auto")
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
