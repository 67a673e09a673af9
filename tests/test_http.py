"""The edge of the service: authentication, limits, errors, headers, logs, and input nobody should send."""

import base64
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app import __version__
from tests.support.client import Client, file_input, file_inputs
from tests.support.raw_http import raw_exchange
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import until

KEY_ERRORS = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic dXNlcjpwYXNz"},
    {"Authorization": "Bearer short"},
    {"Authorization": "Bearer rk_" + "x" * 43},
    {"Authorization": "Bearer rk_" + "x" * 5000},
    {"Authorization": "Bearer \xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9"},
]


class TestAuthentication:
    @pytest.mark.parametrize("headers", KEY_ERRORS)
    def test_no_or_bad_key(self, server: Server, headers: dict[str, str]) -> None:
        encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        reply = httpx.post(
            f"{server.url}/v1/runs/{uuid4()}/retry", json={}, headers=encoded, trust_env=False, verify=False
        )
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json()["code"] == "unauthorized"

    def test_it_is_decided_before_the_body_is_read(self, server: Server) -> None:
        path = f"/v1/runs/{uuid4()}/retry"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n"
        )
        reply = raw_exchange(server.url, head.encode() + b"{")
        assert reply.startswith(b"HTTP/1.1 401 ")

    def test_expired_and_revoked_keys(self, server: Server, stack: Stack) -> None:
        for change in ("expires_at = now() - interval '1 s'", "revoked_at = now()"):
            with server.client() as api:
                assert api.get("/v1/runs").status_code == 200
                stack.sql(f"UPDATE api_keys SET {change} WHERE organization_id = $1", api.organization)
                assert api.get("/v1/runs").status_code == 401

    def test_keys_are_stored_as_digests(self, server: Server, stack: Stack) -> None:
        key = stack.new_key("digests")
        [row] = stack.sql("SELECT * FROM api_keys WHERE organization_id = 'digests'")
        assert key not in str(row)
        assert len(row["key_hash"]) == 32

    def test_health_needs_none(self, server: Server) -> None:
        for path in ("/v1/health", "/v1/health/db", "/health/live", "/health/ready"):
            reply = httpx.get(server.url + path, trust_env=False, verify=False)
            version = {"version": __version__} if path == "/health/live" else {}
            assert (reply.status_code, reply.json()) == (200, {"status": "ok", "down": [], "reasons": {}} | version)


@pytest.fixture(scope="module")
def limited(stack: Stack) -> Iterator[Server]:
    """A server with small limits."""
    started = start_server(stack, MAX_BODY_BYTES=100_000, MAX_FILE_BYTES=1000, MAX_FILES=2, BODY_TIMEOUT_SECONDS=1)
    yield started
    started.app.stop()


@pytest.fixture
def small(limited: Server) -> Iterator[Client]:
    with limited.client() as client:
        yield client


class TestLimits:
    @pytest.mark.parametrize(
        "options",
        [
            {"file_inputs": [file_input(b"x" * 1001)]},
            {"file_inputs": file_inputs(3)},
            {"input_values": {"x": "y" * 100_000}},
        ],
    )
    def test_too_large(self, small: Client, options: dict[str, object]) -> None:
        run = small.finished()
        refused = small.retry(run["id"], **options)
        assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")
        assert small.get_run(run["id"]) == run

    def test_exactly_the_limit_passes(self, small: Client) -> None:
        assert small.retry(small.finished()["id"], file_inputs=file_inputs(2, b"x" * 1000)).status_code == 200

    def test_a_declared_length_is_refused_before_the_body(self, limited: Server, small: Client) -> None:
        head = (
            f"POST /v1/runs HTTP/1.1\r\nHost: x\r\nAuthorization: {small.headers['authorization']}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100001\r\n\r\n"
        )
        reply = raw_exchange(limited.url, head.encode())
        assert reply.startswith(b"HTTP/1.1 413 ")  # 408 if it had waited for the body
        assert b"payload_too_large" in reply

    def test_chunks_without_a_length_count_as_they_arrive(self, small: Client) -> None:
        def chunks() -> Iterator[bytes]:
            yield b'{"input_values":{"x":"'
            for _ in range(100):
                yield b"y" * 10_000
            yield b'"}}'

        refused = small.post(
            f"/v1/runs/{uuid4()}/retry", content=chunks(), headers={"Content-Type": "application/json"}
        )
        assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")

    def test_a_slow_body_ends_in_408(self, limited: Server, small: Client) -> None:
        host, port = limited.url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/runs HTTP/1.1\r\nHost: x\r\nAuthorization: {small.headers['authorization']}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode())
            connection.settimeout(0.2)
            reply, end = b"", time.monotonic() + 8
            while b"request_timeout" not in reply and time.monotonic() < end:
                try:
                    connection.sendall(b" ")  # a byte now and then must not keep it open
                    reply += connection.recv(65536)
                except TimeoutError:
                    continue
        assert reply.startswith(b"HTTP/1.1 408 ")


class TestRefusals:
    def test_unknown_routes_and_methods(self, api: Client) -> None:
        reply = api.get("/v1/nothing")
        assert (reply.status_code, reply.json()["code"]) == (404, "route_not_found")
        reply = api.put(f"/v1/runs/{uuid4()}/retry", json={})
        assert (reply.status_code, reply.json()["code"]) == (405, "method_not_allowed")
        assert reply.headers["allow"] == "OPTIONS, POST"
        assert api.get("/v1/runs/").status_code == 404, "no redirect that would send key and body twice"

    @pytest.mark.parametrize(
        "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
    )
    def test_other_content_types(self, api: Client, content_type: str) -> None:
        run = api.finished()
        reply = api.post(f"/v1/runs/{run['id']}/retry", content=b"{}", headers={"Content-Type": content_type})
        assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_media_type")
        reply = api.post(
            f"/v1/runs/{run['id']}/retry",
            content=b"{}",
            headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
        )
        assert reply.status_code == 415

    @pytest.mark.parametrize(
        "content_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"]
    )
    def test_json_content_types(self, api: Client, content_type: str) -> None:
        run = api.finished()
        reply = api.post(f"/v1/runs/{run['id']}/retry", content=b" {} ", headers={"Content-Type": content_type})
        assert reply.status_code == 200

    @pytest.mark.parametrize("run_id", ["x", "1", "3c90c3cc-0d44-4b50-8888", "%00", "🙂", "' OR 1=1"])
    def test_ids_that_are_no_uuids(self, api: Client, run_id: str) -> None:
        reply = api.post(f"/v1/runs/{run_id}/retry", json={})
        assert reply.status_code == 422
        [error] = reply.json()["detail"]
        assert (error["loc"], error.keys()) == (["path", "run_id"], {"loc", "msg", "type"})

    def test_ids_in_other_spellings_mean_the_same_run(self, api: Client) -> None:
        run = api.finished()
        for spelled in (run["id"].upper(), f"{{{run['id']}}}"):
            assert api.get(f"/v1/runs/{spelled}").json() == run


NUL, LONE = "\\u0000", "\\ud800"
DEEP = b"[" * 10_000 + b"]" * 10_000

HOSTILE = [
    (b"{", ["body"]),
    (b"[]", ["body"]),
    (b"null", ["body"]),
    (b'"x"', ["body"]),
    (b"\xff\xfe", ["body"]),
    (b'{"input_values": {"x": "\xff"}}', ["body"]),
    (b'{"input_values": []}', ["body", "input_values"]),
    (b'{"input_values": "x"}', ["body", "input_values"]),
    (b'{"input_values": {"x": NaN}}', ["body", "input_values"]),
    (b'{"input_values": {"x": [Infinity]}}', ["body", "input_values"]),
    (b'{"input_values": {"x": -Infinity}}', ["body", "input_values"]),
    (b'{"input_values": {"x": 1e400}}', ["body", "input_values"]),
    (b'{"input_values": {"x": 9223372036854775809}}', ["body", "input_values"]),
    (b'{"input_values": {"x": -9223372036854775809}}', ["body", "input_values"]),
    (b'{"input_values": {"x": 1' + b"0" * 6000 + b"}}", ["body"]),
    (f'{{"input_values": {{"x": "{NUL}"}}}}'.encode(), ["body", "input_values"]),
    (f'{{"input_values": {{"{NUL}": 1}}}}'.encode(), ["body", "input_values"]),
    (f'{{"input_values": {{"x": "{LONE}"}}}}'.encode(), ["body"]),
    (f'{{"sensitive_input_values": {{"x": "{NUL}"}}}}'.encode(), ["body", "sensitive_input_values"]),
    (f'{{"sensitive_input_values": {{"x": "{LONE}"}}}}'.encode(), ["body"]),
    (b'{"sensitive_input_values": {"x": {"filename": [NaN]}}}', ["body", "sensitive_input_values"]),
    (b'{"sensitive_input_values": ["pw"]}', ["body", "sensitive_input_values"]),
    (b'{"input_values": {"x": ' + DEEP + b"}}", ["body"]),
    (b'{"machine_id": "x"}', ["body", "machine_id"]),
    (b'{"machine_id": 1}', ["body", "machine_id"]),
    (b'{"pool_ids": "x"}', ["body", "pool_ids"]),
    (b'{"pool_ids": [1]}', ["body", "pool_ids", 0]),
    (b'{"pool_ids": [null]}', ["body", "pool_ids", 0]),
    (b'{"session_id": {}}', ["body", "session_id"]),
    (b'{"reuse_session": "true"}', ["body", "reuse_session"]),
    (b'{"reuse_session": 1}', ["body", "reuse_session"]),
    (b'{"release_session_after": 0}', ["body", "release_session_after"]),
    (b'{"is_priority": "no"}', ["body", "is_priority"]),
    (b'{"start_session": []}', ["body", "start_session"]),
    (b'{"session_alias": 5}', ["body", "session_alias"]),
    (f'{{"session_alias": "{NUL}"}}'.encode(), ["body", "session_alias"]),
    (b'{"session_alias": "' + b"x" * 256 + b'"}', ["body", "session_alias"]),
    (b'{"file_inputs": {}}', ["body", "file_inputs"]),
    (b'{"file_inputs": [1]}', ["body", "file_inputs", 0]),
    (b'{"file_inputs": [{}]}', ["body", "file_inputs", 0, "filename"]),
]


@pytest.mark.parametrize(("body", "loc"), HOSTILE, ids=[body[:40].decode("latin-1") for body, _ in HOSTILE])
def test_hostile_bodies_are_422_without_any_of_the_input(api: Client, body: bytes, loc: list[object]) -> None:
    run = api.finished()
    reply = api.post(f"/v1/runs/{run['id']}/retry", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 422, reply.text
    errors = reply.json()["detail"]
    assert loc in [error["loc"] for error in errors]
    assert all(error.keys() == {"loc", "msg", "type"} for error in errors)
    assert api.get_run(run["id"]) == run


def test_errors_never_name_a_callers_key_or_value(api: Client) -> None:
    body = {
        "input_values": {"canary-key": {"canary-inner": float("nan")}},
        "sensitive_input_values": {"canary-key": ["canary-value", float("inf")]},
        "file_inputs": [{"filename": "canary/name", "content": "canary content"}],
        "machine_id": "canary-id",
        "session_alias": "canary" * 100,
    }
    reply = api.post(
        f"/v1/runs/{uuid4()}/retry", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == 422
    assert "canary" not in reply.text


def test_what_json_can_say_is_kept_as_sent(api: Client) -> None:
    values: dict[str, Any] = {
        "big": 2**63 - 1,
        "small": -(2**63),
        "float": 1.0,
        "exponent": 1e300,
        "unicode": "é🙂\u2028",
        "escaped": "\\u0000",
        "k" * 255: "long key",
        "nested": [[[{}]]],
    }
    run = api.finished(input_values=values)
    assert api.get_run(run["id"])["input_values"] == values
    doubled = api.post(
        f"/v1/runs/{run['id']}/retry",
        content=b'{"input_values":{"a":1,"a":2}}',
        headers={"Content-Type": "application/json"},
    )
    assert doubled.json()["input_values"] == {"a": 2}, "the last of equal keys, as everywhere"


TEXT = '{"input_values": {"user": "Zoë ☃"}}'


def retried(api: Client, body: bytes, **headers: str) -> httpx.Response:
    run = api.finished()
    return api.post(f"/v1/runs/{run['id']}/retry", content=body, headers={"Content-Type": "application/json"} | headers)


@pytest.mark.parametrize("padding", [0, 200_000])
def test_a_byte_order_mark_of_utf_8_is_dropped(api: Client, padding: int) -> None:
    """A short body is parsed at once, a long one in a thread."""
    body = b"\xef\xbb\xbf" + TEXT.encode() + b" " * padding
    assert api.json_of(retried(api, body))["input_values"] == {"user": "Zoë ☃"}
    assert api.json_of(retried(api, b"\xef\xbb\xbf"))["status"] == "scheduling", "an empty body equals {}"
    twice = api.json_of(retried(api, b"\xef\xbb\xbf" + body), 422)["detail"]
    assert [error["type"] for error in twice] == ["json_invalid"]


def test_a_byte_order_mark_may_come_in_pieces(api: Client) -> None:
    run = api.finished()
    pieces = (bytes([byte]) for byte in b"\xef\xbb\xbf" + TEXT.encode())
    path, headers = f"/v1/runs/{run['id']}/retry", {"Content-Type": "application/json"}
    assert api.json_of(api.post(path, content=pieces, headers=headers))["input_values"] == {"user": "Zoë ☃"}


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp1252", "latin-1"]
)
@pytest.mark.parametrize("padding", [0, 200_000])
def test_another_encoding_has_a_sentence_of_its_own(api: Client, encoding: str, padding: int) -> None:
    text = TEXT.replace("☃", "€" if encoding == "cp1252" else "é") + " " * padding
    [error] = api.json_of(retried(api, text.encode(encoding)), 422)["detail"]
    assert (error["loc"], error["type"]) == (["body"], "json_encoding")
    assert "UTF-8" in error["msg"]
    # With its mark, where the codec does not write one by itself.
    if encoding.startswith("utf-") and encoding[-2:] in ("le", "be"):
        [error] = api.json_of(retried(api, ("\ufeff" + text).encode(encoding)), 422)["detail"]
        assert error["type"] == "json_encoding"


@pytest.mark.parametrize("body", [b"{", b'{"a": "\\ud800"}', b'{"x": "\xc3\xa9",}', "☃".encode()])
def test_what_is_utf_8_is_not_called_another_encoding(api: Client, body: bytes) -> None:
    [error] = api.json_of(retried(api, body), 422)["detail"]
    assert error["type"] == "json_invalid"


class TestHeadersAndLogs:
    def test_every_reply_has_its_headers(self, api: Client) -> None:
        for reply in (api.get("/v1/runs"), api.get(f"/v1/runs/{uuid4()}"), api.get("/v1/runs/x"), api.get("/nothing")):
            assert reply.headers["cache-control"] == "no-store"
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert len(reply.headers["x-request-id"]) == 32

    def test_a_request_id_is_passed_through_when_it_is_harmless(self, api: Client) -> None:
        assert api.get("/v1/runs", headers={"X-Request-ID": "my-id_1.2"}).headers["x-request-id"] == "my-id_1.2"
        assert api.get("/v1/runs", headers={"X-Request-ID": 'a b"c'}).headers["x-request-id"] != 'a b"c'

    def test_one_json_line_a_request_without_body_or_query(self, api: Client, server: Server) -> None:
        run = api.finished()
        request_id = uuid4().hex
        api.post(
            f"/v1/runs/{run['id']}/retry?x=in-the-query",
            json={"input_values": {"a": "in-the-body"}},
            headers={"X-Request-ID": request_id},
        )
        lines = until(lambda: [line for line in server.app.log.read_text().splitlines() if request_id in line])
        assert len(lines) == 1
        line = json.loads(lines[0])
        assert (line["status"], line["method"], line["route"]) == (200, "POST", "/v1/runs/{run_id}/retry")
        assert (line["organization_id"], line["run_id"]) == (api.organization, run["id"])
        assert "in-the" not in server.app.log.read_text()

    def test_cors_is_off_unless_set(self, stack: Stack, api: Client) -> None:
        origin = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
        assert "access-control-allow-origin" not in api.get("/v1/runs", headers=origin).headers
        server = start_server(stack, CORS_ORIGINS="https://ui.example, https://other.example")
        try:
            reply = httpx.options(
                f"{server.url}/v1/runs/{uuid4()}/retry", headers=origin, trust_env=False, verify=False
            )
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://ui.example")
            reply = httpx.post(f"{server.url}/v1/runs", headers=origin, trust_env=False, verify=False)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (401, "https://ui.example")
            exposed = {name.strip().lower() for name in reply.headers["access-control-expose-headers"].split(",")}
            assert {"etag", "accept-ranges", "content-range", "x-request-id", "retry-after"} <= exposed
            # What tracing and caching put into each request; HEAD with a key is asked for, too.
            names = "authorization,traceparent,tracestate,baggage,range,if-range,if-none-match,cache-control"
            asked = {"Origin": "https://ui.example", "Access-Control-Request-Headers": names}
            for method in ("GET", "HEAD", "PUT"):
                asked["Access-Control-Request-Method"] = method
                reply = httpx.options(f"{server.url}/v1/runs", headers=asked, trust_env=False, verify=False)
                assert reply.status_code == 200, reply.text
            asked["Access-Control-Request-Headers"] = "x-other"
            assert (
                httpx.options(f"{server.url}/v1/runs", headers=asked, trust_env=False, verify=False).status_code == 400
            )
            # No preflight, but OPTIONS itself.
            del asked["Access-Control-Request-Method"]
            reply = httpx.options(f"{server.url}/v1/runs", headers=asked, trust_env=False, verify=False)
            assert (reply.status_code, reply.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
            assert reply.headers["access-control-allow-origin"] == "https://ui.example"
        finally:
            server.app.stop()


def test_a_stop_waits_for_requests_under_way(stack: Stack) -> None:
    server = start_server(stack)
    with server.client() as api:
        run = api.finished()
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"file_inputs": [file_input(b"x" * 100_000)]}).encode()
        head = (
            f"POST /v1/runs/{run['id']}/retry HTTP/1.1\r\nHost: x\r\nAuthorization: {api.headers['authorization']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=15) as connection:
            connection.sendall(head.encode() + body[:1000])
            time.sleep(0.3)  # not a wait for something: the request must be under way, and nothing shows that outside
            os.kill(server.app.pid, signal.SIGTERM)
            connection.sendall(body[1000:])
            reply = b""
            while chunk := connection.recv(65536):
                reply += chunk
        assert reply.startswith(b"HTTP/1.1 200 ")
    server.app.stop()
    [row] = stack.sql("SELECT attempt FROM runs WHERE id = $1", run["id"])
    assert row["attempt"] == 2


def test_base64_of_any_bytes_comes_back(api: Client) -> None:
    content = bytes(range(256)) * 10
    run = api.run(file_inputs=[{"filename": "all.bin", "content": base64.b64encode(content).decode()}])
    assert api.get(f"/v1/run-attachments/{run['input_attachment_ids'][0]}/download").content == content
