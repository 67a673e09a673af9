"""What happened to runs, one row for each change, written by the very statement that makes the change.

A row says who, when and from which status to which; names of changed fields, never a value. It has no foreign key: events
outlive their runs. The service may only add and read them; old ones go by age, through a function of the database's owner.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

from app.stores.cursors import EVENTS_BEGIN, event_cursor, event_place
from app.stores.database import Connection, Database
from app.stores.statements import statement
from app.telemetry import metrics

log = logging.getLogger("app.runs")

# Who changed a run's status: its executor, another caller, or the service by itself and why.
By = Literal["executor", "caller", "service", "silence", "session_ended", "machine_deleted"]


def record_events(
    source: str,
    event: str,
    *,
    attempt: str = "attempt",
    from_status: str = "NULL",
    to_status: str = "NULL",
    changed: str = "'{}'",
    by: str = "NULL",
    bulk_retry_id: str = "NULL",
    code: str = "NULL",
    actor: str = ":key_id::uuid, :user_id::uuid, :request_id::text, :reason::text",
) -> str:
    """Part of a statement that changes runs: SQL for an event of each row of `source` (id, organization_id, attempt).

    The other arguments are SQL expressions. Its parameters are those of `Actor.parameters`, unless
    `actor` says otherwise. Names of changed fields only.
    Without `by` the event was made by a request if it has a key, else by the service.
    """
    return f"""
        INSERT INTO run_events (organization_id, run_id, attempt, event, from_status, to_status,
                                key_id, user_id, request_id, reason, changed, by, bulk_retry_id, code)
        SELECT organization_id, id, {attempt}, {event}, {from_status}, {to_status},
               {actor}, {changed}, {by}, {bulk_retry_id}, {code}
        FROM {source}
    """


def announce(
    connection: Connection, to: str, by: By, run_ids: Sequence[UUID], organization_id: str | None = None, **more: object
) -> None:
    """Once it is committed: count the runs that got this status, and write a line for each."""

    def tell() -> None:
        metrics.transitions.add(to, by, count=len(run_ids))
        of = {} if organization_id is None else {"organization_id": organization_id}
        # Not `status`: that is a number, HTTP's, and a collector of logs gives a field one type.
        event = {"assigned": "run_assigned", "running": "run_started"}.get(to, "run_ended")
        for run_id in run_ids:
            log.info({"event": event, "run_id": run_id, **of, "run_status": to, "by": by, **more})

    if run_ids:
        connection.after_commit(tell)


# --- read -------------------------------------------------------------------------------------------------------------

COLUMNS = """
    at, run_id::text, attempt, event, from_status, to_status,
    coalesce(by, CASE WHEN key_id IS NULL THEN 'service' ELSE 'request' END) AS by, bulk_retry_id::text,
    key_id::text, user_id::text, request_id, reason, changed, code,
    (SELECT name FROM api_keys k WHERE k.id = key_id AND k.organization_id = run_events.organization_id LIMIT 1) AS by_key_name
"""

# Transactions end in another order than they began in. Below the oldest one that still runs nothing can appear any more, so
# a reader who goes on from the last event it saw misses none and sees none twice.
_SETTLED = "xact < pg_snapshot_xmin(pg_current_snapshot())::text::bigint"

AFTER = statement(
    "events.after",
    f"""
    SELECT {COLUMNS}, xact, id FROM run_events
    WHERE organization_id = :organization_id AND {_SETTLED} AND (xact, id) > (:xact::bigint, :id::bigint)
    ORDER BY xact, id LIMIT :limit
    """,
)

# By the run alone, before anything else is asked: by the primary key it would be all of the organization's events.
OF_RUN = statement(
    "events.of_run",
    f"""
    WITH settled AS MATERIALIZED (
        SELECT {COLUMNS}, xact, id FROM (SELECT * FROM run_events WHERE run_id = :run_id OFFSET 0) AS run_events
        WHERE organization_id = :organization_id AND {_SETTLED}
    )
    SELECT counted.total, page.* FROM (SELECT count(*) AS total FROM settled) AS counted LEFT JOIN LATERAL (
        SELECT * FROM settled WHERE (xact, id) > (:xact::bigint, :id::bigint)
        ORDER BY xact, id OFFSET :skip LIMIT :limit::bigint + 1
    ) AS page ON true ORDER BY page.xact, page.id
    """,
)


async def list_after(connection: Connection, organization_id: str, after: str | None, limit: int) -> dict[str, Any]:
    """The organization's events beyond a cursor, oldest first, and the cursor to go on from. Raises Invalid."""
    xact, number = event_place(after)
    rows = await connection.fetch(AFTER, organization_id=organization_id, xact=xact, id=number, limit=limit)
    items = [dict(row.items()) for row in rows]
    following = after or EVENTS_BEGIN
    for item in items:
        following = event_cursor(item.pop("xact"), item.pop("id"))
    return {"items": items, "next": following, "limit": limit}


async def list_of_run(
    connection: Connection, organization_id: str, run_id: UUID, after: str | None, skip: int, limit: int
) -> dict[str, Any]:
    """One page of a run's events beyond a cursor, oldest first; also of a run that was deleted. Raises Invalid."""
    xact, number = event_place(after)
    rows = await connection.fetch(
        OF_RUN, run_id=run_id, organization_id=organization_id, xact=xact, id=number, skip=skip, limit=limit
    )
    total, found = rows[0]["total"], [dict(row.items()) for row in rows if row["id"] is not None]
    items = found[:limit]
    for item in items:
        del item["total"]
    places = [event_cursor(item.pop("xact"), item.pop("id")) for item in items]
    return {
        "items": items,
        "total": total,
        "total_is_estimate": False,
        "skip": skip,
        "limit": limit,
        "next": places[-1] if len(found) > limit else None,
    }


# --- retention --------------------------------------------------------------------------------------------------------

# The function belongs to the database's owner: the service itself may not delete events.
PRUNE = statement("events.prune", "SELECT prune_run_events(:days::int, 5000)")


async def prune_events(database: Database, days: int) -> bool:
    """Remove a batch of events that are older than `days`; whether there may be more."""
    async with database.connection() as connection:
        pruned: int = await connection.fetchval(PRUNE, days=days)
    return pruned > 0
