"""The OpenAPI document that generators of clients read, made from the strict one.

The strict document (openapi.py) says all that JSON Schema can say about a value. Five widely used generators fail at parts of
that: schemas that refer to themselves, null as a type, unions of simple types, defaults that a client would send. This module
writes the same operations in OpenAPI 3.0.3 without those parts. The service itself checks what the document no longer says.
"""

from collections.abc import Iterator
from typing import Any

ANY_JSON = (
    "Any JSON that is stored as sent: text without U+0000, integers of 64 bits, and other numbers, also integers, that a double"
    " (IEEE 754) keeps. A number that would be changed is refused."
)

Document = dict[str, Any]
Schema = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
# Text without U+0000: nearly every text has this pattern, and no generator makes use of it.
_NO_NUL_PATTERN = "^[^\\u0000]*$"
# What OpenAPI 3.0 does not know, and titles, which only repeat a name.
_LEFT_OUT = frozenset({"title", "propertyNames", "contentEncoding", "examples", "const"})


def for_clients(document: Document) -> Document:
    """This document in the form that generators make working clients of. The strict document is not changed."""
    partial_updates = set(_bodies(document, "put", "patch"))
    bodies = set(_reachable(document, _bodies(document, "post", "put", "patch")))
    schemas = {
        name: _component(schema, is_update=name in partial_updates, is_body=name in bodies)
        for name, schema in document["components"]["schemas"].items()
        if name != "JsonValue"
    }
    paths = {
        path: {method: _operation(described) for method, described in operations.items()}
        for path, operations in document["paths"].items()
    }
    # "." is the folder of this document, so that requests reach the service under the prefix of a proxy, too.
    return document | {
        "openapi": "3.0.3",
        "servers": [{"url": "."}],
        "paths": paths,
        "components": document["components"] | {"schemas": schemas},
    }


def _bodies(document: Document, *methods: str) -> Iterator[str]:
    """Names of the schemas that requests of these methods have as their body."""
    for operations in document["paths"].values():
        for method in operations.keys() & set(methods):
            for content in operations[method].get("requestBody", {}).get("content", {}).values():
                yield content["schema"]["$ref"].removeprefix(_SCHEMAS)


def _reachable(document: Document, names: Iterator[str]) -> Iterator[str]:
    """These schemas, and those that they refer to."""
    waiting, seen = list(names), set[str]()
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            yield name
            waiting.extend(_references(document["components"]["schemas"][name]))


def _references(part: object) -> Iterator[str]:
    """Names of the schemas that this part of a document refers to."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"].removeprefix(_SCHEMAS)
        part = list(part.values())
    if isinstance(part, list):
        for one in part:
            yield from _references(one)


def _component(schema: Schema, *, is_update: bool, is_body: bool) -> Schema:
    """A named schema. With `is_update`, null means something else than absence. With `is_body`, it has no defaults: clients
    would send them."""
    plain = _schema(schema)
    for name, given in schema.get("properties", {}).items():
        field = plain["properties"][name]
        if "default" in given and not is_update:
            field.pop("nullable", None)  # null and absence mean the same
        if "default" in given and (is_body or given["default"] is None):
            default = field.pop("default")
            if default is not None:
                word = str(default).lower() if isinstance(default, bool) else str(default)
                field["description"] = f"{field.get('description', '')} Default: `{word}`.".lstrip()
    return plain


def _operation(described: Document) -> Document:
    described = dict(described)
    if "security" in described:
        scopes = " or ".join(f"`{scope}`" for way in described["security"] for scope in way["bearer"])
        described["description"] += f"\n\nScope: {scopes}."
        described["security"] = [{"bearer": []}]  # OpenAPI 3.0 has scopes for OAuth alone
    if "parameters" in described:
        described["parameters"] = [
            one | {"schema": _without_null(_schema(one["schema"]))} for one in described["parameters"]
        ]
    if "requestBody" in described:
        described["requestBody"] = described["requestBody"] | {"content": _content(described["requestBody"]["content"])}
    described["responses"] = {
        status: response | ({"content": _content(response["content"])} if "content" in response else {})
        for status, response in described["responses"].items()
    }
    return described


def _content(content: Document) -> Document:
    return {
        "application/octet-stream" if media_type == "*/*" else media_type: given | {"schema": _schema(given["schema"])}
        for media_type, given in content.items()
    }


def _without_null(schema: Schema) -> Schema:
    return {name: value for name, value in schema.items() if name != "nullable" and (name, value) != ("default", None)}


def _schema(schema: Schema) -> Schema:
    """One schema, and those within it, in the words of OpenAPI 3.0."""
    given, is_nullable = _single(schema)
    plain = {name: value for name, value in given.items() if name not in _LEFT_OUT}
    if plain.get("pattern") == _NO_NUL_PATTERN:
        del plain["pattern"]
    if plain.get("type") == "null":
        del plain["type"]
    if "const" in given:
        plain["enum"] = [given["const"]]
    if given.get("examples"):
        plain["example"] = given["examples"][0]
    if "properties" in plain:
        plain["properties"] = {name: _schema(value) for name, value in plain["properties"].items()}
    for name in ("items", "additionalProperties"):
        if isinstance(plain.get(name), dict):
            plain[name] = _schema(plain[name])
    if is_nullable and ("type" in plain or "$ref" in plain):
        plain["nullable"] = True
        if "enum" in plain:
            plain["enum"] = [*plain["enum"], None]
    if "$ref" in plain and len(plain) > 1:
        plain = {"allOf": [{"$ref": plain.pop("$ref")}], **plain}
    return plain


def _single(schema: Schema) -> tuple[Schema, bool]:
    """The one kind of value that a schema allows beside null, and whether it allows null.

    Of several kinds that are all text only that is left, and of others nothing: a schema that allows everything.
    """
    is_nullable = False
    while "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        is_nullable |= len(kinds) < len(schema["anyOf"])
        rest = {name: value for name, value in schema.items() if name != "anyOf"}
        if len(kinds) == 1:
            schema = kinds[0] | rest
        elif all(kind.get("type") == "string" for kind in kinds):
            schema = {"type": "string"} | rest
        else:
            schema = rest
    if schema.get("$ref") == f"{_SCHEMAS}JsonValue":
        schema = {"description": ANY_JSON} | {name: value for name, value in schema.items() if name != "$ref"}
    return schema, is_nullable
