"""Health: for load balancers and for the person who looks. No key needed."""

import asyncio
from collections.abc import Iterable

from fastapi import APIRouter, Request, Response

from app import __version__
from app.api.requests import services
from app.schemas.problems import Alive, Health
from app.stores.disks import FULL
from app.stores.documents import encode
from app.stores.health import STORES, Checks
from app.stores.outages import Problem

router = APIRouter(tags=["health"])

_ALIVE = encode({"status": "ok", "down": [], "reasons": {}, "version": __version__})

_RESPONSES: dict[int | str, dict[str, object]] = {503: {"model": Health, "description": "A dependency is down."}}


def _reply(
    request: Request, full: Iterable[str] = (), webhooks: str | None = None, **problems: Problem | None
) -> Response:
    """What takes no replica out of service is said all the same: a full disk, because reads go on, and what is wrong with
    webhooks, because runs do not need them."""
    reasons = {name: problem.reason for name, problem in problems.items() if problem is not None}
    down = list(reasons)
    degraded = {name: FULL for name in full if name not in reasons}
    reasons |= degraded
    if webhooks is not None:
        reasons["webhooks"] = webhooks
    status = "unavailable" if down else "degraded" if degraded else "ok"
    body = encode({"status": status, "down": down, "reasons": reasons})
    if not down:
        return Response(body, media_type="application/json")
    request.state.down = down  # for the line of the log
    return Response(body, 503, {"Retry-After": "2"}, "application/json")


def _checks(request: Request) -> Checks:
    return services(request).checks


@router.get("/health", name="health_as_the_vendor_has_it", response_model=Health)
@router.get("/v1/health", name="health", response_model=Health)
async def health(request: Request) -> Response:
    """The process answers."""
    return _reply(request)


@router.get("/health/live", name="health_live", response_model=Alive)
async def live() -> Response:
    """The process answers, and says which version it is."""
    return Response(_ALIVE, media_type="application/json")


@router.get("/health/db", name="health_db_as_the_vendor_has_it", response_model=Health, responses=_RESPONSES)
@router.get("/v1/health/db", name="health_db", response_model=Health, responses=_RESPONSES)
async def database(request: Request) -> Response:
    """PostgreSQL answers."""
    checks = _checks(request)
    return _reply(request, checks.full("database"), database=await checks.problem("database"))


@router.get("/health/ready", name="health_ready", response_model=Health, responses=_RESPONSES)
async def ready(request: Request) -> Response:
    """All three stores can be used; Vault accepts the service's own login. Nothing is written to find out.

    `degraded`, and 200, while the disk of the database or of the file store is full: reads work, and some writes do not.
    `reasons` names `webhooks` when Vault's policy keeps them from being sent; the replica is ready all the same.
    """
    checks = _checks(request)
    found = await asyncio.gather(*(checks.problem(store) for store in STORES))
    problems = dict(zip(STORES, found, strict=True))
    return _reply(request, checks.full("database", "storage"), checks.webhooks_problem(), **problems)
