"""What a body takes in memory while its request is served, for the budget of bytes in flight.

A unit is a byte of a file's base64: with its decoded form and what the stores make of it, it takes about two bytes and a half.
"""

import sys
from typing import Any

from pydantic import BaseModel

from app.config import MIB, Settings
from app.errors import Invalid, PayloadTooLarge

# What a value takes beside its own bytes.
_VALUE = 100
# A document is parsed, written as JSON, sent to PostgreSQL, and read and sent again in the reply.
_COPIES = 4
_BYTES_PER_UNIT = 2


def before(raw: bytes, settings: Settings) -> int:
    """Of a body that is going to be parsed. Raises Invalid for too many values in it."""
    values = count_values(raw, settings.max_json_values)
    if values > settings.max_json_values:
        sentence = f"May have at most {settings.max_json_values} JSON values in all."
        raise Invalid((("body",), sentence, "too_many_values"))
    return len(raw) + _VALUE * values


def after(raw: bytes, parsed: BaseModel, settings: Settings, values: int) -> int:
    """Of what was parsed; `values` is the part for their number. Raises PayloadTooLarge if no request may take so much."""
    files = _file_bytes(parsed) * 4 // 3
    documents = max(len(raw) - files, 0)
    # A text takes one, two or four bytes for each of its characters, whatever most of them are.
    texts = documents if raw.isascii() and b"\\u" not in raw else _text_bytes(parsed)
    units = values + files + (texts + _COPIES * documents) // _BYTES_PER_UNIT
    if units > settings.max_in_flight_bytes:
        raise PayloadTooLarge(
            "The values in the body take more memory than one request may; send fewer or smaller ones."
        )
    return units


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


def count_values(raw: bytes, enough: int) -> int:
    """About how many values there are, never less than there are; texts are looked at only if there seem to be too many."""
    pieces = [(start, start + MIB) for start in range(0, len(raw), MIB)]
    count = 1 + sum(_separators(raw[start:end]) for start, end in pieces)
    if count <= enough:
        return count
    count, in_text, escaped = 1, False, False
    for start, end in pieces:
        piece = raw[start + escaped : end].replace(b"\\\\", b"").replace(b'\\"', b"")
        escaped = piece.endswith(b"\\")
        parts = piece.split(b'"')  # every second one is text
        count += _separators(b"".join(parts[in_text::2]))
        in_text ^= len(parts) % 2 == 0
        if count > enough:
            break
    return count


def _separators(piece: bytes) -> int:
    return len(piece) - len(piece.translate(None, b",[{"))
