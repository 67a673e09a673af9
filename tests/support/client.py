"""A client of the API, with what tests do again and again."""

import base64
import secrets
from typing import Any

import httpx

RUN_KEYS = {
    *("id", "workflow_id", "machine_id", "assigned_machine_id", "user_id", "organization_id", "created_at", "status"),
    *("error", "output_data", "run_message_history", "output_attachment_ids", "input_attachment_ids", "input_values"),
    *("pool_ids", "sensitive_input_aliases", "session_id", "session_alias", "release_session_after", "started_at"),
    *(
        "ended_at",
        "error_code",
        "changed_at",
        "next_retry_at",
        "retries_left",
        "is_priority",
        "attempt",
        "assignment",
        "traceparent",
        "not_before",
        "scheduling_reason",
        "main_prompt",
        "model_metadata",
        "usage_metadata",
        "workflow_version",
        "last_report_at",
        "is_reporting",
    ),
    "post_run_checks",
}


def secret_path(run: dict[str, Any]) -> str:
    """Where the run's aliases point, without mount and variable name."""
    paths = {alias.split("://", 1)[1].split("#")[0] for alias in run["sensitive_input_aliases"].values()}
    assert len(paths) == 1, "one secret per retry"
    mount, _, path = paths.pop().partition("/")
    assert mount == "secret"
    return str(path)


class Client(httpx.Client):
    """An organization's client, with what tests do again and again."""

    organization: str

    def json_of(self, response: httpx.Response, status: int = 200) -> Any:
        assert response.status_code == status, response.text
        return response.json()

    def workflow(self) -> str:
        created = self.json_of(self.post("/v1/workflows", json={"main_prompt": "Do it."}), 201)
        return str(created["id"])

    def machine(self, **patch: object) -> str:
        body = {"fingerprint": secrets.token_hex(8), "unkey_key_id": "key"}
        machine_id = str(self.json_of(self.post("/v1/machines", json=body), 201)["id"])
        if patch:
            self.json_of(self.patch(f"/v1/machines/{machine_id}", json=patch))
        return machine_id

    def pool(self, *machine_ids: str) -> str:
        pool_id = str(self.json_of(self.post("/v1/pools", json={"name": "pool"}), 201)["id"])
        if machine_ids:
            self.json_of(self.post(f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids}))
        return pool_id

    def webhook_endpoint(self, url: str = "https://localhost/") -> str:
        """By default one that may be registered, but is never connected to."""
        return str(self.json_of(self.post("/v1/webhook-endpoints", json={"url": url}), 201)["id"])

    def run(self, **options: object) -> dict[str, Any]:
        body = {"workflow_id": self.workflow()} | options
        created: dict[str, Any] = self.json_of(self.post("/v1/runs", json=body), 201)
        return created

    def report(self, run_id: str, **fields: object) -> dict[str, Any]:
        reported: dict[str, Any] = self.json_of(self.patch(f"/v1/runs/{run_id}", json=fields))
        return reported

    def upload(
        self, run_id: str, content: bytes = b"result", filename: str = "out.txt", **more: object
    ) -> dict[str, Any]:
        body = {
            "run_id": run_id,
            "filename": filename,
            "content": base64.b64encode(content).decode(),
            "content_type": "text/plain",
            "attachment_type": "output",
            **more,
        }
        created: dict[str, Any] = self.json_of(self.post("/v1/run-attachments", json=body), 201)
        return created

    def finished(self, status: str = "success", **options: object) -> dict[str, Any]:
        """A run that ended, with outputs and history."""
        run_id = self.run(**options)["id"]
        self.report(run_id, status="running")
        self.upload(run_id)
        return self.report(
            run_id,
            status=status,
            output_data={"answer": 42},
            run_message_history=[{"role": "assistant", "content": "done"}],
            error=["it broke"] if status == "error" else None,
        )

    def get_run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json_of(self.get(f"/v1/runs/{run_id}"))
        return found

    def retry(self, run_id: str, **options: object) -> httpx.Response:
        return self.post(f"/v1/runs/{run_id}/retry", json=options)


def file_input(content: bytes = b"hello", filename: str = "in.txt", **more: object) -> dict[str, object]:
    return {"filename": filename, "content": base64.b64encode(content).decode()} | more


def file_inputs(count: int, content: bytes = b"hello") -> list[dict[str, object]]:
    """Files that are alike but for their names: two on one path are refused."""
    return [file_input(content, f"{number}.txt") for number in range(count)]
