"""Runs the migrations: one at a time, and never waiting long for a lock that the running service holds.

It goes direct, not through a pooler: its lock and limits belong to a session. It also leaves what setup.py lists: the settings
and rights of the service's role, and the mark that says which replicas may go on.
"""

import asyncio
import sys
import time

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.config import ConfigurationError, DatabaseSettings
from app.models import Base
from app.stores import setup
from app.stores.database import Unreachable, connect, is_pooled

# Replicas that start together queue here; the number is "runs" in ASCII.
MIGRATION_LOCK = 0x72756E73
# And here for an instant: two sessions cannot change the same role's settings at once.
ROLE_LOCK = MIGRATION_LOCK + 1

# Seconds for a connection, and for a statement: the server's own limits end it before.
PATIENCE = (10, 3600)

# The owner's role may be the service's, and then carries its settings.
LIMITS = [
    # A migration that cannot get its lock in 5 s would block every request behind it: fail and try again later.
    "SET lock_timeout = '5s'",
    "SET statement_timeout = '10min'",
    "SET idle_in_transaction_session_timeout = 0",
    "SET enable_seqscan = on",
]

MARK = """
SELECT obj_description(oid, 'pg_class') FROM pg_class
WHERE relname = 'alembic_version' AND relnamespace = current_schema()::regnamespace
"""


def _migrate(connection: Connection, role: str) -> None:
    # Asked for again and again: whoever waits in a statement holds a snapshot, which an index that is built CONCURRENTLY waits
    # for in turn.
    while not connection.scalar(text(f"SELECT pg_try_advisory_lock({MIGRATION_LOCK})")):
        connection.commit()
        time.sleep(0.2)
    for limit in LIMITS:
        connection.execute(text(limit))
    connection.commit()  # outside a transaction: Alembic then has its own, and may leave it
    context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
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
    print(  # noqa: T201 - for whoever runs it
        f"The database is at migration {revision}, which this version does not know: nothing to do.", file=sys.stderr
    )
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


async def _carry_settings(settings: DatabaseSettings) -> str:
    """Give the service's role its settings, as that role itself, which every role may do. Returns its name."""
    try:
        connection = await connect(settings.database_url.get_secret_value(), *PATIENCE)
    except Unreachable as problem:
        raise ConfigurationError(f"DATABASE_URL: {problem.cause}.") from None
    try:
        async with connection.transaction():  # this may go through a pooler
            await connection.execute(f"SELECT pg_advisory_xact_lock({ROLE_LOCK})")
            for name, value in setup.role_settings(settings.database_timeout_seconds).items():
                await connection.execute(await connection.fetchval(setup.CARRY, name, value))
            role: str = await connection.fetchval("SELECT current_user")
            return role
    finally:
        await connection.close()


async def _run() -> None:
    settings = DatabaseSettings()
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
            await connection.run_sync(_migrate, role)  # the advisory lock ends with the connection
    except Unreachable as problem:
        raise ConfigurationError(f"{name}: {problem.cause}.") from None
    finally:
        await engine.dispose()


asyncio.run(_run())
