"""`make run`: PostgreSQL, OpenBao and the app together, with demo data, until Ctrl-C. State lives under DATA_DIR.

With TEMPORAL=1 the demo's machine gets its runs from Temporal.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from app.config import Settings
from dev import demo, running
from dev.stack import (
    Bao,
    Part,
    Postgres,
    StackError,
    Temporal,
    http,
    port_problem,
    private,
    private_folder,
    usable_port,
    write_private,
)

ROOT = Path(__file__).resolve().parent.parent
APP = [sys.executable, "-m", "app"]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Executor(Part):
    """The program on the demo's machine."""

    name = "executor"

    def __init__(self, data_dir: Path, environment: Mapping[str, str]) -> None:
        super().__init__(data_dir / self.name)
        self.environment = environment

    def start(self) -> Self:
        self.launch([sys.executable, "-m", "dev.executor"], self.environment, cwd=ROOT)
        return self


class WorkflowWorker(Part):
    """What runs Temporal's workflows."""

    name = "worker"

    def __init__(self, data_dir: Path, environment: Mapping[str, str]) -> None:
        super().__init__(data_dir / self.name)
        self.environment = environment

    def start(self) -> Self:
        self.launch([*APP, "worker"], self.environment, cwd=ROOT)
        return self


class App(Part):
    """The service itself."""

    name = "app"

    def __init__(self, data_dir: Path, url: str, environment: Mapping[str, str]) -> None:
        super().__init__(data_dir / self.name)
        self.url = url
        self.environment = environment

    def start(self) -> Self:
        self.launch([*APP, "serve"], self.environment, cwd=ROOT)
        self.wait_until(self._ready)
        return self

    def _ready(self) -> bool:
        try:
            return http("GET", f"{self.url}/health/ready", seconds=5)[0] == 200
        except OSError:
            return False


def main() -> None:
    data_dir = Path(os.environ.get("DATA_DIR") or ".data").resolve()
    port = _port()
    with ExitStack() as lock:
        try:
            private_folder(data_dir)
            lock.enter_context(running.held(data_dir))
        except BlockingIOError:
            sys.exit(f"Another `make run` uses {data_dir}. Stop it, or set another DATA_DIR and PORT.")
        except OSError as problem:
            sys.exit(f"DATA_DIR cannot be used: {problem}")
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, _interrupt)
            if make := os.environ.get("MAKE_PID"):  # not simply our parent: make may be gone by now
                threading.Thread(target=_Make(int(make)).end_with_it, daemon=True).start()
            with ExitStack() as parts:
                _watch(_start(data_dir, port, parts))
        except KeyboardInterrupt:
            _say("Stopped. `make run` continues with the same data.")
        except (StackError, OSError) as problem:
            if not _told_to_stop.is_set():
                sys.exit(f"{problem}\nEverything is stopped.")
            # Not why it stops: the signal came in the middle of a step, which then could not end in order.
            _say("Stopped. `make run` continues with the same data.")


_told_to_stop = threading.Event()


def _interrupt(*_: object) -> None:
    """Once: while we stop the parts in order, further signals must not tear that apart."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _told_to_stop.set()
    print("\nStopping ...", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _start(data_dir: Path, port: int, parts: ExitStack) -> Sequence[Part]:
    url = f"http://127.0.0.1:{port}"
    Executor(data_dir, {}).stop_leftover()
    WorkflowWorker(data_dir, {}).stop_leftover()
    App(data_dir, url, {}).stop_leftover()  # or it would hold the port
    if problem := port_problem(port):
        raise StackError(f"Port {port} cannot be used: {problem}. Choose another: make run PORT={usable_port(port)}")

    _say("Starting PostgreSQL and OpenBao ...")
    postgres = parts.enter_context(Postgres(data_dir))
    bao = parts.enter_context(Bao(data_dir))
    temporal = parts.enter_context(Temporal(data_dir)) if os.environ.get("TEMPORAL") else None
    handing_over = {} if temporal is None else {"TEMPORAL_ADDRESS": temporal.address}
    environment = _settings(data_dir, port, postgres, bao) | handing_over
    as_owner = {**environment, "DATABASE_OWNER_URL": postgres.url}
    _say("Migrating the database ...")
    _app_command(as_owner, "migrate")
    _say("Starting the app ...")
    app = parts.enter_context(App(data_dir, url, environment))

    retention = environment.get("SECRET_RETENTION_SECONDS", Settings.model_fields["secret_retention_seconds"].default)
    facts = demo.ensure(
        data_dir / "demo.json",
        url,
        has_secret=partial(_has_secret, bao),
        create_key=partial(_create_key, as_owner),
        retention=timedelta(seconds=int(retention)),
    )
    executor = parts.enter_context(
        Executor(
            data_dir,
            {
                "API_URL": url,
                "API_KEY": facts.executor_key,
                "VAULT_ADDR": bao.address,
                "VAULT_TOKEN": bao.executor_token(demo.ORGANIZATION),
                "MACHINE_ID": facts.machine_id,
                **handing_over,
            },
        )
    )
    started: list[Part] = [app, executor, postgres, bao]
    if temporal is not None:
        started += [temporal, parts.enter_context(WorkflowWorker(data_dir, environment))]
    dev_env = {
        "API_URL": url,
        "API_KEY": facts.api_key,
        "DEMO_RUN_ID": facts.run_id,
        "WORKFLOW_ID": facts.workflow_id,
        "MACHINE_ID": facts.machine_id,
        "EXAMPLE_API_KEY": facts.example_api_key,
        "DATABASE_URL": postgres.app_url,
        "DATABASE_OWNER_URL": postgres.url,
        "VAULT_ADDR": bao.address,
        "VAULT_TOKEN": bao.root_token,
        "STORAGE_URL": environment["STORAGE_URL"],
        "SERVER_KEY": environment["SERVER_KEY"],
    }
    tools = {
        "psql": postgres.binaries / "psql",
        "pg_dump": postgres.binaries / "pg_dump",
        "pg_restore": postgres.binaries / "pg_restore",
        "bao": bao.binary,
    }
    path = _path(data_dir / "bin", tools)
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in dev_env.items()]
    write_private(data_dir / "dev.env", "".join(lines) + f'PATH={path}:"$PATH"\n')
    _say(f"""
Ready. Ctrl-C stops everything. In another terminal: make psql, make bao, make keys, make stop.
Console   {url}/console/   API key {facts.api_key}
API       {url}/docs   and in a shell: set -a; . {shlex.quote(str(data_dir / "dev.env"))}; set +a
{demo.command(url, facts)}{"" if temporal is None else _at_temporal(temporal)}""")
    return started


def _path(folder: Path, tools: Mapping[str, Path]) -> str:
    """What `dev.env` adds to PATH: the interpreter of this checkout, and the stack's own tools under their names."""
    private_folder(folder)
    for name, program in tools.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(program))} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return f"{shlex.quote(str(folder))}:{shlex.quote(str(Path(sys.executable).parent))}"


def _at_temporal(temporal: Temporal) -> str:
    return f"""
Each retry is a workflow, which Temporal's own page shows: {temporal.page}/namespaces/default/workflows
TEMPORAL_ADDRESS is {temporal.address}."""


def _watch(parts: Sequence[Part]) -> None:
    """Until a signal comes or a part ends."""
    while True:
        for part in parts:
            if not part.running:
                raise StackError(f"{part.tail()}\n\n{part.name} has ended by itself; its log is {part.log}")
        time.sleep(0.2)


class _Make:
    """The make that has started us. It may be killed without a word to us; and when it alone is interrupted, it waits for us
    and says nothing either: it trusts the terminal to have told everybody."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.catches = self._catches()  # not as a background job of a shell

    def end_with_it(self) -> None:
        """In a thread of its own, from the start on: give ourselves the signal that make has not passed on."""
        while os.getppid() == self.pid and (self._catches() or not self.catches):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    def _catches(self) -> bool:
        """Whether an interrupt would still be news to it. Only Linux tells."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        except OSError:
            return False
        caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(caught >> (signal.SIGINT - 1) & 1)


def _settings(data_dir: Path, port: int, postgres: Postgres, bao: Bao) -> dict[str, str]:
    """The app's environment: ours, with the stack's settings instead of any that point elsewhere."""
    elsewhere = ("TEMPORAL_", "VAULT_", "BAO_", "DATABASE_URL", "DATABASE_OWNER_URL", "STORAGE_URL", "SERVER_KEY", "PG")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(elsewhere)}
    files = data_dir / "files"
    files.mkdir(mode=0o700, exist_ok=True)
    role_id, secret_id = bao.approle()
    return {
        "WEBHOOK_ALLOW": "127.0.0.0/8",  # receivers on this machine, unless ours says otherwise
        **inherited,
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "DATABASE_URL": postgres.app_url,
        "VAULT_ADDR": bao.address,
        "VAULT_ROLE_ID": role_id,
        "VAULT_SECRET_ID": secret_id,
        "STORAGE_URL": files.as_uri(),
        "SERVER_KEY": private(data_dir / "server.key", lambda: os.urandom(32).hex()),
        "NO_PROXY": "127.0.0.1",
    }


def _app_command(environment: Mapping[str, str], *arguments: str) -> str:
    """The last line that `python -m app ...` prints. Raises StackError if it fails."""
    outcome = subprocess.run(
        [*APP, *arguments], env=dict(environment), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if outcome.returncode != 0:
        raise StackError(f"`python -m app {' '.join(arguments)}` failed:\n{outcome.stdout}{outcome.stderr}")
    return (outcome.stdout.strip().splitlines() or [""])[-1].strip()


def _has_secret(bao: Bao, alias: str) -> bool:
    place = urlsplit(alias)
    return bool(bao.call("GET", f"{place.netloc}/metadata{place.path}")[0] == 200)


def _create_key(as_owner: Mapping[str, str], organization: str, machine_id: str | None = None) -> str:
    bound = ["--machine", machine_id, "--name", "executor"] if machine_id else []
    return _app_command(as_owner, "keys", "create", "--organization", organization, *bound)


def _port() -> int:
    text = os.environ.get("PORT") or "8000"
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        sys.exit(f"PORT must be a number from 1 to 65535, not {text!r}.")
    return int(text)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
