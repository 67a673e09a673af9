"""Moving: a caller's PATCH that gives a run without a machine another not_before. An executor's report is in report.py."""

from typing import Any
from uuid import UUID

from app.errors import InputExpiresBefore, InsufficientScope, Invalid, RunNotFound, RunNotWaiting
from app.events import record_events
from app.idempotency import Reply, WriteRequest, once
from app.models import RunStatus
from app.runs import projection, replays
from app.scheduling.held import check_not_before
from app.scheduling.lanes import held_lane, wanted_lane
from app.schemas.runs import RunUpdate
from app.services import Services
from app.stores.database import Connection
from app.stores.documents import encode
from app.stores.statements import statement

FIELDS = frozenset({"not_before"})
_BESIDE = frozenset({"reason"})

LOCK_RUN = statement(
    "runs.moving.lock",
    """
    SELECT status, assigned_machine_id, lane FROM runs
    WHERE id = :run_id AND organization_id = :organization_id FOR NO KEY UPDATE
    """,
)

# A retry and an upload lock the run, too: what is read here stays as it is.
INPUT_EXPIRES = statement(
    "runs.moving.input_expires",
    """
    SELECT coalesce(min(expires_at) <= :not_before::timestamptz, false) FROM run_attachments
    WHERE run_id = :run_id AND attachment_type = 'input'
    """,
)

MOVE = statement(
    "runs.moving.move",
    f"""
    WITH moved AS (
        UPDATE runs SET lane = :lane, queued_at = greatest(clock_timestamp(), :not_before::timestamptz)
        WHERE id = :run_id
        RETURNING id, organization_id, attempt, status
    )
    {record_events("moved", "'rescheduled'", from_status="status", to_status="status", changed="'{not_before}'")}
    """,
)


async def move(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    """Hold the run until another time, or no longer. Raises every refusal of the route."""
    _refuse_others(write, options)
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        run = await connection.fetchrow(LOCK_RUN, run_id=run_id, organization_id=organization_id)
        if run is None:
            raise RunNotFound
        if run["status"] != RunStatus.SCHEDULING or run["assigned_machine_id"] is not None:
            raise RunNotWaiting(run["status"])
        not_before = await check_not_before(connection, options.not_before)
        named: dict[str, Any] = {"run_id": run_id, "not_before": not_before}
        if not_before is not None and await connection.fetchval(INPUT_EXPIRES, **named):
            raise InputExpiresBefore
        wanted = wanted_lane(run["lane"])
        if not_before is not None or run["lane"] != wanted:  # else it waits in the queue already, and keeps its place
            await connection.execute(
                MOVE, **named, lane=held_lane(not_before, wanted), **write.actor(options.reason).parameters()
            )
        return Reply(200, encode(await projection.get(connection, run_id, write.principal)), [run_id])

    return await once(services, write, work, replays.RUN)


def _refuse_others(write: WriteRequest, options: RunUpdate) -> None:
    """Raises InsufficientScope for a key that may not move runs, and Invalid for other fields beside it."""
    if not write.principal.may("runs:write"):
        raise InsufficientScope(["runs:write"], "not_before needs a key with runs:write.")
    beside = sorted(options.model_fields_set - FIELDS - _BESIDE)
    if beside:
        sentence = "Must not be sent beside not_before; send it in a request of its own. Nothing was changed."
        raise Invalid(*((("body", name), sentence, "beside_not_before") for name in beside))
