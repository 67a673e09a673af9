"""The real parts, set up as in production: PostgreSQL, OpenBao and a folder for files."""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.access.auth import digest, new_key
from app.config import Settings
from app.stores.files import MARKER
from dev.stack import Bao, Postgres


class _Looking:
    """A connection of ours, with the event loop that it needs."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        try:
            # No plan is kept: tables change under it.
            self._connection = self._runner.run(asyncpg.connect(url, timeout=10, statement_cache_size=0))
        except BaseException:
            self._runner.close()
            raise

    def is_open(self) -> bool:
        """Whether PostgreSQL is still there; else it is closed."""
        self._runner.run(asyncio.sleep(0.0))  # the loop hears of an end that came meanwhile
        if self._connection.is_closed():
            self.close()
            return False
        return True

    def rows(self, query: str, *arguments: object) -> list[dict[str, Any]]:
        return [dict(row) for row in self._runner.run(self._connection.fetch(query, *arguments))]

    def close(self) -> None:
        self._connection.terminate()
        self._runner.run(asyncio.sleep(0.0))
        self._runner.close()


class Stack:
    """PostgreSQL, OpenBao and a folder, set up as in production, and ways to look into them by hand."""

    def __init__(
        self, folder: Path, postgres: Postgres, bao: Bao, database: str | None = None, **settings: str
    ) -> None:
        """`settings` are those that all of its servers have."""
        self.folder = folder
        self.settings = settings
        self.postgres = postgres
        # As the database's owner.
        self.url = postgres.url if database is None else f"{postgres.url.rpartition('/')[0]}/{database}"
        self.bao = bao
        self.files = folder / "files"
        self.files.mkdir(exist_ok=True)
        self._kept: list[_Looking] | None = None

    @contextmanager
    def keeping_connections(self) -> Iterator[None]:
        """Within the block `sql` uses a connection again: to make one takes longer than most statements."""
        self._kept = []
        try:
            yield
        finally:
            for one in self._kept:
                one.close()
            self._kept = None

    def beside(self, url: str) -> "Stack":
        """The same with another database, by its owner's URL."""
        return Stack(self.folder, self.postgres, self.bao, url.rpartition("/")[2], **self.settings)

    def environment(self, **settings: object) -> dict[str, str]:
        """What a server of this stack is started with."""
        base: dict[str, object] = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": self.postgres.as_app(self.url),
            "VAULT_ADDR": self.bao.address,
            "VAULT_TOKEN": self.bao.token(),
            "STORAGE_URL": self.files.as_uri(),
            "SERVER_KEY": "a key of the tests, longer than 32 characters",
            "BACKGROUND_PERIOD_SECONDS": "0.4",
            "LOG_LEVEL": "debug",
        }
        return {name: str(value) for name, value in (base | self.settings | settings).items()}

    def sql(self, query: str, *arguments: object) -> list[dict[str, Any]]:
        """Rows of one statement, as the database's owner. Threads may call it side by side."""
        one = self._kept.pop() if self._kept else None
        if one is None or not one.is_open():
            one = _Looking(self.url)
        try:
            return one.rows(query, *arguments)
        finally:
            if self._kept is None:
                one.close()
            else:
                self._kept.append(one)

    @contextmanager
    def held(
        self, query: str, *arguments: object, commit: bool = False
    ) -> Iterator[Callable[..., list[dict[str, Any]]]]:
        """A transaction of our own, open for as long as the block: others wait for what the statement locked.

        Yields a function that runs more statements in it.
        """
        with asyncio.Runner() as runner:
            connection = runner.run(asyncpg.connect(self.url, timeout=10))

            def run(query: str, *arguments: object) -> list[dict[str, Any]]:
                return [dict(row) for row in runner.run(connection.fetch(query, *arguments))]

            try:
                runner.run(connection.execute("BEGIN"))
                run(query, *arguments)
                yield run
                runner.run(connection.execute("COMMIT" if commit else "ROLLBACK"))
            finally:
                runner.run(connection.close())

    def waiting(self) -> int:
        """How many of the service's statements wait for a lock."""
        query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'runs-api' AND wait_event_type = 'Lock'"
        return len(self.sql(query))

    def new_events(self, organization: str, count: int) -> set[UUID]:
        """Events to be sent, that nobody has looked at yet, of runs that never were."""
        rows = self.sql(
            "INSERT INTO webhook_events (id, organization_id, run_id, attempt, event_type, occurred_at, body)"
            " SELECT id, $1, gen_random_uuid(), 1, 'run_complete', clock_timestamp(),"
            " convert_to(json_build_object('event_id', id)::text, 'UTF8')"
            " FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $2)) AS made RETURNING id",
            organization,
            count,
        )
        return {row["id"] for row in rows}

    def new_key(
        self,
        organization: str,
        user_id: UUID | None = None,
        *,
        scopes: Sequence[str] = ("*",),
        machine_id: str | None = None,
    ) -> str:
        key = new_key()
        self.sql(
            "INSERT INTO api_keys (id, organization_id, user_id, key_hash, scopes, machine_id)"
            " VALUES ($1, $2, $3, $4, $5, $6::text::uuid)",
            uuid4(),
            organization,
            user_id,
            digest(key.encode()),
            list(scopes),
            machine_id,
        )
        return key

    def secret(self, path: str) -> dict[str, str] | None:
        """What Vault holds at this path, read as root; None if it holds nothing, not even metadata."""
        status, reply = self.bao.call("GET", f"secret/data/{path}")
        if status == 404 and self.bao.call("GET", f"secret/metadata/{path}")[0] == 404:
            return None
        assert status == 200, reply
        values: dict[str, str] = reply["data"]["data"]
        return values

    def secret_paths(self, folder: str = "runs/") -> set[str]:
        """Every secret below a folder."""
        status, reply = self.bao.call("LIST", f"secret/metadata/{folder}")
        if status == 404:
            return set()
        found: set[str] = set()
        for key in reply["data"]["keys"]:
            found |= self.secret_paths(folder + key) if key.endswith("/") else {folder + key}
        return found

    def blobs(self, folder: str = "") -> set[str]:
        """Every file in the store, leftovers included. Folders may go meanwhile: os.walk passes over them, rglob fails."""
        walked = os.walk(self.files / folder)
        found = {str((Path(path) / name).relative_to(self.files)) for path, _, names in walked for name in names}
        return {name for name in found if not name.startswith(MARKER)}

    def named(self) -> tuple[set[str], set[str]]:
        """Secret paths and blob keys that a run, an endpoint or the deletion list names."""
        secrets_named = self.sql(
            "SELECT secret_path AS name FROM runs WHERE secret_path IS NOT NULL"
            " UNION SELECT path FROM webhook_secrets"
            " UNION SELECT name FROM deletions WHERE store = 'vault'"
        )
        blobs_named = self.sql(
            "SELECT storage_path AS name FROM run_attachments WHERE storage_path IS NOT NULL"
            " UNION SELECT name FROM deletions WHERE store = 'storage'"
        )
        return {row["name"] for row in secrets_named}, {row["name"] for row in blobs_named}


def migrate(postgres: Postgres, url: str = "", **settings: object) -> None:
    """The schema by the migrations themselves, as the owner; the service's role gets its rights and settings."""
    from app.cli import main  # imported late: it pulls in the whole application

    url = url or postgres.url
    given = {"DATABASE_URL": postgres.as_app(url), "DATABASE_OWNER_URL": url} | settings
    with pytest.MonkeyPatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, str(value))
        assert main(["migrate"]) == 0


@contextmanager
def own_stack(folder: Path, **settings: str) -> Iterator[Stack]:
    """Parts that nobody else uses: for tests that break them, turn their clocks or read all there is."""
    with Postgres(folder, fsync=False) as postgres, Bao(folder) as bao:
        migrate(postgres, **settings)
        made = Stack(folder, postgres, bao, **settings)
        with made.keeping_connections():
            yield made


TEMPLATE = "migrated"  # a database that is migrated once: to copy it takes a fifth of the time


@contextmanager
def own_database(stack: Stack, name: str) -> Iterator[Stack]:
    """The same parts with a database that nobody else uses: no other server works on what is in it."""
    name = f"{name}_{uuid4().hex}"
    if not stack.sql("SELECT FROM pg_database WHERE datname = $1", TEMPLATE):
        stack.sql(f"CREATE DATABASE {TEMPLATE}")
        migrate(stack.postgres, f"{stack.postgres.url.rpartition('/')[0]}/{TEMPLATE}")
    stack.sql(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    own = Stack(stack.folder, stack.postgres, stack.bao, name, **stack.settings)
    migrate(own.postgres, own.url)  # what a copy lacks: the settings that the service's role has in each database
    with own.keeping_connections():
        yield own
    stack.sql(f"DROP DATABASE {name} WITH (FORCE)")


def settings_of(stack: Stack, **settings: object) -> Settings:
    """What a server of this stack is started with, as the application reads it."""
    values = {name.lower(): value for name, value in stack.environment(**settings).items()}
    return Settings.model_validate(values)
