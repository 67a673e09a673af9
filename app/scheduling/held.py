"""Held runs: those that start at a time, or later.

A held run is `scheduling` and has its `not_before` as `queued_at`. It stands in a lane of its own kind: HELD, and then the lane
that it wants to wait in. Those lanes come after all lanes of the queue, so that neither a pass of placement nor a retry looks
at them. When the run is due it joins its lane; its place there is that of its `queued_at`.

Only the database's clock says what is due. All replicas look, and row locks divide the runs: each is due once.
"""

from datetime import datetime, timedelta

from app.access.auth import NOBODY
from app.errors import Invalid
from app.events import record_events
from app.scheduling import lanes, rules
from app.services import Services
from app.stores.database import Connection
from app.stores.statements import statement

MOST_AHEAD = timedelta(days=30)
MOST = 500  # runs that one statement makes due

NOW = statement("held.now", "SELECT clock_timestamp()")

NEXT_DUE = statement(
    "held.next_due",
    f"""
    SELECT extract(epoch FROM q.queued_at - now())::float8 FROM runs q WHERE {rules.held("q")}
    ORDER BY q.queued_at LIMIT 1
    """,
)

RELEASE = statement(
    "held.release",
    f"""
    WITH due AS MATERIALIZED (
        SELECT ctid AS tid FROM runs q WHERE {rules.held("q")} AND q.queued_at <= now()
        ORDER BY q.queued_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    ), released AS (
        UPDATE runs SET lane = substr(lane, 1 + length('{lanes.HELD}')) WHERE ctid = ANY (ARRAY(SELECT tid FROM due))
        RETURNING id, organization_id, attempt, status
    ), recorded AS (
        {record_events("released", "'due'", from_status="status", to_status="status")}
    )
    SELECT organization_id, count(*) AS runs FROM released GROUP BY organization_id
    """,
)


def held_until(not_before: datetime | None, now: datetime) -> datetime | None:
    """Until when a run is held that is asked for with this; None: it takes its place in the queue at once."""
    return None if not_before is None or not_before <= now else not_before


def too_far_ahead(not_before: datetime, now: datetime, loc: tuple[str, ...] = ("body", "not_before")) -> Invalid | None:
    """The refusal of a time that is too far ahead."""
    if not_before - now <= MOST_AHEAD:
        return None
    return Invalid((loc, f"Must be at most {MOST_AHEAD.days} days ahead.", "not_before"))


async def check_not_before(
    connection: Connection, not_before: datetime | None, loc: tuple[str, ...] = ("body", "not_before")
) -> datetime | None:
    """`held_until`, by the database's clock, which is read only if a time is given. Raises Invalid."""
    if not_before is None:
        return None
    now: datetime = await connection.fetchval(NOW)
    if (refusal := too_far_ahead(not_before, now, loc)) is not None:
        raise refusal
    return held_until(not_before, now)


async def release_due(services: Services) -> bool | float | None:
    """Let held runs that are due take their places. Whether there may be more, or in how many seconds the next one is due."""
    async with services.database.connection() as connection:
        seconds: float | None = await connection.fetchval(NEXT_DUE)
        if seconds is None or seconds > 0:
            return seconds
        rows = await connection.fetch(RELEASE, most=MOST, **NOBODY.parameters())
    for row in rows:
        services.wakeups.wake(row["organization_id"])
    released: int = sum(row["runs"] for row in rows)
    return released == MOST
