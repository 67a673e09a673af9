"""Downloads: an attachment's bytes over HTTP, and URLs that need no API key until they expire.

The rules of ranges are RFC 9110 section 14; those of Content-Disposition RFC 6266 and RFC 8187.
"""

import hmac
import logging
import re
from dataclasses import dataclass
from uuid import UUID

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from app.api.requests import is_head
from app.config import Settings
from app.errors import AttachmentBytesMissing, AttachmentNotFound, RangeNotSatisfiable
from app.limits import memory_budget
from app.runs.attachments import readable
from app.services import Services
from app.stores.database import Database, Record
from app.stores.files import CHUNK, FileMissingError, file_headers

log = logging.getLogger("app.downloads")

# One range alone. Anything else is ignored, as RFC 9110 section 14.2 allows.
_RANGE = re.compile(r"bytes=([0-9]{0,100})-([0-9]{0,100})", re.IGNORECASE)


def requested_range(headers: Headers, size: int, etag: str) -> tuple[int, int] | None:
    """The bytes asked for, as start and end (exclusive); None means all of them. Raises RangeNotSatisfiable."""
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:
        if not last:
            return None
        length = min(int(last), size)
        if length > 0:
            return size - length, size
        if size == 0 and int(last) > 0:
            return None  # the whole of an empty file
    elif last and int(last) < int(first):
        return None
    elif int(first) < size:
        return int(first), min(int(last) + 1, size) if last else size
    raise RangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})


# --- sending ----------------------------------------------------------------------------------------------------------


async def respond(services: Services, file: Record, request: Request) -> Response:
    """The bytes, or the range that the request asks for, in chunks; no connection to the database is held meanwhile.
    A HEAD request reads one byte, to see that there are any.

    Raises RangeNotSatisfiable, StorageUnavailable, Overloaded, QuotaExceeded, AttachmentBytesMissing, and AttachmentNotFound if
    the row went since it was read. A file that goes while it is being sent breaks the connection: the caller has less than
    Content-Length.
    """
    size = file["size_bytes"]
    etag = f'"{file["id"]}"'  # the bytes of an attachment never change
    wanted = requested_range(request.headers, size, etag)
    start, end = wanted or (0, size)
    stop = min(end, start + 1) if is_head(request) else end
    # One chunk is sent while the next one is read.
    await memory_budget.reserve(min(stop - start, 2 * CHUNK), party=file["organization_id"])
    try:
        chunks = await services.files.stream(file["storage_path"], start, stop)
    except FileMissingError:
        await _tell_missing(services, file)
        raise AttachmentBytesMissing from None
    described = file_headers(file["filename"], file["content_type"]) | {
        "Content-Length": str(end - start),
        "Accept-Ranges": "bytes",
        "Content-Security-Policy": "sandbox",  # a browser that shows it after all gives it no rights of our origin
        "ETag": etag,
    }
    if wanted is not None:
        described["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if is_head(request):
        return Response(None, 200 if wanted is None else 206, described)
    return StreamingResponse(chunks, 200 if wanted is None else 206, described)


async def _tell_missing(services: Services, file: Record) -> None:
    """Log that the store has lost the bytes. Raises AttachmentNotFound if the attachment was deleted or has expired."""
    async with services.database.connection() as connection:
        await readable(connection, file["id"], None)
    log.warning(
        {
            "event": "attachment_bytes_missing",
            "attachment_id": str(file["id"]),
            "organization_id": file["organization_id"],
        }
    )


# --- URLs that need no key --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ticket:
    """The claim in a URL that we signed: this attachment, until then. Its parts are text as the URL has it."""

    attachment_id: str
    expires: str
    signature: str

    @classmethod
    def sign(cls, settings: Settings, attachment_id: UUID, expires_in: int, now: float) -> "Ticket":
        """A ticket that is valid for `seconds`. `now` is the database's time: any replica may be asked to redeem it."""
        expires = str(int(now) + expires_in)
        key = settings.server_key.get_secret_value()
        return cls(str(attachment_id), expires, _signature(key, str(attachment_id), expires))

    @property
    def url(self) -> str:
        return f"/downloads/{self.attachment_id}?expires={self.expires}&signature={self.signature}"

    def holds(self, settings: Settings, now: float) -> bool:
        """Whether we signed exactly this, under the current or the previous key, and it has not expired."""
        signed = [
            hmac.compare_digest(
                _signature(key.get_secret_value(), self.attachment_id, self.expires).encode(), self.signature.encode()
            )
            for key in (settings.server_key, settings.server_key_previous)
            if key is not None
        ]
        return any(signed) and now < int(self.expires)


def _signature(key: str, attachment_id: str, expires: str) -> str:
    return hmac.new(key.encode(), f"download\n{attachment_id}\n{expires}".encode(), "sha256").hexdigest()


async def redeem(database: Database, settings: Settings, ticket: Ticket) -> Record:
    """The columns for reading the attachment of a ticket. Raises AttachmentNotFound for every fault."""
    if not ticket.holds(settings, database.clock.now()):
        raise AttachmentNotFound
    async with database.connection() as connection:
        return await readable(connection, UUID(ticket.attachment_id), None)
