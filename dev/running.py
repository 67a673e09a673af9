"""Find the stack that `make run` has started, and use it: `python -m dev.running psql|bao|keys|stop|reset [argument ...]`.

`make psql`, `make bao`, `make keys`, `make stop` and `make reset` call this. DATA_DIR names a stack. Without it, the stack that
runs is used.
"""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / ".data"
# Links to the folders of stacks that this checkout has started; a stale link is ignored.
STARTED = ROOT / ".cache" / "stacks"
STOP_SECONDS = 60


class NoStackError(Exception):
    """No stack, or more than one, was found; the message says what to do."""


@contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """Make this process the one that runs the stack in `data_dir`. Raises BlockingIOError if another process does."""
    with _lock_file(data_dir) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        link = STARTED / str(os.getpid())
        with suppress(OSError):  # a checkout that cannot be written only lacks this convenience
            STARTED.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(data_dir)
        try:
            yield
        finally:
            with suppress(OSError):
                link.unlink(missing_ok=True)


def is_running(data_dir: Path) -> bool:
    """Whether a process runs the stack in this folder."""
    if not (data_dir / "lock").exists():
        return False
    with _lock_file(data_dir) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find() -> Path:
    """The folder of the running stack: the one in DATA_DIR, else the only one that runs. Raises NoStackError."""
    if named := os.environ.get("DATA_DIR"):
        folder = Path(named).resolve()
        if not is_running(folder):
            raise NoStackError(f"No stack runs in {folder}. Start it in another terminal: make run DATA_DIR={named}")
        return folder
    folders = {link.resolve() for link in STARTED.glob("*")} | {DEFAULT}
    running = sorted(folder for folder in folders if is_running(folder))
    if not running:
        raise NoStackError("No stack runs. Start it in another terminal: make run")
    if len(running) > 1:
        raise NoStackError(f"Several stacks run. Name one: DATA_DIR={' or DATA_DIR='.join(map(str, running))}")
    return running[0]


def facts(data_dir: Path) -> dict[str, str]:
    """What the stack wrote for shells: addresses, keys and ids."""
    lines = (data_dir / "dev.env").read_text(encoding="utf-8")
    return dict(part.split("=", 1) for part in shlex.split(lines))


def _lock_file(data_dir: Path) -> IO[str]:
    return (data_dir / "lock").open("a+", encoding="utf-8")


def _stop(data_dir: Path) -> None:
    pid = int((data_dir / "lock").read_text(encoding="utf-8"))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while is_running(data_dir):
        if time.monotonic() > deadline:
            sys.exit(f"The stack in {data_dir} did not stop within {STOP_SECONDS} s. Its process is {pid}.")
        time.sleep(0.1)
    print(f"Stopped the stack in {data_dir}.")


def _reset() -> None:
    """Stop the stack, if it runs, and delete its data. Deletes only what `make run` makes."""
    try:
        data_dir = find()
        _stop(data_dir)
    except NoStackError:
        data_dir = Path(os.environ.get("DATA_DIR") or DEFAULT).resolve()
    if not (data_dir / "lock").exists():
        sys.exit(f"There is no stack in {data_dir}. Nothing was deleted.")
    for name in ("app", "bin", "executor", "files", "openbao", "postgresql", "prometheus", "temporal", "worker"):
        shutil.rmtree(data_dir / name, ignore_errors=True)
    for name in ("demo.json", "dev.env", "server.key", "lock"):
        (data_dir / name).unlink(missing_ok=True)
    with suppress(OSError):  # other files of the user stay
        data_dir.rmdir()
    print(f"Deleted the stack in {data_dir}. `make run` starts with new data.")


def _run(data_dir: Path, command: Sequence[str]) -> int:
    values = facts(data_dir)
    path = f"{data_dir / 'bin'}:{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return subprocess.run(command, env={**os.environ, **values, "PATH": path}, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Exit status of the command."""
    name, rest = arguments[0], arguments[1:]
    if name == "reset":
        _reset()
        return 0
    try:
        data_dir = find()
    except NoStackError as problem:
        print(problem, file=sys.stderr)
        return 1
    if name == "stop":
        _stop(data_dir)
        return 0
    if name == "keys":
        return _run(data_dir, [sys.executable, "-m", "app", "keys", *rest])
    if name == "psql":
        return _run(data_dir, ["psql", facts(data_dir)["DATABASE_OWNER_URL"], *rest])
    return _run(data_dir, ["bao", *(rest or ["kv", "list", "secret/runs/demo"])])


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
