"""Who am I: what an API key is and what it may do."""

from fastapi import APIRouter, Request, Response

from app.access import auth
from app.api.openapi import operation
from app.api.requests import services
from app.api.responses import json_reply
from app.api.scopes import Route
from app.schemas.resources import WhoAmI

router = APIRouter(route_class=Route, tags=["keys"])


@router.get("/v1/whoami", response_model=WhoAmI, **operation(scope="runs:read", bound="runs:read"))
async def whoami(request: Request) -> Response:
    """The API key that this request was sent with: its organization, its scopes and when it expires."""
    async with services(request).database.connection() as connection:
        return json_reply(await auth.whoami(connection, request.state.principal))
