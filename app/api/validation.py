"""What a caller is told of an invalid request: the place, a sentence of ours and a code, never the input."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request

from app.errors import Invalid

# The content of these fields is the caller's own. An error inside them is reported at the field, never at a key of the caller.
FREE_FORM = frozenset(
    {
        "input_values",
        "sensitive_input_values",
        "output_data",
        "run_message_history",
        "model_metadata",
        "usage_metadata",
    }
)

# One sentence per kind of error. Pydantic's own sentences can quote the input; what is filled in here is a bound or the allowed
# values, which are ours.
SENTENCES = {
    "base64": "Must be base64 as in RFC 4648 section 4, padded and without line breaks.",
    "bool_parsing": "Must be true or false.",
    "bool_type": "Must be true or false.",
    "bytes_type": "Must be a string of base64.",
    "datetime_from_date_parsing": "Must be a date and time as in RFC 3339, like 2026-01-31T12:00:00Z.",
    "datetime_parsing": "Must be a date and time as in RFC 3339, like 2026-01-31T12:00:00Z.",
    "dict_type": "Must be an object.",
    "enum": "Must be {expected}.",
    "string_pattern_mismatch": "Must match {pattern}.",
    "extra_forbidden": "Has a field that is not known here; leave it out.",
    "filename": "Must be a bare file name: no drive, no separators, no control characters, not only dots, at most 255 bytes.",
    "finite_number": "Numbers must be finite, and at most about 1.8e308; send a larger one as a string.",
    "float_parsing": "Must be a number.",
    "float_type": "Must be a number.",
    "greater_than_equal": "Must be {ge} or more.",
    "int_parsing": "Must be an integer.",
    "int_parsing_size": "Integers must fit 64 bits.",
    "int_type": "Must be an integer.",
    "json_encoding": "The body is not UTF-8 (RFC 8259); it may be UTF-16, Latin-1 or Windows-1252. Encode it as UTF-8.",
    "json_invalid": "The body is not valid JSON (RFC 8259), or nested deeper than 200 levels.",
    "less_than_equal": "Must be {le} or less.",
    "list_type": "Must be an array.",
    "literal_error": "Must be {expected}.",
    "media_type": "Must be a media type, like text/csv or text/plain; charset=utf-8.",
    "missing": "This field is required.",
    "model_type": "Must be an object.",
    "name_too_long": "Names in it may have at most {max_length} characters.",
    "none_required": "Only null is accepted here.",
    "not_supported": "Not supported by this service; leave it out.",
    "number_changed": "A number in it would be changed: numbers are doubles (IEEE 754), only whole numbers of 64 bits are kept"
    " exactly. Nothing was changed; send it as a string.",
    "reference_not_supported": 'An object whose only key is "$ref" is not supported by this service; send the value itself.',
    "secret_alias": "The value of {name} is an alias, as replies show it, not a secret. Nothing was changed. Leave"
    " sensitive_input_values out to keep the stored secrets, or send the secrets themselves.",
    "same_path": "Another file of this request would land on the same path (case, and dots and spaces at its end, make no"
    " difference). Nothing was changed; give each file its own target_path.",
    "string_nul": "The character U+0000 is not allowed.",
    "string_too_long": "May have at most {max_length} characters.",
    "string_too_short": "Must have {min_length} or more characters.",
    "string_type": "Must be a string.",
    "string_unicode": "Must be valid Unicode, without lone surrogates.",
    "target_path": "Must be a path on the machine without . or .. parts and without control characters.",
    "terminal_status": "Must be {expected}.",
    "time_or_duration": "Must be a date and time as in RFC 3339, like 2026-01-31T12:00:00Z, or how long ago, like 24h.",
    "too_long": "May have at most {max_length} entries.",
    "too_short": "Must have {min_length} or more entries.",
    "too_many_bytes": "May have at most {max_bytes} bytes as UTF-8.",
    "too_many_bytes_in_all": "All entries together may have at most {max_bytes} bytes as JSON.",
    "uuid_parsing": "Must be a UUID.",
    "uuid_type": "Must be a UUID.",
    "windows_filename": 'Windows cannot store a file of this name. It may have none of < > : " / \\ | ? *, may not end with a'
    " dot or a space, and may not be a device, like CON or COM1.txt.",
    "windows_path": "Windows cannot store a file at this path. Only a drive may have a colon, and no part of it may have one of"
    ' < > " | ? *, end with a dot or a space, be a device, like CON or COM1.txt, or have more than 255 characters.',
}
# Kinds of error that callers know under another name.
_KINDS = {"reference_not_supported": "not_supported"}
MAX_ERRORS = 20


def invalid(errors: Iterable[Any], prefix: tuple[str, ...] = ()) -> Invalid:
    """Pydantic's errors as our 422: where and what, never the input."""
    listed: dict[tuple[tuple[str | int, ...], str], tuple[tuple[str | int, ...], str, str]] = {}
    for error in errors:
        kind = error["type"]
        loc = place_of(prefix + tuple(error["loc"]))
        if kind == "extra_forbidden":  # its last part is the caller's own
            loc = loc[:-1]
        listed.setdefault((loc, kind), (loc, _sentence(kind, error.get("ctx", {})), _KINDS.get(kind, kind)))
    return Invalid(*list(listed.values())[:MAX_ERRORS])


def _sentence(kind: str, bounds: dict[str, Any]) -> str:
    return SENTENCES.get(kind, "Is not valid.").format_map(bounds)


def place_of(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The place of an error that a caller is told: never inside a field of FREE_FORM."""
    for position, part in enumerate(loc):
        if part in FREE_FORM:
            return loc[: position + 1]
    return loc


# Query parameters of the vendor's API that would change what is found or shown, and the values that do not.
_FALSE = frozenset({"", "false", "f", "no", "n", "off", "0"})
_UNSUPPORTED_QUERY = {
    "search": frozenset({""}),
    "deep_search": _FALSE,
    "include": frozenset({""}),
    "tag_ids": frozenset({""}),
    "include_tags": _FALSE,
    "sort_mode": frozenset({"", "created_at_desc"}),
}


async def refuse_unsupported_query(request: Request) -> None:
    """Raises Invalid for a parameter of the vendor's that this route does not support; unknown ones are ignored."""
    supported = request.scope["route"].parameters
    given = [(name, value.lower()) for name, value in request.query_params.multi_items() if name not in supported]
    refused = {name for name, value in given if value not in _UNSUPPORTED_QUERY.get(name, (value,))}
    if refused:
        raise Invalid(*((("query", name), SENTENCES["not_supported"], "not_supported") for name in sorted(refused)))


def refuse_repeated(query: bytes, names: Collection[str]) -> None:
    """Raises Invalid for a parameter of these names that the query has more than once: it is not clear which one counts."""
    given = Counter(name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    repeated = sorted(name for name, count in given.items() if count > 1 and name in names)
    if repeated:
        raise Invalid(*((("query", name), "Send this parameter only once.", "repeated") for name in repeated))
