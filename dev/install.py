"""Install hash-locked lists with pip, and say what is going on: it takes a minute on a new machine.

    .venv/bin/python dev/install.py requirements.lock ...

pip by itself prints either three lines for each package or nothing at all.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

PIP = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--disable-pip-version-check",
    "--require-hashes",
    "--only-binary",
    ":all:",
]
LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)
FOUND = re.compile(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)==")
FETCHED = re.compile(r"\s+Downloading \S*?([^/\s]+)\.whl.*?(\([0-9.]+ [kMG]B\))")
UNREACHABLE = re.compile(
    r"connection broken by '(NewConnectionError|ConnectTimeoutError|NameResolutionError|ProxyError)"
)
SECONDS = 1 if sys.stdout.isatty() else 5  # between two words about it


def main(lists: list[str]) -> int:
    wanted = {name for file in lists for name in LOCKED.findall(Path(file).read_text(encoding="utf-8"))}
    print(f"Installing {len(wanted)} locked packages ...", flush=True)
    pip = subprocess.Popen(
        [*PIP, *(part for file in lists for part in ("-r", file))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    signal.signal(signal.SIGTERM, lambda *_: pip.terminate())
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pip, lines), daemon=True).start()
    try:
        said = _follow(lines, len(wanted))
    except KeyboardInterrupt:
        pip.wait()
        return 130
    if pip.wait() != 0:
        print(_reason(said), file=sys.stderr)
    return pip.returncode if pip.returncode >= 0 else 128 - pip.returncode


def _read(pip: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str | None]") -> None:
    assert pip.stdout is not None  # noqa: S101 - it is a pipe
    for line in pip.stdout:
        lines.put(line.rstrip())
    lines.put(None)


def _follow(lines: "queue.SimpleQueue[str | None]", count: int) -> list[str]:
    """Everything that pip says, and a word about it now and then."""
    said: list[str] = []
    found: set[str] = set()
    now, began, spoke = "asking the registry", time.monotonic(), time.monotonic()
    unpacking: tuple[int, float] | None = None
    while True:
        try:
            line = lines.get(timeout=SECONDS)
        except queue.Empty:
            line = ""
        if line is None:
            break
        said += [line] if line else []
        if match := FOUND.match(line):
            found.add(match[1])
            now = f"{len(found)} of {count}: {match[1]}"
        elif match := FETCHED.match(line):
            now = f"{len(found)} of {count}: {match[1].split('-')[0]} {match[2]}"
        elif line.startswith("Installing collected packages"):
            unpacking = line.count(",") + 1, time.time()
        if unpacking is not None:
            now = f"everything is here, unpacked {_unpacked(unpacking[1])} of {unpacking[0]}"
        if time.monotonic() - spoke >= SECONDS:
            spoke = time.monotonic()
            _say(f"  {spoke - began:3.0f} s  {now}")
    if sys.stdout.isatty():
        _say("")
    return said


def _reason(said: list[str]) -> str:
    """Why pip has failed: one sentence if nothing answers at the registry, else what pip said last."""
    if any(line.startswith("ERROR: No matching distribution") for line in said) and any(map(UNREACHABLE.search, said)):
        return (
            "No package registry can be reached, and nothing was installed: look at the network, then run make again."
        )
    return "\n".join(said[-20:])


def _unpacked(since: float) -> int:
    """How many packages are there since then: each gets its folder of metadata last."""
    folders = Path(sysconfig.get_path("purelib")).glob("*.dist-info/RECORD")
    return sum(1 for record in folders if record.stat().st_mtime >= since)


def _say(text: str) -> None:
    print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() else "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
