"""Receivers that nobody here wrote accept our messages: the libraries, every SDK's type, and what the vendor documents."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import standardwebhooks
import svix.webhooks

from dev.run import ROOT
from dev.stack import free_port
from tests.sdk import environment
from tests.sdk.environment import NEEDS_UNKNOWN_KEY, VERSIONS
from tests.support.client import file_input
from tests.support.waiting import until
from tests.support.webhook_receiver import Message
from tests.webhooks.conftest import Hooked

Received = tuple[Message, str]


@pytest.fixture
def received(hooked: Hooked) -> Received:
    """A message with something in all of it, and the secret that it is signed with."""
    endpoint_id = hooked.endpoint()["id"]
    options = {"sensitive_input_values": {"password": "x"}, "input_values": {"text": "ü"}, "start_session": True}
    run_id = hooked.started(file_inputs=[file_input()], **options)
    hooked.api.upload(run_id)
    history = [{"role": "assistant", "content": "done"}]
    hooked.api.report(run_id, status="success", output_data={"total": 42}, run_message_history=history)
    until(lambda: hooked.receiver.messages)
    return hooked.receiver.messages[0], hooked.secret(endpoint_id)


def altered(message: Message) -> bytes:
    return message.body.replace(b'"success"', b'"error"')


def test_standardwebhooks(received: Received) -> None:
    message, secret = received
    receiver = standardwebhooks.Webhook(secret)
    assert receiver.verify(message.body, message.headers) == message.event
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        receiver.verify(altered(message), message.headers)


@pytest.mark.parametrize("kind", ["svix", "webhook"])
def test_svix_2(received: Received, kind: str) -> None:
    assert int(version("svix").partition(".")[0]) == 2
    message, secret = received
    headers = {name: value for name, value in message.headers.items() if name.startswith(f"{kind}-")}
    assert len(headers) == 3
    receiver = svix.webhooks.Webhook(secret)
    receiver.verify(message.body, headers)  # and returns nothing, as the docs say
    with pytest.raises(svix.webhooks.WebhookVerificationError):
        receiver.verify(altered(message), headers)


def test_the_vendors_documented_receiver_with_svix_1(received: Received) -> None:
    message, secret = received
    headers = {name: value for name, value in message.headers.items() if name.startswith("svix-")}
    job = {"body": message.body.decode(), "headers": headers, "secret": secret}
    accepted, altered_body = environment.run("receiver", "vendors_receiver.py", job)
    assert accepted == [200, {"ok": True}]
    assert altered_body == [400, {"detail": "Invalid signature"}]


@pytest.mark.parametrize("sdk", VERSIONS)
def test_the_sdks_type_reads_a_message(received: Received, sdk: str) -> None:
    message, _ = received
    event = message.event
    job = {"body": message.body.decode()}
    if sdk == NEEDS_UNKNOWN_KEY:
        job["body"] = json.dumps(event | {"run": event["run"] | {"run_kind": "workflow"}})
    read: dict[str, Any] = environment.run(sdk, "receive.py", job)
    assert (read["event_id"], read["event_type"]) == (event["event_id"], "run_complete")
    assert (read["run_id"], read["status"]) == (event["run"]["id"], "success")
    assert read["run"]["output_data"] == {"total": 42}
    assert read["run"]["sensitive_input_aliases"] == event["run"]["sensitive_input_aliases"]
    assert read["run"].keys() >= event["run"].keys(), "what this version does not know is kept"


def test_the_receiver_of_the_docs_in_ten_lines(hooked: Hooked, tmp_path: Path) -> None:
    """As somebody would try it: saved, started, and sent a message; what is not ours is refused."""
    page = (ROOT / "docs/webhooks.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(import os\n.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "receiver.py").write_text(code, encoding="utf-8")
    port = free_port()
    endpoint_id = hooked.endpoint(url=f"http://127.0.0.1:{port}/hook")["id"]
    environment = {"PATH": os.environ["PATH"], "WEBHOOK_SECRET": hooked.secret(endpoint_id), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "uvicorn", "receiver:app", "--port", str(port)]
    with (tmp_path / "out").open("w") as out:
        receiver = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        try:
            hook = f"http://127.0.0.1:{port}/hook"
            until(lambda: _answers(hook), what="the receiver's start")
            run = hooked.ended()
            until(lambda: [one["response_status"] for one in hooked.deliveries(endpoint_id)] == [204])
            assert httpx.post(hook, json={"run": {}}, trust_env=False, verify=False).status_code == 400
        finally:
            receiver.terminate()
            receiver.wait(10)
    [delivery] = hooked.deliveries(endpoint_id)
    assert f"{delivery['event_id']} {run['id']} success" in (tmp_path / "out").read_text()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, verify=False).status_code == 405
    except httpx.TransportError:
        return False
