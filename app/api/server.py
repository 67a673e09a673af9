"""HTTP/1.1 by uvicorn and httptools, with limits that neither has: on heads, on bytes read ahead, on slow readers and on
connections.

Until a request is authenticated, its connection may hold one request head and at most STRANGER_BYTES of what follows it. This
module knows bytes and connections; what a request means is the edge's business.

`Protocol` extends uvicorn's protocol and uses its private parts: `cycle` (the request that is being answered), `flow` and
`headers`. tests/test_private_parts.py fails if uvicorn changes them: then read this file again beside uvicorn's.

One file: all methods work on the state of one connection.
"""

import asyncio
import fcntl
import logging
import re
import resource
import sys
import termios
from contextlib import suppress
from typing import Any
from uuid import uuid4

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.errors import HeadTooLarge, HeadTooSlow, IncompleteRequest, Overloaded, Refusal, UriTooLong
from app.telemetry import metrics

log = logging.getLogger("app.request")

MAX_HEAD_BYTES = 65536  # also of the trailers of a body
MAX_HEAD_LINES = 100  # a header is a line
MAX_TARGET_BYTES = 8192  # path and query, and scheme and host if the URL is absolute
HEAD_SECONDS = 10.0  # from the first byte to the last, and from the connection to its first
# A connection that is closed with unread data loses the reply on its way. So for this long, further bytes are thrown away.
LINGER_SECONDS = 1.0

# The size of one read. It is small until the request is authenticated: thousands of connections may cause a small piece of work
# each, and no more. A chunk can be one byte, and costs as much as a large one.
STRANGER_BYTES = 4096
CHUNKED_BYTES = 16384
UNWANTED_BYTES = 1024  # in chunks, from a stranger
LARGEST_BYTES = 262144

# A head of ordinary length always has room; longer ones of all connections share this.
ORDINARY_HEAD_BYTES = 8192
LONG_HEADS_BYTES = 8 * 1024 * 1024

# Connections that the kernel has accepted for us: all of them may come in at once, before the oldest are closed.
BACKLOG = 512
TURNED_AWAY = 64  # connections at once that are told that there is no room

WRITE_BYTES = 65536  # unsent bytes at which the application waits, too

_END_OF_HEAD = b"\n\r\n"  # no request ends its head otherwise, nor a chunked body its trailers
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)


class Connections:
    """The connections of one process: at most `limit`. For a new connection the oldest idle one makes room; if none is
    idle, the oldest connection without a valid key."""

    def __init__(self, limit: int, send_seconds: float) -> None:
        self._limit = limit
        self.send_seconds = send_seconds  # timeout for a client that reads nothing; without a key: not everything
        self._idle: dict[Protocol, None] = {}  # in the order in which they began to rest
        self._busy: dict[Protocol, None] = {}
        self._turned_away: set[Protocol] = set()
        self.long_heads_left = LONG_HEADS_BYTES
        # The buffer of all reads: each connection takes its bytes out before the next connection reads.
        self.buffer = memoryview(bytearray(LARGEST_BYTES))
        self.parts = {
            size: self.buffer[:size] for size in (UNWANTED_BYTES, STRANGER_BYTES, CHUNKED_BYTES, LARGEST_BYTES)
        }

    def add(self, connection: "Protocol") -> bool:
        """False if there is no room."""
        if len(self._idle) + len(self._busy) >= self._limit:
            oldest = next(iter(self._idle), None) or next((one for one in self._busy if one.is_stranger), None)
            if oldest is None:
                return False
            self.remove(oldest)
            oldest.transport.abort()
        self._idle[connection] = None
        return True

    def may_hear_why(self, connection: "Protocol") -> bool:
        """Whether there is room to tell this connection that there is no room."""
        if len(self._turned_away) >= TURNED_AWAY:
            return False
        self._turned_away.add(connection)
        return True

    def began(self, connection: "Protocol") -> None:
        """Note that a request has begun on this connection."""
        self._idle.pop(connection, None)
        self._busy[connection] = None

    def rests(self, connection: "Protocol") -> None:
        """Note that the request of this connection is answered."""
        self._busy.pop(connection, None)
        self._idle[connection] = None

    def remove(self, connection: "Protocol") -> None:
        self._idle.pop(connection, None)
        self._busy.pop(connection, None)
        self._turned_away.discard(connection)


def room_for_connections(wanted: int, others: int) -> int:
    """Raise the soft limit on descriptors as far as `wanted` connections and `others` need it and the hard limit allows it.

    Returns how many connections there is room for.
    """
    needed = wanted + BACKLOG + TURNED_AWAY + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        with suppress(ValueError, OSError):  # macOS has a lower limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == unlimited or soft >= needed:
        return wanted
    room = max(wanted - (needed - soft), soft // 4)
    log.warning({"event": "few_descriptors", "limit": soft, "needed": needed, "connections": room})
    return room


class _Reader(asyncio.BufferedProtocol):
    """Between the transport and a connection: reads as much as the connection wants at once, not as much as there is."""

    def __init__(self, connection: "Protocol") -> None:
        self._connection = connection

    def get_buffer(self, _: int) -> memoryview:
        return self._connection.read_into()

    def buffer_updated(self, count: int) -> None:
        self._connection.has_read(count)

    def eof_received(self) -> bool:
        return self._connection.client_ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()


class _Trailers(list[tuple[bytes, bytes]]):
    """A list that drops trailers: uvicorn appends them, and nothing reads them."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        pass


_TRAILERS = _Trailers()


class _Flow(FlowControl):
    """Flow control that does not resume reading while the connection has unparsed bytes."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """Parses one request at a time, and the next one when that is answered.

    Answers a head that is too long with 431, one that is too slow with 408, and with 503 when there is no room for it.
    """

    # State of the connection
    _silent = True
    _has_ended = False  # the client has closed its sending side; it may still read
    _deaf = False  # refused: further bytes are thrown away
    _unparsed = b""
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _unsent = 0
    _is_for_stranger = True  # the bytes that wait to be sent
    _long_head = 0  # bytes of the head beyond ORDINARY_HEAD_BYTES
    # State of the message that is being parsed
    url = b""  # the target, as uvicorn puts it together
    _outside_body = True  # before a head or in it
    _begun = False  # its first byte was parsed
    _overhead = 0  # bytes of the head; later, bytes since the last piece of the body
    _lines = 0  # lines of the head
    _body_left = 0  # bytes of the declared length
    _got_body = False  # in the piece that was parsed last

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all: Connections = app_state["connections"]

    @property
    def is_stranger(self) -> bool:
        """Whether the request that is being read or answered is not authenticated."""
        return self.cycle is None or self.cycle.response_complete or "principal" not in self.cycle.scope["state"]

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport)
        transport.set_protocol(_Reader(self))
        # The application goes on when no byte waits any more. It does not stop at the first byte that waits: uvloop would then
        # send the head of each reply by itself.
        transport.set_write_buffer_limits(high=WRITE_BYTES, low=0)
        if self._all.add(self):
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        elif self._all.may_hear_why(self):
            self._refuse(Overloaded())
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        self._unparsed = b""
        self._stop_head_timer()
        self._stop_send_timer()
        self._forget_long_head()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_sending()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_sending()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read_into(self) -> memoryview:
        """The part of the buffer for the next read: as much as this connection may take in at once."""
        if self._outside_body:
            return self._all.parts[STRANGER_BYTES]
        if self.is_stranger:
            return self._all.parts[STRANGER_BYTES if self._body_left else UNWANTED_BYTES]
        return self._all.parts[LARGEST_BYTES if self._body_left else CHUNKED_BYTES]

    def has_read(self, count: int) -> None:
        """Take `count` bytes out of the buffer."""
        if self._deaf:
            return
        if self._unparsed or count > self._body_left:
            self._unparsed += bytes(self._all.buffer[:count])
            self._parse()
        else:  # a piece of a body and nothing else: the parser makes the only copy
            self._feed(self._all.buffer[:count])
            if not self._deaf:
                self._wait_for_reader()
        if count == STRANGER_BYTES and not self.flow.read_paused and not self.transport.is_closing():
            # There are probably more bytes. The event loop would read them first; other connections come first instead.
            self.flow.pause_reading()
            self.loop.call_soon(self.flow.resume_reading)

    def _parse(self) -> None:
        """Parse the bytes that have come, up to the end of a request. Later bytes wait until the request is answered."""
        while self._unparsed and not (self._outside_body and self._is_answering()):
            piece = self._next_piece()
            if self._outside_body:
                self._lines += piece.count(b"\n")
                if self._lines > MAX_HEAD_LINES:
                    self._refuse(HeadTooLarge())
                    return
            self._feed(piece)
            if self._deaf or self.transport.is_closing():
                self._unparsed = b""
                return
        self._wait_for_reader()

    def _feed(self, piece: bytes | memoryview) -> None:
        """Give a piece to the parser, and count it."""
        self._got_body = False
        self.data_received(piece)  # type: ignore[arg-type] # the parser takes any buffer
        if not (self._outside_body and self._is_answering()):  # the request has not ended
            self._account(len(piece))

    def _wait_for_reader(self) -> None:
        """Stop reading while the application has to take bytes first."""
        if self._unparsed:
            self.flow.held = True  # until the request is answered
            self.flow.pause_reading()
        elif not self._outside_body and self.cycle.body:
            self.flow.pause_reading()  # until the application asks for more of the body

    def _next_piece(self) -> bytes:
        """The next piece for the parser: at most one head ends in it."""
        if self._body_left:
            end = self._body_left
        else:
            found = self._unparsed.find(_END_OF_HEAD)
            end = len(self._unparsed) if found < 0 else found + len(_END_OF_HEAD)
        piece, self._unparsed = self._unparsed[:end], self._unparsed[end:]
        if self._outside_body and b"pgrade" in piece:
            # We stay with HTTP/1.1, as RFC 9110 section 7.8 allows. The parser would take the body for the other protocol:
            # Java's client asks for HTTP/2 with its first request, and would lose its body.
            piece = _UPGRADE.sub(b"\r\nx-not-upgraded:", piece)
        return piece

    def _account(self, size: int) -> None:
        """Count bytes of a head or a body that is not complete, and refuse too many."""
        if self._got_body:
            self._overhead = 0
            return
        self._overhead += size
        if self._overhead > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge())
        elif self._outside_body:
            self._silent = False
            long = max(self._overhead - ORDINARY_HEAD_BYTES, 0)
            self._all.long_heads_left -= long - self._long_head
            self._long_head = long
            if long and self._all.long_heads_left < 0:
                self._refuse(Overloaded())
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _forget_long_head(self) -> None:
        self._all.long_heads_left += self._long_head
        self._long_head = 0

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._silent:
            self.transport.close()  # no byte came
        else:
            self._refuse(HeadTooSlow())

    def client_ended(self) -> bool:
        """Note that the client has closed its sending side (`shutdown(SHUT_WR)`). True: the connection stays open for replies.

        A client that is gone looks the same until bytes are sent to it. So each complete request is still answered.
        """
        self._has_ended = True
        self.flow.held = True  # there is nothing to read any more
        if self._deaf or self.transport.is_closing():
            return False
        self._finish()
        return True

    def _finish(self) -> None:
        """After the client's end: close the connection behind the last reply, and refuse an incomplete request."""
        if self._is_answering():
            state = self.cycle.scope["state"]
            state["client_has_ended"] = True
            if not self._outside_body:
                state["body_ended_early"] = True  # the edge finds it when it reads on
                self.cycle.message_event.set()
            elif not self._unparsed:
                self.cycle.keep_alive = False
        elif self._begun and self._outside_body:
            self._refuse(IncompleteRequest())
        else:
            self.transport.close()
            self._watch_sending()

    # --- events of the parser ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = True
        self._all.began(self)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            raise ValueError  # the parser gives up, and calls send_400_response

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            raise ValueError  # the header that asks for it came in two pieces; see _next_piece
        self._outside_body = False
        self._overhead = 0
        self._stop_head_timer()
        for name, value in self.headers:
            if name == b"content-length":
                self._body_left = int(value)
        super().on_headers_complete()
        self.headers = _TRAILERS

    def on_body(self, body: bytes) -> None:
        self._got_body = True
        if self._body_left:
            self._body_left -= len(body)
            if not self.cycle.body:
                # Bytes that are added to empty bytes are not copied, unlike with a bytearray.
                self.cycle.body = b""  # type: ignore[assignment]
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._outside_body = True
        self._begun = False
        self._lines = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if len(self.url) > MAX_TARGET_BYTES:
            self._refuse(UriTooLong())
            return
        super().send_400_response(msg)
        self._watch_sending()

    # --- answering ----------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._forget_long_head()
        self.flow.held = self._has_ended
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_sending()
            return
        self._parse()
        if self._has_ended and not self.transport.is_closing() and not self._deaf:
            self._finish()
        elif not self._begun and not self._is_answering():
            self._all.rests(self)

    def pause_writing(self) -> None:
        """More than WRITE_BYTES wait to be sent."""
        super().pause_writing()
        self._is_for_stranger = self.is_stranger
        self._watch_sending()

    def resume_writing(self) -> None:
        """No bytes wait to be sent any more."""
        self._stop_send_timer()
        super().resume_writing()

    def _watch_sending(self) -> None:
        """Start the timeout for bytes that wait to be sent: some of them must have gone by then.

        Without a key all of them must have gone: else many clients could keep much memory in use for as long as they like.
        """
        self._stop_send_timer()
        if self.transport.get_write_buffer_size():
            self._unsent = self._bytes_not_taken()
            self._send_timer = self.loop.call_later(self._all.send_seconds, self._send_is_late)

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _bytes_not_taken(self) -> int:
        """The bytes that the client has not read, here and in the kernel, which asks for more when most of its own are gone."""
        waiting = bytearray(4)
        with suppress(OSError):  # some kernels do not tell
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, waiting)
        return self.transport.get_write_buffer_size() + int.from_bytes(waiting, sys.byteorder)

    def _send_is_late(self) -> None:
        if not self._is_for_stranger and self._bytes_not_taken() < self._unsent:
            self._watch_sending()
            return
        log.info({"event": "send_stalled", "bytes": self._unsent})
        self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and close."""
        self._deaf = True
        self._unparsed = b""
        self.headers = []
        self.parser = None  # type: ignore[assignment] # it keeps the head in memory; uvicorn does this at the end
        self._forget_long_head()
        self._stop_head_timer()
        if self._is_answering():
            self.transport.abort()
            return
        request_id = uuid4().hex
        metrics.request("_OTHER", "", refusal.status, 0.0)
        level = logging.WARNING if refusal.status >= 500 else logging.INFO
        line = {"event": "refused_at_once", "request_id": request_id, "status": refusal.status, "code": refusal.code}
        log.log(level, line)
        body = refusal.body(request_id)
        headers: dict[str, Any] = {
            "content-type": refusal.media_type,
            "content-length": len(body),
            "connection": "close",
            "cache-control": "no-store",
            "x-request-id": request_id,
            **refusal.headers,
        }
        lines = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)
