"""Where the service is and with which key: RUNS_API_URL and RUNS_API_KEY, else a profile that `runs login` has stored.

Profiles are in one file of the user's configuration folder that only the user can read (mode 0600).
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

DEFAULT = "default"


class NotLoggedInError(Exception):
    """No address or key is known; the message says what to do."""


@dataclass(frozen=True)
class Profile:
    """One service and one key."""

    url: str
    key: str


def file() -> Path:
    return Path(typer.get_app_dir("runs-cli")) / "profiles.json"


def find(name: str | None) -> Profile:
    """The environment's, else the named profile. Raises NotLoggedInError."""
    url, key = os.environ.get("RUNS_API_URL"), os.environ.get("RUNS_API_KEY")
    if url and key:
        return Profile(url, key)
    stored = _read().get(name or os.environ.get("RUNS_PROFILE") or DEFAULT)
    if stored is None and not (url or key):
        raise NotLoggedInError("Log in first: runs login --url https://... (or set RUNS_API_URL and RUNS_API_KEY).")
    if stored is None:
        missing = "RUNS_API_KEY" if url else "RUNS_API_URL"
        raise NotLoggedInError(
            f"{missing} is not set, and there is no profile to take it from: runs login --url https://..."
        )
    return Profile(url or stored.url, key or stored.key)


def store(name: str | None, profile: Profile) -> Path:
    """Write a profile. The file is never readable by others, not even for a moment."""
    path = file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    profiles = {one: asdict(known) for one, known in _read().items()} | {name or DEFAULT: asdict(profile)}
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        json.dump(profiles, out, indent=1)
    fresh.replace(path)
    return path


def _read() -> dict[str, Profile]:
    try:
        written = json.loads(file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: Profile(**values) for name, values in written.items()}
