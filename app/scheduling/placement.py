"""Placement: which waiting run gets which machine. `place` is the only writer of an assignment.

Waiting runs stand in lanes (the partitions of the queue). All runs of a lane may go to the same machines. If the first run of a
lane cannot start, no run of the lane can. So a pass looks at the first runs of lanes (the heads), not at every waiting run.

    session:<id>   runs of one session, strictly in queue order, one at a time; priority does not jump this queue
    machine:<id>   runs pinned to one machine (looked at only while that machine is idle)
    pools:<hash>   runs that need a machine in all of these pools
    any            runs that take any machine

Runs that are held until a time have lanes beyond all of these (lanes.HELD), which a pass does not look at.

Lanes compete by their heads: priority first, then queue time. One pass per organization runs at a time, on any replica (an
advisory lock, taken before any row). A pass skips rows that another transaction has locked, so it waits for no lock and cannot
deadlock. Two unique indexes hold in any case: one active run per machine, one machine per session.

A pass is bounded: it reads machines and lanes in slices, and assigns at most MOST runs. An organization that needs more
than one slice is served apart from the others (rounds.py).

One file: a pass reads and writes under one lock, and its statements are read together with the order in which it decides.
"""

import enum
import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from uuid import UUID

from app.access.auth import NOBODY
from app.events import announce, record_events
from app.handoff import dispatches
from app.scheduling import lanes, rules
from app.stores import locks
from app.stores.database import Connection, Database, Record
from app.stores.statements import by_id, loose_scan, statement
from app.telemetry import metrics

SLICE = 1000  # machines, and lanes, that one statement looks at
MOST = 200  # assignments of a pass, and runs of one lane that one statement reads
LANES_READ_ON = 8  # how often a pass reads on in a lane
KEPT = 5000  # heads that a pass over many slices keeps in memory
BEYOND_LANES = lanes.HELD  # after the last lane

# --- what a pass reads ------------------------------------------------------------------------------------------------

LOCK_ORGANIZATION = statement("placement.lock_organization", f"SELECT {locks.try_for(locks.PLACEMENT)}")

# The idle ones of the next slice of machines, newest first. A last row without pools says that there may be more.
IDLE_MACHINES = statement(
    "placement.idle_machines",
    f"""
    WITH slice AS MATERIALIZED (
        SELECT m.id, m.created_at, m.status, m.is_available, m.reserved_session_id FROM machines m
        WHERE m.organization_id = :organization_id AND (m.created_at, m.id) < (
            coalesce(:created_at::timestamptz, 'infinity'), coalesce(:id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
        ORDER BY m.created_at DESC, m.id DESC LIMIT :slice::bigint
    )
    SELECT m.id, m.created_at, m.reserved_session_id,
           ARRAY(SELECT p.pool_id FROM pool_machines p WHERE p.machine_id = m.id) AS pool_ids
    FROM slice m WHERE {rules.idle("m")}
    UNION ALL
    (SELECT m.id, m.created_at, NULL, NULL FROM slice m ORDER BY m.created_at DESC, m.id DESC OFFSET :slice::bigint - 1)
    """,
)

# The next runs of each open lane of a slice, in the order of the lane. The scan hops from lane to lane along the index and
# skips the lanes of pinned runs; the lanes of idle machines are parameters. Each lane gives at least one row, without a run if
# no run may start. If there are many lanes, fewer runs of each are read, but at least two, so that heads can be compared.
_RUN = "id, is_priority, queue_rank, queued_at, session_id, pinned_machine_id, pool_ids, avoided_machine_id"
HEADS = statement(
    "placement.heads",
    f"""
    WITH RECURSIVE {
        loose_scan(
            "hops",
            "r.lane",
            f"runs r WHERE r.organization_id = :organization_id AND {rules.waits('r')}",
            after=":after::text",
            beyond=f"CASE WHEN hops.lane < '{lanes.AFTER_MACHINES}' THEN '{lanes.AFTER_MACHINES}' ELSE hops.lane END",
            most=":slice::bigint",
        )
    }, open AS MATERIALIZED (
        SELECT n, lane FROM hops WHERE lane NOT LIKE '{lanes.MACHINE}%'
        UNION ALL
        SELECT 0, unnest(:pinned::text[]) WHERE EXISTS (  -- mostly there is no pinned run at all
            SELECT FROM runs r WHERE r.organization_id = :organization_id AND {rules.waits("r")}
              AND r.lane > '{lanes.MACHINE}' AND r.lane < '{lanes.AFTER_MACHINES}')
    ), reading AS MATERIALIZED (
        SELECT least(:most::bigint, greatest(2, 1000 / greatest(1, count(*)))) AS depth FROM open
    )
    SELECT open.n, open.lane, reading.depth, head.*
    FROM reading CROSS JOIN open LEFT JOIN LATERAL (
        SELECT next.*, m.id AS reserved_machine_id FROM (
            SELECT {_RUN} FROM runs r
            WHERE r.organization_id = :organization_id AND r.lane = open.lane AND {rules.waits("r")}
            ORDER BY r.queue_rank, r.queued_at, r.id
            LIMIT CASE WHEN open.lane LIKE '{lanes.SESSION}%' OR open.lane LIKE '{lanes.MACHINE}%' THEN 1
                       ELSE reading.depth END
        ) AS next
        LEFT JOIN LATERAL (
            SELECT id FROM machines WHERE reserved_session_id = next.session_id LIMIT 1
        ) AS m ON true
        WHERE next.session_id IS NULL OR NOT {rules.session_at_work("next")}
    ) AS head ON true
    ORDER BY head.queue_rank, head.queued_at, head.id -- a join need not keep the order of its input
    """,
)

# More runs of a lane without sessions.
READ_ON = statement(
    "placement.read_on",
    f"""
    SELECT lane, {_RUN}, NULL::uuid AS reserved_machine_id FROM runs r
    WHERE r.organization_id = :organization_id AND r.lane = :lane AND {rules.waits("r")}
      AND (r.queue_rank, r.queued_at, r.id) > (:queue_rank::smallint, :queued_at::timestamptz, :id::uuid)
    ORDER BY r.queue_rank, r.queued_at, r.id LIMIT :most::bigint
    """,
)

# --- what a pass writes -----------------------------------------------------------------------------------------------

# A run that was cancelled or retried since it was read, and a machine that was disconnected or reserved, is skipped.
LOCK_RUNS = statement(
    "placement.lock_runs",
    f"""
    SELECT r.id, r.queued_at FROM unnest(:run_ids::uuid[]) AS wanted (id), LATERAL (
        SELECT id, queued_at, status, assigned_machine_id, lane FROM runs WHERE id = wanted.id
        OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED
    ) AS r
    WHERE {rules.waits("r")}
    """,
)

LOCK_MACHINES = statement(
    "placement.lock_machines",
    f"""
    SELECT m.id, m.reserved_session_id FROM unnest(:machine_ids::uuid[]) AS wanted (id), LATERAL (
        SELECT id, reserved_session_id, status, is_available FROM machines WHERE id = wanted.id
        OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED
    ) AS m
    WHERE {rules.up("m")}
    """,
)

# Read again after the lock, by a statement of its own: a transaction that takes a machine out of a pool locks the machine.
POOLS_NOW = statement(
    "placement.pools_now", "SELECT machine_id, pool_id FROM pool_machines WHERE machine_id = ANY(:machine_ids::uuid[])"
)


# Each run is looked up by its key and changed by its place, and its machine is looked up in the list. A join, also one by
# place, would read all runs with a plan that was made while there were few.
def _assign_and(also: str = "") -> str:
    return f"""
    WITH assigned AS (
        UPDATE runs SET assigned_machine_id = (:machine_ids::uuid[])[array_position(:run_ids::uuid[], id)],
                        assignment = assignment + 1, awaited_since = now()
        WHERE {by_id("runs", "run_ids")}
        RETURNING id, organization_id, attempt, status, assignment, assigned_machine_id
    ){also}
    {record_events("assigned", "'assigned'", from_status="status", to_status="status")}
    """


ASSIGN = statement("placement.assign", _assign_and())
ASSIGN_AND_HAND_OVER = statement(
    "placement.assign_and_hand_over", _assign_and(f", handed_over AS ({dispatches.STARTED})")
)

RESERVE = statement(
    "placement.reserve",
    f"""
    UPDATE machines SET reserved_session_id = (:session_ids::uuid[])[array_position(:machine_ids::uuid[], id)]
    WHERE {by_id("machines", "machine_ids")}
    """,
)

# --- a pass -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """An idle machine."""

    id: UUID
    session_id: UUID | None
    pools: frozenset[UUID]


@dataclass(frozen=True, slots=True)
class Placed:
    """One assignment, and the state of the rows that it was decided on."""

    run_id: UUID
    queued_at: datetime
    session_id: UUID | None
    pools: frozenset[UUID]
    machine: Machine


class Left(enum.Enum):
    """Why another pass is needed."""

    NOTHING = "nothing that could start"
    MORE = "more than a pass assigns"
    HELD = "what somebody else held or changed meanwhile: perhaps all of the organization, in a pass on another replica"
    LARGE = "everything: the slices were not enough"


@dataclass(frozen=True, slots=True)
class Pass:
    """The result of a pass."""

    placed: Sequence[Placed]
    left: Left


class _TooLarge(Exception):
    """The slices were not enough."""


async def place(database: Database, organization_id: str, *, slices: int = 1, hands_over: bool = False) -> Pass:
    """One pass over an organization. It reads at most `slices` slices of machines and of lanes. Raises DatabaseUnavailable.

    `hands_over`: Temporal is told of the assignments.
    """
    try:
        async with database.transaction() as connection:
            if not await connection.fetchval(LOCK_ORGANIZATION, organization_id=organization_id):
                return Pass((), Left.HELD)
            idle = await _idle_machines(connection, organization_id, slices)
            if not idle:
                return Pass((), Left.NOTHING)
            queue = await _heads(connection, organization_id, idle, slices)
            return await _assign(connection, organization_id, queue, idle, hands_over=hands_over)
    except _TooLarge:
        return Pass((), Left.LARGE)


async def _idle_machines(connection: Connection, organization_id: str, slices: int) -> dict[UUID, Machine]:
    idle: dict[UUID, Machine] = {}
    after: tuple[datetime | None, UUID | None] = (None, None)
    for _ in range(slices):
        created_at, machine_id = after
        rows = await connection.fetch(
            IDLE_MACHINES, organization_id=organization_id, created_at=created_at, id=machine_id, slice=SLICE
        )
        last = rows.pop() if rows and rows[-1]["pool_ids"] is None else None
        for row in rows:
            idle[row["id"]] = Machine(row["id"], row["reserved_session_id"], frozenset(row["pool_ids"]))
        if last is None:
            return idle
        after = last["created_at"], last["id"]
    raise _TooLarge


@dataclass(slots=True)
class _Queue:
    """The next runs of the open lanes, each lane in its order; and the last one that was read of lanes that have more."""

    runs: list[Record]
    cut: dict[str, Record]
    may_read_on: bool


async def _heads(connection: Connection, organization_id: str, idle: dict[UUID, Machine], slices: int) -> _Queue:
    pinned = [f"{lanes.MACHINE}{machine.id}" for machine in idle.values() if machine.session_id is None]
    machines = _Machines(idle, set())
    queue = _Queue([], {}, may_read_on=True)
    after: str | None = ""
    for number in range(slices):
        rows = await connection.fetch(
            HEADS,
            organization_id=organization_id,
            after=after,
            slice=SLICE,
            pinned=pinned[number * SLICE : (number + 1) * SLICE],
            most=min(len(idle), MOST),
        )
        after = next((row["lane"] for row in rows if row["n"] == SLICE), None)
        heads = [row for row in rows if row["id"] is not None]
        if rows and rows[0]["depth"] < len(idle):
            read = Counter(row["lane"] for row in heads if row["session_id"] is None)
            queue.cut |= {row["lane"]: row for row in heads if read[row["lane"]] == row["depth"]}
        if slices == 1:
            queue.runs = heads
        else:
            _keep_the_best(queue, [run for run in heads if machines.suits(run)])
        if after is None and (number + 1) * SLICE >= len(pinned):
            return queue
        after = after or BEYOND_LANES
    raise _TooLarge


def _keep_the_best(queue: _Queue, more: Sequence[Record]) -> None:
    """Add runs for which there is a machine, within the room there is: the best decide, and the rest is for other passes."""
    queue.runs = sorted([*queue.runs, *more], key=_precedence)
    for run in queue.runs[KEPT:]:
        queue.cut[run["lane"]] = run
        queue.may_read_on = False  # the next runs of the lane may come after dropped ones
    del queue.runs[KEPT:]


async def _assign(
    connection: Connection, organization_id: str, queue: _Queue, idle: dict[UUID, Machine], *, hands_over: bool
) -> Pass:
    reads = LANES_READ_ON if queue.may_read_on else 0
    left = Left.NOTHING
    while True:
        placed, ran_out = match(queue.runs, idle, queue.cut)
        if ran_out is not None and reads > 0:
            reads -= 1
            last = queue.cut.pop(ran_out)
            rows = await connection.fetch(
                READ_ON,
                organization_id=organization_id,
                lane=ran_out,
                queue_rank=last["queue_rank"],
                queued_at=last["queued_at"],
                id=last["id"],
                most=MOST,
            )
            queue.runs += rows
            if len(rows) == MOST:
                queue.cut[ran_out] = rows[-1]
            continue
        if not placed:
            return Pass((), left)
        runs, machines = await _lock(connection, placed)
        if len(runs) == len(machines) == len(placed):
            break
        # Runs and machines that another transaction has locked or changed must not keep the rest waiting: choose again without
        # them, for all runs. If a machine is gone, its run gets the next machine, before runs that come later.
        left = Left.HELD
        lost_runs = {one.run_id for one in placed} - runs
        queue.runs = [run for run in queue.runs if run["id"] not in lost_runs]
        for one in placed:
            if one.machine.id not in machines:
                del idle[one.machine.id]
    opening = [one for one in placed if one.session_id is not None and one.machine.session_id is None]
    if opening:
        await connection.execute(
            RESERVE,
            machine_ids=[one.machine.id for one in opening],
            session_ids=[one.session_id for one in opening],
        )
    await connection.execute(
        ASSIGN_AND_HAND_OVER if hands_over else ASSIGN,
        run_ids=[one.run_id for one in placed],
        machine_ids=[one.machine.id for one in placed],
        **NOBODY.parameters(),
    )
    for one in placed:
        announce(connection, "assigned", "service", [one.run_id], organization_id, machine_id=one.machine.id)
    connection.after_commit(lambda: _measure(placed))
    return Pass(placed, Left.MORE if ran_out is not None or len(placed) == MOST else left)


def _measure(placed: Sequence[Placed]) -> None:
    """How long they have waited, by this machine's clock."""
    now = datetime.now(UTC)
    for one in placed:
        metrics.placement_wait.observe(max(0.0, (now - one.queued_at).total_seconds()))


async def _lock(connection: Connection, chosen: list[Placed]) -> tuple[set[UUID], set[UUID]]:
    """Lock the chosen runs and machines. Returns those that are still as they were read."""
    rows = await connection.fetch(LOCK_RUNS, run_ids=[one.run_id for one in chosen])
    queued = {row["id"]: row["queued_at"] for row in rows}
    runs = {one.run_id for one in chosen if queued.get(one.run_id) == one.queued_at}
    rows = await connection.fetch(LOCK_MACHINES, machine_ids=[one.machine.id for one in chosen])
    reserved = {row["id"]: row["reserved_session_id"] for row in rows}
    pools: dict[UUID, set[UUID]] = defaultdict(set)
    if any(one.pools for one in chosen):
        for row in await connection.fetch(POOLS_NOW, machine_ids=list(reserved)):
            pools[row["machine_id"]].add(row["pool_id"])
    machines = {
        one.machine.id
        for one in chosen
        if reserved.get(one.machine.id, one) == one.machine.session_id and one.pools <= pools[one.machine.id]
    }
    return runs, machines


# --- who gets what ----------------------------------------------------------------------------------------------------


def match(runs: Sequence[Record], idle: dict[UUID, Machine], cut: Collection[str]) -> tuple[list[Placed], str | None]:
    """Give machines to the heads of lanes, best head first. If a head finds no machine, its lane is done.

    It ends with the last run that was read of a lane in `cut`, and names that lane: further runs of the lane may go before the
    runs that are left.
    """
    by_lane: dict[str, deque[Record]] = defaultdict(deque)
    for run in runs:
        by_lane[run["lane"]].append(run)
    queue = [(*_precedence(waiting[0]), waiting[0]) for waiting in by_lane.values()]
    heapq.heapify(queue)
    machines = _Machines(idle, {run["pinned_machine_id"] for run in runs})
    chosen: list[Placed] = []
    while queue and len(chosen) < min(len(idle), MOST):
        run = heapq.heappop(queue)[-1]
        machine = machines.take(run)
        if machine is None:
            continue
        chosen.append(Placed(run["id"], run["queued_at"], run["session_id"], _pools(run), machine))
        waiting = by_lane[run["lane"]]
        waiting.popleft()
        if waiting:
            heapq.heappush(queue, (*_precedence(waiting[0]), waiting[0]))
        elif run["lane"] in cut and len(chosen) < min(len(idle), MOST):
            return chosen, run["lane"]
    return chosen, None


def _precedence(run: Record) -> tuple[bool, datetime, UUID]:
    """The lower, the better."""
    return not run["is_priority"], run["queued_at"], run["id"]


def _pools(run: Record) -> frozenset[UUID]:
    """The pools that decide where a run goes: a session's reserved machine and a pinned one win over them."""
    if run["reserved_machine_id"] is not None or run["pinned_machine_id"] is not None:
        return frozenset()
    return frozenset(run["pool_ids"] or ())


class _Machines:
    """Idle machines, taken one after the other."""

    def __init__(self, idle: dict[UUID, Machine], sought: set[UUID | None]) -> None:
        self._left = dict(idle)
        # Machines that other runs ask for by name or by pool go last. No older run waits for another machine because of that.
        self._open = sorted(
            (machine for machine in idle.values() if machine.session_id is None),
            key=lambda machine: (machine.id in sought, len(machine.pools), machine.id),
        )
        self._members: dict[UUID, list[Machine]] = defaultdict(list)
        for machine in self._open:
            for pool in machine.pools:
                self._members[pool].append(machine)
        # Machines are only taken away. So a machine that was skipped for some pools is never looked at again for these pools.
        self._in_pools: dict[frozenset[UUID], Iterator[Machine]] = {}
        self._suiting: dict[frozenset[UUID], bool] = {}

    def take(self, run: Record) -> Machine | None:
        """An eligible machine: the session's reserved one, else the pinned one, else the least sought-after.

        The one that the run avoids is taken only if there is no other.
        """
        machine: Machine | None
        if run["reserved_machine_id"] is not None or run["pinned_machine_id"] is not None:
            machine = self._named(run)
        else:
            pools = _pools(run)
            if pools not in self._in_pools:
                self._in_pools[pools] = self._in_all(pools)
            machine = self._next(pools)
            if machine is not None and machine.id == run["avoided_machine_id"]:
                avoided, machine = machine, self._next(pools)
                if machine is None:
                    machine = avoided
                else:
                    self._in_pools[pools] = chain([avoided], self._in_pools[pools])
        if machine is not None:
            del self._left[machine.id]
        return machine

    def _next(self, pools: frozenset[UUID]) -> Machine | None:
        return next((machine for machine in self._in_pools[pools] if machine.id in self._left), None)

    def suits(self, run: Record) -> bool:
        """Whether a machine is eligible as long as none is taken."""
        if run["reserved_machine_id"] is not None or run["pinned_machine_id"] is not None:
            return self._named(run) is not None
        pools = _pools(run)
        if pools not in self._suiting:
            self._suiting[pools] = any(True for _ in self._in_all(pools))
        return self._suiting[pools]

    def _named(self, run: Record) -> Machine | None:
        if run["reserved_machine_id"] is not None:
            return self._left.get(run["reserved_machine_id"])
        machine = self._left.get(run["pinned_machine_id"])
        return machine if machine is not None and machine.session_id is None else None

    def _in_all(self, pools: frozenset[UUID]) -> Iterator[Machine]:
        """Those of the pool that has the fewest, if they are in the others too."""
        few = min((self._members.get(pool, []) for pool in pools), key=len, default=self._open)
        return (machine for machine in few if pools <= machine.pools)
