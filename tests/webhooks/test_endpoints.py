"""Endpoints and their secrets: who sees what, where secrets are, and every bound."""

import base64
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from standardwebhooks import Webhook

from app.webhooks.signing import headers
from tests.support.client import Client
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until
from tests.support.webhook_receiver import Receiver
from tests.webhooks.conftest import Hooked

PATH = "/v1/webhook-endpoints"


def secret_paths(stack: Stack, organization: str) -> set[str]:
    return stack.secret_paths(f"runs-webhooks/{organization}/")


# --- the resource -----------------------------------------------------------------------------------------------------


def test_create_read_change_delete(api: Client) -> None:
    body = {"url": "https://example.com/hook", "description": "Billing"}
    made = api.json_of(api.post(PATH, json=body), 201)
    assert made["event_types"] == ["run_complete"]
    assert not made["disabled"]
    one = f"{PATH}/{made['id']}"
    assert api.json_of(api.get(one)) == made
    page = {"items": [made], "total": 1, "total_is_estimate": False, "skip": 0, "limit": 100, "next": None}
    assert api.json_of(api.get(PATH)) == page
    changed = api.json_of(api.patch(one, json={"url": "https://example.com:8443/", "description": None}))
    assert (changed["url"], changed["description"]) == ("https://example.com:8443/", None)
    kept = api.json_of(api.patch(one, json={"url": None, "event_types": None, "disabled": None}))
    assert kept | {"updated_at": None} == changed | {"updated_at": None}
    disabled = api.json_of(api.patch(one, json={"disabled": True}))
    assert (disabled["disabled"], disabled["disabled_reason"]) == (True, "requested")
    assert api.delete(one).status_code == 204
    for response in (api.get(one), api.patch(one, json={}), api.delete(one), api.get(f"{one}/deliveries")):
        assert (response.status_code, response.json()["code"]) == (404, "webhook_endpoint_not_found")


def test_what_is_foreign_is_as_what_is_unknown(hooked: Hooked, foreign: Client) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.ended()
    [delivery] = until(lambda: hooked.deliveries(endpoint_id))
    since = {"since": "2026-01-01T00:00:00Z"}

    def ask(endpoint_id: object, delivery_id: object) -> list[tuple[int, Any]]:
        one, sent = f"{PATH}/{endpoint_id}", f"/v1/webhook-deliveries/{delivery_id}"
        responses = [
            *(foreign.get(f"{one}{tail}") for tail in ("", "/secret", "/deliveries")),
            foreign.patch(one, json={"disabled": True}),
            foreign.delete(one),
            *(foreign.post(f"{one}{tail}") for tail in ("/rotate-secret", "/test")),
            foreign.post(f"{one}/recover", json=since),
            foreign.get(sent),
            foreign.post(f"{sent}/resend"),
        ]
        # `instance` names the request, and nothing of what was asked for.
        return [(response.status_code, response.json() | {"instance": None}) for response in responses]

    answers = ask(endpoint_id, delivery["id"])
    assert answers == ask(uuid4(), uuid4())
    assert {status for status, _ in answers} == {404}
    assert foreign.json_of(foreign.get(PATH))["total"] == 0
    assert not hooked.get(endpoint_id)["disabled"]


def test_an_organization_has_at_most_20_endpoints_also_when_they_are_made_at_once(api: Client) -> None:
    for _ in range(17):
        api.webhook_endpoint()
    with ThreadPoolExecutor(8) as pool:
        sent = list(pool.map(lambda _: api.post(PATH, json={"url": "https://localhost/"}), range(8)))
    assert sorted(response.status_code for response in sent) == [201] * 3 + [409] * 5
    assert {response.json().get("code") for response in sent} == {None, "too_many_webhook_endpoints"}
    assert api.json_of(api.get(PATH))["total"] == 20


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": None},
        {"url": ""},
        {"url": 1},
        {"url": "http://example.com/"},
        {"url": "https://127.0.0.1/"},
        {"url": "https://[::ffff:127.0.0.1]/"},
        {"url": "https://user:hunter2@example.com/"},
        {"url": "https://example.com:22/"},
        {"url": "https://example.com/\u0000"},
        {"url": "https://example.com/" + "a" * 2048},
        {"url": "https://example.com/", "event_types": []},
        {"url": "https://example.com/", "event_types": ["everything"]},
        {"url": "https://example.com/", "event_types": ["run_complete"] * 11},
        {"url": "https://example.com/", "description": "x" * 256},
        {"url": "https://example.com/", "disabled": "yes"},
    ],
)
def test_what_is_not_valid_is_refused_by_name(api: Client, body: dict[str, Any]) -> None:
    answer = api.post(PATH, json=body)
    assert answer.status_code == 422
    [problem] = answer.json()["detail"]
    assert problem["loc"][0] == "body"
    assert "hunter2" not in answer.text
    assert api.json_of(api.get(PATH))["total"] == 0


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_in_vault_and_in_one_reply_alone(hooked: Hooked, stack: Stack) -> None:
    api = hooked.api
    made = api.post(PATH, json={"url": hooked.receiver.url}, headers={"Idempotency-Key": "made"})
    endpoint_id = made.json()["id"]
    secret = hooked.secret(endpoint_id)
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]+=*", secret)
    assert 24 <= len(base64.b64decode(secret.removeprefix("whsec_"))) <= 64
    [path] = secret_paths(stack, api.organization)
    assert stack.secret(path) == {"secret": secret}
    rotated = api.post(f"{PATH}/{endpoint_id}/rotate-secret", headers={"Idempotency-Key": "rotated"})
    shown = api.get(f"{PATH}/{endpoint_id}/secret")
    assert shown.headers["Cache-Control"] == "no-store"
    for other in (made, rotated, api.get(PATH), api.get(f"{PATH}/{endpoint_id}")):
        assert "whsec_" not in other.text
    again = api.post(f"{PATH}/{endpoint_id}/rotate-secret", headers={"Idempotency-Key": "rotated"})
    assert again.headers["Idempotency-Status"] == "replayed"
    assert hooked.secret(endpoint_id) == shown.json()["secret"] != secret
    tables = stack.sql("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    for table in tables:
        rows = stack.sql(f'SELECT t::text AS row FROM "{table["table_name"]}" t')
        bare = [secret.removeprefix("whsec_"), shown.json()["secret"].removeprefix("whsec_")]
        assert not any(one in row["row"] for row in rows for one in bare), table


class SlowVault(ThreadingHTTPServer):
    """Hands everything on to Vault, but keeps whoever reads a secret of one organization waiting."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), SlowHandler)
        self.behind = behind
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.slow_for = ""
        self.kept = 0
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # a caller that gave up

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class SlowHandler(BaseHTTPRequestHandler):
    server: SlowVault

    def do_GET(self) -> None:
        if self.server.slow_for and self.server.slow_for in self.path and self.command == "GET":
            self.server.kept += 1
            self.server.released.wait(30)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        headers = {name: self.headers[name] for name in ("X-Vault-Token", "X-Vault-Request") if name in self.headers}
        reply = httpx.request(
            self.command, self.server.behind + self.path, content=body, headers=headers, trust_env=False, verify=False
        )
        self.send_response(reply.status_code)
        self.send_header("Content-Type", reply.headers.get("content-type", "application/json"))
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    def do_POST(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_whoever_wants_to_see_secrets_keeps_neither_deliveries_nor_others_waiting(
    stack: Stack, receiver: Receiver
) -> None:
    with SlowVault(stack.bao.address) as vault, own_database(stack, "showing") as own:
        server = start_server(own, WEBHOOK_ALLOW="127.0.0.0/8", VAULT_ADDR=vault.url, VAULT_TIMEOUT_SECONDS=5)
        try:
            with server.client() as greedy, server.client() as api, ThreadPoolExecutor(30) as pool:
                hooked = Hooked(api, receiver)
                endpoint_id, wanted = hooked.endpoint()["id"], greedy.webhook_endpoint()
                vault.slow_for = f"/{greedy.organization}/"
                asked = [pool.submit(greedy.get, f"{PATH}/{wanted}/secret") for _ in range(30)]
                until(lambda: vault.kept >= 2)
                began = time.monotonic()
                hooked.ended()
                assert hooked.secret(endpoint_id)
                until(lambda: receiver.messages)
                assert time.monotonic() - began < 4, "sooner than any of the others gives up"
                vault.released.set()
                assert {one.result().status_code for one in asked} <= {200, 503}
        finally:
            server.app.stop()


def test_an_old_secret_signs_for_a_day_and_is_destroyed_then(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    old = hooked.secret(endpoint_id)
    api = hooked.api
    api.json_of(api.post(f"{PATH}/{endpoint_id}/rotate-secret"))
    new = hooked.secret(endpoint_id)
    hooked.ended()
    until(lambda: hooked.receiver.messages)
    message = hooked.receiver.messages[0]
    for secret in (old, new):
        assert Webhook(secret).verify(message.body, message.headers) == message.event
    assert message.headers["webhook-signature"].count("v1,") == 2
    shown = api.json_of(api.get(f"{PATH}/{endpoint_id}/secret"))
    assert shown["previous_expires_at"] is not None
    [listed] = stack.sql(
        "SELECT due_at - now() AS wait FROM deletions WHERE name LIKE 'runs-webhooks/' || $1 || '/%'", api.organization
    )
    assert 23.9 * 3600 < listed["wait"].total_seconds() <= 24 * 3600
    # A day later.
    stack.sql(
        "UPDATE webhook_secrets SET expires_at = now() WHERE endpoint_id = $1 AND expires_at IS NOT NULL",
        UUID(endpoint_id),
    )
    stack.sql("UPDATE deletions SET due_at = now() WHERE name LIKE 'runs-webhooks/' || $1 || '/%'", api.organization)
    until(lambda: len(secret_paths(stack, api.organization)) == 1)
    hooked.ended()
    until(lambda: len(hooked.receiver.messages) == 2)
    message = hooked.receiver.messages[1]
    assert message.headers["webhook-signature"].count("v1,") == 1
    assert Webhook(new).verify(message.body, message.headers) == message.event


def test_a_few_secrets_sign_at_once_and_no_more(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint()["id"]
    secrets = [hooked.secret(endpoint_id)]
    for _ in range(4):
        hooked.api.json_of(hooked.api.post(f"{PATH}/{endpoint_id}/rotate-secret"))
        secrets.append(hooked.secret(endpoint_id))
    refused = hooked.api.post(f"{PATH}/{endpoint_id}/rotate-secret")
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_webhook_secrets")
    hooked.ended()
    until(lambda: hooked.receiver.messages)
    message = hooked.receiver.messages[0]
    for secret in secrets:
        Webhook(secret).verify(message.body, message.headers)


def test_an_endpoint_takes_its_secrets_with_it(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.api.json_of(hooked.api.post(f"{PATH}/{endpoint_id}/rotate-secret"))
    assert len(secret_paths(stack, hooked.api.organization)) == 2
    assert hooked.api.delete(f"{PATH}/{endpoint_id}").status_code == 204
    until(lambda: not secret_paths(stack, hooked.api.organization))


def test_a_refused_endpoint_leaves_no_secret(api: Client, stack: Stack) -> None:
    for _ in range(20):
        api.webhook_endpoint()
    assert api.post(PATH, json={"url": "https://localhost/"}).status_code == 409
    named, _ = stack.named()
    assert secret_paths(stack, api.organization) <= named


def test_the_policy_reads_what_webhooks_are_signed_with_and_no_secret_of_a_run(hooked: Hooked, stack: Stack) -> None:
    """By the service's own token, as the policy in this repository grants it."""
    hooked.endpoint()
    run = hooked.api.run(sensitive_input_values={"password": "x"})
    [signing] = secret_paths(stack, hooked.api.organization)
    [of_run] = stack.secret_paths(f"runs/{hooked.api.organization}/{run['id']}/")
    token = stack.bao.token()
    assert stack.bao.call("GET", f"secret/data/{signing}", token=token)[0] == 200
    assert stack.bao.call("GET", f"secret/data/{of_run}", token=token)[0] == 403
    assert stack.bao.call("LIST", "secret/metadata/runs-webhooks/", token=token)[0] == 403
    assert stack.bao.call("GET", f"secret/metadata/{signing}", token=token)[0] == 403
    overwritten = {"data": {"secret": "x"}}
    assert stack.bao.call("POST", f"secret/data/{signing}", overwritten, token=token)[0] == 403
    # An executor of this organization reads neither what signs, nor may it.
    executor = stack.bao.executor_token(hooked.api.organization)
    assert stack.bao.call("GET", f"secret/data/{signing}", token=executor)[0] == 403
    assert stack.bao.call("GET", f"secret/data/{of_run}", token=executor)[0] == 200


def test_a_key_that_only_reads_sees_no_secret(hooked: Hooked, hooking_server: Server, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    for scopes, status in ((["runs:read"], 403), (["webhooks:write"], 200)):
        key = stack.new_key(hooked.api.organization, scopes=scopes)
        with hooking_server.client(hooked.api.organization, key=key) as client:
            assert client.get(f"{PATH}/{endpoint_id}/secret").status_code == status


def test_a_signature_is_what_the_specification_says() -> None:
    """The example of the specification's own libraries: secret, id, time and payload with the signature known."""
    signed = headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    )
    assert signed["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signed["webhook-id"] == signed["svix-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert signed["webhook-timestamp"] == signed["svix-timestamp"] == "1614265330"
    assert signed["svix-signature"] == signed["webhook-signature"]
