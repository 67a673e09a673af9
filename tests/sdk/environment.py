"""One virtual environment per SDK version under .cache/sdk, made when it is first needed and kept.

The lists in locks/ are hash-locked. They name what SDKs before 2.2.59 import without asking for it: python-dateutil, pydantic.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache" / "sdk"

IN_MAKE_TEST = ("2.1.13", "2.1.20", "2.2.69")
ALL = ("2.1.12", "2.1.13", "2.1.20", "2.2.8", "2.2.22", "2.2.27", "2.2.36", "2.2.59", "2.2.69")
NEEDS_UNKNOWN_KEY = "2.2.36"
NEWEST = ALL[-1]
RENEWING = os.environ.get("SDK_VERSIONS") == "all"  # the compatibility table is written from this run
VERSIONS = ALL if RENEWING else IN_MAKE_TEST


def python(version: str) -> Path:
    """The interpreter that has this SDK version."""
    return installed(HERE / "locks" / f"{version}.txt", version)


def installed(lock: Path, name: str) -> Path:
    """The interpreter with the packages of this list; the first caller makes it, others wait (pytest runs in parallel)."""
    made_of = hashlib.sha256(lock.read_bytes() + sys.version.encode() + sys.base_prefix.encode()).hexdigest()
    home = CACHE / name
    stamp = home / "made-of"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != made_of:
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, symlinks=True)  # without pip: ours installs into it, which is faster
            install = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
            install += ["--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:", "-r", str(lock)]
            done = subprocess.run(install, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{lock.name} cannot be installed:\n{done.stdout}{done.stderr}"
            stamp.write_text(made_of, encoding="utf-8")
    return home / "bin" / "python"


def command(version: str, script: str) -> list[str]:
    """Run a script of this folder with an SDK version; -I keeps our own packages out of it."""
    return [str(python(version)), "-I", str(HERE / script)]


def environment() -> dict[str, str]:
    """What the script sees of ours: no proxies, no settings."""
    return {"PATH": os.environ["PATH"]}


def run(version: str, script: str, job: object, seconds: float = 120) -> Any:
    """The script's JSON answer to a JSON job."""
    done = subprocess.run(
        command(version, script),
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, f"{script} with SDK {version} ended with {done.returncode}:\n{done.stderr}"
    return json.loads(done.stdout)
