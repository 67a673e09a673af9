"""not_before: runs that are held until a time, and then take their places. Only the database's clock counts."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.support.bulk_retries import ended, failed_runs, items, start
from tests.support.client import Client, file_input, secret_path
from tests.support.faults import CLOCK_AHEAD, FaultyServer
from tests.support.scheduling import assigned, starts
from tests.support.scrapes import scrape
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until

SOON, LATER = timedelta(seconds=0.3), timedelta(hours=2)


def ahead(stack: Stack, by: timedelta) -> str:
    """A time by the database's clock."""
    [row] = stack.sql("SELECT clock_timestamp() + $1::interval AS at", by)
    return str(row["at"].astimezone(UTC).isoformat())


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def queued_at(stack: Stack, run_id: str) -> datetime:
    [row] = stack.sql("SELECT queued_at FROM runs WHERE id = $1", UUID(run_id))
    found: datetime = row["queued_at"]
    return found


def is_held(run: dict[str, Any], not_before: str) -> bool:
    shown = run["not_before"] is not None and at(run["not_before"]) == at(not_before)
    return shown and (run["status"], run["scheduling_reason"]) == ("scheduling", "not_before")


def move(api: Client, run_id: str, expected: int = 200, /, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.patch(f"/v1/runs/{run_id}", json=body), expected)
    return found


def events(api: Client, run_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.json_of(api.get(f"/v1/runs/{run_id}/events"))["items"]
    return found


# --- held -------------------------------------------------------------------------------------------------------------


def test_a_new_run_is_held_and_takes_its_place_when_it_is_due(api: Client, stack: Stack) -> None:
    machine_id, not_before = api.machine(), ahead(stack, SOON)
    run = api.run(not_before=not_before)
    assert is_held(run, not_before)
    assert assigned(api, run["id"]) == machine_id
    assert queued_at(stack, run["id"]) == at(not_before)
    [row] = stack.sql("SELECT at FROM run_events WHERE run_id = $1 AND event = 'assigned'", UUID(run["id"]))
    assert row["at"] >= at(not_before)
    after = api.get_run(run["id"])
    assert (after["not_before"], after["scheduling_reason"]) == (None, "assigned")
    until(lambda: [event["event"] for event in events(api, run["id"])] == ["created", "due", "assigned"])
    assert events(api, run["id"])[1]["by"] == "service"


def test_held_runs_pass_nobody_and_are_passed_by_all(api: Client, stack: Stack) -> None:
    """One that is held has priority, and one without it starts; when due it goes before those that came later."""
    machine_id, not_before = api.machine(), ahead(stack, LATER)
    held = api.run(not_before=not_before, is_priority=True)["id"]
    other = api.run()["id"]
    assert assigned(api, other) == machine_id
    lanes = api.json_of(api.get("/v1/queue"))
    assert (lanes["items"], lanes["held"]) == ([], 1)
    waiting = api.run()["id"]
    move(api, held, not_before=None)
    api.report(other, status="cancelled")
    assert assigned(api, held) == machine_id
    assert api.get_run(waiting)["assigned_machine_id"] is None


def test_a_bulk_of_runs_is_held(api: Client, stack: Stack) -> None:
    not_before = ahead(stack, LATER)
    body = {"workflow_id": api.workflow(), "count": 3, "not_before": not_before}
    created = api.json_of(api.post("/v1/runs/bulk", json=body), 201)["created_runs"]
    assert [is_held(run, not_before) for run in created] == [True] * 3
    listed = api.json_of(api.get("/v1/runs", params={"fields": "not_before,scheduling_reason"}))["items"]
    assert [is_held(run, not_before) for run in listed] == [True] * 3


@pytest.mark.parametrize("more", [{}, {"sensitive_input_values": {"pw": "new"}, "file_inputs": [file_input()]}])
def test_a_retry_is_held(api: Client, stack: Stack, more: dict[str, Any]) -> None:
    run_id, not_before = api.finished("error")["id"], ahead(stack, LATER)
    machine_id = api.machine()
    run = api.json_of(api.retry(run_id, not_before=not_before, **more))
    assert is_held(run, not_before)
    assert api.get_run(run_id) == run
    [archived] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
    assert archived["overridden"] == sorted(["not_before", *more])
    # A retry without it starts at once.
    move(api, run_id, status="cancelled")
    assert api.json_of(api.retry(run_id))["not_before"] is None
    assert assigned(api, run_id) == machine_id


def test_the_past_and_null_mean_now(api: Client, stack: Stack) -> None:
    past = ahead(stack, -LATER)
    began = at(ahead(stack, timedelta()))
    for run in (api.run(not_before=past), api.run(not_before=None)):
        assert (run["not_before"], run["scheduling_reason"]) == (None, "waiting_for_machine")
        assert queued_at(stack, run["id"]) >= began
    run_id = api.finished("error")["id"]
    assert api.json_of(api.retry(run_id, not_before=past))["scheduling_reason"] == "waiting_for_machine"


@pytest.mark.parametrize("text", ["tomorrow", "2026-13-01T00:00:00Z", 5, "", True, []])
def test_what_is_no_time_is_refused(api: Client, text: object) -> None:
    reply = api.post("/v1/runs", json={"workflow_id": api.workflow(), "not_before": text})
    assert [problem["loc"] for problem in api.json_of(reply, 422)["detail"]] == [["body", "not_before"]]


def test_more_than_thirty_days_ahead_is_refused_and_nothing_changes(api: Client, stack: Stack) -> None:
    far, near = ahead(stack, timedelta(days=30, minutes=1)), ahead(stack, timedelta(days=29, hours=23))
    run = api.finished("error")
    held, workflow = api.run(not_before=near), api.workflow()
    new = {"workflow_id": workflow, "not_before": far}
    for reply in (
        api.retry(run["id"], not_before=far),
        api.retry(run["id"], not_before=far, sensitive_input_values={"pw": "x"}),
        api.post("/v1/runs", json=new),
        api.post("/v1/runs", json=new | {"sensitive_input_values": {"pw": "x"}}),
        api.post("/v1/runs/bulk", json=new | {"count": 2}),
        api.patch(f"/v1/runs/{held['id']}", json={"not_before": far}),
        api.post(f"/v1/runs/{run['id']}/retry?dry_run=true", json={"not_before": far}),
    ):
        [problem] = api.json_of(reply, 422)["detail"]
        assert (problem["loc"], problem["type"]) == (["body", "not_before"], "not_before")
        assert "30 days" in problem["msg"]
    assert api.get_run(run["id"]) == run
    assert api.get_run(held["id"]) == held
    assert api.json_of(api.get("/v1/runs"))["total"] == 2


def test_cancel_delete_and_retry_are_those_of_any_scheduling_run(api: Client, stack: Stack) -> None:
    held = [api.run(not_before=ahead(stack, LATER))["id"] for _ in range(2)]
    assert api.json_of(api.retry(held[0]), 409)["code"] == "run_not_terminal"
    assert move(api, held[0], status="cancelled")["not_before"] is None
    assert api.json_of(api.retry(held[0]))["scheduling_reason"] == "waiting_for_machine"
    assert api.delete(f"/v1/runs/{held[1]}").status_code == 204
    assert api.json_of(api.get("/v1/queue"))["held"] == 0


def test_an_executor_may_begin_a_held_run_and_its_retry_is_held_by_nothing(api: Client, stack: Stack) -> None:
    """As with any scheduling run; and what held it holds no later attempt."""
    run_id = api.run(not_before=ahead(stack, LATER))["id"]
    assert api.report(run_id, status="running")["not_before"] is None
    api.report(run_id, status="error")
    machine_id = api.machine()
    api.json_of(api.retry(run_id))
    assert assigned(api, run_id) == machine_id


# --- moved ------------------------------------------------------------------------------------------------------------


def test_a_held_run_is_moved_and_started_now(api: Client, stack: Stack) -> None:
    run_id = api.run(not_before=ahead(stack, LATER))["id"]
    sooner = ahead(stack, LATER / 2)
    assert is_held(move(api, run_id, not_before=sooner, reason="the bank opens"), sooner)
    began = at(ahead(stack, timedelta()))
    assert move(api, run_id, not_before=None)["scheduling_reason"] == "waiting_for_machine"
    assert queued_at(stack, run_id) >= began
    place = queued_at(stack, run_id)
    move(api, run_id, not_before=None)  # it waits already, and keeps its place
    assert queued_at(stack, run_id) == place
    assert is_held(move(api, run_id, not_before=sooner), sooner)
    until(lambda: len(events(api, run_id)) == 4)
    first = events(api, run_id)[1]
    assert (first["event"], first["changed"], first["reason"]) == ("rescheduled", ["not_before"], "the bank opens")
    assert first["key_id"] is not None


def test_a_move_is_done_once_for_a_key(api: Client, stack: Stack) -> None:
    run_id, key = api.run(not_before=ahead(stack, LATER))["id"], {"Idempotency-Key": str(uuid4())}
    replies = [api.patch(f"/v1/runs/{run_id}", json={"not_before": None}, headers=key) for _ in range(2)]
    assert replies[0].content == replies[1].content
    assert replies[1].headers["idempotency-status"] == "replayed"


def test_what_does_not_wait_cannot_be_moved(api: Client, stack: Stack, foreign: Client) -> None:
    api.machine()
    placed, done = api.run()["id"], api.finished("error", machine_id=api.machine(is_available=False))["id"]
    assigned(api, placed)
    not_before = ahead(stack, LATER)
    for run_id, status in ((placed, "scheduling"), (done, "error")):
        before = api.get_run(run_id)
        for body in ({"not_before": not_before}, {"not_before": None}):
            refused = move(api, run_id, 409, **body)
            assert (refused["code"], refused["current_status"]) == ("run_not_waiting", status)
        assert api.get_run(run_id) == before
    assert move(foreign, placed, 404, not_before=None)["code"] == "run_not_found"


@pytest.mark.parametrize("beside", [{"status": "cancelled"}, {"error": None}, {"attempt": 1}, {"input_values": {}}])
def test_a_move_says_nothing_else(api: Client, stack: Stack, beside: dict[str, Any]) -> None:
    run = api.run(not_before=ahead(stack, LATER))
    [problem] = move(api, run["id"], 422, not_before=None, **beside)["detail"]
    assert problem["loc"] == ["body", *beside]
    assert api.get_run(run["id"]) == run


def test_a_move_needs_runs_write(api: Client, stack: Stack, server: Server) -> None:
    run_id = api.run(not_before=ahead(stack, LATER))["id"]
    for scope, status in (("runs:execute", 403), ("runs:write", 200)):
        scopes = [scope, "runs:read"]
        with server.client(api.organization, key=stack.new_key(api.organization, scopes=scopes)) as client:
            reply = client.patch(f"/v1/runs/{run_id}", json={"not_before": None})
            assert reply.status_code == status
            if status == 403:
                assert reply.json()["code"] == "insufficient_scope"
                assert 'scope="runs:write"' in reply.headers["www-authenticate"]


# --- secrets, files, sessions -----------------------------------------------------------------------------------------


def test_secrets_of_a_held_run_are_kept(api: Client, stack: Stack) -> None:
    run_id = api.finished("error", sensitive_input_values={"pw": "secret"})["id"]
    run = api.json_of(api.retry(run_id, not_before=ahead(stack, LATER)))
    path = secret_path(run)
    assert stack.sql("SELECT 1 FROM deletions WHERE name = $1", path) == []
    assert stack.secret(path) == {"pw": "secret"}


def test_an_input_that_expires_before_is_refused_when_asked(api: Client, stack: Stack) -> None:
    run = api.finished("error", file_inputs=[file_input()])
    [attachment] = run["input_attachment_ids"]
    expires_at = ahead(stack, LATER)
    api.json_of(api.put(f"/v1/run-attachments/{attachment}", json={"expires_at": expires_at}))
    before = api.get_run(run["id"])
    late, early = ahead(stack, LATER * 2), ahead(stack, LATER / 2)
    refused = api.json_of(api.retry(run["id"], not_before=late), 409)
    assert refused["code"] == "input_attachments_expired"
    assert "before not_before" in refused["detail"]
    dry = api.json_of(api.post(f"/v1/runs/{run['id']}/retry?dry_run=true", json={"not_before": late}))
    assert [one["code"] for one in dry["refusals"]] == ["input_attachments_expired"]
    assert api.get_run(run["id"]) == before
    assert is_held(api.json_of(api.retry(run["id"], not_before=early)), early)
    assert move(api, run["id"], 409, not_before=late)["code"] == "input_attachments_expired"
    assert is_held(api.get_run(run["id"]), early)
    move(api, run["id"], status="cancelled")
    assert is_held(api.json_of(api.retry(run["id"], not_before=late, file_inputs=[file_input()])), late)


def test_a_held_run_holds_up_nobody_in_its_session_and_joins_it_when_it_is_due(api: Client, stack: Stack) -> None:
    machine_id = api.machine()
    first = starts(api, start_session=True)
    session = {"session_id": first["session_id"]}
    held = api.run(**session, not_before=ahead(stack, LATER))["id"]
    second = api.run(**session)["id"]
    api.report(first["id"], status="success")
    assert assigned(api, second) == machine_id
    assert api.get_run(held)["machine_id"] == machine_id
    third = api.run(**session)["id"]
    assert move(api, held, not_before=None)["scheduling_reason"] == "waiting_for_session"
    api.report(second, status="cancelled")
    assert assigned(api, third) == machine_id
    api.report(third, status="cancelled")
    assert assigned(api, held) == machine_id


def test_a_session_that_is_freed_cancels_its_held_runs(api: Client, stack: Stack) -> None:
    machine_id = api.machine()
    first = starts(api, start_session=True)
    api.report(first["id"], status="success")
    held = api.run(session_id=first["session_id"], not_before=ahead(stack, LATER))["id"]
    api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"reserved_session_id": None}))
    assert api.get_run(held)["status"] == "cancelled"


# --- bulk, dry run, quotas, cooldown ----------------------------------------------------------------------------------


def test_a_dry_run_expects_it_to_be_held(api: Client, stack: Stack) -> None:
    run_id = api.finished("error")["id"]
    api.machine()
    for by, reason in ((LATER, "not_before"), (-LATER, "assigned")):
        body = {"not_before": ahead(stack, by), "avoid_last_machine": by == LATER}
        found = api.json_of(api.post(f"/v1/runs/{run_id}/retry?dry_run=true", json=body))
        assert (found["would_retry"], found["placement"]["expected_reason"]) == (True, reason)
        assert found["replaced"] == (["avoid_last_machine", "not_before"] if by == LATER else ["not_before"])


def test_a_bulk_retry_is_held(api: Client, stack: Stack) -> None:
    runs, not_before = failed_runs(api, 2), ahead(stack, LATER)
    body: dict[str, Any] = {"run_ids": runs, "overrides": {"not_before": not_before, "avoid_last_machine": True}}
    dry = api.json_of(api.post("/v1/bulk-retries?dry_run=true", json=body))
    assert (dry["would_retry"], dry["will_wait"]) == (2, {"not_before": 2})
    job = ended(api, start(api, **body))
    assert [item["outcome"] for item in items(api, job)] == ["retried"] * 2
    assert [is_held(api.get_run(run_id), not_before) for run_id in runs] == [True] * 2
    [archived] = api.json_of(api.get(f"/v1/runs/{runs[0]}/attempts"))["items"]
    assert (archived["by"], archived["overridden"]) == ("bulk", ["avoid_last_machine", "not_before"])


@pytest.fixture(scope="module")
def strict(stack: Stack) -> Iterator[Server]:
    started = start_server(stack, RETRY_COOLDOWN_SECONDS=3600, QUOTA_ORGANIZATION_WAITING_RUNS=2)
    yield started
    started.app.stop()


def test_a_cooldown_that_is_over_by_then_does_not_refuse(strict: Server, stack: Stack) -> None:
    with strict.client() as api:
        run_id = api.finished("error")["id"]
        early, late = ahead(stack, LATER / 4), ahead(stack, LATER)
        assert api.json_of(api.retry(run_id, not_before=early), 409)["code"] == "retry_too_soon"
        assert is_held(api.json_of(api.retry(run_id, not_before=late)), late)
        # It can be moved to before then: the cooldown is a rule of the retry.
        assert move(api, run_id, not_before=None)["not_before"] is None


def test_held_runs_count_for_quotas_when_asked_and_not_when_due(strict: Server, stack: Stack) -> None:
    with strict.client() as api:
        held = [api.run(not_before=ahead(stack, LATER))["id"] for _ in range(2)]
        body = {"workflow_id": api.workflow(), "not_before": ahead(stack, LATER)}
        assert api.json_of(api.post("/v1/runs", json=body), 429)["code"] == "quota_exceeded"
        assert api.json_of(api.post("/v1/runs", json={"workflow_id": body["workflow_id"]}), 429)
        for run_id in held:
            assert move(api, run_id, not_before=None)["scheduling_reason"] == "waiting_for_machine"


# --- due --------------------------------------------------------------------------------------------------------------

HOLD_MANY = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, queued_at)
SELECT gen_random_uuid(), $1, $2, 'scheduling', '~any', $3::timestamptz FROM generate_series(1, $4::int)
"""


@pytest.fixture(scope="module")
def own(stack: Stack) -> Iterator[Stack]:
    """A database of its own: no other server lets its runs take their places."""
    with own_database(stack, "not_before") as made:
        yield made


def test_a_thousand_that_are_due_at_once_are_due_once_on_two_replicas_one_of_which_is_killed(own: Stack) -> None:
    one, other = start_server(own), start_server(own)
    try:
        with one.client() as client:
            workflow_id, due = UUID(client.workflow()), at(ahead(own, timedelta(seconds=0.5)))
            own.sql(HOLD_MANY, client.organization, workflow_id, due, 1000)
            counts = "SELECT count(*) AS events, count(DISTINCT run_id) AS runs FROM run_events WHERE event = 'due'"
            until(lambda: own.sql(counts)[0]["events"] > 0, what="the first that are due")
            one.app.kill()
            until(lambda: own.sql(counts)[0]["runs"] == 1000, what="all that are due")
        [found] = own.sql(counts)
        assert (found["events"], found["runs"]) == (1000, 1000)
        [places] = own.sql("SELECT count(*) FROM runs WHERE lane = 'any' AND queued_at = $1", due)
        assert places["count"] == 1000
    finally:
        one.app.stop()
        other.app.stop()


def test_only_the_databases_clock_says_what_is_due(own: Stack) -> None:
    """A server whose own clock is hours ahead, and a time that is past by that clock only."""
    settings: dict[str, Any] = {CLOCK_AHEAD: 3 * 3600}
    with FaultyServer(own, **settings) as server, server.client() as api:
        api.machine()
        run_id = api.run(not_before=ahead(own, LATER))["id"]
        other = api.run()["id"]
        assigned(api, other)
        assert api.get_run(run_id)["scheduling_reason"] == "not_before"


def test_held_runs_are_counted(api: Client, stack: Stack, server: Server) -> None:
    api.run(not_before=ahead(stack, LATER))
    assert until(lambda: scrape(server.url).value("runs_held"), what="a held run in the metrics") >= 1


# --- avoid_last_machine -----------------------------------------------------------------------------------------------


def retried_elsewhere(api: Client, run_id: str, **options: Any) -> str:
    api.json_of(api.retry(run_id, **options))
    return assigned(api, run_id)


def test_the_last_machine_is_taken_last(api: Client) -> None:
    last = api.machine()
    run_id = starts(api)["id"]
    other = api.machine()
    for _ in range(2):
        api.report(run_id, status="error")
        previous = api.get_run(run_id)["assigned_machine_id"]
        elsewhere = retried_elsewhere(api, run_id, avoid_last_machine=True)
        assert elsewhere != previous
        assert elsewhere in (last, other)
        api.report(run_id, status="running")


def test_the_last_machine_is_never_excluded(api: Client) -> None:
    only = api.machine()
    run_id = starts(api)["id"]
    api.report(run_id, status="error")
    assert retried_elsewhere(api, run_id, avoid_last_machine=True) == only
    api.report(run_id, status="error")
    api.machine()
    assert retried_elsewhere(api, run_id, avoid_last_machine=True, machine_id=only) == only


def test_in_pools_the_last_machine_is_left_to_those_that_do_not_avoid_it(api: Client) -> None:
    """Both start at once: the one that avoids a machine leaves it to the other."""
    last = api.machine()
    pool = api.pool(last)
    run_id = starts(api, pool_ids=[pool])["id"]
    api.report(run_id, status="error")
    api.json_of(api.patch(f"/v1/machines/{last}", json={"is_available": False}))
    api.json_of(api.retry(run_id, avoid_last_machine=True))
    other_run = api.run(pool_ids=[pool])["id"]
    other = api.machine(is_available=False)
    api.json_of(api.put(f"/v1/machines/{other}/pools", json={"pool_ids": [pool]}))
    for machine_id in (other, last):
        api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"is_available": True}))
    assert {assigned(api, run_id), assigned(api, other_run)} == {last, other}
