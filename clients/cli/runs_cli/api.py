"""A small client of the public API: errors with their code, writes that may be resent, pages.

Each write carries an Idempotency-Key of its own. When a reply is lost or the service is busy, the same request is sent again
and takes effect once.
"""

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx

from runs_cli import __version__

TRIES = 5
LONGEST_PAUSE_SECONDS = 10.0
_RESEND = frozenset({408, 429, 502, 503, 504})

Json = dict[str, Any]


class ApiError(Exception):
    """The service refused, or nothing answered. The message is for people and contains no secret."""

    def __init__(self, message: str, *, status: int | None = None, code: str = "unreachable") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Api:
    """The service as one API key sees it."""

    def __init__(self, url: str, key: str, *, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}", "User-Agent": f"runs-cli/{__version__}"}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, **params: Any) -> Json:
        """Read something. Parameters that are None are left out. Raises ApiError."""
        given = {name: value for name, value in params.items() if value is not None}
        return self._request("GET", path, params=given)

    def send(self, method: str, path: str, body: Json | None = None, **params: Any) -> Json:
        """Change something, once: resent under the same Idempotency-Key when that is safe and useful. Raises ApiError."""
        given = {name: value for name, value in params.items() if value is not None}
        return self._request(method, path, params=given, json=body or {}, headers={"Idempotency-Key": str(uuid4())})

    def pages(self, path: str, most: int, **params: Any) -> Iterator[Json]:
        """The items of a list, page by page, `most` at the most."""
        after: str | None = None
        left = most
        while left > 0:
            page = self.get(path, limit=min(left, 100), after=after, **params)
            yield from page["items"]
            left -= len(page["items"])
            after = page.get("next")
            if after is None or (not page["items"] and not page.get("search_is_partial")):
                return

    def knows(self, schema: str, field: str) -> bool:
        """Whether the service's own document has this field: fields that a service does not know are ignored by it."""
        document = self._request("GET", "/openapi.json")
        return field in document["components"]["schemas"].get(schema, {}).get("properties", {})

    def _request(self, method: str, path: str, **options: Any) -> Json:
        pause = 0.5
        for last in [*[False] * (TRIES - 1), True]:
            try:
                reply = self._client.request(method, path, **options)
            except httpx.TransportError as problem:
                if last or isinstance(problem, httpx.UnsupportedProtocol):
                    raise ApiError(f"Nothing answers at {self.url}: {type(problem).__name__}.") from None
            else:
                busy = reply.status_code in _RESEND or reply.headers.get("idempotency-status") == "in_progress"
                if not busy or last:
                    return _read(reply)
                wanted = reply.headers.get("retry-after", "")
                if wanted.isdecimal():
                    pause = max(pause, float(wanted))
            time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
            pause *= 2
        raise AssertionError("the last try returns or raises")


def _read(reply: httpx.Response) -> Json:
    try:
        content = reply.json() if reply.content else {}
    except ValueError:
        content = None
    if reply.is_success and isinstance(content, dict):
        return content
    if not isinstance(content, dict):
        raise ApiError(
            f"{reply.url.host} answered {reply.status_code}, and not as the runs API does.", status=reply.status_code
        )
    detail = content.get("detail")
    if isinstance(detail, list):  # 422
        said = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or one['loc'][0]}: {one['msg']}" for one in detail)
        raise ApiError(said, status=reply.status_code, code=str(detail[0]["type"]) if detail else "invalid")
    raise ApiError(str(detail), status=reply.status_code, code=str(content.get("code", reply.status_code)))
