"""HTTP/1.1 by uvicorn and httptools, with limits on the head of a request, which neither has.

Whoever connects has not said yet who they are: an endless head must not fill the memory, nor a slow one hold a connection.
"""

import asyncio
import logging
from typing import Any
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.errors import HeadTooLarge, HeadTooSlow, Refusal

log = logging.getLogger("app.request")

# Beyond the piece in which a head begins (at most 256 KiB are read at once).
MAX_HEAD_BYTES = 65536
HEAD_SECONDS = 10.0  # from the first byte to the last, and from the connection to its first
# A connection that is closed with unread data loses the reply on its way: what still comes is thrown away for so long.
LINGER_SECONDS = 1.0


class Protocol(HttpToolsProtocol):
    """Answers a head that is too long with 431, and one that is too slow with 408."""

    _silent = True
    _in_head = True
    _began = False
    _refused = False
    _head_bytes = 0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head = self._began = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._silent = False
        super().data_received(data)
        if not self._in_head:
            self._began = False
            self._stop_waiting()
        elif not self.transport.is_closing():
            self._head_bytes = 0 if self._began else self._head_bytes + len(data)
            self._began = False
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge())
            elif self._patience is None:
                self._patience = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        self._patience = None
        if self.transport.is_closing():
            return
        if self._is_answering():  # the next request on the same connection: it cannot be answered yet
            self._patience = self.loop.call_later(HEAD_SECONDS, self._too_slow)
        elif self._silent:
            self.transport.close()  # nothing was asked
        else:
            self._refuse(HeadTooSlow())

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, refusal: Refusal) -> None:
        self._refused = True
        self._stop_waiting()
        if self._is_answering():
            self.transport.abort()
            return
        request_id = uuid4().hex
        log.info({"event": "head_refused", "request_id": request_id, "status": refusal.status})
        body = refusal.body()
        headers: dict[str, Any] = {
            "content-type": refusal.media_type,
            "content-length": len(body),
            "connection": "close",
            "cache-control": "no-store",
            "x-request-id": request_id,
        }
        lines = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
