"""The parts a request works with, opened once per process."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

from app.config import Settings
from app.database import Database
from app.storage import FileStore
from app.vault import SecretStore
from app.waiting import Waiters

if TYPE_CHECKING:
    from app.background import Background  # it uses what uses this module


@dataclass(frozen=True, slots=True)
class Parts:
    """Settings, the three stores, the background task that is woken after a commit, and who waits for it."""

    settings: Settings
    database: Database
    secrets: SecretStore
    files: FileStore
    background: "Background"
    waiters: Waiters


def parts(request: Request) -> Parts:
    """The parts of the application that serves this request."""
    found: Parts = request.app.state.parts
    return found
