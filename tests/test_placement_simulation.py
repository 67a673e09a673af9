"""Placement under fire: two replicas, random work, and after every step a brute-force judge that shares no code with it.

Both replicas are whole applications in this process, driven by requests, on one real PostgreSQL. While requests run, a
watcher looks for states that must never exist. After each step the judge waits for the queue to settle and checks what was
assigned. The seed is printed; SIMULATION_SEED repeats a run's choices and SOAK_SECONDS makes it long.
"""

import asyncio
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.scheduling import FORBIDDEN, Replica
from tests.support.stack import Stack
from tests.support.waiting import NEVER

SECONDS = float(os.environ.get("SOAK_SECONDS", "10"))
ORGANIZATIONS = 2
MACHINES = 14  # per organization
QUEUE = 60  # waiting runs per organization that the actions steer to
SETTLE_SECONDS = 5.0  # how long the judge waits on a busy machine; the longest wait is printed

# --- what the database shows ------------------------------------------------------------------------------------------

RUNS = """
SELECT id, organization_id, status, pinned_machine_id AS pinned, assigned_machine_id AS assigned, pool_ids, session_id,
       is_priority, queued_at, status IN ('scheduling', 'running') AS active, assignment,
       claim IS NOT NULL AND claim_attempt = attempt AS is_claimed
FROM runs WHERE organization_id = ANY($1::text[])
  AND (status IN ('scheduling', 'running') OR id = ANY(ARRAY(
      SELECT id FROM runs WHERE organization_id = ANY($1::text[]) AND status IN ('success', 'error', 'cancelled', 'task_failed')
      ORDER BY random() LIMIT 40)))
"""

MACHINES_NOW = """
SELECT id, organization_id, status = 'connected' AND is_available AS up, reserved_session_id AS reserved,
       ARRAY(SELECT pool_id FROM pool_machines WHERE machine_id = machines.id) AS pools
FROM machines WHERE organization_id = ANY($1::text[])
"""


# What silence should have ended: machines that nobody has heard of, runs that nobody has begun, and reservations that a session
# which has not begun has left behind.
NOT_NOTICED = """
SELECT 'a silent machine' AS what, id FROM machines
WHERE organization_id = ANY($1::text[]) AND look_at <= now() - interval '1 second'
UNION ALL
SELECT 'a run that is not begun', id FROM runs
WHERE organization_id = ANY($1::text[]) AND status = 'scheduling' AND assigned_machine_id IS NOT NULL
  AND awaited_since < now() - interval '1 hour'
UNION ALL
SELECT 'a machine that is disconnected and awaited', id FROM machines
WHERE organization_id = ANY($1::text[]) AND silenced_at IS NOT NULL AND status <> 'disconnected'
"""
TAKEN_BACK = "SELECT count(*) FROM run_events WHERE organization_id = ANY($1::text[]) AND event = 'unassigned'"
CLAIM = str(uuid4())


@dataclass(frozen=True)
class Run:
    id: UUID
    organization_id: str
    status: str
    pinned: UUID | None
    assigned: UUID | None
    pool_ids: list[UUID] | None
    session_id: UUID | None
    is_priority: bool
    queued_at: Any
    active: bool
    assignment: int
    is_claimed: bool

    @property
    def waits(self) -> bool:
        return self.status == "scheduling" and self.assigned is None

    @property
    def busy(self) -> bool:
        return self.status == "running" or (self.status == "scheduling" and self.assigned is not None)

    @property
    def rank(self) -> tuple[bool, Any, UUID]:
        return not self.is_priority, self.queued_at, self.id


@dataclass(frozen=True)
class Machine:
    id: UUID
    organization_id: str
    up: bool
    reserved: UUID | None
    pools: list[UUID]


@dataclass
class State:
    """One consistent look at the database."""

    runs: dict[UUID, Run]
    machines: dict[UUID, Machine]

    def reserved_for(self, session_id: UUID | None) -> Machine | None:
        held = [machine for machine in self.machines.values() if session_id and machine.reserved == session_id]
        return held[0] if held else None

    def suits(self, run: Run, machine: Machine) -> bool:
        """The eligibility rules of a machine for a run, whether or not it is busy."""
        if machine.organization_id != run.organization_id or not machine.up:
            return False
        if machine.reserved is not None and machine.reserved != run.session_id:
            return False
        reserved = self.reserved_for(run.session_id)
        if reserved is not None:
            return machine == reserved
        if run.pinned is not None:
            return machine.id == run.pinned
        return all(pool in machine.pools for pool in run.pool_ids or [])

    def may_start(self, run: Run) -> bool:
        """Whether it is this run's turn in its session."""
        if run.session_id is None:
            return run.waits
        others = [other for other in self.runs.values() if other.session_id == run.session_id and other.id != run.id]
        ahead = [other for other in others if other.waits and (other.queued_at, other.id) < (run.queued_at, run.id)]
        return run.waits and not ahead and not any(other.busy for other in others)

    def idle(self) -> list[Machine]:
        busy = {run.assigned for run in self.runs.values() if run.active}
        return [machine for machine in self.machines.values() if machine.id not in busy]

    def overlooked(self) -> list[tuple[UUID, UUID]]:
        """Waiting runs that could start, and an idle machine for each."""
        idle = [machine for machine in self.idle() if machine.up]
        waiting = [run for run in self.runs.values() if run.waits and idle and self.may_start(run)]
        return [(run.id, machine.id) for run in waiting for machine in idle if self.suits(run, machine)][:5]


@dataclass
class Touched:
    """What the requests of a step may have changed: the judge does not compare these with the step before."""

    ids: set[UUID] = field(default_factory=set)

    def __contains__(self, value: UUID | None) -> bool:
        return value in self.ids

    def add(self, *values: UUID | None) -> None:
        self.ids.update(value for value in values if value is not None)


def wrongly_assigned(before: State, now: State, touched: Touched) -> Iterator[str]:
    """Assignments of this step that broke a rule, or went before a run with a better claim to the same machine."""
    for run in now.runs.values():
        old = before.runs.get(run.id)
        if not run.active or run.assigned is None or (old is not None and old.active and old.assigned == run.assigned):
            continue
        machine, was = now.machines.get(run.assigned), before.machines.get(run.assigned)
        if machine is None or was is None or machine.id in touched or run.session_id in touched:
            continue
        if (
            was.up and not machine.up
        ):  # it fell silent with the run; that can be noticed a second after the step that caused it
            continue
        if not now.suits(run, machine):
            yield f"{run} does not suit {machine}"
        if run.session_id is not None and machine.reserved != run.session_id:
            yield f"{run} did not reserve {machine}"
        for other in now.runs.values():
            if better_claim(other, run, was, before, now, touched):
                yield f"{run} went before {other} on {machine}"


def better_claim(other: Run, run: Run, machine: Machine, before: State, now: State, touched: Touched) -> bool:
    """Whether `other`, which waited all the time, should have got the machine that `run` got."""
    standing = before.runs.get(other.id)
    if standing is None or not standing.waits or not other.waits or other.id in touched or other.session_id in touched:
        return False
    if other.session_id is not None and other.session_id == run.session_id:
        return (other.queued_at, other.id) < (run.queued_at, run.id)
    if other.rank > run.rank or machine.reserved is not None or not before.suits(standing, machine):
        return False
    reserved, was_reserved = now.reserved_for(other.session_id), before.reserved_for(other.session_id)
    if (reserved and reserved.id) != (was_reserved and was_reserved.id):
        return False
    return before.may_start(standing) and now.may_start(other)


# --- the actions ------------------------------------------------------------------------------------------------------


class Simulation:
    """Chooses actions by what the database shows, and sends them to either replica."""

    def __init__(
        self, replicas: list[Replica], keys: dict[str, str], url: str, look: asyncpg.Connection, seed: int
    ) -> None:
        self.replicas = replicas
        self.keys = keys
        self.url = url
        self.look = look
        self.random = random.Random(seed)
        self.workflows: dict[str, str] = {}
        self.pools: dict[str, list[UUID]] = {organization: [] for organization in keys}
        self.state = State({}, {})
        self.touched = Touched()
        self.done: Counter[str] = Counter()
        self.assigned = 0
        self.looks = 0
        self.longest_wait = 0.0

    async def call(self, organization: str, method: str, path: str, body: object = None, *expected: int) -> Any:
        status, reply = await self.random.choice(self.replicas).call(self.keys[organization], method, path, body)
        assert status in expected, (method, path, body, status, reply)
        self.done[f"{method} {status}"] += 1
        return reply

    async def set_up(self) -> None:
        for organization in self.keys:
            workflow = await self.call(organization, "POST", "/v1/workflows", {"main_prompt": "Do it."}, 201)
            self.workflows[organization] = workflow["id"]
            for _ in range(4):
                pool = await self.call(organization, "POST", "/v1/pools", {"name": "pool"}, 201)
                self.pools[organization].append(UUID(pool["id"]))
            for _ in range(MACHINES):
                await self.add_machine(organization)
        self.state = await self.read()

    async def read(self) -> State:
        async with self.look.transaction(isolation="repeatable_read", readonly=True):
            runs = await self.look.fetch(RUNS, list(self.keys))
            machines = await self.look.fetch(MACHINES_NOW, list(self.keys))
        return State({row["id"]: Run(**row) for row in runs}, {row["id"]: Machine(**row) for row in machines})

    async def step(self, *, deaths: bool) -> None:
        """Some actions at once; then wait until nothing startable waits, and judge."""
        before, self.touched = self.state, Touched()
        actions = [self.choose(deaths=deaths) for _ in range(self.random.choice((1, 1, 2, 4, 8, 16)))]
        await asyncio.gather(*actions)
        acted = time.monotonic()
        while True:
            self.state = await self.read()
            overlooked = self.state.overlooked() or await self.look.fetch(NOT_NOTICED, list(self.keys))
            waited = time.monotonic() - acted
            if not overlooked:
                break
            assert waited < SETTLE_SECONDS, f"idle machines for runs that could start: {overlooked}"
            await asyncio.sleep(0.005)
        self.longest_wait = max(self.longest_wait, waited)
        wrong = list(wrongly_assigned(before, self.state, self.touched))
        assert not wrong, wrong[0]
        known = {run.id: run.assigned for run in before.runs.values() if run.active}
        self.assigned += sum(
            run.active and run.assigned is not None and known.get(run.id) != run.assigned
            for run in self.state.runs.values()
        )

    async def watch(self) -> None:
        """Looks for forbidden states while requests and passes are under way."""
        connection = await asyncpg.connect(self.url)
        try:
            while True:
                wrong = await connection.fetch(FORBIDDEN)
                assert not wrong, [dict(row) for row in wrong]
                self.looks += 1
                await asyncio.sleep(0.02)
        finally:
            await connection.close()

    # What to do next -----------------------------------------------------------------------------------------------

    async def choose(self, *, deaths: bool) -> None:
        organization = self.random.choice(list(self.keys))
        runs = [run for run in self.state.runs.values() if run.organization_id == organization]
        machines = [machine for machine in self.state.machines.values() if machine.organization_id == organization]
        waiting = [run for run in runs if run.waits]
        taken = [run for run in runs if run.status == "scheduling" and run.assigned is not None]
        running = [run for run in runs if run.status == "running"]
        ended = [run for run in runs if not run.active]
        sessions = [run.session_id for run in runs if run.session_id is not None]
        crowded = len(waiting) > QUEUE
        options: list[tuple[float, Any]] = [
            (0 if crowded else 5, lambda: self.create(organization, machines, sessions)),
            (0 if crowded else 1, lambda: self.create_bulk(organization, machines, sessions)),
            (10 if taken else 0, lambda: self.take(self.random.choice(taken))),
            (12 if running else 0, lambda: self.end(self.random.choice(running))),
            (6 if crowded else 1 if waiting else 0, lambda: self.cancel(self.random.choice(waiting or taken))),
            (1 if taken else 0, lambda: self.cancel(self.random.choice(taken))),
            (1 if runs else 0, lambda: self.delete(self.random.choice(runs))),
            (0 if crowded else 10 if ended else 0, lambda: self.retry(self.random.choice(ended), machines, sessions)),
            (4 if machines else 0, lambda: self.switch(self.random.choice(machines))),
            (2 if machines else 0, lambda: self.move(self.random.choice(machines))),
            (2, lambda: self.change_pool(organization, machines)),
            (1 if machines else 0, lambda: self.release(self.random.choice(machines))),
            (0.3 if machines else 0, lambda: self.remove_machine(self.random.choice(machines))),
            (4 if len(machines) < MACHINES else 0, lambda: self.add_machine(organization)),
            (0.1, lambda: self.replace_pool(organization)),
            (2 if deaths and running else 0, lambda: self.fall_silent(self.random.choice(running))),
            (2 if deaths and machines else 0, lambda: self.lose_a_wake_up(self.random.choice(machines))),
            (3 if deaths and taken else 0, lambda: self.never_begin(self.random.choice(taken))),
            (2 if deaths and machines else 0, lambda: self.go_quiet(self.random.choice(machines))),
            (5 if deaths and machines else 0, lambda: self.look_for_work(self.random.choice(machines))),
        ]
        await self.random.choices([act for _, act in options], [weight for weight, _ in options])[0]()

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def targets(self, organization: str, machines: list[Machine], sessions: list[UUID]) -> dict[str, object]:
        """Where a run may go."""
        options: dict[str, object] = {}
        if machines and self.maybe(0.25):
            options["machine_id"] = str(self.random.choice(machines).id)
        if self.maybe(0.35):
            count = self.random.choice((0, 1, 1, 2))
            options["pool_ids"] = [str(pool) for pool in self.random.sample(self.pools[organization], count)]
        if sessions and self.maybe(0.3):
            session_id = self.random.choice(sessions)
            self.touched.add(session_id)
            options["session_id"] = str(session_id)
        elif self.maybe(0.1):
            options["start_session"] = True
        if self.maybe(0.15):
            options["release_session_after"] = self.maybe(0.7)
        if self.maybe(0.2):
            options["is_priority"] = self.maybe(0.7)
        return options

    async def create(self, organization: str, machines: list[Machine], sessions: list[UUID]) -> None:
        body = {"workflow_id": self.workflows[organization], **self.targets(organization, machines, sessions)}
        # 404: the machine, the pool or the last run of the session went in this very step.
        await self.call(organization, "POST", "/v1/runs", body, 201, 404)

    async def create_bulk(self, organization: str, machines: list[Machine], sessions: list[UUID]) -> None:
        body = {"workflow_id": self.workflows[organization], **self.targets(organization, machines, sessions)}
        body["count"] = self.random.randint(2, 20)
        await self.call(organization, "POST", "/v1/runs/bulk", body, 201, 404)

    async def retry(self, run: Run, machines: list[Machine], sessions: list[UUID]) -> None:
        options = self.targets(run.organization_id, machines, sessions) if self.maybe(0.5) else {}
        if self.maybe(0.2):
            options["reuse_session"] = False
        self.touched.add(run.id, run.session_id)
        await self.call(run.organization_id, "POST", f"/v1/runs/{run.id}/retry", options, 200, 404, 409)

    async def take(self, run: Run) -> None:
        self.touched.add(run.id)
        body: dict[str, object] = {"status": "running"}
        if self.maybe(0.6):
            body |= {"assignment": run.assignment, "claim": CLAIM}
        await self.call(run.organization_id, "PATCH", f"/v1/runs/{run.id}", body, 200, 404, 409)

    async def end(self, run: Run) -> None:
        body: dict[str, object] = {"status": self.random.choice(("success", "success", "error", "cancelled"))}
        if self.maybe(0.1):
            body["release_session_after"] = True
        self.touched.add(run.id, run.session_id, run.assigned if run.session_id else None)
        if run.is_claimed:
            body |= {"assignment": run.assignment, "claim": CLAIM}
        await self.call(run.organization_id, "PATCH", f"/v1/runs/{run.id}", body, 200, 404, 409)

    async def cancel(self, run: Run) -> None:
        self.touched.add(run.id, run.session_id)
        await self.call(run.organization_id, "PATCH", f"/v1/runs/{run.id}", {"status": "cancelled"}, 200, 404, 409)

    async def delete(self, run: Run) -> None:
        self.touched.add(run.id, run.session_id)
        await self.call(run.organization_id, "DELETE", f"/v1/runs/{run.id}", None, 204, 404)

    async def switch(self, machine: Machine) -> None:
        """Disconnect, come back, or become unavailable."""
        up = self.maybe(0.7)
        body = {"status": "connected" if up or self.maybe(0.5) else "disconnected", "is_available": up}
        self.touched.add(machine.id)
        await self.call(machine.organization_id, "PATCH", f"/v1/machines/{machine.id}", body, 200, 404)

    async def move(self, machine: Machine) -> None:
        pools = self.random.sample(self.pools[machine.organization_id], self.random.randint(0, 3))
        self.touched.add(machine.id)
        body = {"pool_ids": [str(pool) for pool in pools]}
        await self.call(machine.organization_id, "PUT", f"/v1/machines/{machine.id}/pools", body, 200, 404)

    async def change_pool(self, organization: str, machines: list[Machine]) -> None:
        chosen = self.random.sample(machines, min(len(machines), self.random.randint(1, 3)))
        self.touched.add(*(machine.id for machine in chosen))
        method = self.random.choice(("POST", "POST", "DELETE"))
        path = f"/v1/pools/{self.random.choice(self.pools[organization])}/machines"
        await self.call(
            organization, method, path, {"machine_ids": [str(machine.id) for machine in chosen]}, 200, 204, 404
        )

    async def replace_pool(self, organization: str) -> None:
        pool_id = self.pools[organization].pop(0)
        pool = await self.call(organization, "POST", "/v1/pools", {"name": "pool"}, 201)
        self.pools[organization].append(UUID(pool["id"]))
        self.touched.add(*(machine.id for machine in self.state.machines.values() if pool_id in machine.pools))
        await self.call(organization, "DELETE", f"/v1/pools/{pool_id}", None, 204)

    async def release(self, machine: Machine) -> None:
        """End the session on a machine by hand."""
        self.touched.add(machine.id, machine.reserved)
        runs = self.state.runs.values()
        self.touched.add(*(run.id for run in runs if run.session_id and run.session_id == machine.reserved))
        body = {"reserved_session_id": None}
        await self.call(machine.organization_id, "PATCH", f"/v1/machines/{machine.id}", body, 200, 404)

    async def add_machine(self, organization: str) -> None:
        body = {"fingerprint": secrets.token_hex(4), "unkey_key_id": "key"}
        machine = await self.call(organization, "POST", "/v1/machines", body, 201)
        pools = [str(pool) for pool in self.random.sample(self.pools[organization], self.random.randint(0, 3))]
        # 404: another request of this step deleted one of the pools.
        await self.call(organization, "PUT", f"/v1/machines/{machine['id']}/pools", {"pool_ids": pools}, 200, 404)

    async def remove_machine(self, machine: Machine) -> None:
        self.touched.add(machine.id, machine.reserved)
        self.touched.add(*(run.id for run in self.state.runs.values() if machine.id in (run.pinned, run.assigned)))
        await self.call(machine.organization_id, "DELETE", f"/v1/machines/{machine.id}", None, 204, 404)

    async def fall_silent(self, run: Run) -> None:
        """Its executor died an hour ago."""
        self.touched.add(run.id, run.session_id, run.assigned)
        await self.write(
            "UPDATE runs SET reported_at = now() - interval '2 hours' WHERE id = $1 AND status = 'running'", run.id
        )

    async def never_begin(self, run: Run) -> None:
        """It was given to its machine two hours ago. What happens depends on how the machine's last run was begun."""
        self.touched.add(run.id, run.session_id, run.assigned)
        await self.write(
            "UPDATE runs SET awaited_since = now() - interval '2 hours'"
            " WHERE id = $1 AND status = 'scheduling' AND assigned_machine_id IS NOT NULL",
            run.id,
        )

    async def go_quiet(self, machine: Machine) -> None:
        """Its executor died two hours ago, if it ever had one."""
        self.touched.add(machine.id)
        await self.write(
            "UPDATE machines SET look_at = now(), last_seen = now() - interval '2 hours'"
            " WHERE id = $1 AND look_at IS NOT NULL",
            machine.id,
        )

    async def look_for_work(self, machine: Machine) -> None:
        """A sign of life. A machine that was disconnected only because it gave none is connected by it."""
        self.touched.add(machine.id)
        path = f"/v1/runs?machine_id={machine.id}&status=scheduling"
        await self.call(machine.organization_id, "GET", path, None, 200)

    async def lose_a_wake_up(self, machine: Machine) -> None:
        """A replica committed a change and died before it woke its background task."""
        self.touched.add(machine.id)
        await self.write(
            "UPDATE machines SET status = 'connected', silenced_at = NULL, is_available = true WHERE id = $1",
            machine.id,
        )

    async def write(self, statement: str, *arguments: object) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement, *arguments)
        finally:
            await connection.close()


@pytest.mark.parametrize(
    ("deaths", "period"),
    [
        # A period longer than the test: every assignment is owed to a wake-up after a commit.
        pytest.param(False, NEVER, id="wake-ups alone"),
        # Executors die and wake-ups get lost: what is left is found within a period.
        pytest.param(True, 0.3, id="deaths and lost wake-ups"),
    ],
)
def test_simulation(stack: Stack, *, deaths: bool, period: float) -> None:
    seed = int(os.environ.get("SIMULATION_SEED") or secrets.randbits(32))
    print(f"SIMULATION_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
    settings: dict[str, object] = {"BACKGROUND_PERIOD_SECONDS": period}
    for name in ("RUN_SILENCE_SECONDS", "MACHINE_SILENCE_SECONDS", "START_TIMEOUT_SECONDS"):
        settings[name] = 3600 if deaths else 0
    if (
        not deaths
    ):  # the plans of a database with many more machines: the order of a join's rows is no longer its input's
        settings["DATABASE_URL"] = f"{stack.postgres.app_url}?options=-c%20enable_nestloop%3Doff"
    names = [f"simulation-{secrets.token_hex(4)}" for _ in range(ORGANIZATIONS)]
    keys = {name: stack.new_key(name) for name in names}
    asyncio.run(simulate(stack, settings, keys, seed, deaths=deaths))


async def simulate(stack: Stack, settings: dict[str, object], keys: dict[str, str], seed: int, *, deaths: bool) -> None:
    url = stack.postgres.url
    look = await asyncpg.connect(url)
    replica = Replica.run
    try:
        async with replica(stack, **settings) as one, replica(stack, **settings) as two, asyncio.TaskGroup() as group:
            simulation = Simulation([one, two], keys, url, look, seed)
            await simulation.set_up()
            watcher = group.create_task(simulation.watch())
            steps, until = 0, time.monotonic() + SECONDS
            while time.monotonic() < until:
                await simulation.step(deaths=deaths)
                steps += 1
            watcher.cancel()
            events = await look.fetch(TAKEN_BACK, list(keys))
    finally:
        await look.close()
        await asyncio.sleep(0)  # the transports of what was closed are only now let go
    print(  # noqa: T201 - as above
        f"{steps} steps, {simulation.done.total()} requests {dict(simulation.done)}, {simulation.assigned} assignments,"
        f" {simulation.looks} looks for forbidden states, {events[0][0]} runs taken from machines,"
        f" longest wait of a startable run {simulation.longest_wait * 1000:.0f} ms"
    )
    assert simulation.assigned > steps // 4, "the simulation hardly assigned anything: it proves nothing"
    assert deaths == (events[0][0] > 0), "runs that are not begun are placed again, and only those"
