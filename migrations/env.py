"""Runs the migrations: one at a time, and never waiting long for a lock that the running service holds.

It goes direct, not through a pooler: its lock and limits belong to a session. It also leaves what setup.py lists: the settings
and rights of the service's role, and the mark that says which replicas may go on.
"""

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.config import ConfigurationError, DatabaseSettings
from app.models import Base
from app.stores import locks, setup
from app.stores.database import Unreachable, connect, is_pooled

# Seconds for a connection, and for a statement: the server's own limits end it before.
PATIENCE = (10, 3600)

# The owner's role may be the service's, and then carries its settings.
LIMITS = [
    # A migration that cannot get its lock in 5 s would block every request behind it: fail and try again later.
    "SET lock_timeout = '5s'",
    "SET statement_timeout = '10min'",
    "SET idle_in_transaction_session_timeout = 0",
    "SET enable_seqscan = on",
    "SET plan_cache_mode = auto",
]

TELL_SECONDS = 5.0

# What a migration is doing now: how far an index is, or what it waits for. Of an UPDATE the server tells no share.
AT_WORK = """
SELECT CASE
           WHEN i.pid IS NOT NULL THEN 'an index, ' || i.phase
           WHEN a.wait_event_type = 'Lock' THEN 'waiting for a lock that the running service holds'
           WHEN a.state = 'active' THEN lower(split_part(ltrim(a.query, E' \\n'), ' ', 1)) || ' statement, for '
               || extract(epoch FROM clock_timestamp() - a.query_start)::int || ' s'
           ELSE 'between two statements' END AS now,
       ', ' || round(100.0 * greatest(i.blocks_done::numeric / nullif(i.blocks_total, 0),
                                      i.tuples_done::numeric / nullif(i.tuples_total, 0))) || ' %' AS part
FROM pg_stat_activity a LEFT JOIN pg_stat_progress_create_index i ON i.pid = a.pid WHERE a.pid = $1
"""

MARK = """
SELECT obj_description(oid, 'pg_class') FROM pg_class
WHERE relname = 'alembic_version' AND relnamespace = current_schema()::regnamespace
"""


def _migrate(connection: Connection, role: str, progress: "_Progress") -> None:
    # Asked for again and again: whoever waits in a statement holds a snapshot, which an index that is built CONCURRENTLY waits
    # for in turn.
    waits = False
    while not connection.scalar(text(f"SELECT {locks.try_for_migration()}")):
        if not waits:
            _say("Another `migrate` is at work: waiting for it ...")
        waits = True
        connection.commit()
        time.sleep(0.2)
    for limit in LIMITS:
        connection.execute(text(limit))
    connection.commit()  # outside a transaction: Alembic then has its own, and may leave it
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=True,
        on_version_apply=progress.applied,
    )
    if _is_done_by_a_later_version(connection):
        return
    names = _limit_role(connection, role)
    connection.commit()
    with context.begin_transaction():
        context.run_migrations()
    _mark(connection)
    if names is not None and context.get_context().get_current_heads() == (context.script.get_current_head(),):
        for statement in setup.table_grants(*names):
            connection.execute(text(statement))
    connection.commit()


def _is_done_by_a_later_version(connection: Connection) -> bool:
    """Raises ConfigurationError if that version has marked the database."""
    [revision] = context.get_context().get_current_heads() or [None]
    if revision is None or not setup.is_newer(revision):
        return False
    try:
        setup.check_mark(revision, connection.scalar(text(MARK)))
    except setup.Unfit as unfit:
        raise ConfigurationError(f"DATABASE_URL: {unfit.line}") from None
    _say(f"The database is at migration {revision}, which this version does not know: nothing to do.")
    return True


def _limit_role(connection: Connection, role: str) -> tuple[str, str] | None:
    """Keep the service's role from everything but rows. Returns it and the schema, quoted; None if it is the owner.

    Raises ConfigurationError if it can do more than this takes away.
    """
    me, schema, database = connection.execute(text("SELECT current_user, current_schema(), current_database()")).one()
    if role == me:
        return None
    quote = connection.dialect.identifier_preparer.quote_identifier
    for statement in setup.limits(quote(role), quote(schema), quote(database)):
        connection.execute(text(statement))
    too_much = connection.scalar(text(setup.TOO_MUCH), {"role": role, "schema": schema, "database": database})
    if too_much:
        raise ConfigurationError(
            f"DATABASE_URL: its role must serve and nothing else, but it has {', '.join(too_much)}. Take that away, or name "
            "another role (docs/operations.md, Database roles). Nothing was changed."
        )
    return quote(role), quote(schema)


def _mark(connection: Connection) -> None:
    """Say in the database which replicas may go on beside it: those that know the newest migration that is `incompatible`."""
    heads = context.get_context().get_current_heads()
    applied = context.script.walk_revisions("base", heads[0]) if heads else ()
    newest = next((one.revision for one in applied if getattr(one.module, "incompatible", False)), None)
    if setup.mark(newest) != connection.scalar(text(MARK)):
        comment = "NULL" if newest is None else f"'{setup.mark(newest)}'"
        connection.execute(text(f"COMMENT ON TABLE alembic_version IS {comment}"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - for whoever runs it


class _Progress:
    """What is said while migrations run: a line for each that is done, and every few seconds how far the current one is."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def applied(self, ctx: Any, step: Any, heads: Any, run_args: Any) -> None:
        """Alembic tells that a migration was applied."""
        took, self._began = time.monotonic() - self._began, time.monotonic()
        direction = "" if step.is_upgrade else "undone, "
        name = Path(step.up_revision.path).stem if step.up_revision is not None else "-"
        _say(f"Migration {name}: {direction}{took:.1f} s")

    async def tell(self, url: str, pid: int) -> None:
        """Until cancelled. It looks from a connection of its own, and says nothing when it cannot."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            with suppress(Unreachable, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                connection = await connect(url, *PATIENCE)
                try:
                    found = await connection.fetchrow(AT_WORK, pid)
                finally:
                    await connection.close()
                if found is not None:
                    _say(f"... {time.monotonic() - self._began:.0f} s: {found['now']}{found['part'] or ''}")


async def _carry_settings(settings: DatabaseSettings) -> str:
    """Give the service's role its settings, as that role itself, which every role may do. Returns its name."""
    try:
        connection = await connect(settings.database_url.get_secret_value(), *PATIENCE)
    except Unreachable as problem:
        raise ConfigurationError(f"DATABASE_URL: {problem.cause}.") from None
    try:
        async with connection.transaction():  # this may go through a pooler
            await connection.execute(f"SELECT {locks.wait_for_role_settings()}")
            for name, value in setup.role_settings(settings.database_timeout_seconds).items():
                carry = setup.CARRY.arguments({"name": name, "value": value})
                await connection.execute(await connection.fetchval(setup.CARRY.sql, *carry))
            role: str = await connection.fetchval("SELECT current_user")
            return role
    finally:
        await connection.close()


async def _run() -> None:
    settings = DatabaseSettings()
    for setting, parsed in settings.database_urls:
        if parsed.ignored:
            _say(f"{setting}: these parameters are ignored: {', '.join(parsed.ignored)}.")
    role = await _carry_settings(settings)
    name, url = settings.owner

    async def direct() -> object:
        # asyncpg reads the same URL as the service does, TLS parameters included.
        connection = await connect(url, *PATIENCE)
        if await is_pooled(connection):
            connection.terminate()
            raise ConfigurationError(
                f"{name}: it goes through a pooler. `migrate` needs PostgreSQL itself: give its address in "
                "DATABASE_OWNER_URL (docs/operations.md, PgBouncer)."
            )
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=direct, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            progress = _Progress()
            pid: int = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            await connection.rollback()
            telling = asyncio.create_task(progress.tell(url, pid))
            try:
                await connection.run_sync(_migrate, role, progress)  # the advisory lock ends with the connection
            finally:
                telling.cancel()
    except Unreachable as problem:
        raise ConfigurationError(f"{name}: {problem.cause}.") from None
    finally:
        await engine.dispose()


asyncio.run(_run())
