"""Start the real service as a process with a fault in the layer below it; the application knows nothing of this.

The process wraps asyncpg's statements, hvac's two calls, the file store's put and delete, the syscalls that make bytes durable,
and the reply, and counts each as a named point ("COMMIT after#2": the second COMMIT has been answered). Only points of
requests that come in after `arm()` count, so setting a scene costs none. At the chosen point the fault happens.

Processes are forked from one that has the application imported and its document made (`fork_server`).
"""

import asyncio
import os
import re
import resource
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import hvac.api.secrets_engines.kv_v2
import uvicorn

from app import cli
from app.api.server import Protocol
from app.bulk.working import Worker
from app.config import Settings
from app.retry_policies.working import RetryWorker
from app.runs.retry_statements import SWITCH, SWITCH_STAGED
from app.services import Services
from app.stores import deletions, files, together
from app.stores.database import Database
from app.stores.files import FileStore
from app.stores.pool import party
from app.stores.vault import VaultSecrets
from app.webhooks import sending
from app.webhooks.delivery import Deliverer
from dev.stack import free_port
from tests.support.fork_server import enter, forks, keep_document
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.waiting import until

# What happens at the point; it gets what the wrapped call was given. It must be picklable.
Fault = Callable[[Sequence[object]], None]


def kill(_: Sequence[object]) -> None:
    """As a power cut: no handler, no flush, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_processes(pids: Sequence[int], _: Sequence[object]) -> None:
    """End parts that the service depends on, at this very moment."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def lose_answer(_: Sequence[object]) -> None:
    """The connection to PostgreSQL breaks after the server has done its work."""
    raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def fail_with_everything(given: Sequence[object]) -> None:
    """An error of the worst kind: its text holds all that the call was given."""
    raise RuntimeError(repr(given))


def die_while_writing(size: int, _: Sequence[object]) -> None:
    """The kernel kills the process at the first byte beyond this size that it writes to any file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def wait_for(gate: Path, _: Sequence[object]) -> None:
    """Stall here until the file exists; `reached` beside it says that we are here."""
    gate.with_name(gate.name + ".reached").touch()
    end = time.monotonic() + 60
    while not gate.exists() and time.monotonic() < end:
        time.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where (None: nowhere, only write down the points) and what."""

    point: str | None = None
    fault: Fault = kill


# Statements that commit, or may be all of a transaction.
COMMITTING = {"COMMIT", SWITCH.name, SWITCH_STAGED.name, deletions.STAGE.name}

IN_REQUEST: ContextVar[bool] = ContextVar("in_request", default=False)


class Faults:
    """Counts points and makes the fault happen."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        self._armed = folder / "armed"
        self._points = folder / "points"
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def point(self, name: str, given: Sequence[object] = ()) -> None:
        if not self._is_in_request():
            return
        with self._lock:
            self._counts[name] += 1
            point = f"{name}#{self._counts[name]}"
            if self.plan.point is None:
                with self._points.open("a") as file:
                    file.write(point + "\n")
        if point == self.plan.point:
            self.plan.fault(given)

    def _is_in_request(self) -> bool:
        """Also in what a request does together with others."""
        return IN_REQUEST.get() or (party.get() == together.PARTY and self._armed.exists())

    def wrap(self, holder: Any, method: str, name: Callable[..., str]) -> None:
        """Points before and after a call that blocks."""
        original = getattr(holder, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            what = name(*args)
            self.point(f"{what} before", (args, kwargs))
            result = original(*args, **kwargs)
            self.point(f"{what} after", (args, kwargs))
            return result

        setattr(holder, method, call)

    def wrap_statement(self, method: str) -> None:
        """Points before and after a statement, and for those that commit also between: sent, not answered."""
        original = getattr(asyncpg.Connection, method)

        async def call(connection: Any, sql: str, *args: Any, **kwargs: Any) -> Any:
            what = _statement(sql)
            self.point(f"{what} before", args)
            if what in COMMITTING and self._is_in_request():
                answer = asyncio.ensure_future(original(connection, sql, *args, **kwargs))
                await asyncio.sleep(0)  # its first step sends
                await asyncio.sleep(0)  # the event loop writes
                answer.add_done_callback(lambda sent: sent.cancelled() or sent.exception())  # it may be left behind
                self.point(f"{what} sent", args)
                result = await answer
            else:
                result = await original(connection, sql, *args, **kwargs)
            self.point(f"{what} after", args)
            return result

        setattr(asyncpg.Connection, method, call)

    def install(self) -> None:
        for method in ("execute", "fetch", "fetchrow", "fetchval"):
            self.wrap_statement(method)
        vault = hvac.api.secrets_engines.kv_v2.KvV2
        self.wrap(vault, "create_or_update_secret", lambda *_: "vault write")
        self.wrap(vault, "delete_metadata_and_all_versions", lambda *_: "vault delete")
        self.wrap(vault, "read_secret_version", lambda *_: "vault read")
        self.wrap(sending.Post, "_open", lambda *_: "connect")
        self.wrap(sending.Post, "send", lambda *_: "send")
        self.wrap(files, "_write_file", lambda *_: "put")
        self.wrap(files, "_delete_files", lambda *_: "delete")
        for call in ("fsync", "rmdir"):
            self.wrap(os, call, partial(_first, call))

    def serving(self, app: Any) -> Any:
        """The application with points around its reply, for requests that come after arming."""

        async def served(scope: Any, receive: Any, send: Any) -> None:
            async def reply(message: Any) -> None:
                self.point(f"{message['type']} before")
                await send(message)
                self.point(f"{message['type']} after")

            if scope["type"] != "http" or not self._armed.exists():
                await app(scope, receive, send)
                return
            IN_REQUEST.set(True)
            await app(scope, receive, reply)

        return served


def _first(name: str, *_: object) -> str:
    return name


def _statement(sql: str) -> str:
    """A statement's name, or its first words: enough to tell which one it is."""
    named = re.match(r"/\* (\S+) \*/", sql)
    return named[1] if named else " ".join(sql.split()[:4])


# A setting of FaultyServer alone: by how many seconds the machine's clock is ahead.
CLOCK_AHEAD = "TEST_CLOCK_AHEAD"


def _turn_clock(seconds: float) -> None:
    real = time.time
    setattr(time, "time", lambda: real() + seconds)  # noqa: B010 - it is not ours to type


def serve(folder: Path, environment: Mapping[str, str], plan: Plan) -> None:
    """A server process: what `python -m app serve` runs, with the faults of the plan."""
    enter(environment, folder / "app.log")
    _turn_clock(float(environment.get(CLOCK_AHEAD, 0)))
    faults = Faults(folder, plan)
    faults.install()
    keep_document()
    uvicorn.run(
        faults.serving(cli.application()),
        host="127.0.0.1",
        port=int(environment["PORT"]),
        loop="uvloop",
        http=Protocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def dispatch(folder: Path, environment: Mapping[str, str], plan: Plan, _: float) -> None:
    """What a replica does to hand runs over, until nothing is due."""
    enter(environment, folder / "app.log")
    from temporalio.client import Client

    from app.handoff.temporal import Dispatcher

    faults = Faults(folder, plan)
    faults.install()
    original = Client.start_workflow

    async def start(*args: Any, **kwargs: Any) -> Any:
        faults.point("start before", args)
        handle = await original(*args, **kwargs)
        faults.point("start after", args)
        return handle

    setattr(Client, "start_workflow", start)  # noqa: B010 - it is not ours to type
    IN_REQUEST.set(True)

    async def rounds() -> None:
        services = Services.open(Settings())
        dispatcher = Dispatcher(services)
        while await dispatcher.round():
            pass
        await services.close()

    asyncio.run(rounds())


def collect(folder: Path, environment: Mapping[str, str], plan: Plan, ahead: float) -> None:
    """One round of the collector, with the database's clock read that many seconds later."""
    enter(environment, folder / "app.log")
    faults = Faults(folder, plan)
    faults.install()
    IN_REQUEST.set(True)
    asyncio.run(collect_until_empty(Settings(), ahead))


def deliver(folder: Path, environment: Mapping[str, str], plan: Plan, ahead: float) -> None:
    """What a replica does for webhooks, until nothing is due; the database's clock is read that many seconds later."""
    enter(environment, folder / "app.log")
    faults = Faults(folder, plan)
    faults.install()
    IN_REQUEST.set(True)
    asyncio.run(deliver_until_idle(Settings(), ahead))


def work_on_bulk_retries(folder: Path, environment: Mapping[str, str], plan: Plan, _: float) -> None:
    """What a replica does for bulk retries, until none runs."""
    enter(environment, folder / "app.log")
    faults = Faults(folder, plan)
    faults.install()
    IN_REQUEST.set(True)

    async def rounds() -> None:
        services = Services.open(Settings())
        worker = Worker(services)
        while await worker.round() is not None:
            pass
        await services.close()

    asyncio.run(rounds())


def work_on_planned_retries(folder: Path, environment: Mapping[str, str], plan: Plan, _: float) -> None:
    """What a replica does for retry policies, until nothing is due."""
    enter(environment, folder / "app.log")
    faults = Faults(folder, plan)
    faults.install()
    IN_REQUEST.set(True)

    async def rounds() -> None:
        services = Services.open(Settings())
        worker = RetryWorker(services)
        while 0 <= (await worker.round() or -1) <= 1:  # True is 1: there is more
            pass
        await services.close()

    asyncio.run(rounds())


async def deliver_until_idle(settings: Settings, ahead: float) -> None:
    """Rounds until one finds nothing new and all that was begun has been settled."""
    services = Services.open(settings)
    deliverer = Deliverer(services, ahead=timedelta(seconds=ahead))
    try:
        await deliverer.round()
    finally:
        await deliverer.close()
        await services.close()


async def collect_until_empty(
    settings: Settings, ahead: float, *, vault: VaultSecrets | None = None, batch: int = deletions.BATCH
) -> int:
    """Run the collector on a clock that is `ahead` seconds later until it finds nothing; returns the rows it took."""
    database = Database(settings)
    vault, files = vault or VaultSecrets(settings), FileStore(settings)
    taken = 0
    try:
        while rows := await deletions.collect(database, vault, files, ahead=timedelta(seconds=ahead), batch=batch):
            taken += rows
        return taken
    finally:
        await vault.close()
        await files.close()
        database.close()


class FaultyServer(Server):
    """A server process of our own making, and clients for it."""

    def __init__(self, stack: Stack, plan: Plan | None = None, **settings: object) -> None:
        port = free_port()
        self.stack = stack
        self.url = f"http://127.0.0.1:{port}"
        self.folder = Path(tempfile.mkdtemp(prefix="faulty-", dir=stack.folder))
        quiet = {"BACKGROUND_PERIOD_SECONDS": 3600}  # what it does by itself must not mix with what is counted
        environment = stack.environment(PORT=port, **(quiet | settings))
        self._process = forks.Process(target=serve, args=(self.folder, environment, plan or Plan()), daemon=True)
        self._process.start()
        until(self._answers, what="the faulty server's start")

    def _answers(self) -> bool:
        assert self._process.is_alive(), self.log()
        try:
            return httpx.get(f"{self.url}/health/live", trust_env=False, verify=False).status_code == 200
        except httpx.TransportError:
            return False

    def arm(self) -> None:
        """From now on requests count."""
        (self.folder / "armed").touch()

    def points(self) -> list[str]:
        """The points that were passed, in order; only without a fault."""
        return (self.folder / "points").read_text().splitlines()

    def log(self) -> str:
        file = self.folder / "app.log"
        return file.read_text() if file.exists() else ""

    @property
    def died(self) -> bool:
        return not self._process.is_alive()

    def stop(self) -> None:
        """Hard: what it leaves behind is what the tests look at."""
        self._process.kill()
        self._process.join()
        self._process.close()

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def collect_as_process(stack: Stack, plan: Plan, *, ahead: float) -> list[str]:
    """One collector process with a fault; returns the points it passed, without one."""
    return _as_process(stack, collect, stack.environment(), plan, ahead)[1]


def deliver_as_process(stack: Stack, plan: Plan, *, ahead: float = 0) -> list[str]:
    """One process that delivers webhooks, with a fault; returns the points it passed, without one."""
    code, points = _as_process(stack, deliver, stack.environment(WEBHOOK_ALLOW="127.0.0.0/8"), plan, ahead)
    assert code == (0 if plan.point is None else -signal.SIGKILL)
    return points


def work_on_bulk_retries_as_process(stack: Stack, plan: Plan) -> list[str]:
    """One process that works on bulk retries, with a fault; returns the points it passed, without one."""
    code, points = _as_process(stack, work_on_bulk_retries, stack.environment(), plan, 0)
    assert code == (0 if plan.point is None else -signal.SIGKILL)
    return points


def work_on_planned_retries_as_process(stack: Stack, plan: Plan) -> list[str]:
    """One process that works on planned retries, with a fault; returns the points it passed, without one."""
    code, points = _as_process(stack, work_on_planned_retries, stack.environment(), plan, 0)
    assert code == (0 if plan.point is None else -signal.SIGKILL)
    return points


def dispatch_as_process(stack: Stack, plan: Plan, **settings: object) -> list[str]:
    """One process that tells Temporal what is due, with a fault; returns the points it passed, without one."""
    code, points = _as_process(stack, dispatch, stack.environment(**settings), plan, 0)
    assert code == (0 if plan.point is None else -signal.SIGKILL)
    return points


def _as_process(
    stack: Stack, work: Callable[..., None], environment: Mapping[str, str], plan: Plan, ahead: float
) -> tuple[int | None, list[str]]:
    folder = Path(tempfile.mkdtemp(prefix=f"{work.__name__}-", dir=stack.folder))
    process = forks.Process(target=work, args=(folder, environment, plan, ahead), daemon=True)
    process.start()
    process.join(60)
    assert not process.is_alive()
    code = process.exitcode
    process.close()
    points = folder / "points"
    return code, points.read_text().splitlines() if points.exists() else []
