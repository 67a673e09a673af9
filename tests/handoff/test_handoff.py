"""A run that gets a machine becomes a workflow, and an executor that waits at Temporal does it."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from app.handoff.temporal import SWEEP_SECONDS
from dev.run import ROOT
from tests.support.client import Client
from tests.support.handoff import HEARTBEAT, HandOff, Note
from tests.support.scheduling import assigned, starts
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.waiting import until

# A run that the sweep saw waiting has a row for so long; it is dropped without a call.
SWEPT = 2 * SWEEP_SECONDS


def ended(client: Client, run_id: str, status: str = "success", seconds: float = 30) -> dict[str, object]:
    def look() -> dict[str, object] | None:
        run = client.get_run(run_id)
        return run if run["status"] not in ("scheduling", "running") else None

    run: dict[str, object] = until(look, seconds, what="the run's end")
    assert run["status"] == status, run
    return run


def test_a_retry_becomes_a_workflow_and_is_done(handoff: HandOff, handing_server: Server, client: Client) -> None:
    machine_id = client.machine()
    handoff.executor(handing_server, client)
    run = handoff.numbered(client, sensitive_input_values={"password": "correct horse"})
    first = ended(client, run["id"])
    assert first["output_data"] == {"number": run["number"], "secrets": 1}
    assert client.retry(run["id"]).status_code == 200
    second = ended(client, run["id"])
    assert (second["attempt"], second["assignment"]) == (2, 2)
    assert [note.number for note in handoff.notes()].count(run["number"]) == 2
    until(lambda: not handoff.stack.sql("SELECT 1 FROM dispatches WHERE machine_id = $1", machine_id), SWEPT)
    for attempt in (1, 2):
        name = f"run-{run['id']}-{attempt}-{attempt}"
        until(lambda name=name: handoff.temporal.command("workflow", "result", "--workflow-id", name) == 0)  # type: ignore[misc]


STOPS: dict[str, Callable[[Client, str], object]] = {
    "a cancel": lambda client, run_id: client.report(run_id, status="cancelled"),
    "a delete": lambda client, run_id: client.delete(f"/v1/runs/{run_id}").raise_for_status(),
    "a retry": lambda client, run_id: (
        client.report(run_id, status="cancelled"),
        client.retry(run_id, input_values={"number": "again"}).raise_for_status(),
    ),
    "an error by somebody else": lambda client, run_id: client.delete(
        f"/v1/machines/{client.get_run(run_id)['assigned_machine_id']}"
    ).raise_for_status(),
}


@pytest.mark.parametrize("what", STOPS)
def test_an_executor_is_called_off_within_a_heartbeat(
    handoff: HandOff, handing_server: Server, client: Client, what: str
) -> None:
    machine_id = client.machine()
    handoff.executor(handing_server, client)
    run = handoff.numbered(client, input_values={"seconds": 60})
    until(lambda: [note for note in handoff.notes() if note.number == run["number"]], 30, what="the beginning")
    stopped = time.time()
    STOPS[what](client, run["id"])

    def called_off() -> list[Note]:
        return [note for note in handoff.notes("called_off") if note.number == run["number"]]

    [note] = until(called_off, what="word of it")
    assert note.at - stopped < HEARTBEAT
    if what == "a retry":
        again = ended(client, run["id"])
        assert (again["attempt"], again["output_data"]) == (2, {"number": "again", "secrets": 0})
    until(lambda: not handoff.stack.sql("SELECT 1 FROM dispatches WHERE machine_id = $1", machine_id), SWEPT)


def test_one_that_waits_for_its_executor_is_called_off_before_it_is_brought(
    handoff: HandOff, handing_server: Server, client: Client
) -> None:
    machine_id = client.machine()
    run = handoff.numbered(client)
    assert assigned(client, run["id"]) == machine_id
    client.report(run["id"], status="cancelled")
    later = handoff.numbered(client)
    assert assigned(client, later["id"]) == machine_id
    handoff.executor(handing_server, client)
    ended(client, later["id"])
    assert run["number"] not in [note.number for note in handoff.notes()]
    until(lambda: not handoff.stack.sql("SELECT 1 FROM dispatches WHERE machine_id = $1", machine_id), SWEPT)


def test_an_executor_that_gives_a_run_up_leaves_an_error(
    handoff: HandOff, handing_server: Server, client: Client
) -> None:
    client.machine()
    handoff.executor(handing_server, client, GIVES_UP="yes")
    run = handoff.numbered(client)
    error = ended(client, run["id"], "error")["error"]
    assert "without a report" in str(error)
    assert len([note for note in handoff.notes() if note.number == run["number"]]) == 1


def test_without_temporal_nothing_is_written_and_nothing_imported(api: Client, stack: Stack) -> None:
    api.machine()
    run_id = starts(api)["id"]
    api.report(run_id, status="cancelled")
    assert not stack.sql("SELECT 1 FROM dispatches")
    imports = (
        "import sys, app.cli, app.main, app.background; print([name for name in sys.modules if 'temporal' in name])"
    )
    found = subprocess.run([sys.executable, "-c", imports], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
