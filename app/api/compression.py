"""gzip for replies of JSON that a caller reads: in pieces, by one thread of the process, the organizations in turns.

Only GETs of callers with a key. A write's reply is short, and a public reply counts for no party's memory.
"""

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from app.errors import Overloaded
from app.limits.memory_budget import Budget

# A shorter reply is sent as it is: it fits one packet anyway.
LEAST_BYTES = 1024
PIECE_BYTES = 256 * 1024
LEVEL = 1  # half of the bytes for a tenth of the time that the best level takes

# Replies that are never compressed (RFC 9110 does not ask for it): what they hold must not show in their length.
NEVER = frozenset(
    {"/v1/webhook-endpoints/{webhook_endpoint_id}/secret", "/v1/run-attachments/{attachment_id}/download-url"}
)

_GZIP = 16 + zlib.MAX_WBITS  # zlib's name for the format
_ASKED = re.compile(rb"(?i)(?:^|,)\s*gzip\s*(?:;\s*q=(0\.\d*[1-9]\d*|1(?:\.0*)?)\s*)?(?=,|$)")


def is_asked_for(accept_encoding: bytes) -> bool:
    """Whether Accept-Encoding (RFC 9110 section 12.5.3) names gzip, and not with the weight 0."""
    return _ASKED.search(accept_encoding) is not None


class Compressor:
    """The thread of a process."""

    def __init__(self) -> None:
        self._turns = Budget(1)
        self._thread = ThreadPoolExecutor(1, "gzip")

    async def pieces(self, party: str, body: bytes) -> AsyncIterator[bytes]:
        """The body as gzip, piece by piece; each piece has a turn of its own, so a long reply delays others by one piece."""
        gzip = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP)
        last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
        for start in range(0, last, PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            if compressed := await self._turn(party, lambda piece=piece: gzip.compress(piece)):  # type: ignore[misc]
                yield compressed
        yield await self._turn(party, lambda: gzip.compress(body[last:]) + gzip.flush())

    async def _turn(self, party: str, work: Callable[[], bytes]) -> bytes:
        turn = self._turns.reservation(party)
        try:
            with suppress(Overloaded):  # the reply has begun: it goes on behind those that wait for the thread
                await turn.reserve(1)
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            turn.release()
