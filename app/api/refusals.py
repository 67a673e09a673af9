"""How refusals are rendered: the only place where an exception becomes a reply."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app.api.edge import note
from app.api.requests import invalid
from app.errors import InternalError, MethodNotAllowed, Refusal, RouteNotFound


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)  # noqa: S101 - narrows what Starlette declares too widely
    note(request.scope["state"], error)
    return Response(error.body(request.state.request_id), error.status, error.headers, error.media_type)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    return await _refusal(request, invalid(error.errors()))


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    if error.status_code != 405:
        return await _refusal(request, RouteNotFound())
    allow = request.app.state.methods.allow(request.scope)
    return await _refusal(request, MethodNotAllowed(headers={"Allow": allow}))


async def _unexpected(request: Request, _: Exception) -> Response:
    return await _refusal(request, InternalError())


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    Refusal: _refusal,
    RequestValidationError: _invalid,
    HTTPException: _http_exception,
    Exception: _unexpected,
}
