"""A stop is graceful and quick: executors always hold a long poll, which must not delay it."""

import threading
import time

import httpx
import pytest

from tests.support.server import start_server
from tests.support.stack import Stack


@pytest.mark.parametrize("of_machine", [True, False])
def test_long_polls_end_at_a_stop(of_machine: bool, stack: Stack) -> None:
    server = start_server(stack)
    replies: list[httpx.Response] = []
    with server.client() as api, server.client() as other:
        machine = {"machine_id": api.machine()} if of_machine else {}  # on the connection that the poll then uses
        api.json_of(api.get("/v1/runs"))
        poll = threading.Thread(
            target=lambda: replies.append(
                api.get("/v1/runs", params={**machine, "status": "scheduling", "wait": 30}, timeout=60)
            )
        )
        poll.start()
        other.json_of(other.get("/v1/runs"))
        began = time.monotonic()
        server.app.stop()
        assert time.monotonic() - began < 10  # SHUTDOWN_SECONDS is 20
        poll.join(10)
        [reply] = replies
        assert api.json_of(reply)["items"] == []
