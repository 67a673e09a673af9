"""Placement: which waiting run gets which machine. `place` is the only writer of an assignment.

Waiting runs stand in lanes. All runs of a lane want the same thing, so when the first cannot start, none of the lane can:
a pass looks at the heads of lanes, not at every waiting run.

    session:<id>   runs of one session, strictly in queue order, one at a time; priority does not jump this queue
    machine:<id>   runs pinned to one machine (looked at only while that machine is idle)
    pools:<ids>    runs whose machine must be in all of these pools
    any            runs that take any machine

Lanes compete by their heads: priority first, then queue time. One pass per organization runs at a time, on any replica (an
advisory lock, taken before any row); rows that someone else holds are skipped and looked at in the next pass, so a pass
waits for no row and cannot deadlock. Two unique indexes hold the truth whatever the code does: one active run per machine,
one machine per session.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from app.database import Connection, Database
from app.errors import MachineNotFound, PoolNotFound, SessionNotFound


class Targets(Protocol):
    """The part of a request that says where a run may go."""

    @property
    def machine_id(self) -> UUID | None: ...
    @property
    def pool_ids(self) -> list[UUID] | None: ...
    @property
    def session_id(self) -> UUID | None: ...


# The lock keeps the machine from being deleted before the run that pins it is committed.
KNOWN_MACHINE = "SELECT 1 FROM machines WHERE id = $1 AND organization_id = $2 FOR KEY SHARE"
KNOWN_POOLS = "SELECT count(*) FROM pools WHERE id = ANY($1::uuid[]) AND organization_id = $2"
KNOWN_SESSION = """
SELECT EXISTS (SELECT FROM machines WHERE reserved_session_id = $1 AND organization_id = $2)
    OR EXISTS (SELECT FROM runs WHERE session_id = $1 AND organization_id = $2)
"""


async def check_targets(connection: Connection, organization_id: str, targets: Targets) -> None:
    """Raises MachineNotFound, PoolNotFound or SessionNotFound for what the organization does not have."""
    if targets.machine_id is not None and not await connection.fetchval(
        KNOWN_MACHINE, targets.machine_id, organization_id
    ):
        raise MachineNotFound
    if targets.pool_ids:
        wanted = set(targets.pool_ids)
        if await connection.fetchval(KNOWN_POOLS, list(wanted), organization_id) != len(wanted):
            raise PoolNotFound
    if targets.session_id is not None and not await connection.fetchval(
        KNOWN_SESSION, targets.session_id, organization_id
    ):
        raise SessionNotFound


def lane(
    session_id: UUID | None, pinned: UUID | None, pool_ids: Iterable[UUID] | None, is_priority: bool
) -> tuple[str, int]:
    """The lane a run waits in, and its rank there: 0 goes before 1."""
    rank = 0 if is_priority and session_id is None else 1
    if session_id is not None:
        return f"session:{session_id}", rank
    if pinned is not None:
        return f"machine:{pinned}", rank
    pools = sorted({str(pool) for pool in pool_ids or ()})
    return (f"pools:{','.join(pools)}" if pools else "any"), rank


# --- what a pass reads ------------------------------------------------------------------------------------------------

# Two replicas never place runs of one organization at once: the second would see the first's session heads as taken.
LOCK_ORGANIZATION = "SELECT pg_advisory_xact_lock(1382379123, hashtext($1))"

IDLE_MACHINES = """
SELECT m.id, m.reserved_session_id,
       ARRAY(SELECT p.pool_id FROM pool_machines p WHERE p.machine_id = m.id) AS pool_ids
FROM machines m
WHERE m.organization_id = $1 AND m.status = 'connected' AND m.is_available
  AND NOT EXISTS (SELECT FROM runs r WHERE r.assigned_machine_id = m.id AND r.status IN ('scheduling', 'running'))
"""

# Hops from lane to lane along the index instead of reading every waiting run.
OPEN_LANES = """
WITH RECURSIVE lanes AS (
    (SELECT lane FROM runs
     WHERE organization_id = $1 AND status = 'scheduling' AND assigned_machine_id IS NULL ORDER BY lane LIMIT 1)
    UNION ALL
    SELECT (SELECT r.lane FROM runs r
            WHERE r.organization_id = $1 AND r.status = 'scheduling' AND r.assigned_machine_id IS NULL
              AND r.lane > CASE WHEN lanes.lane < 'machine:~' THEN 'machine:~' ELSE lanes.lane END
            ORDER BY r.lane LIMIT 1)
    FROM lanes WHERE lanes.lane IS NOT NULL
)
SELECT lane FROM lanes WHERE lane IS NOT NULL AND lane NOT LIKE 'machine:%'
"""

# The next runs of each lane, in its order.
HEADS = """
SELECT r.id, r.lane, r.is_priority, r.queued_at, r.session_id, r.pinned_machine_id, r.pool_ids
FROM unnest($2::text[]) AS wanted (lane)
CROSS JOIN LATERAL (
    SELECT * FROM runs
    WHERE organization_id = $1 AND lane = wanted.lane AND status = 'scheduling' AND assigned_machine_id IS NULL
    ORDER BY queue_rank, queued_at, id
    LIMIT CASE WHEN wanted.lane LIKE 'session:%' THEN 1 ELSE $3 END
) AS r
"""

BUSY_SESSIONS = """
SELECT DISTINCT session_id FROM runs
WHERE session_id = ANY($1::uuid[]) AND (status = 'running' OR (status = 'scheduling' AND assigned_machine_id IS NOT NULL))
"""

RESERVATIONS = "SELECT reserved_session_id, id FROM machines WHERE reserved_session_id = ANY($1::uuid[])"

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

ASSIGN = """
UPDATE runs SET assigned_machine_id = chosen.machine_id
FROM unnest($1::uuid[], $2::uuid[]) AS chosen (run_id, machine_id) WHERE runs.id = chosen.run_id
"""

RESERVE = """
UPDATE machines SET reserved_session_id = chosen.session_id
FROM unnest($1::uuid[], $2::uuid[]) AS chosen (machine_id, session_id) WHERE machines.id = chosen.machine_id
"""


@dataclass(slots=True)
class Machine:
    """An idle machine."""

    id: UUID
    session_id: UUID | None
    pools: frozenset[UUID]
    wanted: bool = field(default=False)  # a run pinned to it is waiting: others take it last


@dataclass(frozen=True, slots=True)
class Placed:
    """One assignment, and what it was decided on."""

    run_id: UUID
    queued_at: datetime
    session_id: UUID | None
    machine: Machine


# Runs read per lane and pass, and hence the most assignments a pass makes in one lane.
HEADS_PER_LANE = 200


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
        lanes = [row["lane"] for row in await connection.fetch(OPEN_LANES, organization_id)]
        lanes += [f"machine:{machine.id}" for machine in idle.values() if machine.session_id is None]
        heads = await connection.fetch(HEADS, organization_id, lanes, min(len(idle), HEADS_PER_LANE))
        if not heads:
            return [], False
        sessions = [row["session_id"] for row in heads if row["session_id"] is not None]
        busy: set[UUID] = set()
        reserved: dict[UUID, UUID] = {}
        if sessions:
            busy = {row["session_id"] for row in await connection.fetch(BUSY_SESSIONS, sessions)}
            reserved = {row["reserved_session_id"]: row["id"] for row in await connection.fetch(RESERVATIONS, sessions)}
        chosen = match(heads, idle, busy, reserved)
        placed = await _lock(connection, chosen)
        if placed:
            opening = [one for one in placed if one.session_id is not None and one.machine.session_id is None]
            if opening:
                await connection.execute(
                    RESERVE, [one.machine.id for one in opening], [one.session_id for one in opening]
                )
            await connection.execute(ASSIGN, [one.run_id for one in placed], [one.machine.id for one in placed])
    return placed, bool(chosen)


async def _lock(connection: Connection, chosen: list[Placed]) -> list[Placed]:
    """Lock what was chosen and keep what is still as it was read; the rest is for the next pass."""
    if not chosen:
        return []
    runs = {row["id"]: row["queued_at"] for row in await connection.fetch(LOCK_RUNS, [one.run_id for one in chosen])}
    rows = await connection.fetch(LOCK_MACHINES, [one.machine.id for one in chosen])
    machines = {row["id"]: row["reserved_session_id"] for row in rows}
    return [
        one
        for one in chosen
        if runs.get(one.run_id) == one.queued_at and machines.get(one.machine.id, one) == one.machine.session_id
    ]


def match(heads: Sequence[Any], idle: dict[UUID, Machine], busy: set[UUID], reserved: dict[UUID, UUID]) -> list[Placed]:
    """Give machines to the heads of lanes, best head first; a lane whose head finds none is done."""
    lanes: dict[str, deque[Any]] = defaultdict(deque)
    for row in heads:
        lanes[row["lane"]].append(row)
        if row["pinned_machine_id"] in idle:
            idle[row["pinned_machine_id"]].wanted = True
    queue = [_entry(runs[0]) for runs in lanes.values()]
    heapq.heapify(queue)
    chosen: list[Placed] = []
    while queue and idle:
        run = heapq.heappop(queue)[-1]
        if run["session_id"] in busy:
            continue
        machine = _machine_for(run, idle, reserved)
        if machine is None:
            continue
        del idle[machine.id]
        chosen.append(Placed(run["id"], run["queued_at"], run["session_id"], machine))
        waiting = lanes[run["lane"]]
        waiting.popleft()
        if waiting:
            heapq.heappush(queue, _entry(waiting[0]))
    return chosen


def _entry(run: Any) -> tuple[bool, Any, UUID, Any]:
    return not run["is_priority"], run["queued_at"], run["id"], run


def _machine_for(run: Any, idle: dict[UUID, Machine], reserved: dict[UUID, UUID]) -> Machine | None:
    """An eligible machine: the session's reserved one, else the pinned one, else the least sought-after in all pools."""
    session_id: UUID | None = run["session_id"]
    if session_id is not None and session_id in reserved:
        return idle.get(reserved[session_id])
    if run["pinned_machine_id"] is not None:
        machine = idle.get(run["pinned_machine_id"])
        return machine if machine is not None and machine.session_id is None else None
    pools = frozenset(run["pool_ids"] or ())
    eligible = (machine for machine in idle.values() if machine.session_id is None and pools <= machine.pools)
    return min(eligible, key=lambda machine: (machine.wanted, len(machine.pools), machine.id), default=None)
