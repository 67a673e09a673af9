"""What Prometheus scrapes. Not part of the API: it is on the same port, and needs no key but a token if there is one."""

import hmac
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, FastAPI, Request, Response

from app import gauges
from app.config import Settings
from app.errors import Unauthorized
from app.telemetry import metrics


def install(app: FastAPI, settings: Settings) -> None:
    """Serve GET /metrics, unless METRICS is off: then nothing is counted either."""
    if not settings.metrics:
        metrics.turn_off()
        return
    router = APIRouter()
    token = None if settings.metrics_token is None else settings.metrics_token.get_secret_value().encode()
    page, found = metrics.Page(), gauges.Gauges()

    @router.get("/metrics", include_in_schema=False)
    async def show(request: Request) -> Response:
        _admit(request, token)
        text = await page.text(_reading(request, found))
        return Response(text, media_type=metrics.CONTENT_TYPE)

    app.include_router(router)


def _admit(request: Request, token: bytes | None) -> None:
    """Raises Unauthorized."""
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token):
        raise Unauthorized("Send METRICS_TOKEN as `Authorization: Bearer <token>`.")


def _reading(request: Request, found: gauges.Gauges) -> Callable[[], Awaitable[metrics.Found]]:
    return lambda: found.read(request.app.state.services.database)
