"""What the service needs of a store of secrets. stores/vault.py is the one that it ships with; no other file knows the vendor.

A secret is a set of named values under a path of its own, which is written once. Two fields of a run name it: its path, which
is on the deletion list (stores/deletions.py) before it is written, and its aliases, which replies show instead of values.
"""

from collections.abc import Callable, Mapping
from typing import Final, Protocol
from uuid import UUID

from pydantic import JsonValue

from app.stores.outages import Outage

# Callers that are shown a signing secret at the same time. They must not take the places of requests and deliveries.
SHOWN_AT_ONCE: Final = 4


class SecretStore(Protocol):
    """One store of secrets, opened once per process. A call that the store does not answer raises VaultUnavailable."""

    @property
    def outage(self) -> Outage:
        """The outage of the store, if there is one."""
        ...

    @property
    def writes_at_once(self) -> int:
        """How many secrets one request may write at the same time."""
        ...

    def new_path(self, organization_id: str, run_id: UUID) -> str:
        """A path that no secret ever had; an executor's access can be limited to its organization."""
        ...

    def new_webhook_path(self, organization_id: str, endpoint_id: UUID) -> str:
        """A path that no secret ever had, for a signing secret."""
        ...

    def size(self, values: Mapping[str, JsonValue]) -> int:
        """The bytes that one copy of these values takes. Raises PayloadTooLarge. Nothing is asked."""
        ...

    def aliases(self, values: Mapping[str, JsonValue]) -> Callable[[str], dict[str, str]]:
        """What replies show instead of the values, by path. Nothing is asked."""
        ...

    async def write(self, path: str, values: Mapping[str, JsonValue], *, deadline: float) -> None:
        """Write all values as one secret at a fresh path, unless `deadline` (of time.monotonic()) has passed.

        Raises PayloadTooLarge. After VaultUnavailable the secret may or may not exist.
        """
        ...

    async def read(self, path: str, *, is_shown: bool = False) -> dict[str, str] | None:
        """The values of a signing secret; None: there is none. `is_shown`: to a caller. Secrets of runs are never read."""
        ...

    async def destroy(self, path: str) -> None:
        """Delete the secret for good. A missing secret counts as deleted."""
        ...

    async def problem(self) -> str | None:
        """Why secrets cannot be written, as a word for the health check; None: they can."""
        ...

    @property
    def webhooks_problem(self) -> str | None:
        """Why webhooks cannot be signed though secrets of runs can be written, as `problem` last saw it."""
        ...

    async def close(self) -> None:
        """Wait for the calls under way and close the connections."""
        ...
