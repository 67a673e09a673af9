"""What a command line says about a retry: values, files, and secrets, which never stand on it."""

import base64
import getpass
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class UsageError(Exception):
    """The command line cannot be meant like this; the message says how it is written. It repeats no secret."""


def moment(text: str, option: str) -> str:
    """`24h` back from now, or a time in RFC 3339. Raises UsageError."""
    if text[:-1].isdecimal() and text[-1:] in _UNITS:
        return (datetime.now(UTC) - timedelta(seconds=int(text[:-1]) * _UNITS[text[-1]])).isoformat()
    return time(text, option)


def time(text: str, option: str) -> str:
    """A time in RFC 3339; without a zone it is local. Raises UsageError."""
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except ValueError:
        raise UsageError(
            f"{option} takes a time like 2026-12-01T14:00:00Z or a duration like 30m, 24h or 7d."
        ) from None


def values(changes: list[str], whole: str | None, current: dict[str, Any] | None) -> dict[str, Any] | None:
    """The input values that are sent: `--values` replaces all of them, each `--set` changes one and keeps the others.

    `name=text` is a text, `name:=json` any JSON. None: nothing was said. Raises UsageError.
    """
    if whole is None and not changes:
        return None
    found: dict[str, Any] = dict(current or {}) if whole is None else _json_object(whole)
    for change in changes:
        name, mark, value = change.partition("=")
        if not mark or not name.rstrip(":"):
            raise UsageError("--set is written name=text, or name:=json for numbers, lists and objects.")
        if name.endswith(":"):
            try:
                found[name[:-1]] = json.loads(value)
            except ValueError:
                raise UsageError(f"--set {name}= is followed by something that is no JSON.") from None
        else:
            found[name] = value
    return found


def _json_object(text: str) -> dict[str, Any]:
    if text.startswith("@"):
        text = _read(Path(text[1:]), "--values").decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError("--values takes a JSON object, or @ and the path of a file with one.")
    return found


def secrets(given: list[str]) -> dict[str, Any]:
    """`name` is asked for without echo, `name=@file` is read from a file, `name=-` from standard input.

    Raises UsageError, also for a value on the command line: every user of the machine can read it there, and shells keep it.
    """
    found: dict[str, Any] = {}
    for one in given:
        name, mark, where = one.partition("=")
        if not name or (mark and where != "-" and not where.startswith("@")):
            raise UsageError(
                "A secret is never written on the command line. Use --secret name (you are asked for it), name=@file or name=-."
            )
        if name in found:
            raise UsageError(f"--secret {name} is given twice.")
        if not mark:
            found[name] = _ask(name)
        elif where == "-":
            found[name] = sys.stdin.read().rstrip("\n")
        else:
            found[name] = _read(Path(where[1:]), "--secret").decode("utf-8").rstrip("\n")
    return found


def _ask(name: str) -> str:
    if not sys.stdin.isatty():
        raise UsageError(f"--secret {name} has to be asked for, and this is no terminal. Use {name}=@file or {name}=-.")
    return getpass.getpass(f"{name}: ")


def files(given: list[str]) -> list[dict[str, str]]:
    """`path` or `path:target`, as the API takes them. Raises UsageError."""
    found = []
    for one in given:
        path, target = (one, "") if Path(one).exists() else one.partition(":")[::2]
        content = _read(Path(path), "--file")
        file = {"filename": Path(path).name, "content": base64.b64encode(content).decode("ascii")}
        found.append(file | ({"target_path": target} if target else {}))
    return found


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise UsageError(f"{option}: {path} cannot be read: {problem.strerror}.") from None
