"""A TCP proxy that fails on purpose: each connection takes the next fault of a list, later ones pass unharmed."""

import contextlib
import re
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

PATIENCE = 30.0  # seconds until a test that hangs fails instead


class Proxy:
    """Stands between a client and the app at `upstream`.

    drop_reply   the request is served and its reply thrown away
    delay_reply  the reply is held until the client gives up
    reset        half of the request arrives, then both sides are reset
    abandon      the whole request arrives, the client is reset at once, the app goes on alone
    stall        half of the request arrives and no more; whatever the app then says passes
    """

    def __init__(self, upstream: str, *faults: str) -> None:
        target = urlsplit(upstream)
        self._upstream = (str(target.hostname), int(target.port or 80))
        self._faults: list[Callable[[socket.socket, socket.socket], None]] = [getattr(self, f"_{f}") for f in faults]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            fault = self._faults.pop(0) if self._faults else self._pass
            threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Callable[[socket.socket, socket.socket], None]) -> None:
        with client, socket.create_connection(self._upstream, timeout=PATIENCE) as app, contextlib.suppress(OSError):
            client.settimeout(PATIENCE)
            fault(client, app)

    def _pass(self, client: socket.socket, app: socket.socket) -> None:
        other = {client: app, app: client}
        while True:
            for ready in select.select([client, app], [], [], PATIENCE)[0]:
                data = ready.recv(65536)
                if not data:
                    return
                other[ready].sendall(data)

    def _drop_reply(self, client: socket.socket, app: socket.socket) -> None:
        app.sendall(_request(client))
        assert app.recv(1)  # sent after the commit
        _reset(client)

    def _delay_reply(self, client: socket.socket, app: socket.socket) -> None:
        app.sendall(_request(client))
        assert app.recv(65536)
        client.recv(1)  # returns when the client closes

    def _reset(self, client: socket.socket, app: socket.socket) -> None:
        request = _request(client)
        app.sendall(request[: _half(request)])
        _reset(app)
        _reset(client)

    def _abandon(self, client: socket.socket, app: socket.socket) -> None:
        app.sendall(_request(client))
        _reset(client)
        app.recv(65536)

    def _stall(self, client: socket.socket, app: socket.socket) -> None:
        request = _request(client)
        app.sendall(request[: _half(request)])
        while data := app.recv(65536):
            client.sendall(data)


def _request(client: socket.socket) -> bytes:
    """One whole request."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(client)
    head = data[: data.index(b"\r\n\r\n")]
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    wanted = len(head) + 4 + int(length[1] if length else 0)
    while len(data) < wanted:
        data += _some(client)
    return data


def _some(client: socket.socket) -> bytes:
    data = client.recv(65536)
    if not data:
        raise ConnectionError
    return data


def _half(request: bytes) -> int:
    """All headers and half of the body."""
    head = request.index(b"\r\n\r\n") + 4
    return head + (len(request) - head) // 2


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN, as a crash or a middlebox does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
