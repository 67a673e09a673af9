"""A client may close its sending side and still read: each whole request that it sent before is answered, and no other."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from tests.support.client import Client
from tests.support.server import Server


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def half_closed(server: Server, *pieces: bytes) -> bytes:
    """Send the pieces, close the sending side, and read what comes."""
    with connected(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", received)]


def request(api: Client, method: str, path: str, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {api.headers['authorization']}", *headers]
    if body or length is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_a_retry_is_answered(server: Server, api: Client, headers: tuple[str, ...]) -> None:
    run_id = api.finished()["id"]
    received = half_closed(server, request(api, "POST", f"/v1/runs/{run_id}/retry", b"{}", *headers))
    assert statuses(received) == [200]
    assert received.lower().count(b"connection: close") == 1
    assert json.loads(received.partition(b"\r\n\r\n")[2])["attempt"] == 2


def test_the_end_may_come_before_the_body_was_read(server: Server, api: Client) -> None:
    """Head, body and end in one piece, with a body that takes many reads."""
    run_id = api.finished()["id"]
    body = json.dumps({"input_values": {"text": "x" * 3_000_000}}).encode()
    received = half_closed(server, request(api, "POST", f"/v1/runs/{run_id}/retry", body))
    assert statuses(received) == [200]
    assert len(received) > 3_000_000


def test_the_end_may_come_while_the_reply_is_being_made(server: Server, api: Client) -> None:
    with connected(server) as connection:
        connection.sendall(request(api, "GET", "/v1/runs"))
        connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        assert b'"items":[]' in rest_of(connection)


def test_a_body_in_chunks(server: Server, api: Client) -> None:
    run_id = api.finished()["id"]
    head = request(
        api, "POST", f"/v1/runs/{run_id}/retry", b"", "Transfer-Encoding: chunked", "Content-Type: application/json"
    )
    assert statuses(half_closed(server, head, b"2\r\n{}\r\n")) == [400]
    assert api.get_run(run_id)["attempt"] == 1
    assert statuses(half_closed(server, head, b"2\r\n{}\r\n0\r\n\r\n")) == [200]
    assert api.get_run(run_id)["attempt"] == 2


def test_without_keep_alive_of_http_1_0(server: Server) -> None:
    received = half_closed(server, b"GET /health/live HTTP/1.0\r\n\r\n")
    assert statuses(received) == [200]
    assert received.endswith(b"}")


def test_requests_sent_ahead_are_all_answered(server: Server, api: Client) -> None:
    run_id = api.finished()["id"]
    retry = request(api, "POST", f"/v1/runs/{run_id}/retry", b"{}")
    received = half_closed(server, retry + request(api, "GET", f"/v1/runs/{run_id}") + retry + b"\r\n")
    assert statuses(received) == [200, 200, 409]


def test_of_requests_sent_ahead_the_last_may_be_cut_off(server: Server, api: Client) -> None:
    run_id = api.finished()["id"]
    whole = request(api, "GET", f"/v1/runs/{run_id}")
    retry = request(api, "POST", f"/v1/runs/{run_id}/retry", b"{}")
    for left_out in (1, 2, 10):
        assert statuses(half_closed(server, whole + retry[:-left_out])) == [200, 400]
    assert api.get_run(run_id)["attempt"] == 1


@pytest.mark.parametrize("sent", [b"G", b"GET /health/live HTTP/1.1\r\nHost: x\r\n"])
def test_half_a_head_is_refused(server: Server, sent: bytes) -> None:
    received = half_closed(server, sent)
    assert statuses(received) == [400]
    assert b'"code":"incomplete_request"' in received


def test_half_a_body_is_refused_and_changes_nothing(server: Server, api: Client) -> None:
    run_id = api.finished()["id"]
    retry = request(api, "POST", f"/v1/runs/{run_id}/retry", b"{}", length=3)
    received = half_closed(server, retry)
    assert statuses(received) == [400]
    assert b'"code":"incomplete_request"' in received
    assert b"x-request-id: " in received.lower()
    waiting = request(api, "POST", f"/v1/runs/{run_id}/retry", b"", "Expect: 100-continue", length=2)
    assert statuses(half_closed(server, waiting))[-1] == 400
    assert api.get_run(run_id)["attempt"] == 1


def test_refusals_decided_by_the_head_come_first(server: Server, api: Client) -> None:
    head = b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
    assert statuses(half_closed(server, head)) == [401]
    assert statuses(half_closed(server, request(api, "POST", "/v1/runs", b"{", length=10**12))) == [413]


def test_nothing_sent_is_answered_by_nothing(server: Server) -> None:
    assert half_closed(server) == b""


def test_an_idle_connection_ends_with_its_client(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        reply = b""
        while not reply.endswith(b"}"):  # head and body may come apart
            reply += connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        assert rest_of(connection) == b""
        assert time.monotonic() - began < 3


def test_a_long_poll_is_answered(server: Server, api: Client) -> None:
    machine_id = api.machine()
    query = f"machine_id={machine_id}&status=scheduling"
    assert b'"items":[]' in half_closed(server, request(api, "GET", f"/v1/runs?{query}&wait=0.3"))
    with connected(server) as connection:
        connection.sendall(request(api, "GET", f"/v1/runs?{query}&wait=20"))
        connection.shutdown(socket.SHUT_WR)
        run_id = api.run(machine_id=machine_id)["id"]
        received = rest_of(connection)
    assert statuses(received) == [200]
    assert run_id.encode() in received


def test_a_download_is_sent_whole(server: Server, api: Client) -> None:
    run_id = api.run()["id"]
    api.report(run_id, status="running")
    file_id = api.upload(run_id, b"y" * 3_000_000)["id"]
    received = half_closed(server, request(api, "GET", f"/v1/run-attachments/{file_id}/download"))
    assert statuses(received) == [200]
    assert received.endswith(b"\r\n\r\n" + b"y" * 3_000_000)
