"""What must be right before the service serves: each wrong way to start is one line that names the setting and the fix.

Only what waiting cannot mend ends a start. A store that is down shows in readiness; the service starts without it.
"""

import asyncio
import ctypes
import errno
import logging
import resource
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from app.config import ConfigurationError, Settings
from app.errors import DatabaseUnavailable
from app.stores import setup
from app.stores.database import Database, Unreachable
from app.stores.files import FileStore
from app.webhooks.addresses import Allowed

log = logging.getLogger("app.startup")

_PR_SET_DUMPABLE = 4


def check(settings: Settings) -> None:
    """Raises ConfigurationError."""
    _check_address(settings.host, settings.port)
    if settings.vault_token_file is not None:
        _check_token_file(settings.vault_token_file)
    _check_webhooks(settings)
    _check_files(settings)
    check_temporal(settings)
    check_database(settings)
    if settings.run_silence_seconds == 0:
        effect = (
            "a run whose executor is dead stays running until a caller cancels it; set RUN_SILENCE_SECONDS to end it"
        )
        log.info({"event": "run_silence_off", "effect": effect})


def keep_out_of_dumps() -> None:
    """No core file of this process, and no other process of its user may read its memory: both would show secrets.

    For each process anew: a new program forgets the second.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _check_address(host: str, port: int) -> None:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        addresses = []
    bound = 0
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(address)
            except PermissionError:
                raise ConfigurationError(f"PORT: {port} is for root alone; choose one from 1024 up.") from None
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    raise ConfigurationError(
                        f"PORT: {port} is in use; stop what listens there, or choose another."
                    ) from None
                continue  # a name may stand for several, and IPv6 may be off
        bound += 1
    if not bound:
        raise ConfigurationError("HOST: it is no address of this machine; 127.0.0.1 for itself alone, 0.0.0.0 for all.")


def _check_token_file(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "no text"
        raise ConfigurationError(
            f"VAULT_TOKEN_FILE: the file cannot be read ({reason}). Vault Agent must have written it before we start."
        ) from None


def _check_webhooks(settings: Settings) -> None:
    for number, entry in enumerate(settings.webhook_allow, 1):
        try:
            Allowed.parse([entry])
        except ValueError:
            raise ConfigurationError(
                f"WEBHOOK_ALLOW: entry {number} is neither a network (10.0.0.0/8), an address nor a host name."
            ) from None


def _check_files(settings: Settings) -> None:
    try:
        FileStore(settings)
    except ValueError as problem:
        raise ConfigurationError(str(problem)) from None


def check_database(settings: Settings) -> None:
    """Raises ConfigurationError for a database that cannot be used as it is."""
    for name, url in settings.database_urls:
        if url.ignored:
            line = {"event": "database_parameters_ignored", "setting": name, "ignored": url.ignored}
            log.warning(line | ({"not_enforced": url.not_enforced} if url.not_enforced else {}))
    asyncio.run(_check_database(settings))


def check_temporal(settings: Settings) -> None:
    """Raises ConfigurationError if attempts are to be handed over and the package for it is missing."""
    if settings.hands_over and find_spec("temporalio") is None:
        raise ConfigurationError(
            "TEMPORAL_ADDRESS: the package temporalio is not installed; install requirements-extras.lock, or unset it."
        )


async def _check_database(settings: Settings) -> None:
    database = Database(settings)
    try:
        await database.check()
    except setup.Unfit as unfit:
        raise ConfigurationError(f"DATABASE_URL: {unfit.line}") from None
    except Unreachable as problem:
        if problem.is_wrong:
            raise ConfigurationError(f"DATABASE_URL: {problem.cause}.") from None
        log.warning({"event": "database_unreachable", "cause": problem.cause, "effect": "starting without it"})
    except DatabaseUnavailable:
        log.warning(
            {"event": "database_unreachable", "cause": "it failed while we looked", "effect": "starting anyway"}
        )
