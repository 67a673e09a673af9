"""What happened to the runs of an organization, for those who follow along."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app import events
from app.api.openapi import operation
from app.api.requests import services
from app.api.responses import Limit, json_reply
from app.api.scopes import Route
from app.schemas.runs import EventPage

router = APIRouter(route_class=Route, prefix="/v1/events", tags=["events"])

After = Annotated[
    str | None,
    Query(
        max_length=40,
        description="`next` of the reply before; absent: from the beginning.",
        json_schema_extra={"pattern": r"^([0-9]{1,18}\.[0-9]{1,18})?$"},
    ),
]


@router.get("", response_model=EventPage, **operation(scope="runs:read"))
async def list_events(request: Request, after: After = None, limit: Limit = 100) -> Response:
    """Events of the organization, oldest first, each exactly once for who goes on from `next`.

    An event shows once all changes that began before it have ended: usually at once.
    """
    async with services(request).database.connection() as connection:
        return json_reply(await events.list_after(connection, request.state.principal.organization_id, after, limit))
