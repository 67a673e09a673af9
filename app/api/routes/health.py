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


def _reply(down: list[str]) -> Response:
    body = encode({"status": "unavailable" if down else "ok", "down": down})
    return Response(body, 503 if down else 200, {"Retry-After": "2"} if down else None, "application/json")


async def _database_answers(own: Services) -> bool:
    try:
        async with own.database.connection() as connection:
            # Also proves that the migrations have run.
            await connection.fetchval("SELECT 1 FROM runs LIMIT 1")
    except DatabaseUnavailable:
        return False
    return True


@router.get("/v1/health", response_model=Health)
@router.get("/health/live", response_model=Health)
async def live() -> Response:
    """The process answers."""
    return _reply([])


@router.get("/v1/health/db", response_model=Health, responses=_RESPONSES)
async def database(request: Request) -> Response:
    """PostgreSQL answers."""
    return _reply([] if await _database_answers(services(request)) else ["database"])


@router.get("/health/ready", response_model=Health, responses=_RESPONSES)
async def ready(request: Request) -> Response:
    """All three stores answer."""
    own = services(request)
    answers = await asyncio.gather(_database_answers(own), own.secrets.ready(), own.files.ready())
    return _reply([name for name, ok in zip(("database", "vault", "storage"), answers, strict=True) if not ok])
