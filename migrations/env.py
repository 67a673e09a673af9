"""Runs the migrations: one at a time, and never waiting long for a lock that the running service holds."""

import asyncio
import time

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.config import DatabaseSettings
from app.models import Base

# Replicas that start together queue here; the number is "runs" in ASCII.
MIGRATION_LOCK = 0x72756E73


def _migrate(connection: Connection) -> None:
    # Asked for again and again: whoever waits in a statement holds a snapshot, which an index that is built CONCURRENTLY waits
    # for in turn.
    while not connection.scalar(text(f"SELECT pg_try_advisory_lock({MIGRATION_LOCK})")):
        connection.commit()
        time.sleep(0.2)
    # A migration that cannot get its lock in 5 s would block every request behind it: fail and try again later.
    connection.execute(text("SET lock_timeout = '5s'"))
    connection.execute(text("SET statement_timeout = '10min'"))
    connection.commit()
    context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


async def _run() -> None:
    dsn = DatabaseSettings().database_url.get_secret_value()
    # asyncpg reads the same URL as the service does, TLS parameters included.
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(dsn), poolclass=NullPool
    )
    async with engine.connect() as connection:
        await connection.run_sync(_migrate)  # the advisory lock ends with the connection
    await engine.dispose()


asyncio.run(_run())
