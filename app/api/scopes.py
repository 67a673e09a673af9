"""Which key may use which route, and which parameters of its query may come once: decided before the body is read.

A route says what it needs in `operation()`; that stands in the OpenAPI document, and here it is enforced.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, get_args, get_origin

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from app.access.auth import Principal
from app.api.validation import refuse_repeated
from app.errors import InsufficientScope

# The scope that a key bound to a machine needs for this route. Such a key sees only its machine's rows. Null: not for it.
BOUND = "x-machine-keys"


class Route(APIRoute):
    """A route that needs a scope, and that takes each parameter only once.

    Raises InsufficientScope and Invalid.
    """

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the query's parameters."""
        return frozenset(_parameters(self.dependant))

    @cached_property
    def _single(self) -> frozenset[str]:
        """Names of the query's parameters, but for those that are lists."""
        return frozenset(_single_parameters(self.dependant))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal | None = scope["state"].get("principal")
        if principal is not None:
            _authorize(self.openapi_extra or {}, principal)
        if b"&" in scope["query_string"]:
            refuse_repeated(scope["query_string"], self._single)
        await super().handle(scope, receive, send)


def _parameters(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for one in dependant.dependencies:
        yield from _parameters(one)


def _single_parameters(dependant: Dependant) -> Iterator[str]:
    for field in dependant.query_params:
        annotation = field.field_info.annotation
        if not any(get_origin(one) is list for one in (annotation, *get_args(annotation))):
            yield field.alias
    for one in dependant.dependencies:
        yield from _single_parameters(one)


def _authorize(described: dict[str, Any], principal: Principal) -> None:
    scopes = [scope for way in described["security"] for scope in way["bearer"]]
    if principal.machine_id is not None:
        # An executor may read what it works on, whether or not its key has runs:read.
        needed = described[BOUND]
        scopes = ["runs:read", "runs:execute"] if needed == "runs:read" else [needed] if needed else []
    if not any(principal.may(scope) for scope in scopes):
        raise InsufficientScope(scopes or [scope for way in described["security"] for scope in way["bearer"]])
