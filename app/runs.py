"""A run's life around the retry: create, report, end, delete.

Whatever ends a run goes through `end_runs` or `_ended`, and whatever removes its row through `remove_runs`: they free the
machine, release the session, and put secrets and blobs on the deletion list in the same transaction.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import func, update

from app import deletions, staging, views
from app.config import Settings
from app.database import Connection, Database, json_text, sql
from app.deletions import Name
from app.errors import AttemptSuperseded, Invalid, InvalidTransition, PayloadTooLarge, RunNotFound, WorkflowNotFound
from app.idempotency import Reply, Write, early, once
from app.models import TERMINAL, Run, RunStatus
from app.parts import Parts
from app.placement import check_targets, lane
from app.retry import Session, alias_needs_session, refuse_contradictions
from app.schemas import RunBulkCreate, RunCreate, RunUpdate

# --- create -----------------------------------------------------------------------------------------------------------

KNOWN_WORKFLOW = "SELECT 1 FROM workflows WHERE id = $1 AND organization_id = $2 FOR KEY SHARE"

INSERT = """
INSERT INTO runs (id, organization_id, workflow_id, user_id, status, is_priority, pinned_machine_id, pool_ids,
                  input_values, session_id, session_alias, release_session_after, lane, queue_rank,
                  sensitive_input_aliases, secret_path, created_at, queued_at)
SELECT id, $1, $2, $3, 'scheduling', $4, $5, $6, $7::json, $8, $9, $10, $11, $12,
       aliases::json, secret_path, clock_timestamp(), clock_timestamp()
FROM unnest($13::uuid[], $14::text[], $15::text[]) AS planned (id, aliases, secret_path)
"""

# Read by a statement of its own, which sees all that was inserted: runs of one session wait for each other.
CREATED = f"""
SELECT {views.columns(views.RUN_COLUMNS)} FROM runs r {views.RUN_SOURCE}
WHERE r.id = ANY($1::uuid[]) ORDER BY array_position($1::uuid[], r.id)
"""


async def create(parts: Parts, write: Write, options: RunCreate) -> Reply:
    """One new run; with start_session its session's id is its own. Raises every refusal of the route."""
    run_id = uuid4()

    def show(runs: list[dict[str, Any]]) -> dict[str, Any]:
        return runs[0]

    return await _create(parts, write, options, [run_id], run_id, show)


async def create_bulk(parts: Parts, write: Write, options: RunBulkCreate) -> Reply:
    """`count` runs or none; with start_session they share one new session. Raises every refusal of the route."""

    def show(runs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"created_runs": runs, "failed_count": 0, "errors": []}

    return await _create(parts, write, options, [uuid4() for _ in range(options.count)], uuid4(), show)


async def _create(
    parts: Parts,
    write: Write,
    options: RunCreate | RunBulkCreate,
    run_ids: Sequence[UUID],
    new_session_id: UUID,
    show: Any,
) -> Reply:
    """The same steps as a retry: check, stage, switch, settle."""
    refuse_contradictions(options.session_id, options.start_session)
    session_id = new_session_id if options.start_session else options.session_id
    session = alias_needs_session(Session(session_id, options.session_alias, options.release_session_after))
    staging.check_sizes(parts, options.sensitive_input_values, options.file_inputs, copies=len(run_ids))
    input_values = json_text(options.input_values)
    if len(run_ids) * len(input_values or "") > parts.settings.max_body_bytes:
        raise PayloadTooLarge("count times the size of input_values is too large; send fewer runs at a time.")
    principal = write.principal
    if options.sensitive_input_values or options.file_inputs:

        async def check(connection: Connection) -> None:
            await _check(connection, principal.organization_id, options)

        if (replayed := await early(parts.database, write, check)) is not None:
            return replayed
    planned = await staging.stage(
        parts, principal.organization_id, run_ids, options.sensitive_input_values, options.file_inputs
    )

    async def switch(connection: Connection) -> Reply:
        await _check(connection, principal.organization_id, options)
        await connection.execute(
            INSERT,
            principal.organization_id,
            options.workflow_id,
            principal.user_id,
            bool(options.is_priority),
            options.machine_id,
            options.pool_ids,
            input_values,
            session.id,
            session.alias,
            session.release_after,
            *lane(session.id, options.machine_id, options.pool_ids, bool(options.is_priority)),
            run_ids,
            [json_text(one.aliases) for one in planned],
            [one.secret_path for one in planned],
        )
        await staging.adopt(connection, dict(zip(run_ids, planned, strict=True)), principal)
        rows = await connection.fetch(CREATED, run_ids)
        return Reply(201, views.encode(show([views.run(row) for row in rows])))

    reply = await once(parts.database, write, switch)
    parts.background.wake(principal.organization_id)
    return reply


async def _check(connection: Connection, organization_id: str, options: RunCreate | RunBulkCreate) -> None:
    if not await connection.fetchval(KNOWN_WORKFLOW, options.workflow_id, organization_id):
        raise WorkflowNotFound
    await check_targets(connection, organization_id, options)


# --- report -----------------------------------------------------------------------------------------------------------

LOCK = "SELECT status, attempt, session_id FROM runs WHERE id = $1 AND organization_id = $2 FOR NO KEY UPDATE"

OUTPUTS_OF = f"""
SELECT count(*) FROM run_attachments a
WHERE a.run_id = $1 AND a.attachment_type = 'output' AND a.id = ANY($2::uuid[]) AND {views.VISIBLE}
"""

# Only a retry reopens a terminal run.
TRANSITIONS = {
    RunStatus.SCHEDULING: {RunStatus.RUNNING, RunStatus.ERROR, RunStatus.CANCELLED},
    RunStatus.RUNNING: TERMINAL,
}

# What an attempt produces: a run that waits for its attempt has none of it.
PRODUCED = ("error", "output_data", "run_message_history", "output_attachment_ids", "started_at", "ended_at")


# What the report does not name stays as it is.
SAVE_OUTPUTS = """
INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history) VALUES ($1, $2, $3::json, $4::json)
ON CONFLICT (run_id, attempt) DO UPDATE SET
    output_data = CASE WHEN $5 THEN excluded.output_data ELSE run_outputs.output_data END,
    run_message_history = CASE WHEN $6 THEN excluded.run_message_history ELSE run_outputs.run_message_history END
"""


async def report(parts: Parts, write: Write, run_id: UUID, options: RunUpdate) -> Reply:
    """An executor's PATCH, decided under the row lock. Raises every refusal of the route."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        run = await connection.fetchrow(LOCK, run_id, organization_id)
        if run is None:
            raise RunNotFound
        if options.attempt is not None and options.attempt != run["attempt"]:
            raise AttemptSuperseded(run["attempt"])
        current = RunStatus(run["status"])
        status = options.status or current
        _refuse_transition(current, status, options)
        if options.output_attachment_ids:
            wanted = set(options.output_attachment_ids)
            if await connection.fetchval(OUTPUTS_OF, run_id, list(wanted)) != len(wanted):
                raise Invalid(
                    (
                        ("body", "output_attachment_ids"),
                        "Must be ids of output attachments of this run; upload them with POST /v1/run-attachments first.",
                        "output_attachment_ids",
                    )
                )
        await connection.execute(*_update(run_id, current, status, options))
        named = [name in options.model_fields_set for name in ("output_data", "run_message_history")]
        if any(named):
            outputs = (json_text(options.output_data), json_text(options.run_message_history))
            await connection.execute(SAVE_OUTPUTS, run_id, run["attempt"], *outputs, *named)
        if status in TERMINAL and current not in TERMINAL:
            await _ended(connection, [run_id], parts.settings)
        elif status in TERMINAL and options.release_session_after:
            await connection.execute(RELEASE, [run_id])
        row = await connection.fetchrow(views.GET_RUN, run_id, organization_id)
        if row is None:  # the row is locked
            raise RunNotFound
        return Reply(200, views.encode(views.run(row)))

    reply = await once(parts.database, write, work)
    parts.background.wake(organization_id)
    return reply


def _refuse_transition(current: RunStatus, status: RunStatus, options: RunUpdate) -> None:
    if status != current and status not in TRANSITIONS.get(current, ()):
        hint = "Only POST /v1/runs/{run_id}/retry reopens it." if current in TERMINAL else "Report `running` first."
        raise InvalidTransition(f"A run that is {current} cannot become {status}. {hint}")
    if status is RunStatus.SCHEDULING and any(getattr(options, name) is not None for name in PRODUCED):
        raise InvalidTransition(
            "A scheduling run accepts no outputs, times, errors or history; report `running` first."
        )


def _update(run_id: UUID, current: RunStatus, status: RunStatus, options: RunUpdate) -> tuple[Any, ...]:
    """The UPDATE of exactly those columns of the run that the report names, as arguments for `execute`."""
    given = options.model_fields_set
    values: dict[str, Any] = {"status": status.value}
    if "input_values" in given:
        values["input_values"] = json_text(options.input_values)
    for name in ("error", "release_session_after"):
        if name in given:
            values[name] = getattr(options, name)
    for name in ("started_at", "ended_at"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    now = func.clock_timestamp()  # the database's: silence is measured by it, and servers' clocks differ
    if status is RunStatus.RUNNING:
        values["reported_at"] = now
        if current is not status:
            values.setdefault("started_at", now)
    if status in TERMINAL and current is not status:
        values.setdefault("ended_at", func.coalesce(Run.ended_at, now))
    statement, arguments = sql(update(Run).where(Run.id == run_id).values(**values))
    return statement, *arguments


# --- end --------------------------------------------------------------------------------------------------------------

END = """
UPDATE runs SET status = $2, error = $3, ended_at = now()
WHERE id = ANY($1::uuid[]) AND status IN ('scheduling', 'running') RETURNING id
"""

# A finished run's secret stays retryable for the retention time. Only at the moment it ends: a second entry for a
# secret that was destroyed since would make it look kept.
RETAIN = """
INSERT INTO deletions (store, name, due_at)
SELECT 'vault', secret_path, now() + make_interval(secs => $2)
FROM runs WHERE id = ANY($1::uuid[]) AND secret_path IS NOT NULL
"""

RELEASE = """
UPDATE machines SET reserved_session_id = NULL FROM runs
WHERE runs.id = ANY($1::uuid[]) AND runs.release_session_after
  AND machines.reserved_session_id = runs.session_id AND machines.organization_id = runs.organization_id
"""


async def _ended(connection: Connection, run_ids: Sequence[UUID], settings: Settings) -> None:
    """What follows in the same transaction when runs become terminal. Their machines are free by their status alone."""
    await connection.execute(RETAIN, run_ids, float(settings.secret_retention_seconds))
    await connection.execute(RELEASE, run_ids)


async def end_runs(
    connection: Connection, run_ids: Sequence[UUID], status: RunStatus, error: str | None, settings: Settings
) -> None:
    """End those of these locked runs that are active."""
    rows = await connection.fetch(END, run_ids, status.value, None if error is None else [error])
    await _ended(connection, [row["id"] for row in rows], settings)


SILENT = """
SELECT id, organization_id FROM runs
WHERE status = 'running' AND reported_at <= now() - make_interval(secs => $1)
ORDER BY reported_at LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED
"""


async def end_silent_runs(database: Database, settings: Settings) -> set[str]:
    """End running runs whose executor has been silent for too long; returns their organizations."""
    silence = settings.run_silence_seconds
    if silence == 0:
        return set()
    async with database.transaction() as connection:
        rows = await connection.fetch(SILENT, float(silence))
        if rows:
            sentence = (
                f"The executor sent no report for {silence} seconds, so the run was ended. Retry it when one is back."
            )
            await end_runs(connection, [row["id"] for row in rows], RunStatus.ERROR, sentence, settings)
    return {row["organization_id"] for row in rows}


# --- delete -----------------------------------------------------------------------------------------------------------

LOCK_FOR_DELETE = "SELECT 1 FROM runs WHERE id = $1 AND organization_id = $2 FOR UPDATE"

LIST_NAMES = """
WITH attachments AS (
    DELETE FROM run_attachments WHERE run_id = ANY($1::uuid[]) RETURNING storage_path
)
SELECT 'storage', storage_path FROM attachments WHERE storage_path IS NOT NULL
UNION ALL
SELECT 'vault', secret_path FROM runs WHERE id = ANY($1::uuid[]) AND secret_path IS NOT NULL
"""

RELEASE_ACTIVE = f"{RELEASE} AND runs.status IN ('scheduling', 'running')"


async def remove_runs(connection: Connection, run_ids: Sequence[UUID]) -> None:
    """Remove locked runs, listing everything they name. The only way a run's row goes."""
    names = [Name(*row.values()) for row in await connection.fetch(LIST_NAMES, run_ids)]
    await deletions.due(connection, names)
    await connection.execute(RELEASE_ACTIVE, run_ids)
    await connection.execute("DELETE FROM runs WHERE id = ANY($1::uuid[])", run_ids)


async def delete(parts: Parts, write: Write, run_id: UUID) -> Reply:
    """Remove a run in any status. Raises RunNotFound."""

    async def work(connection: Connection) -> Reply:
        if not await connection.fetchval(LOCK_FOR_DELETE, run_id, write.principal.organization_id):
            raise RunNotFound
        await remove_runs(connection, [run_id])
        return Reply(204, b"")

    reply = await once(parts.database, write, work)
    parts.background.wake(write.principal.organization_id)
    return reply


# --- attachments that expire ------------------------------------------------------------------------------------------

# An active run keeps its inputs: it may be reading them. The run's lock keeps a retry from adopting what is expiring.
EXPIRED = """
SELECT a.id, r.organization_id
FROM run_attachments a JOIN runs r ON r.id = a.run_id
WHERE a.expires_at <= now() + $1 AND a.storage_path IS NOT NULL
  AND (a.attachment_type = 'output' OR r.status NOT IN ('scheduling', 'running'))
ORDER BY a.expires_at LIMIT 200 FOR NO KEY UPDATE OF r SKIP LOCKED
"""

# Read again under the lock: a PUT may have given the file more time since the first look.
STILL_EXPIRED = """
SELECT id, storage_path FROM run_attachments
WHERE id = ANY($1::uuid[]) AND expires_at <= now() + $2 AND storage_path IS NOT NULL
"""


async def expire_attachments(database: Database, *, ahead: timedelta = timedelta(0)) -> set[str]:
    """Collect attachments past their expiry, one batch; returns their organizations.

    An output goes with its row. An input's row stays, without bytes, so that a retry can say that it has expired.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(EXPIRED, ahead)
        if rows:
            expired = await connection.fetch(STILL_EXPIRED, [row["id"] for row in rows], ahead)
            ids = [row["id"] for row in expired]
            await connection.execute(
                "DELETE FROM run_attachments WHERE id = ANY($1::uuid[]) AND attachment_type = 'output'", ids
            )
            await connection.execute("UPDATE run_attachments SET storage_path = NULL WHERE id = ANY($1::uuid[])", ids)
            await deletions.due(connection, [Name("storage", row["storage_path"]) for row in expired])
    return {row["organization_id"] for row in rows}
