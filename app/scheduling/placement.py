"""Placement: which waiting run gets which machine. `place` is the only writer of an assignment.

Waiting runs stand in lanes. All runs of a lane want the same thing, so when the first cannot start, none of the lane can:
a pass looks at the heads of lanes, not at every waiting run.

    session:<id>   runs of one session, strictly in queue order, one at a time; priority does not jump this queue
    machine:<id>   runs pinned to one machine (looked at only while that machine is idle)
    pools:<hash>   runs whose machine must be in all of these pools
    any            runs that take any machine

Lanes compete by their heads: priority first, then queue time. One pass per organization runs at a time, on any replica (an
advisory lock, taken before any row). Rows that someone else holds are passed over; whoever holds them wakes the background
task after the commit, and it also polls. So a pass waits for no row and cannot deadlock. Two unique indexes hold the truth
whatever the code does: one active run per machine, one machine per session.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from app.auth import NOBODY
from app.events import record
from app.stores.database import Connection, Database
from app.stores.statements import statement

# --- what a pass reads ------------------------------------------------------------------------------------------------

# Two replicas never place runs of one organization at once: the second could take a session that the first, not yet
# committed, is about to make busy.
LOCK_ORGANIZATION = "SELECT pg_advisory_xact_lock(1382379123, hashtext($1))"

IDLE_MACHINES = """
SELECT m.id, m.reserved_session_id,
       ARRAY(SELECT p.pool_id FROM pool_machines p WHERE p.machine_id = m.id) AS pool_ids
FROM machines m
WHERE m.organization_id = $1 AND m.status = 'connected' AND m.is_available
  AND NOT EXISTS (SELECT FROM runs r WHERE r.assigned_machine_id = m.id AND r.status IN ('scheduling', 'running'))
"""

# The next runs of each open lane, in its order. It hops from lane to lane along the index, over all lanes of pinned runs
# (those of idle machines are given), instead of reading every waiting run.
HEADS = """
WITH RECURSIVE hops AS (
    (SELECT lane FROM runs
     WHERE organization_id = $1 AND status = 'scheduling' AND assigned_machine_id IS NULL ORDER BY lane LIMIT 1)
    UNION ALL
    SELECT (SELECT r.lane FROM runs r
            WHERE r.organization_id = $1 AND r.status = 'scheduling' AND r.assigned_machine_id IS NULL
              AND r.lane > CASE WHEN hops.lane < 'machine:~' THEN 'machine:~' ELSE hops.lane END
            ORDER BY r.lane LIMIT 1)
    FROM hops WHERE hops.lane IS NOT NULL
), open AS (
    SELECT lane FROM hops WHERE lane NOT LIKE 'machine:%'
    UNION ALL
    SELECT unnest($2::text[])
)
SELECT head.*, m.id AS reserved_machine_id
FROM open
CROSS JOIN LATERAL (
    SELECT id, lane, is_priority, queue_rank, queued_at, session_id, pinned_machine_id, pool_ids FROM runs
    WHERE organization_id = $1 AND lane = open.lane AND status = 'scheduling' AND assigned_machine_id IS NULL
    ORDER BY queue_rank, queued_at, id
    LIMIT CASE WHEN open.lane LIKE 'session:%' OR open.lane LIKE 'machine:%' THEN 1 ELSE $3 END
) AS head
LEFT JOIN machines m ON m.reserved_session_id = head.session_id
WHERE head.session_id IS NULL OR NOT EXISTS (
    SELECT FROM runs other
    WHERE other.session_id = head.session_id AND other.status IN ('scheduling', 'running')
      AND (other.status = 'running' OR other.assigned_machine_id IS NOT NULL))
ORDER BY head.queue_rank, head.queued_at, head.id -- a join need not keep the order of what it joins
"""

# --- what a pass writes -----------------------------------------------------------------------------------------------

# What was cancelled, retried, disconnected or reserved since it was read is locked or looks different: it is passed over.
LOCK_RUNS = """
SELECT id, queued_at FROM runs
WHERE id = ANY($1::uuid[]) AND status = 'scheduling' AND assigned_machine_id IS NULL
FOR NO KEY UPDATE SKIP LOCKED
"""

LOCK_MACHINES = """
SELECT id, reserved_session_id FROM machines
WHERE id = ANY($1::uuid[]) AND status = 'connected' AND is_available
FOR NO KEY UPDATE SKIP LOCKED
"""

# Read again after the lock, by a statement of its own: whoever takes a machine out of a pool locks the machine.
POOLS_NOW = "SELECT machine_id, pool_id FROM pool_machines WHERE machine_id = ANY($1::uuid[])"

# Each run is looked up by its key and changed by its place: a join could read all runs with a plan made while there were few.
# The runs are locked, so they stay where they are.
ASSIGN = statement(
    "placement.assign",
    f"""
    WITH chosen AS MATERIALIZED (
        SELECT run.tid, wanted.machine_id
        FROM unnest(:run_ids::uuid[], :machine_ids::uuid[]) AS wanted (run_id, machine_id),
             LATERAL (SELECT ctid AS tid FROM runs WHERE id = wanted.run_id) AS run
    ), assigned AS (
        UPDATE runs SET assigned_machine_id = chosen.machine_id FROM chosen WHERE runs.ctid = chosen.tid
        RETURNING runs.id, runs.organization_id, runs.attempt, runs.status
    )
    {record("assigned", "'assigned'", from_status="status", to_status="status")}
    """,
)

RESERVE = """
UPDATE machines SET reserved_session_id = chosen.session_id
FROM unnest($1::uuid[], $2::uuid[]) AS chosen (machine_id, session_id) WHERE machines.id = chosen.machine_id
"""

# Runs read per lane and pass, and hence the most assignments a pass makes in one lane.
HEADS_PER_LANE = 200


@dataclass(frozen=True, slots=True)
class Machine:
    """An idle machine."""

    id: UUID
    session_id: UUID | None
    pools: frozenset[UUID]


@dataclass(frozen=True, slots=True)
class Placed:
    """One assignment, and what it was decided on."""

    run_id: UUID
    queued_at: datetime
    session_id: UUID | None
    pools: frozenset[UUID]
    machine: Machine


async def place(database: Database, organization_id: str) -> tuple[list[Placed], bool]:
    """One pass over an organization: what was assigned, and whether another pass might assign more.

    Raises DatabaseUnavailable.
    """
    async with database.transaction() as connection:
        await connection.execute(LOCK_ORGANIZATION, organization_id)
        rows = await connection.fetch(IDLE_MACHINES, organization_id)
        idle = {row["id"]: Machine(row["id"], row["reserved_session_id"], frozenset(row["pool_ids"])) for row in rows}
        if not idle:
            return [], False
        pinned = [f"machine:{machine.id}" for machine in idle.values() if machine.session_id is None]
        limit = min(len(idle), HEADS_PER_LANE)
        heads = await connection.fetch(HEADS, organization_id, pinned, limit)
        cut: set[str] = set()
        if limit < len(idle):
            cut = {lane for lane, count in Counter(head["lane"] for head in heads).items() if count == limit}
        while placed := match(heads, idle, cut):
            runs, machines = await _lock(connection, placed)
            if len(runs) == len(machines) == len(placed):
                break
            # What others hold or changed must not keep the rest waiting: choose anew without it. Not only for whom it was
            # chosen: a machine that is gone passes its run on to the next machine, before runs of a lesser claim.
            lost_runs = {one.run_id for one in placed} - runs
            heads = [head for head in heads if head["id"] not in lost_runs]
            for one in placed:
                if one.machine.id not in machines:
                    del idle[one.machine.id]
        if placed:
            opening = [one for one in placed if one.session_id is not None and one.machine.session_id is None]
            if opening:
                await connection.execute(
                    RESERVE, [one.machine.id for one in opening], [one.session_id for one in opening]
                )
            await connection.execute(
                ASSIGN,
                run_ids=[one.run_id for one in placed],
                machine_ids=[one.machine.id for one in placed],
                **NOBODY.parameters(),
            )
    return placed, bool(placed and cut)


async def _lock(connection: Connection, chosen: list[Placed]) -> tuple[set[UUID], set[UUID]]:
    """Lock what was chosen; which of its runs and of its machines are still as they were read."""
    rows = await connection.fetch(LOCK_RUNS, [one.run_id for one in chosen])
    queued = {row["id"]: row["queued_at"] for row in rows}
    runs = {one.run_id for one in chosen if queued.get(one.run_id) == one.queued_at}
    rows = await connection.fetch(LOCK_MACHINES, [one.machine.id for one in chosen])
    reserved = {row["id"]: row["reserved_session_id"] for row in rows}
    pools: dict[UUID, set[UUID]] = defaultdict(set)
    if any(one.pools for one in chosen):
        for row in await connection.fetch(POOLS_NOW, list(reserved)):
            pools[row["machine_id"]].add(row["pool_id"])
    machines = {
        one.machine.id
        for one in chosen
        if reserved.get(one.machine.id, one) == one.machine.session_id and one.pools <= pools[one.machine.id]
    }
    return runs, machines


def match(heads: Sequence[Any], idle: dict[UUID, Machine], cut: set[str]) -> list[Placed]:
    """Give machines to the heads of lanes, best head first; a lane whose head finds none is done.

    It ends with the last run that was read of a lane in `cut`: that lane has more, which may go before what is left.
    """
    lanes: dict[str, deque[Any]] = defaultdict(deque)
    for head in heads:
        lanes[head["lane"]].append(head)
    queue = [_entry(runs[0]) for runs in lanes.values()]
    heapq.heapify(queue)
    machines = _Machines(idle, {head["pinned_machine_id"] for head in heads})
    chosen: list[Placed] = []
    while queue and len(chosen) < len(idle):
        run = heapq.heappop(queue)[-1]
        pools = _pools(run)
        machine = machines.take(run, pools)
        if machine is None:
            continue
        chosen.append(Placed(run["id"], run["queued_at"], run["session_id"], pools, machine))
        waiting = lanes[run["lane"]]
        waiting.popleft()
        if waiting:
            heapq.heappush(queue, _entry(waiting[0]))
        elif run["lane"] in cut:
            break
    return chosen


def _entry(run: Any) -> tuple[bool, Any, UUID, Any]:
    return not run["is_priority"], run["queued_at"], run["id"], run


def _pools(run: Any) -> frozenset[UUID]:
    """The pools that decide where a run goes: a session's reserved machine and a pinned one win over them."""
    if run["reserved_machine_id"] is not None or run["pinned_machine_id"] is not None:
        return frozenset()
    return frozenset(run["pool_ids"] or ())


class _Machines:
    """Idle machines, taken one after the other."""

    def __init__(self, idle: dict[UUID, Machine], sought: set[UUID | None]) -> None:
        self._left = dict(idle)
        # Those that others ask for by name or by pool go last: a choice, which makes no older run wait for another machine.
        self._open = sorted(
            (machine for machine in idle.values() if machine.session_id is None),
            key=lambda machine: (machine.id in sought, len(machine.pools), machine.id),
        )
        # Machines only go, so what was passed over for some pools never needs to be looked at again for them.
        self._in_pools: dict[frozenset[UUID], Iterator[Machine]] = {}

    def take(self, run: Any, pools: frozenset[UUID]) -> Machine | None:
        """An eligible machine: the session's reserved one, else the pinned one, else the least sought-after."""
        machine: Machine | None
        if run["reserved_machine_id"] is not None:
            machine = self._left.get(run["reserved_machine_id"])
        elif run["pinned_machine_id"] is not None:
            machine = self._left.get(run["pinned_machine_id"])
            if machine is not None and machine.session_id is not None:
                machine = None
        else:
            if pools not in self._in_pools:
                self._in_pools[pools] = iter([machine for machine in self._open if pools <= machine.pools])
            machine = next((machine for machine in self._in_pools[pools] if machine.id in self._left), None)
        if machine is not None:
            del self._left[machine.id]
        return machine
