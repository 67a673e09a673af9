"""The whole hand-off as processes: Temporal's development server, replicas, workflow workers and executors."""

import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from dev.run import APP, ROOT
from dev.stack import Part, Temporal
from tests.support.client import Client
from tests.support.server import Server, start_server
from tests.support.stack import Stack

HEARTBEAT = 2.0  # seconds; the machine may be busy
QUEUE = "of-{organization_id}"  # a fleet for each test


class Program(Part):
    """A Python program as a process."""

    def __init__(self, name: str, folder: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        super().__init__(folder)
        self._command = command
        self._environment = environment

    def start(self) -> Self:
        self.launch(self._command, self._environment, cwd=ROOT)
        return self


class Note(NamedTuple):
    """A line that an executor wrote: what happened to the run with this number, and when."""

    what: str
    number: str
    at: float


class HandOff:
    """What takes part, and ways to start more of it."""

    def __init__(self, stack: Stack, temporal: Temporal, parts: ExitStack) -> None:
        self.stack = stack
        self.temporal = temporal
        self._parts = parts
        self.folder = stack.folder / f"handoff-{secrets.token_hex(4)}"
        self.begun = self.folder / "begun"
        self.settings = {
            "TEMPORAL_ADDRESS": temporal.address,
            "TEMPORAL_TASK_QUEUE": QUEUE,
            "RUN_HEARTBEAT_SECONDS": str(HEARTBEAT),
            "LOG_LEVEL": "info",
        }
        self.folder.mkdir()
        self.servers: list[Server] = []
        self.workers: list[Program] = []

    def server(self, **settings: object) -> Server:
        started = start_server(self.stack, **(self.settings | settings))
        self._parts.callback(started.app.stop)
        self.servers.append(started)
        return started

    def worker(self, **settings: object) -> Program:
        environment = self.stack.environment(**(self.settings | settings))
        self.workers.append(self._start("worker", [*APP, "worker"], environment))
        return self.workers[-1]

    def executor(self, server: Server, client: Client, **settings: object) -> Program:
        """One of the fleet, for the client's organization; with MACHINE_ID that machine's."""
        environment = {
            "PATH": "",
            "BEGUN": self.begun,
            "API_URL": server.url,
            "API_KEY": client.headers["Authorization"].split()[1],
            "VAULT_ADDR": self.stack.bao.address,
            "VAULT_TOKEN": self.stack.bao.executor_token(client.organization),
            "TEMPORAL_ADDRESS": self.temporal.address,
            "TEMPORAL_TASK_QUEUE": QUEUE.format(organization_id=client.organization),
            "AT_ONCE": 4,
            **settings,
        }
        command = [sys.executable, "-m", "tests.support.temporal_executor_process"]
        return self._start("executor", command, {name: str(value) for name, value in environment.items()})

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> Program:
        program = Program(name, self.folder / f"{name}-{secrets.token_hex(4)}", command, environment)
        self._parts.callback(program.kill)
        return program.start()

    def notes(self, what: str = "begun") -> list[Note]:
        """What executors have noted, oldest first."""
        text = self.begun.read_text() if self.begun.exists() else ""
        notes = [Note(words[0], words[1], float(words[2])) for words in map(str.split, text.splitlines())]
        return [note for note in notes if note.what == what]

    def numbered(self, client: Client, **options: Any) -> dict[str, Any]:
        """A run whose executor notes its number, which is `number`."""
        values = {"number": secrets.token_hex(6)} | options.pop("input_values", {})
        run = client.run(input_values=values, **options)
        return run | {"number": values["number"]}


@contextmanager
def handing_over(stack: Stack, folder: Path) -> Iterator[HandOff]:
    """Temporal alone; the test starts what else it needs, and all of it ends with the block."""
    with ExitStack() as parts:
        temporal = parts.enter_context(Temporal(folder))
        yield HandOff(stack, temporal, parts)
