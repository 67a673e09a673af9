"""Files of our pages, served from memory: read once at start, and compressed once when one is first asked for.

Browsers keep them and ask each time whether they have changed (ETag): after an upgrade no browser works with files of the
version before.
"""

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}

# Nothing from elsewhere, nothing inline, no frame, and no form that is sent. data: is the icons in a style sheet, blob: the
# files that a page makes itself.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The edge adds nosniff, as it does to every reply.
HEADERS: Final = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}

# Accepted, and not with a quality of zero (RFC 9110 section 12.5.3).
_GZIP: Final = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", re.IGNORECASE)


@dataclass(frozen=True)
class StaticFile:
    """One file, plain and compressed."""

    media_type: str
    plain: bytes
    digest: str

    @classmethod
    def of(cls, name: str, content: bytes) -> "StaticFile":
        suffix = name[name.rindex(".") :]
        return cls(TYPES[suffix], content, hashlib.sha256(content).hexdigest()[:32])

    @cached_property
    def packed(self) -> bytes:
        """Swagger UI takes 0.1 s, which no start should wait for."""
        return gzip.compress(self.plain, mtime=0)

    def reply(self, request: Request, policy: str = POLICY) -> Response:
        """The file as the browser accepts it, or 304 if it has it."""
        packed = _GZIP.search(request.headers.get("accept-encoding", "")) is not None
        # The two forms are two sequences of bytes, so they have two strong tags.
        tag = f'"{self.digest}-gzip"' if packed else f'"{self.digest}"'
        headers = HEADERS | {"Content-Security-Policy": policy, "ETag": tag}
        known = {given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if packed:
            headers["Content-Encoding"] = "gzip"
        return Response(self.packed if packed else self.plain, 200, headers, self.media_type)
