"""No request hurts others: attacks on memory, on the event loop and on connections, while all three are watched.

Each attack is scaled to a few seconds, and to many times what the limit lets through: without the limit the test fails.
"""

import base64
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import psutil
import pytest

from tests.support.client import Client, file_input
from tests.support.scene import attempts
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import until

T = TypeVar("T")

MB = 1_000_000

# What nobody may do without a key, and with one. A busy machine is granted some time, never memory.
RSS_WITHOUT_KEY = 150 * MB
RSS_WITH_KEY = 800 * MB
BUSY = 6 if "PYTEST_XDIST_WORKER" in os.environ else 1  # other tests, each with servers of its own, share the cores
PAUSE_WITHOUT_KEY = 0.5 * BUSY
PAUSE_WITH_KEY = 1.0 * BUSY


@dataclass
class Seen:
    """What was seen of a server while it was watched."""

    rss: int = 0
    slowest: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def within(self, *, rss: int, pause: float) -> None:
        mean = sum(self.pauses) / max(len(self.pauses), 1)
        print(f"RSS {self.rss / MB:.0f} MB; health {self.slowest:.3f} s at worst, {mean:.3f} s as a rule")  # noqa: T201 - for the record
        assert self.rss < rss
        assert len(self.pauses) > 3
        assert self.slowest < pause


def process_of(server: Server) -> psutil.Process:
    """The one that serves: what started it may still stand above it."""
    processes = [psutil.Process(server.app.pid), *psutil.Process(server.app.pid).children(recursive=True)]
    return max(processes, key=lambda process: process.memory_info().rss)


@contextmanager
def watched(server: Server) -> Iterator[Seen]:
    """Memory, and how long a probe of its own connection waits for an answer, every few milliseconds."""
    seen, stop, process = Seen(), threading.Event(), process_of(server)

    def memory() -> None:
        while not stop.wait(0.01):
            seen.rss = max(seen.rss, process.memory_info().rss)

    def probe() -> None:
        while not stop.wait(0.02):
            began = time.monotonic()
            try:
                with connect(server) as connection:
                    connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                    answered = connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            except OSError:
                answered = False
            seen.pauses.append(time.monotonic() - began if answered else 60.0)
            seen.slowest = max(seen.pauses)

    threads = [threading.Thread(target=memory), threading.Thread(target=probe)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # the attack runs in this process too, and must not hold up the probe
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()


def connect(server: Server, **options: int) -> socket.socket:
    """A connection; `rcvbuf` makes the window that we offer small, `mss` what the server's kernel takes at once."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if "rcvbuf" in options:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["rcvbuf"])
    if "mss" in options:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, options["mss"])
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


def pour(connections: list[socket.socket], piece: bytes, *, seconds: float, at_most: int) -> int:
    """Send `piece` on all of them again and again, without reading, as fast as the server takes it; returns the bytes sent.

    The kernel takes some megabytes more for each connection than the server does.
    """
    sent, end = 0, time.monotonic() + seconds
    rest = dict.fromkeys(connections, b"")
    for connection in connections:
        connection.setblocking(False)
    while time.monotonic() < end:
        moved = False
        if sent >= at_most:
            rest.clear()
        for connection in list(rest):
            rest[connection] = rest[connection] or piece
            try:
                count = connection.send(rest[connection])
            except BlockingIOError:
                continue
            except OSError:
                del rest[connection]  # the server has closed it
                continue
            rest[connection] = rest[connection][count:]
            sent, moved = sent + count, True
        if not moved:
            time.sleep(0.01)
    return sent


@pytest.fixture
def fresh(stack: Stack) -> Iterator[Server]:
    """A server that nobody has used yet, so that its memory is its own."""
    started = start_server(stack, LOG_LEVEL="warning")
    yield started
    started.app.stop()


class TestWithoutKey:
    def test_pipelined_requests_wait_unread(self, fresh: Server) -> None:
        piece = b"GET /v1/runs HTTP/1.1\r\nHost: x\r\n\r\n" * 2000
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh)) for _ in range(60)]
            pour(connections, piece, seconds=4, at_most=60 * MB)
        seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_trailers_are_dropped(self, fresh: Server) -> None:
        head = b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh)) for _ in range(4)]
            for connection in connections:
                connection.sendall(head)
            sent = pour(connections, b"X-Trailer: of some length\r\n" * 5000, seconds=4, at_most=80 * MB)
        assert sent < 40 * MB, "the connections closed"
        seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

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
        seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

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
        seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

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
        seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)

    def test_replies_that_nobody_takes_are_few(self, fresh: Server) -> None:
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
        with ExitStack() as stack, watched(fresh) as seen:
            connections = [stack.enter_context(connect(fresh, rcvbuf=4096)) for _ in range(100)]
            pour(connections, request, seconds=4, at_most=20 * MB)
        seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)


def readable(connection: socket.socket) -> bool:
    """Whether something has come, or the end."""
    return bool(select.select([connection], [], [], 0)[0])


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed it, and sent nothing before."""
    try:
        return readable(connection) and connection.recv(1) == b""
    except ConnectionResetError:
        return True


ALIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def reply_of(connection: socket.socket) -> tuple[int, bytes, bytes]:
    """Status, head and body of the next reply; (0, b"", b"") if there is none."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (piece := connection.recv(65536)):
            return 0, b"", b""
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    [length] = re.findall(rb"(?i)\r\ncontent-length: (\d+)", head)
    while len(body) < int(length):
        body += connection.recv(65536)
    return int(head.split()[1]), head, body


def answers(connection: socket.socket) -> bool:
    connection.sendall(ALIVE)
    return reply_of(connection)[0] == 200


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
            seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)
        finally:
            server.app.stop()

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
            seen.within(rss=RSS_WITHOUT_KEY, pause=PAUSE_WITHOUT_KEY)
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


def get(api: Client, path: str, connection: str = "keep-alive") -> bytes:
    key = api.headers["authorization"]
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nConnection: {connection}\r\n\r\n".encode()


def connected(server: Server, port: int | None) -> int:
    """How many connections the server has to this port, whoever opened them."""
    return sum(bool(one.raddr) and one.raddr.port == port for one in process_of(server).net_connections("tcp"))


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


def post(api: Client, path: str, length: int | None, *, content_type: str = "application/json") -> bytes:
    """The head of a request with a body."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {api.headers['authorization']}\r\n"
        f"Content-Type: {content_type}\r\n{size}\r\n\r\n"
    ).encode()


def send_while_taken(connection: socket.socket, head: bytes, piece: bytes, most: int) -> None:
    """So many bytes, or until none is taken any more."""
    connection.settimeout(3)
    with suppress(OSError):
        connection.sendall(head)
        for _ in range(most // len(piece)):
            connection.sendall(piece)


def at_once(count: int, attack: Callable[[int], T]) -> list[T]:
    """What so many threads got, mostly statuses."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(attack, range(count)))


def send_whole(server: Server, head: bytes, body: bytes) -> int:
    """The status; 0 for a connection that was closed."""
    with connect(server) as connection:
        connection.settimeout(60)
        with suppress(ConnectionError):
            connection.sendall(head)
            connection.sendall(body)
        try:
            return reply_of(connection)[0]
        except ConnectionError:
            return 0


class Fresh:
    """Clients of a server that only one test uses."""

    @pytest.fixture
    def api(self, fresh: Server) -> Iterator[Client]:
        with fresh.client() as client:
            yield client

    @pytest.fixture
    def innocent(self, fresh: Server) -> Iterator[Client]:
        with fresh.client() as client:
            yield client


class TestBodies(Fresh):
    """With a key."""

    def test_too_many_values_are_refused_before_they_are_parsed(self, fresh: Server, api: Client) -> None:
        body = b'{"input_values":{"a":[' + b"[]," * 13 * MB + b"1]}}"
        head = post(api, f"/v1/runs/{uuid4()}/retry", len(body))
        with watched(fresh) as seen:
            assert set(at_once(2, lambda _: send_whole(fresh, head, body))) <= {422, 503}
        seen.within(rss=RSS_WITH_KEY, pause=PAUSE_WITH_KEY)

    def test_commas_in_texts_are_no_values(self, api: Client) -> None:
        text = ',[{\\"' * 100_000
        assert api.get_run(api.run(input_values={"x": text})["id"])["input_values"] == {"x": text}

    def test_what_takes_neither_files_nor_a_history_is_small(self, fresh: Server, api: Client) -> None:
        for path, status in (("/v1/workflows", 413), ("/v1/pools", 413), (f"/v1/runs/{uuid4()}/retry", 404)):
            body = json.dumps({"x": "y" * 3 * MB}).encode()
            assert send_whole(fresh, post(api, path, len(body)), body) == status

    def test_what_can_never_fit_is_not_to_be_sent_again(self, stack: Stack) -> None:
        """Neither its texts nor its values are too much for themselves."""
        server = start_server(stack, MAX_IN_FLIGHT_BYTES=10 * MB)
        try:
            with server.client() as api:
                body = json.dumps({"input_values": {"a": "x" * 3_800_000, "b": [0] * 20_000}}).encode()
                reply = api.patch(f"/v1/runs/{uuid4()}", content=body, headers={"Content-Type": "application/json"})
                assert reply.status_code == 413, reply.text
        finally:
            server.app.stop()

    def test_bodies_without_a_length_share_half_of_the_budget(
        self, fresh: Server, api: Client, innocent: Client
    ) -> None:
        """Two that grow on and on, and keep the pace."""
        head = post(api, "/v1/runs", None)
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        shown = innocent.run(input_values={"x": "x" * 100_000})["id"]
        with ExitStack() as stack:
            senders = [stack.enter_context(connect(fresh)) for _ in range(2)]
            at_once(2, lambda number: send_while_taken(senders[number], head, piece, 72 * MB))
            assert innocent.get_run(shown)["input_values"]

    def test_wide_characters_count_for_what_they_take(self, fresh: Server, api: Client) -> None:
        """One of them makes a text take four times as much."""
        values = {"a": "x" * 40 * MB + "\N{GRINNING FACE}"}
        body = json.dumps({"workflow_id": api.workflow(), "input_values": values}, ensure_ascii=False).encode()
        head = post(api, "/v1/runs", len(body))
        with watched(fresh) as seen:
            assert set(at_once(4, lambda _: send_whole(fresh, head, body))) <= {201, 503}
        seen.within(rss=RSS_WITH_KEY, pause=PAUSE_WITH_KEY)

    def test_large_ones_take_turns(self, fresh: Server, api: Client, innocent: Client) -> None:
        """16 at once of 89 MB each, as files."""
        content = base64.b64encode(bytes(45 * MB)).decode()
        files = [{"filename": "a", "content": content}, {"filename": "b", "content": content[: 29 * MB // 4 * 4]}]
        body = json.dumps({"file_inputs": files}).encode()
        run, head = innocent.finished(), post(api, f"/v1/runs/{uuid4()}/retry", len(body))
        with watched(fresh) as seen, ThreadPoolExecutor(1) as threads:
            attack = threads.submit(at_once, 16, lambda _: send_whole(fresh, head, body))
            slowest = 0.0
            while not attack.done():
                began = time.monotonic()
                innocent.json_of(innocent.retry(run["id"]))
                innocent.report(run["id"], status="cancelled")
                slowest = max(slowest, time.monotonic() - began)
            statuses = attack.result()
        assert set(statuses) == {404, 503}
        assert slowest < 10
        seen.within(rss=RSS_WITH_KEY, pause=PAUSE_WITH_KEY)


class TestReplies(Fresh):
    """With a key: what a reply takes has room before it is read."""

    @staticmethod
    def a_page(api: Client, stack: Stack) -> str:
        runs = [api.run()["id"] for _ in range(10)]
        stack.sql("UPDATE runs SET main_prompt = repeat('x', $2) WHERE id = ANY($1::uuid[])", runs, 3 * MB)
        return "/v1/runs?limit=10"

    @staticmethod
    def a_run(api: Client, stack: Stack) -> str:
        run_id = api.run()["id"]
        stack.sql("UPDATE runs SET main_prompt = repeat('x', $2) WHERE id = $1", run_id, 30 * MB)
        return f"/v1/runs/{run_id}"

    @staticmethod
    def an_error(api: Client, stack: Stack) -> str:
        run_id = api.finished("error")["id"]
        lines = "ARRAY(SELECT repeat('x', 100000) FROM generate_series(1, 300))"
        stack.sql(f"UPDATE runs SET error = {lines} WHERE id = $1", run_id)
        return f"/v1/runs/{run_id}"

    @staticmethod
    def a_pool(api: Client, stack: Stack) -> str:
        machines = [api.machine() for _ in range(10)]
        stack.sql("UPDATE machines SET name = repeat('x', $2) WHERE id = ANY($1::uuid[])", machines, 3 * MB)
        return f"/v1/pools/{api.pool(*machines)}?include_machines=true"

    @pytest.mark.parametrize("scene", ["a_page", "a_run", "an_error", "a_pool"])
    def test_large_ones_take_turns(self, fresh: Server, api: Client, innocent: Client, scene: str) -> None:
        """24 at once of 30 MB each."""
        path = getattr(self, scene)(api, fresh.stack)
        head = get(api, path, "close")
        lengths = []

        def ask(_: int) -> int:
            with connect(fresh) as connection:
                connection.settimeout(60)
                connection.sendall(head)
                status, length = 0, 0
                while piece := connection.recv(2**20):
                    status = status or int(piece.split(b" ", 2)[1])
                    length += len(piece)
            lengths.append(length)
            return status

        run = innocent.finished()
        with watched(fresh) as seen, ThreadPoolExecutor(1) as threads:
            attack = threads.submit(at_once, 24, ask)
            slowest = 0.0
            while not attack.done():
                began = time.monotonic()
                innocent.json_of(innocent.retry(run["id"]))
                innocent.report(run["id"], status="cancelled")
                slowest = max(slowest, time.monotonic() - began)
            statuses = attack.result()
        assert 200 in statuses
        assert set(statuses) <= {200, 503}
        assert max(lengths) > 30 * MB
        assert slowest < 10
        seen.within(rss=500 * MB, pause=PAUSE_WITH_KEY)  # without turns 750

    def test_retries_that_show_long_inputs_take_turns(self, fresh: Server, api: Client) -> None:
        runs = [api.finished()["id"] for _ in range(24)]
        inputs = "json_build_object('x', repeat('x', $2::int))"
        fresh.stack.sql(f"UPDATE runs SET input_values = {inputs} WHERE id = ANY($1::uuid[])", runs, 30 * MB)

        def retry(number: int) -> tuple[int, int]:
            reply = api.retry(runs[number])
            return reply.status_code, attempts(api, runs[number])

        with watched(fresh) as seen:
            done = set(at_once(24, retry))
        assert (200, 1) in done
        assert done <= {(200, 1), (503, 0)}
        seen.within(rss=RSS_WITH_KEY, pause=PAUSE_WITH_KEY)

    def test_what_nobody_takes_is_half_of_the_budget(self, fresh: Server, api: Client, innocent: Client) -> None:
        """200 readers of 4.7 MB each that do not read; and the change that a refused reply was for has happened."""
        workflow, wide = api.workflow(), "\x01" * 256 * 1024
        for name in ("main_prompt", "input_schema", "output_schema"):
            api.json_of(api.patch(f"/v1/workflows/{workflow}", json={name: wide}))
        machine = api.machine()
        pool = {"name": "p", "description": "\x01" * 10_000}
        pools = [api.json_of(api.post("/v1/pools", json=pool), 201)["id"] for _ in range(100)]
        api.json_of(api.put(f"/v1/machines/{machine}/pools", json={"pool_ids": pools}))
        head = get(api, f"/v1/workflows/{workflow}")
        shown = innocent.run(input_values={"x": "x" * 100_000})["id"]
        with ExitStack() as stack, watched(fresh) as seen:
            readers = [stack.enter_context(connect(fresh, rcvbuf=4096)) for _ in range(200)]
            for reader in readers:
                reader.sendall(head)
            until(lambda: all(map(readable, readers)), seconds=60)
            assert innocent.get_run(shown)["input_values"]
            refused = api.patch(f"/v1/workflows/{workflow}", json={"name": "new"})
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "nothing was changed" in refused.json()["detail"]
            # Its reply is long because of its pools.
            refused = api.patch(f"/v1/machines/{machine}", json={"name": "new"})
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "The change has taken effect" in refused.json()["detail"]
            until(lambda: len(seen.pauses) > 3)
        seen.within(rss=500 * MB, pause=PAUSE_WITH_KEY)
        until(lambda: api.get(f"/v1/machines/{machine}").json().get("name") == "new")
        assert api.json_of(api.get(f"/v1/workflows/{workflow}"))["name"] != "new"


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
