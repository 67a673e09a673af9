"""Tell Temporal what the dispatches say: the only file that calls it.

At least once: rows are leased (committed) before Temporal is called and settled after, with no transaction open in between. A
workflow's id names run, attempt and assignment, so that a second start is refused by Temporal and is as good as the first. A
replica without TEMPORAL_ADDRESS never imports this.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal
from uuid import UUID

from temporalio.client import Client, RetryConfig, TLSConfig
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError, RPCStatusCode

from app.config import Settings
from app.handoff import flow
from app.handoff.dispatches import LEASE, POSTPONE, SETTLE, SWEEP
from app.services import Services
from app.stores.database import Record
from app.telemetry import metrics
from app.telemetry.logs import describe

log = logging.getLogger("app.handoff")

IN_FLIGHT = 20  # calls at once, per process
CALL_SECONDS = 5.0
LEASE_SECONDS = 10.0  # longer than a call
SWEEP_SECONDS = 20.0  # how often, and what is younger is left alone
SWEPT = 1_000  # machines in one slice

Outcome = Literal["started", "known", "cancelled", "gone", "dropped", "failed"]


async def connect(settings: Settings, *, lazy: bool = False) -> Client:
    """A client; with `lazy` it connects when it is used. Raises RuntimeError if it cannot connect."""
    address, key = settings.temporal_address, settings.temporal_api_key
    assert address is not None  # noqa: S101 - asked for by nobody else
    # It writes to standard error by itself, as text; what matters is in our own log.
    quiet = LoggingConfig(TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    return await Client.connect(
        address,
        namespace=settings.temporal_namespace,
        api_key=None if key is None else key.get_secret_value(),
        tls=_tls(settings),
        lazy=lazy,
        runtime=Runtime(telemetry=TelemetryConfig(logging=quiet)),
        retry_config=RetryConfig(max_retries=1),  # the rows say what is tried again, and when
    )


def _tls(settings: Settings) -> TLSConfig | bool:
    if not settings.temporal_uses_tls:
        return False
    files = (
        settings.temporal_tls_server_ca_cert_path,
        settings.temporal_tls_client_cert_path,
        settings.temporal_tls_client_key_path,
    )
    authority, certificate, key = (None if file is None else file.read_bytes() for file in files)
    return TLSConfig(authority, settings.temporal_tls_server_name, certificate, key)


def workflow_id(run_id: UUID, attempt: int, assignment: int) -> str:
    """An attempt can be given to a machine more than once."""
    return f"run-{run_id}-{attempt}-{assignment}"


class Dispatcher:
    """The hand-off of one process: `round` and `sweep` are turns of its loops."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._database = services.database
        self._client: Client | None = None
        self._swept_up_to = UUID(int=0)

    async def round(self) -> bool:
        """Tell Temporal about due dispatches, a batch at once; whether there may be more."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(LEASE, lease_seconds=LEASE_SECONDS, most=IN_FLIGHT)
        if not rows:
            return False
        outcomes = await asyncio.gather(*(self._tell(row) for row in rows))
        for row, outcome in zip(rows, outcomes, strict=True):
            metrics.dispatches.add(row["kind"], outcome)
        failed = [row for row, outcome in zip(rows, outcomes, strict=True) if outcome == "failed"]
        done = [row for row, outcome in zip(rows, outcomes, strict=True) if outcome != "failed"]
        async with self._database.connection() as connection:
            if done:
                await connection.execute(SETTLE, **_keys(done))
            if failed:
                await connection.execute(POSTPONE, **_keys(failed))
        return len(rows) == IN_FLIGHT and bool(done)

    async def sweep(self) -> bool:
        """Hand over again what has a machine for too long; a slice of all machines, and whether there are more."""
        async with self._database.connection() as connection:
            last = await connection.fetchval(SWEEP, after=self._swept_up_to, most=SWEPT, after_seconds=SWEEP_SECONDS)
        self._swept_up_to = last or UUID(int=0)
        return last is not None

    async def _tell(self, row: Record) -> Outcome:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                if self._client is None:
                    self._client = await connect(self._settings, lazy=True)
                if row["kind"] == "cancel":
                    return await self._cancel(self._client, row)
                return await self._start(self._client, row) if row["is_wanted"] else "dropped"
        except RPCError as error:
            reason = error.status.name
        except TimeoutError:
            reason = "TIMEOUT"
        except RuntimeError:  # a failure of the SDK's core: it could not connect
            reason = "CONNECT"
        except Exception as error:  # noqa: BLE001 - one bad row must not hold up the others
            line = {"event": "dispatch_broke", "kind": row["kind"], "run_id": str(row["run_id"])}
            log.error(line | describe(error))
            return "failed"
        # Never the text: it is not ours.
        log.warning({"event": "dispatch_failed", "kind": row["kind"], "run_id": str(row["run_id"]), "reason": reason})
        return "failed"

    async def _start(self, client: Client, row: Record) -> Outcome:
        run = flow.Run(
            str(row["run_id"]), row["attempt"], row["assignment"], str(row["machine_id"]), row["organization_id"]
        )
        order = flow.Order(
            run,
            self._settings.temporal_task_queue.format(machine_id=run.machine_id, organization_id=run.organization_id),
            self._settings.run_heartbeat_seconds,
            self._settings.run_timeout_seconds,
        )
        try:
            await client.start_workflow(
                flow.WORKFLOW,
                order,
                id=workflow_id(row["run_id"], run.attempt, run.assignment),
                task_queue=flow.QUEUE,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                rpc_timeout=timedelta(seconds=CALL_SECONDS),
            )
        except WorkflowAlreadyStartedError:
            return "known"
        return "started"

    async def _cancel(self, client: Client, row: Record) -> Outcome:
        handle = client.get_workflow_handle(workflow_id(row["run_id"], row["attempt"], row["assignment"]))
        try:
            await handle.cancel(rpc_timeout=timedelta(seconds=CALL_SECONDS))
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND or row["may_come"]:
                raise
            return "gone"
        return "cancelled"


def _keys(rows: Sequence[Record]) -> dict[str, object]:
    ordered = sorted(rows, key=lambda row: (row["run_id"], row["assignment"], row["kind"]))
    return {
        "run_ids": [row["run_id"] for row in ordered],
        "assignments": [row["assignment"] for row in ordered],
        "kinds": [row["kind"] for row in ordered],
    }
