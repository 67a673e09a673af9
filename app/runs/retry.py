"""Retry a finished run in place: check -> stage -> switch -> settle.

check    plain reads, only to refuse early, before anything is written outside (skipped without secrets and files)
stage    new secrets and files are written under fresh names that are on the deletion list first (staging.py)
switch   one transaction: lock the run, decide every rule on what the lock shows, archive, clear, requeue; then commit.
         A retry without secrets, input files and targets decides on a plain read, and its one statement takes effect only
         if the run's row is still the one that was read
settle   after the commit the background task deletes what was replaced and looks for a machine (background.py)

A process killed anywhere leaves the run wholly before or wholly after: the switch is the only step that changes it.
"""

from uuid import UUID

import orjson

from app.errors import InputAttachmentsExpired, RunNotFound, RunNotTerminal, SensitiveInputsExpired
from app.idempotency import STORE, Reply, WriteRequest, attempt_or_replay, check_or_replay
from app.models import TERMINAL
from app.runs import projection, staging
from app.runs.sessions import next_session, refuse_contradictions
from app.runs.staging import Staged
from app.scheduling.targets import check_targets, lane
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Database, Record, committing
from app.stores.deletions import Name
from app.stores.statements import json_text

# --- the rules --------------------------------------------------------------------------------------------------------


def next_pin(run: Record, options: RunRetry) -> UUID | None:
    """The pinned machine of the next attempt; an assignment is always dropped, a pin only by pool_ids."""
    if options.machine_id is not None:
        return options.machine_id
    pinned: UUID | None = run["pinned_machine_id"]
    return pinned if options.pool_ids is None else None


def overridden(options: RunRetry) -> list[str]:
    """Names of the fields that change something, for the archive; never values."""
    changed = {name for name in options.model_fields_set if getattr(options, name) is not None}
    if options.reuse_session is not False:
        changed.discard("reuse_session")
    if not options.start_session:
        changed.discard("start_session")
    return sorted(changed)


def refuse(run: Record | None, options: RunRetry) -> Record:
    """The refusals that need nothing but the run. Used on a plain read by check, and on the locked row by switch."""
    if run is None:
        raise RunNotFound
    if run["status"] not in TERMINAL:
        raise RunNotTerminal(run["status"])
    next_session(run, options)
    if options.sensitive_input_values is None and run["secret_path"] is not None and not run["secret_is_kept"]:
        raise _expired(run)
    if options.file_inputs is None and run["input_is_expired"]:
        raise InputAttachmentsExpired
    return run


def _expired(run: Record) -> SensitiveInputsExpired:
    return SensitiveInputsExpired(sorted(orjson.loads(run["sensitive_input_aliases"])))


# --- the statements ---------------------------------------------------------------------------------------------------

# What the rules need to know of a run. Outputs and history are not read: a megabyte is never loaded to be cleared.
# `version` changes with every UPDATE of the row.
READ = """
SELECT r.xmin::text AS version, r.status, r.pinned_machine_id, r.pool_ids, r.is_priority,
       r.session_id, r.session_alias, r.release_session_after,
       r.secret_path, CASE WHEN r.secret_path IS NOT NULL THEN r.sensitive_input_aliases END AS sensitive_input_aliases,
       r.secret_path IS NOT NULL AND EXISTS (
           SELECT FROM deletions d
           WHERE d.store = 'vault' AND d.name = r.secret_path AND d.condemned_at IS NULL AND d.due_at > clock_timestamp()
       ) AS secret_is_kept,
       inputs.count AS input_count, coalesce(inputs.expires_first <= clock_timestamp(), false) AS input_is_expired
FROM runs r, LATERAL (
    SELECT count(*), min(a.expires_at) AS expires_first FROM run_attachments a
    WHERE a.run_id = r.id AND a.attachment_type = 'input'
) AS inputs
WHERE r.id = $1 AND r.organization_id = $2
"""

# A statement of its own: one that had to wait for a lock sees all other tables as they were when it began to wait.
LOCK = "SELECT FROM runs WHERE id = $1 AND organization_id = $2 FOR NO KEY UPDATE"

# A statement still sees what it removes, and not yet what takes its place.
AFTER = {
    "output_data": "NULL",
    "run_message_history": "NULL",
    "output_attachment_ids": "'[]'::json",
    "input_attachment_ids": f"coalesce($19::text[], {projection.RUN_COLUMNS['input_attachment_ids']})",
}

# All that a retry always does, in one round trip, if the run is still in the version that the rules saw: archive the
# attempt, list and remove the attachments that go, leave the outputs behind (a run has those of its own attempt number),
# clear and requeue the run, make the reply and store it under the key.
# A null override keeps what the run has. The reply is made here because it must be stored by the same statement.
SWITCH = f"""
WITH seen AS MATERIALIZED (
    SELECT id, attempt, status, error, assigned_machine_id, session_id, started_at, ended_at
    FROM runs WHERE id = $1 AND organization_id = $2 AND xmin::text = $3 FOR NO KEY UPDATE
), archived AS (
    INSERT INTO run_attempts (run_id, attempt, status, error, machine_id, session_id, started_at, ended_at,
                              retried_by_key_id, retried_by_user_id, overridden)
    SELECT id, attempt, status, error, assigned_machine_id, session_id, started_at, ended_at, $4, $5, $6 FROM seen
), removed AS (
    DELETE FROM run_attachments a USING seen
    WHERE a.run_id = seen.id AND (a.attachment_type = 'output' OR $7) RETURNING a.storage_path
), listed AS (
    INSERT INTO deletions (store, name, due_at)
    SELECT 'storage', storage_path, now() FROM removed WHERE storage_path IS NOT NULL
), superseded AS (
    UPDATE run_outputs SET is_superseded = true
    FROM seen WHERE run_outputs.run_id = seen.id AND run_outputs.attempt = seen.attempt
), r AS (
    UPDATE runs
    SET status = 'scheduling', attempt = runs.attempt + 1, queued_at = clock_timestamp(), lane = $8, queue_rank = $9,
        error = NULL, started_at = NULL, ended_at = NULL, reported_at = NULL,
        assigned_machine_id = NULL, pinned_machine_id = $10,
        pool_ids = coalesce($11, pool_ids), is_priority = $12,
        session_id = $13, session_alias = $14, release_session_after = $15,
        input_values = coalesce($16::json, input_values),
        sensitive_input_aliases = coalesce($17::json, sensitive_input_aliases),
        secret_path = CASE WHEN $17::json IS NULL THEN secret_path ELSE $18 END
    FROM seen WHERE runs.id = seen.id
    RETURNING runs.*
), shown AS MATERIALIZED (
    SELECT {projection.document(AFTER)} AS body FROM r {projection.RUN_SOURCE}
), stored AS (
    {STORE} SELECT $2, $20::text, $21, 200, body, now() + make_interval(secs => $22) FROM shown WHERE $20 IS NOT NULL
)
SELECT body FROM shown
"""

# --- the steps --------------------------------------------------------------------------------------------------------


async def retry(services: Services, write: WriteRequest, run_id: UUID, options: RunRetry) -> Reply:
    """Reset a finished run and requeue it. Raises every refusal of the route; then nothing has changed."""
    refuse_contradictions(options.session_id, options.start_session)
    staged = Staged(aliases=None if options.sensitive_input_values is None else {})
    if options.sensitive_input_values or options.file_inputs:
        staging.check_sizes(services, options.sensitive_input_values, options.file_inputs)
        organization_id = write.principal.organization_id

        async def check(connection: Connection) -> None:
            await _check(connection, organization_id, run_id, options)

        if (replayed := await check_or_replay(services, write, check)) is not None:
            return replayed
        [staged] = await staging.stage(
            services, organization_id, [run_id], options.sensitive_input_values, options.file_inputs
        )

    async def switch() -> Reply:
        reply = await _switch_plain(services.database, write, run_id, options)
        return reply or await _switch(services.database, write, run_id, options, staged)

    return await attempt_or_replay(services, write, switch)


async def _check(connection: Connection, organization_id: str, run_id: UUID, options: RunRetry) -> None:
    """Refuse before anything is staged. Nothing that is decided here is relied on later."""
    refuse(await connection.fetchrow(READ, run_id, organization_id), options)
    await check_targets(connection, organization_id, options)


async def _switch_plain(database: Database, write: WriteRequest, run_id: UUID, options: RunRetry) -> Reply | None:
    """The switch without a transaction of several statements, for a retry that involves no secret, input file or target.

    The rules decide on a plain read, and the one statement that writes takes effect only if the row has not changed since.
    None if it has, or if the retry needs more: then nothing has happened.
    """
    beyond_the_row = (options.sensitive_input_values, options.file_inputs, options.machine_id, options.session_id)
    if options.pool_ids or any(given is not None for given in beyond_the_row):
        return None
    async with database.connection() as connection:
        run = refuse(await connection.fetchrow(READ, run_id, write.principal.organization_id), options)
        if run["secret_path"] is not None or run["input_count"]:
            return None
        with committing():
            return await _write(connection, write, run_id, run, options, Staged(), input_ids=[])


async def _switch(database: Database, write: WriteRequest, run_id: UUID, options: RunRetry, staged: Staged) -> Reply:
    """Decide every rule on the locked run, and do all that follows from it in the same transaction."""
    organization_id = write.principal.organization_id
    async with database.transaction() as connection:
        await connection.execute(LOCK, run_id, organization_id)
        run = refuse(await connection.fetchrow(READ, run_id, organization_id), options)
        await check_targets(connection, organization_id, options)
        old_secret: str | None = run["secret_path"]
        if old_secret is not None:
            if staged.aliases is not None:
                await deletions.due(connection, [Name("vault", old_secret)])
            elif not await deletions.reclaim(connection, old_secret):
                raise _expired(run)
        new_inputs = None if options.file_inputs is None else [str(file.id) for file in staged.files]
        reply = await _write(connection, write, run_id, run, options, staged, input_ids=new_inputs)
        if reply is None:  # the row is locked
            raise RunNotFound
        await staging.adopt(connection, {run_id: staged}, write.principal)
    return reply


async def _write(
    connection: Connection,
    write: WriteRequest,
    run_id: UUID,
    run: Record,
    options: RunRetry,
    staged: Staged,
    *,
    input_ids: list[str] | None,
) -> Reply | None:
    """SWITCH, with what the rules make of the run as it was read; None if it is no longer what was read.

    `input_ids` are those of the reply; None means those that the run has.
    """
    session, pinned = next_session(run, options), next_pin(run, options)
    pool_ids = run["pool_ids"] if options.pool_ids is None else options.pool_ids
    is_priority = run["is_priority"] if options.is_priority is None else options.is_priority
    body = await connection.fetchval(
        SWITCH,
        run_id,
        write.principal.organization_id,
        run["version"],
        write.principal.key_id,
        write.principal.user_id,
        overridden(options),
        options.file_inputs is not None,
        *lane(session.id, pinned, pool_ids, is_priority),
        pinned,
        options.pool_ids,
        is_priority,
        session.id,
        session.alias,
        session.release_after,
        json_text(options.input_values),
        json_text(staged.aliases),
        staged.secret_path,
        input_ids,
        write.key,
        None if write.key is None else write.fingerprints[0],
        write.ttl_seconds,
    )
    return None if body is None else Reply(200, body)
