"""The choice of runs of a bulk retry, made once and by one statement, with the attempt of each run at that moment.

The job stores the choice by its statement, and the dry run only reads it.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from app.errors import Invalid, RunNotFound, RunNotTerminal
from app.runs.listing import RunFilter
from app.scheduling import rules
from app.schemas.bulk import MAX_RUNS, BulkRetryCreate
from app.stores.database import Connection, Database, QueryCanceled, Record
from app.stores.paging import Listing, count
from app.stores.statements import Statement, composed, fragment, statement

# The plan of a choice must see its values: one for all of them could read all runs of an organization for a window of a minute.
PLAN_WITH_VALUES = statement("bulk.plan_with_values", "SELECT set_config('plan_cache_mode', 'force_custom_plan', true)")

NOW = statement("bulk.now", "SELECT now()")

# The columns of a choice: place (from 1, in the order of the job), run_id, attempt and, if it is skipped at once, why.
_WITH_CODE = f"""
    SELECT place, run_id, attempt,
           CASE WHEN status IS NULL THEN 'run_not_found'
                WHEN {rules.is_active()} THEN 'run_not_terminal' END AS code,
           CASE WHEN status IS NULL THEN :not_found::text
                WHEN {rules.is_active()} THEN replace(:not_terminal::text, :status_here::text, status)
                END AS detail
"""

_LISTED = f"""
    {_WITH_CODE} FROM (
        SELECT row_number() OVER (ORDER BY listed.n) AS place, listed.id AS run_id, r.attempt, r.status
        FROM (
            SELECT id, min(n) AS n FROM unnest(:run_ids::uuid[]) WITH ORDINALITY AS given (id, n) GROUP BY id
        ) AS listed LEFT JOIN LATERAL (
            SELECT attempt, status FROM runs WHERE id = listed.id AND organization_id = :organization_id OFFSET 0
        ) AS r ON true
    ) AS found
"""

_STATUS_HERE = "{status}"
_SENTENCES = {
    "not_found": RunNotFound.detail,
    "not_terminal": RunNotTerminal(_STATUS_HERE).detail,
    "status_here": _STATUS_HERE,
}


def _matching(branches: tuple[str, ...]) -> str:
    """The oldest end first, by the database's time of the end; one more than a job may have."""
    matching = " UNION ALL ".join(
        f"(SELECT r.id, r.attempt, r.status, r.changed_at AS at FROM runs r WHERE {one})" for one in branches
    )
    return f"""
    {_WITH_CODE} FROM (
        SELECT row_number() OVER (ORDER BY at, id) AS place, id AS run_id, attempt, status FROM ({matching}) AS matching
        ORDER BY at, id LIMIT {MAX_RUNS + 1}
    ) AS found
"""


# --- as a dry run -----------------------------------------------------------------------------------------------------

READ_LISTED = statement("bulk.read_listed", f"{_LISTED} ORDER BY place")


@lru_cache(maxsize=256)
def _read_matching(branches: tuple[str, ...]) -> Statement:
    return composed("bulk.read_matching", fragment(f"{_matching(branches)} ORDER BY place"))


# --- as a job ---------------------------------------------------------------------------------------------------------

# A job of which nothing is left to do has ended.
_STORED = f"""
    WITH chosen AS MATERIALIZED ({{chosen}}),
    counted AS (SELECT count(*) AS total, count(code) AS skipped FROM chosen),
    job AS (
        INSERT INTO bulk_retries (id, organization_id, key_id, user_id, request_id, traceparent, reason, filter, overrides,
                                  pace_per_second, first, stop_after_failures, total, skipped, state, ended_at)
        SELECT :id::uuid, :organization_id, :key_id::uuid, :user_id::uuid, :request_id::text, :traceparent::text, :reason::text,
               :filter::json, :overrides::json, :pace_per_second::float8, :first::integer, :stop_after_failures::integer,
               total, skipped, CASE WHEN total = skipped THEN 'completed' ELSE 'running' END,
               CASE WHEN total = skipped THEN now() END
        FROM counted WHERE total <= {MAX_RUNS}
        RETURNING id
    ), items AS (
        INSERT INTO bulk_retry_items (bulk_retry_id, place, run_id, attempt, outcome, code, detail, decided_at)
        SELECT job.id, place, run_id, attempt, CASE WHEN code IS NULL THEN 'pending' ELSE 'skipped' END, code, detail,
               CASE WHEN code IS NOT NULL THEN now() END
        FROM chosen CROSS JOIN job
    )
    SELECT total FROM counted
"""

STORE_LISTED = statement("bulk.store_listed", _STORED.format(chosen=_LISTED))


@lru_cache(maxsize=256)
def _store_matching(branches: tuple[str, ...]) -> Statement:
    return composed("bulk.store_matching", fragment(_STORED.format(chosen=_matching(branches))))


# --- the choice -------------------------------------------------------------------------------------------------------

_MATCHES = Listing("bulk.matches", "runs r", octets="0", row="r.id = listed.key")


@dataclass(frozen=True, slots=True)
class Choice:
    """The conditions by which runs are chosen. No branches: the runs are listed. `filter` is as replies show it."""

    branches: tuple[str, ...]
    values: Mapping[str, object]
    filter: Mapping[str, object] | None


async def choice(connection: Connection, organization_id: str, options: BulkRetryCreate) -> Choice:
    """The choice that a request makes. Raises Invalid for both or neither of run_ids and filter, and for an empty filter."""
    if (options.run_ids is None) == (options.filter is None):
        raise Invalid((("body",), "Send run_ids or filter, and not both.", "run_ids_or_filter"))
    if options.filter is None:
        return Choice((), {"organization_id": organization_id, "run_ids": options.run_ids}, None)
    given = {name: value for name, value in options.filter if value is not None and name != "status"}
    if not given:
        sentence = "Needs at least one field beside status: without one, all runs of the organization would match."
        raise Invalid((("body", "filter"), sentence, "empty_filter"))
    if any(isinstance(value, timedelta) for value in given.values()):
        now: datetime = await connection.fetchval(NOW)
        given = {name: now - value if isinstance(value, timedelta) else value for name, value in given.items()}
    statuses = tuple(options.filter.status)
    branches, values = _conditions(RunFilter(organization_id, statuses=statuses, **given))
    return Choice(branches, values, {"status": statuses, **given})


def _conditions(wanted: RunFilter) -> tuple[tuple[str, ...], Mapping[str, object]]:
    """Conditions that exclude each other and together mean the filter, each served by one index; and their values."""
    is_narrow = any(one is not None for one in (wanted.workflow_id, wanted.machine_id, wanted.session_id))
    if is_narrow or not wanted.has_window_of_changes:
        return wanted.branches()
    branches, beside, values = wanted.by_change()
    return tuple(f"{branch} AND {beside}" if beside else branch for branch in branches), values


@asynccontextmanager
async def _in_time(connection: Connection) -> AsyncIterator[None]:
    """Raises Invalid for a choice that takes longer than a statement may."""
    await connection.execute(PLAN_WITH_VALUES)
    try:
        yield
    except QueryCanceled:
        sentence = (
            "Finding these runs takes too long; nothing was changed. Name a workflow, a machine or a shorter time."
        )
        raise Invalid((("body", "filter"), sentence, "filter_too_slow")) from None


async def read(connection: Connection, chosen: Choice) -> list[Record] | None:
    """The chosen runs; None if they are more than a job may have."""
    async with _in_time(connection):
        found = await connection.fetch(
            _read_matching(chosen.branches) if chosen.branches else READ_LISTED, **chosen.values, **_SENTENCES
        )
    return found if len(found) <= MAX_RUNS else None


async def store(connection: Connection, chosen: Choice, **job: object) -> bool:
    """Store a job with the chosen runs as its items. Nothing is stored if they are more than a job may have: False."""
    async with _in_time(connection):
        total: int = await connection.fetchval(
            _store_matching(chosen.branches) if chosen.branches else STORE_LISTED, **chosen.values, **_SENTENCES, **job
        )
    return total <= MAX_RUNS


async def too_many(database: Database, chosen: Choice) -> Invalid:
    """The refusal of a filter that matches more runs than a job may have."""
    total = await count(database, _MATCHES, chosen.branches, chosen.values)
    about = "About " if total.is_estimate else ""
    sentence = (
        f"{about}{total.rows} runs match, and a bulk retry can have {MAX_RUNS}; nothing was changed. Narrow the filter."
    )
    return Invalid((("body", "filter"), sentence, "too_many_runs"))
