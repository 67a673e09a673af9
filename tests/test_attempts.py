"""What stays of an attempt by default: what it cost, and the version of the workflow that it executed."""

from typing import Any

import pytest

from tests.support.client import Client
from tests.support.stack import Stack
from tests.support.waiting import until


def attempts(api: Client, run_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
    return found


def attempt(api: Client, run_id: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts/{number}"))
    return found


def versions(api: Client, workflow_id: str, **query: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.json_of(api.get(f"/v1/workflows/{workflow_id}/versions", params=query))
    return found


def change(api: Client, workflow_id: str, **fields: object) -> dict[str, Any]:
    changed: dict[str, Any] = api.json_of(api.patch(f"/v1/workflows/{workflow_id}", json=fields))
    return changed


def test_what_an_attempt_used_stays_and_what_it_produced_is_cleared(api: Client, stack: Stack) -> None:
    run_id = api.finished("error")["id"]
    api.report(run_id, usage_metadata={"tokens": 1.0})
    before = api.get_run(run_id)
    current = attempt(api, run_id, 1)
    shared = ("status", "error", "output_data", "run_message_history", "output_attachment_ids", "usage_metadata")
    assert {name: current[name] for name in shared} == {name: before[name] for name in shared}
    assert (current["retried_at"], current["by"], current["overridden"]) == (None, None, [])
    assert current["outputs_are_kept"] is True
    api.json_of(api.retry(run_id, reason="again"))

    def check() -> None:
        assert [one["usage_metadata"] for one in attempts(api, run_id)] == [{"tokens": 1.0}]
        found = attempt(api, run_id, 1)
        assert (found["usage_metadata"], found["error"], found["reason"]) == ({"tokens": 1.0}, ["it broke"], "again")
        assert (found["output_data"], found["run_message_history"], found["output_attachment_ids"]) == (None, None, [])
        assert found["outputs_are_kept"] is False
        assert found.keys() == current.keys() > attempts(api, run_id)[0].keys()

    check()  # at once
    rows = "SELECT attempt, output_data::text AS output, is_superseded FROM run_outputs WHERE run_id = $1"
    until(lambda: stack.sql(rows, run_id) == [{"attempt": 1, "output": None, "is_superseded": False}])
    check()  # and after a round has removed the rest
    assert api.json_of(api.get(f"/v1/run-attachments?run_id={run_id}"))["items"] == []
    # Without usage no row is left.
    api.report(run_id, status="running", output_data={"a": 1})
    api.report(run_id, status="cancelled")
    api.json_of(api.retry(run_id))
    until(lambda: [row["attempt"] for row in stack.sql(rows, run_id)] == [1])
    assert [one["usage_metadata"] for one in attempts(api, run_id)] == [None, {"tokens": 1.0}]


def test_an_attempt_that_is_not_there_is_not_found(api: Client, foreign: Client) -> None:
    run_id = api.run()["id"]
    assert attempt(api, run_id, 1)["status"] == "scheduling"
    assert api.json_of(api.get(f"/v1/runs/{run_id}/attempts/2"), 404)["code"] == "attempt_not_found"
    assert foreign.json_of(foreign.get(f"/v1/runs/{run_id}/attempts/1"), 404)["code"] == "run_not_found"
    for number in ("0", "-1", "x", str(2**31)):
        [error] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts/{number}"), 422)["detail"]
        assert error["loc"] == ["path", "attempt"]
    for query in ("attempt=1", "attempt=0", f"run_id={run_id}&attempt=x"):
        [error] = api.json_of(api.get(f"/v1/run-attachments?{query}"), 422)["detail"]
        assert error["loc"] == ["query", "attempt"]


def test_a_run_has_the_version_that_its_executor_read(api: Client) -> None:
    workflow = api.workflow()
    run_id = api.run(workflow_id=workflow)["id"]
    assert api.get_run(run_id)["workflow_version"] is None
    assert change(api, workflow, main_prompt="Do more.")["version"] == 2
    assert api.report(run_id, status="running")["workflow_version"] == 2
    change(api, workflow, main_prompt="Do even more.")
    assert api.report(run_id, status="error")["workflow_version"] == 2
    retried = api.json_of(api.retry(run_id))
    assert retried["workflow_version"] is attempt(api, run_id, 2)["workflow_version"] is None
    assert attempts(api, run_id)[0]["workflow_version"] == attempt(api, run_id, 1)["workflow_version"] == 2
    assert api.report(run_id, status="cancelled")["workflow_version"] is None, "it never began"
    api.json_of(api.retry(run_id))
    assert api.report(run_id, status="running")["workflow_version"] == 3
    [listed] = api.json_of(api.get("/v1/runs", params={"workflow_id": workflow}))["items"]
    assert listed["workflow_version"] == 3


def test_a_change_keeps_what_it_replaces(api: Client, foreign: Client) -> None:
    body = {"main_prompt": "first", "name": "Report", "input_schema": "{}"}
    workflow = api.json_of(api.post("/v1/workflows", json=body), 201)
    assert workflow["version"] == 1
    assert versions(api, workflow["id"]) == []
    # The same again, and what is no part of a version, make none.
    for fields in (
        {"name": "Report", "main_prompt": "first"},
        {"is_webhooks_enabled": True},
        {"main_prompt": None},
        {},
    ):
        assert change(api, workflow["id"], **fields)["version"] == 1
    assert versions(api, workflow["id"]) == []
    changes: list[dict[str, Any]] = [
        {"main_prompt": "second"},
        {"name": None, "output_schema": "{}"},
        {"input_schema": "[]", "is_webhooks_enabled": False},
    ]
    states = [workflow, *(change(api, workflow["id"], **fields) for fields in changes)]
    assert [state["version"] for state in states] == [1, 2, 3, 4]
    found = versions(api, workflow["id"])
    kept = ("version", "name", "main_prompt", "input_schema", "output_schema")
    assert [{name: one[name] for name in kept} for one in found] == [
        {name: state[name] for name in kept} for state in states[2::-1]
    ]
    key_id = api.json_of(api.get("/v1/whoami"))["key_id"]
    assert {(one["workflow_id"], one["replaced_by_key_id"]) for one in found} == {(workflow["id"], key_id)}
    assert [one["replaced_at"] for one in found] == sorted((one["replaced_at"] for one in found), reverse=True)
    assert versions(api, workflow["id"], limit=2) == found[:2]
    assert foreign.get(f"/v1/workflows/{workflow['id']}/versions").json()["code"] == "workflow_not_found"
    assert api.delete(f"/v1/workflows/{workflow['id']}").status_code == 204
    assert api.get(f"/v1/workflows/{workflow['id']}/versions").status_code == 404


@pytest.mark.parametrize("limit", ["0", "1001", "x"])
def test_a_bad_number_of_versions_is_refused(api: Client, limit: str) -> None:
    [error] = api.json_of(api.get(f"/v1/workflows/{api.workflow()}/versions?limit={limit}"), 422)["detail"]
    assert error["loc"] == ["query", "limit"]


def test_the_last_thousand_versions_are_kept_and_too_many_bytes_are_refused(api: Client, stack: Stack) -> None:
    workflow = api.workflow()
    stack.sql("UPDATE workflows SET version = 1001 WHERE id = $1", workflow)
    stack.sql(
        "INSERT INTO workflow_versions (workflow_id, version, main_prompt)"
        " SELECT $1, n, repeat('x', 100000) FROM generate_series(1, 1000) AS n",
        workflow,
    )
    assert change(api, workflow, name="new")["version"] == 1002
    assert stack.sql(
        "SELECT min(version), max(version), count(*) FROM workflow_versions WHERE workflow_id = $1", workflow
    ) == [{"min": 2, "max": 1001, "count": 1000}]
    [error] = api.json_of(api.get(f"/v1/workflows/{workflow}/versions"), 422)["detail"]
    assert (error["loc"], error["type"]) == (["query", "limit"], "page_too_large")
    fits = int(error["msg"].partition("limit=")[2].split()[0])
    assert 300 < fits < 340, "32 MiB of 100 KB"
    assert len(versions(api, workflow, limit=fits)) == fits
    assert api.get(f"/v1/workflows/{workflow}/versions?limit={fits + 1}").status_code == 422
