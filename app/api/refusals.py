"""How refusals are rendered: the only place where an exception becomes a reply."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app.api.edge import note
from app.api.not_here import vendors_route
from app.api.validation import invalid
from app.errors import InternalError, MethodNotAllowed, NotSupported, Refusal, RouteNotFound


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101 - narrows what Starlette declares too widely
    note(request.scope["state"], error)
    return Response(error.body(request.state.request_id), error.status, error.headers, error.media_type)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    errors = error.errors()
    is_of_path = any(one["loc"][:1] == ("path",) for one in errors)  # the name of a route that was taken for an id
    return await _refusal(request, (_vendors(request) if is_of_path else None) or invalid(errors))


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    if (vendors := _vendors(request)) is not None:
        return await _refusal(request, vendors)
    if error.status_code != 405:
        return await _refusal(request, RouteNotFound())
    allow = request.app.state.methods.allow(request.scope)
    return await _refusal(request, MethodNotAllowed(headers={"Allow": allow}))


def _vendors(request: Request) -> NotSupported | None:
    route = vendors_route(request.scope["path"])
    return None if route is None else NotSupported(route)


async def _unexpected(request: Request, _: Exception) -> Response:
    return await _refusal(request, InternalError())


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    Refusal: _refusal,
    RequestValidationError: _invalid,
    HTTPException: _http_exception,
    Exception: _unexpected,
}
