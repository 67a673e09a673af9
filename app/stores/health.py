"""Checks of the three stores, for readiness, for the log and for metrics. Nothing is written to find out."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

from app.errors import DatabaseUnavailable, StorageUnavailable, Unavailable, VaultUnavailable
from app.stores import storage_marker
from app.stores.database import READ_ONLY, Database
from app.stores.files import FileStore
from app.stores.outages import Outage, Problem
from app.stores.secrets import SecretStore
from app.stores.setup import Unfit
from app.stores.single_flight import SingleFlight

Store = Literal["database", "vault", "storage"]
STORES: tuple[Store, ...] = ("database", "vault", "storage")

_STORE_OF: Mapping[str, Store] = {
    DatabaseUnavailable.code: "database",
    VaultUnavailable.code: "vault",
    StorageUnavailable.code: "storage",
}

SHARED_SECONDS = 1.0  # how long the answer of a store is good for others who ask
# How often each process checks a store by itself: while the store can be used, and while it is lost.
CHECK_SECONDS = 5.0
LOST_CHECK_SECONDS = 1.0


class _Check:
    """One check for all who ask within a second: thousands of probes are one question to the store."""

    def __init__(self, ask: Callable[[], Awaitable[Problem | None]], outage: Outage) -> None:
        self._ask = ask
        self._until = 0.0  # in time.monotonic()
        self._answer: SingleFlight[Problem | None] = SingleFlight()
        self.outage = outage

    async def __call__(self, *, is_new: bool = False) -> Problem | None:
        """The problem of the store, if it has one. `is_new`: an answer from before this call does not count."""
        if is_new or self._answer.is_under_way or time.monotonic() >= self._until:
            return await self._answer.join(self._find_out)
        return await self._answer.again()

    async def _find_out(self) -> Problem | None:
        answer = await self._ask()
        self._until = time.monotonic() + SHARED_SECONDS
        self.outage.checked(answer)
        return answer


class Checks:
    """What this process knows of each store."""

    def __init__(self, database: Database, secrets: SecretStore, files: FileStore) -> None:
        self._disks = {"database": database.disk, "storage": files.disk}
        self._secrets = secrets
        self._checks: dict[Store, _Check] = {
            "database": _Check(lambda: _database_problem(database), database.outage),
            "vault": _Check(lambda: _vault_problem(secrets), secrets.outage),
            "storage": _Check(lambda: _storage_problem(database, files), files.outage),
        }

    async def problem(self, store: Store) -> Problem | None:
        """Why the store cannot be used, at most a second old; None if it can."""
        return await self._checks[store]()

    async def look(self, store: Store) -> float | None:
        """A round of the loop that checks a store by itself."""
        problem = await self._checks[store]()
        return None if problem is None else LOST_CHECK_SECONDS

    def suspected(self, store: Store) -> asyncio.Event:
        """Set by a call that failed."""
        return self._checks[store].outage.suspected

    async def tell(self, log: logging.Logger, error: Unavailable, line: Mapping[str, object]) -> None:
        """Log that background work failed with this error: a warning, or debug if the store is lost or was so a moment ago."""
        store, level = _STORE_OF.get(error.code), logging.WARNING
        if store is not None:
            await self._checks[store](is_new=True)
            level = self._checks[store].outage.level
        log.log(level, line)

    def full(self, *stores: Store) -> Sequence[Store]:
        """The stores among these that have full disks, as far as is known."""
        return [store for store in stores if self._disks[store].is_full]

    def webhooks_problem(self) -> str | None:
        """Why webhooks cannot be signed, as the last check of Vault found."""
        return self._secrets.webhooks_problem


async def _database_problem(database: Database) -> Problem | None:
    try:
        await database.ready()
    except Unfit as unfit:
        return Problem(unfit.reason, unfit.kind)
    except DatabaseUnavailable as failed:
        return Problem(READ_ONLY if failed.kind == READ_ONLY else "unreachable", failed.kind)
    return None


async def _vault_problem(secrets: SecretStore) -> Problem | None:
    reason = await secrets.problem()
    return None if reason is None else Problem(reason)


async def _storage_problem(database: Database, files: FileStore) -> Problem | None:
    if not await files.ready():
        return Problem("unreachable")
    try:
        reason = await storage_marker.problem(database, files)
    except StorageUnavailable:
        return Problem("unreachable")
    except DatabaseUnavailable:  # the database has a check of its own, and whose store this is was right before
        return None
    return None if reason is None else Problem(reason)
