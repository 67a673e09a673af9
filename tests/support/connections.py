"""Connections by hand: requests in pieces, replies that are not read, and many at once."""

import re
import select
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from tests.support.client import Client
from tests.support.server import Server

T = TypeVar("T")

ALIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


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

    The kernel takes some megabytes more for each connection than the server does. It ends when the server has taken nothing for
    a second.
    """
    sent, began = 0, time.monotonic()
    last = began
    rest = dict.fromkeys(connections, b"")
    for connection in connections:
        connection.setblocking(False)
    while (now := time.monotonic()) < min(began + seconds, last + 1):
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
        if moved:
            last = now
        else:
            time.sleep(0.01)
    return sent


def readable(connection: socket.socket) -> bool:
    """Whether something has come, or the end."""
    return bool(select.select([connection], [], [], 0)[0])


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed it, and sent nothing before."""
    try:
        return readable(connection) and connection.recv(1) == b""
    except ConnectionResetError:
        return True


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


def get(api: Client, path: str, connection: str = "keep-alive") -> bytes:
    key = api.headers["authorization"]
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nConnection: {connection}\r\n\r\n".encode()


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
