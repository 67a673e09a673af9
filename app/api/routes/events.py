"""What happened to the runs of an organization, for those who follow along."""

from fastapi import APIRouter, Request, Response

from app import events
from app.api.openapi import operation
from app.api.requests import services
from app.api.responses import EventsAfter, Limit, json_reply
from app.api.scopes import Route
from app.schemas.runs import EventPage

router = APIRouter(route_class=Route, prefix="/v1/events", tags=["events"])


@router.get("", response_model=EventPage, **operation(scope="runs:read"))
async def list_events(request: Request, after: EventsAfter = None, limit: Limit = 100) -> Response:
    """Events of the organization, oldest first, each exactly once for who goes on from `next`.

    An event shows once all changes that began before it have ended: usually at once.
    """
    async with services(request).database.connection() as connection:
        return json_reply(await events.list_after(connection, request.state.principal.organization_id, after, limit))
