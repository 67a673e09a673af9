"""Retry policies: what a workflow says is retried by itself, once, when it is due, or dropped with a reason."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.support.client import Client, file_input
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until

AT_ONCE: dict[str, Any] = {"max_retries": 2, "delays_seconds": [0]}
LATER: dict[str, Any] = {"max_retries": 3, "delays_seconds": [600, 3600]}


def workflow(api: Client, policy: dict[str, Any] | None, **more: object) -> str:
    body = {"main_prompt": "Do it.", "retry_policy": policy} | more
    return str(api.json_of(api.post("/v1/workflows", json=body), 201)["id"])


def started(api: Client, policy: dict[str, Any] | None, **options: object) -> str:
    run_id = str(api.run(workflow_id=workflow(api, policy), **options)["id"])
    api.report(run_id, status="running")
    return run_id


def failed(api: Client, policy: dict[str, Any] | None, **options: object) -> dict[str, Any]:
    return api.report(started(api, policy, **options), status="error", error=["it broke"])


def now_due(stack: Stack, run_id: str) -> None:
    stack.sql("UPDATE planned_retries SET look_at = now() - interval '1 s' WHERE run_id = $1", run_id)


def at_attempt(api: Client, run_id: str, attempt: int) -> dict[str, Any]:
    run: dict[str, Any] = until(
        lambda: (found := api.get_run(run_id))["attempt"] == attempt and found, what=f"attempt {attempt}"
    )
    return run


def events(api: Client, run_id: str, wanted: str) -> list[dict[str, Any]]:
    """Those of this kind, once there is one: an event shows when all older transactions have ended."""

    def look() -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = api.json_of(api.get(f"/v1/runs/{run_id}/events"))["items"]
        return [item for item in items if item["event"] == wanted]

    found: list[dict[str, Any]] = until(look, what=wanted)
    return found


def is_planned(stack: Stack, run_id: str) -> bool:
    return bool(stack.sql("SELECT 1 FROM planned_retries WHERE run_id = $1", run_id))


def dropped(api: Client, run_id: str) -> str:
    [event] = events(api, run_id, "retry_dropped")
    run = api.get_run(run_id)
    assert (run["status"], run["next_retry_at"]) == ("error", None)
    return str(event["code"])


# --- the policy -------------------------------------------------------------------------------------------------------


def test_a_workflow_has_no_policy_until_it_is_given_one(api: Client) -> None:
    workflow_id = api.workflow()
    path = f"/v1/workflows/{workflow_id}"
    assert api.json_of(api.get(path))["retry_policy"] is None
    changed = api.json_of(api.patch(path, json={"retry_policy": LATER}))
    whole = {"jitter": 0.0, "on": None, "avoid_last_machine": False, "webhooks": "final"} | LATER
    assert changed["retry_policy"] == whole
    assert api.json_of(api.patch(path, json={"name": "x"}))["retry_policy"] == whole
    assert api.json_of(api.patch(path, json={"retry_policy": None}))["retry_policy"] is None


@pytest.mark.parametrize(
    "policy",
    [
        {"max_retries": 1, "delays_seconds": [0]},
        {"max_retries": 10, "delays_seconds": [86_400] * 10, "jitter": 0.5},
        {"max_retries": 1.0, "delays_seconds": [5.0], "jitter": 0, "webhooks": "every", "avoid_last_machine": True},
        {"max_retries": 1, "delays_seconds": [1], "on": [{"status": "task_failed"}] * 20},
        {"max_retries": 1, "delays_seconds": [1], "on": [{"status": "error", "error_contains": "ä" * 500}]},
        {"max_retries": 1, "delays_seconds": [1], "on": [{"status": "error", "error_code": "a" * 100}]},
    ],
)
def test_a_policy_at_its_bounds_is_taken(api: Client, policy: dict[str, Any]) -> None:
    workflow_id = workflow(api, policy)
    shown = api.json_of(api.get(f"/v1/workflows/{workflow_id}"))["retry_policy"]
    assert {name: shown[name] for name in ("max_retries", "delays_seconds")} == {
        name: policy[name] for name in ("max_retries", "delays_seconds")
    }


RULE = {"status": "error"}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"max_retries": 0}, ["max_retries"]),
        ({"max_retries": 11}, ["max_retries"]),
        ({"max_retries": 1.5}, ["max_retries"]),
        ({"max_retries": "3"}, ["max_retries"]),
        ({"max_retries": None}, ["max_retries"]),
        ({"delays_seconds": []}, ["delays_seconds"]),
        ({"delays_seconds": [1] * 11}, ["delays_seconds"]),
        ({"delays_seconds": [-1]}, ["delays_seconds", 0]),
        ({"delays_seconds": [86_401]}, ["delays_seconds", 0]),
        ({"delays_seconds": 5}, ["delays_seconds"]),
        ({"jitter": -0.1}, ["jitter"]),
        ({"jitter": 0.51}, ["jitter"]),
        ({"jitter": "0.1"}, ["jitter"]),
        ({"on": []}, ["on"]),
        ({"on": [RULE] * 21}, ["on"]),
        ({"on": [{}]}, ["on", 0, "status"]),
        ({"on": [{"status": "cancelled"}]}, ["on", 0, "status"]),
        ({"on": [RULE | {"error_contains": ""}]}, ["on", 0, "error_contains"]),
        ({"on": [RULE | {"error_contains": "x" * 501}]}, ["on", 0, "error_contains"]),
        ({"on": [RULE | {"error_contains": "a\x00b"}]}, ["on", 0, "error_contains"]),
        ({"on": [RULE | {"error_code": "Not a code"}]}, ["on", 0, "error_code"]),
        ({"on": [RULE | {"error_contain": "x"}]}, ["on", 0]),
        ({"avoid_last_machine": "yes"}, ["avoid_last_machine"]),
        ({"webhooks": "none"}, ["webhooks"]),
        ({"delay_seconds": [1]}, []),
    ],
)
def test_a_policy_has_bounds(api: Client, change: dict[str, Any], place: list[str | int]) -> None:
    policy = LATER | change
    for reply in (
        api.post("/v1/workflows", json={"main_prompt": "x", "retry_policy": policy}),
        api.patch(f"/v1/workflows/{api.workflow()}", json={"retry_policy": policy}),
    ):
        [problem] = api.json_of(reply, 422)["detail"]
        assert problem["loc"] == ["body", "retry_policy", *place]
        assert problem["msg"] != "Is not valid."


# --- planned ----------------------------------------------------------------------------------------------------------


def test_a_failed_run_is_retried_when_it_is_due_and_then_stays(api: Client, stack: Stack) -> None:
    run = failed(api, AT_ONCE)
    run_id = run["id"]
    for attempt in (2, 3):
        run = at_attempt(api, run_id, attempt)
        assert (run["status"], run["next_retry_at"], run["retries_left"]) == ("scheduling", None, 3 - attempt)
        api.report(run_id, status="running")
        run = api.report(run_id, status="error", error=["again"])
    assert (run["next_retry_at"], run["retries_left"]) == (None, 0)
    assert not is_planned(stack, run_id)
    attempts = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
    assert [(one["by"], one["retried_by_key_id"], one["overridden"]) for one in attempts] == [("policy", None, [])] * 2
    assert attempts[0]["reason"] == "The workflow's retry policy."
    assert len(events(api, run_id, "retry_planned")) == 2
    assert [event["by"] for event in events(api, run_id, "retried")] == ["policy"] * 2


def test_a_planned_retry_is_shown(api: Client) -> None:
    run = failed(api, LATER)
    assert run["retries_left"] == 3, "a planned one counts as left until it happens"
    wait = datetime.fromisoformat(run["next_retry_at"]) - datetime.fromisoformat(run["changed_at"])
    assert wait == timedelta(seconds=600)
    assert api.get_run(run["id"])["next_retry_at"] == run["next_retry_at"]
    [listed] = api.json_of(api.get("/v1/runs", params={"workflow_id": run["workflow_id"]}))["items"]
    assert (listed["next_retry_at"], listed["retries_left"]) == (run["next_retry_at"], 3)
    [event] = events(api, run["id"], "retry_planned")
    assert (event["by"], event["from_status"], event["to_status"], event["attempt"]) == ("policy", "error", "error", 1)


def test_the_last_delay_repeats(api: Client, stack: Stack) -> None:
    run_id = failed(api, LATER)["id"]
    for attempt, seconds in ((2, 3600), (3, 3600)):
        now_due(stack, run_id)
        at_attempt(api, run_id, attempt)
        api.report(run_id, status="running")
        run = api.report(run_id, status="error")
        wait = datetime.fromisoformat(run["next_retry_at"]) - datetime.fromisoformat(run["changed_at"])
        assert wait == timedelta(seconds=seconds)


def test_jitter_moves_the_time_within_its_part(api: Client) -> None:
    policy = {"max_retries": 1, "delays_seconds": [1000], "jitter": 0.5}
    workflow_id = workflow(api, policy)
    waits = []
    for _ in range(5):
        run_id = api.run(workflow_id=workflow_id)["id"]
        run = api.report(run_id, status="error")
        waits.append(datetime.fromisoformat(run["next_retry_at"]) - datetime.fromisoformat(run["changed_at"]))
    assert len(set(waits)) == 5
    assert all(500 <= wait.total_seconds() <= 1500 for wait in waits)


@pytest.mark.parametrize("status", ["success", "cancelled"])
def test_what_has_not_failed_is_not_retried(api: Client, stack: Stack, status: str) -> None:
    run_id = started(api, LATER)
    run = api.report(run_id, status=status)
    assert (run["next_retry_at"], run["retries_left"]) == (None, 3)
    assert not is_planned(stack, run_id)


def test_without_a_policy_nothing_is_planned(api: Client, stack: Stack) -> None:
    run = failed(api, None)
    assert (run["next_retry_at"], run["retries_left"]) == (None, None)
    assert not is_planned(stack, run["id"])


RULES: list[dict[str, Any]] = [
    {"status": "error", "error_code": "net.down"},
    {"status": "error", "error_contains": "timed out"},
    {"status": "error", "error_contains": "disk", "error_code": "io"},
]


@pytest.mark.parametrize(
    ("report", "rule"),
    [
        ({"error_code": "net.down"}, 1),
        ({"error": ["it timed out", "x"]}, 2),
        ({"error": ["x", "It has timed out."], "error_code": "net.down"}, 1),
        ({"error": ["disk full"], "error_code": "io"}, 3),
        ({"error": ["disk full"]}, None),
        ({"error": ["Timed out"]}, None),
        ({"error": ["it timed", "out"]}, None),
        ({"error_code": "net"}, None),
        ({}, None),
    ],
)
def test_the_first_rule_that_matches_decides(api: Client, report: dict[str, Any], rule: int | None) -> None:
    run_id = started(api, LATER | {"on": RULES})
    run = api.report(run_id, status="error", **report)
    assert (run["next_retry_at"] is not None) == (rule is not None)
    if rule is not None:
        [event] = events(api, run_id, "retry_planned")
        assert event["reason"] == f"Rule {rule} of the workflow's retry policy matched."


def test_a_task_that_failed_is_retried_only_by_a_rule_that_names_it(api: Client) -> None:
    named = LATER | {"on": [{"status": "error"}, {"status": "task_failed", "error_code": "totals.differ"}]}
    for policy, code, is_planned_now in (
        (LATER, "totals.differ", False),
        (named, "totals.differ", True),
        (named, "x", False),
    ):
        run = api.report(started(api, policy), status="task_failed", error_code=code)
        assert (run["next_retry_at"] is not None) == is_planned_now, (policy, code)


def test_a_deleted_machine_ends_and_plans(api: Client, stack: Stack) -> None:
    machine = api.machine()
    policy = LATER | {"on": [{"status": "error", "error_code": "machine_deleted"}]}
    run_id = api.run(workflow_id=workflow(api, policy), machine_id=machine)["id"]
    assert api.delete(f"/v1/machines/{machine}").status_code == 204
    assert api.get_run(run_id)["next_retry_at"]
    now_due(stack, run_id)
    assert dropped(api, run_id) == "machine_deleted"


def test_a_freed_session_plans_nothing(api: Client, stack: Stack) -> None:
    machine = api.machine()
    run_id = api.run(workflow_id=workflow(api, LATER), machine_id=machine, start_session=True)["id"]
    until(lambda: api.get_run(run_id)["assigned_machine_id"])
    api.json_of(api.patch(f"/v1/machines/{machine}", json={"reserved_session_id": None}))
    assert api.get_run(run_id)["status"] == "cancelled"
    assert not is_planned(stack, run_id)


# --- void and dropped -------------------------------------------------------------------------------------------------


def test_a_manual_retry_makes_the_plan_void_and_begins_anew(api: Client, stack: Stack) -> None:
    run_id = failed(api, LATER)["id"]
    now_due(stack, run_id)
    at_attempt(api, run_id, 2)
    run = api.report(run_id, status="error")
    assert run["retries_left"] == 2
    run = api.json_of(api.retry(run_id))
    assert (run["next_retry_at"], run["retries_left"]) == (None, 3)
    now_due(stack, run_id)
    until(lambda: not is_planned(stack, run_id))
    run = api.get_run(run_id)
    assert (run["attempt"], run["status"]) == (3, "scheduling")


def test_an_old_plan_says_nothing_of_a_newer_attempt(api: Client, stack: Stack) -> None:
    run_id = failed(api, LATER)["id"]
    assert api.retry(run_id, automatic_retries=False).status_code == 200
    run = api.report(run_id, status="error")
    assert (run["next_retry_at"], run["retries_left"]) == (None, 0)
    now_due(stack, run_id)
    until(lambda: not is_planned(stack, run_id))
    assert api.get_run(run_id)["attempt"] == 2
    [archived] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
    assert archived["overridden"] == ["automatic_retries"]
    assert api.json_of(api.retry(run_id))["retries_left"] == 3, "it was for that one only"


def test_a_deleted_run_takes_its_plan_along(api: Client, stack: Stack) -> None:
    run_id = failed(api, LATER)["id"]
    assert api.delete(f"/v1/runs/{run_id}").status_code == 204
    assert not is_planned(stack, run_id)


def test_a_plan_is_dropped_when_its_workflow_has_no_policy_any_more(api: Client, stack: Stack) -> None:
    run = failed(api, LATER)
    path = f"/v1/workflows/{run['workflow_id']}"
    api.json_of(api.patch(path, json={"retry_policy": AT_ONCE}))
    assert api.get_run(run["id"])["next_retry_at"] == run["next_retry_at"], "a plan keeps its time"
    api.json_of(api.patch(path, json={"retry_policy": None}))
    now_due(stack, run["id"])
    assert dropped(api, run["id"]) == "policy_removed"


def test_a_deleted_pool_drops_it(api: Client, stack: Stack) -> None:
    pool = api.pool()
    run_id = failed(api, LATER, pool_ids=[pool])["id"]
    assert api.delete(f"/v1/pools/{pool}").status_code == 204
    now_due(stack, run_id)
    assert dropped(api, run_id) == "pool_deleted"


def test_null_drops_it(api: Client, stack: Stack) -> None:
    run = failed(api, LATER)
    shown = api.json_of(api.patch(f"/v1/runs/{run['id']}", json={"next_retry_at": None, "reason": "enough"}))
    assert (shown["next_retry_at"], shown["retries_left"]) == (None, 3)
    assert dropped(api, run["id"]) == "requested"
    [event] = events(api, run["id"], "retry_dropped")
    assert (event["by"], event["reason"]) == ("request", "enough")
    assert event["key_id"]
    api.json_of(api.patch(f"/v1/runs/{run['id']}", json={"next_retry_at": None}))  # nothing is left to drop
    assert len(events(api, run["id"], "retry_dropped")) == 1
    assert not is_planned(stack, run["id"])


def test_next_retry_at_is_only_dropped_and_by_itself(api: Client, stack: Stack) -> None:
    path = f"/v1/runs/{failed(api, LATER)['id']}"
    for body in ({"next_retry_at": "2030-01-01T00:00:00Z"}, {"next_retry_at": None, "error": ["x"]}):
        api.json_of(api.patch(path, json=body), 422)
    assert api.patch(path, json={"next_retry_at": None, "attempt": 2}).json()["code"] == "attempt_superseded"
    for scopes, status in ((["runs:read", "runs:execute"], 403), (["runs:write"], 200)):
        key = stack.new_key(api.organization, scopes=scopes)
        reply = api.patch(path, json={"next_retry_at": None}, headers={"Authorization": f"Bearer {key}"})
        assert reply.status_code == status, reply.text


def test_another_organization_drops_nothing(api: Client, foreign: Client) -> None:
    run = failed(api, LATER)
    assert foreign.patch(f"/v1/runs/{run['id']}", json={"next_retry_at": None}).status_code == 404
    assert api.get_run(run["id"])["next_retry_at"]


# --- secrets and files ------------------------------------------------------------------------------------------------


def test_a_secret_is_kept_until_15_minutes_after_the_plan(api: Client, stack: Stack) -> None:
    policy = {"max_retries": 1, "delays_seconds": [86_400]}
    for given, expected in ((policy, 86_400 + 900), (policy | {"delays_seconds": [60]}, 86_400)):
        run = failed(api, given, sensitive_input_values={"password": "s3cret"})
        [kept] = stack.sql(
            "SELECT extract(epoch FROM due_at - changed_at)::float8 AS seconds"
            " FROM deletions, runs WHERE name = secret_path AND runs.id = $1",
            run["id"],
        )
        assert kept["seconds"] == pytest.approx(expected, abs=5)


def test_a_run_is_retried_with_its_secret(api: Client, stack: Stack) -> None:
    run = failed(api, AT_ONCE, sensitive_input_values={"password": "s3cret"})
    again = at_attempt(api, run["id"], 2)
    assert again["sensitive_input_aliases"] == run["sensitive_input_aliases"]
    assert not stack.sql("SELECT 1 FROM deletions, runs WHERE name = secret_path AND runs.id = $1", run["id"])


def test_a_file_that_expires_before_the_plan_drops_it_at_once(api: Client, stack: Stack) -> None:
    run_id = started(api, LATER, file_inputs=[file_input()])
    stack.sql("UPDATE run_attachments SET expires_at = now() + interval '5 min' WHERE run_id = $1", run_id)
    assert api.report(run_id, status="error")["next_retry_at"] is None
    assert dropped(api, run_id) == "input_attachments_expired"


def test_a_file_that_expires_meanwhile_drops_it_when_it_is_due(api: Client, stack: Stack) -> None:
    run_id = failed(api, LATER, file_inputs=[file_input()])["id"]
    stack.sql("UPDATE run_attachments SET expires_at = now() WHERE run_id = $1", run_id)
    now_due(stack, run_id)
    assert dropped(api, run_id) == "input_attachments_expired"


def test_a_session_is_released_at_each_end(api: Client, stack: Stack) -> None:
    machine = api.machine()
    run_id = api.run(
        workflow_id=workflow(api, LATER), machine_id=machine, start_session=True, release_session_after=True
    )["id"]
    until(lambda: api.get_run(run_id)["assigned_machine_id"])
    api.report(run_id, status="running")
    api.report(run_id, status="error")
    assert api.json_of(api.get(f"/v1/machines/{machine}"))["reserved_session_id"] is None
    now_due(stack, run_id)
    again = at_attempt(api, run_id, 2)
    assert again["session_id"] == run_id


# --- an operator's settings -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(stack: Stack) -> Iterator[Server]:
    """Secrets go at the end of a run, one run of an organization may wait, and a run may be retried after a minute."""
    with own_database(stack, "retry_policies") as own:
        started = start_server(
            own, SECRET_RETENTION_SECONDS=0, QUOTA_ORGANIZATION_WAITING_RUNS=1, RETRY_COOLDOWN_SECONDS=60
        )
        yield started
        started.app.stop()


def test_where_no_secret_is_kept_the_plan_is_dropped_at_once(strict: Server) -> None:
    with strict.client() as api:
        run = failed(api, LATER, sensitive_input_values={"password": "s3cret"})
        assert run["next_retry_at"] is None
        assert dropped(api, run["id"]) == "sensitive_inputs_expired"
        assert failed(api, LATER)["next_retry_at"], "without secrets it is planned"


def test_it_is_due_after_the_cooldown_and_waits_for_room(strict: Server) -> None:
    stack = strict.stack
    with strict.client() as api:
        run = failed(api, AT_ONCE)
        wait = datetime.fromisoformat(run["next_retry_at"]) - datetime.fromisoformat(run["changed_at"])
        assert wait == timedelta(seconds=60)
        other = api.run()["id"]
        stack.sql("UPDATE runs SET changed_at = changed_at - interval '2 min' WHERE id = $1", run["id"])
        now_due(stack, run["id"])
        again = "SELECT 1 FROM planned_retries WHERE run_id = $1 AND look_at > now() - interval '1 s'"
        until(lambda: stack.sql(again, run["id"]), what="it was tried and is tried again")
        assert api.get_run(run["id"])["next_retry_at"] == run["next_retry_at"]
        api.report(other, status="cancelled")
        at_attempt(api, run["id"], 2)


# --- webhooks ---------------------------------------------------------------------------------------------------------


def sent(stack: Stack, run_id: str) -> list[int]:
    """The attempts whose ending has an event."""
    rows = stack.sql("SELECT attempt FROM webhook_events WHERE run_id = $1 ORDER BY attempt", run_id)
    return [row["attempt"] for row in rows]


def hooked(api: Client, policy: dict[str, Any]) -> dict[str, Any]:
    api.webhook_endpoint()
    run_id = api.run(workflow_id=workflow(api, policy, is_webhooks_enabled=True))["id"]
    return api.report(run_id, status="error", error=["it broke"])


def test_only_the_last_ending_is_sent(api: Client, stack: Stack) -> None:
    run_id = hooked(api, AT_ONCE | {"max_retries": 1})["id"]
    at_attempt(api, run_id, 2)
    assert sent(stack, run_id) == []
    api.report(run_id, status="error")
    assert sent(stack, run_id) == [2]


def test_every_ending_is_sent_if_the_policy_says_so(api: Client, stack: Stack) -> None:
    run = hooked(api, LATER | {"webhooks": "every"})
    [event] = stack.sql(
        "SELECT convert_from(body, 'UTF8')::json->'run' AS run FROM webhook_events WHERE run_id = $1", run["id"]
    )
    assert run["next_retry_at"] in str(event["run"])
    assert api.patch(f"/v1/runs/{run['id']}", json={"next_retry_at": None}).is_success
    assert sent(stack, run["id"]) == [1]


def test_a_dropped_plan_sends_its_ending(api: Client, stack: Stack) -> None:
    run = hooked(api, LATER)
    assert sent(stack, run["id"]) == []
    api.json_of(api.patch(f"/v1/workflows/{run['workflow_id']}", json={"retry_policy": None}))
    now_due(stack, run["id"])
    assert dropped(api, run["id"]) == "policy_removed"
    assert sent(stack, run["id"]) == [1]


def test_a_plan_dropped_at_once_sends_its_ending(api: Client, stack: Stack) -> None:
    api.webhook_endpoint()
    run_id = api.run(workflow_id=workflow(api, LATER, is_webhooks_enabled=True), file_inputs=[file_input()])["id"]
    stack.sql("UPDATE run_attachments SET expires_at = now() + interval '5 min' WHERE run_id = $1", run_id)
    api.report(run_id, status="error")
    assert sent(stack, run_id) == [1]


def test_a_manual_retry_or_a_delete_sends_none(api: Client, stack: Stack) -> None:
    retried, deleted = hooked(api, LATER)["id"], hooked(api, LATER)["id"]
    assert api.retry(retried).status_code == 200
    assert api.delete(f"/v1/runs/{deleted}").status_code == 204
    now_due(stack, retried)
    until(lambda: not is_planned(stack, retried))
    assert sent(stack, retried) == sent(stack, deleted) == []
