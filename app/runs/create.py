"""Create runs, one or many that are alike, in the steps of a retry: check, stage, switch, settle."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import orjson
from sqlalchemy import bindparam, literal_column, select

from app.errors import PayloadTooLarge, WorkflowNotFound
from app.events import record_events
from app.idempotency import Reply, Resource, WriteRequest, check_or_replay, once
from app.limits import memory_budget
from app.models import Workflow
from app.runs import carried, projection, quotas, replays, staging
from app.runs.sessions import Session, alias_needs_session, refuse_contradictions
from app.scheduling.held import check_not_before
from app.scheduling.lanes import held_lane, lane
from app.scheduling.targets import check_targets
from app.schemas.runs import RunBulkCreate, RunCreate
from app.services import Services
from app.stores.database import Connection
from app.stores.documents import columns, encode
from app.stores.statements import json_bytes, rows_of, statement

# The lock keeps the workflow from being deleted before its run is committed.
KNOWN_WORKFLOW = statement(
    "runs.create.workflow",
    select(literal_column("1"))
    .where(Workflow.id == bindparam("workflow_id"), Workflow.organization_id == bindparam("organization_id"))
    .with_for_update(key_share=True, read=True),
)

INSERT = statement(
    "runs.create.insert",
    f"""
    WITH created AS (
        INSERT INTO runs (id, organization_id, workflow_id, user_id, status, is_priority, pinned_machine_id, pool_ids,
                          session_id, session_alias, release_session_after, lane, queue_rank, {carried.NAMES},
                          sensitive_input_aliases, secret_path, created_at, queued_at, changed_at, queued_by_key_id,
                          traceparent)
        SELECT id, :organization_id, :workflow_id, :user_id, 'scheduling', :is_priority, :pinned_machine_id, :pool_ids,
               :session_id, :session_alias, :release_session_after, :lane, :queue_rank, {carried.PARAMETERS},
               aliases::json, secret_path, clock_timestamp(),
               greatest(clock_timestamp(), :not_before::timestamptz), clock_timestamp(), :key_id::uuid, :traceparent::text
        FROM unnest(:run_ids::uuid[], :aliases::text[], :secret_paths::text[]) AS planned (id, aliases, secret_path)
        RETURNING id, organization_id, attempt
    )
    {record_events("created", "'created'", to_status="'scheduling'")}
    """,
)

# Read by a statement of its own, which sees all that was inserted: runs of one session wait for each other.
CREATED = statement(
    "runs.create.created",
    f"""
    SELECT {columns(projection.MANY_RUNS)} FROM {rows_of("runs", "run_ids")} AS r
    {projection.RUN_SOURCE} {projection.outputs_source()}
    ORDER BY array_position(:run_ids::uuid[], r.id)
    """,
)


async def create(services: Services, write: WriteRequest, options: RunCreate) -> Reply:
    """One new run; with start_session its session's id is its own. Raises every refusal of the route."""
    run_id = uuid4()

    def show(runs: list[dict[str, Any]]) -> bytes:
        return encode(runs[0])

    return await _create(services, write, options, [run_id], run_id, show, replays.RUN)


async def create_bulk(services: Services, write: WriteRequest, options: RunBulkCreate) -> Reply:
    """`count` runs or none; with start_session they share one new session. Raises every refusal of the route."""
    run_ids = [uuid4() for _ in range(options.count)]
    resource = replays.bulk_resource(services.settings.max_reply_bytes)
    return await _create(services, write, options, run_ids, uuid4(), replays.bulk, resource)


async def _create(
    services: Services,
    write: WriteRequest,
    options: RunCreate | RunBulkCreate,
    run_ids: Sequence[UUID],
    new_session_id: UUID,
    show: Callable[[list[dict[str, Any]]], bytes],
    resource: Resource,
) -> Reply:
    """The same steps as a retry: check, stage, switch, settle."""
    refuse_contradictions(options.session_id, options.start_session)
    session_id = new_session_id if options.start_session else options.session_id
    session = alias_needs_session(Session(session_id, options.session_alias, options.release_session_after))
    staging.check_sizes(services, options.sensitive_input_values, options.file_inputs, copies=len(run_ids))
    if len(run_ids) * len(json_bytes(options.input_values) or b"") > services.settings.max_body_bytes:
        raise PayloadTooLarge("count times the size of input_values is too large; send fewer runs at a time.")
    principal, count = write.principal, len(run_ids)
    await memory_budget.reserve(
        memory_budget.COPIES * _reply_octets(services, principal.organization_id, options, run_ids)
    )
    if options.sensitive_input_values or options.file_inputs:

        async def check(connection: Connection) -> None:
            await _check(connection, principal.organization_id, options)
            await quotas.check(connection, services.run_quotas, principal, waiting=count, created=count)

        if (replayed := await check_or_replay(services, write, resource, check)) is not None:
            return replayed
    planned = await staging.stage(
        services, principal.organization_id, run_ids, options.sensitive_input_values, options.file_inputs
    )

    async def switch(connection: Connection) -> Reply:
        not_before = await _check(connection, principal.organization_id, options)
        standings = await quotas.admit(connection, services.run_quotas, principal, waiting=count, created=count)
        wanted, queue_rank = lane(session.id, options.machine_id, options.pool_ids, bool(options.is_priority))
        await connection.execute(
            INSERT,
            organization_id=principal.organization_id,
            workflow_id=options.workflow_id,
            is_priority=bool(options.is_priority),
            pinned_machine_id=options.machine_id,
            pool_ids=options.pool_ids,
            session_id=session.id,
            session_alias=session.alias,
            release_session_after=session.release_after,
            lane=held_lane(not_before, wanted),
            queue_rank=queue_rank,
            not_before=not_before,
            **carried.parameters(options),
            traceparent=write.traceparent,
            run_ids=run_ids,
            aliases=[None if one.aliases is None else orjson.dumps(one.aliases).decode() for one in planned],
            secret_paths=[one.secret_path for one in planned],
            **write.actor().parameters(),
        )
        await staging.adopt(
            connection, dict(zip(run_ids, planned, strict=True)), principal.organization_id, principal.user_id
        )
        rows = await connection.fetch(CREATED, run_ids=run_ids)
        return Reply(201, show(await projection.many(connection, rows)), run_ids, standings=standings)

    return await once(services, write, switch, resource)


# Ids, times and what else a run shows whatever it was made of, with room to spare; and each id in a list of them.
_RUN_BYTES, _ID_BYTES = 1500, 39


def _reply_octets(
    services: Services, organization_id: str, options: RunCreate | RunBulkCreate, run_ids: Sequence[UUID]
) -> int:
    """About how long the reply of a bulk will be, which shows every run. Raises PayloadTooLarge if it would be too long."""
    if len(run_ids) == 1:  # as long as its body
        return 0
    [one] = staging.plan(services, organization_id, run_ids[:1], options.sensitive_input_values, options.file_inputs)
    repeated = [one.aliases, options.session_alias, *(field.given(options) for field in carried.CARRIED)]
    size = _RUN_BYTES + len(encode(repeated)) + _ID_BYTES * (len(one.files) + len(options.pool_ids or ()))
    if len(run_ids) * size > services.settings.max_reply_bytes:
        raise PayloadTooLarge(
            f"The reply would show count times what was sent, more than {services.settings.max_reply_bytes} bytes; "
            "send fewer runs at a time."
        )
    return len(run_ids) * size


async def _check(connection: Connection, organization_id: str, options: RunCreate | RunBulkCreate) -> datetime | None:
    """Until when the runs are to be held. Raises WorkflowNotFound, Invalid, and what check_targets raises."""
    if not await connection.fetchval(KNOWN_WORKFLOW, workflow_id=options.workflow_id, organization_id=organization_id):
        raise WorkflowNotFound
    await check_targets(connection, organization_id, options)
    return await check_not_before(connection, options.not_before)
