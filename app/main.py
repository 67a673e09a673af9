"""The application: its parts, its routers, and how refusals are rendered."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from app import docs
from app.background import Background
from app.config import Settings
from app.database import Database
from app.edge import Edge
from app.errors import InternalError, MethodNotAllowed, Refusal, RouteNotFound
from app.parts import Parts
from app.payload import invalid
from app.routers import attachments, health, machines, pools, runs, workflows
from app.storage import FileStore
from app.vault import SecretStore
from app.waiting import Waiters

ROUTERS = (runs.router, attachments.router, workflows.router, machines.router, pools.router, health.router)


def create_app(settings: Settings) -> FastAPI:
    """The service with these settings; it connects to its stores when it is used, and starts without them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings)
        secrets, files, waiters = SecretStore(settings), FileStore(settings), Waiters()
        background = Background(settings, database, secrets, files, waiters)
        app.state.parts = Parts(settings, database, secrets, files, background, waiters)
        task = asyncio.create_task(background.run())
        _when_told_to_stop(waiters.stop)
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await secrets.close()
        await files.close()
        database.close()

    app = FastAPI(
        title="Runs API",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            Refusal: _refusal,
            RequestValidationError: _invalid,
            HTTPException: _http_exception,
            Exception: _unexpected,
        },
        redirect_slashes=False,  # a redirect would make clients send their key and body twice
    )
    for router in ROUTERS:
        app.include_router(router)
    docs.install(app)
    app.add_middleware(Edge)
    if settings.cors_origins:
        # Outside the edge, so that a browser can read refusals too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Request-ID"],
            expose_headers=[
                "X-Request-ID",
                "Idempotency-Status",
                "Retry-After",
                "Content-Disposition",
                "Content-Range",
            ],
            max_age=600,
        )
    return app


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


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101 - narrows what Starlette declares too widely
    return Response(error.body(), error.status, error.headers, error.media_type)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    return await _refusal(request, invalid(error.errors()))


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    if error.status_code != 405:
        return await _refusal(request, RouteNotFound())
    # Each method of a path is a route of its own, and the framework names those of the first one alone.
    allowed = {method for method in (error.headers or {}).get("Allow", "").split(", ") if method}
    for router in ROUTERS:
        for route in router.routes:
            if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL:
                allowed |= route.methods or set()
    return await _refusal(request, MethodNotAllowed(headers={"Allow": ", ".join(sorted(allowed))}))


async def _unexpected(request: Request, _: Exception) -> Response:
    return await _refusal(request, InternalError())
