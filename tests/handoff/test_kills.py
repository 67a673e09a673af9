"""Whatever is killed while runs are handed over and worked on: none is lost, and none is begun twice."""

import asyncio
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from temporalio.client import Client as Temporal

from app.handoff import temporal as handing
from app.handoff.temporal import Dispatcher
from app.services import Services
from tests.support.client import Client
from tests.support.faults import Plan, dispatch_as_process
from tests.support.handoff import HEARTBEAT, HandOff
from tests.support.scheduling import assigned
from tests.support.server import Server, start_server
from tests.support.stack import own_database, settings_of
from tests.support.stored_state import SOAK
from tests.support.waiting import until

RUNS = 200 if SOAK else 16
MACHINES = 6
SHARES = (0.1, 0.3, 0.5, 0.7) if SOAK else (0.3,)  # of the runs begun, when something is killed
ENDED = ("success", "error", "cancelled")


class Storm:
    """Runs on a few machines, done by two executor processes, while something is killed."""

    def __init__(self, handoff: HandOff, server: Server, client: Client) -> None:
        self.handoff, self.server, self.client = handoff, server, client
        for _ in range(MACHINES):
            client.machine()
        self.executors = [handoff.executor(server, client) for _ in range(2)]
        workflow_id = client.workflow()
        self.numbers: dict[str, str] = {}
        for number in range(RUNS):
            name = f"{client.organization}-{number}"
            body = {"workflow_id": workflow_id, "input_values": {"number": name, "seconds": 0.05 + number % 4 / 10}}
            self.numbers[str(client.json_of(client.post("/v1/runs", json=body), 201)["id"])] = name

    def begun(self) -> Counter[str]:
        return Counter(note.number for note in self.handoff.notes() if note.number in self.numbers.values())

    def when_begun(self, share: float) -> None:
        """Wait until so many have been begun."""
        until(lambda: len(self.begun()) >= share * RUNS, 60, what=f"{share:.0%} begun")

    def ends(self, seconds: float = 60) -> list[dict[str, object]]:
        """All runs, ended; none begun twice, and what succeeded was begun."""

        def statuses() -> list[dict[str, object]]:
            rows = self.handoff.stack.sql(
                "SELECT id::text, status, error, ended_at FROM runs WHERE organization_id = $1",
                self.client.organization,
            )
            return rows if all(row["status"] in ENDED for row in rows) else []

        rows = until(statuses, seconds * (4 if SOAK else 1), what="every run's end")
        begun = self.begun()
        assert max(begun.values()) == 1, "a run was begun twice"
        assert len(rows) == RUNS, "a run is lost"
        for row in rows:
            if row["status"] == "success":
                assert begun[self.numbers[row["id"]]] == 1
        print(f"{RUNS} runs, {len(begun)} begun, {Counter(row['status'] for row in rows)}")
        return list(rows)


@pytest.fixture
def storm(handoff: HandOff, handing_server: Server, client: Client) -> Storm:
    return Storm(handoff, handing_server, client)


def all_succeed(storm: Storm) -> None:
    assert Counter(row["status"] for row in storm.ends()) == {"success": RUNS}


def test_the_executors(storm: Storm) -> None:
    """What an executor had begun ends in an error within two heartbeats; what it had not is delivered again."""
    died: list[float] = []
    for share in SHARES:
        storm.when_begun(share)
        storm.executors.pop(0).kill()
        died.append(time.time())
        storm.executors.append(storm.handoff.executor(storm.server, storm.client))
    ended = storm.ends()
    errors = [row for row in ended if row["status"] == "error"]
    assert len(errors) <= len(SHARES) * MACHINES, "only what they had in hand"
    for row in errors:
        assert "no sign of life" in str(row["error"])
        took = row["ended_at"].timestamp() - max(at for at in died if at < row["ended_at"].timestamp())  # type: ignore[attr-defined]
        assert took < 2 * HEARTBEAT, took


def test_temporal(storm: Storm) -> None:
    for share in SHARES:
        storm.when_begun(share)
        storm.handoff.temporal.kill()
        storm.handoff.temporal.start()
    rows = storm.ends()
    assert sum(row["status"] == "error" for row in rows) <= 2 * MACHINES, (
        "an outage longer than a heartbeat costs an attempt"
    )


def test_temporal_and_its_database(storm: Storm, monkeypatch: pytest.MonkeyPatch) -> None:
    storm.when_begun(0.3)
    storm.handoff.temporal.kill()
    storm.handoff.temporal.wipe()
    storm.handoff.temporal.start()
    # Replicas do the same every 20 s.
    monkeypatch.setattr(handing, "SWEEP_SECONDS", 1.0)

    async def sweep() -> None:
        services = Services.open(settings_of(storm.handoff.stack, **storm.handoff.settings))
        try:
            await Dispatcher(services).sweep()
        finally:
            await services.close()

    asyncio.run(sweep())
    all_succeed(storm)


def test_the_workflow_worker(storm: Storm) -> None:
    for share in SHARES:
        storm.when_begun(share)
        storm.handoff.workers.pop().kill()
        storm.handoff.worker()
    all_succeed(storm)


def test_all_connections_to_the_database(storm: Storm) -> None:
    for share in SHARES:
        storm.when_begun(share)
        storm.handoff.stack.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    all_succeed(storm)


def test_a_replica(handoff: HandOff, handing_server: Server, client: Client) -> None:
    """The one that runs were sent to, and that placed and dispatched some; executors report to the other."""
    other = handoff.server()
    storm = Storm(handoff, handing_server, client)
    for share in SHARES:
        storm.when_begun(share)
        other.app.kill()
        other = handoff.server()
    all_succeed(storm)
    other.app.stop()


def test_the_dispatcher_at_every_point(handoff: HandOff) -> None:
    """Before Temporal is told, between that and the mark, and around: each run is begun once.

    The executor is that of a machine, with a queue and a key of its own.
    """
    with own_database(handoff.stack, "dispatcher") as own, ExitStack() as parts:
        scene = HandOff(own, handoff.temporal, parts)
        server = start_server(own)  # it places runs, and hands nothing over
        parts.callback(server.app.stop)
        client = parts.enter_context(server.client())
        scene.settings["TEMPORAL_TASK_QUEUE"] = "machine-{machine_id}"
        machine_id = client.machine()
        key = own.new_key(client.organization, scopes=("runs:read", "runs:execute"), machine_id=machine_id)
        scene.executor(server, client, MACHINE_ID=machine_id, API_KEY=key)

        def place() -> dict[str, Any]:
            run = scene.numbered(client)
            assigned(client, run["id"])
            own.sql(
                "INSERT INTO dispatches (run_id, attempt, assignment, kind, machine_id, organization_id)"
                " SELECT id, attempt, assignment, 'start', assigned_machine_id, organization_id FROM runs WHERE id = $1",
                run["id"],
            )
            return run

        def done(run: dict[str, Any]) -> None:
            until(lambda: client.get_run(run["id"])["status"] == "success")
            assert [note.number for note in scene.notes()].count(run["number"]) == 1
            assert not own.sql("SELECT 1 FROM dispatches")

        first = place()
        passed = dispatch_as_process(own, Plan(), **scene.settings)
        done(first)
        points = ["handoff.lease after#1", "start before#1", "start after#1", "handoff.settle after#1"]
        assert set(points) <= set(passed)
        for point in points:
            run = place()
            dispatch_as_process(own, Plan(point), **scene.settings)
            own.sql("UPDATE dispatches SET due_at = now()")  # the lease has run out
            dispatch_as_process(own, Plan(), **scene.settings)
            done(run)


def test_a_row_that_breaks_holds_up_no_other(handoff: HandOff, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever nobody foresaw happens to one; the other is told, and that one again, later."""
    with own_database(handoff.stack, "breaking") as own, ExitStack() as parts:
        server = start_server(own)  # it places runs, and hands nothing over
        parts.callback(server.app.stop)
        client = parts.enter_context(server.client())
        for _ in range(2):
            client.machine()
        bad, good = (str(client.run()["id"]) for _ in range(2))
        for run_id in (bad, good):
            assigned(client, run_id)
            own.sql(
                "INSERT INTO dispatches (run_id, attempt, assignment, kind, machine_id, organization_id)"
                " SELECT id, attempt, assignment, 'start', assigned_machine_id, organization_id FROM runs"
                " WHERE id = $1::text::uuid",
                run_id,
            )
        original = Temporal.start_workflow
        told: list[str] = []

        async def start(*args: Any, **named: Any) -> Any:
            if bad in named["id"] and not told:
                raise LookupError
            handle = await original(*args, **named)
            told.append(named["id"])
            return handle

        monkeypatch.setattr(Temporal, "start_workflow", start)

        async def hand_over() -> None:
            services = Services.open(settings_of(own, **handoff.settings))
            try:
                await Dispatcher(services).round()
            finally:
                await services.close()

        asyncio.run(hand_over())
        assert told == [f"run-{good}-1-1"]
        left = "SELECT run_id::text, failures FROM dispatches"
        assert own.sql(left) == [{"run_id": bad, "failures": 1}]
        own.sql("UPDATE dispatches SET due_at = now()")
        asyncio.run(hand_over())
        assert told == [f"run-{good}-1-1", f"run-{bad}-1-1"]
        assert not own.sql(left)
