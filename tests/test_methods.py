"""HEAD is the GET of each path without its body; OPTIONS says what a path answers, to anybody."""

import re
import time
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.client import Client
from tests.support.raw_http import raw_exchange
from tests.support.server import Server

# Differ from request to request.
VOLATILE = {"date", "x-request-id"}


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    described: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", trust_env=False, verify=False).json()
    return described


@pytest.fixture(scope="module")
def anyone(server: Server) -> Any:
    with httpx.Client(base_url=server.url, trust_env=False, verify=False) as client:
        yield client


def same_head(client: httpx.Client, path: str, **headers: str) -> httpx.Response:
    """The reply to HEAD, which is that of GET without its body."""
    got, head = client.get(path, headers=headers), client.head(path, headers=headers)
    assert head.status_code == got.status_code, path
    assert head.content == b""
    kept = [{name: value for name, value in reply.headers.items() if name not in VOLATILE} for reply in (got, head)]
    if "transfer-encoding" in kept[0]:
        del kept[0]["transfer-encoding"]  # of the body, which HEAD has not
    assert kept[1] == kept[0], path
    return head


def test_every_path_with_a_get(api: Client, document: dict[str, Any]) -> None:
    run_id = api.run()["id"]
    api.report(run_id, status="running")
    ids: dict[str, Any] = {
        "attempt": 1,
        "run_id": run_id,
        "attachment_id": api.upload(run_id)["id"],
        "workflow_id": api.workflow(),
        "machine_id": api.machine(),
        "pool_id": api.pool(),
        "endpoint_id": api.webhook_endpoint(),
    }
    found = 0
    for template, operations in document["paths"].items():
        if "get" not in operations or "/download" in template or template == "/health/ready":
            continue  # these have tests of their own
        names = re.findall(r"\{(\w+)\}", template)
        places = {name: ids.get(name, uuid4()) for name in names}
        path = template.format(**places)
        found += same_head(api, path).status_code == 200
        for name in names:
            nothing = 2 if name == "attempt" else uuid4()
            assert same_head(api, template.format(**places | {name: nothing})).status_code == 404
            assert same_head(api, template.format(**places | {name: "x"})).status_code == 422
    assert found > 15


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/docs-assets/start.js", "/console", "/console/", "/console/main.js"]
)
def test_pages_and_their_files(anyone: httpx.Client, path: str) -> None:
    head = same_head(anyone, path)
    assert head.status_code in (200, 308)
    if "etag" in head.headers:
        same_head(anyone, path, **{"If-None-Match": head.headers["etag"]})


def test_health_and_metrics(anyone: httpx.Client) -> None:
    for path in ("/health/live", "/v1/health", "/v1/health/db", "/health/ready", "/metrics"):
        assert anyone.head(path).status_code == 200
        assert anyone.head(path).content == b""


def test_downloads(api: Client, anyone: httpx.Client) -> None:
    run_id = api.run()["id"]
    api.report(run_id, status="running")
    file = f"/v1/run-attachments/{api.upload(run_id, bytes(range(256)) * 20_000)['id']}/download"
    head = same_head(api, file)
    assert head.headers["content-length"] == "5120000"
    assert head.headers["accept-ranges"] == "bytes"
    assert same_head(api, file, Range="bytes=10-19").headers["content-range"] == "bytes 10-19/5120000"
    assert same_head(api, file, Range="bytes=9999999-").status_code == 416
    assert same_head(api, file, **{"Range": "bytes=0-1", "If-Range": '"other"'}).status_code == 200
    signed = api.get(f"{file}-url").json()["url"]
    assert same_head(anyone, signed).status_code == 200
    assert same_head(anyone, signed[:-1]).status_code == 404
    empty = api.upload(run_id, b"")["id"]
    assert same_head(api, f"/v1/run-attachments/{empty}/download").headers["content-length"] == "0"
    assert api.head(f"{file}-url").content == b""


def test_refusals(api: Client, anyone: httpx.Client, server: Server) -> None:
    assert same_head(anyone, "/v1/runs").status_code == 401
    assert same_head(api, "/v1/nothing").status_code == 404
    assert same_head(api, f"/v1/runs/{uuid4()}/retry").status_code == 405
    assert same_head(api, "/v1/runs?limit=0").status_code == 422
    assert same_head(api, "/v1/runs?search=x&include=y").status_code == 422
    key = server.stack.new_key(api.organization, scopes=["runs:write"])
    with server.client(api.organization, key=key) as writer:
        assert same_head(writer, "/v1/runs").status_code == 403


def test_nothing_follows_the_head(server: Server, api: Client) -> None:
    """Also when the reply that is not sent is long: what comes next is the reply to the next request."""
    run_id = api.run(input_values={"text": "x" * 600_000})["id"]
    key = api.headers["authorization"]
    head = f"HEAD /v1/runs/{run_id} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n"
    last = "GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received = raw_exchange(server.url, f"{head}{last}".encode())
    first, _, rest = received.partition(b"\r\n\r\n")
    assert int(re.search(rb"content-length: (\d+)", first)[1]) > 600_000  # type: ignore[index] # else the test fails
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n")


def test_head_does_not_wait_and_is_no_sign_of_life(server: Server, api: Client) -> None:
    machine = api.machine()
    path = f"/v1/runs?machine_id={machine}&status=scheduling&wait=20"
    key = server.stack.new_key(api.organization, scopes=["runs:read", "runs:execute"], machine_id=machine)
    with server.client(api.organization, key=key) as executor:
        began = time.monotonic()
        for client in (api, executor):
            assert client.head(path).status_code == 200
        assert executor.head("/v1/whoami").status_code == 200
        assert time.monotonic() - began < 10
        assert api.head("/v1/runs?wait=31").status_code == 422
        # What was noted before this is written with it or earlier.
        other = api.machine()
        with server.client(api.organization) as third:
            third.get(f"/v1/runs?machine_id={other}&status=scheduling")
        query = "SELECT id FROM machines WHERE look_at IS NOT NULL AND organization_id = $1"
        end = time.monotonic() + 20
        while not (seen := [str(row["id"]) for row in server.stack.sql(query, api.organization)]):
            assert time.monotonic() < end
        assert seen == [other]


def test_options_says_what_a_path_answers(anyone: httpx.Client, document: dict[str, Any]) -> None:
    for template, operations in document["paths"].items():
        allowed = {method.upper() for method in operations} | {"OPTIONS"}
        if "get" in operations:
            allowed.add("HEAD")
        path = re.sub(r"\{\w+\}", str(uuid4()), template)
        reply = anyone.options(path)
        assert (reply.status_code, reply.content) == (204, b"")
        assert reply.headers["allow"] == ", ".join(sorted(allowed)), template
        assert "content-length" not in reply.headers
        assert "x-request-id" in reply.headers


def test_options_is_the_same_for_known_and_unknown_ids(api: Client, anyone: httpx.Client) -> None:
    run_id = api.run()["id"]
    for client in (api, anyone):
        for path in ("/v1/runs/{}", "/v1/runs/{}/retry", "/v1/run-attachments/{}/download"):
            replies = [client.options(path.format(one)) for one in (run_id, uuid4(), "x")]
            assert len({(reply.status_code, reply.headers["allow"]) for reply in replies}) == 1


def test_options_elsewhere(server: Server, anyone: httpx.Client) -> None:
    for path in ("/", "/docs", "/openapi.json", "/console/main.js", "/metrics", "/docs-assets/start.js"):
        assert anyone.options(path).headers["allow"] == "GET, HEAD, OPTIONS"
    refused = anyone.options("/v1/nothing")
    assert (refused.status_code, refused.json()["code"]) == (404, "route_not_found")
    received = raw_exchange(server.url, b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 204 ")
    assert b"allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\n" in received
    # A preflight is one to a service without CORS_ORIGINS: nothing in the reply lets a page in.
    headers = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    reply = anyone.options("/v1/runs", headers=headers)
    assert reply.status_code == 204
    assert not [name for name in reply.headers if name.startswith("access-control")]
    assert anyone.request("OPTIONS", "/v1/runs", content=b"{}").status_code == 204


def test_methods_that_no_path_has(api: Client) -> None:
    for method in ("TRACE", "PROPFIND"):
        reply = api.request(method, "/v1/runs")
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")
