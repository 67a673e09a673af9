"""Ways in which a part fails, and comes back."""

from collections.abc import Callable
from typing import NamedTuple

import httpx

from tests.support.client import file_input
from tests.support.server import Server
from tests.support.stack import Stack

SECRETS: dict[str, object] = {"sensitive_input_values": {"password": "new"}}
FILES: dict[str, object] = {"file_inputs": [file_input(b"new")]}
PLAIN: dict[str, object] = {}


class Outage(NamedTuple):
    """One way a part fails."""

    part: str
    body: dict[str, object]
    begin: Callable[[Stack], object]
    end: Callable[[Stack], object]


def hide_storage(stack: Stack) -> None:
    stack.files.rename(stack.folder / "elsewhere")


def show_storage(stack: Stack) -> None:
    if stack.files.is_file():
        stack.files.unlink()
    (stack.folder / "elsewhere").rename(stack.files)


def replace_storage(stack: Stack) -> None:
    hide_storage(stack)
    stack.files.write_text("not a folder")


OUTAGES = {
    "vault frozen": Outage("vault", SECRETS, lambda s: s.bao.freeze(), lambda s: s.bao.thaw()),
    "vault killed": Outage("vault", SECRETS | FILES, lambda s: s.bao.kill(), lambda s: s.bao.start()),
    "database frozen": Outage("database", PLAIN, lambda s: s.postgres.freeze(), lambda s: s.postgres.thaw()),
    "database killed": Outage("database", SECRETS, lambda s: s.postgres.kill(), lambda s: s.postgres.start()),
    "storage missing": Outage("storage", FILES, hide_storage, show_storage),
    "storage a file": Outage("storage", SECRETS | FILES, replace_storage, show_storage),
}


def ready(server: Server) -> tuple[int, list[str]]:
    reply = httpx.get(f"{server.url}/health/ready", timeout=10, trust_env=False, verify=False)
    return reply.status_code, reply.json()["down"]


def is_ready(server: Server) -> bool:
    return ready(server)[0] == 200
