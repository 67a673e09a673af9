"""The queue as people look at it: who waits, for what, for how long, and why.

The work is bounded: LANES_SEEN lanes are looked at, LANES_SHOWN are shown, and RUNS_COUNTED runs are counted in each.
"""

from typing import Any

from app.runs import projection
from app.scheduling import rules
from app.stores.database import Database
from app.stores.statements import loose_scan, statement

LANES_SEEN = 2000
LANES_SHOWN = 200
RUNS_COUNTED = 1000

_WAITING = f"runs q WHERE q.organization_id = :organization_id AND {rules.waits('q')}"

# From lane to lane along the index of the queue, as placement goes. Of each lane its first run, and the oldest one: priority
# may have let another one pass.
LIST_LANES = statement(
    "runs.queue.lanes",
    f"""
    WITH RECURSIVE {loose_scan("hops", "q.lane", _WAITING, most=str(LANES_SEEN))}, heads AS MATERIALIZED (
        SELECT hops.lane, head.id,
               least(head.queued_at, (
                   SELECT q.queued_at FROM runs q
                   WHERE q.organization_id = :organization_id AND q.lane = hops.lane AND q.queue_rank = 1
                     AND {rules.waits("q")}
                   ORDER BY q.queued_at LIMIT 1)) AS oldest_queued_at
        FROM hops CROSS JOIN LATERAL (
            SELECT q.id, q.queued_at FROM runs q
            WHERE q.organization_id = :organization_id AND q.lane = hops.lane AND {rules.waits("q")}
            ORDER BY q.queue_rank, q.queued_at, q.id LIMIT 1
        ) AS head
        ORDER BY oldest_queued_at, hops.lane LIMIT {LANES_SHOWN}
    )
    SELECT heads.lane, r.session_id::text, r.pinned_machine_id::text AS machine_id, r.pool_ids::text[],
           (SELECT count(*) FROM (
                SELECT FROM runs q
                WHERE q.organization_id = :organization_id AND q.lane = heads.lane AND {rules.waits("q")}
                ORDER BY q.queue_rank, q.queued_at, q.id LIMIT {RUNS_COUNTED}) AS waiting) AS waiting,
           heads.oldest_queued_at, r.id::text AS head_run_id, {projection.scheduling_reason()} AS reason
    FROM heads CROSS JOIN LATERAL (SELECT * FROM runs WHERE id = heads.id LIMIT 1) AS r {projection.RUN_SOURCE}
    ORDER BY heads.oldest_queued_at, heads.lane
    """,
)

COUNT_HELD = statement(
    "runs.queue.count_held",
    f"""
    SELECT count(*) FROM (
        SELECT FROM runs q WHERE q.organization_id = :organization_id AND {rules.held("q")}
        ORDER BY q.lane, q.queue_rank, q.queued_at, q.id LIMIT {RUNS_COUNTED}
    ) AS held
    """,
)


# Runs before LIST_LANES, in its transaction. LIST_LANES asks the queue for an order that only the index of the queue has. After
# a sudden crowd, old statistics let other indexes seem as good; these read the whole crowd for each lane, which takes seconds.
# The few rows that are found are sorted all the same.
BY_THE_QUEUES_INDEX = statement("runs.queue.by_index", "SELECT set_config('enable_sort', 'off', true)")


async def list_lanes(database: Database, organization_id: str) -> dict[str, Any]:
    """The lanes of an organization, the one with the oldest run first, and how many runs are held until a time."""
    items = []
    async with database.transaction() as connection:
        await connection.fetch(BY_THE_QUEUES_INDEX)
        rows = await connection.fetch(LIST_LANES, organization_id=organization_id)
        held = await connection.fetchval(COUNT_HELD, organization_id=organization_id)
    for row in rows:
        lane = dict(row.items())
        lane["wants"] = {name: lane.pop(name) for name in ("session_id", "machine_id", "pool_ids")}
        items.append(lane)
    return {"items": items, "held": held}
