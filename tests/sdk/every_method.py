"""Drive the served app through every SDK method that has a route here, sync and async. Run by the SDK's own Python.

Reads {"url", "keys": {"sync", "async"}, "foreign_key"} and prints what it saw, per group of methods and style. What a
version has is looked up, not listed: a method or a field of a retry that this script does not know is a failure.
"""

import asyncio
import base64
import importlib
import inspect
import json
import re
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

# By name: these are packages of another environment.
cyberdesk: Any = importlib.import_module("cyberdesk")
models: Any = importlib.import_module("openapi_client.cyberdesk_cloud_client.models")
types: Any = importlib.import_module("openapi_client.cyberdesk_cloud_client.types")
UnexpectedStatus: Any = importlib.import_module("openapi_client.cyberdesk_cloud_client.errors").UnexpectedStatus

APIS = ("machines", "pools", "workflows", "runs", "run_attachments")
NO_ROUTE = {
    "runs": {"chain", "get_trajectory", "generate_trajectory", "get_image_signed_url"},
    "workflows": {
        "duplicate",
        "merge",
        "upload_prompt_image",
        "list_prompt_images",
        "get_prompt_image_signed_url",
        "delete_prompt_image",
    },
}
READS = {"list", "get", "get_pools", "get_download_url", "download", "save_to_file"}
VERSION = version("cyberdesk")


def client(url: str, key: str, **options: Any) -> Any:
    """The SDK as its documentation starts it."""
    return cyberdesk.CyberdeskClient(key, base_url=url, **options)


class Sdk:
    """One client in one style. The scenarios below are written once and run in both."""

    def __init__(self, url: str, key: str, style: str) -> None:
        self.url = url
        self.style = style
        self.keys: list[str] = []  # idempotency keys, one per write that the SDK sent
        self.writes = 0
        self.called: set[str] = set()
        self.limits: dict[str, str] = {}
        options = {}
        self.sends_keys = "idempotency_key_generator" in inspect.signature(cyberdesk.CyberdeskClient).parameters
        if self.sends_keys:
            options["idempotency_key_generator"] = self.new_key
        self.client = client(url, key, **options)
        self.runner = asyncio.Runner()

    def new_key(self) -> str:
        self.keys.append(str(uuid4()))
        return self.keys[-1]

    def respond(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The SDK's own ApiResponse. A name like "runs.retry" is called in this object's style."""
        api, _, name = method.partition(".")
        self.called.add(method)
        owner = getattr(self.client, api)
        if self.style == "sync":
            response = getattr(owner, f"{name}_sync")(*arguments, **options)
        else:
            response = self.runner.run(getattr(owner, name)(*arguments, **options))
        if name not in READS and response.error is None and not isinstance(response.data, models.HTTPValidationError):
            self.writes += response.data is not None
        return response

    def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The data of a call that must succeed."""
        response = self.respond(method, *arguments, **options)
        if isinstance(response.error, Exception):
            raise response.error
        assert response.error is None, f"{method}: {response.error}"
        assert not isinstance(response.data, models.HTTPValidationError), f"{method}: {response.data}"
        assert response.data is not None, f"{method}: no data"
        return response.data

    def complete(self, response: Any, model: Any) -> Any:
        """Of this model, with every key that the version declares."""
        assert isinstance(response, model), type(response)
        names = {field.name for field in model.__attrs_attrs__} - {"included"}  # only with `include`
        missing = sorted(name for name in names if isinstance(getattr(response, name), types.Unset))
        assert not missing, f"{model.__name__} came without {missing}"
        return response

    # --- what scenarios need again and again

    def clear(self) -> None:
        """Nothing waits for a machine, and no machine is there: scenarios do not meet."""
        for api in ("runs", "machines"):
            for item_id in ids(self(f"{api}.list", limit=1000)):
                self(f"{api}.delete", item_id)

    def workflow(self) -> str:
        return str(self("workflows.create", models.WorkflowCreate.from_dict({"main_prompt": "Log in as {user}."})).id)

    def machine(self, **fields: Any) -> str:
        body = {"fingerprint": uuid4().hex, "unkey_key_id": "key-1", **fields}
        return str(self("machines.create", models.MachineCreate.from_dict(body)).id)

    def pool(self) -> str:
        return str(self("pools.create", models.PoolCreate.from_dict({"name": f"pool {uuid4()}"})).id)

    def run(self, **fields: Any) -> Any:
        body = {"workflow_id": self.workflow(), **fields}
        return self.complete(self("runs.create", models.RunCreate.from_dict(body)), models.RunResponse)

    def report(self, run_id: str, **fields: Any) -> Any:
        return self("runs.update", run_id, models.RunUpdate.from_dict(fields))

    def upload(self, run_id: str, content: bytes = b"result", **fields: Any) -> Any:
        body = {
            "run_id": run_id,
            **file("result.txt", content),
            "content_type": "text/plain",
            "attachment_type": "output",
            **fields,
        }
        return self("run_attachments.create", models.RunAttachmentCreate.from_dict(body))

    def finish(self, run_id: str, status: str = "error") -> Any:
        """Run it to its end, with something of everything that a retry clears."""
        self.report(run_id, status="running")
        output = self.upload(run_id)
        ended = self.report(
            run_id,
            status=status,
            error=["it broke"],
            output_data={"answer": 42},
            run_message_history=[{"role": "assistant", "content": "done"}],
            output_attachment_ids=[str(output.id)],
        )
        assert ended.status == status
        assert ended.to_dict()["output_attachment_ids"] == [str(output.id)]
        return ended

    def fails(self, method: str, *arguments: Any, status: int, code: str) -> None:
        """Refused with this status: as an exception that has it, or (SDKs before 2.1.20) as an empty response."""
        raises = self.client._client.raise_on_unexpected_status
        response = self.respond(method, *arguments)
        assert response.data is None
        if not raises:
            assert response.error is None
            self.limits["errors"] = "401, 404, 409 leave data and error empty: set `raise_on_unexpected_status`"
            self.client._client.raise_on_unexpected_status = True
            response = self.respond(method, *arguments)
            self.client._client.raise_on_unexpected_status = False
        assert isinstance(response.error, UnexpectedStatus), repr(response.error)
        assert response.error.status_code == status, response.error
        problem = json.loads(response.error.content)
        assert (problem["status"], problem["code"]) == (status, code), problem


def file(name: str, content: bytes) -> dict[str, Any]:
    return {"filename": name, "content": base64.b64encode(content).decode()}


def ids(page: Any) -> list[str]:
    return [str(item.id) for item in page.items]


def until(condition: Callable[[], Any]) -> Any:
    """What is done after the reply, in the background."""
    deadline = time.monotonic() + 15
    while not (value := condition()):
        assert time.monotonic() < deadline, "not within 15 s"
        time.sleep(0.02)
    return value


def recent(moment: Any) -> bool:
    """A time with a zone, of the last minute."""
    assert isinstance(moment, datetime)
    return abs(datetime.now(timezone.utc) - moment) < timedelta(minutes=1)  # noqa: UP017 - as the SDK's oldest Pythons


# --- the scenarios, one per group of methods --------------------------------------------------------------------------


def machines(sdk: Sdk) -> None:
    body = {"fingerprint": "f-1", "unkey_key_id": "key-1", "name": "first", "hostname": "host", "os_info": "Windows 11"}
    created = sdk("machines.create", models.MachineCreate.from_dict({**body, "version": "1.0"}))
    sdk.complete(created, models.MachineResponse)
    machine_id = str(created.id)
    assert isinstance(created.id, UUID)
    assert created.status is models.MachineStatus.CONNECTED
    assert created.is_available is True
    assert recent(created.created_at)
    assert recent(created.last_seen)
    shown = created.to_dict()
    assert {name: shown[name] for name in ("name", "hostname", "os_info", "version", "unkey_key_id")} == {
        "name": "first",
        "hostname": "host",
        "os_info": "Windows 11",
        "version": "1.0",
        "unkey_key_id": "key-1",
    }
    assert sdk("machines.get", machine_id).to_dict() == shown

    change = models.MachineUpdate.from_dict({"name": "renamed", "status": "disconnected", "is_available": False})
    updated = sdk("machines.update", machine_id, change)
    assert (updated.name, updated.status.value, updated.is_available) == ("renamed", "disconnected", False)
    assert updated.hostname == "host"

    second = sdk.machine(name="second")
    page = sdk("machines.list")
    assert page.total == 2
    assert ids(page) == [second, machine_id]
    assert ids(sdk("machines.list", skip=1, limit=1)) == [machine_id]
    assert ids(sdk("machines.list", status=models.MachineStatus.DISCONNECTED)) == [machine_id]
    assert ids(sdk("machines.list", created_at_from=datetime.now(timezone.utc) + timedelta(hours=1))) == []  # noqa: UP017

    pools = sorted([sdk.pool(), sdk.pool()])
    moved = sdk("machines.update_pools", second, models.MachinePoolUpdate.from_dict({"pool_ids": pools}))
    sdk.complete(moved, models.MachineResponse)
    assert sorted(str(pool.id) for pool in moved.pools) == pools
    assert sorted(str(pool.id) for pool in sdk("machines.get_pools", second)) == pools
    assert sdk("machines.update_pools", second, models.MachinePoolUpdate.from_dict({"pool_ids": []})).pools == []

    assert sdk("machines.delete", second) == {"success": True}
    sdk.fails("machines.get", second, status=404, code="machine_not_found")


def pools(sdk: Sdk) -> None:
    created = sdk("pools.create", models.PoolCreate.from_dict({"name": "invoices", "description": "both floors"}))
    pool_id = str(sdk.complete(created, models.PoolResponse).id)
    assert (created.name, created.description, created.machine_count) == ("invoices", "both floors", 0)
    assert recent(created.created_at)

    updated = sdk("pools.update", pool_id, models.PoolUpdate.from_dict({"name": "bills"}))
    assert (updated.name, updated.description) == ("bills", "both floors")

    first, second = sdk.machine(), sdk.machine()
    both = models.MachinePoolAssignment.from_dict({"machine_ids": [first, second]})
    filled = sdk.complete(sdk("pools.add_machines", pool_id, both), models.PoolWithMachines)
    assert {str(machine.id) for machine in filled.machines} == {first, second}
    assert filled.machine_count == 2
    assert sdk("pools.get", pool_id).machine_count == 2
    detailed = sdk("pools.get", pool_id, include_machines=True).to_dict()
    assert {machine["id"] for machine in detailed["machines"]} == {first, second}
    one = models.MachinePoolAssignment.from_dict({"machine_ids": [first]})
    assert sdk("pools.remove_machines", pool_id, one) == {"success": True}
    assert sdk("pools.get", pool_id).machine_count == 1

    other = sdk.pool()
    page = sdk("pools.list")
    assert page.total == len(page.items)
    assert ids(page)[:2] == [other, pool_id]
    assert ids(sdk("pools.list", skip=1, limit=1)) == [pool_id]
    assert sdk("pools.delete", pool_id) == {"success": True}
    sdk.fails("pools.get", pool_id, status=404, code="pool_not_found")


def workflows(sdk: Sdk) -> None:
    body = {"main_prompt": "Post {amount}.", "name": "Post", "output_schema": "{}", "includes_file_exports": True}
    created = sdk("workflows.create", models.WorkflowCreate.from_dict(body))
    workflow_id = str(sdk.complete(created, models.WorkflowResponse).id)
    assert (created.main_prompt, created.name, created.includes_file_exports) == ("Post {amount}.", "Post", True)
    assert recent(created.updated_at)
    updated = sdk("workflows.update", workflow_id, models.WorkflowUpdate.from_dict({"name": "Post it"}))
    assert (updated.name, updated.main_prompt) == ("Post it", "Post {amount}.")
    assert alike(sdk("workflows.get", workflow_id), updated)
    other = sdk.workflow()
    page = sdk("workflows.list")
    assert page.total == len(page.items)
    assert ids(page)[:2] == [other, workflow_id]
    assert ids(sdk("workflows.list", skip=1, limit=1)) == [workflow_id]
    assert sdk("workflows.delete", workflow_id) == {"success": True}
    sdk.fails("workflows.get", workflow_id, status=404, code="workflow_not_found")


def refused(sdk: Sdk, method: str, *arguments: Any, **options: Any) -> None:
    """As not supported, by the name of what was sent."""
    response = sdk.respond(method, *arguments, **options)
    found = response.data if response.data is not None else response.error
    assert isinstance(found, models.HTTPValidationError), repr(found)
    assert [item.type_ for item in found.detail] == ["not_supported"], found


def alike(one: Any, other: Any, at_least: int = 10) -> bool:
    """In all keys that both have: while two versions answer, a reply has keys that only the later one shows."""
    first, second = one.to_dict(), other.to_dict()
    both = first.keys() & second.keys()
    return len(both) > at_least and {name: first[name] for name in both} == {name: second[name] for name in both}


def included(reply: Any) -> set[tuple[str, str]]:
    """What `include` has added, by type and id."""
    return {(one.type_, str(one.id)) for one in reply.included}


def runs(sdk: Sdk) -> None:
    sdk.clear()
    pool_id = sdk.pool()
    created = sdk.run(
        input_values={"user": "ada"},
        sensitive_input_values={"password": "first-secret"},
        file_inputs=[{**file("in.txt", b"hello"), "target_path": "C:\\in\\in.txt", "cleanup_imports_after_run": True}],
        pool_ids=[pool_id],
    )
    run_id = str(created.id)
    shown = created.to_dict()
    assert isinstance(created.id, UUID)
    assert created.status is models.RunStatus.SCHEDULING
    assert recent(created.created_at)
    assert shown["input_values"] == {"user": "ada"}
    assert shown["sensitive_input_aliases"]["password"].startswith("vault://")
    assert "first-secret" not in json.dumps(shown)
    assert shown["pool_ids"] == [pool_id]
    assert len(shown["input_attachment_ids"]) == 1
    assert (created.error, created.output_data, created.run_message_history) == (None, None, None)
    assert created.output_attachment_ids == []
    assert alike(sdk("runs.get", run_id), created, 20)

    running = sdk.report(run_id, status="running")
    assert running.status is models.RunStatus.RUNNING
    ended = sdk.report(run_id, status="success", output_data={"answer": 42}, run_message_history=[{"role": "user"}])
    assert ended.status is models.RunStatus.SUCCESS
    assert ended.output_data.to_dict() == {"answer": 42}
    assert [line.to_dict() for line in ended.run_message_history] == [{"role": "user"}]

    # What the newest versions can ask for is stored and shown, and kept by a retry; what is not done is refused.
    model, other = str(uuid4()), str(uuid4())
    own = sdk.run(main_prompt="Do that.", main_agent_model_id=model, model_metadata={"fallback_model_1_id": other})
    own_id, asked = str(own.id), {"fallback_model_1_id": other, "main_agent_model_id": model}

    def said(run: Any) -> tuple[Any, dict[str, Any], Any]:
        shown = run.to_dict()
        metadata = {name: value for name, value in shown["model_metadata"].items() if value is not None}
        return shown["main_prompt"], metadata, shown["usage_metadata"]

    assert said(own) == ("Do that.", asked, None)
    sdk.report(own_id, status="running")
    assert said(sdk.report(own_id, status="error", usage_metadata={"tokens": 1})) == ("Do that.", asked, {"tokens": 1})
    assert said(sdk("runs.retry", own_id, models.RunRetry.from_dict({}))) == ("Do that.", asked, None)
    refused(sdk, "runs.update", own_id, models.RunUpdate.from_dict({"post_run_checks": []}))
    refused(sdk, "workflows.create", models.WorkflowCreate.from_dict({"main_prompt": "x", "model_metadata": asked}))
    if "include_tags" in inspect.signature(sdk.client.workflows.list).parameters:
        refused(sdk, "workflows.list", include_tags=True)

    workflow_id = sdk.workflow()
    bulk = models.RunBulkCreate.from_dict(
        {
            "workflow_id": workflow_id,
            "count": 5,
            "input_values": {"n": 1},
            "sensitive_input_values": {"pin": "1234"},
            "file_inputs": [file("in.txt", b"x")],
        }
    )
    made = sdk("runs.bulk_create", bulk)
    assert (len(made.created_runs), made.failed_count) == (5, 0)
    assert len({run.to_dict()["sensitive_input_aliases"]["pin"] for run in made.created_runs}) == 5

    # Pages, newest first, that together are the whole.
    pages = [sdk("runs.list", skip=skip, limit=2, workflow_id=workflow_id) for skip in (0, 2, 4, 6)]
    assert [page.total for page in pages] == [5, 5, 5, 5]
    assert [len(page.items) for page in pages] == [2, 2, 1, 0]
    listed = [run for page in pages for run in page.items]
    assert {str(run.id) for run in listed} == {str(run.id) for run in made.created_runs}
    assert listed == sorted(listed, key=lambda run: (run.created_at, str(run.id)), reverse=True)

    # Every filter.
    assert run_id in ids(sdk("runs.list", status=models.RunStatus.SUCCESS))
    assert run_id not in ids(sdk("runs.list", status=models.RunStatus.RUNNING))
    assert sdk("runs.list", workflow_id=workflow_id, status=models.RunStatus.SUCCESS).total == 0
    machine_id = sdk.machine()
    pinned = sdk.run(machine_id=machine_id, start_session=True, session_alias="main", release_session_after=True)
    assert (pinned.session_alias, pinned.release_session_after) == ("main", True)
    on_machine = sdk("runs.list", machine_id=machine_id).items
    assert str(pinned.id) in {str(run.id) for run in on_machine}
    assert {str(run.machine_id) for run in on_machine} == {machine_id}
    assert ids(sdk("runs.list", session_id=str(pinned.session_id))) == [str(pinned.id)]
    day = timedelta(days=1)
    assert sdk("runs.list", created_at_from=created.created_at - day, created_at_to=created.created_at + day).total >= 7
    assert sdk("runs.list", created_at_from=(created.created_at + day).isoformat()).total == 0
    assert sdk("runs.list", created_at_to=created.created_at - day).total == 0

    if hasattr(models.RunStatus, "TASK_FAILED"):
        task = str(sdk.run(workflow_id=workflow_id).id)
        sdk.report(task, status="running")
        assert sdk.report(task, status="task_failed").status is models.RunStatus.TASK_FAILED
        assert ids(sdk("runs.list", workflow_id=workflow_id, status=models.RunStatus.TASK_FAILED)) == [task]
        if hasattr(models.RunStatus, "RUNNING_CHECKS"):  # it came later
            assert sdk("runs.list", status=models.RunStatus.RUNNING_CHECKS).items == []
        assert sdk("runs.retry", task, models.RunRetry.from_dict({})).status is models.RunStatus.SCHEDULING
    if "include" in inspect.signature(sdk.client.runs.list).parameters:
        workflow = {("workflow", str(pinned.workflow_id))}
        machine = {("machine", machine_id)}
        page = sdk("runs.list", machine_id=machine_id, include=["workflow", "machine"])
        assert included(page) >= workflow | machine
        assert included(sdk("runs.get", str(pinned.id), include=["workflow", "machine.pools"])) == workflow | machine
        assert included(sdk("machines.get", machine_id, include=["pools"])) == set()

    # Every field of the projection by itself.
    for field in models.RunField:
        response = sdk.respond("runs.list", workflow_id=workflow_id, limit=1, fields=[field])
        if isinstance(response.error, KeyError):
            sdk.limits["runs.list"] = "`list(fields=...)` cannot be read: this version demands every key"
            break
        [run] = response.data.items
        assert field.value in run.to_dict() or field.value == "machine_id", field
        assert "input_values" in run.to_dict() or field.value != "input_values"

    assert sdk("runs.delete", run_id) == {"success": True}
    sdk.fails("runs.get", run_id, status=404, code="run_not_found")


def retry(sdk: Sdk) -> None:
    """Each field that this version's RunRetry has, alone and then together, and what is always cleared."""
    sdk.clear()
    machine_id, pool_id = sdk.machine(), sdk.pool()
    sdk("pools.add_machines", pool_id, models.MachinePoolAssignment.from_dict({"machine_ids": [machine_id]}))
    other_session = str(sdk.run(start_session=True).session_id)
    run_id = str(
        sdk.run(
            input_values={"user": "ada"},
            sensitive_input_values={"password": "first-secret"},
            file_inputs=[file("in.txt", b"hello")],
        ).id
    )

    def again(**fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run before and after a retry with these fields."""
        before = sdk.finish(run_id).to_dict()
        after = sdk("runs.retry", run_id, models.RunRetry.from_dict(fields))
        sdk.complete(after, models.RunResponse)
        shown: dict[str, Any] = after.to_dict()
        assert after.status is models.RunStatus.SCHEDULING
        assert (after.error, after.output_data, after.run_message_history) == (None, None, None)
        assert after.output_attachment_ids == []
        assert {shown.get("started_at"), shown.get("ended_at")} == {None}
        assert shown["attempt"] == before["attempt"] + 1
        assert {shown[name] == before[name] for name in ("id", "workflow_id", "created_at")} == {True}
        return before, shown

    def kept(before: dict[str, Any], after: dict[str, Any], *but: str) -> None:
        names = {"input_values", "sensitive_input_aliases", "input_attachment_ids", "pool_ids", "session_id"}
        assert {name for name in names if before[name] != after[name]} == set(but)

    def input_values() -> None:
        before, after = again(input_values={"user": "grace"})
        assert after["input_values"] == {"user": "grace"}
        kept(before, after, "input_values")

    def sensitive_input_values() -> None:
        before, after = again(sensitive_input_values={"password": "second-secret", "bank": {"pin": 1234}})
        aliases = after["sensitive_input_aliases"]
        assert aliases["password"].startswith("vault://")
        assert aliases["bank"].startswith("vault+json://")
        assert "second-secret" not in json.dumps(after)
        kept(before, after, "sensitive_input_aliases")

    def file_inputs() -> None:
        before, after = again(file_inputs=[file("a.txt", b"a"), file("b.txt", b"b")])
        assert len(after["input_attachment_ids"]) == 2
        kept(before, after, "input_attachment_ids")
        page = sdk("run_attachments.list", run_id=run_id, attachment_type=models.AttachmentType.INPUT)
        assert sorted(item.filename for item in page.items) == ["a.txt", "b.txt"]

    def pin() -> None:
        before, after = again(machine_id=machine_id)
        assert after["machine_id"] == machine_id
        kept(before, after)

    def pool_ids() -> None:
        before, after = again(pool_ids=[pool_id])
        assert after["pool_ids"] == [pool_id]
        kept(before, after, "pool_ids")

    def session_id() -> None:
        before, after = again(session_id=other_session)
        assert after["session_id"] == other_session
        kept(before, after, "session_id")

    def start_session() -> None:
        before, after = again(start_session=True)
        assert after["session_id"] not in (None, before["session_id"], other_session)

    def session_alias() -> None:
        assert again(start_session=True, session_alias="renamed")[1]["session_alias"] == "renamed"

    def release_session_after() -> None:
        before, after = again(release_session_after=True)
        assert after["release_session_after"] is True
        kept(before, after)

    def reuse_session() -> None:
        before, after = again(reuse_session=True)
        assert before["session_id"] is not None
        kept(before, after)
        _, after = again(reuse_session=False)
        assert [after[name] for name in ("session_id", "session_alias", "release_session_after")] == [None] * 3

    def is_priority() -> None:
        assert again(is_priority=True)[1]["is_priority"] is True

    checks: dict[str, Callable[[], None]] = {
        "input_values": input_values,
        "sensitive_input_values": sensitive_input_values,
        "file_inputs": file_inputs,
        "machine_id": pin,
        "pool_ids": pool_ids,
        "session_id": session_id,
        "start_session": start_session,
        "session_alias": session_alias,
        "release_session_after": release_session_after,
        "reuse_session": reuse_session,
        "is_priority": is_priority,
    }
    fields = retry_fields()
    assert not fields - checks.keys(), "RunRetry has fields that nothing here checks"
    kept(*again())
    for name, check in checks.items():
        if name in fields:
            check()

    values: dict[str, Any] = {
        "input_values": {},
        "sensitive_input_values": {},
        "file_inputs": [],
        "machine_id": machine_id,
        "pool_ids": [],
        "reuse_session": False,
        "session_id": other_session,
        "start_session": False,
        "session_alias": "together",
        "release_session_after": False,
        "is_priority": False,
    }
    _, after = again(**{name: value for name, value in values.items() if name in fields})
    assert (after["input_values"], after["sensitive_input_aliases"], after["input_attachment_ids"]) == ({}, {}, [])
    assert (after["pool_ids"], after["session_id"], after["release_session_after"]) == ([], other_session, False)


def retry_fields() -> set[str]:
    return {field.name for field in models.RunRetry.__attrs_attrs__} - {"additional_properties"}


def sessions(sdk: Sdk) -> None:
    """A session reserves the machine that its first run gets; clearing it cancels its runs and frees the machine."""
    sdk.clear()
    machine_id = sdk.machine()
    run = sdk.run(start_session=True, machine_id=machine_id)
    reserved = until(lambda: sdk("machines.get", machine_id).reserved_session_id)
    assert reserved == run.session_id == run.id
    assert ids(sdk("runs.list", session_id=str(reserved))) == [str(run.id)]
    assert sdk("machines.clear_session", machine_id).reserved_session_id is None
    assert sdk("runs.get", str(run.id)).status is models.RunStatus.CANCELLED

    pinned = sdk.run(machine_id=machine_id)
    assert sdk("machines.delete", machine_id) == {"success": True}
    orphan = sdk("runs.get", str(pinned.id))
    assert (orphan.status, orphan.machine_id) == (models.RunStatus.ERROR, None)


def run_attachments(sdk: Sdk) -> None:
    run_id = str(sdk.run(file_inputs=[file("in.txt", b"hello")]).id)
    sdk.report(run_id, status="running")
    content = b"\x00\xff not text, not JSON"
    expiry = datetime.now(timezone.utc) + timedelta(days=1)  # noqa: UP017
    output = sdk.complete(sdk.upload(run_id, content, expires_at=expiry.isoformat()), models.RunAttachmentResponse)
    output_id = str(output.id)
    assert (output.filename, output.content_type, output.size_bytes) == ("result.txt", "text/plain", len(content))
    assert output.attachment_type is models.AttachmentType.OUTPUT
    assert output.expires_at == expiry
    assert recent(output.created_at)
    assert alike(sdk("run_attachments.get", output_id), output)

    page = sdk("run_attachments.list", run_id=run_id)
    assert page.total == 2
    assert ids(page)[0] == output_id
    assert ids(sdk("run_attachments.list", run_id=run_id, skip=1, limit=1)) != [output_id]
    outputs = sdk("run_attachments.list", run_id=run_id, attachment_type=models.AttachmentType.OUTPUT)
    assert ids(outputs) == [output_id]

    link = sdk("run_attachments.get_download_url", output_id, expires_in=60)
    assert link.expires_in == 60
    assert sdk("run_attachments.get_download_url", output_id).expires_in == 300
    with urllib.request.urlopen(link.url, timeout=10) as reply:  # without any key
        assert reply.read() == content

    response = sdk.respond("run_attachments.download", output_id)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(response.error, (UnicodeDecodeError, json.JSONDecodeError)):
            # These versions decode every download as JSON. The bytes are right: a JSON file arrives.
            note = "`download` and `save_to_file` take every file for JSON: use `get_download_url`"
            sdk.limits["run_attachments.download"] = note
            as_json = sdk.upload(run_id, b'{"a": [1, 2]}', filename="a.json", content_type="application/json")
            assert sdk("run_attachments.download", str(as_json.id)) == {"a": [1, 2]}
            assert sdk.respond("run_attachments.save_to_file", output_id, folder).error is not None
        else:
            assert response.data == content
            saved = sdk("run_attachments.save_to_file", output_id, folder)
            assert saved == {"path": str(Path(folder) / "result.txt"), "size": len(content)}
            assert Path(saved["path"]).read_bytes() == content

    change = models.RunAttachmentUpdate.from_dict({"expires_at": (expiry + timedelta(days=1)).isoformat()})
    assert sdk("run_attachments.update", output_id, change).expires_at == expiry + timedelta(days=1)
    forever = models.RunAttachmentUpdate.from_dict({"expires_at": None})
    assert sdk("run_attachments.update", output_id, forever).expires_at is None
    assert sdk("run_attachments.delete", output_id) == {"success": True}
    sdk.fails("run_attachments.get", output_id, status=404, code="attachment_not_found")
    assert output_id not in sdk("runs.get", run_id).output_attachment_ids


def errors(sdk: Sdk, foreign: Sdk, stranger: Sdk) -> None:
    run_id = str(sdk.run().id)
    sdk.fails("runs.retry", run_id, models.RunRetry.from_dict({}), status=409, code="run_not_terminal")
    sdk.fails("runs.retry", str(uuid4()), models.RunRetry.from_dict({}), status=404, code="run_not_found")
    foreign.fails("runs.get", run_id, status=404, code="run_not_found")
    foreign.fails("runs.retry", run_id, models.RunRetry.from_dict({}), status=404, code="run_not_found")
    stranger.fails("runs.get", run_id, status=401, code="unauthorized")
    stranger.fails("runs.retry", run_id, models.RunRetry.from_dict({}), status=401, code="unauthorized")
    sdk.limits |= foreign.limits | stranger.limits

    # 422 is an object of its own, with a list.
    bad = models.RunRetry.from_dict({"file_inputs": [{"filename": "../etc/passwd", "content": "%%%"}]})
    refused = sdk.respond("runs.retry", run_id, bad)
    refused = refused.data if refused.data is not None else refused.error
    assert isinstance(refused, models.HTTPValidationError), repr(refused)
    assert sorted(item.loc for item in refused.detail) == [
        ["body", "file_inputs", 0, "content"],
        ["body", "file_inputs", 0, "filename"],
    ]
    assert all(isinstance(item.msg, str) and isinstance(item.type_, str) for item in refused.detail)
    assert "passwd" not in str(refused)
    for method, arguments in {
        "runs.create": (models.RunCreate.from_dict({"workflow_id": str(uuid4()), "session_alias": "no session"}),),
        "runs.bulk_create": (models.RunBulkCreate.from_dict({"workflow_id": str(uuid4()), "count": 0}),),
        "machines.create": (models.MachineCreate.from_dict({"fingerprint": "", "unkey_key_id": "k"}),),
        "pools.create": (models.PoolCreate.from_dict({"name": "\x00"}),),
    }.items():
        response = sdk.respond(method, *arguments)
        refused = response.data if response.data is not None else response.error
        assert isinstance(refused, models.HTTPValidationError), (method, refused)
        assert isinstance(refused.detail, list)
    response = sdk.respond("runs.list", limit=0)
    refused = response.data if response.data is not None else response.error
    assert isinstance(refused, models.HTTPValidationError), refused


# --- the report -------------------------------------------------------------------------------------------------------

SCENARIOS: dict[str, Callable[[Sdk], None]] = {
    "machines": machines,
    "pools": pools,
    "workflows": workflows,
    "runs": runs,
    "retry": retry,
    "sessions": sessions,
    "run_attachments": run_attachments,
}


def methods(sdk: Sdk) -> set[str]:
    """Every public method of the APIs that have routes here, by its async name; both styles must exist."""
    found = set()
    for api in APIS:
        names = {name for name, _ in inspect.getmembers(getattr(sdk.client, api), inspect.ismethod) if name[0] != "_"}
        plain = {name for name in names if not name.endswith("_sync")}
        assert names == plain | {f"{name}_sync" for name in plain}
        found |= {f"{api}.{name}" for name in plain - NO_ROUTE.get(api, set())}
    return found


def main() -> None:
    job = json.load(sys.stdin)
    report: dict[str, Any] = {
        "version": VERSION,
        "results": {},
        "limits": {},
        "not_called": {},
        "writes": {},
        "retry_fields": sorted(retry_fields()),
        "run_keys": sorted(field.name for field in models.RunResponse.__attrs_attrs__),
    }
    for style, key in job["keys"].items():
        sdk = Sdk(job["url"], key, style)
        others = [Sdk(job["url"], other, style) for other in (job["foreign_key"], "no-such-key")]
        scenarios: dict[str, Callable[[Sdk], None]] = {
            **SCENARIOS,
            "errors": partial(errors, foreign=others[0], stranger=others[1]),
        }
        for group, scenario in scenarios.items():
            try:
                scenario(sdk)
                outcome = "ok"
            except Exception as problem:  # noqa: BLE001 - whatever it is, it is what this version does: reported
                sys.stderr.write(traceback.format_exc())
                where = re.findall(r'every_method.py", line (\d+)', traceback.format_exc())
                outcome = f"line {', '.join(where)}: {type(problem).__name__}: {problem}"
            report["results"].setdefault(group, {})[style] = outcome
        report["limits"] |= sdk.limits
        report["not_called"][style] = sorted(methods(sdk) - sdk.called)
        report["writes"][style] = {"sends_keys": sdk.sends_keys, "succeeded": sdk.writes, "keys": sdk.keys}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
