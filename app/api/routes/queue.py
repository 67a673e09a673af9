"""The queue: what waits, and why."""

from fastapi import APIRouter, Request, Response

from app.api.openapi import operation
from app.api.requests import services
from app.api.responses import json_reply
from app.api.scopes import Route
from app.runs import queue
from app.schemas.runs import QueueResponse

router = APIRouter(route_class=Route, prefix="/v1/queue", tags=["queue"])


@router.get("", response_model=QueueResponse, **operation(scope="runs:read"))
async def get_queue(request: Request) -> Response:
    """What waits for a machine: at most 200 lanes, the one with the oldest run first.

    All runs of a lane want the same, so its first run says why none of them starts. Of an organization with more than 2,000
    lanes the first 2,000 by name are looked at.
    """
    return json_reply(await queue.list_lanes(services(request).database, request.state.principal.organization_id))
