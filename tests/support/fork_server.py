"""Start the service as a process that is forked from one with the application imported: 0.1 s instead of 2 s.

The forked process has its own environment and runs `python -m app serve`. Only what is imported once, and the OpenAPI document,
which is the same in all processes, come from the process before the fork.
"""

import ctypes
import multiprocessing
import multiprocessing.process
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import alembic.config
import psutil
from fastapi import FastAPI

from app import cli
from app.config import Settings
from app.main import create_app
from dev.run import App
from dev.stack import private_folder, write_private

PR_SET_PDEATHSIG = 1

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["tests.support.faults", "tests.support.fork_preload"])


def enter(environment: Mapping[str, str], log: Path) -> None:
    """Become a process of this environment; its output goes where a service's would."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # it is a text stream
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and a test may want it


def keep_document() -> None:
    """Let `python -m app serve` use the OpenAPI document that was made before the fork."""
    from tests.support.fork_preload import DOCUMENT

    def with_document(settings: Settings) -> FastAPI:
        made = create_app(settings)
        made.openapi_schema = DOCUMENT
        return made

    setattr(cli, "create_app", with_document)  # noqa: B010 - it is the application's own name there


PROGRAMS: dict[str, Callable[[list[str]], int | None]] = {"app": cli.main, "alembic": alembic.config.main}


def run_program(environment: Mapping[str, str], folder: Path, program: str, arguments: list[str]) -> None:
    enter(environment, folder / "stdout")
    errors = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(errors, 2)
    warnings.simplefilter("error")
    sys.exit(PROGRAMS[program](arguments))


def run_forked(
    environment: Mapping[str, str], program: str, *arguments: str, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """`python -W error -m PROGRAM ARGUMENTS` to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = forks.Process(target=run_program, args=(environment, folder, program, list(arguments)), daemon=True)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode is not None
        written = [(folder / stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr")]
        return subprocess.CompletedProcess([program, *arguments], process.exitcode, *written)


def serve(environment: Mapping[str, str], log: Path) -> None:
    enter(environment, log)
    keep_document()
    sys.exit(cli.main(["serve"]))


class ForkedProcess:
    """A forked process with the methods of `subprocess.Popen` that a `Part` uses."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("app", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def fork_service(environment: Mapping[str, str], log: Path) -> ForkedProcess:
    """`python -m app serve` with this environment, ready or not; it writes to this file."""
    process = forks.Process(target=serve, args=(environment, log), daemon=True)
    process.start()
    return ForkedProcess(process)


class ForkedApp(App):
    """The service itself, as one forked process."""

    def start(self) -> Self:
        private_folder(self.folder)
        self.log.touch(mode=0o600)
        self._process = fork_service(self.environment, self.log)
        write_private(self._pid_file, f"{self.pid} {psutil.Process(self.pid).create_time()}")
        self.wait_until(self._ready)
        return self
