"""The command line: `python -m app serve|worker|migrate|keys|organizations|stores|version`.

One file: each command is a few lines that call the folder of its subject.
"""

import argparse
import asyncio
import gc
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

import asyncpg
import uvicorn
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from app import FILES, __version__, commit
from app.access import auth, keys
from app.api.server import BACKLOG
from app.config import ComparisonSettings, ConfigurationError, DatabaseSettings, Settings, lines_of
from app.errors import Unavailable
from app.main import create_app
from app.models import ORGANIZATION_PATTERN
from app.operator import delete_organization, startup
from app.operator.compare_stores import compare, mark_expired
from app.stores import setup
from app.stores.database import Connection, Database, Unreachable, connect
from app.stores.files import FileStore
from app.stores.vault import NotGrantedError, VaultSecrets
from app.telemetry import metrics, tracing
from app.telemetry.logs import configure

T = TypeVar("T")

_MOST_TIME = 1_000_000  # days or hours: more than any real key needs, and a date that Python can hold


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    serve = commands.add_parser("serve", help="serve HTTP, with the settings from the environment")
    serve.set_defaults(run=_serve)
    worker = commands.add_parser("worker", help="run the Temporal worker (docs/temporal.md); needs TEMPORAL_ADDRESS")
    worker.set_defaults(run=_worker)
    version = commands.add_parser("version", help="print the version and the commit")
    version.set_defaults(run=_version)
    migrate = commands.add_parser("migrate", help="migrate the database to this version's schema")
    migrate.set_defaults(run=_migrate)

    key = commands.add_parser("keys", help="manage API keys").add_subparsers(required=True, metavar="action")
    create = key.add_parser("create", help="make a key; the key is shown only this once, on the last line")
    create.add_argument("--organization", required=True, help="the organization that the key belongs to")
    create.add_argument("--user", type=UUID, help="the user that the key belongs to")
    create.add_argument("--name", help="what the key is for")
    create.add_argument("--expires-in-days", type=_span, help="days until the key expires; default: never")
    scopes = [*auth.SCOPES, auth.EVERYTHING]
    create.add_argument(
        "--scope", action="append", choices=scopes, help="what the key may do; may be repeated; default: *"
    )
    create.add_argument(
        "--machine", type=UUID, help="for an executor: the key sees and reports only runs of this machine"
    )
    create.set_defaults(run=_create_key)
    show = key.add_parser("list", help="list the keys of an organization, or of all organizations")
    show.add_argument("--organization")
    show.add_argument("--json", action="store_true", help="print JSON, for programs")
    show.set_defaults(run=_list_keys)
    rotate = key.add_parser(
        "rotate", help="make a new key with the rights of an old key, which ends later; shown on the last line"
    )
    rotate.add_argument("id", type=UUID)
    rotate.add_argument(
        "--overlap-hours", type=_span, default=24, help="hours that the old key still works; default: 24"
    )
    rotate.set_defaults(run=_rotate_key)
    revoke = key.add_parser("revoke", help="end a key at once")
    revoke.add_argument("id", type=UUID)
    revoke.set_defaults(run=_revoke_key)

    organization = commands.add_parser("organizations", help="delete organizations").add_subparsers(
        required=True, metavar="action"
    )
    delete = organization.add_parser(
        "delete", help="delete an organization with everything that belongs to it; if interrupted, run it again"
    )
    delete.add_argument("name")
    delete.add_argument("--confirm", metavar="NAME", help="the name again, for scripts; default: ask for it")
    delete.add_argument(
        "--grace-seconds",
        type=float,
        default=90,
        help="seconds to wait for requests that were under way when the keys were revoked; must be longer than"
        " STAGE_TIMEOUT_SECONDS; default: 90",
    )
    delete.set_defaults(run=_delete_organization)

    stores = commands.add_parser("stores", help="compare Vault and the file store with the database").add_subparsers(
        required=True, metavar="action"
    )
    comparison = stores.add_parser(
        "compare",
        help="list secrets and files that the database names and the stores lack, and those that the stores hold"
        " and the database does not name; without --mark it changes nothing."
        " Exit status 1: there are differences; 2: the comparison failed",
    )
    comparison.add_argument(
        "--mark",
        action="store_true",
        help="mark secrets of ended runs that Vault does not have as expired: their retry is then 409"
        " `sensitive_inputs_expired`, instead of a run without its secrets",
    )
    comparison.add_argument("--json", action="store_true", help="print one JSON object per line")
    comparison.set_defaults(run=_compare_stores)

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
    print(f"{__version__} (commit {commit()})")
    return 0


def application() -> object:
    """The ASGI application of one server process."""
    startup.keep_out_of_dumps()
    settings = Settings()
    configure(settings.log_level)
    tracing.start(settings.database_url.get_secret_value())
    app = create_app(settings)
    app.openapi()  # takes a third of a second: made now, so that the first request for the document delays no other request
    gc.collect()
    gc.freeze()  # objects made at the start live as long as the process: the garbage collector need not visit them again
    return app


def _serve(_: argparse.Namespace) -> int:
    startup.keep_out_of_dumps()
    settings = Settings()
    configure(settings.log_level)
    tracing.check()
    startup.check(settings)
    if settings.metrics:
        try:
            metrics.share(settings.workers)
        except OSError as problem:
            raise ConfigurationError(
                f"PROMETHEUS_MULTIPROC_DIR: the folder cannot be used ({problem.strerror}). Name a writable folder."
            ) from None
    uvicorn.run(
        "app.cli:application",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop="uvloop",
        http="app.api.server:Protocol",
        ws="none",
        access_log=False,  # the edge writes one line per request, without the query
        log_config=None,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        backlog=BACKLOG,
        timeout_keep_alive=75,  # longer than load balancers keep idle connections: they must not use a closed one
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    return 0


def _worker(_: argparse.Namespace) -> int:
    startup.keep_out_of_dumps()
    settings = Settings()
    configure(settings.log_level)
    if not settings.hands_over:
        raise ConfigurationError("TEMPORAL_ADDRESS: is not set. The worker needs it (docs/temporal.md).")
    startup.check_temporal(settings)
    from app.handoff.worker import serve

    asyncio.run(serve(settings))
    return 0


def _migrate(_: argparse.Namespace) -> int:
    try:
        command.upgrade(Config(FILES / "alembic.ini"), "head")
    except DBAPIError as problem:
        raise ConfigurationError(f"{DatabaseSettings().owner[0]}: {_failure(problem)}") from None
    except CommandError as problem:  # Alembic's, about the migration files of this package
        raise ConfigurationError(f"migrate: {problem}") from None
    return 0


def _failure(problem: DBAPIError) -> str:
    """The sentence about a failed migration, by the class of the failure. Never the driver's text, because it shows rows."""
    cause = problem.orig.__cause__ if problem.orig is not None else None
    if isinstance(cause, asyncpg.LockNotAvailableError):
        return "the running service held a table for too long. Nothing was changed; run `migrate` again."
    if isinstance(cause, asyncpg.InsufficientPrivilegeError):
        return "its role has too few rights. Nothing was changed; name the role that owns the database's tables."
    return (
        f"a migration failed ({type(cause or problem).__name__}). Nothing was changed; PostgreSQL's log has the reason."
    )


def _span(written: str) -> float:
    """Parse a number of days or hours. Raises argparse.ArgumentTypeError."""
    with suppress(ValueError):
        if abs(float(written)) <= _MOST_TIME:
            return float(written)
    raise argparse.ArgumentTypeError(f"must be a number, at most {_MOST_TIME:,}")


def _create_key(options: argparse.Namespace) -> int:
    key, key_id = auth.new_key(), uuid4()
    days: float | None = options.expires_in_days
    scopes = options.scope or (["runs:read", "runs:execute"] if options.machine else [auth.EVERYTHING])
    if not re.fullmatch(ORGANIZATION_PATTERN, options.organization):
        print("An organization's id has 1 to 64 characters of A-Z a-z 0-9 _ -. No key was made.", file=sys.stderr)
        return 2
    if options.machine and not auth.EXECUTOR_SCOPES.issuperset(scopes):
        print(
            "A key that is bound to a machine may have no other scopes than runs:read and runs:execute.",
            file=sys.stderr,
        )
        return 2
    if "runs:execute" in scopes and "runs:read" not in scopes and options.machine is None:
        print(
            "A key with runs:execute and without runs:read must be bound to a machine: give --machine.", file=sys.stderr
        )
        return 2
    new = keys.NewKey(
        id=key_id,
        organization_id=options.organization,
        user_id=options.user,
        name=options.name,
        key_hash=auth.digest(key.encode()),
        expires_at=None if days is None else datetime.now(UTC) + timedelta(days=days),
        scopes=scopes,
        machine_id=options.machine,
    )
    if not _with_database(lambda connection: keys.insert(connection, new)):
        print("The organization has no machine with this id. No key was made.", file=sys.stderr)
        return 1
    _show_key(key_id, key)
    return 0


def _show_key(key_id: UUID, key: str) -> None:
    print(f"The key's id is {key_id}. Keep this key: it is not stored and not shown again.")
    print(key)


def _rotate_key(options: argparse.Namespace) -> int:
    key, key_id, overlap = auth.new_key(), uuid4(), options.overlap_hours * 3600
    digest = auth.digest(key.encode())
    if not _with_database(lambda connection: keys.rotate(connection, options.id, key_id, digest, overlap)):
        print("There is no valid key with this id. No key was made; see `keys list`.", file=sys.stderr)
        return 1
    print(f"The old key ends in {options.overlap_hours:g} hours.")
    _show_key(key_id, key)
    return 0


def _list_keys(options: argparse.Namespace) -> int:
    found = [dict(row.items()) for row in _with_database(lambda one: keys.list_keys(one, options.organization))]
    if options.json:
        print(json.dumps(found, default=_plain, indent=2))
        return 0
    header = [name.upper() for name in keys.SHOWN]
    table = [header, *([_plain(value) for value in row.values()] for row in found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _plain(value: object) -> str:
    """Return a value as text for people: times to the second, in UTC."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return _visible(",".join(value) if isinstance(value, list) else str(value))


def _visible(text: str) -> str:
    """Return the text with escapes for control characters and for characters that change the direction of text."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _revoke_key(options: argparse.Namespace) -> int:
    if not _with_database(lambda connection: keys.revoke(connection, options.id)):
        print("There is no key with this id. Nothing was changed; see `keys list`.", file=sys.stderr)
        return 1
    print("Revoked.")
    return 0


def _delete_organization(options: argparse.Namespace) -> int:
    name: str = options.name
    found = _with_database(lambda connection: delete_organization.count(connection, name))
    if not found:
        print("There is no organization with this name. Nothing was changed.")
        return 1
    most = delete_organization.COUNTED
    had = ", ".join(f"{kind}: {number:,}{' or more' if number == most else ''}" for kind, number in found.items())
    print(f"Everything that belongs to {name} will be deleted for good. {had}.")
    again = options.confirm
    if again is None:
        try:
            again = input("Type the name again to confirm: ")
        except EOFError:
            print("Nothing was changed. Without a terminal, confirm with --confirm NAME.")
            return 2
    if again != name:
        print("The names differ. Nothing was changed.")
        return 1
    done = _with_database(
        lambda connection: delete_organization.delete(connection, name, options.grace_seconds, _Told())
    )
    if not done:
        print("New data of the organization appeared during the deletion. Run the command again.")
        return 1
    print("Done. The organization's secrets and files are on the deletion list; the running service deletes them.")
    return 0


def _compare_stores(options: argparse.Namespace) -> int:
    settings = ComparisonSettings()
    configure("error")
    folder = urlsplit(settings.storage_url)
    if folder.scheme == "file" and not Path(unquote(folder.path)).is_dir():
        raise ConfigurationError("STORAGE_URL: the folder does not exist. Mount it first.")
    startup.check_database(settings)

    async def list_differences() -> int:
        counts: Counter[str] = Counter()
        database, secrets, files = Database(settings), VaultSecrets(settings), FileStore(settings)
        try:
            async for found in compare(database, secrets, files):
                counts[found.kind] += 1
                if options.mark and await mark_expired(database, found):
                    counts["marked"] += 1
                owner = "" if found.owner is None else f"  needed by {found.owner}"
                print(
                    json.dumps(asdict(found))
                    if options.json
                    else _visible(f"{found.kind}  {found.store}  {found.name}{owner}")
                )
        finally:
            await secrets.close()
            await files.close()
            database.close()
        marked = f", {counts['marked']} marked as expired" if options.mark else ""
        print(f"{counts['missing']} missing, {counts['orphaned']} orphaned{marked}.", file=sys.stderr)
        return 1 if counts else 0

    try:
        return asyncio.run(list_differences())
    except NotGrantedError:
        raise ConfigurationError(
            "VAULT_TOKEN: this token may not list. Nothing was changed; set a token with policies/compare.hcl."
        ) from None
    except Unavailable as problem:
        print(
            f"The comparison is not complete ({problem.code}): a store did not answer. Run it again.", file=sys.stderr
        )
        return 2
    except ValueError as problem:  # the file store's error, which names the setting
        raise ConfigurationError(str(problem)) from None


class _Told:
    """Prints the progress of a deletion, at most once a second."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, what: str, number: int) -> None:
        if what == delete_organization.WAITING:
            print(f"Waiting {number} s for requests that were under way when the keys were revoked.", flush=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            print(f"{what}: {number:,} deleted", flush=True)


def _with_database(work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run `work` with a connection of the role that owns the tables. Raises ConfigurationError."""
    name, url = DatabaseSettings().owner

    async def connected() -> T:
        connection = await connect(url, 10, 60)
        try:
            setup.check_schema(await connection.fetchrow(setup.FITS.sql, setup.CHECKED))
            return await work(Connection(connection))
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
            f"{name}: its role has too few rights. Nothing was changed; set DATABASE_OWNER_URL to the tables' owner."
        ) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as problem:
        raise ConfigurationError(f"{name}: the database failed ({type(problem).__name__}); try again.") from None
