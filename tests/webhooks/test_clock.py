"""A replica whose clock is hours off: what it signs with a time is right all the same."""

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.support.faults import CLOCK_AHEAD, FaultyServer
from tests.support.stack import Stack
from tests.support.waiting import until
from tests.support.webhook_receiver import Receiver, receiving
from tests.webhooks.conftest import Hooked

HOURS = 3600


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


@pytest.mark.parametrize("ahead", [2 * HOURS, -2 * HOURS])
def test_what_a_replica_with_a_wrong_clock_signs(stack: Stack, receiver: Receiver, ahead: int) -> None:
    settings: dict[str, Any] = {"WEBHOOK_ALLOW": "127.0.0.0/8", "BACKGROUND_PERIOD_SECONDS": 0.2, CLOCK_AHEAD: ahead}
    with (
        FaultyServer(stack, **settings) as server,
        server.client() as client,
    ):
        hooked = Hooked(client, receiver)
        endpoint = hooked.endpoint(f"/{client.organization}")
        hooked.ended()
        [message] = until(lambda: receiver.of(f"/{client.organization}"), what="the webhook")
        assert abs(int(message.headers["webhook-timestamp"]) - time.time()) < 30
        client.json_of(client.post(f"/v1/webhook-endpoints/{endpoint['id']}/test"), 201)
        test = until(lambda: receiver.of(f"/{client.organization}")[1:], what="the test's webhook")[0]
        assert json.loads(test.body)["occurred_at"][:13] == time.strftime("%Y-%m-%dT%H", time.gmtime())

        uploaded = client.upload(hooked.started(), b"bytes")
        path = f"/v1/run-attachments/{uploaded['id']}/download-url?expires_in=60"
        url = client.json_of(client.get(path))["url"]
        assert abs(int(parse_qs(urlsplit(url).query)["expires"][0]) - time.time() - 60) < 30
        assert httpx.get(url, trust_env=False, verify=False).content == b"bytes"

        line = next(json.loads(line) for line in server.log().splitlines() if '"clock_off"' in line)
        assert abs(line["offset_seconds"] + ahead) < 30
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False, verify=False).text
        [shown] = [line for line in metrics.splitlines() if line.startswith("runs_clock_offset_seconds")]
        assert abs(float(shown.split()[-1]) + ahead) < 30
