"""What the tests of placement and sessions share."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import orjson
from fastapi import FastAPI

from app.main import create_app
from app.scheduling import placement
from tests.support.client import Client
from tests.support.stack import Stack, settings_of
from tests.support.waiting import until

# States that must never be seen, not even for a moment.
FORBIDDEN = """
SELECT 'two active runs on a machine' AS what, assigned_machine_id AS id FROM runs
WHERE status IN ('scheduling', 'running') AND assigned_machine_id IS NOT NULL
GROUP BY assigned_machine_id HAVING count(*) > 1
UNION ALL
SELECT 'two runs of a session at once', session_id FROM runs
WHERE session_id IS NOT NULL AND (status = 'running' OR (status = 'scheduling' AND assigned_machine_id IS NOT NULL))
GROUP BY session_id HAVING count(*) > 1
UNION ALL
SELECT 'a session on two machines', reserved_session_id FROM machines
WHERE reserved_session_id IS NOT NULL GROUP BY reserved_session_id HAVING count(*) > 1
UNION ALL
SELECT 'a run away from its session''s machine', runs.id FROM runs JOIN machines ON reserved_session_id = session_id
WHERE runs.status IN ('scheduling', 'running') AND assigned_machine_id <> machines.id
UNION ALL
SELECT 'a run on a machine reserved for another session', runs.id FROM runs JOIN machines ON assigned_machine_id = machines.id
WHERE runs.status IN ('scheduling', 'running') AND reserved_session_id IS DISTINCT FROM session_id
  AND reserved_session_id IS NOT NULL
UNION ALL
SELECT 'a machine of another organization', runs.id FROM runs JOIN machines ON assigned_machine_id = machines.id
WHERE runs.organization_id <> machines.organization_id
"""


def assigned(api: Client, run_id: str) -> str:
    """The machine that the run gets, which it must get soon."""
    machine_id: str = until(lambda: api.get_run(run_id)["assigned_machine_id"], what="the assignment")
    return machine_id


def starts(api: Client, **options: object) -> dict[str, Any]:
    """A run that got its machine and is running."""
    run_id = api.run(**options)["id"]
    assigned(api, run_id)
    return api.report(run_id, status="running")


def reason(api: Client, run_id: str) -> str | None:
    found: str | None = api.get_run(run_id)["scheduling_reason"]
    return found


class Probe:
    """Tells when a placement pass has ended, to prove what it did not do: a session with a machine of its own."""

    def __init__(self, api: Client) -> None:
        self._api = api
        self._machine_id = api.machine()
        run = starts(api, start_session=True)
        assert run["machine_id"] == self._machine_id
        self._session_id = api.report(run["id"], status="success")["session_id"]

    def passed(self) -> None:
        """A pass that began after all earlier commits has ended."""
        run_id = self._api.run(session_id=self._session_id)["id"]
        assert assigned(self._api, run_id) == self._machine_id
        self._api.report(run_id, status="cancelled")

    def still_waits(self, *run_ids: str) -> None:
        self.passed()
        for run_id in run_ids:
            run = self._api.get_run(run_id)
            assert (run["status"], run["assigned_machine_id"]) == ("scheduling", None)


class Replica:
    """A whole application in this process, called without a socket."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    @classmethod
    @asynccontextmanager
    async def run(cls, stack: Stack, **settings: object) -> AsyncIterator[Self]:
        app = create_app(settings_of(stack, **settings))
        async with app.router.lifespan_context(app):
            yield cls(app)

    async def call(self, key: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and decoded body of one request."""
        content = b"" if body is None else orjson.dumps(body)
        path, _, query = path.partition("?")
        headers = {"authorization": f"Bearer {key}", "content-length": len(content), "content-type": "application/json"}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 1),
            "state": {},
        }
        status, received = 0, b""

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status, received
            status = message.get("status", status)
            received += message.get("body", b"")

        await self.app(scope, receive, send)
        return status, orjson.loads(received) if received else None


class Interrupted:
    """The application's database, where something else commits after placement has read and before it locks."""

    def __init__(self, database: Any, interruption: Callable[[], Any]) -> None:
        self._database = database
        self._interruption = interruption

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with self._database.transaction() as connection:
            yield _InterruptedConnection(connection, self)

    async def interrupt(self) -> None:
        interruption, self._interruption = self._interruption, lambda: None
        if (started := interruption()) is not None:
            await started


class _InterruptedConnection:
    def __init__(self, connection: Any, database: Interrupted) -> None:
        self._connection = connection
        self._interrupted = database
        self.execute = connection.execute
        self.fetchval = connection.fetchval
        self.after_commit = connection.after_commit

    async def fetch(self, statement: object, **values: object) -> Any:
        if statement is placement.LOCK_RUNS:
            await self._interrupted.interrupt()
        return await self._connection.fetch(statement, **values)
