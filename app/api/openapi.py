"""The OpenAPI documents, made from what each route declares.

Bodies are read by requests.py and replies are built as bytes, so FastAPI cannot see them: each route names them with
`operation()`. The strict document says all that JSON Schema 2020-12 can say; the tests use it. /openapi.json is the same in
the form that generators of clients can read (client_document.py).
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import orjson
from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from app.api.client_document import ANY_JSON, for_clients
from app.api.scopes import BOUND
from app.api.static_files import StaticFile
from app.api.validation import refuse_unsupported_query
from app.errors import (
    TITLES,
    DatabaseUnavailable,
    IdempotencyInProgress,
    InsufficientScope,
    InternalError,
    Invalid,
    Overloaded,
    PayloadTooLarge,
    QuotaExceeded,
    Refusal,
    RequestTimeout,
    RetryTooSoon,
    Unauthorized,
    UnsupportedMediaType,
)
from app.schemas.problems import Problem, ValidationProblem
from app.schemas.values import MAX_INTEGER, NO_NUL, Payload

_BODIES: dict[str, type[Payload]] = {}

_REFUSED_ALWAYS: tuple[type[Refusal], ...] = (Invalid, InternalError, DatabaseUnavailable, Overloaded)
_REFUSED_BODIES = (RequestTimeout, PayloadTooLarge, UnsupportedMediaType)

_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "1 to 255 visible ASCII characters. A resend with the same key gets the first reply and changes nothing. "
    "Instead of a long reply (IDEMPOTENCY_MAX_REPLY_BYTES) it gets what that showed, as it is now; of what is gone, a 404.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"},
}


IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "description": "ETags of earlier replies to the same request: 304 without a body if the reply would be as one of them.",
    "schema": {"type": "string"},
}
ETAG = {"ETag": {"description": "Weak; for If-None-Match.", "schema": {"type": "string"}}}


def operation(
    *refusals: type[Refusal],
    body: type[Payload] | None = None,
    scope: str | Sequence[str] = (),
    bound: str | None = None,
    write: bool = False,
    public: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of a route: the scope that it needs (or one of several), its refusals, its body, and for a write the
    Idempotency-Key.

    A public route needs no API key. A key that is bound to a machine needs the scope `bound`, and sees only what is that
    machine's; None: such a key has no use for the route. A body may be absent if none of its fields is required.
    """
    scopes = [scope] if isinstance(scope, str) else list(scope)
    if public == bool(scopes):
        raise TypeError("a route is public or names a scope")
    always = _REFUSED_ALWAYS if public else (Unauthorized, InsufficientScope, QuotaExceeded, *_REFUSED_ALWAYS)
    of_body = _REFUSED_BODIES if write or body is not None else ()
    possible = (*always, *of_body, *((IdempotencyInProgress,) if write else ()), *refusals)
    extra: dict[str, Any] = {} if public else {"security": [{"bearer": [name]} for name in scopes], BOUND: bound}
    if write:
        extra["parameters"] = [_IDEMPOTENCY_KEY]
    if body is not None:
        _BODIES[body.__name__] = body
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        required = any(field.is_required() for field in body.model_fields.values())
        content = {"schema": schema, "examples": body.examples()}
        extra["requestBody"] = {"required": required, "content": {"application/json": content}}
    described: dict[str, Any] = {"responses": _responses(possible), "openapi_extra": extra}
    if not write and body is None and not public:
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
                "content": {
                    Refusal.media_type: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}},
                },
            },
        )
        response["content"][Refusal.media_type]["examples"].setdefault(refusal.code, {"value": _problem(refusal)})
        if refusal.status == 503 or refusal in (IdempotencyInProgress, QuotaExceeded, RetryTooSoon):
            response.setdefault("headers", {})["Retry-After"] = _header("Seconds.")
        if refusal is IdempotencyInProgress:
            response["headers"]["Idempotency-Status"] = _header("`in_progress`, with that code alone: send it again.")
        if refusal is QuotaExceeded:
            response["headers"]["RateLimit-Policy"] = _header('The quota, as in `"key-requests";q=600;w=60`.')
            response["headers"]["RateLimit"] = _header('What is left of it, as in `"key-requests";r=0;t=12`.')
        if refusal in (Unauthorized, InsufficientScope):
            response.setdefault("headers", {})["WWW-Authenticate"] = _header("`Bearer`, as in RFC 6750.")
    for response in responses.values():
        if "content" in response:
            codes = response["content"][Refusal.media_type]["examples"]
            response["description"] = "Code " + " or ".join(f"`{code}`" for code in codes) + "."
    return responses


def _problem(refusal: type[Refusal]) -> dict[str, Any]:
    """An example of the reply. The sentences that depend on the run are not known here."""
    members = {"violated-policies": ["key-requests"]} if refusal is QuotaExceeded else {}
    return {
        "type": refusal.problem_type(),
        "title": TITLES[refusal.status],
        "status": refusal.status,
        "detail": refusal.detail or "What happened, and what to do.",
        "instance": "urn:request:9f4c7a1d5b3e4f60a2b8c6d0e1f23456",
        "code": refusal.code,
        **members,
    }


def unique_id(route: APIRoute) -> str:
    """An operation's id is its function's name, in the document's style. Swagger UI takes an underscore for a space."""
    first, *rest = route.name.split("_")
    return first + "".join(word.title() for word in rest)


def _header(description: str) -> dict[str, Any]:
    return {"schema": {"type": "string"}, "description": description}


def _complete(document: dict[str, Any]) -> None:
    """What holds for every operation, or follows from what it already says."""
    for operations in document["paths"].values():
        for described in operations.values():
            if "description" in described:  # else the framework's: the function's name once more
                described["summary"] = re.split(r"[.:;] |\.?\n|\.$", described["description"], maxsplit=1)[0]
            for parameter in described.get("parameters", ()):
                if parameter["in"] == "path" and parameter["name"].endswith("_id"):
                    parameter["description"] = f"Id of the {parameter['name'].removesuffix('_id')}."
            for status, response in described["responses"].items():
                headers = response.setdefault("headers", {})
                headers["X-Request-ID"] = _header("Names this request in the log; the caller's own, if it is harmless.")
                if (status.startswith("2") or status == "404") and _IDEMPOTENCY_KEY in described.get("parameters", ()):
                    headers["Idempotency-Status"] = _header(
                        "`replayed` if the first request with this key has taken effect."
                    )


# Without a schema of its own a free value would allow what the stores cannot hold.
_JSON_VALUE = {
    "description": ANY_JSON,
    "anyOf": [
        {"type": ["null", "boolean"]},
        {"type": "string", **NO_NUL},
        # Larger integers are accepted if a double keeps them. No schema can say that; the description does.
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


# Descriptions of fields that are the same in every reply.
_USUAL_DESCRIPTIONS = {
    "id": "Identifies it.",
    "run_id": "The run.",
    "workflow_id": "The run's workflow.",
    "organization_id": "The organization that it belongs to.",
    "name": "Its name.",
    "status": "Its status.",
    "items": "The items of this page.",
    "filename": "The file's name, without a path.",
    "content_type": "The file's media type.",
    "attachment_type": "`input`: a file for the machine. `output`: a file that the executor handed in.",
    "created_at": "When it was created.",
    "updated_at": "When it was changed last.",
    "started_at": "When the work began.",
    "ended_at": "When it ended.",
    "retried_at": "When it was retried.",
    "attempt": "The attempt, counted from 1.",
    "session_id": "The session that it belongs to.",
    "pools": "The pools that it is in.",
    "machines": "The machines in it.",
    "detail": "Everything that is wrong with the request; at most 20 entries.",
}


def strict_document(app: FastAPI) -> dict[str, Any]:
    """What the service accepts and answers, as exactly as OpenAPI 3.1 can say it."""
    document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    template = "#/components/schemas/{model}"
    bodies = [(model, "validation") for model in (*_BODIES.values(), Problem)]
    _, definitions = models_json_schema(bodies, ref_template=template)  # type: ignore[arg-type] # literal modes
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    schemas["JsonValue"] = _JSON_VALUE
    document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            if "description" not in field:
                referred = schemas.get(field.get("$ref", "").rpartition("/")[2], {})
                if explained := _USUAL_DESCRIPTIONS.get(name) or referred.get("description"):
                    field["description"] = explained
    _complete(document)
    return _with_readable_names(document)


def _with_readable_names(document: dict[str, Any]) -> dict[str, Any]:
    """`Page_RunEventResponse_`, as Pydantic calls a page of those, becomes RunEventPage."""
    names = document["components"]["schemas"].keys()
    readable = {name: re.sub(r"^(?:Searched)?Page_(\w+?)(Response)?_$", r"\1Page", name) for name in names}
    if len(set(readable.values())) < len(readable):
        raise TypeError("two schemas of the OpenAPI document would have one name")
    text = orjson.dumps(document).decode()
    for name, better in readable.items():
        text = text.replace(f'"#/components/schemas/{name}"', f'"#/components/schemas/{better}"')
    named: dict[str, Any] = orjson.loads(text)
    named["components"]["schemas"] = {readable[name]: one for name, one in named["components"]["schemas"].items()}
    return named


def install(app: FastAPI) -> None:
    """Make the document for clients, and serve it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = for_clients(strict_document(app))
        return app.openapi_schema

    @cache
    def file() -> StaticFile:
        return StaticFile.of("openapi.json", orjson.dumps(app.openapi()))

    async def serve(request: Request) -> Response:
        return file().reply(request)

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend the document
    app.add_route("/openapi.json", serve, include_in_schema=False)


_DESCRIPTION = """
Runs execute workflows on machines. A run that has ended can be retried in place: see `POST /v1/runs/{run_id}/retry`.

Errors are RFC 9457 problem details with a stable `code`; 422 has the list form `{"detail": [{"loc", "msg", "type"}]}`.

Each GET answers HEAD, too: with the same status and headers, without a body, at once (`wait` is ignored). Each path answers
OPTIONS with 204 and `Allow`, without a key.

Bodies are UTF-8. Numbers in them are doubles (IEEE 754): one that a double does not give back as the same decimal is refused
with 422 `number_changed`, and is to be sent as a string. Whole numbers of 64 bits are kept exactly. The path with its query has
at most 8 KiB (else 414) and 100 parameters; a parameter that is no list comes once.

Keys and query parameters that this service does not know are ignored. Those of the vendor's API that it knows and does not
support are refused with 422 `not_supported`: fields marked so, and in queries `tag_ids`, `include_tags=true`,
`sort_mode=activity`, and `search`, `deep_search=true` and `include` where a route does not have them.
"""
