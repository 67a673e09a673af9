"""Bulk retries: starting jobs, looking at them, and runs for them."""

from typing import Any

from tests.support.client import Client
from tests.support.stack import Stack
from tests.support.waiting import until

ENDED = {"completed", "aborted", "failed"}


def start(api: Client, status: int = 202, **body: object) -> dict[str, Any]:
    started: dict[str, Any] = api.json_of(api.post("/v1/bulk-retries", json=body), status)
    return started


def job_of(api: Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.get(f"/v1/bulk-retries/{job_id}"))
    return found


def ended(api: Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended."""

    def look() -> dict[str, Any] | None:
        found = job_of(api, job["id"])
        return found if found["state"] in ENDED else None

    found: dict[str, Any] = until(look, what="the end of the bulk retry")
    return found


def items(api: Client, job: dict[str, Any], **query: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.json_of(api.get(f"/v1/bulk-retries/{job['id']}/items", params=query))["items"]  # type: ignore[arg-type]
    return found


def hurry(api: Client, job: dict[str, Any]) -> None:
    """A job that is resumed has its next turn at once, whatever its pace."""
    for wanted in ("pause", "resume"):
        api.json_of(api.post(f"/v1/bulk-retries/{job['id']}/{wanted}"))


MANY = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, ended_at)
SELECT gen_random_uuid(), $1, $2::uuid, 'error', 'any', now() - n * interval '1 s' FROM generate_series(1, $3::int) AS n
"""


def many_failed(stack: Stack, organization: str, workflow_id: str, count: int) -> None:
    """Runs without anything else: a request for each would take long."""
    stack.sql(MANY, organization, workflow_id, count)


def failed_runs(api: Client, count: int, status: str = "error", **options: object) -> list[str]:
    """Runs that have ended, the oldest first."""
    body = {"workflow_id": api.workflow(), "count": count} | options
    runs = api.json_of(api.post("/v1/runs/bulk", json=body), 201)["created_runs"]
    for run in runs:
        api.report(run["id"], status=status) if status != "success" else succeed(api, run["id"])
    return [run["id"] for run in runs]


def succeed(api: Client, run_id: str) -> None:
    api.report(run_id, status="running")
    api.report(run_id, status="success")
