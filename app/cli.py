"""The command line: `python -m app serve|migrate|keys`."""

import argparse
import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import UUID, uuid4

import asyncpg
import uvicorn
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from app import __version__, auth, startup
from app.api.server import BACKLOG
from app.config import ConfigurationError, DatabaseSettings, Settings, lines_of
from app.main import create_app
from app.stores import setup
from app.stores.database import Unreachable, connect
from app.telemetry.logs import configure

T = TypeVar("T")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    serve = commands.add_parser("serve", help="serve HTTP, with the settings of the environment")
    serve.set_defaults(run=_serve)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    migrate = commands.add_parser("migrate", help="bring the database's schema up to date")
    migrate.set_defaults(run=_migrate)

    keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="action")
    create = keys.add_parser("create", help="make a key; it is shown this once, on the last line")
    create.add_argument("--organization", required=True, help="organization the key belongs to")
    create.add_argument("--user", type=UUID, help="user the key belongs to")
    create.add_argument("--name", help="what the key is for")
    create.add_argument("--expires-in-days", type=float, help="default: never")
    create.set_defaults(run=_create_key)
    show = keys.add_parser("list", help="keys of an organization, or of all")
    show.add_argument("--organization")
    show.set_defaults(run=_list_keys)
    revoke = keys.add_parser("revoke", help="make a key useless at once")
    revoke.add_argument("id", type=UUID)
    revoke.set_defaults(run=_revoke_key)

    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
    except ValidationError as error:
        print(*lines_of(error), sep="\n", file=sys.stderr)
        return 2
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    return code


def _version(_: argparse.Namespace) -> int:
    print(__version__)
    return 0


def application() -> object:
    """The ASGI application of one server process."""
    startup.keep_out_of_dumps()
    settings = Settings()
    configure(settings.log_level)
    app = create_app(settings)
    app.openapi()  # it takes a third of a second, in which a first reader of the document would hold up everybody
    gc.collect()
    gc.freeze()  # what start-up made lives as long as the process: collections need not go through it again and again
    return app


def _serve(_: argparse.Namespace) -> int:
    startup.keep_out_of_dumps()
    settings = Settings()
    configure(settings.log_level)
    startup.check(settings)
    uvicorn.run(
        "app.cli:application",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop="uvloop",
        http="app.api.server:Protocol",
        ws="none",
        access_log=False,  # the edge writes one line a request, without queries
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,  # longer than balancers keep idle connections: else they send requests into closed ones
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    return 0


def _migrate(_: argparse.Namespace) -> int:
    try:
        command.upgrade(Config(Path(__file__).parent.parent / "alembic.ini"), "head")
    except DBAPIError as problem:
        raise ConfigurationError(f"{DatabaseSettings().owner[0]}: {_failure(problem)}") from None
    except CommandError as problem:  # of Alembic: about our own files
        raise ConfigurationError(f"migrate: {problem}") from None
    return 0


def _failure(problem: DBAPIError) -> str:
    """What went wrong in a migration, by its class. Never the driver's text: it shows rows."""
    cause = problem.orig.__cause__ if problem.orig is not None else None
    if isinstance(cause, asyncpg.LockNotAvailableError):
        return "the running service held a table for too long. Nothing was changed; run `migrate` again."
    if isinstance(cause, asyncpg.InsufficientPrivilegeError):
        return "its role may not do this. It must own the database's tables; nothing was changed."
    return (
        f"a migration failed ({type(cause or problem).__name__}). Nothing was changed; PostgreSQL's log has the reason."
    )


def _create_key(options: argparse.Namespace) -> int:
    key = auth.new_key()
    days: float | None = options.expires_in_days
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)

    async def insert(connection: asyncpg.Connection) -> None:
        await connection.execute(
            "INSERT INTO api_keys (id, organization_id, user_id, name, key_hash, expires_at) VALUES ($1, $2, $3, $4, $5, $6)",
            uuid4(),
            options.organization,
            options.user,
            options.name,
            auth.digest(key.encode()),
            expires_at,
        )

    try:
        _with_database(insert)
    except asyncpg.CheckViolationError:
        print("An organization's id is 1 to 64 of A-Z a-z 0-9 _ -.")
        return 2
    print("Keep this key: it is not stored and not shown again.")
    print(key)
    return 0


def _list_keys(options: argparse.Namespace) -> int:
    async def show(connection: asyncpg.Connection) -> None:
        rows = await connection.fetch(
            "SELECT id, organization_id, user_id, name, created_at, expires_at, revoked_at FROM api_keys"
            " WHERE $1::text IS NULL OR organization_id = $1 ORDER BY created_at",
            options.organization,
        )
        for row in rows:
            print("  ".join("-" if value is None else str(value) for value in row.values()))

    _with_database(show)
    return 0


def _revoke_key(options: argparse.Namespace) -> int:
    async def revoke(connection: asyncpg.Connection) -> str:
        done: str = await connection.execute(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1", options.id
        )
        return done

    if _with_database(revoke) == "UPDATE 0":
        print("There is no key with this id; see `keys list`.")
        return 1
    print("Revoked.")
    return 0


def _with_database(work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
    """Run it as the tables' owner. Raises ConfigurationError."""
    name, url = DatabaseSettings().owner

    async def connected() -> T:
        connection = await connect(url, 10, 60)
        try:
            setup.check_schema(await connection.fetchrow(setup.FITS.sql, setup.CHECKED))
            return await work(connection)
        finally:
            await connection.close()

    try:
        return asyncio.run(connected())
    except Unreachable as problem:
        raise ConfigurationError(f"{name}: {problem.cause}.") from None
    except setup.Unfit as unfit:
        raise ConfigurationError(f"{name}: {unfit.line}") from None
    except asyncpg.UndefinedTableError:
        raise ConfigurationError(f"{name}: the database has not been migrated: run `python -m app migrate`.") from None
    except asyncpg.InsufficientPrivilegeError:
        raise ConfigurationError(
            f"{name}: its role may not do this; set DATABASE_OWNER_URL to the role that owns the tables."
        ) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as problem:
        raise ConfigurationError(f"{name}: the database failed ({type(problem).__name__}); try again.") from None
