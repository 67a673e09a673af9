"""Connections: what strangers may hold open, who is cut off, and requests that come in pieces.

Each attack is scaled to a few seconds, and to many times what the limit lets through: without the limit the test fails.
"""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest

from tests.support.client import Client, file_input
from tests.support.connections import answers, closed, connect, get, post, pour, readable, reply_of
from tests.support.server import Server, start_server
from tests.support.server_watch import GROWTH_WITHOUT_KEY, MB, PAUSE_WITHOUT_KEY, connected, watched
from tests.support.stack import Stack
from tests.support.waiting import until


@pytest.fixture
def fresh(stack: Stack) -> Iterator[Server]:
    """A server that nobody has used yet, so that its memory is its own."""
    started = start_server(stack, LOG_LEVEL="warning")
    yield started
    started.app.stop()


@pytest.mark.alone
class TestWithoutKey:
    def test_pipelined_requests_wait_unread(self, fresh: Server) -> None:
        piece = b"GET /v1/runs HTTP/1.1\r\nHost: x\r\n\r\n" * 2000
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh)) for _ in range(60)]
            pour(connections, piece, seconds=4, at_most=60 * MB)
        seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_trailers_are_dropped(self, fresh: Server) -> None:
        head = b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh)) for _ in range(4)]
            for connection in connections:
                connection.sendall(head)
            sent = pour(connections, b"X-Trailer: of some length\r\n" * 5000, seconds=4, at_most=80 * MB)
        assert sent < 40 * MB, "the connections closed"
        seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_long_heads_share_what_they_may_hold(self, fresh: Server) -> None:
        """500 connections with 60 KB of a head each; ordinary heads do not notice."""
        head = b"GET /v1/runs HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 60_000
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh)) for _ in range(500)]
            for connection in connections:
                connection.sendall(head)
            assert until(lambda: any(readable(connection) for connection in connections))
            time.sleep(1)  # watched
            refused = [connection for connection in connections if readable(connection)]
        assert len(refused) < 500
        seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_cookies_are_not_read(self, server: Server) -> None:
        """To read this one takes the standard library of Python 3.11 many seconds."""
        cookie = {"Cookie": 'a="' + "\\" * 60_000 + '"'}
        with httpx.Client(base_url=server.url, trust_env=False, verify=False) as client:
            for path in ("/health/live", "/v1/health", "/metrics", "/docs"):
                began = time.monotonic()
                assert client.get(path, headers=cookie).status_code == 200
                assert time.monotonic() - began < PAUSE_WITHOUT_KEY

    def test_many_tiny_headers_are_too_many(self, server: Server) -> None:
        with connect(server) as connection:
            connection.sendall(b"GET /v1/runs HTTP/1.1\r\n" + b"a:\r\n" * 10_000)
            assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")

    def test_bodies_that_nobody_reads_wait_unread(self, fresh: Server) -> None:
        """In chunks of one byte, which cost as much work as large ones."""
        head = b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh)) for _ in range(60)]
            for connection in connections:
                connection.sendall(head)
            pour(connections, b"1\r\nx\r\n" * 10_000, seconds=4, at_most=200 * MB)
        seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_pages_of_metrics_that_nobody_takes_are_few(self, fresh: Server) -> None:
        """Each is as of the moment when it was made, and there is one a second."""
        with ExitStack() as stack, watched(fresh) as seen:
            with fresh.client() as api:  # each route makes the page longer
                for path, operations in api.get("/openapi.json").json()["paths"].items():
                    for method in operations:
                        api.request(method, re.sub(r"\{\w+\}", str(uuid4()), path))
            began = time.monotonic()
            connections = []
            for _ in range(60):
                connections.append(stack.enter_context(connect(fresh, rcvbuf=4096, mss=536)))
                connections[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                until(lambda: readable(connections[-1]))
            seconds = time.monotonic() - began
            pages = [reply_of(connection)[2] for connection in connections]
        print(f"{len(set(pages))} pages of {len(pages[0])} bytes in {seconds:.1f} s")  # noqa: T201 - for the record
        assert len(set(pages)) <= 2 + seconds
        seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_replies_that_nobody_takes_are_few(self, fresh: Server) -> None:
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh, rcvbuf=4096)) for _ in range(50)]
            pour(connections, request, seconds=4, at_most=20 * MB)
        seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)


@pytest.fixture(scope="module")
def narrow(stack: Stack) -> Iterator[Server]:
    """A server for few connections, that waits for no reader."""
    started = start_server(stack, MAX_CONNECTIONS=16, SEND_TIMEOUT_SECONDS=1)
    yield started
    started.app.stop()


class TestConnections:
    """How many there may be, and which one goes for a new one."""

    @pytest.fixture
    def open_(self, narrow: Server) -> Iterator[Callable[[], socket.socket]]:
        with ExitStack() as stack:
            yield lambda: stack.enter_context(connect(narrow))

    def test_the_oldest_idle_one_goes_first(self, open_: Callable[[], socket.socket]) -> None:
        connections = [open_() for _ in range(16)]
        assert all(answers(connection) for connection in connections)
        assert answers(connections[0])  # which makes it the youngest
        late = open_()
        assert answers(late)
        assert until(lambda: closed(connections[1]))
        assert all(answers(connection) for connection in (connections[0], *connections[2:], late))

    def test_who_shows_no_key_goes_next(self, open_: Callable[[], socket.socket]) -> None:
        connections = [open_() for _ in range(16)]
        for connection in connections:
            connection.sendall(b"GET /v1/runs HTTP/1.1\r\n")
        assert answers(open_())
        assert until(lambda: closed(connections[0]))

    def test_who_works_stays(self, narrow: Server, open_: Callable[[], socket.socket]) -> None:
        with narrow.client() as api:
            upload = (
                f"POST /v1/runs/{uuid4()}/retry HTTP/1.1\r\nHost: x\r\nAuthorization: {api.headers['authorization']}\r\n"
                "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
            ).encode()
        connections = [open_() for _ in range(16)]
        for connection in connections:
            connection.sendall(upload)
            assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        for connection in (open_(), open_()):
            status, head, body = reply_of(connection)
            assert (status, json.loads(body)["code"]) == (503, "overloaded")
            assert b"\r\nRetry-After: " in head
        for connection in connections:
            connection.sendall(b"{}")
            assert reply_of(connection)[0] == 404

    @pytest.mark.alone
    def test_a_thousand_idle_ones_hurt_nobody(self, stack: Stack) -> None:
        """The usual soft limit is 1,024 descriptors; the server raises it as far as it may."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            server = start_server(stack)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        try:
            with ExitStack() as opened, watched(server) as seen:
                connections = [opened.enter_context(connect(server)) for _ in range(1100)]
                assert answers(connections[-1])
                assert answers(connections[0])
                time.sleep(0.5)  # watched
            seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)
        finally:
            server.app.stop()

    @pytest.mark.alone
    def test_a_crowd_at_readiness_is_one_question(self, stack: Stack) -> None:
        """Not a connection to PostgreSQL for each of them."""
        server = start_server(stack, DATABASE_POOL_SIZE=60, BACKGROUND_PERIOD_SECONDS=3600)
        port = urlsplit(stack.postgres.url).port
        try:
            with ExitStack() as opened, watched(server) as seen:
                connections = [opened.enter_context(connect(server)) for _ in range(300)]
                for _ in range(5):
                    for connection in connections:
                        connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
                    for connection in connections:
                        reply = b""
                        while not reply.endswith(b"}"):  # head and body may come in two pieces
                            reply += connection.recv(65536)
                        assert reply.startswith(b"HTTP/1.1 200 ")
                assert connected(server, port) < 20
            seen.within(growth=GROWTH_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)
        finally:
            server.app.stop()

    def test_the_document_is_made_once(self, server: Server) -> None:
        with httpx.Client(base_url=server.url, trust_env=False, verify=False) as client:
            first = client.get("/openapi.json")
            tag = first.headers["etag"]
            assert first.headers["content-encoding"] == "gzip"
            assert client.get("/openapi.json", headers={"If-None-Match": tag}).status_code == 304
            plain = client.get("/openapi.json", headers={"Accept-Encoding": "identity", "If-None-Match": tag})
        assert plain.json() == first.json()
        assert plain.headers["etag"] != tag

    def test_few_descriptors_mean_few_connections(self) -> None:
        code = "import app.api.server as s; print(s.room_for_connections(2000, 200))"
        command = ["sh", "-c", f'ulimit -n 2000; exec {sys.executable} -c "{code}"']
        assert int(subprocess.run(command, capture_output=True, check=True).stdout) == 2000 - 200 - 512 - 64


class TestSending:
    """Replies to a reader that does not read."""

    @pytest.mark.parametrize("close", ["close", "keep-alive"])
    def test_a_reader_that_takes_nothing_is_cut_off(self, narrow: Server, close: str) -> None:
        with narrow.client() as api, connect(narrow, rcvbuf=4096) as connection:
            connection.sendall(get(api, f"/v1/runs/{large_run(api)}", close))
            port = connection.getsockname()[1]
            until(lambda: connected(narrow, port))
            until(lambda: not connected(narrow, port))

    def test_a_stranger_who_takes_it_drop_by_drop_is_cut_off(self, narrow: Server) -> None:
        with connect(narrow, rcvbuf=4096, mss=536) as connection:
            connection.sendall(b"GET /docs-assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n")
            port = connection.getsockname()[1]

            def is_gone_while_read() -> bool:
                with suppress(OSError):
                    connection.recv(2000)
                return not connected(narrow, port)

            assert connection.recv(100)
            assert connected(narrow, port)
            until(is_gone_while_read, 10)

    def test_a_slow_one_with_a_signed_url_gets_everything(self, narrow: Server) -> None:
        content = os.urandom(3 * MB)
        with narrow.client() as api, connect(narrow, rcvbuf=65536) as connection:
            [file] = api.run(file_inputs=[file_input(content)])["input_attachment_ids"]
            url = api.json_of(api.get(f"/v1/run-attachments/{file}/download-url"))["url"].removeprefix(narrow.url)
            connection.sendall(f"GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while piece := connection.recv(65536):
                received += piece
                time.sleep(0.05)
            assert received.partition(b"\r\n\r\n")[2] == content

    def test_a_slow_one_gets_everything(self, narrow: Server) -> None:
        with narrow.client() as api, connect(narrow, rcvbuf=65536) as connection:
            connection.sendall(get(api, f"/v1/runs/{large_run(api)}", "close"))
            received = b""
            while piece := connection.recv(65536):
                received += piece
                time.sleep(0.01)
            assert json.loads(received.partition(b"\r\n\r\n")[2])["input_values"] == {"x": "y" * 15 * MB}


def large_run(api: Client) -> str:
    """One whose reply is more than the kernel takes at once."""
    return str(api.run(input_values={"x": "y" * 15 * MB})["id"])


class TestPipelining:
    def test_requests_are_answered_in_their_order(self, server: Server) -> None:
        paths = ["/health/live", "/nothing", "/v1/runs", "/health/live"] * 50
        sent = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths)
        sent += b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n"
        with connect(server) as connection:
            connection.sendall(sent)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        expected = {"/health/live": b"200", "/nothing": b"404", "/v1/runs": b"401"}
        assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [*(expected[path] for path in paths), b"200"]

    def test_whatever_the_pieces_are_that_they_come_in(self, api: Client, server: Server) -> None:
        body = b'{"input_values":{"x":"\\r\\n\\r\\n"}}'
        key = api.headers["authorization"]
        post = f"POST /v1/runs/{uuid4()}/retry HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], b"", body[5:]) if part)
        sent = (
            f"{post}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
            + f"{post}Transfer-Encoding: chunked\r\n\r\n".encode()
            + chunked
            + b"0\r\nX: y\r\n\r\n"
            + f"{post}Connection: close\r\n\r\n".encode()
        )
        for size in (1, 2, 3, 7, 50, 200, len(sent)):
            with connect(server) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(0, len(sent), size):
                    connection.sendall(sent[start : start + size])
                received = b"".join(iter(lambda: connection.recv(65536), b""))
            assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [b"404"] * 3

    def test_an_upgrade_that_we_do_not_know_keeps_the_body(self, api: Client) -> None:
        """As Java's client asks with its first request."""
        run = api.finished()
        headers = {
            "Connection": "Upgrade, HTTP2-Settings",
            "Upgrade": "h2c",
            "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABk",
        }
        reply = api.post(f"/v1/runs/{run['id']}/retry", json={"input_values": {"a": 1}}, headers=headers)
        assert api.json_of(reply)["input_values"] == {"a": 1}


@pytest.fixture(scope="module")
def hasty(stack: Stack) -> Iterator[Server]:
    """A server that waits for no body."""
    started = start_server(stack, BODY_TIMEOUT_SECONDS=1)
    yield started
    started.app.stop()


class TestSlowBodies:
    def test_a_fast_start_buys_no_time(self, hasty: Server) -> None:
        """5 MB at once, then nothing: at the least pace they would have bought 150 s."""
        with hasty.client() as api, connect(hasty) as connection:
            connection.sendall(post(api, f"/v1/runs/{uuid4()}/retry", 10 * MB) + b" " * 5 * MB)
            began = time.monotonic()
            status, _, body = reply_of(connection)
            assert (status, json.loads(body)["code"]) == (408, "request_timeout")
            assert time.monotonic() - began < 15

    def test_who_keeps_the_pace_may_take_longer(self, hasty: Server) -> None:
        with hasty.client() as api, connect(hasty) as connection:
            connection.sendall(post(api, f"/v1/runs/{uuid4()}/retry", 2 * MB))
            connection.sendall(b"{}")
            for _ in range(10):
                connection.sendall(b" " * 199_999)
                time.sleep(0.25)
            connection.sendall(b" " * 8)
            assert reply_of(connection)[0] == 404


class TestRevokedMeanwhile:
    """A key that is revoked while its request is on its way."""

    def revoke(self, stack: Stack, api: Client) -> None:
        stack.sql("UPDATE api_keys SET revoked_at = now() WHERE organization_id = $1", api.organization)

    def test_while_its_body_comes(self, server: Server, stack: Stack) -> None:
        with server.client() as api, connect(server) as connection:
            run = api.finished()
            connection.sendall(post(api, f"/v1/runs/{run['id']}/retry", 2) + b"{")
            time.sleep(1.5)  # longer than a key is trusted
            self.revoke(stack, api)
            connection.sendall(b"}")
            assert reply_of(connection)[0] == 401
            [row] = stack.sql("SELECT attempt FROM runs WHERE id = $1", UUID(run["id"]))
            assert row["attempt"] == 1

    def test_while_it_waits(self, server: Server, stack: Stack) -> None:
        with server.client() as api, connect(server) as connection:
            connection.sendall(get(api, "/v1/runs?status=scheduling&wait=3"))
            time.sleep(0.5)  # it waits
            self.revoke(stack, api)
            assert reply_of(connection)[0] == 401
