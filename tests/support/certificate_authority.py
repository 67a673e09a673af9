"""An authority for certificates, in OpenBao, and a proxy that speaks TLS for a server that does not."""

import selectors
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tests.support.stack import Stack


class Authority:
    """`ca` is the file with its certificate."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self._bao, self._folder, self.ca = stack.bao, folder, folder / "ca.pem"
        root = self._bao.call("POST", "pki/root/generate/internal", {"common_name": "tests", "ttl": "24h"})[1]["data"]
        self._bao.call("POST", "pki/roles/any", {"allow_any_name": True, "ttl": "12h"})
        self.ca.write_text(root["certificate"])

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for this name, for servers and clients, and its key."""
        issued = self._bao.call("POST", "pki/issue/any", {"common_name": name})[1]["data"]
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certificate.write_text(issued["certificate"])
        key.write_text(issued["private_key"])
        return certificate, key

    def server(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(name))
        return context


@contextmanager
def authority(stack: Stack, folder: Path) -> Iterator[Authority]:
    assert stack.bao.call("POST", "sys/mounts/pki", {"type": "pki"})[0] < 300
    try:
        yield Authority(stack, folder)
    finally:
        stack.bao.call("DELETE", "sys/mounts/pki")


@contextmanager
def tls_in_front_of(address: tuple[str, int], context: ssl.SSLContext) -> Iterator[int]:
    """The port of a proxy that takes TLS off."""
    listening = socket.create_server(("127.0.0.1", 0))

    def carry(client: socket.socket) -> None:
        # The other side may go at any moment, and a handshake may be refused: that is the test.
        with (
            suppress(OSError),
            closing(client),
            context.wrap_socket(client, server_side=True) as inside,
            socket.create_connection(address) as outside,
            selectors.DefaultSelector() as ready,
        ):
            ready.register(inside, selectors.EVENT_READ, outside)
            ready.register(outside, selectors.EVENT_READ, inside)
            while True:
                for key, _ in ready.select():
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(65536)
                    while isinstance(key.fileobj, ssl.SSLSocket) and (more := key.fileobj.pending()):
                        data += key.fileobj.recv(more)
                    if not data:
                        return
                    key.data.sendall(data)

    def accept() -> None:
        with suppress(OSError):  # closed: the end
            while True:
                threading.Thread(target=carry, args=[listening.accept()[0]], daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        accepting.join()
