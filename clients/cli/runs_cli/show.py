"""What people see: tables, times and texts of others, in which no control character reaches the terminal."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# rich honours NO_COLOR and a stream that is no terminal by itself.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

STYLES = {
    "success": "green",
    "error": "red",
    "task_failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "scheduling": "blue",
    "connected": "green",
    "disconnected": "red",
}


def clean(text: object) -> str:
    """A text of somebody else's, with control and direction characters escaped: they could change what the terminal shows."""
    return "".join(_visible(character) for character in str(text))


def _visible(character: str) -> str:
    if character.isprintable() or character == " ":
        return character
    if unicodedata.category(character) == "Cs":
        return "\\ufffd"
    return character.encode("unicode_escape").decode("ascii")


def word(text: object) -> Text:
    """A status in its colour."""
    return Text(clean(text), style=STYLES.get(str(text), ""))


def age(moment: str | None) -> str:
    """How long ago, in one unit."""
    if moment is None:
        return ""
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())
    sign, seconds = ("in " if seconds < 0 else ""), abs(seconds)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{sign}{seconds // length}{unit}"
    return f"{sign}{seconds}s"


def local(moment: str | None) -> str:
    """A time in the local zone, to the second."""
    return "" if moment is None else f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M:%S}"


def first_line(lines: Sequence[str] | None, most: int = 80) -> str:
    """The beginning of an error."""
    text = clean((lines or [""])[0])
    return text if len(text) <= most else text[: most - 1] + "…"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table that survives a narrow terminal."""
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row))
    return made


def as_json(value: Any, *, indent: int | None = 2) -> None:
    """JSON for programs: with escapes for all that is not ASCII, so that nothing in it can act on a terminal."""
    print(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))
