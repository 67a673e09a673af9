"""The runs API: an HTTP service that runs workflows on machines and retries finished runs in place."""

import subprocess
from pathlib import Path

__version__ = "0.2.0"  # as in pyproject.toml; a test compares them

_HERE = Path(__file__).resolve().parent

# Where migrations, alembic.ini and docs are: within the package in a wheel, beside it in a checkout and in the image.
FILES = _HERE / "packaged" if (_HERE / "packaged").is_dir() else _HERE.parent


def commit() -> str:
    """The commit that this is built from: written down by a release and by the image, asked of git in a checkout."""
    written = _HERE / "COMMIT"
    if written.exists():
        return written.read_text(encoding="ascii").strip()
    if not (FILES / ".git").exists():
        return "unknown"
    asked = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607 - whichever git the developer uses
        cwd=FILES,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"
