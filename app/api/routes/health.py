"""Health: for load balancers and for the person who looks. No key needed."""

import asyncio

from fastapi import APIRouter, Request, Response

from app.api.requests import services
from app.errors import DatabaseUnavailable
from app.runs.projection import encode
from app.schemas.problems import Health
from app.services import Services

router = APIRouter(tags=["health"])

_RESPONSES: dict[int | str, dict[str, object]] = {503: {"model": Health, "description": "A dependency is down."}}


def _reply(**problems: str | None) -> Response:
    reasons = {name: problem for name, problem in problems.items() if problem is not None}
    body = encode({"status": "unavailable" if reasons else "ok", "down": list(reasons), "reasons": reasons})
    return Response(body, 503 if reasons else 200, {"Retry-After": "2"} if reasons else None, "application/json")


async def _database_problem(own: Services) -> str | None:
    try:
        async with own.database.connection() as connection:
            # Also proves that the migrations have run.
            await connection.fetchval("SELECT 1 FROM runs LIMIT 1")
    except DatabaseUnavailable:
        return "unreachable"
    return None


async def _storage_problem(own: Services) -> str | None:
    return None if await own.files.ready() else "unreachable"


@router.get("/v1/health", name="health", response_model=Health)
@router.get("/health/live", name="health_live", response_model=Health)
async def live() -> Response:
    """The process answers."""
    return _reply()


@router.get("/v1/health/db", name="health_db", response_model=Health, responses=_RESPONSES)
async def database(request: Request) -> Response:
    """PostgreSQL answers."""
    return _reply(database=await _database_problem(services(request)))


@router.get("/health/ready", name="health_ready", response_model=Health, responses=_RESPONSES)
async def ready(request: Request) -> Response:
    """All three stores can be used; Vault accepts the service's own login. Nothing is written to find out."""
    own = services(request)
    database, vault, storage = await asyncio.gather(
        _database_problem(own), own.secrets.problem(), _storage_problem(own)
    )
    return _reply(database=database, vault=vault, storage=storage)
