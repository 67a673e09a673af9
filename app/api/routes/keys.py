"""An organization's API keys: who can call, with what, and who still does. Keys are made and revoked by the command line."""

from fastapi import APIRouter, Request, Response

from app.access import keys
from app.api.openapi import operation
from app.api.requests import services
from app.api.responses import Part, json_reply
from app.api.scopes import Route
from app.schemas.resources import KeyResponse
from app.schemas.values import Page

router = APIRouter(route_class=Route, tags=["keys"])


@router.get("/v1/keys", response_model=Page[KeyResponse], **operation(scope="keys:read"))
async def list_keys(request: Request, part: Part) -> Response:
    """The organization's API keys, newest first; revoked and expired ones too. Never a key itself."""
    organization_id = request.state.principal.organization_id
    return json_reply(await keys.list_page(services(request).database, organization_id, part))
