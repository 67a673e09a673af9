"""Uses the client that openapi-python-client made of /openapi.json, in its own interpreter. Prints what it saw as JSON."""

import base64
import json
import sys
from typing import Any, TypeVar
from uuid import UUID

from runs_client import AuthenticatedClient  # type: ignore[import-not-found,unused-ignore] # made by the test
from runs_client.api.run_attachments import (  # type: ignore[import-not-found,unused-ignore]
    create_run_attachment,
    download_run_attachment,
)
from runs_client.api.runs import create_run, dry_run_retry, get_run, list_runs, retry_run, update_run  # type: ignore[import-not-found,unused-ignore]
from runs_client.api.webhooks import create_webhook_endpoint, list_webhook_endpoints, update_webhook_endpoint  # type: ignore[import-not-found,unused-ignore]
from runs_client.models import (  # type: ignore[import-not-found,unused-ignore]
    DryRunResponse,
    FileInput,
    RunAttachmentCreate,
    RunAttachmentCreateAttachmentType,
    RunAttachmentResponse,
    RunCreate,
    RunCreateInputValues,
    RunPage,
    RunResponse,
    RunRetry,
    RunRetrySensitiveInputValues,
    RunStatus,
    RunUpdate,
    RunWithIncluded,
    WebhookEndpointCreate,
    WebhookEndpointResponse,
    WebhookEndpointUpdate,
)
from runs_client.types import File  # type: ignore[import-not-found,unused-ignore]

Expected = TypeVar("Expected")


def expect(reply: object, model: type[Expected]) -> Expected:
    """The reply, which must be of this model: a refusal is a Problem."""
    assert isinstance(reply, model), reply
    return reply


def use(url: str, key: str, workflow_id: UUID) -> dict[str, Any]:
    client = AuthenticatedClient(base_url=url, token=key, httpx_args={"trust_env": False})
    inputs = RunCreateInputValues.from_dict({"customer": "Ada", "lines": [{"sum": 1.5}, None]})
    created = expect(create_run.sync(client=client, body=RunCreate(workflow_id, input_values=inputs)), RunResponse)
    report = RunUpdate(status=RunStatus.RUNNING)
    expect(update_run.sync(created.id, client=client, body=report), RunResponse)
    content = b"a,b\n\x00\xff"
    upload = RunAttachmentCreate(
        "report.csv",
        base64.b64encode(content).decode(),
        created.id,
        "text/csv",
        RunAttachmentCreateAttachmentType.OUTPUT,
    )
    attachment = expect(create_run_attachment.sync(client=client, body=upload), RunAttachmentResponse)
    file = expect(download_run_attachment.sync(attachment.id, client=client), File)
    assert file.payload.read() == content
    ended = expect(update_run.sync(created.id, client=client, body=RunUpdate(status=RunStatus.ERROR)), RunResponse)
    assert ended.output_attachment_ids == [str(attachment.id)]

    retry = RunRetry(
        sensitive_input_values=RunRetrySensitiveInputValues.from_dict({"password": "s3cret"}),
        file_inputs=[FileInput("invoice.pdf", base64.b64encode(b"hello").decode())],
        reason="again",
    )
    forecast = expect(dry_run_retry.sync(created.id, client=client, body=retry), DryRunResponse)
    assert forecast.would_retry
    retried = expect(retry_run.sync(created.id, client=client, body=retry, idempotency_key="once"), RunResponse)
    again = expect(retry_run.sync(created.id, client=client, body=retry, idempotency_key="once"), RunResponse)
    assert again.attempt == retried.attempt == 2
    assert retried.status is RunStatus.SCHEDULING
    read = expect(get_run.sync(created.id, client=client), RunWithIncluded)
    page = expect(list_runs.sync(client=client, workflow_id=workflow_id, limit=10), RunPage)
    assert [run.id for run in page.items] == [created.id]

    made = WebhookEndpointCreate("https://example.com/hooks", description="Billing")
    endpoint = expect(create_webhook_endpoint.sync(client=client, body=made), WebhookEndpointResponse)
    changed = expect(
        update_webhook_endpoint.sync(endpoint.id, client=client, body=WebhookEndpointUpdate(description=None)),
        WebhookEndpointResponse,
    )
    assert (changed.description, changed.url) == (None, "https://example.com/hooks")
    assert list_webhook_endpoints.sync(client=client) is not None
    return {"run_id": str(created.id), "attempt": read.attempt, "inputs": read.to_dict()["input_values"]}


if __name__ == "__main__":
    job = json.load(sys.stdin)
    json.dump(use(job["url"], job["key"], UUID(job["workflow_id"])), sys.stdout)
