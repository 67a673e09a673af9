"""Bulk retries: the choice, what a job does and says, and what it refuses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.bulk_retries import ended, failed_runs, hurry, items, job_of, many_failed, start, succeed
from tests.support.client import Client
from tests.support.scrapes import scrape
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.stored_state import SOAK
from tests.support.waiting import until


def test_listed_runs_are_retried_in_their_order(api: Client, foreign: Client) -> None:
    first, second = failed_runs(api, 2)
    active, strange, unknown = api.run()["id"], failed_runs(foreign, 1)[0], "00000000-0000-0000-0000-000000000001"
    job = start(api, run_ids=[second, active, first, second, strange, unknown], reason="The application was down.")
    assert (job["state"], job["total"]) == ("running", 5)
    done = ended(api, job)
    counts = {name: done[name] for name in ("state", "total", "pending", "retried", "skipped", "succeeded", "failed")}
    assert counts == {
        "state": "completed",
        "total": 5,
        "pending": 0,
        "retried": 2,
        "skipped": 3,
        "succeeded": 0,
        "failed": 0,
    }
    assert [(item["run_id"], item["outcome"], item["code"], item["result"]) for item in items(api, job)] == [
        (second, "retried", None, "scheduling"),
        (active, "skipped", "run_not_terminal", None),
        (first, "retried", None, "scheduling"),
        (strange, "skipped", "run_not_found", None),
        (unknown, "skipped", "run_not_found", None),
    ]
    assert api.get_run(first)["attempt"] == api.get_run(second)["attempt"] == 2
    assert api.get_run(active)["attempt"] == foreign.get_run(strange)["attempt"] == 1


def test_a_filter_chooses_by_status_and_the_oldest_end_first(api: Client) -> None:
    workflow_id = api.workflow()
    failed = failed_runs(api, 3, workflow_id=workflow_id)
    late, *_ = failed_runs(api, 1, workflow_id=workflow_id)
    cancelled = failed_runs(api, 1, "cancelled", workflow_id=workflow_id)[0]
    succeeded = failed_runs(api, 1, "success", workflow_id=workflow_id)[0]
    failed_runs(api, 1)  # of another workflow
    task = api.finished("task_failed", workflow_id=workflow_id)["id"]
    job = start(api, filter={"workflow_id": workflow_id, "created_at_from": "24h"})
    assert job["filter"]["status"] == ["error"]
    assert job["filter"]["created_at_from"].endswith("Z")  # as it was then
    ended(api, job)
    assert [item["run_id"] for item in items(api, job)] == [*failed, late]
    job = start(api, filter={"workflow_id": workflow_id, "status": ["cancelled", "success", "task_failed"]})
    ended(api, job)
    assert {item["run_id"] for item in items(api, job)} == {cancelled, succeeded, task}


def test_each_filter_limits_the_choice(api: Client) -> None:
    machine_id = api.machine(status="disconnected")
    session = api.run(start_session=True)
    api.report(session["id"], status="error")
    pinned = failed_runs(api, 1, machine_id=machine_id)[0]
    other = failed_runs(api, 1)[0]
    coded = api.run()["id"]
    api.report(coded, status="error", error_code="login.refused")
    created_at, changed_at = (api.get_run(other)[name] for name in ("created_at", "changed_at"))
    workflow_id = api.get_run(pinned)["workflow_id"]
    for chosen, expected in (
        ({"ended_from": changed_at, "ended_to": changed_at}, other),
        ({"changed_from": "1h", "workflow_id": workflow_id, "machine_id": machine_id}, pinned),
        ({"machine_id": machine_id}, pinned),
        ({"session_id": session["session_id"]}, session["id"]),
        ({"error_code": "login.refused"}, coded),
        ({"created_at_from": created_at, "created_at_to": created_at}, other),
        ({"created_at_to": session["created_at"]}, session["id"]),
    ):
        job = start(api, filter=chosen, pace_per_second=0.1)
        assert [item["run_id"] for item in items(api, job)] == [expected], chosen
        ended(api, job)
        until(lambda: api.get_run(expected)["attempt"] > 1)  # noqa: B023 - called at once
        api.report(expected, status="error")


@pytest.mark.parametrize(
    ("body", "loc", "kind"),
    [
        ({}, ["body"], "run_ids_or_filter"),
        ({"run_ids": [], "filter": {"session_id": None}}, ["body", "run_ids"], "too_short"),
        ({"run_ids": ["x"]}, ["body", "run_ids", 0], "uuid_parsing"),
        ({"filter": {}}, ["body", "filter"], "empty_filter"),
        ({"filter": {"status": ["error"]}}, ["body", "filter"], "empty_filter"),
        ({"filter": {"status": ["running"], "created_at_from": "1h"}}, ["body", "filter", "status"], "terminal_status"),
        ({"filter": {"created_at_from": "soon"}}, ["body", "filter", "created_at_from"], "time_or_duration"),
        ({"filter": {"created_at_from": "1h", "search": "x"}}, ["body", "filter", "search"], "not_supported"),
        ({"filter": {"created_at_from": "1h", "machine": "x"}}, ["body", "filter"], "extra_forbidden"),
        ({"overrides": {"file_inputs": []}}, ["body", "overrides", "file_inputs"], "not_supported"),
        (
            {"overrides": {"sensitive_input_values": {}}},
            ["body", "overrides", "sensitive_input_values"],
            "not_supported",
        ),
        ({"overrides": {"not_before": "1h"}}, ["body", "overrides", "not_before"], "datetime_parsing"),
        ({"overrides": {"not_before": "2999-01-01T00:00:00Z"}}, ["body", "overrides", "not_before"], "not_before"),
        ({"pace_per_second": 0.05}, ["body", "pace_per_second"], "greater_than_equal"),
        ({"first": 10_001}, ["body", "first"], "less_than_equal"),
    ],
)
def test_what_cannot_be_done_is_refused(api: Client, body: dict[str, Any], loc: list[Any], kind: str) -> None:
    [problem] = start(api, 422, **body)["detail"]
    assert (problem["loc"], problem["type"]) == (loc, kind)
    assert api.json_of(api.get("/v1/bulk-retries"))["items"] == []


def test_run_ids_and_a_filter_together_are_refused(api: Client) -> None:
    run_id = failed_runs(api, 1)[0]
    [problem] = start(api, 422, run_ids=[run_id], filter={"created_at_from": "1h"})["detail"]
    assert problem["type"] == "run_ids_or_filter"


def test_more_than_ten_thousand_matches_are_refused_with_their_number(api: Client, server: Server) -> None:
    workflow_id = api.workflow()
    many_failed(server.stack, api.organization, workflow_id, 10_001)
    for path in ("/v1/bulk-retries", "/v1/bulk-retries?dry_run=true", "/v1/bulk-retries/dry-run"):
        [problem] = api.json_of(api.post(path, json={"filter": {"workflow_id": workflow_id}}), 422)["detail"]
        assert problem["type"] == "too_many_runs"
        assert "10001 runs match" in problem["msg"]
    assert api.json_of(api.get("/v1/bulk-retries"))["total"] == 0


def test_unknown_targets_are_refused(api: Client) -> None:
    run_id, nobody = failed_runs(api, 1)[0], "00000000-0000-0000-0000-000000000001"
    for overrides, code in (({"machine_id": nobody}, "machine_not_found"), ({"pool_ids": [nobody]}, "pool_not_found")):
        for query in ("", "?dry_run=true", "/dry-run"):
            body = {"run_ids": [run_id], "overrides": overrides}
            assert api.json_of(api.post(f"/v1/bulk-retries{query}", json=body), 404)["code"] == code


def test_overrides_hold_for_every_run_and_say_who_did_it(api: Client) -> None:
    runs, machine_id = failed_runs(api, 2, input_values={"old": 1}), api.machine(status="disconnected")
    overrides = {"input_values": {"new": 2}, "machine_id": machine_id, "is_priority": True}
    job = start(api, run_ids=runs, overrides=overrides, reason="Again.")
    assert job["overrides"] == overrides
    ended(api, job)
    for run_id in runs:
        run = api.get_run(run_id)
        assert (run["input_values"], run["machine_id"], run["is_priority"]) == ({"new": 2}, machine_id, True)
        [attempt] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
        assert (attempt["by"], attempt["bulk_retry_id"], attempt["reason"]) == ("bulk", job["id"], "Again.")
        assert attempt["retried_by_key_id"] == job["by"]["key_id"]
        assert attempt["overridden"] == ["input_values", "is_priority", "machine_id"]
        event = api.json_of(api.get(f"/v1/runs/{run_id}/events"))["items"][-1]
        assert (event["event"], event["by"], event["bulk_retry_id"]) == ("retried", "bulk", job["id"])
        first = api.json_of(api.get(f"/v1/runs/{run_id}/events"))["items"][0]
        assert (first["event"], first["by"], first["bulk_retry_id"]) == ("created", "request", None)


def test_a_run_at_another_attempt_is_skipped(api: Client) -> None:
    first, retried, deleted = failed_runs(api, 3)
    job = start(api, run_ids=[first, retried, deleted], pace_per_second=0.1)
    until(lambda: job_of(api, job["id"])["retried"] == 1)
    api.json_of(api.post(f"/v1/bulk-retries/{job['id']}/pause"))
    api.json_of(api.retry(retried))
    api.report(retried, status="error")
    assert api.delete(f"/v1/runs/{deleted}").status_code == 204
    hurry(api, job)
    done = ended(api, job)
    assert (done["retried"], done["skipped"]) == (1, 2)
    assert [item["code"] for item in items(api, job)] == [None, "attempt_changed", "run_not_found"]
    assert api.get_run(retried)["attempt"] == 2


def test_what_became_of_the_runs_is_counted_on_reading(api: Client) -> None:
    runs = failed_runs(api, 5)
    job = start(api, run_ids=runs)
    ended(api, job)
    succeeded, failed, cancelled, deleted, again = runs
    succeed(api, succeeded)
    api.report(failed, status="error")
    api.report(cancelled, status="cancelled")
    assert api.delete(f"/v1/runs/{deleted}").status_code == 204
    api.report(again, status="error")
    api.json_of(api.retry(again))  # what counts is the attempt that the job began
    succeed(api, again)
    found = job_of(api, job["id"])
    assert {name: found[name] for name in ("retried", "succeeded", "failed", "cancelled")} == {
        "retried": 5,
        "succeeded": 1,
        "failed": 2,
        "cancelled": 1,
    }
    [listed] = api.json_of(api.get("/v1/bulk-retries"))["items"]
    assert listed == found
    assert [item["result"] for item in items(api, job)] == ["success", "error", "cancelled", None, "error"]


# --- pause, resume, abort ---------------------------------------------------------------------------------------------


def test_pause_resume_and_abort(api: Client) -> None:
    runs = failed_runs(api, 3)
    job = start(api, run_ids=runs, pace_per_second=0.1)
    until(lambda: job_of(api, job["id"])["retried"] == 1)
    path = f"/v1/bulk-retries/{job['id']}"
    for _ in range(2):  # what it is already stays
        paused = api.json_of(api.post(f"{path}/pause"))
        assert (paused["state"], paused["pause_reason"]) == ("paused", "requested")
    for _ in range(2):
        resumed = api.json_of(api.post(f"{path}/resume"))
        assert (resumed["state"], resumed["pause_reason"]) == ("running", None)
    until(lambda: job_of(api, job["id"])["retried"] == 2)
    for _ in range(2):
        aborted = api.json_of(api.post(f"{path}/abort"))
        assert (aborted["state"], aborted["retried"], aborted["skipped"], aborted["pending"]) == ("aborted", 2, 1, 0)
    assert [item["code"] for item in items(api, job, outcome="skipped")] == ["aborted"]
    assert api.get_run(runs[2])["attempt"] == 1
    for wanted in ("pause", "resume"):
        problem = api.json_of(api.post(f"{path}/{wanted}"), 409)
        assert (problem["code"], problem["current_state"]) == ("bulk_retry_ended", "aborted")


def test_the_rest_waits_for_the_first(api: Client) -> None:
    runs = failed_runs(api, 4)
    active = api.run()["id"]
    job = start(api, run_ids=[active, *runs], first=2)  # one that is skipped takes no place
    waiting = until(lambda: (found := job_of(api, job["id"]))["waiting_for"] == "first" and found)
    assert (waiting["retried"], waiting["skipped"], waiting["pending"]) == (2, 1, 2)
    succeed(api, runs[0])
    assert job_of(api, job["id"])["retried"] == 2
    succeed(api, runs[1])
    assert ended(api, job)["retried"] == 4


def test_a_first_that_fails_pauses_and_resume_goes_on(api: Client) -> None:
    runs = failed_runs(api, 3)
    job = start(api, run_ids=runs, first=1)
    until(lambda: job_of(api, job["id"])["waiting_for"] == "first")
    api.report(runs[0], status="cancelled")
    paused = until(lambda: (found := job_of(api, job["id"]))["state"] == "paused" and found)
    assert (paused["pause_reason"], paused["retried"], paused["waiting_for"]) == ("first_failed", 1, None)
    api.json_of(api.post(f"/v1/bulk-retries/{job['id']}/resume"))
    assert ended(api, job)["retried"] == 3


def test_failures_stop_it_and_are_forgiven_on_resume(api: Client) -> None:
    runs = failed_runs(api, 4)
    job = start(api, run_ids=runs, stop_after_failures=1, pace_per_second=0.1)
    for retried in (1, 2):
        until(lambda: job_of(api, job["id"])["retried"] == retried)  # noqa: B023 - called at once
        api.report(runs[retried - 1], status="error")
        hurry(api, job)
        paused = until(lambda: (found := job_of(api, job["id"]))["state"] == "paused" and found)
        assert (paused["pause_reason"], paused["failed"], paused["retried"]) == (
            "stop_after_failures",
            retried,
            retried,
        )
        api.json_of(api.post(f"/v1/bulk-retries/{job['id']}/resume"))
    api.json_of(api.post(f"/v1/bulk-retries/{job['id']}/abort"))


def test_the_same_request_starts_one_job(api: Client) -> None:
    headers, body = {"Idempotency-Key": "bulk"}, {"run_ids": failed_runs(api, 2)}
    first = api.post("/v1/bulk-retries", json=body, headers=headers)
    again = api.post("/v1/bulk-retries", json=body, headers=headers)
    assert (first.status_code, again.status_code, again.content) == (202, 202, first.content)
    assert again.headers["Idempotency-Status"] == "replayed"
    assert api.json_of(api.get("/v1/bulk-retries"))["total"] == 1
    ended(api, first.json())
    path = f"/v1/bulk-retries/{start(api, run_ids=failed_runs(api, 2), pace_per_second=0.1)['id']}"
    for wanted in ("pause", "abort"):
        once, twice = (api.post(f"{path}/{wanted}", headers={"Idempotency-Key": wanted}) for _ in range(2))
        assert once.content == twice.content


# --- who may, and how much --------------------------------------------------------------------------------------------


def test_two_at_once_and_no_more(api: Client) -> None:
    runs = failed_runs(api, 2)
    jobs = [start(api, run_ids=failed_runs(api, 2), pace_per_second=0.1) for _ in range(2)]
    api.json_of(api.post(f"/v1/bulk-retries/{jobs[0]['id']}/pause"))
    problem = start(api, 429, run_ids=runs)
    assert problem["violated-policies"] == ["organization-bulk-retries"]
    for job in jobs:
        api.post(f"/v1/bulk-retries/{job['id']}/abort")
    ended(api, start(api, run_ids=runs))


def test_scopes_and_tenants(api: Client, foreign: Client, server: Server) -> None:
    job = ended(api, start(api, run_ids=failed_runs(api, 1)))
    paths = [f"/v1/bulk-retries/{job['id']}{rest}" for rest in ("", "/items")]
    commands = [f"/v1/bulk-retries/{job['id']}/{wanted}" for wanted in ("pause", "resume", "abort")]
    for reply in (*map(foreign.get, paths), *map(foreign.post, commands)):
        assert (reply.status_code, reply.json()["code"]) == (404, "bulk_retry_not_found")
    assert foreign.json_of(foreign.get("/v1/bulk-retries"))["items"] == []
    stack, organization = server.stack, api.organization
    with server.client(key=stack.new_key(organization, scopes=["runs:read"])) as reader:
        assert [reader.get(path).status_code for path in ("/v1/bulk-retries", *paths)] == [200] * 3
        body = {"run_ids": [job["id"]]}
        writes = [reader.post("/v1/bulk-retries", json=body), *map(reader.post, commands)]
        assert [reply.status_code for reply in writes] == [403] * 4
        assert reader.post("/v1/bulk-retries?dry_run=true", json=body).status_code == 403
    bound = stack.new_key(organization, scopes=["runs:read", "runs:execute"], machine_id=api.machine())
    with server.client(key=bound) as executor:
        assert [executor.get(path).status_code for path in ("/v1/bulk-retries", *paths)] == [403] * 3


def test_a_revoked_key_stops_its_job(api: Client, server: Server) -> None:
    key = server.stack.new_key(api.organization, scopes=["runs:write"])
    runs = failed_runs(api, 3)
    with server.client(api.organization, key=key) as other:
        job = start(other, run_ids=runs, pace_per_second=0.1)
    until(lambda: job_of(api, job["id"])["retried"] == 1)
    server.stack.sql("UPDATE api_keys SET revoked_at = now() WHERE id = $1::uuid", job["by"]["key_id"])
    hurry(api, job)
    done = ended(api, job)
    assert (done["state"], done["failure"], done["retried"], done["skipped"]) == ("failed", "key_revoked", 1, 2)
    assert {item["code"] for item in items(api, job, outcome="skipped")} == {"key_revoked"}


@pytest.fixture
def strict(stack: Stack) -> Iterator[Server]:
    """A server with a quota on waiting runs and a cooldown, and a database where no other one works on its jobs."""
    with own_database(stack, "strict") as own:
        started = start_server(own, QUOTA_ORGANIZATION_WAITING_RUNS=2, RETRY_COOLDOWN_SECONDS=60)
        yield started
        started.app.stop()


def test_a_full_queue_is_waited_for_and_a_cooldown_is_not(strict: Server) -> None:
    with strict.client() as api:
        workflow_id = api.workflow()
        many_failed(strict.stack, api.organization, workflow_id, 3)
        strict.stack.sql(  # they ended long ago, but for one
            "UPDATE runs SET changed_at = now() - interval '1 h'"
            " WHERE workflow_id = $1 AND id <> (SELECT min(id::text)::uuid FROM runs WHERE workflow_id = $1)",
            workflow_id,
        )
        dry = api.json_of(api.post("/v1/bulk-retries?dry_run=true", json={"filter": {"workflow_id": workflow_id}}))
        assert (dry["would_retry"], dry["refusals"]) == (2, {"retry_too_soon": 1})
        waiting = api.run()["id"]
        job = start(api, filter={"workflow_id": workflow_id})
        found = until(lambda: (found := job_of(api, job["id"]))["waiting_for"] == "quota" and found)
        assert (found["state"], found["retried"]) == ("running", 1)
        api.report(waiting, status="cancelled")
        done = ended(api, job)
        assert (done["retried"], done["skipped"], done["waiting_for"]) == (2, 1, None)
        assert [item["code"] for item in items(api, job, outcome="skipped")] == ["retry_too_soon"]


# --- dry run ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_in_sum_what_would_happen_and_writes_nothing(api: Client, server: Server) -> None:
    offline, busy = api.machine(status="disconnected"), api.machine()
    pinned = failed_runs(api, 3, machine_id=offline)
    occupant = api.run(machine_id=busy)["id"]
    until(lambda: api.get_run(occupant)["assigned_machine_id"])
    waits = failed_runs(api, 2, machine_id=busy)
    secret = api.run(sensitive_input_values={"password": "x"})["id"]
    api.report(secret, status="error")
    server.stack.sql(
        "UPDATE deletions SET due_at = now() WHERE name = (SELECT secret_path FROM runs WHERE id = $1::uuid)", secret
    )
    active, unknown = api.run()["id"], "00000000-0000-0000-0000-000000000001"
    body = {"run_ids": [*pinned, *waits, secret, active, unknown]}
    found = api.json_of(api.post("/v1/bulk-retries?dry_run=true", json=body, headers={"Idempotency-Key": "dry"}))
    assert api.json_of(api.post("/v1/bulk-retries/dry-run", json=body)) == found
    sample = found.pop("sample")
    assert found == {
        "total": 8,
        "would_retry": 5,
        "refusals": {"run_not_terminal": 1, "run_not_found": 1, "sensitive_inputs_expired": 1},
        "will_wait": {"machine_offline": 3, "machine_busy": 2},
    }
    assert {(one["run_id"], one["code"]) for one in sample} == {
        (active, "run_not_terminal"),
        (unknown, "run_not_found"),
        (secret, "sensitive_inputs_expired"),
    }
    assert "password" in next(one["detail"] for one in sample if one["run_id"] == secret)
    assert api.json_of(api.get("/v1/bulk-retries"))["total"] == 0
    assert api.get_run(pinned[0])["attempt"] == 1


# --- pages ------------------------------------------------------------------------------------------------------------


def test_pages_go_on_where_the_one_before_ended(api: Client) -> None:
    runs = failed_runs(api, 5)
    jobs = [ended(api, start(api, run_ids=runs)) for _ in range(2)]
    path = f"/v1/bulk-retries/{jobs[0]['id']}/items"
    seen, after = [], None
    for total in (2, 2, 1):
        page = api.json_of(api.get(path, params={"limit": 2} | ({"after": after} if after else {})))
        seen += [item["run_id"] for item in page["items"]]
        after = page["next"]
        assert (page["total"], len(page["items"])) == (5, total)
    assert (seen, after) == (runs, None)
    assert api.json_of(api.get(path, params={"outcome": "pending"}))["total"] == 0
    listed = api.json_of(api.get("/v1/bulk-retries", params={"limit": 1}))
    assert (listed["items"][0]["id"], listed["total"]) == (jobs[1]["id"], 2)
    rest = api.json_of(api.get("/v1/bulk-retries", params={"after": listed["next"]}))
    assert [job["id"] for job in rest["items"]] == [jobs[0]["id"]]
    assert api.get(path, params={"after": listed["next"]}).status_code == 422


# --- the work ---------------------------------------------------------------------------------------------------------


def test_organizations_take_turns(api: Client, foreign: Client, server: Server) -> None:
    """One with few runs does not wait for the end of another's many."""
    workflow_id = api.workflow()
    many_failed(server.stack, api.organization, workflow_id, 3_000)
    few = failed_runs(foreign, 2)
    many = start(api, filter={"workflow_id": workflow_id})
    ended(foreign, start(foreign, run_ids=few))
    found = job_of(api, many["id"])
    assert found["pending"] > 0, "it was over before the other one began: the test says nothing"
    api.json_of(api.post(f"/v1/bulk-retries/{many['id']}/abort"))


def test_abort_takes_less_than_a_second(api: Client, server: Server) -> None:
    workflow_id = api.workflow()
    many_failed(server.stack, api.organization, workflow_id, 10_000 if SOAK else 3_000)
    job = start(api, filter={"workflow_id": workflow_id})
    began = time.monotonic()
    aborted = api.json_of(api.post(f"/v1/bulk-retries/{job['id']}/abort"))
    assert (aborted["state"], aborted["pending"]) == ("aborted", 0)
    assert aborted["skipped"] > 0
    assert time.monotonic() - began < 1


def test_a_run_that_no_statement_can_retry_is_skipped_and_the_job_ends(api: Client, server: Server) -> None:
    """A defect of ours with one run must not keep the others waiting for ever."""
    runs = failed_runs(api, 3)
    with broken_run(server.stack, runs[1]):
        done = ended(api, start(api, run_ids=runs))
    assert (done["state"], done["retried"], done["skipped"]) == ("completed", 2, 1)
    assert [item["code"] for item in items(api, done)] == [None, "internal_error", None]


@contextmanager
def broken_run(stack: Stack, run_id: str) -> Iterator[None]:
    name = f"broken_{run_id.replace('-', '_')}"
    stack.sql(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'numeric_value_out_of_range'; END $$"
    )
    stack.sql(
        f"CREATE TRIGGER {name} BEFORE UPDATE ON runs FOR EACH ROW WHEN (OLD.id = '{run_id}') EXECUTE FUNCTION {name}()"
    )
    try:
        yield
    finally:
        stack.sql(f"DROP TRIGGER {name} ON runs")
        stack.sql(f"DROP FUNCTION {name}()")


def test_ended_jobs_go_with_time_and_their_items_with_them(api: Client, server: Server) -> None:
    old, new = (ended(api, start(api, run_ids=failed_runs(api, 2))) for _ in range(2))
    server.stack.sql("UPDATE bulk_retries SET ended_at = now() - interval '91 days' WHERE id = $1::uuid", old["id"])
    until(lambda: api.get(f"/v1/bulk-retries/{old['id']}").status_code == 404)
    assert server.stack.sql("SELECT FROM bulk_retry_items WHERE bulk_retry_id = $1::uuid", old["id"]) == []
    assert len(items(api, new)) == 2


def test_its_retries_are_counted_by_bulk(api: Client, server: Server) -> None:
    def accepted() -> float:
        return scrape(server.url).value("runs_retries_total", outcome="accepted", code="", by="bulk") or 0

    before = accepted()
    ended(api, start(api, run_ids=failed_runs(api, 2)))
    assert accepted() == before + 2
