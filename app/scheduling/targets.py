"""Targets: where a run may go, and whether its organization has these machines, pools and sessions."""

from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Select, bindparam, literal_column, select

from app.errors import MachineNotFound, PoolNotFound, Refusal, SessionNotFound
from app.models import Machine
from app.stores.database import Connection
from app.stores.statements import rows_of, statement


class Targets(Protocol):
    """The part of a request that says where a run may go."""

    @property
    def machine_id(self) -> UUID | None: ...
    @property
    def pool_ids(self) -> list[UUID] | None: ...
    @property
    def session_id(self) -> UUID | None: ...


# The lock keeps the machine from being deleted before the run that pins it is committed.
_MACHINE: Select[Any] = select(literal_column("1")).where(
    Machine.id == bindparam("machine_id"), Machine.organization_id == bindparam("organization_id")
)
KNOWN_MACHINE = statement("targets.machine", _MACHINE)
LOCK_MACHINE = statement("targets.lock_machine", _MACHINE.with_for_update(key_share=True, read=True))

KNOWN_POOLS = statement(
    "targets.pools",
    f"SELECT count(*) FROM {rows_of('pools', 'pool_ids')} AS pool WHERE organization_id = :organization_id",
)

# A machine is reserved for it, or a run carries it.
KNOWN_SESSION = statement(
    "targets.session",
    """
    SELECT EXISTS (SELECT FROM machines WHERE reserved_session_id = :session_id AND organization_id = :organization_id)
        OR EXISTS (SELECT FROM runs WHERE session_id = :session_id AND organization_id = :organization_id)
    """,
)


async def missing_targets(
    connection: Connection, organization_id: str, targets: Targets, *, lock: bool = True
) -> list[Refusal]:
    """MachineNotFound, PoolNotFound and SessionNotFound for what the organization does not have; `lock` holds the machine."""
    missing: list[Refusal] = []
    if targets.machine_id is not None and not await connection.fetchval(
        LOCK_MACHINE if lock else KNOWN_MACHINE, machine_id=targets.machine_id, organization_id=organization_id
    ):
        missing.append(MachineNotFound())
    if targets.pool_ids:
        wanted = set(targets.pool_ids)
        known = await connection.fetchval(KNOWN_POOLS, pool_ids=list(wanted), organization_id=organization_id)
        if known != len(wanted):
            missing.append(PoolNotFound())
    if targets.session_id is not None and not await connection.fetchval(
        KNOWN_SESSION, session_id=targets.session_id, organization_id=organization_id
    ):
        missing.append(SessionNotFound())
    return missing


async def check_targets(connection: Connection, organization_id: str, targets: Targets) -> None:
    """Raises the first of what `missing_targets` finds."""
    for refusal in await missing_targets(connection, organization_id, targets):
        raise refusal
