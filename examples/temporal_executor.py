"""The small executor, with its runs brought by Temporal instead of a long poll. Copy it and replace `work`.

    TEMPORAL_ADDRESS=... API_URL=... API_KEY=... VAULT_ADDR=... VAULT_TOKEN=... MACHINE_ID=... \\
        python -m examples.temporal_executor

With MACHINE_ID it is that machine's, one run at a time, with a key that is bound to it (`keys create --machine`). Without it is
one of a fleet that works for many machines: TEMPORAL_TASK_QUEUE is then the service's, AT_ONCE how many runs it does at once.
TEMPORAL_NAMESPACE, TEMPORAL_API_KEY and TEMPORAL_TLS_* as for every client of Temporal.

Temporal brings nothing but ids. Whether a run is ours to begin the service decides, by our claim; its values, files and secrets
are fetched as by any executor, and what came of it is reported to the service. Temporal hears that we are alive.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import hvac
from temporalio import activity
from temporalio.client import Client
from temporalio.envconfig import ClientConfig
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from examples.executor import KEY_REFUSED, Done, Executor, Superseded, WorkFailed, say

ALIVE_SECONDS = 30  # the service takes an idle machine that says nothing for MACHINE_SILENCE_SECONDS (90) off the list
SHUTDOWN_SECONDS = 60  # what is under way may end

# Set when the attempt is no longer ours: stop as soon as you can. Then values, secrets and files; raises WorkFailed.
Work = Callable[[threading.Event, dict[str, Any], dict[str, Any], list[Path]], Done]


@dataclass(frozen=True)
class Handed:
    """What Temporal brings: one attempt that was given to a machine."""

    run_id: str
    attempt: int
    assignment: int
    machine_id: str
    organization_id: str


class TemporalExecutor:
    """The worker of a machine or of a fleet."""

    def __init__(self, api: httpx.Client, vault: hvac.Client, work: Work) -> None:
        self.api = api
        self.vault = vault
        self.work = work

    @activity.defn(name="execute_run")
    async def execute_run(self, handed: Handed) -> str:
        """One delivery. What it raises stands in Temporal's history in clear text, so it says nothing."""
        stopped = threading.Event()
        doing = asyncio.create_task(asyncio.to_thread(self.execute, handed, stopped))
        try:
            await self.stay_alive(doing)
            return await doing
        except asyncio.CancelledError:
            # The run was cancelled, deleted or retried; or Temporal has lost it or us, and the run is still ours.
            is_stopping = (details := activity.cancellation_details()) is not None and details.worker_shutdown
            if not is_stopping and await asyncio.to_thread(self.is_still_ours, handed):
                say(f"Temporal does not know of run {handed.run_id} any more, the service does: going on")
                return await doing
            say(f"called off: run {handed.run_id}, attempt {handed.attempt}")
            stopped.set()
            await asyncio.wait([doing])
            raise
        except Exception as problem:  # noqa: BLE001 - see above
            raise ApplicationError("The executor failed.", type=type(problem).__name__) from None

    async def stay_alive(self, doing: asyncio.Task[str]) -> None:
        """Say so while the work goes on; a cancellation comes back as an answer to it."""
        patience = activity.info().heartbeat_timeout or timedelta(seconds=10)
        while not doing.done():
            activity.heartbeat()
            await asyncio.wait([doing], timeout=patience.total_seconds() / 3)

    def execute(self, handed: Handed, stopped: threading.Event) -> str:
        """In a thread: begin it, do it, report it."""
        run = self.find(handed)
        if run is None or run["status"] != "scheduling":
            return "superseded"
        # A claim for each delivery: Temporal may have given one to us already that it takes for dead.
        executor = Executor(self.api, self.vault, handed.machine_id, partial(self.work, stopped))
        try:
            executor.execute(run)
        except Superseded:
            say(f"attempt {handed.attempt} of run {handed.run_id} is not ours, dropped")
            return "superseded"
        return "reported"

    def find(self, handed: Handed) -> dict[str, Any] | None:
        """The run as it is now; None if it is gone, or no longer at what was handed to us."""
        reply = self.api.get(f"/v1/runs/{handed.run_id}")
        if reply.status_code == 404:
            return None
        run: dict[str, Any] = reply.raise_for_status().json()
        return run if (run["attempt"], run["assignment"]) == (handed.attempt, handed.assignment) else None

    def is_still_ours(self, handed: Handed) -> bool:
        try:
            run = self.find(handed)
        except httpx.HTTPError:
            return True  # nobody has said otherwise; a report that comes too late is refused
        return run is not None and run["status"] in ("scheduling", "running")


async def say_alive(api: httpx.Client) -> None:
    """While a machine waits at Temporal, the service hears nothing of it. Any request of its own key is a sign of life; one
    that set `status` would connect a machine that an operator has taken off."""
    while True:
        try:
            if (await asyncio.to_thread(api.get, "/v1/whoami")).status_code == 401:
                say(KEY_REFUSED)
        except httpx.HTTPError as problem:
            say(f"the service cannot be reached ({type(problem).__name__})")
        await asyncio.sleep(ALIVE_SECONDS)


async def serve(work: Work) -> None:
    """As the environment says, until told to stop."""
    setting = os.environ
    at_once, machine_id = int(setting.get("AT_ONCE", "1")), setting.get("MACHINE_ID")
    queue = f"machine-{machine_id}" if machine_id else setting["TEMPORAL_TASK_QUEUE"]
    api = httpx.Client(
        base_url=setting["API_URL"], headers={"Authorization": f"Bearer {setting['API_KEY']}"}, timeout=30
    )
    vault = hvac.Client(url=setting["VAULT_ADDR"], token=setting["VAULT_TOKEN"], timeout=10)
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    worker = Worker(
        await connect(),
        task_queue=queue,
        activities=[TemporalExecutor(api, vault, work).execute_run],
        max_concurrent_activities=1 if machine_id else at_once,
        max_concurrent_activity_task_polls=1,  # each costs the server memory
        graceful_shutdown_timeout=timedelta(seconds=SHUTDOWN_SECONDS),
    )
    alive = asyncio.create_task(say_alive(api)) if machine_id else None
    async with worker:
        say(f"waits at Temporal's queue {queue}")
        await stopping.wait()
    if alive is not None:
        alive.cancel()


async def connect() -> Client:
    """As soon as Temporal answers."""
    config = ClientConfig.load_client_connect_config(disable_file=True)
    while True:
        try:
            return await Client.connect(**config)
        except RuntimeError:
            say("Temporal cannot be reached, again in 1 s")
            await asyncio.sleep(1)


def work(stopped: threading.Event, values: dict[str, Any], secrets: dict[str, Any], files: list[Path]) -> Done:
    """What a real executor does on its desktop: here, log in and post each file."""
    if secrets.get("password") != "correct horse":  # what the pretended application accepts
        raise WorkFailed(f"The application refused the password of user {values.get('user')!r}.")
    lines = []
    for file in files:
        if stopped.wait(0.1):
            raise Superseded
        lines.append(f"{file.name}: {len(file.read_bytes())} bytes, posted by {values['user']}\n")
    return Done({"posted": len(lines), "booked_on": secrets["account"]["number"]}, "".join(lines).encode())


if __name__ == "__main__":
    asyncio.run(serve(work))
