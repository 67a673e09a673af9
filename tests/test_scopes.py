"""What a key may do: its scopes, and the machine it is bound to."""

import re
import socket
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.support import documents
from tests.support.client import Client, file_input
from tests.support.server import Server
from tests.support.waiting import until

SCOPES = ["runs:read", "runs:write", "runs:execute", "resources:write", "webhooks:write", "keys:read"]
ID = "3c90c3cc-0d44-4b50-8888-8dd25736052a"


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in documents.strict()["paths"].items():
        for method, described in methods.items():
            yield method.upper(), path, described


def needed(described: dict[str, Any]) -> set[str]:
    return {scope for way in described["security"] for scope in way["bearer"]}


def test_every_route_under_v1_names_its_scope_and_the_refusal(server: Server) -> None:
    seen = 0
    for method, path, described in operations():
        if not path.startswith("/v1/") or path in {"/v1/health", "/v1/health/db"}:
            assert "security" not in described, path
            continue
        seen += 1
        assert needed(described), f"{method} {path}"
        assert needed(described) <= set(SCOPES), f"{method} {path}"
        if method == "GET" and not path.endswith("/secret"):
            assert needed(described) == {"keys:read" if path == "/v1/keys" else "runs:read"}, f"{method} {path}"
        assert "403" in described["responses"], f"{method} {path}"
    assert seen > 30


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_without_the_scope_is_refused_whatever_exists(server: Server, scope: str) -> None:
    organization = f"org-{uuid4().hex[:12]}"
    key = server.stack.new_key(organization, scopes=[scope])
    with server.client(organization, key=key) as client:
        refused = 0
        for method, path, described in operations():
            if "security" not in described or scope in needed(described):
                continue
            refused += 1
            reply = client.request(method, re.sub(r"{\w+}", ID, path))
            assert (reply.status_code, reply.json()["code"]) == (403, "insufficient_scope"), f"{method} {path}"
            challenge = reply.headers["www-authenticate"]
            assert challenge.startswith('Bearer error="insufficient_scope", scope="')
            assert set(challenge.split('scope="')[1].rstrip('"').split()) == needed(described)
        assert refused > 10


def test_what_does_not_exist_and_what_is_foreign_look_the_same_to_a_key_without_the_scope(
    server: Server, foreign: Client
) -> None:
    run_id = foreign.finished()["id"]
    organization = f"org-{uuid4().hex[:12]}"
    key = server.stack.new_key(organization, scopes=["runs:read"])
    with server.client(organization, key=key) as client:
        same = {"X-Request-ID": "the-same"}
        replies = [client.post(f"/v1/runs/{one}/retry", json={}, headers=same) for one in (run_id, uuid4(), "x")]
        assert {reply.status_code for reply in replies} == {403}
        assert len({reply.text for reply in replies}) == 1


def test_a_missing_scope_is_refused_before_the_body_is_read(server: Server) -> None:
    key = server.stack.new_key("scopes", scopes=["runs:read"])
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /v1/runs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("body", [{"status": "running"}, {"error": ["x"]}, {"status": "cancelled", "output_data": {}}])
def test_a_key_that_writes_runs_may_only_stop_them(server: Server, api: Client, body: dict[str, Any]) -> None:
    run_id = api.run()["id"]
    key = server.stack.new_key(api.organization, scopes=["runs:write"])
    with server.client(api.organization, key=key) as client:
        reply = client.patch(f"/v1/runs/{run_id}", json=body)
        assert (reply.status_code, reply.json()["code"]) == (403, "insufficient_scope")
        stop = {"status": "cancelled", "reason": "enough", "release_session_after": True}
        assert client.patch(f"/v1/runs/{run_id}", json=stop).json()["status"] == "cancelled"


def test_who_am_i(server: Server) -> None:
    user = uuid4()
    key = server.stack.new_key("who", user, scopes=["runs:read", "runs:write"])
    with server.client("who", key=key) as client:
        found = client.json_of(client.get("/v1/whoami"))
        assert set(found) == {"organization_id", "key_id", "name", "user_id", "scopes", "machine_id", "expires_at"}
        assert (found["organization_id"], found["user_id"]) == ("who", str(user))
        assert found["scopes"] == ["runs:read", "runs:write"]


class Desk:
    """A machine with an executor's key, beside another machine of the same organization."""

    def __init__(self, server: Server, api: Client) -> None:
        self.machine, self.other = api.machine(), api.machine()
        key = server.stack.new_key(api.organization, scopes=["runs:execute"], machine_id=self.machine)
        self.client = server.client(api.organization, key=key)
        self.own = api.run(machine_id=self.machine)["id"]
        self.foreign = api.run(machine_id=self.other)["id"]
        until(lambda: api.get_run(self.own)["assigned_machine_id"] and api.get_run(self.foreign)["assigned_machine_id"])


@pytest.fixture
def desk(server: Server, api: Client) -> Iterator[Desk]:
    made = Desk(server, api)
    with made.client:
        yield made


def test_an_executor_works_with_a_key_of_its_machine(desk: Desk, api: Client) -> None:
    client = desk.client
    found = client.json_of(client.get("/v1/runs", params={"machine_id": desk.machine, "status": "scheduling"}))
    assert [run["id"] for run in found["items"]] == [desk.own]
    workflow = found["items"][0]["workflow_id"]
    assert client.json_of(client.get(f"/v1/workflows/{workflow}"))["id"] == workflow
    about: dict[str, Any] = {"attempt": 1, "assignment": 1, "claim": str(uuid4())}
    client.report(desk.own, status="running", **about)
    uploaded = client.upload(desk.own, **about)
    assert client.get(f"/v1/run-attachments/{uploaded['id']}/download").content == b"result"
    client.report(desk.own, status="success", output_attachment_ids=[uploaded["id"]], **about)
    assert client.json_of(client.get("/v1/whoami"))["machine_id"] == desk.machine
    assert (
        client.json_of(client.patch(f"/v1/machines/{desk.machine}", json={"is_available": False}))["id"] == desk.machine
    )
    assert api.get_run(desk.own)["status"] == "success"


def test_an_executor_sees_nothing_of_other_machines(desk: Desk, api: Client) -> None:
    client = desk.client
    hidden = [
        ("GET", f"/v1/runs/{desk.foreign}", "run_not_found"),
        ("GET", f"/v1/runs/{desk.foreign}/attempts", "run_not_found"),
        ("GET", f"/v1/runs/{desk.foreign}/events", "run_not_found"),
        ("GET", f"/v1/workflows/{api.get_run(desk.foreign)['workflow_id']}", "workflow_not_found"),
        ("GET", f"/v1/machines/{desk.other}", "machine_not_found"),
        ("GET", f"/v1/machines/{desk.other}/pools", "machine_not_found"),
        ("PATCH", f"/v1/machines/{desk.other}", "machine_not_found"),
    ]
    for method, path, code in hidden:
        reply = client.request(method, path, json={} if method == "PATCH" else None)
        assert (reply.status_code, reply.json()["code"]) == (404, code), path
    about: dict[str, Any] = {"attempt": 1, "assignment": 1, "claim": str(uuid4())}
    reply = client.patch(f"/v1/runs/{desk.foreign}", json={"status": "running", **about})
    assert (reply.status_code, reply.json()["code"]) == (404, "run_not_found")
    for path, own in (("runs", desk.own), ("machines", desk.machine)):
        assert [item["id"] for item in client.json_of(client.get(f"/v1/{path}"))["items"]] == [own]
    assert len(client.json_of(client.get("/v1/workflows"))["items"]) == 1
    others = client.json_of(client.get("/v1/runs", params={"machine_id": desk.other}))
    assert (others["items"], others["total"]) == ([], 0)


def test_files_of_other_machines_are_hidden_from_an_executor(desk: Desk, api: Client) -> None:
    api.report(desk.foreign, status="running")
    file = api.upload(desk.foreign)["id"]
    client = desk.client
    for path in (f"{file}", f"{file}/download", f"{file}/download-url"):
        assert client.get(f"/v1/run-attachments/{path}").json()["code"] == "attachment_not_found"
    assert client.json_of(client.get("/v1/run-attachments"))["items"] == []
    about: dict[str, Any] = {"attempt": 1, "assignment": 1, "claim": str(uuid4())}
    assert client.put(f"/v1/run-attachments/{file}", json={"expires_at": None, **about}).status_code == 404
    body = {"run_id": desk.foreign, "filename": "a", "content": "", "content_type": "a/b", "attachment_type": "output"}
    assert client.post("/v1/run-attachments", json=body).json()["code"] == "run_not_found"


def test_a_stolen_desktops_key_changes_nothing_but_its_own_run(desk: Desk, api: Client, server: Server) -> None:
    allowed = set()
    for method, path, described in operations():
        if "security" in described:
            reply = desk.client.request(method, re.sub(r"{\w+}", ID, path), json={} if method != "GET" else None)
            if reply.status_code != 403:
                allowed.add((method, path))
    assert {one for one in allowed if one[0] != "GET"} == {
        ("PATCH", "/v1/runs/{run_id}"),
        ("POST", "/v1/run-attachments"),
        ("PUT", "/v1/run-attachments/{attachment_id}"),
        ("PATCH", "/v1/machines/{machine_id}"),
    }
    reply = desk.client.patch(f"/v1/machines/{desk.machine}", json={"reserved_session_id": None})
    assert reply.status_code == 403


def test_a_stolen_desktops_key_expires_only_outputs_of_its_running_run(desk: Desk, api: Client) -> None:
    past = "2000-01-01T00:00:00Z"
    run = api.run(machine_id=desk.machine, file_inputs=[file_input()])
    api.report(desk.own, status="cancelled")
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    [given] = run["input_attachment_ids"]
    about: dict[str, Any] = {"attempt": 1, "assignment": 1, "claim": str(uuid4())}
    desk.client.report(run["id"], status="running", **about)
    made = desk.client.upload(run["id"], **about)["id"]

    def expire(client: Client, file: str, **more: object) -> tuple[int, str | None]:
        reply = client.put(f"/v1/run-attachments/{file}", json={"expires_at": past, **more})
        return reply.status_code, reply.json().get("code")

    def expire_at_all(**more: object) -> list[tuple[int, str | None]]:
        return [expire(desk.client, file, **about | more) for file in (given, made)]

    assert [expire(desk.client, file) for file in (given, made)] == [(422, None)] * 2, "it must say what it is about"
    assert expire_at_all(claim=str(uuid4())) == [(403, "insufficient_scope"), (409, "already_claimed")]
    assert expire_at_all(attempt=2) == [(403, "insufficient_scope"), (409, "attempt_superseded")]
    assert expire(api, made, expires_at=None, assignment=2) == (409, "assignment_superseded")
    assert expire(desk.client, made, **about | {"expires_at": None}) == (200, None)
    desk.client.report(run["id"], status="error", **about)
    assert expire_at_all() == [(403, "insufficient_scope"), (409, "invalid_transition")]
    assert api.retry(run["id"]).status_code == 200, "its owner's retry has its files"
    assert expire(api, given) == (200, None), "the owner may"


def test_a_stolen_desktops_key_changes_nothing_of_a_run_that_it_never_began(desk: Desk, api: Client) -> None:
    api.report(desk.own, status="cancelled")
    about: dict[str, Any] = {"attempt": 1, "assignment": 1, "claim": str(uuid4())}
    ended = api.get_run(desk.own)
    changes: list[dict[str, Any]] = [
        {"input_values": {"account": "mine"}},
        {"output_data": {}},
        {"release_session_after": True},
    ]
    for change in changes:
        reply = desk.client.patch(f"/v1/runs/{desk.own}", json={**about, **change})
        assert (reply.status_code, reply.json()["code"]) == (409, "invalid_transition"), change
    assert desk.client.report(desk.own, status="cancelled", **about) == ended, "it may say so too"


@pytest.mark.parametrize("missing", ["attempt", "assignment", "claim"])
def test_an_executors_report_must_say_what_it_is_about(desk: Desk, missing: str) -> None:
    about = {"attempt": 1, "assignment": 1, "claim": str(uuid4())} | {missing: None}
    bodies: list[dict[str, Any]] = [{"status": "running"}, {"status": "cancelled"}, {"input_values": {}}]
    for body in bodies:
        reply = desk.client.patch(f"/v1/runs/{desk.own}", json=body | about)
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", missing]


def test_idempotency_keys_of_a_bound_key_are_its_own(desk: Desk, api: Client, server: Server) -> None:
    """An executor neither sees nor takes those of its organization, nor those of another machine's."""
    headers = {"Idempotency-Key": uuid4().hex}
    body = {"status": "running", "attempt": 1, "assignment": 1, "claim": str(uuid4())}
    assert api.patch(f"/v1/runs/{desk.own}", json=body, headers=headers).status_code == 200
    first = desk.client.patch(f"/v1/runs/{desk.own}", json=body, headers=headers)
    assert (first.status_code, first.headers.get("Idempotency-Status")) == (200, None)
    again = desk.client.patch(f"/v1/runs/{desk.own}", json=body, headers=headers)
    assert (again.content, again.headers["Idempotency-Status"]) == (first.content, "replayed")

    taken = {"Idempotency-Key": uuid4().hex}
    assert desk.client.patch(f"/v1/runs/{desk.own}", json=body, headers=taken).status_code == 200
    created = api.post("/v1/pools", json={"name": "pool"}, headers=taken)
    assert (created.status_code, created.headers.get("Idempotency-Status")) == (201, None)
    key = server.stack.new_key(api.organization, scopes=["runs:execute"], machine_id=desk.other)
    with server.client(api.organization, key=key) as other:
        reply = other.patch(f"/v1/runs/{desk.foreign}", json=body | {"claim": str(uuid4())}, headers=taken)
        assert (reply.status_code, reply.headers.get("Idempotency-Status")) == (200, None)
