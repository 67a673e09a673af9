"""How long things stay: what goes by age names nothing twice and leaves nothing behind."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from app.runs.retention import WHY
from tests.support.client import Client, file_input, secret_path
from tests.support.scrapes import scrape
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.stored_state import assert_nothing_lost
from tests.support.waiting import until

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def keeping(stack: Stack) -> Iterator[Server]:
    """A server that keeps ended runs and attempts for 30 days, attempts with their outputs."""
    with own_database(stack, "retention") as own:
        started = start_server(own, RUN_RETENTION_DAYS=30, ATTEMPT_RETENTION_DAYS=30, ATTEMPT_OUTPUTS="all")
        yield started
        started.app.stop()


@pytest.fixture
def kept(keeping: Server) -> Iterator[Client]:
    with keeping.client() as client:
        yield client


def ended_days_ago(stack: Stack, run_id: str, days: int) -> None:
    stack.sql("UPDATE runs SET changed_at = now() - make_interval(days => $2) WHERE id = $1", run_id, days)


def gone(api: Client, run_id: str) -> bool:
    return api.get(f"/v1/runs/{run_id}").status_code == 404


def test_an_old_run_goes_with_all_that_it_names(kept: Client, keeping: Server) -> None:
    stack = keeping.stack
    old = kept.finished("task_failed", sensitive_input_values={"password": "old"}, file_inputs=[file_input()])
    young = kept.finished()
    active = kept.run()
    stack.sql("UPDATE runs SET queued_at = now() - interval '1 year' WHERE id = $1", active["id"])
    ended_days_ago(stack, young["id"], 29)
    ended_days_ago(stack, old["id"], 31)
    until(lambda: gone(kept, old["id"]))
    assert not gone(kept, young["id"])
    assert not gone(kept, active["id"])
    assert stack.sql("SELECT 1 FROM run_attachments WHERE run_id = $1", old["id"]) == []
    until(
        lambda: stack.secret(secret_path(old)) is None, what="the secret is destroyed, though it was kept for a retry"
    )
    until(lambda: not stack.blobs(f"{kept.organization}/{old['id']}"), what="its files are deleted")
    assert_nothing_lost(stack, kept.organization)
    events = until(lambda: kept.json_of(kept.get(f"/v1/runs/{old['id']}/events"))["items"])
    assert (events[-1]["event"], events[-1]["reason"], events[-1]["key_id"]) == ("deleted", WHY.format(30), None)


def test_a_wrong_clock_of_an_executor_deletes_nothing(kept: Client, keeping: Server) -> None:
    """Reported times are shown and never trusted: neither early ones, nor late ones that would keep a run for ever."""
    long_ago, far_ahead = "2000-01-01T00:00:00Z", "2999-01-01T00:00:00Z"
    early = kept.run()["id"]
    kept.report(early, status="running", started_at=long_ago)
    assert kept.report(early, status="success", ended_at=long_ago)["ended_at"] == long_ago
    assert kept.report(early, ended_at=long_ago)["ended_at"] == long_ago
    late = kept.run()["id"]
    kept.report(late, status="running")
    kept.report(late, status="error", ended_at=far_ahead)
    keeping.stack.sql("UPDATE runs SET queued_at = $2, reported_at = $2 WHERE id = $1", early, LONG_AGO)
    ended_days_ago(keeping.stack, late, 31)
    until(lambda: gone(kept, late), what="rounds of retention went by")
    assert kept.get_run(early)["status"] == "success"


def test_what_the_version_before_changes_is_as_young_as_its_change(kept: Client, keeping: Server) -> None:
    """It does not know changed_at: a trigger sets it when a statement changes the status and leaves that as it is."""
    old, control = kept.finished()["id"], kept.finished()["id"]
    ended_days_ago(keeping.stack, old, 29)
    for change in (
        "status = 'scheduling', started_at = NULL, ended_at = NULL, assigned_machine_id = NULL",
        "status = 'running', started_at = now()",
        "status = 'error', ended_at = '2000-01-01Z'",
    ):
        keeping.stack.sql("UPDATE runs SET error_code = 'stale' WHERE id = $1", old)
        before = kept.get_run(old)["changed_at"]
        keeping.stack.sql(f"UPDATE runs SET {change} WHERE id = $1", old)
        after = kept.get_run(old)
        assert (after["changed_at"] > before, after["error_code"]) == (True, None)
    ended_days_ago(keeping.stack, control, 31)
    until(lambda: gone(kept, control), what="rounds of retention went by")
    assert not gone(kept, old)


def test_many_old_runs_go_in_bursts(kept: Client, keeping: Server) -> None:
    def removed(by: str) -> float:
        return scrape(keeping.url).value("runs_transitions_total", to="deleted", by=by) or 0

    before = removed("service"), removed("caller")
    body = {"workflow_id": kept.workflow(), "count": 250}
    created = kept.json_of(kept.post("/v1/runs/bulk", json=body), 201)["created_runs"]
    keeping.stack.sql(
        "UPDATE runs SET status = 'error', ended_at = now(), changed_at = now() - interval '31 days'"
        " WHERE organization_id = $1",
        kept.organization,
    )
    until(lambda: kept.json_of(kept.get("/v1/runs", params={"limit": 1}))["total"] == 0)
    assert all(gone(kept, run["id"]) for run in created[::50])
    until(lambda: (removed("service") - before[0], removed("caller")) == (250, before[1]))


def test_old_attempts_go_and_their_run_stays(kept: Client, keeping: Server) -> None:
    run_id = kept.finished()["id"]
    for _ in range(3):
        kept.json_of(kept.retry(run_id))
        kept.report(run_id, status="cancelled")
    keeping.stack.sql(
        "UPDATE run_attempts SET retried_at = now() - interval '31 days' WHERE run_id = $1 AND attempt < 3", run_id
    )

    def shown() -> list[int]:
        return [one["attempt"] for one in kept.json_of(kept.get(f"/v1/runs/{run_id}/attempts"))["items"]]

    until(lambda: shown() == [3])
    assert kept.get_run(run_id)["attempt"] == 4


def test_by_default_everything_stays(api: Client, stack: Stack, foreign: Client) -> None:
    run_id = api.finished()["id"]
    api.json_of(api.retry(run_id))
    api.report(run_id, status="cancelled")
    ended_days_ago(stack, run_id, 36_000)
    stack.sql("UPDATE run_attempts SET retried_at = now() - interval '90 years' WHERE run_id = $1", run_id)
    foreign.finished()
    assert api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["total"] == 1


# --- what attempts produced, with ATTEMPT_OUTPUTS=all -----------------------------------------------------------------


def attempt(api: Client, run_id: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts/{number}"))
    return found


def files(api: Client, **query: object) -> list[str]:
    found = api.json_of(api.get("/v1/run-attachments", params=query))  # type: ignore[arg-type]
    return [file["id"] for file in found["items"]]


def produced(api: Client, run_id: str, number: int) -> dict[str, Any]:
    """What an attempt reports, and leaves."""
    api.report(run_id, status="running")
    file = api.upload(run_id, f"file {number}".encode())["id"]
    reported: dict[str, Any] = {
        "output_data": {"n": number},
        "run_message_history": [{"role": "user", "content": "x" * 3000}],
        "usage_metadata": {"tokens": number},
    }
    api.report(run_id, status="error", error=[f"broken {number}"], **reported)
    return reported | {"output_attachment_ids": [file]}


def test_outputs_and_files_of_earlier_attempts_stay_and_the_run_reads_as_cleared(kept: Client, keeping: Server) -> None:
    run = kept.run(file_inputs=[file_input()], sensitive_input_values={"pin": "1"})
    run_id = run["id"]
    made = {}
    for number, overrides in ((1, {}), (2, {"file_inputs": [file_input(b"new")], "sensitive_input_values": {}})):
        made[number] = produced(kept, run_id, number)
        after = kept.json_of(kept.retry(run_id, **overrides))
        cleared = ("error", "output_data", "run_message_history", "usage_metadata")
        assert ([after[name] for name in cleared], after["output_attachment_ids"]) == ([None] * 4, [])
        assert kept.get_run(run_id) == after
    for number, left in made.items():
        found = attempt(kept, run_id, number)
        assert {name: found[name] for name in left} == left
        assert (found["attempt"], found["error"], found["outputs_are_kept"]) == (number, [f"broken {number}"], True)
        [file] = left["output_attachment_ids"]
        assert kept.get(f"/v1/run-attachments/{file}/download").content == f"file {number}".encode()
        assert kept.json_of(kept.get(f"/v1/run-attachments/{file}"))["attempt"] == number
        assert files(kept, run_id=run_id, attempt=number) == [file]
    # Without a number, lists show what the run has now; replaced inputs are kept by nothing.
    assert files(kept, run_id=run_id) == kept.get_run(run_id)["input_attachment_ids"]
    assert kept.get(f"/v1/run-attachments/{run['input_attachment_ids'][0]}").status_code == 404
    made[3] = produced(kept, run_id, 3)
    assert files(kept, run_id=run_id, attempt=3) == made[3]["output_attachment_ids"]
    assert set(files(kept)) == set(files(kept, run_id=run_id)) > set(made[3]["output_attachment_ids"])
    # A report cannot name a file of an earlier attempt as its own.
    reply = kept.patch(f"/v1/runs/{run_id}", json={"output_attachment_ids": made[1]["output_attachment_ids"]})
    assert reply.status_code == 422
    # All of it goes with the run.
    assert kept.delete(f"/v1/runs/{run_id}").status_code == 204
    until(lambda: not keeping.stack.blobs(f"{kept.organization}/{run_id}"), what="its files are deleted")
    assert_nothing_lost(keeping.stack, kept.organization)


def test_what_attempts_produced_goes_with_them_by_age(kept: Client, keeping: Server) -> None:
    run_id = kept.run()["id"]
    for number in (1, 2):
        made = produced(kept, run_id, number)
        kept.json_of(kept.retry(run_id))
    age = "UPDATE run_attempts SET retried_at = now() - interval '31 days' WHERE run_id = $1 AND attempt = 1"
    keeping.stack.sql(age, run_id)
    until(lambda: kept.get(f"/v1/runs/{run_id}/attempts/1").status_code == 404)
    left = "SELECT attempt FROM run_outputs WHERE run_id = $1"
    until(lambda: keeping.stack.sql(left, run_id) == [{"attempt": 2}])
    until(lambda: len(keeping.stack.blobs(f"{kept.organization}/{run_id}")) == 1, what="its file is deleted")
    assert attempt(kept, run_id, 2)["output_attachment_ids"] == made["output_attachment_ids"]
    assert_nothing_lost(keeping.stack, kept.organization)


def test_a_key_of_a_machine_sees_only_the_current_attempt(kept: Client, keeping: Server) -> None:
    machine = kept.machine()
    run_id = kept.run(machine_id=machine)["id"]
    until(lambda: kept.get_run(run_id)["assigned_machine_id"])
    [earlier] = produced(kept, run_id, 1)["output_attachment_ids"]
    kept.json_of(kept.retry(run_id))
    until(lambda: kept.get_run(run_id)["assigned_machine_id"])
    [current] = produced(kept, run_id, 2)["output_attachment_ids"]
    key = keeping.stack.new_key(kept.organization, scopes=["runs:execute"], machine_id=machine)
    with keeping.client(kept.organization, key=key) as desk:
        assert attempt(desk, run_id, 2)["output_attachment_ids"] == [current]
        assert desk.json_of(desk.get(f"/v1/runs/{run_id}/attempts/1"), 404)["code"] == "attempt_not_found"
        assert files(desk, run_id=run_id) == files(desk, run_id=run_id, attempt=2) == [current]
        assert files(desk, run_id=run_id, attempt=1) == []
        for path in (f"{earlier}", f"{earlier}/download", f"{earlier}/download-url"):
            assert desk.get(f"/v1/run-attachments/{path}").status_code == 404
        [listed] = desk.json_of(desk.get(f"/v1/runs/{run_id}/attempts"))["items"]
        assert listed["usage_metadata"] is None
