"""Workflows: what they are, and that one goes with all its runs and whatever those name."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.support.client import Client, file_input
from tests.support.stack import Stack
from tests.support.waiting import until

KEYS = {
    "id",
    "user_id",
    "organization_id",
    "name",
    "main_prompt",
    "input_schema",
    "output_schema",
    "includes_file_exports",
    "is_webhooks_enabled",
    "retry_policy",
    "version",
    "includes_input_variables",
    "terminal_command_allowlist",
    "model_metadata",
    "post_run_check_failure_cleanup_prompt",
    "workflow_metadata",
    "old_versions",
    "tags",
    "post_run_checks",
    "created_at",
    "updated_at",
}


def create(api: Client, **fields: object) -> dict[str, Any]:
    created: dict[str, Any] = api.json_of(api.post("/v1/workflows", json={"main_prompt": "Do it."} | fields), 201)
    return created


def test_create_and_get(api: Client) -> None:
    given = {
        "main_prompt": "Log in as {user} ☃",
        "name": "log in",
        "input_schema": '{"type": "object"}',
        "output_schema": "{}",
        "includes_file_exports": True,
        "is_webhooks_enabled": True,
    }
    workflow = create(api, **given, unknown="ignored", tags=["ignored"])
    assert workflow.keys() == KEYS
    assert workflow == workflow | given | {"organization_id": api.organization, "tags": None, "old_versions": None}
    assert workflow["created_at"] == workflow["updated_at"]
    assert workflow["created_at"].endswith("Z")
    assert api.json_of(api.get(f"/v1/workflows/{workflow['id']}")) == workflow
    least = create(api)
    assert (least["name"], least["input_schema"], least["includes_file_exports"]) == (None, None, False)


@pytest.mark.parametrize(
    "body",
    [{}, {"main_prompt": None}, {"main_prompt": 1}, {"main_prompt": "\0"}, {"main_prompt": "x", "name": "x" * 256}],
)
def test_create_refuses(api: Client, body: dict[str, object]) -> None:
    api.json_of(api.post("/v1/workflows", json=body), 422)


def test_list_is_filtered_and_paged(api: Client, foreign: Client) -> None:
    create(foreign)
    workflows = [create(api, name=str(number)) for number in range(4)]
    changed = api.json_of(api.patch(f"/v1/workflows/{workflows[0]['id']}", json={"name": "0 again"}))

    def listed(**params: str | int) -> list[str]:
        page = api.json_of(api.get("/v1/workflows", params=params))
        assert all(item.keys() == KEYS for item in page["items"])
        return [item["name"] for item in page["items"]]

    assert listed() == listed(of_a_newer_sdk="ignored", include_tags="false") == ["3", "2", "1", "0 again"]
    assert listed(skip=1, limit=2) == ["2", "1"]
    assert listed(created_at_from=workflows[1]["created_at"], created_at_to=workflows[2]["created_at"]) == ["2", "1"]
    assert listed(updated_at_from=changed["updated_at"]) == ["0 again"]
    assert listed(updated_at_to=workflows[1]["updated_at"]) == ["1"]
    assert api.json_of(api.get("/v1/workflows?limit=1"))["total"] == 4
    api.json_of(api.get("/v1/workflows?updated_at_from=soon"), 422)


def test_patch(api: Client) -> None:
    workflow = create(api, name="old", input_schema="{}", includes_file_exports=True)
    changed = api.json_of(api.patch(f"/v1/workflows/{workflow['id']}", json={"main_prompt": "Do that."}))
    assert changed == workflow | {"main_prompt": "Do that.", "version": 2, "updated_at": changed["updated_at"]}
    assert changed["updated_at"] > workflow["updated_at"]
    # null clears what may be null, and leaves alone what cannot be.
    nulls = dict.fromkeys(("name", "input_schema", "main_prompt", "includes_file_exports", "is_webhooks_enabled"))
    cleared = api.json_of(api.patch(f"/v1/workflows/{workflow['id']}", json=nulls))
    assert (cleared["name"], cleared["input_schema"]) == (None, None)
    assert (cleared["main_prompt"], cleared["includes_file_exports"]) == ("Do that.", True)
    api.json_of(api.patch(f"/v1/workflows/{workflow['id']}", json={"main_prompt": "\0"}), 422)


def test_unknown_and_foreign_ids_get_the_same_reply(api: Client, foreign: Client) -> None:
    api.headers["X-Request-ID"] = "the-same"  # which a refusal names
    theirs = create(foreign)
    replies = [
        reply
        for workflow_id in (theirs["id"], str(uuid4()))
        for reply in (
            api.get(f"/v1/workflows/{workflow_id}"),
            api.patch(f"/v1/workflows/{workflow_id}", json={"name": "mine"}),
            api.delete(f"/v1/workflows/{workflow_id}"),
            api.post("/v1/runs", json={"workflow_id": workflow_id}),
        )
    ]
    assert {api.json_of(reply, 404)["code"] for reply in replies} == {"workflow_not_found"}
    assert len({reply.content for reply in replies}) == 1
    assert foreign.json_of(foreign.get(f"/v1/workflows/{theirs['id']}")) == theirs


def test_create_is_idempotent(api: Client) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    first = api.post("/v1/workflows", json={"main_prompt": "once"}, headers=key)
    again = api.post("/v1/workflows", json={"main_prompt": "once"}, headers=key)
    assert (again.status_code, again.content) == (201, first.content)
    assert api.json_of(api.get("/v1/workflows"))["total"] == 1
    api.json_of(api.post("/v1/workflows", json={"main_prompt": "twice"}, headers=key), 422)


# --- deletion ---------------------------------------------------------------------------------------------------------


def test_delete_takes_everything_the_runs_name(api: Client, stack: Stack) -> None:
    machine_id, workflow_id = api.machine(), api.workflow()
    files: dict[str, Any] = {"file_inputs": [file_input()], "sensitive_input_values": {"password": "canary"}}
    finished = api.finished(workflow_id=workflow_id, **files)
    api.json_of(api.retry(finished["id"]))  # an archived attempt
    until(lambda: api.get_run(finished["id"])["assigned_machine_id"] == machine_id, what="the assignment")
    api.report(finished["id"], status="running")
    api.upload(finished["id"])
    queued = api.run(workflow_id=workflow_id, machine_id=machine_id, **files)
    other = api.run()["id"]
    assert api.get_run(other)["scheduling_reason"] == "waiting_for_machine"
    names = stack.sql(
        "SELECT secret_path AS name FROM runs WHERE organization_id = $1 AND secret_path IS NOT NULL"
        " UNION SELECT storage_path FROM run_attachments WHERE organization_id = $1",
        api.organization,
    )
    assert len(names) == 2 + 3

    gone = api.delete(f"/v1/workflows/{workflow_id}")

    assert (gone.status_code, gone.content) == (204, b"")
    api.json_of(api.get(f"/v1/workflows/{workflow_id}"), 404)
    for run_id in (finished["id"], queued["id"]):
        api.json_of(api.get(f"/v1/runs/{run_id}"), 404)
        api.json_of(api.get(f"/v1/runs/{run_id}/attempts"), 404)
    assert [run["id"] for run in api.json_of(api.get("/v1/runs"))["items"]] == [other]
    assert api.json_of(api.get("/v1/run-attachments"))["items"] == []
    wanted = {row["name"] for row in names}
    until(lambda: not wanted & (stack.secret_paths() | stack.blobs()), what="the deletion in Vault and storage")
    # Its active run's machine is free again.
    until(lambda: api.get_run(other)["assigned_machine_id"] == machine_id, what="the other run's assignment")


def test_delete_of_a_workflow_with_many_runs(api: Client, stack: Stack) -> None:
    workflow_id, other = api.workflow(), api.workflow()
    for owner, count in ((workflow_id, 950), (other, 3)):
        stack.sql(
            "INSERT INTO runs (id, organization_id, workflow_id, status, lane, ended_at)"
            " SELECT gen_random_uuid(), $1, $2, 'success', 'any', now() FROM generate_series(1, $3)",
            api.organization,
            UUID(owner),
            count,
        )
    assert api.delete(f"/v1/workflows/{workflow_id}").status_code == 204
    left = api.json_of(api.get("/v1/runs"))
    assert left["total"] == 3
    assert {run["workflow_id"] for run in left["items"]} == {other}


def test_delete_is_idempotent(api: Client) -> None:
    workflow_id, key = api.workflow(), {"Idempotency-Key": str(uuid4())}
    for replayed in (None, "replayed"):
        gone = api.delete(f"/v1/workflows/{workflow_id}", headers=key)
        assert (gone.status_code, gone.headers.get("Idempotency-Status")) == (204, replayed)
    api.json_of(api.delete(f"/v1/workflows/{workflow_id}"), 404)


def test_delete_against_new_runs_and_retries(api: Client, stack: Stack) -> None:
    codes: set[int] = set()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            workflow_id = api.workflow()
            finished = [api.run(workflow_id=workflow_id)["id"] for _ in range(2)]
            for run_id in finished:
                api.report(run_id, status="cancelled")
            body = {"workflow_id": workflow_id, "sensitive_input_values": {"password": "canary"}}
            work = [
                pool.submit(api.post, "/v1/runs", json=body),
                pool.submit(api.retry, finished[0], file_inputs=[file_input()]),
                pool.submit(api.delete, f"/v1/workflows/{workflow_id}"),
                pool.submit(api.post, "/v1/runs", json=body),
                pool.submit(api.retry, finished[1]),
                pool.submit(api.delete, f"/v1/workflows/{workflow_id}"),
            ]
            codes |= {one.result().status_code for one in work}
            api.json_of(api.get(f"/v1/workflows/{workflow_id}"), 404)
    assert codes <= {200, 201, 204, 404}
    assert api.json_of(api.get("/v1/runs"))["total"] == 0
    # What was staged for a run that never came, or went at once, is on the deletion list if it is still there.
    secret_names, blob_names = stack.named()
    assert stack.secret_paths(f"runs/{api.organization}/") <= secret_names
    assert {blob for blob in stack.blobs() if f"{api.organization}/" in blob} <= blob_names
