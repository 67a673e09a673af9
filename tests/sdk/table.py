"""The compatibility table of docs/coming-from-the-vendor.md, from what the suite saw; `python -m tests.sdk.table` writes it."""

import json
import re
from pathlib import Path
from typing import Any

from tests.sdk.environment import ALL, CACHE, NEEDS_UNKNOWN_KEY

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "coming-from-the-vendor.md"
BLOCK = re.compile(r"(?<=<!-- sdk:begin -->\n).*?(?=<!-- sdk:end -->)", re.DOTALL)
GROUPS = ("machines", "pools", "workflows", "runs", "retry", "sessions", "run_attachments", "errors")
HEAD = f"| SDK | {' | '.join(GROUPS)} | Idempotency-Key | note |\n|{'---|' * (len(GROUPS) + 3)}\n".replace("_", " ")


def row(report: dict[str, Any]) -> str:
    """One version: a group works if all of its methods do, sync and async; what the SDK itself cannot do is a note."""
    cells = []
    for group in GROUPS:
        works = all(outcome == "ok" for outcome in report["results"][group].values())
        limited = any(where.partition(".")[0] == group for where in report["limits"])
        cells.append(("partly" if limited else "yes") if works else "no")
    sends_keys = all(writes["sends_keys"] for writes in report["writes"].values())
    notes = sorted(set(report["limits"].values()))
    if report["version"] == NEEDS_UNKNOWN_KEY:
        notes = ["demands `run_kind` of every run, a key that only 2.2.35 and 2.2.36 know: use 2.2.37 or newer"]
    return (
        f"| {report['version']} | {' | '.join(cells)} | {'sent' if sends_keys else 'not sent'} | {'; '.join(notes)} |\n"
    )


def keep(report: dict[str, Any]) -> None:
    """For the table, when all versions have been seen."""
    _file(report["version"]).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _file(version: str) -> Path:
    return CACHE / f"{version}.json"


def main() -> None:
    rows = [row(json.loads(_file(version).read_text(encoding="utf-8"))) for version in ALL]
    text, found = BLOCK.subn(lambda _: HEAD + "".join(rows), PAGE.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"{PAGE.name} has no line <!-- sdk:begin --> followed by <!-- sdk:end -->.")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
