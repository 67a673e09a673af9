"""What a request works with, opened once per process: the settings, the three stores, and who is woken after a commit.

It knows no background task: that one is built from the same services.
"""

from dataclasses import dataclass
from typing import Self

from app.config import Settings
from app.in_flight import Budget
from app.last_used import KeysUsed
from app.quotas import RunQuotas
from app.signs_of_life import SignsOfLife
from app.stores.database import Database
from app.stores.files import FileStore
from app.stores.replies import StoredReplies
from app.stores.vault import SHOWING_SLOTS, SecretStore
from app.wakeups import Wakeups


@dataclass(frozen=True, slots=True)
class Services:
    """Settings, the three stores, the wake-ups, and what requests share: bytes in flight, turns to parse and to see signing
    secrets, the keys that they use, how much of their replies is kept, the quotas on runs, and machines' signs of life."""

    settings: Settings
    database: Database
    secrets: SecretStore
    files: FileStore
    wakeups: Wakeups
    in_flight: Budget
    parsing: Budget
    showing: Budget
    keys_used: KeysUsed
    replies: StoredReplies
    run_quotas: RunQuotas | None
    signs_of_life: SignsOfLife

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """They connect when they are first used. Raises ValueError for settings that cannot be used."""
        return cls(
            settings,
            Database(settings),
            SecretStore(settings),
            FileStore(settings),
            Wakeups(settles=settings.background != "none"),
            Budget(settings.max_in_flight_bytes),
            Budget(1),
            Budget(SHOWING_SLOTS),
            KeysUsed(),
            StoredReplies(
                settings.idempotency_max_reply_bytes,
                settings.idempotency_max_stored_bytes,
                settings.idempotency_ttl_seconds,
            ),
            RunQuotas.of(settings),
            SignsOfLife(settings.machine_silence_seconds),
        )

    async def close(self) -> None:
        """Wait for the calls under way, and close the connections."""
        await self.secrets.close()
        await self.files.close()
        self.database.close()
