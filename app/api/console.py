"""The operator's console at /console/: static files of our own, from memory. It knows no data: the page asks the public API.

The files are those of `app/console/`, read and compressed once, at start. Browsers keep them and ask each time whether they
have changed (ETag): after an upgrade nobody works with modules of the version before.
"""

import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from app.config import Settings
from app.errors import RouteNotFound

FOLDER: Final = Path(__file__).resolve().parent.parent / "console"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing from elsewhere, nothing inline, no frame, no form that is sent, and no string that becomes code or markup.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
# The edge adds nosniff, as it does to every reply.
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}

# Accepted, and not with a quality of zero (RFC 9110 section 12.5.3).
_GZIP: Final = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _File:
    media_type: str
    plain: bytes
    packed: bytes
    digest: str

    @classmethod
    def of(cls, path: Path, content: bytes) -> "_File":
        digest = hashlib.sha256(content).hexdigest()[:32]
        return cls(TYPES[path.suffix], content, gzip.compress(content, 9, mtime=0), digest)

    def reply(self, request: Request) -> Response:
        packed = _GZIP.search(request.headers.get("accept-encoding", "")) is not None
        # The two forms are two sequences of bytes, so they have two strong tags.
        tag = f'"{self.digest}-gzip"' if packed else f'"{self.digest}"'
        headers = HEADERS | {"ETag": tag}
        known = {given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if packed:
            headers["Content-Encoding"] = "gzip"
        return Response(self.packed if packed else self.plain, 200, headers, self.media_type)


def _limits(settings: Settings) -> bytes:
    """What the page checks before it sends files, as the content of an attribute."""
    limits = {
        "body": settings.max_body_bytes,
        "file": settings.max_file_bytes,
        "files": settings.max_files,
    }
    return json.dumps(limits).replace('"', "&quot;").encode()


def _read(settings: Settings) -> dict[str, _File]:
    contents = {path: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    files = {
        path.name: _File.of(
            path, content.replace(b"{limits}", _limits(settings)) if path.suffix == ".html" else content
        )
        for path, content in contents.items()
    }
    return files | {"": files["index.html"]}


def install(app: FastAPI, settings: Settings) -> None:
    """Serve /console/."""
    files = _read(settings)

    async def serve(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise RouteNotFound
        return file.reply(request)

    async def add_slash(request: Request) -> Response:
        return RedirectResponse(request.scope.get("root_path", "") + "/console/", 308)

    app.add_route("/console", add_slash, include_in_schema=False)
    app.add_route("/console/{name:path}", serve, include_in_schema=False)
