"""Which key may use which route, decided before the body is read and before anything is looked for.

A route says what it needs in `operation()`; that stands in the OpenAPI document, and here it is enforced.
"""

from typing import Any

from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from app.auth import Principal
from app.errors import InsufficientScope

# The scope that a key bound to a machine needs for this route. Such a key sees only its machine's rows. Null: not for it.
BOUND = "x-machine-keys"


class Route(APIRoute):
    """A route that a key without its scope cannot use. Raises InsufficientScope."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal | None = scope["state"].get("principal")
        if principal is not None:
            _authorize(self.openapi_extra or {}, principal)
        await super().handle(scope, receive, send)


def _authorize(described: dict[str, Any], principal: Principal) -> None:
    scopes = [scope for way in described["security"] for scope in way["bearer"]]
    if principal.machine_id is not None:
        # An executor may read what it works on, whether or not its key has runs:read.
        needed = described[BOUND]
        scopes = ["runs:read", "runs:execute"] if needed == "runs:read" else [needed] if needed else []
    if not any(principal.may(scope) for scope in scopes):
        raise InsufficientScope(scopes or [scope for way in described["security"] for scope in way["bearer"]])
