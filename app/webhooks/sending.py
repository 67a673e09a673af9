"""Send one webhook. Beside the store of secrets this is the only file that imports urllib3.

The host is resolved once, each address is checked, and the connection goes to a checked address. So a name that resolves
differently a moment later changes nothing. Redirects are not followed. A thread that waits for a receiver cannot be
interrupted; to give up, its socket is shut down.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from io import BufferedReader
from ipaddress import ip_address
from pathlib import Path

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, SSLError
from urllib3.exceptions import TimeoutError as TimeoutOfUrllib3

from app.webhooks.addresses import Address, Allowed, NotAllowed, Url

SEND_SECONDS = 15.0  # from the first look at the name to the last byte of the answer that we read
CONNECT_SECONDS = 5.0  # for one address; there may be another
MAX_ADDRESSES = 4
MAX_ANSWER = 1024  # bytes of the receiver's answer that are kept
MAX_HEAD = 64 * 1024  # bytes before them: status line and headers, with those of interim answers
MAX_BODY = 16 * 1024  # bytes that these take on the way: with sizes and extensions of chunks
SWITCHING_PROTOCOLS = 101

_FAILURES = (HTTPError, HTTPException, OSError, ValueError)

TOO_LATE = "too_late"  # nothing was connected to

Resolve = Callable[[str, int], Sequence[str]]


class Failed(Exception):
    """Nothing was answered; `code` says why in one of a few constant words."""

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(code)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the receiver said."""

    status: int
    body: bytes
    retry_after: str | None


def resolve(host: str, port: int) -> list[str]:
    """The host's addresses, in the order in which the system would use them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def trust(cacert: Path | None) -> ssl.SSLContext:
    """The authorities that certificates of receivers are checked with: the system's, or those of this file."""
    return ssl.create_default_context(cafile=None if cacert is None else str(cacert))


class _Budget:
    """The bytes of an answer as http.client reads them, within limits of bytes and of time.

    Raises HTTPException beyond `left` bytes, TimeoutError beyond SEND_SECONDS. Framing counts: sizes of chunks, their
    extensions, and interim answers. A receiver that sends as fast as it can would otherwise keep a thread busy all the time.
    """

    def __init__(self, answer: BufferedReader) -> None:
        self._answer = answer
        self._deadline = time.monotonic() + SEND_SECONDS
        self.left = MAX_HEAD

    def readline(self, most: int) -> bytes:
        return self._counted(self._answer.readline(min(most, self.left + 1)))

    def read(self, most: int = -1) -> bytes:
        """As many bytes, less only at the end of the answer."""
        wanted = self.left + 1 if most < 0 else min(most, self.left + 1)
        pieces = b""
        while wanted > len(pieces) and (piece := self._counted(self._answer.read1(wanted - len(pieces)))):
            pieces += piece
        return pieces

    def _counted(self, piece: bytes) -> bytes:
        self.left -= len(piece)
        if self.left < 0:
            raise HTTPException
        if time.monotonic() > self._deadline:
            raise TimeoutError
        return piece

    def flush(self) -> None:
        """Asked for by a response that is closed."""

    def close(self) -> None:
        self._answer.close()


class _Response(HTTPResponse):
    """http.client by itself would read 100 lines of 64 KiB each for a head, as much for each chunk, and trailers for ever."""

    def begin(self) -> None:
        budget = _Budget(self.fp)
        self.fp = budget  # type: ignore[assignment] # it has all that is used of a file
        super().begin()
        while 100 <= self.status < 200 and self.status != SWITCHING_PROTOCOLS and self.fp is not None:
            self.headers = self.msg = None  # type: ignore[assignment] # not read yet: this was an interim answer
            super().begin()
        budget.left += MAX_BODY

    def _read_and_discard_trailer(self) -> None:
        """The answer is complete, and its connection is not used again."""


def _connect_by(connection: HTTPConnection, new_socket: Callable[[], socket.socket]) -> None:
    """Let the connection use this socket: urllib3 connects to names, not to a checked address (tests/test_private_parts.py)."""
    connection._new_conn = new_socket  # type: ignore[method-assign]


class Post:
    """One POST, run in a thread by `send` and given up from another by `abort`."""

    def __init__(self, allowed: Allowed, context: Callable[[], ssl.SSLContext], resolve: Resolve = resolve) -> None:
        """`context` is asked for in the thread that sends, and only for https: to read all authorities takes 30 ms."""
        self._allowed = allowed
        self._context = context
        self._resolve = resolve
        self._lock = threading.Lock()
        self._aborted = False
        self._socket: socket.socket | None = None

    def abort(self) -> None:
        """Whatever `send` waits for, it ends now. Any thread may call this, at any time."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, url: str, headers: Mapping[str, str], body: bytes, *, connect_by: float) -> Answer:
        """POST the body and read the beginning of the answer; nothing is connected to after `connect_by` (time.monotonic()).

        Raises Failed.
        """
        try:
            where = self._allowed.check(url)
            connection = self._connect(where, connect_by)
        except NotAllowed:
            raise Failed("address_not_allowed") from None
        try:
            with suppress(BrokenPipeError):  # it did not want all of the body, and may have said why
                connection.request("POST", where.target, body, headers, preload_content=False, decode_content=False)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER, decode_content=False)
        except _FAILURES as error:
            raise Failed(self._reason(error, "no_answer")) from None
        else:
            if self._aborted:  # the answer was broken off
                raise Failed("timeout")
            return Answer(response.status, answer, response.headers.get("Retry-After"))
        finally:
            connection.close()
            self._forget()

    def _connect(self, url: Url, connect_by: float) -> HTTPConnection:
        """A connection to the first checked address that accepts one."""
        try:
            addresses = [str(url.literal)] if url.literal is not None else self._resolve(url.host, url.port)
        except (OSError, UnicodeError):
            addresses = []
        checked = [address for address in map(ip_address, addresses) if self._allowed.permits(url, address)]
        if not checked:
            # Said of a name that resolves to nothing too: the difference would tell what names our own network has.
            raise NotAllowed
        failure = Failed("connection_failed")
        for address in checked[:MAX_ADDRESSES]:
            if time.monotonic() > connect_by:
                raise Failed(TOO_LATE)
            try:
                return self._open(url, address)
            except _FAILURES as error:
                failure = Failed(self._reason(error, "connection_failed"))
        raise failure

    def _open(self, url: Url, address: Address) -> HTTPConnection:
        kind = partial(HTTPSConnection, ssl_context=self._context()) if url.secure else HTTPConnection
        connection = kind(url.host, url.port, timeout=SEND_SECONDS)
        connection.response_class = _Response

        def new_socket() -> socket.socket:
            made = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
            try:
                made.settimeout(CONNECT_SECONDS)
                self._keep(made)
                made.connect((str(address), url.port))  # an address and no name: nothing is resolved again
                made.settimeout(SEND_SECONDS)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException:
                made.close()
                raise
            return made

        _connect_by(connection, new_socket)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            self._forget()
            raise
        return connection

    def _keep(self, made: socket.socket) -> None:
        with self._lock:
            if self._aborted:
                raise TimeoutError
            self._socket = made.dup()  # TLS takes the other one over; both are ends of one connection

    def _forget(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _reason(self, error: Exception, otherwise: str) -> str:
        if self._aborted or isinstance(error, TimeoutError | TimeoutOfUrllib3):
            return "timeout"
        return "tls_failed" if isinstance(error, ssl.SSLError | SSLError) else otherwise
