"""The end of runs. All code that makes a run terminal calls `end_runs` or `ended`.

In the same transaction they free the machine, release the session, write the event for webhooks (end_event.py), plan a retry by
the workflow's policy, and put the secret on the deletion list.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal
from uuid import UUID

from app.access.auth import NOBODY, Actor
from app.config import Settings
from app.events import By, announce, record_events
from app.handoff import dispatches
from app.models import RunStatus
from app.retry_policies import plans
from app.retry_policies.plans import SECRET_SECONDS, Plans
from app.retry_policies.rules import FAILED
from app.runs.end_event import write_end_events
from app.scheduling import rules
from app.stores import deletions
from app.stores.database import Connection, Database
from app.stores.deletions import Name
from app.stores.statements import Statement, rows_of, statement

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
    return await write_end_events(connection, [one for one in run_ids if one not in planned.silent], settings)


async def drop_plans(
    connection: Connection, codes: Mapping[UUID, str], attempts: Sequence[int], settings: Settings, actor: Actor
) -> bool:
    """Drop the planned retries of locked runs that are at these attempts. Then these were their endings: whether there is an
    event to send."""
    return await write_end_events(connection, await plans.drop(connection, codes, attempts, actor), settings)


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
