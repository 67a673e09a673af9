"""The demo organization: an API key, a machine and one finished run that can be retried, made through the API like any other.

dev/executor.py is the program on that machine.
"""

import base64
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dev.stack import StackError, http, write_private

ORGANIZATION = "demo"
EXAMPLE_ORGANIZATION = "example"  # of `make example`, so that its machine gets none of the demo's runs
TERMINAL = {"success", "error", "cancelled", "task_failed"}
PASSWORD = "demo-password-2"  # noqa: S105 - what the pretended application accepts
OLD_PASSWORD = "demo-password-1"  # noqa: S105 - what the demo run was created with
WORK_SECONDS = 3


@dataclass(frozen=True)
class Demo:
    """What is remembered from one start to the next."""

    api_key: str = ""
    example_api_key: str = ""
    machine_id: str = ""
    workflow_id: str = ""
    run_id: str = ""
    executor_key: str = ""  # bound to the machine

    @classmethod
    def load(cls, file: Path) -> "Demo":
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else cls()

    def save(self, file: Path) -> "Demo":
        write_private(file, json.dumps(asdict(self)))
        return self


@dataclass(frozen=True)
class Api:
    """The running app, as the demo organization."""

    url: str
    key: str

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return http(method, self.url + path, body, {"Authorization": f"Bearer {self.key}"}, seconds=30)

    def must(self, method: str, path: str, body: Any = None) -> Any:
        status, reply = self.call(method, path, body)
        if status >= 300:
            raise StackError(f"The demo data could not be made: {method} {path} answered {status}: {reply}")
        return reply


def ensure(
    file: Path,
    url: str,
    *,
    has_secret: Callable[[str], bool],
    create_key: Callable[..., str],
    retention: timedelta,
) -> Demo:
    """The demo of the last start where it can be gone on with; what cannot is made afresh.

    `has_secret` says whether Vault holds the secret of an alias. `create_key` takes the organization, and the machine if the
    key is to be bound to one.

    The run has ended: what the executor of the last start left behind is cancelled.
    """
    demo = Demo.load(file)
    # Saved at once each time: a key is shown only once.
    if not _accepted(Api(url, demo.api_key)):
        demo = Demo(create_key(ORGANIZATION), demo.example_api_key).save(file)
    if not _accepted(Api(url, demo.example_api_key)):
        demo = replace(demo, example_api_key=create_key(EXAMPLE_ORGANIZATION)).save(file)
    api = Api(url, demo.api_key)
    if not demo.machine_id or api.call("GET", f"/v1/machines/{demo.machine_id}")[0] != 200:
        machine = api.must("POST", "/v1/machines", {"fingerprint": "demo", "unkey_key_id": "demo", "hostname": "demo"})
        demo = replace(demo, machine_id=machine["id"], executor_key="").save(file)
    if not _accepted(Api(url, demo.executor_key)):
        demo = replace(demo, executor_key=create_key(ORGANIZATION, demo.machine_id)).save(file)
    _cancel_leftovers(api, demo)
    if not demo.workflow_id or api.call("GET", f"/v1/workflows/{demo.workflow_id}")[0] != 200:
        demo = replace(demo, workflow_id=_workflow(api)).save(file)
    if not _retryable(api, has_secret, demo.run_id, retention):
        demo = replace(demo, run_id=_failed_run(api, demo.workflow_id)).save(file)
    return demo


def _accepted(api: Api) -> bool:
    return bool(api.key) and api.call("GET", "/v1/workflows?limit=1")[0] != 401


def _cancel_leftovers(api: Api, demo: Demo) -> None:
    """A run in the hands of an executor that is no more would keep the machine for ever."""
    left = [run["id"] for run in api.must("GET", f"/v1/runs?machine_id={demo.machine_id}&status=running")["items"]]
    for run_id in {*left, demo.run_id} - {""}:
        api.call("PATCH", f"/v1/runs/{run_id}", {"status": "cancelled"})  # 409 if it has ended


def _retryable(api: Api, has_secret: Callable[[str], bool], run_id: str, retention: timedelta) -> bool:
    if not run_id:
        return False
    status, run = api.call("GET", f"/v1/runs/{run_id}")
    if status != 200 or run["status"] not in TERMINAL:
        return False
    # A minute's reserve, so that it is still true when the command is pasted.
    if datetime.fromisoformat(run["ended_at"]) + retention < datetime.now(UTC) + timedelta(minutes=1):
        return False
    if not all(map(has_secret, (run["sensitive_input_aliases"] or {}).values())):
        return False
    return all(api.call("GET", f"/v1/run-attachments/{file}")[0] == 200 for file in run["input_attachment_ids"])


def _workflow(api: Api) -> str:
    prompt = "Log in as {user}, open the invoice and post {amount}."
    workflow = api.must("POST", "/v1/workflows", {"name": "Demo: post an invoice", "main_prompt": prompt})
    return str(workflow["id"])


def _failed_run(api: Api, workflow_id: str) -> str:
    """A run with everything a retry has to clear or keep; it failed because its password was an old one."""
    run = api.must(
        "POST",
        "/v1/runs",
        {
            "workflow_id": workflow_id,
            "input_values": {"user": "ada", "amount": "120.00"},
            "sensitive_input_values": {"password": OLD_PASSWORD},
            "file_inputs": [_file("invoice.txt", "Invoice 1001: 120.00\n")],
        },
    )
    path = f"/v1/runs/{run['id']}"
    api.must("PATCH", path, {"status": "running", "attempt": run["attempt"]})
    output = api.must(
        "POST",
        "/v1/run-attachments",
        {
            "run_id": run["id"],
            **_file("screen.txt", "Log in: wrong user name or password.\n"),
            "content_type": "text/plain",
            "attachment_type": "output",
        },
    )
    api.must(
        "PATCH",
        path,
        {
            "status": "error",
            "attempt": run["attempt"],
            "error": ["The application refused the password."],
            "output_attachment_ids": [output["id"]],
            "run_message_history": [
                {"role": "user", "content": "Log in, open the invoice and post it."},
                {"role": "assistant", "content": "The application says: wrong user name or password."},
            ],
        },
    )
    return str(run["id"])


def _file(name: str, content: str) -> dict[str, str]:
    return {"filename": name, "content": base64.b64encode(content.encode()).decode()}


def command(url: str, demo: Demo) -> str:
    """Three lines to paste, again and again: retry the demo run with the password that its application accepts."""
    body: Mapping[str, Any] = {
        "input_values": {"user": "ada", "amount": "125.00"},
        "sensitive_input_values": {"password": PASSWORD},
        "file_inputs": [_file("invoice.txt", "Invoice 1001, corrected: 125.00\n")],
    }
    return f"""\
curl -sS -X POST {url}/v1/runs/{demo.run_id}/retry \\
  -H 'Authorization: Bearer {demo.api_key}' -H 'Content-Type: application/json' \\
  -d {shlex.quote(json.dumps(body))}"""
