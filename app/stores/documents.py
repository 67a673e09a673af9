"""Documents: the SELECT lists and the JSON bytes of replies."""

from collections.abc import Iterable

import orjson


def columns(table: dict[str, str], names: Iterable[str] | None = None) -> str:
    """A SELECT list of these columns, which are SQL texts by name; all of them by default."""
    return ", ".join(f"{table[name]} AS {name}" for name in (table if names is None else names))


def rfc3339(time: str) -> str:
    """SQL for a time as `encode` writes it."""
    return f"""replace(to_char({time} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), '.000000Z', 'Z')"""


def encode(document: object) -> bytes:
    """JSON bytes: times as RFC 3339 in UTC with a Z. The driver reads the first and the last moment without an offset."""
    return orjson.dumps(document, option=orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC)
