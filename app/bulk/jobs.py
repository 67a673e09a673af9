"""Bulk retries as a caller sees them: create, read, list, pause, resume and abort. What a job does is in working.py."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal
from uuid import UUID, uuid4

import orjson

from app.access.auth import Principal
from app.bulk import choosing
from app.errors import BulkRetryEnded, BulkRetryNotFound, Invalid
from app.idempotency import Reply, Resource, WriteRequest, once
from app.limits.quotas import Standing, exceeded, policy
from app.scheduling.held import check_not_before
from app.scheduling.targets import check_targets
from app.schemas.bulk import BulkRetryCreate, BulkRetryOverrides, Outcome
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores import locks
from app.stores.database import Connection, Database, Record
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import json_bytes, statement

# Items that are looked at for one page of jobs: of each retried run it is read what has become of it.
MAX_ITEMS_IN_PAGE = 200_000

# --- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS = {
    "id": "b.id::text",
    "state": "b.state",
    "pause_reason": "b.pause_reason",
    "waiting_for": "b.waiting_for",
    "failure": "b.failure",
    "total": "b.total",
    "pending": "b.total - b.retried - b.skipped",
    "retried": "b.retried",
    "skipped": "b.skipped",
    "created_at": "b.created_at",
    "ended_at": "b.ended_at",
    "key_id": "b.key_id::text",
    "user_id": "b.user_id::text",
    "reason": "b.reason",
    "filter": "b.filter",
    "overrides": "b.overrides",
    "pace_per_second": "b.pace_per_second",
    "first": "b.first",
    "stop_after_failures": "b.stop_after_failures",
}

_OWN = "b.id = :bulk_retry_id AND b.organization_id = :organization_id"

GET = statement("bulk.get", f"SELECT {columns(COLUMNS)} FROM bulk_retries b WHERE {_OWN}")

LISTED = Listing(
    "bulk.jobs",
    "bulk_retries b",
    octets="1200 + octet_length(overrides::text)",
    row="b.id = listed.key",
)
ROWS = statement("bulk.rows", f"SELECT {columns(COLUMNS)} FROM {in_order('bulk_retries b')} ORDER BY page.n")

# The status of the attempt that the retry of item `i` began; null once the run was deleted. Looked up one by one: by a join
# that was planned on short tables all runs would be read.
_RESULT = """
    LEFT JOIN LATERAL (
        SELECT CASE WHEN r.attempt = i.attempt + 1 THEN r.status ELSE (
                   SELECT status FROM run_attempts WHERE run_id = r.id AND attempt = i.attempt + 1 LIMIT 1) END AS status
        FROM runs r WHERE i.outcome = 'retried' AND r.id = i.run_id LIMIT 1
    ) AS result ON true
"""

RESULTS = statement(
    "bulk.results",
    f"""
    SELECT job.id::text, counted.* FROM unnest(:ids::uuid[]) AS job (id), LATERAL (
        SELECT count(*) FILTER (WHERE result.status = 'success') AS succeeded,
               count(*) FILTER (WHERE result.status = 'cancelled') AS cancelled,
               count(*) FILTER (WHERE result.status NOT IN ('scheduling', 'running', 'success', 'cancelled')) AS failed,
               count(*) FILTER (WHERE result.status IS NULL) AS gone
        FROM bulk_retry_items i {_RESULT}
        WHERE i.bulk_retry_id = job.id AND i.outcome = 'retried'
    ) AS counted
    """,
)


async def results(connection: Connection, job_ids: Sequence[str | UUID]) -> dict[str, Record]:
    """How the retried runs of these jobs have ended, of each job by its id: succeeded, failed, cancelled; gone: deleted."""
    return {row["id"]: row for row in await connection.fetch(RESULTS, ids=job_ids)}


async def _shown(connection: Connection, rows: Sequence[Record]) -> list[dict[str, Any]]:
    ended = await results(connection, [row["id"] for row in rows])
    return [_job(row, ended[row["id"]]) for row in rows]


def _job(row: Record, ended: Record) -> dict[str, Any]:
    shown = {name: value for name, value in row.items() if name not in ("key_id", "user_id")}
    shown |= {name: None if row[name] is None else orjson.Fragment(row[name]) for name in ("filter", "overrides")}
    shown |= {name: ended[name] for name in ("succeeded", "failed", "cancelled")}
    return shown | {"by": {"key_id": row["key_id"], "user_id": row["user_id"]}}


async def get(connection: Connection, organization_id: str, job_id: UUID) -> dict[str, Any]:
    """Read one job. Raises BulkRetryNotFound."""
    row = await connection.fetchrow(GET, bulk_retry_id=job_id, organization_id=organization_id)
    if row is None:
        raise BulkRetryNotFound
    [shown] = await _shown(connection, [row])
    return shown


async def list_jobs(database: Database, organization_id: str, part: Slice) -> dict[str, object]:
    """One page of jobs, newest first. Raises Invalid as paging.page does, and for jobs with too many items together."""
    condition, values = where("b", organization_id=organization_id)

    async def read(connection: Connection, ids: list[UUID]) -> list[dict[str, Any]]:
        rows = await connection.fetch(ROWS, ids=ids)
        items = 0
        for place, row in enumerate(rows):
            items += row["total"]
            if place and items > MAX_ITEMS_IN_PAGE:
                sentence = f"These bulk retries have more than {MAX_ITEMS_IN_PAGE} runs; limit={place} fits."
                raise Invalid((("query", "limit"), sentence, "page_too_large"))
        return await _shown(connection, rows)

    found = await page(database, LISTED, (condition,), part, values, read)
    return part.shown(found.rows, found)


ITEMS = Listing(
    "bulk.items",
    "bulk_retry_items i",
    octets="500",
    row="i.bulk_retry_id = :bulk_retry_id AND i.place = listed.key",
    order=("place",),
    ascending=True,
)
ITEM_ROWS = statement(
    "bulk.item_rows",
    f"""
    SELECT i.run_id::text, i.attempt, i.outcome, i.code, i.detail, i.decided_at, result.status AS result
    FROM unnest(:places::integer[]) WITH ORDINALITY AS page (place, n) CROSS JOIN LATERAL (
        SELECT * FROM bulk_retry_items WHERE bulk_retry_id = :bulk_retry_id AND place = page.place LIMIT 1
    ) AS i {_RESULT}
    ORDER BY page.n
    """,
)
KNOWN = statement("bulk.known", f"SELECT b.state FROM bulk_retries b WHERE {_OWN}")


async def list_items(
    database: Database, organization_id: str, job_id: UUID, outcome: Outcome | None, part: Slice
) -> dict[str, object]:
    """One page of a job's runs, in the order of the job. Raises BulkRetryNotFound, and Invalid as paging.page does."""
    async with database.connection() as connection:
        await _check_known(connection, organization_id, job_id)
    condition, values = where("i", bulk_retry_id=job_id, outcome=outcome)

    async def read(connection: Connection, places: list[int]) -> list[Record]:
        return await connection.fetch(ITEM_ROWS, bulk_retry_id=job_id, places=places)

    found = await page(database, ITEMS, (condition,), part, values, read)
    return part.shown([dict(row.items()) for row in found.rows], found)


async def _check_known(connection: Connection, organization_id: str, job_id: UUID) -> None:
    if await connection.fetchval(KNOWN, bulk_retry_id=job_id, organization_id=organization_id) is None:
        raise BulkRetryNotFound


# --- what a write replays ---------------------------------------------------------------------------------------------


async def _show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get(connection, principal.organization_id, ids[0]))


async def _left(connection: Connection, principal: Principal, ids: Sequence[UUID], body: bytes) -> bytes:
    await _check_known(connection, principal.organization_id, ids[0])
    return body


JOB = Resource(_show, _left)

# --- create -----------------------------------------------------------------------------------------------------------

ALONE = statement("bulk.alone", f"SELECT {locks.wait_for(locks.BULK_RETRY)}")

UNDER_WAY = statement(
    "bulk.under_way",
    """
    SELECT count(*) FROM (
        SELECT FROM bulk_retries WHERE organization_id = :organization_id AND state IN ('running', 'paused')
        LIMIT :limit::bigint
    ) AS under_way
    """,
)


async def create(services: Services, write: WriteRequest, options: BulkRetryCreate) -> Reply:
    """Choose the runs, and store the job that retries them. Raises Invalid, QuotaExceeded, MachineNotFound, PoolNotFound."""
    principal = write.principal
    overrides = options.overrides or BulkRetryOverrides()

    async def work(connection: Connection) -> Reply:
        await connection.execute(ALONE, organization_id=principal.organization_id)
        await _check_quota(connection, services, principal)
        await check_targets(connection, principal.organization_id, changes(overrides))
        await check_not_before(connection, overrides.not_before, ("body", "overrides", "not_before"))
        job_id = uuid4()
        chosen = await choosing.choice(connection, principal.organization_id, options)
        stored = await choosing.store(
            connection,
            chosen,
            id=job_id,
            **write.actor(options.reason).parameters(),
            traceparent=write.traceparent,
            filter=None if chosen.filter is None else encode(chosen.filter),
            overrides=json_bytes(overrides.model_dump(mode="json", exclude_none=True)),
            pace_per_second=options.pace_per_second,
            first=options.first or 0,
            stop_after_failures=options.stop_after_failures or 0,
        )
        if not stored:
            raise await choosing.too_many(services.database, chosen)
        connection.after_commit(services.wakeups.bulk_retry)
        return Reply(202, await _show(connection, principal, [job_id]), [job_id])

    return await once(services, write, work, JOB)


def changes(overrides: BulkRetryOverrides, reason: str | None = None) -> RunRetry:
    """The options of the retry of each run."""
    given = {name: value for name, value in overrides if value is not None}
    return RunRetry.model_construct(_fields_set={*given}, **(given | {"reason": reason}))


async def _check_quota(connection: Connection, services: Services, principal: Principal) -> None:
    most = policy("organization-bulk-retries", services.settings.quota_organization_bulk_retries, "bulk retries")
    if most is None:
        return
    used = await connection.fetchval(UNDER_WAY, organization_id=principal.organization_id, limit=most.quota)
    if used >= most.quota:
        raise exceeded(Standing(most, 0))


# --- pause, resume, abort ---------------------------------------------------------------------------------------------

# Each waits until the set under way is committed: what it says is true when it is answered.
LOCK_JOB = statement(
    "bulk.lock",
    f"SELECT b.state, b.pause_reason, b.stop_after_failures FROM bulk_retries b WHERE {_OWN} FOR NO KEY UPDATE",
)

PAUSE = statement(
    "bulk.pause",
    "UPDATE bulk_retries SET state = 'paused', pause_reason = 'requested', waiting_for = NULL WHERE id = :bulk_retry_id",
)

# What had paused it is over: it would pause again at once.
RESUME = statement(
    "bulk.resume",
    """
    UPDATE bulk_retries
    SET state = 'running', pause_reason = NULL, due_at = now(),
        failures_forgiven = CASE pause_reason WHEN 'stop_after_failures' THEN :failed::integer ELSE failures_forgiven END,
        is_first_over = is_first_over OR pause_reason IS NOT DISTINCT FROM 'first_failed'
    WHERE id = :bulk_retry_id
    """,
)

END = statement(
    "bulk.end",
    """
    WITH left_over AS (
        UPDATE bulk_retry_items SET outcome = 'skipped', code = :code, detail = :detail, decided_at = now()
        WHERE bulk_retry_id = :bulk_retry_id AND outcome = 'pending'
        RETURNING place
    )
    UPDATE bulk_retries
    SET state = :state, failure = :failure, pause_reason = NULL, waiting_for = NULL, ended_at = now(),
        skipped = skipped + (SELECT count(*) FROM left_over)
    WHERE id = :bulk_retry_id
    """,
)

Command = Literal["pause", "resume", "abort"]
_LEADS_TO = {"pause": "paused", "resume": "running", "abort": "aborted"}


async def command(services: Services, write: WriteRequest, job_id: UUID, wanted: Command) -> Reply:
    """Pause, resume or abort a job; what it is already stays. Raises BulkRetryNotFound, BulkRetryEnded."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        row = await connection.fetchrow(LOCK_JOB, bulk_retry_id=job_id, organization_id=organization_id)
        if row is None:
            raise BulkRetryNotFound
        if row["state"] != _LEADS_TO[wanted]:
            if row["state"] not in ("running", "paused"):
                raise BulkRetryEnded(row["state"])
            await _COMMANDS[wanted](connection, job_id)
            connection.after_commit(services.wakeups.bulk_retry)
        return Reply(200, await _show(connection, write.principal, [job_id]), [job_id])

    return await once(services, write, work, JOB)


async def _pause(connection: Connection, job_id: UUID) -> None:
    await connection.execute(PAUSE, bulk_retry_id=job_id)


async def _resume(connection: Connection, job_id: UUID) -> None:
    ended = await results(connection, [job_id])
    await connection.execute(RESUME, bulk_retry_id=job_id, failed=ended[str(job_id)]["failed"])


async def _abort(connection: Connection, job_id: UUID) -> None:
    await end(
        connection, job_id, "aborted", code="aborted", detail="The bulk retry was aborted before this run's turn."
    )


async def end(
    connection: Connection,
    job_id: UUID,
    state: Literal["aborted", "failed"],
    *,
    code: str,
    detail: str,
    failure: str | None = None,
) -> None:
    """End a job that this transaction has locked: what was not retried is skipped."""
    await connection.execute(END, bulk_retry_id=job_id, state=state, failure=failure, code=code, detail=detail)


_COMMANDS: dict[Command, Callable[[Connection, UUID], Awaitable[None]]] = {
    "pause": _pause,
    "resume": _resume,
    "abort": _abort,
}
