"""A name server that does not answer: nothing interrupts a look-up, so it keeps its place until it ends."""

import asyncio
import socket
import threading
from typing import Any

import pytest

from app.services import Services
from app.webhooks.delivery import PER_ORGANIZATION, PER_ORGANIZATION_FAILING, Deliverer
from tests.support.faults import FaultyServer
from tests.support.stack import Stack, own_database, settings_of
from tests.support.webhook_receiver import receiving

MOST = PER_ORGANIZATION + PER_ORGANIZATION_FAILING


class NameServer(threading.Event):
    """Answers when it is set."""

    waiting = 0  # look-ups that have begun


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> NameServer:
    """Until it is set, look-ups of names below hanging.example wait."""
    real, names = socket.getaddrinfo, NameServer()

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".hanging.example"):
            names.waiting += 1
            names.wait(60)
            raise socket.gaierror
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("app.webhooks.delivery.SEND_SECONDS", 0.2)
    return names


def test_look_ups_that_hang_hold_up_no_other_organization(stack: Stack, answers: NameServer) -> None:
    with (
        own_database(stack, "names") as own,
        receiving() as receiver,
        FaultyServer(own, BACKGROUND="none", WEBHOOK_ALLOW="127.0.0.0/8") as server,
        server.client() as hanging,
        server.client() as other,
    ):
        for number in range(20):
            body = {"url": f"https://name-{number}.hanging.example/"}
            hanging.json_of(hanging.post("/v1/webhook-endpoints", json=body), 201)
        other.json_of(other.post("/v1/webhook-endpoints", json={"url": f"{receiver.url}/hook"}), 201)
        own.new_events(hanging.organization, 5)

        async def deliver() -> None:
            services = Services.open(settings_of(own, WEBHOOK_ALLOW="127.0.0.0/8"))
            deliverer = Deliverer(services)
            loop = asyncio.get_running_loop()
            end = loop.time() + 10
            try:
                for _ in range(20):  # five times as long as a delivery may take
                    await deliverer.round()
                    await asyncio.sleep(0.05)
                await asyncio.to_thread(own.new_events, other.organization, 1)
                while not receiver.of("/hook") and loop.time() < end:
                    await deliverer.round()
                    await asyncio.sleep(0.05)
            finally:
                answers.set()
                await deliverer.close()
                await services.close()

        asyncio.run(deliver())
        assert PER_ORGANIZATION <= answers.waiting <= MOST, "threads that wait for the name server"
        assert len(receiver.of("/hook")) == 1, "another organization's webhook did not arrive"
