"""A server that may send to loopback, a receiver there, and an organization that wants events."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.webhook_receiver import Receiver, receiving


class Hooked:
    """A client of one organization, and what tests of webhooks do again and again."""

    def __init__(self, client: Client, receiver: Receiver) -> None:
        self.api = client
        self.receiver = receiver
        body = {"main_prompt": "Do it.", "is_webhooks_enabled": True}
        self.workflow_id = str(client.json_of(client.post("/v1/workflows", json=body), 201)["id"])

    def endpoint(self, path: str = "/hook", **options: object) -> dict[str, Any]:
        body = {"url": f"{self.receiver.url}{path}"} | options
        made: dict[str, Any] = self.api.json_of(self.api.post("/v1/webhook-endpoints", json=body), 201)
        return made

    def get(self, endpoint_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.json_of(self.api.get(f"/v1/webhook-endpoints/{endpoint_id}"))
        return found

    def secret(self, endpoint_id: str) -> str:
        return str(self.api.json_of(self.api.get(f"/v1/webhook-endpoints/{endpoint_id}/secret"))["secret"])

    def deliveries(self, endpoint_id: str) -> list[dict[str, Any]]:
        found = self.api.json_of(self.api.get(f"/v1/webhook-endpoints/{endpoint_id}/deliveries"))
        items: list[dict[str, Any]] = found["items"]
        return items

    def started(self, **options: object) -> str:
        run_id = str(self.api.run(workflow_id=self.workflow_id, **options)["id"])
        self.api.report(run_id, status="running")
        return run_id

    def ended(self, **report: object) -> dict[str, Any]:
        """A run that ended, as the report answered it."""
        return self.api.report(self.started(), **({"status": "success"} | report))


@pytest.fixture(scope="session")
def stack(stack: Stack) -> Iterator[Stack]:
    """A database of its own: no other test's server, which may not send to loopback, takes what is to be delivered."""
    with own_database(stack, "webhooks") as own:
        yield own


@pytest.fixture(scope="session")
def hooking_server(stack: Stack) -> Iterator[Server]:
    started = start_server(stack, WEBHOOK_ALLOW="127.0.0.0/8")
    yield started
    started.app.stop()


@pytest.fixture(scope="session")
def server(stack: Stack) -> Iterator[Server]:
    """One that allows public addresses alone. It only answers, so that it delivers nothing of what the other one may."""
    started = start_server(stack, BACKGROUND="none")
    yield started
    started.app.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def hooked(hooking_server: Server, receiver: Receiver) -> Iterator[Hooked]:
    with hooking_server.client() as client:
        yield Hooked(client, receiver)
