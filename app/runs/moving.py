"""Moving: a caller's PATCH that gives a run without a machine another not_before, or another machine or pools to wait for. An
executor's report is in report.py.
"""

from typing import Any, NamedTuple
from uuid import UUID

from app.errors import InputExpiresBefore, InsufficientScope, Invalid, RunNotFound, RunNotWaiting
from app.events import record_events
from app.idempotency import Reply, WriteRequest, once
from app.models import RunStatus
from app.runs import projection, replays
from app.scheduling.held import check_not_before
from app.scheduling.lanes import HELD, held_lane, lane, wanted_lane
from app.scheduling.targets import check_targets
from app.schemas.runs import RunUpdate
from app.services import Services
from app.stores.database import Connection, Record
from app.stores.documents import encode
from app.stores.statements import statement


class _Wanted(NamedTuple):
    """Where a waiting run may go from now on."""

    machine_id: UUID | None
    pool_ids: list[UUID] | None
    session_id: UUID | None = None


_TIME = frozenset({"not_before"})
_TARGETS = frozenset({"machine_id", "pool_ids"})
FIELDS = _TIME | _TARGETS
_BESIDE = frozenset({"reason"})

LOCK_RUN = statement(
    "runs.moving.lock",
    """
    SELECT status, assigned_machine_id, lane, session_id, pinned_machine_id, pool_ids, is_priority FROM runs
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


# It keeps its place: `queued_at` and the rank stay.
RETARGET = statement(
    "runs.moving.retarget",
    f"""
    WITH moved AS (
        UPDATE runs SET lane = :lane, pinned_machine_id = :machine_id, pool_ids = :pool_ids::uuid[],
            pin_is_deleted = false
        WHERE id = :run_id
        RETURNING id, organization_id, attempt, status
    )
    {record_events("moved", "'retargeted'", from_status="status", to_status="status", changed=":changed::text[]")}
    """,
)


async def move(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    """Hold the run until another time or no longer, or let it wait for another machine. Raises every refusal of the route."""
    given = _given(write, options)
    return await (_hold if given == _TIME else _retarget)(services, write, run_id, options)


async def _lock_waiting(connection: Connection, write: WriteRequest, run_id: UUID) -> Record:
    """Raises RunNotFound and RunNotWaiting."""
    run = await connection.fetchrow(LOCK_RUN, run_id=run_id, organization_id=write.principal.organization_id)
    if run is None:
        raise RunNotFound
    if run["status"] != RunStatus.SCHEDULING or run["assigned_machine_id"] is not None:
        raise RunNotWaiting(run["status"])
    return run


async def _retarget(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    """Pools without a machine drop an earlier pin, as in a retry."""
    given = options.model_fields_set & _TARGETS

    async def work(connection: Connection) -> Reply:
        # First the machine, as when it is deleted: then its runs.
        await check_targets(connection, write.principal.organization_id, _Wanted(options.machine_id, options.pool_ids))
        run = await _lock_waiting(connection, write, run_id)
        pools = options.pool_ids if "pool_ids" in given else run["pool_ids"]
        wanted, _ = lane(run["session_id"], options.machine_id, pools, run["is_priority"])
        await connection.execute(
            RETARGET,
            run_id=run_id,
            lane=f"{HELD}{wanted}" if run["lane"].startswith(HELD) else wanted,
            machine_id=options.machine_id,
            pool_ids=pools,
            changed=sorted(given),
            **write.actor(options.reason).parameters(),
        )
        return Reply(200, encode(await projection.get(connection, run_id, write.principal)), [run_id])

    return await once(services, write, work, replays.RUN)


async def _hold(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    async def work(connection: Connection) -> Reply:
        run = await _lock_waiting(connection, write, run_id)
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


def _given(write: WriteRequest, options: RunUpdate) -> frozenset[str]:
    """Which fields are to be moved. Raises InsufficientScope for a key that may not move runs, and Invalid for other fields."""
    given = _TIME if "not_before" in options.model_fields_set else _TARGETS
    names = " and ".join(sorted(given))
    if not write.principal.may("runs:write"):
        raise InsufficientScope(["runs:write"], f"{names} need a key with runs:write; nothing was changed.")
    beside = sorted(options.model_fields_set - given - _BESIDE)
    if beside:
        sentence = f"Must not be sent beside {names}; send it in a request of its own. Nothing was changed."
        raise Invalid(*((("body", name), sentence, f"beside_{min(given)}") for name in beside))
    return given
