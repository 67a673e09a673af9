"""What Prometheus scrapes: numbers of all organizations. Not part of the API, but on the same port.

METRICS_TOKEN is needed to read it. Without that setting only a process of this machine may: whoever calls from loopback, and
not by way of a proxy.
"""

import hmac
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address, ip_address

from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers

from app.config import Settings
from app.errors import Unauthorized
from app.operator import database_gauges
from app.telemetry import metrics

_PROXY_HEADERS = frozenset({"forwarded", "via", "x-real-ip"})


def router(settings: Settings) -> APIRouter:
    """Serves GET /metrics, unless METRICS is off: then nothing is counted either."""
    made = APIRouter()
    if not settings.metrics:
        metrics.turn_off()
        return made
    token = None if settings.metrics_token is None else settings.metrics_token.get_secret_value().encode()
    page, found = metrics.Exposition(), database_gauges.Gauges(settings)

    @made.get("/metrics", include_in_schema=False)
    async def show(request: Request) -> Response:
        _admit(request, token)
        text = await page.text(_reading(request, found))
        return Response(text, media_type=metrics.CONTENT_TYPE)

    return made


def _admit(request: Request, token: bytes | None) -> None:
    """Raises Unauthorized."""
    if token is None:
        if not _is_of_this_machine(request):
            raise Unauthorized(
                "METRICS_TOKEN is not set, so only a process on the server's own machine may read the metrics, without a"
                " proxy. Set METRICS_TOKEN, and send it as `Authorization: Bearer <token>`."
            )
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token):
        raise Unauthorized("Send METRICS_TOKEN as `Authorization: Bearer <token>`.")


def _is_of_this_machine(request: Request) -> bool:
    """Whether the connection comes from loopback and no proxy has passed the request on: a proxy may be on this machine."""
    if _was_forwarded(request.headers):
        return False
    try:
        peer = ip_address(request.client.host if request.client is not None else "")
    except ValueError:
        return False
    if isinstance(peer, IPv6Address) and peer.ipv4_mapped is not None:
        return peer.ipv4_mapped.is_loopback
    return peer.is_loopback


def _was_forwarded(headers: Headers) -> bool:
    return any(name in _PROXY_HEADERS or name.startswith("x-forwarded-") for name in headers)


def _reading(request: Request, found: database_gauges.Gauges) -> Callable[[], Awaitable[metrics.Readings]]:
    return lambda: found.read(request.app.state.services.database)
