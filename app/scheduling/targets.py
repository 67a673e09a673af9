"""Targets: where a run may go, whether its organization has that, and the lane it waits in."""

import hashlib
from collections.abc import Iterable
from typing import Protocol
from uuid import UUID

from app.errors import MachineNotFound, PoolNotFound, SessionNotFound
from app.stores.database import Connection


class Targets(Protocol):
    """The part of a request that says where a run may go."""

    @property
    def machine_id(self) -> UUID | None: ...
    @property
    def pool_ids(self) -> list[UUID] | None: ...
    @property
    def session_id(self) -> UUID | None: ...


# The lock keeps the machine from being deleted before the run that pins it is committed.
KNOWN_MACHINE = "SELECT 1 FROM machines WHERE id = $1 AND organization_id = $2 FOR KEY SHARE"
KNOWN_POOLS = "SELECT count(*) FROM pools WHERE id = ANY($1::uuid[]) AND organization_id = $2"
KNOWN_SESSION = """
SELECT EXISTS (SELECT FROM machines WHERE reserved_session_id = $1 AND organization_id = $2)
    OR EXISTS (SELECT FROM runs WHERE session_id = $1 AND organization_id = $2)
"""


async def check_targets(connection: Connection, organization_id: str, targets: Targets) -> None:
    """Raises MachineNotFound, PoolNotFound or SessionNotFound for what the organization does not have."""
    if targets.machine_id is not None and not await connection.fetchval(
        KNOWN_MACHINE, targets.machine_id, organization_id
    ):
        raise MachineNotFound
    if targets.pool_ids:
        wanted = set(targets.pool_ids)
        if await connection.fetchval(KNOWN_POOLS, list(wanted), organization_id) != len(wanted):
            raise PoolNotFound
    if targets.session_id is not None and not await connection.fetchval(
        KNOWN_SESSION, targets.session_id, organization_id
    ):
        raise SessionNotFound


def lane(
    session_id: UUID | None, pinned: UUID | None, pool_ids: Iterable[UUID] | None, is_priority: bool
) -> tuple[str, int]:
    """The lane a run waits in, and its rank there: 0 goes before 1.

    Runs that want the same thing have the same lane; that is all it says. Pools are hashed: an entry of an index has room for
    the ids of 71, and a run may ask for more.
    """
    rank = 0 if is_priority and session_id is None else 1
    if session_id is not None:
        return f"session:{session_id}", rank
    if pinned is not None:
        return f"machine:{pinned}", rank
    pools = ",".join(sorted({str(pool) for pool in pool_ids or ()}))
    return (f"pools:{hashlib.sha256(pools.encode()).hexdigest()}" if pools else "any"), rank
