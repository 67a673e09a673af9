"""What a request works with, opened once per process: the settings, the three stores, and who is woken after a commit.

It knows no background task: that one is built from the same services.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

from app.access.auth import Principal, digest, find_principals
from app.config import Settings
from app.errors import Unauthorized
from app.limits.memory_budget import Budget
from app.limits.quotas import RunQuotas
from app.stores.database import Database, may_be_of_others
from app.stores.files import FileStore
from app.stores.health import Checks
from app.stores.secrets import SHOWN_AT_ONCE, SecretStore
from app.stores.together import Together
from app.stores.vault import VaultSecrets
from app.stores.wakeups import Wakeups
from app.write_behind.heartbeats import SignsOfLife
from app.write_behind.key_usage import KeysUsed
from app.write_behind.reply_bytes import StoredReplies


@dataclass(frozen=True, slots=True)
class Sets:
    """What requests do together when they meet: each is one statement."""

    authenticate: Together[bytes, Principal | None]
    read: Together[Any, Any]
    switch: Together[Any, bytes | None]
    switch_staged: Together[Any, bytes | None]
    switch_counted: Together[Any, bytes | None]
    stage_names: Together[Any, None]

    @classmethod
    def open(cls) -> Self:
        return cls(*(Together(one.name, may_be_of_others) for one in fields(cls)))

    async def close(self) -> None:
        """Wait for what is under way."""
        for one in fields(self):
            await getattr(self, one.name).close()


@dataclass(frozen=True, slots=True)
class Services:
    """Settings, the three stores and their checks, the wake-ups, and what requests share: bytes in flight, turns to parse and
    to see signing secrets, the keys that they use, how much of their replies is kept, the quotas on runs, machines' signs
    of life, and what they do together."""

    settings: Settings
    database: Database
    secrets: SecretStore
    files: FileStore
    checks: Checks
    wakeups: Wakeups
    in_flight: Budget
    parsing: Budget
    showing: Budget
    keys_used: KeysUsed
    replies: StoredReplies
    run_quotas: RunQuotas | None
    signs_of_life: SignsOfLife
    together: Sets

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """They connect when they are first used. Raises ValueError for settings that cannot be used."""
        database, secrets, files = Database(settings), VaultSecrets(settings), FileStore(settings)
        return cls(
            settings,
            database,
            secrets,
            files,
            Checks(database, secrets, files),
            Wakeups(settles=settings.background != "none"),
            Budget(settings.max_in_flight_bytes),
            Budget(1),
            Budget(SHOWN_AT_ONCE),
            KeysUsed(),
            StoredReplies(
                settings.idempotency_max_reply_bytes,
                settings.idempotency_max_stored_bytes,
                settings.idempotency_ttl_seconds,
            ),
            RunQuotas.of(settings),
            SignsOfLife(settings.machine_silence_seconds),
            Sets.open(),
        )

    async def close(self) -> None:
        """Wait for the calls under way, and close the connections."""
        await self.together.close()
        await self.secrets.close()
        await self.files.close()
        self.database.close()


async def authenticate(services: Services, key: bytes, address: str) -> Principal:
    """Who calls, from this address. Raises Unauthorized for a key that is unknown, expired or revoked."""
    known = partial(find_principals, services.database)
    principal = await services.together.authenticate(known, digest(key), address)
    if principal is None:
        raise Unauthorized
    return principal
