"""An address that can be moved from one server to another, as a balancer's or a failover's."""

import socket
import threading
from contextlib import suppress
from typing import Self


class MovableAddress:
    """A port of 127.0.0.1 that leads to a server. Connections that were made stay with their server when it is moved."""

    def __init__(self, port: int) -> None:
        """`port` is the first server's, on 127.0.0.1."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._server = port
        self.accepted = 0  # connections
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def url(self, url: str) -> str:
        """The same database and role, by this address."""
        before, _, after = url.rpartition("@")
        return f"{before}@127.0.0.1:{self.port}/{after.partition('/')[2]}"

    def move_to(self, port: int) -> None:
        """New connections lead there."""
        self._server = port

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                client, _ = self._listening.accept()
                self.accepted += 1
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._server)) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
