"""The workflow worker, `python -m app worker`: runs the workflow of each attempt, and concludes runs for it.

It serves no HTTP and needs the database and Temporal. Any number may run; one is enough for some 30 runs a second.
"""

import asyncio
import logging
import signal
from datetime import timedelta
from uuid import UUID

from temporalio import activity
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from app.config import Settings
from app.handoff import flow
from app.handoff.temporal import connect
from app.runs.conclude import conclude
from app.stores.database import Database
from app.stores.notify import tell
from app.stores.wakeups import Wakeups

log = logging.getLogger("app.handoff")

CONNECT_AGAIN_SECONDS = 2.0
SHUTDOWN_SECONDS = 10.0


class Conclusions:
    """The activity of our own."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._wakeups = Wakeups(settles=False)  # replicas place what waits and send the webhooks

    @activity.defn(name=flow.CONCLUDE)
    async def conclude(self, one: flow.Conclusion) -> str:
        """Raises Unavailable, and Temporal tries again for ever. The failure's text stands in the history: it is constant."""
        run = one.run
        outcome = await conclude(
            self._database,
            self._settings,
            UUID(run.run_id),
            run.organization_id,
            attempt=run.attempt,
            assignment=run.assignment,
            why=one.why,
            is_last=one.is_last,
        )
        log.info(
            {"event": "concluded", "run_id": run.run_id, "attempt": run.attempt, "why": one.why, "outcome": outcome}
        )
        self._wakeups.wake(run.organization_id)
        self._wakeups.deliver()
        await tell(self._database, self._wakeups)
        return outcome


async def serve(settings: Settings) -> None:
    """Until told to stop."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    database = Database(settings)
    while not stopping.is_set():
        try:
            client = await connect(settings)
            break
        except RuntimeError:
            log.warning({"event": "temporal_unreachable", "address": settings.temporal_address})
            try:
                async with asyncio.timeout(CONNECT_AGAIN_SECONDS):
                    await stopping.wait()
            except TimeoutError:
                continue
    else:
        return
    worker = Worker(
        client,
        task_queue=flow.QUEUE,
        workflows=[flow.RunAttempt],
        activities=[Conclusions(settings, database).conclude],
        # The sandbox costs more than the workflow, and guards against what thirty lines do not do: they import nothing.
        workflow_runner=UnsandboxedWorkflowRunner(),
        # A workflow stays with the worker that has it in memory. If that one died, another need not wait long for it.
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
        graceful_shutdown_timeout=timedelta(seconds=SHUTDOWN_SECONDS),
    )
    async with worker:
        log.info({"event": "worker_started", "namespace": settings.temporal_namespace, "task_queue": flow.QUEUE})
        await stopping.wait()
    database.close()
