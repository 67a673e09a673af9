"""Many requests at once, each measured."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from tests.support.client import Client


class Call(NamedTuple):
    """One request."""

    method: str
    path: str
    body: Any = None
    key: str | None = None


class Answer(NamedTuple):
    """What came back, and after how long."""

    status: int
    code: str
    headers: httpx.Headers
    content: bytes
    seconds: float

    @property
    def detail(self) -> str:
        return str(httpx.Response(200, content=self.content).json()["detail"])


def send_at_once(client: Client, calls: Sequence[Call], *, urls: Sequence[str] = ()) -> list[Answer]:
    """Send all at the same moment, each on a connection of its own, to these servers in turn; answers in their order."""
    return asyncio.run(sending_at_once(client, calls, urls))


async def sending_at_once(client: Client, calls: Sequence[Call], urls: Sequence[str] = ()) -> list[Answer]:
    targets = urls or [str(client.base_url)]
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": client.headers["Authorization"]}
    async with httpx.AsyncClient(headers=headers, timeout=60, limits=limits, trust_env=False, verify=False) as sender:

        async def send(number: int, call: Call) -> Answer:
            began = time.monotonic()
            response = await sender.request(
                call.method,
                targets[number % len(targets)].rstrip("/") + call.path,
                json=call.body,
                headers={"Idempotency-Key": call.key} if call.key else {},
            )
            seconds = time.monotonic() - began
            code = ""
            if "problem" in response.headers.get("content-type", ""):
                code = response.json()["code"]
            return Answer(response.status_code, code, response.headers, response.content, seconds)

        return await asyncio.gather(*(send(number, call) for number, call in enumerate(calls)))


def tally(answers: Sequence[Answer]) -> Counter[str]:
    """How many of each kind: "200", "409 run_not_terminal", ..."""
    return Counter(f"{answer.status} {answer.code}".strip() for answer in answers)


def worst(answers: Sequence[Answer]) -> float:
    return max(answer.seconds for answer in answers)


def finished_runs(client: Client, count: int, **options: object) -> list[str]:
    """Runs that ended, alike."""
    body = {"workflow_id": client.workflow(), "count": count} | options
    created = client.json_of(client.post("/v1/runs/bulk", json=body), 201)["created_runs"]
    ids = [run["id"] for run in created]
    for report in ({"status": "running"}, {"status": "success", "output_data": {"answer": 42}}):
        assert tally(send_at_once(client, [Call("PATCH", f"/v1/runs/{run_id}", report) for run_id in ids])) == {
            "200": count
        }
    return ids
