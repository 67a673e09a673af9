"""The application: its services, its routers, and how refusals are rendered."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from app import __version__, background
from app.api import console, docs, openapi, refusals
from app.api.edge import Edge
from app.api.methods import Methods
from app.api.request_quotas import Limits
from app.api.routes import ROUTERS, health, metrics
from app.api.server import Connections, room_for_connections
from app.config import Settings
from app.services import Services
from app.telemetry import metrics as counted
from app.telemetry import tracing

# What a page of another origin may send: what the API reads, and what tracing and caching put into each request.
_ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "Idempotency-Key", "X-Request-ID"),
    *("Range", "If-Range", "If-None-Match", "Cache-Control"),
    *("traceparent", "tracestate", "baggage"),
)
# What it may read beside the headers that every page may read.
_EXPOSED_HEADERS = (
    *(
        "X-Request-ID",
        "Idempotency-Status",
        "Retry-After",
        "RateLimit",
        "RateLimit-Policy",
        "WWW-Authenticate",
        "Allow",
    ),
    *("Content-Disposition", "Content-Range", "Accept-Ranges", "ETag"),
)


def create_app(settings: Settings) -> FastAPI:
    """The service with these settings; it connects to its stores when it is used, and starts without them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
        services = Services.open(settings)
        app.state.services = services
        _begin_to_count(services)
        connections = _max_connections(settings)
        app.state.limits = Limits(settings, connections)
        task = asyncio.create_task(background.run(services))
        _when_told_to_stop(services.wakeups.stop)
        # uvicorn hands it to app.api.server
        yield {"connections": Connections(connections, settings.send_timeout_seconds)}
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await services.close()
        counted.take_over()  # where others can still read it
        await asyncio.to_thread(tracing.stop)

    app = FastAPI(
        title="Runs API",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # served by app.api.openapi, as bytes
        docs_url=None,
        redoc_url=None,
        exception_handlers=refusals.HANDLERS,
        generate_unique_id_function=openapi.unique_id,
        redirect_slashes=False,  # a redirect would make clients send their key and body twice
        # The service has its own traces and metrics. FastAPI's cost 18 us a request to find that nobody wants them, and would
        # export what a caller sent if the environment asked for them.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    serves_api = settings.background != "only"
    routers = (*(ROUTERS if serves_api else (health.router,)), metrics.router(settings))
    for router in routers:
        app.include_router(router)
    if serves_api:
        openapi.install(app)
        docs.install(app, console=settings.console)
        if settings.console:
            console.install(app, settings)
    routes = [*app.routes, *(route for router in routers for route in router.routes)]
    app.state.methods = Methods([route for route in routes if isinstance(route, Route)])
    app.add_middleware(Edge)
    if settings.cors_origins and serves_api:
        # Outside the edge, so that a browser can read refusals too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=_ALLOWED_HEADERS,
            expose_headers=_EXPOSED_HEADERS,
            max_age=600,
        )
    return app


def _begin_to_count(services: Services) -> None:
    """Gauges that are read before a scrape instead of being counted."""
    counted.begin()
    counted.silence_limit.set(services.settings.run_silence_seconds or 3600)
    counted.in_flight_bytes.read_from(lambda: {(): services.in_flight.used})

    def connections() -> dict[tuple[str, ...], float]:
        idle, used = services.database.connections()
        return {("idle",): idle, ("used",): used}

    counted.connections.read_from(connections)
    counted.clock_offset.read_from(lambda: {(): services.database.clock.offset})


def _max_connections(settings: Settings) -> int:
    """As many as wanted, if the stores then still have the descriptors that they may need at once."""
    stores = settings.database_pool_size + settings.vault_concurrency + 8 * settings.storage_concurrency
    return room_for_connections(settings.max_connections, others=128 + stores)


def _when_told_to_stop(act: Callable[[], None]) -> None:
    """The lifespan ends only when all requests have ended, and long polls would take their 30 s: they must hear it before."""
    if threading.current_thread() is not threading.main_thread():
        return  # an application inside another program, which has the signals
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        servers = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, servers: object = servers) -> None:
            loop.call_soon_threadsafe(act)
            if callable(servers):
                servers(number, frame)

        signal.signal(number, handle)
