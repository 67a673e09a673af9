"""The real thing: each worker has its own PostgreSQL and OpenBao, and drives the real server process over HTTP."""

import asyncio
import base64
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from app.auth import digest, new_key
from dev.run import App
from dev.stack import Bao, Postgres, free_port

pytest_plugins = ("tests.support.browser",)

DEADLINE = 15.0

# Longer than any test: what happens is owed to the wake-up after a commit, never to polling.
NEVER = 3600


def until(condition: Callable[[], Any], seconds: float = DEADLINE, *, what: str = "the condition") -> Any:
    """Poll until it holds; fail the test at the deadline."""
    end = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not hold within {seconds} s")
        time.sleep(0.02)


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
            "BACKGROUND_PERIOD_SECONDS": "0.2",
            "LOG_LEVEL": "debug",
        }
        return {name: str(value) for name, value in (base | self.settings | settings).items()}

    def sql(self, query: str, *arguments: object) -> list[dict[str, Any]]:
        """Rows of one statement, as the database's owner."""

        async def run() -> list[dict[str, Any]]:
            connection = await asyncpg.connect(self.url, timeout=10)
            try:
                return [dict(row) for row in await connection.fetch(query, *arguments)]
            finally:
                await connection.close()

        return asyncio.run(run())

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
        return {str((Path(path) / name).relative_to(self.files)) for path, _, names in walked for name in names}

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


class Client(httpx.Client):
    """An organization's client, with what tests do again and again."""

    organization: str

    def json_of(self, response: httpx.Response, status: int = 200) -> Any:
        assert response.status_code == status, response.text
        return response.json()

    def workflow(self) -> str:
        created = self.json_of(self.post("/v1/workflows", json={"main_prompt": "Do it."}), 201)
        return str(created["id"])

    def machine(self, **patch: object) -> str:
        body = {"fingerprint": secrets.token_hex(8), "unkey_key_id": "key"}
        machine_id = str(self.json_of(self.post("/v1/machines", json=body), 201)["id"])
        if patch:
            self.json_of(self.patch(f"/v1/machines/{machine_id}", json=patch))
        return machine_id

    def pool(self, *machine_ids: str) -> str:
        pool_id = str(self.json_of(self.post("/v1/pools", json={"name": "pool"}), 201)["id"])
        if machine_ids:
            self.json_of(self.post(f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids}))
        return pool_id

    def webhook_endpoint(self, url: str = "https://localhost/") -> str:
        """By default one that may be registered, but is never connected to."""
        return str(self.json_of(self.post("/v1/webhook-endpoints", json={"url": url}), 201)["id"])

    def run(self, **options: object) -> dict[str, Any]:
        body = {"workflow_id": self.workflow()} | options
        created: dict[str, Any] = self.json_of(self.post("/v1/runs", json=body), 201)
        return created

    def report(self, run_id: str, **fields: object) -> dict[str, Any]:
        reported: dict[str, Any] = self.json_of(self.patch(f"/v1/runs/{run_id}", json=fields))
        return reported

    def upload(self, run_id: str, content: bytes = b"result", filename: str = "out.txt") -> dict[str, Any]:
        body = {
            "run_id": run_id,
            "filename": filename,
            "content": base64.b64encode(content).decode(),
            "content_type": "text/plain",
            "attachment_type": "output",
        }
        created: dict[str, Any] = self.json_of(self.post("/v1/run-attachments", json=body), 201)
        return created

    def finished(self, status: str = "success", **options: object) -> dict[str, Any]:
        """A run that ended, with outputs and history."""
        run_id = self.run(**options)["id"]
        self.report(run_id, status="running")
        self.upload(run_id)
        return self.report(
            run_id,
            status=status,
            output_data={"answer": 42},
            run_message_history=[{"role": "assistant", "content": "done"}],
            error=["it broke"] if status == "error" else None,
        )

    def get_run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json_of(self.get(f"/v1/runs/{run_id}"))
        return found

    def retry(self, run_id: str, **options: object) -> httpx.Response:
        return self.post(f"/v1/runs/{run_id}/retry", json=options)


def file_input(content: bytes = b"hello", filename: str = "in.txt", **more: object) -> dict[str, object]:
    return {"filename": filename, "content": base64.b64encode(content).decode()} | more


class Server:
    """One server process and clients for it."""

    def __init__(self, stack: Stack, app: App) -> None:
        self.stack = stack
        self.app = app
        self.url = app.url

    def client(self, organization: str | None = None, *, key: str | None = None) -> Client:
        organization = organization or f"org-{secrets.token_hex(6)}"
        key = key or self.stack.new_key(organization)
        headers = {"Authorization": f"Bearer {key}"}
        # There is no TLS here; reading the list of authorities would cost more than most tests' requests.
        client = Client(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)
        client.organization = organization
        return client


def start_server(stack: Stack, **settings: object) -> Server:
    """A server process; the caller stops it with `server.app.stop()`."""
    port = free_port()
    folder = stack.folder / f"server-{port}"
    environment: Mapping[str, str] = stack.environment(PORT=port, **settings)
    return Server(stack, App(folder, f"http://127.0.0.1:{port}", environment).start())


def migrate(postgres: Postgres, url: str = "", **settings: object) -> None:
    """The schema by the migrations themselves, as the owner; the service's role gets its rights and settings."""
    from app.cli import main  # imported late: it pulls in the whole application

    url = url or postgres.url
    given = {"DATABASE_URL": postgres.as_app(url), "DATABASE_OWNER_URL": url} | settings
    with pytest.MonkeyPatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, str(value))
        assert main(["migrate"]) == 0


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack that most tests of a worker share; each test has organizations of its own."""
    folder = tmp_path_factory.mktemp("stack")
    with Postgres(folder, fsync=False) as postgres, Bao(folder) as bao:
        migrate(postgres)
        yield Stack(folder, postgres, bao)


@pytest.fixture(scope="session")
def server(stack: Stack) -> Iterator[Server]:
    started = start_server(stack)
    yield started
    started.app.stop()


@pytest.fixture(scope="session")
def quiet_server(stack: Stack) -> Iterator[Server]:
    """A server that does nothing by itself within a test: what changes follows from a request and its commit."""
    started = start_server(stack, BACKGROUND_PERIOD_SECONDS=NEVER)
    yield started
    started.app.stop()


@pytest.fixture
def api(server: Server) -> Iterator[Client]:
    """A client of an organization that only this test uses."""
    with server.client() as client:
        yield client


@pytest.fixture
def foreign(server: Server) -> Iterator[Client]:
    """A client of another organization."""
    with server.client() as client:
        yield client
