"""HTTP by hand, for requests that no client would send."""

import socket


def raw_exchange(url: str, request: bytes, *, seconds: float = 10) -> bytes:
    """Send bytes, read what comes until the reply is whole or the connection closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received or not _whole(received):
            chunk = connection.recv(65536)
            if not chunk:
                break
            received += chunk
        return received


def _whole(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return False
