"""Health: for load balancers and for the person who looks. No key needed."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from fastapi import APIRouter, Request, Response

from app import __version__
from app.errors import DatabaseUnavailable
from app.runs.projection import encode
from app.schemas.problems import Alive, Health
from app.services import Services
from app.stores.database import READ_ONLY
from app.stores.disks import FULL
from app.stores.setup import Unfit

router = APIRouter(tags=["health"])

SHARED_SECONDS = 1.0  # how long an answer of a store is good for

_ALIVE = encode({"status": "ok", "down": [], "reasons": {}, "version": __version__})

_RESPONSES: dict[int | str, dict[str, object]] = {503: {"model": Health, "description": "A dependency is down."}}


def _reply(full: Iterable[str] = (), webhooks: str | None = None, **problems: str | None) -> Response:
    """What takes no replica out of service is said all the same: a full disk, because reads go on, and what is wrong with
    webhooks, because runs do not need them."""
    reasons = {name: problem for name, problem in problems.items() if problem is not None}
    down = list(reasons)
    degraded = {name: FULL for name in full if name not in reasons}
    reasons |= degraded
    if webhooks is not None:
        reasons["webhooks"] = webhooks
    status = "unavailable" if down else "degraded" if degraded else "ok"
    body = encode({"status": status, "down": down, "reasons": reasons})
    return Response(body, 503 if down else 200, {"Retry-After": "2"} if down else None, "application/json")


async def _database_problem(own: Services) -> str | None:
    try:
        await own.database.ready()
    except Unfit as unfit:
        return unfit.reason
    except DatabaseUnavailable as failed:
        return READ_ONLY if failed.kind == READ_ONLY else "unreachable"
    return None


async def _storage_problem(own: Services) -> str | None:
    return None if await own.files.ready() else "unreachable"


class _Shared:
    """One answer for all who ask within a second: thousands of probes are one question to each store."""

    def __init__(self, ask: Callable[[], Awaitable[str | None]]) -> None:
        self._ask = ask
        self._until = 0.0
        self._answer: asyncio.Task[str | None] | None = None

    async def __call__(self) -> str | None:
        if self._answer is None or (self._answer.done() and time.monotonic() >= self._until):
            self._answer = asyncio.create_task(self._find_out())
        return await asyncio.shield(self._answer)  # the others go on waiting for it when one of them gives up

    async def _find_out(self) -> str | None:
        answer = await self._ask()
        self._until = time.monotonic() + SHARED_SECONDS
        return answer


class Checks:
    """What readiness knows of each store."""

    def __init__(self, own: Services) -> None:
        self.database = _Shared(lambda: _database_problem(own))
        self.vault = _Shared(own.secrets.problem)
        self.storage = _Shared(lambda: _storage_problem(own))
        self._own = own

    def full(self, *stores: str) -> Sequence[str]:
        """Those of these stores whose disks have no room, as far as is known."""
        disks = {"database": self._own.database.disk, "storage": self._own.files.disk}
        return [store for store in stores if disks[store].is_full]

    def webhooks(self) -> str | None:
        """What was seen when Vault was asked last."""
        return self._own.secrets.webhooks_problem


def _checks(request: Request) -> Checks:
    found: Checks = request.app.state.checks
    return found


@router.get("/health", name="health_as_the_vendor_has_it", response_model=Health)
@router.get("/v1/health", name="health", response_model=Health)
async def health() -> Response:
    """The process answers."""
    return _reply()


@router.get("/health/live", name="health_live", response_model=Alive)
async def live() -> Response:
    """The process answers, and says which version it is."""
    return Response(_ALIVE, media_type="application/json")


@router.get("/health/db", name="health_db_as_the_vendor_has_it", response_model=Health, responses=_RESPONSES)
@router.get("/v1/health/db", name="health_db", response_model=Health, responses=_RESPONSES)
async def database(request: Request) -> Response:
    """PostgreSQL answers."""
    checks = _checks(request)
    problem = await checks.database()
    return _reply(checks.full("database"), database=problem)


@router.get("/health/ready", name="health_ready", response_model=Health, responses=_RESPONSES)
async def ready(request: Request) -> Response:
    """All three stores can be used; Vault accepts the service's own login. Nothing is written to find out.

    `degraded`, and 200, while the disk of the database or of the file store is full: reads work, and some writes do not.
    `reasons` names `webhooks` when Vault's policy keeps them from being sent; the replica is ready all the same.
    """
    checks = _checks(request)
    database, vault, storage = await asyncio.gather(checks.database(), checks.vault(), checks.storage())
    full = checks.full("database", "storage")
    return _reply(full, checks.webhooks(), database=database, vault=vault, storage=storage)
