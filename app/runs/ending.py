"""Ending and deleting runs. Whatever makes a run terminal goes through `end_runs` or `ended`, and whatever removes its row
through `remove_runs`: they free the machine, release the session, write the event that webhooks are sent for, and put secrets
and blobs on the deletion list in the same transaction.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal
from uuid import UUID

from sqlalchemy import bindparam, literal_column, select

from app.access.auth import NOBODY, Actor
from app.config import Settings
from app.errors import RunNotFound
from app.events import By, announce, record_events
from app.handoff import dispatches
from app.idempotency import Reply, WriteRequest, once
from app.models import Run, RunStatus
from app.retry_policies import plans
from app.retry_policies.plans import SECRET_SECONDS, Plans
from app.retry_policies.rules import FAILED
from app.runs import projection
from app.scheduling import rules
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Database
from app.stores.deletions import Name
from app.stores.documents import rfc3339
from app.stores.statements import Statement, by_id, rows_of, statement
from app.telemetry import metrics
from app.webhooks import outbox

log = logging.getLogger("app.runs")

# The error_code of each ending that the service makes by itself; docs/executors.md explains them.
EndedBecause = Literal[
    "executor_lost", "not_started", "run_timeout", "executor_gave_up", "machine_deleted", "session_released"
]

# --- end --------------------------------------------------------------------------------------------------------------

END = statement(
    "runs.ending.end",
    f"""
    WITH seen AS (
        SELECT run.* FROM {rows_of("runs", "run_ids")} AS run WHERE {rules.is_active("run")}
    ), ended AS (
        UPDATE runs SET status = :status, error = :error, error_code = :error_code,
                        -- now() may be before its start, for which this has waited; a reported start may be ahead
                        ended_at = greatest(clock_timestamp(), started_at), changed_at = clock_timestamp()
        WHERE ctid = ANY (ARRAY(SELECT tid FROM seen))
        RETURNING id, organization_id, attempt, (SELECT seen.status FROM seen WHERE seen.id = runs.id) AS before
    ), recorded AS (
        {record_events("ended", "'ended'", from_status="before", to_status=":status")}
    )
    SELECT id FROM ended
    """,
)

# A finished run's secret stays retryable for the retention time. Only at the moment it ends: a second entry for a
# secret that was destroyed since would make it look kept.
RETAIN = statement(
    "runs.ending.retain",
    f"""
    INSERT INTO deletions (store, name, due_at)
    SELECT '{deletions.SECRETS}', secret_path, now() + make_interval(secs => :seconds)
    FROM {rows_of("runs", "run_ids")} AS run WHERE secret_path IS NOT NULL
    """,
)

# The same for a run with a planned retry: the secret is kept until the retry and a little longer.
RETAIN_FOR_PLAN = statement(
    "runs.ending.retain_for_plan",
    f"""
    INSERT INTO deletions (store, name, due_at)
    SELECT '{deletions.SECRETS}', secret_path, greatest(now() + make_interval(secs => :seconds),
                                          planned.due_at + interval '{SECRET_SECONDS} s')
    FROM unnest(:run_ids::uuid[], :due_ats::timestamptz[]) AS planned (run_id, due_at), LATERAL (
        SELECT secret_path FROM runs WHERE id = planned.run_id OFFSET 0
    ) AS run
    WHERE secret_path IS NOT NULL
    """,
)


def _release(which: str) -> str:
    return f"""
    WITH released AS MATERIALIZED (
        SELECT session_id, organization_id FROM {rows_of("runs", "run_ids")} AS run
        WHERE release_session_after AND session_id IS NOT NULL AND {which}
    )
    UPDATE machines SET reserved_session_id = NULL
    WHERE reserved_session_id = ANY (ARRAY(SELECT session_id FROM released))
      AND organization_id = (SELECT organization_id FROM released WHERE session_id = reserved_session_id LIMIT 1)
    RETURNING id, organization_id
    """


RELEASE = statement("runs.ending.release", _release("true"))
RELEASE_ACTIVE = statement("runs.ending.release_active", _release(rules.is_active()))


async def release(connection: Connection, run_ids: Sequence[UUID], how: Statement = RELEASE) -> None:
    """Free the machines of these runs' sessions, where they say so."""
    rows = await connection.fetch(how, run_ids=run_ids)

    def tell() -> None:
        for row in rows:
            line = {"event": "session_released", "machine_id": row["id"], "organization_id": row["organization_id"]}
            log.info(line)

    if rows:
        connection.after_commit(tell)


# The keys of a run that may be as long as the body of a request, in the order in which an event leaves them out.
_UNBOUNDED = (
    "run_message_history",
    "output_data",
    "usage_metadata",
    "input_values",
    "main_prompt",
    "model_metadata",
    "error",
    "sensitive_input_aliases",
    "output_attachment_ids",
)
_ENVELOPE = 400  # bytes of the event around the run, more than it ever has
_EVENT_RUNS = 20  # in one statement, so that it reads a bounded amount even if all values were stored compressed


def _unbounded_rows() -> str:
    """VALUES for each of these keys: its turn, its name and its value as JSON.

    A column that is JSON is not converted: a function would read all of it.
    """
    columns = projection.RUN_COLUMNS
    shown = {name: columns[name] if name in projection.RUN_JSON else f"to_json({columns[name]})" for name in _UNBOUNDED}
    return ", ".join(f"({turn}, '{name}', {text})" for turn, (name, text) in enumerate(shown.items()))


# One event for each run, with the run as GET shows it now, if the workflow wants events and the organization has an endpoint. A
# text that is larger than the limit even as it is stored (compressed) is not read. OFFSET 0: computed once for each run.
RECORD = outbox.insert_events(
    "runs.record_ended",
    f"""
    SELECT event.id, r.organization_id, event.run_id, r.attempt, 'run_complete', event.at,
           convert_to(concat(
               '{{"event_id":"', event.id, '","event_type":"run_complete","occurred_at":"', {rfc3339("event.at")},
               '",', '"truncated":' || long.left_out::text || ',', '"run":', short.shown, ',', long.shown, '}}}}'), 'UTF8')
    FROM unnest(CAST(:run_ids AS uuid[])) AS ended (run_id)
    CROSS JOIN LATERAL (SELECT * FROM runs WHERE runs.id = ended.run_id LIMIT 1) AS r
    CROSS JOIN LATERAL (SELECT FROM workflows WHERE workflows.id = r.workflow_id AND is_webhooks_enabled LIMIT 1) AS wanted
    CROSS JOIN LATERAL (
        SELECT FROM webhook_endpoints e WHERE e.organization_id = r.organization_id LIMIT 1
    ) AS listening
    {projection.RUN_SOURCE} {projection.outputs_source()}
    CROSS JOIN LATERAL (SELECT r.id AS run_id, gen_random_uuid() AS id, clock_timestamp() AS at OFFSET 0) AS event
    CROSS JOIN LATERAL (
        SELECT left({projection.json_object({"scheduling_reason": "NULL"}, without=_UNBOUNDED)}::text, -1) AS shown OFFSET 0
    ) AS short
    CROSS JOIN LATERAL (
        SELECT string_agg(
                   concat(to_json(key), ':', CASE WHEN fits THEN value END, CASE WHEN NOT fits THEN 'null' END), ',') AS shown,
               json_agg(key ORDER BY turn) FILTER (WHERE NOT fits) AS left_out
        FROM (
            SELECT turn, key, value, coalesce(value = 'null', false) OR octet_length(short.shown) + {_ENVELOPE}
                + sum(octets + octet_length(key) + 4) OVER (ORDER BY turn DESC) <= :max_bytes AS fits
            FROM (
                SELECT turn, key, value, coalesce(octet_length(value), :max_bytes) AS octets
                FROM (
                    SELECT turn, key, CASE WHEN json IS NULL THEN 'null' WHEN pg_column_size(json) <= :max_bytes THEN json::text
                        END AS value
                    FROM (VALUES {_unbounded_rows()}) AS column_of_run (turn, key, json) OFFSET 0
                ) AS read
            ) AS measured
        ) AS decided
    ) AS long
    """,
)


# What the end of a locked run `r` involves. Most runs have none of these and need none of the statements for them.
LEAVES = """
    secret_path IS NOT NULL AS has_secrets, session_id IS NOT NULL AS has_session,
    (SELECT ARRAY[is_webhooks_enabled, retry_policy IS NOT NULL] FROM workflows
     WHERE workflows.id = r.workflow_id) AS is_watched_and_has_policy
"""


async def ended(
    connection: Connection,
    run_ids: Sequence[UUID],
    status: RunStatus,
    settings: Settings,
    *,
    has_secrets: bool = True,
    has_session: bool = True,
    is_watched: bool = True,
    has_policy: bool = True,
) -> bool:
    """What follows in the same transaction when runs become terminal, all in one status. Their machines are free by that alone.

    The flags are those of LEAVES, of one run. Returns whether there is now an event to send.
    """
    planned = Plans()
    if has_policy and status in FAILED:
        planned = await plans.make(connection, run_ids, settings)
    if has_secrets:
        seconds = float(settings.secret_retention_seconds)
        if planned.due:
            due_ats = [*planned.due.values()]
            await connection.execute(RETAIN_FOR_PLAN, run_ids=[*planned.due], due_ats=due_ats, seconds=seconds)
        others = [run_id for run_id in run_ids if run_id not in planned.due]
        if others:
            await connection.execute(RETAIN, run_ids=others, seconds=seconds)
    if has_session:
        await release(connection, run_ids)
    if not is_watched:
        return False
    return await _record_ended(connection, [one for one in run_ids if one not in planned.silent], settings)


async def _record_ended(connection: Connection, run_ids: Sequence[UUID], settings: Settings) -> bool:
    """Write the events of these endings; whether there is one to send."""
    recorded = False
    for start in range(0, len(run_ids), _EVENT_RUNS):
        some = run_ids[start : start + _EVENT_RUNS]
        done = await connection.execute(RECORD, run_ids=some, max_bytes=settings.webhook_max_bytes)
        recorded |= done != "INSERT 0 0"
    return recorded


async def drop_plans(
    connection: Connection, codes: Mapping[UUID, str], attempts: Sequence[int], settings: Settings, actor: Actor
) -> bool:
    """Drop the planned retries of locked runs that are at these attempts. Then these were their endings: whether there is an
    event to send."""
    return await _record_ended(connection, await plans.drop(connection, codes, attempts, actor), settings)


async def end_runs(
    connection: Connection,
    run_ids: Sequence[UUID],
    status: RunStatus,
    error: str | None,
    settings: Settings,
    actor: Actor,
    by: By,
    *,
    error_code: EndedBecause | None,
    called_off: bool = True,
) -> None:
    """End those of these locked runs that are active. `called_off`: their executors are to be told."""
    if settings.hands_over and called_off:
        await dispatches.cancel(connection, run_ids)
    rows = await connection.fetch(
        END,
        run_ids=run_ids,
        status=status.value,
        error=None if error is None else [error],
        error_code=error_code,
        **actor.parameters(),
    )
    await ended(connection, [row["id"] for row in rows], status, settings)
    announce(connection, status.value, by, [row["id"] for row in rows])


SILENT = statement(
    "runs.ending.silent",
    """
    SELECT id, organization_id FROM runs
    WHERE status = 'running' AND reported_at <= now() - make_interval(secs => :seconds)
    ORDER BY reported_at LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED
    """,
)


async def end_silent_runs(database: Database, settings: Settings) -> set[str]:
    """End running runs if their executors have been silent for too long; returns the organizations."""
    silence = settings.run_silence_seconds
    if silence == 0:
        return set()
    async with database.transaction() as connection:
        rows = await connection.fetch(SILENT, seconds=float(silence))
        if rows:
            sentence = (
                f"The executor sent no report for {silence} seconds, so the run was ended. Retry it when one is back."
            )
            ids = [row["id"] for row in rows]
            await end_runs(
                connection, ids, RunStatus.ERROR, sentence, settings, NOBODY, "silence", error_code="executor_lost"
            )
    return {row["organization_id"] for row in rows}


# --- secrets that expire ----------------------------------------------------------------------------------------------

# A secret that a run still names when it is destroyed was kept for the retention time, and has expired.
EXPIRED = statement(
    "runs.ending.secrets_expired",
    f"""
    WITH expired AS (
        SELECT run.* FROM unnest(:run_ids::uuid[], :paths::text[]) AS destroyed (run_id, path), LATERAL (
            SELECT id, organization_id, attempt, status, secret_path FROM runs WHERE id = destroyed.run_id OFFSET 0
        ) AS run
        WHERE run.secret_path = destroyed.path
    )
    {record_events("expired", "'secrets_expired'", from_status="status", to_status="status")}
    """,
)


async def note_expired_secrets(connection: Connection, names: Sequence[Name]) -> None:
    """Write an event for each run that has its secret among the names that the collector is about to destroy."""
    # <prefix>/<organization>/<run>/<uuid>. A signing secret's path has four parts too: its endpoint's id matches no run.
    paths = {name.name: name.name.split("/") for name in names if name.store == deletions.SECRETS}
    of_runs = [(parts[2], path) for path, parts in paths.items() if len(parts) == 4]
    if of_runs:
        run_ids = [run_id for run_id, _ in of_runs]
        await connection.execute(EXPIRED, run_ids=run_ids, paths=[path for _, path in of_runs], **NOBODY.parameters())


# --- delete -----------------------------------------------------------------------------------------------------------

LOCK_FOR_DELETE = statement(
    "runs.ending.lock_for_delete",
    select(literal_column("1"))
    .where(Run.id == bindparam("run_id"), Run.organization_id == bindparam("organization_id"))
    .with_for_update(),
)

LIST_NAMES = statement(
    "runs.ending.list_names",
    f"""
    WITH attachments AS (
        DELETE FROM run_attachments WHERE run_id = ANY(:run_ids::uuid[]) RETURNING storage_path
    )
    SELECT '{deletions.FILES}', storage_path FROM attachments WHERE storage_path IS NOT NULL
    UNION ALL
    SELECT '{deletions.SECRETS}', secret_path FROM {rows_of("runs", "run_ids")} AS run WHERE secret_path IS NOT NULL
    """,
)

DELETE = statement(
    "runs.ending.delete",
    f"""
    WITH deleted AS (
        DELETE FROM runs WHERE {by_id("runs", "run_ids")} RETURNING id, organization_id, attempt, status
    )
    {record_events("deleted", "'deleted'", from_status="status")}
    """,
)


async def remove_runs(connection: Connection, run_ids: Sequence[UUID], actor: Actor, *, hands_over: bool) -> None:
    """Remove locked runs, listing everything they name. The only way a run's row goes.

    `hands_over`: executors at Temporal are to be called off. Those that are not hear of it when they report.
    """
    if hands_over:
        await dispatches.cancel(connection, run_ids)
    names = [Name(*row.values()) for row in await connection.fetch(LIST_NAMES, run_ids=run_ids)]
    await deletions.due(connection, names)
    await connection.execute(outbox.FORGET_BODIES, run_ids=run_ids)
    await release(connection, run_ids, RELEASE_ACTIVE)
    await connection.execute(DELETE, run_ids=run_ids, **actor.parameters())
    count, by = len(run_ids), "service" if actor.key_id is None else "caller"
    connection.after_commit(lambda: metrics.transitions.add("deleted", by, count=count))


async def delete(services: Services, write: WriteRequest, run_id: UUID, reason: str | None) -> Reply:
    """Remove a run in any status. Raises RunNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        if not await connection.fetchval(LOCK_FOR_DELETE, run_id=run_id, organization_id=organization_id):
            raise RunNotFound
        await remove_runs(connection, [run_id], write.actor(reason), hands_over=services.settings.hands_over)
        return Reply(204, b"")

    return await once(services, write, work)
