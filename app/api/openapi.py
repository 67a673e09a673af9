"""OpenAPI that tells the truth, and the docs page without any outside host.

Bodies are read by payload.py and replies are built as bytes, so FastAPI cannot see them: each route names them with
`operation()`.
"""

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

from app.api.requests import refuse_unsupported_query
from app.errors import (
    DatabaseUnavailable,
    IdempotencyInProgress,
    InternalError,
    Invalid,
    PayloadTooLarge,
    Refusal,
    RequestTimeout,
    Unauthorized,
    UnsupportedMediaType,
)
from app.schemas.problems import Problem, ValidationProblem
from app.schemas.values import MAX_INTEGER, NO_NUL

_BODIES: dict[str, type[BaseModel]] = {}

_REFUSED_ALWAYS: tuple[type[Refusal], ...] = (Unauthorized, Invalid, InternalError, DatabaseUnavailable)
_REFUSED_WRITES = (RequestTimeout, PayloadTooLarge, UnsupportedMediaType, IdempotencyInProgress)

_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "1 to 255 visible ASCII characters. A resend with the same key gets the first reply and changes nothing.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"},
}


def operation(
    *refusals: type[Refusal],
    body: type[BaseModel] | None = None,
    write: bool = False,
    public: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of a route: its refusals, and for a write its body and the Idempotency-Key.

    A public route needs no API key. A body may be absent if none of its fields is required.
    """
    always = tuple(refusal for refusal in _REFUSED_ALWAYS if not (public and refusal is Unauthorized))
    possible = (*always, *(_REFUSED_WRITES if write else ()), *refusals)
    extra: dict[str, Any] = {} if public else {"security": [{"bearer": []}]}
    if write:
        extra["parameters"] = [_IDEMPOTENCY_KEY]
    if body is not None:
        _BODIES[body.__name__] = body
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        required = any(field.is_required() for field in body.model_fields.values())
        extra["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
    described: dict[str, Any] = {"responses": _responses(possible), "openapi_extra": extra}
    if not write and not public:
        described["dependencies"] = [Depends(refuse_unsupported_query)]
    return described


def _responses(possible: tuple[type[Refusal], ...]) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {}
    for refusal in possible:
        if refusal is Invalid:
            responses[422] = {"model": ValidationProblem, "description": "The request is not valid."}
            continue
        response = responses.setdefault(
            refusal.status,
            {
                "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
                "codes": [],
            },
        )
        response["codes"].append(refusal.code)
        if refusal.status == 503 or refusal is IdempotencyInProgress:
            response.setdefault("headers", {})["Retry-After"] = _header("Seconds.")
        if refusal is IdempotencyInProgress:
            response["headers"]["Idempotency-Status"] = _header("`in_progress`, with that code alone: send it again.")
        if refusal is Unauthorized:
            response.setdefault("headers", {})["WWW-Authenticate"] = _header("`Bearer`.")
    for response in responses.values():
        if codes := response.pop("codes", None):
            response["description"] = "Code " + " or ".join(f"`{code}`" for code in dict.fromkeys(codes)) + "."
    return responses


def _header(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string"}, "description": description}


def _complete(document: dict[str, Any]) -> None:
    """What holds for every operation, or follows from what it already says."""
    for operations in document["paths"].values():
        for described in operations.values():
            for parameter in described.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["description"] = f"Id of the {parameter['name'].removesuffix('_id')}."
            for status, response in described["responses"].items():
                headers = response.setdefault("headers", {})
                headers["X-Request-ID"] = _header("Names this request in the log; the caller's own, if it is harmless.")
                if status.startswith("2") and _IDEMPOTENCY_KEY in described.get("parameters", ()):
                    headers["Idempotency-Status"] = _header("`replayed` if this is the first reply, sent once more.")


# Without a schema of its own a free value would allow what the stores cannot hold.
_JSON_VALUE = {
    "description": "Any JSON that is stored as sent: text without U+0000, integers of 64 bits.",
    "anyOf": [
        {"type": ["null", "boolean"]},
        {"type": "string", **NO_NUL},
        {"type": "integer", "minimum": -MAX_INTEGER - 1, "maximum": MAX_INTEGER},
        {"type": "number", "not": {"type": "integer"}},
        {"type": "array", "items": {"$ref": "#/components/schemas/JsonValue"}},
        {
            "type": "object",
            "propertyNames": NO_NUL,
            "additionalProperties": {"$ref": "#/components/schemas/JsonValue"},
        },
    ],
}


def install(app: FastAPI) -> None:
    """Serve /openapi.json and /docs."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
            template = "#/components/schemas/{model}"
            bodies = [(model, "validation") for model in (*_BODIES.values(), Problem)]
            _, definitions = models_json_schema(bodies, ref_template=template)  # type: ignore[arg-type] # literal modes
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            schemas["JsonValue"] = _JSON_VALUE
            document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            _complete(document)
            app.openapi_schema = document
        return app.openapi_schema

    async def page(request: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs-assets/swagger-ui-bundle.js",
            swagger_css_url="docs-assets/swagger-ui.css",
            swagger_favicon_url="docs-assets/favicon-32x32.png",
        )

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend the document
    app.add_route("/docs", page, include_in_schema=False)
    app.mount("/docs-assets", StaticFiles(directory=swagger_ui_path))


_DESCRIPTION = """
Runs execute workflows on machines. A run that has ended can be retried in place: see `POST /v1/runs/{run_id}/retry`.

Errors are RFC 9457 problem details with a stable `code`; 422 has the list form `{"detail": [{"loc", "msg", "type"}]}`.

Keys and query parameters that this service does not know are ignored. Those of the vendor's API that it knows and does not
support are refused with 422 `not_supported`: fields marked so, and in queries `search`, `deep_search=true`, `include`,
`tag_ids`, `include_tags=true` and `sort_mode=activity`.
"""
