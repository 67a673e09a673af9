"""The demo organization: an API key and one finished run that can be retried, made through the API like any other."""

import base64
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dev.stack import Bao, StackError, http, write_private

ORGANIZATION = "demo"
TERMINAL = {"success", "error", "cancelled"}


@dataclass(frozen=True)
class Demo:
    """What is remembered from one start to the next."""

    api_key: str
    run_id: str = ""

    @classmethod
    def load(cls, file: Path) -> "Demo | None":
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


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


def ensure(file: Path, url: str, bao: Bao, *, create_key: Callable[[], str], retention: timedelta) -> Demo:
    """The demo of the last start if its key works and its run can still be retried as it is; else a fresh one."""
    demo = Demo.load(file)
    if demo is None or Api(url, demo.api_key).call("GET", "/v1/workflows?limit=1")[0] == 401:
        demo = Demo(api_key=create_key())
        write_private(file, json.dumps(asdict(demo)))  # at once: the key is shown only once
    api = Api(url, demo.api_key)
    if not _retryable(api, bao, demo.run_id, retention):
        demo = replace(demo, run_id=_finished_run(api))
        write_private(file, json.dumps(asdict(demo)))
    return demo


def _retryable(api: Api, bao: Bao, run_id: str, retention: timedelta) -> bool:
    if not run_id:
        return False
    status, run = api.call("GET", f"/v1/runs/{run_id}")
    if status != 200 or run["status"] not in TERMINAL:
        return False
    # A minute's reserve, so that it is still true when the command is pasted.
    if datetime.fromisoformat(run["ended_at"]) + retention < datetime.now(UTC) + timedelta(minutes=1):
        return False
    for alias in (run["sensitive_input_aliases"] or {}).values():
        place = urlsplit(alias)
        if bao.call("GET", f"{place.netloc}/metadata{place.path}")[0] != 200:
            return False
    return all(api.call("GET", f"/v1/run-attachments/{file}")[0] == 200 for file in run["input_attachment_ids"])


def _finished_run(api: Api) -> str:
    """A run with everything a retry has to clear or keep."""
    workflow = api.must(
        "POST",
        "/v1/workflows",
        {"name": "Demo: post an invoice", "main_prompt": "Log in as {user}, open the invoice and post {amount}."},
    )
    run = api.must(
        "POST",
        "/v1/runs",
        {
            "workflow_id": workflow["id"],
            "input_values": {"user": "ada", "amount": "120.00"},
            "sensitive_input_values": {"password": "demo-password-1"},
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
            **_file("receipt.txt", "Posted 120.00\n"),
            "content_type": "text/plain",
            "attachment_type": "output",
        },
    )
    api.must(
        "PATCH",
        path,
        {
            "status": "success",
            "attempt": run["attempt"],
            "output_data": {"receipt": "R-1001", "posted": "120.00"},
            "output_attachment_ids": [output["id"]],
            "run_message_history": [
                {"role": "user", "content": "Post the invoice."},
                {"role": "assistant", "content": "Posted, receipt R-1001."},
            ],
        },
    )
    return str(run["id"])


def _file(name: str, content: str) -> dict[str, str]:
    return {"filename": name, "content": base64.b64encode(content.encode()).decode()}


def retry_command(url: str, demo: Demo) -> str:
    """A complete curl that retries the demo run with new values, a new secret and a new file."""
    body: Mapping[str, Any] = {
        "input_values": {"user": "ada", "amount": "125.00"},
        "sensitive_input_values": {"password": "demo-password-2"},
        "file_inputs": [_file("invoice.txt", "Invoice 1001, corrected: 125.00\n")],
    }
    lines = [
        f"curl -sS -X POST {url}/v1/runs/{demo.run_id}/retry",
        f"-H 'Authorization: Bearer {demo.api_key}'",
        "-H 'Content-Type: application/json'",
        f"-d {shlex.quote(json.dumps(body))}",
    ]
    return " \\\n  ".join(lines)
