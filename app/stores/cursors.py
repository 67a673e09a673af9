"""Cursors: where the next page of a list begins, written as text that a caller sends back unchanged.

A cursor of a list holds the list's name and the columns of its order, of the last row that was shown. A cursor of events holds
the place of an event in the order in which transactions began. A cursor that this service did not write, or that belongs to
another list, is refused.
"""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from app.errors import Invalid

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(moment: object) -> int:
    """A moment as a cursor has it."""
    assert isinstance(moment, datetime)  # noqa: S101 - what the column of an order holds
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _moment(written: str) -> datetime:
    return _EPOCH + timedelta(microseconds=int(written))


@dataclass(frozen=True, slots=True)
class _Column:
    """How a value of an order's column is written in a cursor."""

    type: str
    written: str  # SQL for it
    pattern: str
    read: Callable[[str], object]


def _time(name: str) -> _Column:
    return _Column("timestamptz", f"(extract(epoch FROM {name}) * 1000000)::bigint", "-?[0-9]{1,18}", _moment)


_COLUMNS = {
    "created_at": _time("created_at"),
    "changed_at": _time("changed_at"),
    "id": _Column("uuid", "id", "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", UUID),
    "attempt": _Column("integer", "attempt", "[0-9]{1,9}", int),
    "place": _Column("integer", "place", "[0-9]{1,9}", int),
    "found_before": _Column("bigint", "", "[0-9]{1,9}", int),  # no column: how many rows earlier pages have shown
}


def cursor(name: str, last: str) -> str:
    """The cursor of the list with this name after its row `last`."""
    return base64.urlsafe_b64encode(f"{name} {last}".encode()).decode().rstrip("=")


def read_place(order: Sequence[str], last: str) -> dict[str, object]:
    """The values of `place_bound` for the row `last`, as a cursor has it."""
    return {f"after_{name}": _COLUMNS[name].read(text) for name, text in zip(order, last.split(" "), strict=True)}


def place_after(name: str, order: Sequence[str], after: str) -> dict[str, object]:
    """The values of `place_bound` for the row that a page begins after. Raises Invalid."""
    columns = [_COLUMNS[column] for column in order]
    pattern = " ".join([re.escape(name), *(f"({column.pattern})" for column in columns)])
    try:
        written = base64.b64decode(after + "=" * (-len(after) % 4), altchars=b"-_", validate=True).decode("ascii")
        found = re.fullmatch(pattern, written)
        if found is not None and cursor(name, written.partition(" ")[2]) == after:
            return read_place(order, " ".join(found.groups()))
    except (binascii.Error, ValueError, OverflowError):
        pass
    sentence = "Must be `next` of an earlier page of this list, or absent for the first."
    raise Invalid((("query", "after"), sentence, "cursor"))


def place_written(order: Sequence[str]) -> str:
    """SQL that writes the columns of an order as a cursor has them."""
    return f"concat_ws(' ', {', '.join(f'({_COLUMNS[name].written})::text' for name in order)})"


def place_bound(order: Sequence[str]) -> str:
    """SQL for a row's place: a parameter `:after_` and the name of each column of the order."""
    return ", ".join(f":after_{name}::{_COLUMNS[name].type}" for name in order)


# --- events -----------------------------------------------------------------------------------------------------------

_MAX_INTEGER: Final = 2**63 - 1
_EVENT: Final = re.compile(r"([0-9]{1,19})\.([0-9]{1,19})")

EVENTS_BEGIN: Final = "0.0"


def event_cursor(xact: int, number: int) -> str:
    """The cursor after an event: its transaction, and its number. It stays good for the life of the database."""
    return f"{xact}.{number}"


def event_place(after: str | None) -> tuple[int, int]:
    """The transaction and the number in a cursor of events; None: before the first event. Raises Invalid."""
    found = _EVENT.fullmatch(after or EVENTS_BEGIN)
    xact, number = (int(part) for part in found.groups()) if found else (_MAX_INTEGER + 1, 0)
    if max(xact, number) > _MAX_INTEGER:
        raise Invalid(
            (("query", "after"), "Must be `next` of an earlier reply, or absent for the beginning.", "cursor")
        )
    return xact, number
