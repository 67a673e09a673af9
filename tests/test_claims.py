"""Once: whatever executors do, late, twice or dead, an attempt is begun by one process, and only that one reports on it."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import httpx
import pytest

from dev.run import ROOT
from tests.support.client import Client
from tests.support.scheduling import assigned
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.stored_state import SOAK, chance
from tests.support.waiting import until

UPLOAD = {"filename": "a", "content": "", "content_type": "a/b", "attachment_type": "output"}
CLAIM, OTHER = str(uuid4()), str(uuid4())


def code(reply: httpx.Response) -> str:
    return "" if reply.is_success else str(reply.json()["code"])


class Desk:
    """A machine with a run that was given to it, and what its executor says of its work."""

    def __init__(self, api: Client) -> None:
        self.api = api
        self.machine = api.machine()
        self.run = api.run()["id"]
        assigned(api, self.run)
        self.about = {"attempt": 1, "assignment": 1, "claim": CLAIM}

    def send(self, **body: object) -> httpx.Response:
        return self.api.patch(f"/v1/runs/{self.run}", json=body)

    def upload(self, **more: object) -> httpx.Response:
        return self.api.post("/v1/run-attachments", json=UPLOAD | {"run_id": self.run} | more)

    def begun(self) -> None:
        assert self.send(status="running", **self.about).is_success


@pytest.fixture
def desk(api: Client) -> Desk:
    return Desk(api)


def test_a_run_counts_how_often_it_was_given_to_a_machine(api: Client) -> None:
    run = api.run()
    assert run["assignment"] == 0
    api.machine()
    assigned(api, run["id"])
    for number in (1, 2, 3):
        assert until(lambda: api.get_run(run["id"])["assigned_machine_id"])
        assert api.get_run(run["id"])["assignment"] == number
        api.report(run["id"], status="running", assignment=number)
        assert api.report(run["id"], status="error")["assignment"] == number
        assert api.json_of(api.retry(run["id"]))["assignment"] == number


def test_the_process_that_begins_an_attempt_is_the_only_one_that_reports_on_it(desk: Desk) -> None:
    desk.begun()
    for claim in (OTHER, None):
        about = desk.about | {"claim": claim}
        for body in ({"status": "running"}, {"status": "success"}, {"status": "error"}, {"output_data": {"a": 1}}, {}):
            # Nothing but a stop can do without it, and a stop with another's claim is another's too.
            if body or claim:
                assert code(desk.send(**body, **about)) == "already_claimed", (body, claim)
        assert code(desk.upload(**about)) == "already_claimed"
    assert desk.api.get_run(desk.run)["output_data"] is None
    assert desk.send(output_data={"a": 1}, **desk.about).is_success
    assert desk.upload(**desk.about).status_code == 201
    assert desk.send(status="success", **desk.about).json()["output_data"] == {"a": 1}


def test_the_same_claim_begins_again(desk: Desk) -> None:
    first = desk.send(status="running", **desk.about)
    again = desk.send(status="running", **desk.about)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json()["started_at"] == first.json()["started_at"]


def test_what_has_ended_is_not_changed_by_another_process(desk: Desk) -> None:
    desk.begun()
    assert desk.send(status="success", output_data={"a": 1}, **desk.about).is_success
    for claim in (OTHER, None):
        late = desk.send(status="success", output_data={"a": 2}, **desk.about | {"claim": claim})
        assert code(late) == "already_claimed"
    assert desk.send(status="success", **desk.about).json()["output_data"] == {"a": 1}


@pytest.mark.parametrize(
    "body", [{"status": "cancelled"}, {"status": "cancelled", "reason": "x"}, {"release_session_after": True}]
)
def test_stopping_a_run_needs_no_claim(desk: Desk, body: dict[str, Any]) -> None:
    desk.begun()
    assert desk.send(**body).is_success
    assert code(desk.send(status="cancelled", **desk.about | {"claim": OTHER})) == "already_claimed"
    assert code(desk.send(status="cancelled", error=["x"])) == "already_claimed"


def test_a_claim_is_taken_only_by_what_begins_the_run(desk: Desk) -> None:
    assert desk.send(input_values={"a": 1}, **desk.about).is_success
    other = desk.about | {"claim": OTHER}
    assert desk.send(status="running", **other).is_success
    assert code(desk.send(status="running", **desk.about)) == "already_claimed"


def test_without_a_claim_everything_is_as_the_vendor_has_it(desk: Desk) -> None:
    for body in ({"status": "running"}, {"status": "running"}, {"output_data": {"a": 1}}):
        assert desk.send(**body).is_success
    assert desk.upload().status_code == 201
    # It was begun, by a process that no claim can be compared with.
    assert code(desk.send(status="running", **desk.about)) == "already_claimed"
    assert code(desk.upload(**desk.about)) == "already_claimed"
    assert desk.send(status="success").is_success
    assert code(desk.send(status="success", **desk.about)) == "already_claimed"


def test_a_claim_says_which_assignment_it_is_for(desk: Desk) -> None:
    for reply in (desk.send(status="running", claim=CLAIM), desk.upload(claim=CLAIM)):
        assert reply.status_code == 422
        assert [item["loc"] for item in reply.json()["detail"]] == [["body", "assignment"]]


@pytest.mark.parametrize("name", ["attempt", "assignment"])
def test_what_is_about_another_attempt_or_assignment_is_refused(desk: Desk, name: str) -> None:
    for number in (0, 2) if name == "assignment" else (2,):
        reply = desk.send(status="running", **desk.about | {name: number})
        assert (code(reply), reply.json()[name]) == (f"{name}_superseded", 1)
        assert code(desk.send(status="running", **{name: number})) == f"{name}_superseded"
    desk.begun()
    assert code(desk.upload(**desk.about | {name: 2})) == f"{name}_superseded"
    assert code(desk.upload(**{name: 2})) == f"{name}_superseded"


def test_a_run_that_was_taken_from_its_machine_is_not_begun_there(desk: Desk, server: Server) -> None:
    """Neither while it waits, nor when it has been placed again."""
    desk.api.json_of(desk.api.patch(f"/v1/machines/{desk.machine}", json={"is_available": False}))
    server.stack.sql("UPDATE runs SET assigned_machine_id = NULL WHERE id = $1", desk.run)
    assert code(desk.send(status="running", **desk.about)) == "assignment_superseded"
    other = desk.api.machine()
    assert assigned(desk.api, desk.run) == other
    late = desk.send(status="running", **desk.about)
    assert (code(late), late.json()["assignment"]) == ("assignment_superseded", 2)
    again = desk.about | {"assignment": 2, "claim": OTHER}
    assert desk.send(status="running", **again).is_success
    assert code(desk.upload(**desk.about)) == "assignment_superseded"
    assert desk.upload(**again).status_code == 201


def test_a_retry_by_the_previous_version_leaves_no_stale_claim(desk: Desk, server: Server) -> None:
    """It knows nothing of claims and leaves the column alone; so does this one."""
    desk.begun()
    assert desk.send(status="error", **desk.about).is_success
    desk.api.json_of(desk.api.retry(desk.run))
    until(lambda: desk.api.get_run(desk.run)["assigned_machine_id"])
    assert code(desk.send(status="running", **desk.about)) == "attempt_superseded"
    assert desk.send(status="running").is_success
    assert desk.send(output_data={"a": 1}).is_success


def test_a_claim_is_shown_nowhere(desk: Desk, server: Server) -> None:
    claim = str(uuid4())
    about = desk.about | {"claim": claim}
    shown = [desk.send(status="running", **about), desk.upload(**about), desk.send(status="error", **about)]
    shown += [desk.send(status="success", **about), desk.api.retry(desk.run)]
    until(lambda: len(desk.api.get(f"/v1/runs/{desk.run}/events").json()["items"]) >= 5)
    paths = ["/v1/runs", "/v1/run-attachments", "/v1/queue", "/v1/events"]
    paths += [f"/v1/runs/{desk.run}{more}" for more in ("", "/attempts", "/events")]
    shown += [desk.api.get(path) for path in paths]
    assert not [reply.url for reply in shown if claim in reply.text]
    assert claim not in server.app.log.read_text()


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_run_says_when_its_executor_reported_last_and_whether_more_reports_are_expected(desk: Desk) -> None:
    def said() -> tuple[str | None, bool]:
        run = desk.api.get_run(desk.run)
        return run["last_report_at"], run["is_reporting"]

    assert said() == (None, False)
    desk.send(status="running")
    started, more = said()
    assert started is not None
    assert not more  # perhaps it reports only its end

    def another_report_shows() -> bool:  # one within 10 ms of the start may be the start itself
        desk.send(run_message_history=[{"role": "assistant", "content": "Still here."}])
        return said()[1]

    until(another_report_shows)
    again, _ = said()
    assert again is not None
    assert again > started
    desk.send(status="error", error=["Broken."])
    assert said() == (again, False)
    desk.api.retry(desk.run)
    assert said() == (None, False)
    assigned(desk.api, desk.run)
    desk.send(status="running", attempt=2, assignment=2, claim=CLAIM)
    assert said()[1]  # who gives a claim can be asked to report


class Fleet:
    """Executor processes, two for each machine, that die and are started again."""

    def __init__(self, server: Server, api: Client, machines: int) -> None:
        self.server, self.api = server, api
        self.begun = server.stack.folder / f"begun-{uuid4().hex}"
        self.begun.touch()
        self._processes: list[tuple[str, str, subprocess.Popen[bytes]]] = []
        for _ in range(machines):
            machine = api.machine()
            key = server.stack.new_key(api.organization, scopes=["runs:read", "runs:execute"], machine_id=machine)
            for _ in range(2):
                self._processes.append((machine, key, self._start(machine, key)))

    def _start(self, machine: str, key: str) -> subprocess.Popen[bytes]:
        environment = {
            "API_URL": self.server.url,
            "API_KEY": key,
            "MACHINE_ID": machine,
            "VAULT_ADDR": "http://127.0.0.1:1",
            "VAULT_TOKEN": "unused",
            "BEGUN": str(self.begun),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.executor_process"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )

    def kill_one(self, dice: random.Random) -> None:
        number = dice.randrange(len(self._processes))
        machine, key, process = self._processes[number]
        process.kill()
        process.wait()
        self._processes[number] = (machine, key, self._start(machine, key))

    def end(self) -> None:
        for _, _, process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def watched(stack: Stack) -> Iterator[Server]:
    """A server that ends runs whose executor says nothing for 3 s."""
    with own_database(stack, "claims") as own:
        started = start_server(own, RUN_SILENCE_SECONDS=3)
        yield started
        started.app.stop()


def test_of_two_processes_on_a_machine_one_begins_a_run_and_none_is_lost(watched: Server) -> None:
    dice = chance("two processes")
    machines, runs = (4, 200) if SOAK else (2, 16)
    with ExitStack() as ending:
        api = ending.enter_context(watched.client())
        fleet = Fleet(watched, api, machines)
        ending.callback(fleet.end)
        workflow = api.workflow()
        ids = [api.run(workflow_id=workflow, input_values={"number": number})["id"] for number in range(runs)]
        kills, waiting, seen = 0, runs, 0

        def began_another() -> bool:
            """Since the last kill: so that the next one hits those who do something, and they get on on a busy machine, too."""
            nonlocal seen
            before, seen = seen, len(fleet.begun.read_bytes())
            return seen > before

        deadline = time.monotonic() + 60 + 2 * runs
        while waiting:
            assert time.monotonic() < deadline, f"{waiting} runs have not ended"
            waiting = sum(
                api.json_of(api.get("/v1/runs", params={"status": status, "limit": 1}))["total"]
                for status in ("scheduling", "running")
            )
            if waiting > 2 and began_another():
                fleet.kill_one(dice)
                kills += 1
            time.sleep(dice.uniform(0, 0.5))
        ended = [api.get_run(run_id) for run_id in ids]
    begun = fleet.begun.read_text().split()
    silenced = sum(run["status"] == "error" for run in ended)
    print(f"{runs} runs, {len(begun)} begun, {kills} kills, {silenced} silenced")  # noqa: T201 - for `make soak`
    assert len(begun) == len(set(begun)), "a run was begun twice"
    assert {run["status"] for run in ended} <= {"success", "error"}
    for run in ended:
        if run["status"] == "error":
            assert "sent no report for 3 seconds" in run["error"][0]
    # A process may die between its report and its first line.
    assert {run["input_values"]["number"] for run in ended if run["status"] == "success"} <= {int(one) for one in begun}
    assert kills
