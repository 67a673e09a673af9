"""The weight of a body: the memory that it takes while its request is served, for the memory budget.

A body weighs one byte of the budget for each byte of a file's base64. With its decoded form and the copies that stores
make, such a byte takes about 2.5 bytes of memory.
"""

import sys
from typing import Any

from pydantic import BaseModel

from app.config import MIB, Settings
from app.errors import Invalid, PayloadTooLarge

# Bytes that a value takes beside its own.
_VALUE = 100
# A document is parsed, written as JSON, sent to PostgreSQL, and read and sent again in the reply.
_COPIES = 4
_BYTES_PER_WEIGHT = 2
_PIECE = 32 * 1024  # is counted at once


def before(raw: bytes, settings: Settings, most: int | None = None) -> int:
    """The weight of a body that is going to be parsed; `most` is most_values of it, if that is known.

    Raises Invalid for too many values in it.
    """
    values = most_values(raw) if most is None else most
    if values > settings.max_json_values:
        values = _count_values(raw, settings.max_json_values)
    if values > settings.max_json_values:
        sentence = f"May have at most {settings.max_json_values} JSON values in all."
        raise Invalid((("body",), sentence, "too_many_values"))
    return len(raw) + _VALUE * values


def after(raw: bytes, parsed: BaseModel, settings: Settings, values: int) -> int:
    """The weight of a parsed body; `values` is a part of it. Raises PayloadTooLarge if no request may take so much."""
    files = _file_bytes(parsed) * 4 // 3
    documents = max(len(raw) - files, 0)
    # A text takes one, two or four bytes for each of its characters, whatever most of them are.
    texts = documents if raw.isascii() and not _has_escapes(raw) else _text_bytes(parsed)
    weight = values + files + (texts + _COPIES * documents) // _BYTES_PER_WEIGHT
    if weight > settings.max_in_flight_bytes:
        raise PayloadTooLarge(
            "The values in the body take more memory than one request may; send fewer or smaller ones."
        )
    return weight


def _file_bytes(parsed: BaseModel) -> int:
    files = getattr(parsed, "file_inputs", None) or (parsed,)
    return sum(len(getattr(file, "content", b"")) for file in files)


def _text_bytes(parsed: BaseModel) -> int:
    total = 0
    stack: list[Any] = [value for _, value in parsed]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            total += sys.getsizeof(value)
        elif isinstance(value, dict):
            stack.extend(value)
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return total


def most_values(raw: bytes) -> int:
    """An upper bound of the number of values: separators in texts count, too. It takes up to 0.5 ms for each MB."""
    return 1 + sum(_separators(raw, start, start + _PIECE) for start in range(0, len(raw), _PIECE))


def _count_values(raw: bytes, enough: int) -> int:
    """The number of values outside of texts, or a little more; counting ends beyond `enough`."""
    count, in_text, escaped = 1, False, False
    for start in range(0, len(raw), MIB):
        piece = raw[start + escaped : start + MIB].replace(b"\\\\", b"").replace(b'\\"', b"")
        escaped = piece.endswith(b"\\")
        parts = piece.split(b'"')  # every second one is text
        values = b"".join(parts[in_text::2])
        count += _separators(values, 0, len(values))
        in_text ^= len(parts) % 2 == 0
        if count > enough:
            break
    return count


def _separators(raw: bytes, start: int, end: int) -> int:
    # To find that a byte is not there takes a tenth of the time of counting; base64 has none of them.
    if raw.find(b",", start, end) < 0 and raw.find(b"[", start, end) < 0 and raw.find(b"{", start, end) < 0:
        return 0
    piece = raw[start:end]
    return len(piece) - len(piece.translate(None, b",[{"))


def _has_escapes(raw: bytes) -> bool:
    """Whether a character is written as its number. To find one byte takes a fiftieth of the time of finding two."""
    first = raw.find(b"\\")
    return first >= 0 and raw.find(b"\\u", first) >= 0
