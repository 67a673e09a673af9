"""Pools: named sets of machines. A run can ask for a machine that is in all of some pools."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from app.access.auth import Principal
from app.errors import Invalid, PoolNotFound
from app.idempotency import Reply, Resource, WriteRequest, once
from app.limits import memory_budget
from app.models import Pool
from app.resources import machines
from app.resources.machines import POOL_COLUMNS, POOL_OCTETS, POOLS, join, lock_machines, lock_pools, show_pool
from app.resources.patching import Change
from app.schemas.resources import MachinePoolAssignment, PoolCreate, PoolUpdate
from app.services import Services
from app.stores.database import Connection, Database
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import statement

MEMBERS = statement(
    "pools.members",
    f"""
    SELECT {columns(machines.COLUMNS)} FROM pool_machines member, LATERAL (
        SELECT * FROM machines WHERE id = member.machine_id AND organization_id = :organization_id LIMIT 1
    ) AS machines
    WHERE member.pool_id = :pool_id ORDER BY machines.created_at DESC, machines.id DESC
    """,
)

# A machine takes more than 500 bytes: no further than to where they are too much.
WEIGH_MEMBERS = statement(
    "pools.weigh_members",
    f"""
    SELECT coalesce(sum((SELECT {machines.OCTETS} FROM machines WHERE machines.id = member.machine_id)), 0)::bigint
    FROM (SELECT machine_id FROM pool_machines WHERE pool_id = :pool_id LIMIT :max_bytes::bigint / 500 + 1) AS member
    """,
)

LISTED = Listing("pools", "pools", octets=POOL_OCTETS, row="pools.id = listed.key")
ROWS = statement("pools.rows", f"SELECT {columns(POOL_COLUMNS)} FROM {in_order('pools')} ORDER BY page.n")

INSERT = statement(
    "pools.insert",
    "INSERT INTO pools (id, organization_id, name, description) VALUES (:id, :organization_id, :name, :description)",
)

CHANGE = Change(Pool, "name", "description", always="updated_at = now()")

LEAVE = statement(
    "pools.leave", "DELETE FROM pool_machines WHERE pool_id = :pool_id AND machine_id = ANY(:machine_ids::uuid[])"
)

_THE_POOL = "id = :pool_id AND organization_id = :organization_id"
LOCK_FOR_DELETE = statement("pools.delete.lock", f"SELECT 1 FROM pools WHERE {_THE_POOL} FOR UPDATE")
LOCK_MEMBERS = statement(
    "pools.delete.lock_members",
    """
    SELECT id FROM machines WHERE id = ANY (ARRAY(SELECT machine_id FROM pool_machines WHERE pool_id = :pool_id))
    ORDER BY id FOR NO KEY UPDATE
    """,
)
DELETE = statement("pools.delete", f"DELETE FROM pools WHERE {_THE_POOL}")


async def get(connection: Connection, organization_id: str, pool_id: UUID) -> dict[str, Any]:
    """One pool. Raises PoolNotFound."""
    row = await connection.fetchrow(POOLS, pool_ids=[pool_id], organization_id=organization_id)
    if row is None:
        raise PoolNotFound
    return show_pool(row)


async def get_with_machines(
    connection: Connection, organization_id: str, pool_id: UUID, *, max_bytes: int, asked_by: tuple[str, str]
) -> dict[str, Any]:
    """One pool and its machines.

    Raises PoolNotFound, Invalid for `asked_by` if they would be too large, NoRoom and QuotaExceeded.
    """
    pool = await get(connection, organization_id, pool_id)
    octets = await connection.fetchval(WEIGH_MEMBERS, pool_id=pool_id, max_bytes=max_bytes)
    if octets > max_bytes:
        sentence = f"The pool with its machines would have more than {max_bytes} bytes; have fewer machines in it."
        raise Invalid((asked_by, sentence, "pool_too_large"))
    memory_budget.reserve_reply(octets)
    members = await connection.fetch(MEMBERS, pool_id=pool_id, organization_id=organization_id)
    return pool | {"machines": await machines.show(connection, organization_id, members)}


async def _show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get(connection, principal.organization_id, ids[0]))


RESOURCE = Resource(_show)


async def list_pools(database: Database, organization_id: str, part: Slice) -> dict[str, object]:
    """One page. Raises Invalid as paging.page does."""
    condition, values = where("pools", organization_id=organization_id)
    found = await page(database, LISTED, (condition,), part, values, ROWS)
    return part.shown([show_pool(row) for row in found.rows], found)


async def create(services: Services, write: WriteRequest, options: PoolCreate) -> Reply:
    """A new pool, empty."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        pool_id = uuid4()
        await connection.execute(
            INSERT,
            id=pool_id,
            organization_id=organization_id,
            name=options.name,
            description=options.description,
        )
        return Reply(201, await _show(connection, write.principal, [pool_id]), [pool_id])

    return await once(services, write, work, RESOURCE)


async def change(services: Services, write: WriteRequest, pool_id: UUID, options: PoolUpdate) -> Reply:
    """Set what the request names. Raises PoolNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await CHANGE.apply(connection, organization_id, pool_id, CHANGE.named(options))
        return Reply(200, await _show(connection, write.principal, [pool_id]), [pool_id])

    return await once(services, write, work, RESOURCE)


async def delete(services: Services, write: WriteRequest, pool_id: UUID) -> Reply:
    """Remove a pool; runs that ask for it keep waiting. Raises PoolNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        if not await connection.fetchval(LOCK_FOR_DELETE, pool_id=pool_id, organization_id=organization_id):
            raise PoolNotFound
        await connection.fetch(LOCK_MEMBERS, pool_id=pool_id)
        await connection.execute(DELETE, pool_id=pool_id, organization_id=organization_id)
        return Reply(204, b"")

    return await once(services, write, work)


async def add_machines(services: Services, write: WriteRequest, pool_id: UUID, options: MachinePoolAssignment) -> Reply:
    """Add machines; those that are in it stay. Raises PoolNotFound, MachineNotFound, Invalid; then none was added."""
    organization_id = write.principal.organization_id

    async def show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
        shown = await get_with_machines(
            connection,
            principal.organization_id,
            ids[0],
            max_bytes=services.settings.max_reply_bytes,
            asked_by=("body", "machine_ids"),
        )
        return encode(shown)

    async def work(connection: Connection) -> Reply:
        await lock_pools(connection, organization_id, [pool_id])
        await lock_machines(connection, organization_id, options.machine_ids)
        await join(connection, [pool_id], options.machine_ids)
        return Reply(200, await show(connection, write.principal, [pool_id]), [pool_id])

    return await once(services, write, work, Resource(show))


async def remove_machines(
    services: Services, write: WriteRequest, pool_id: UUID, options: MachinePoolAssignment
) -> Reply:
    """Take machines out; those that are not in it stay out. Raises PoolNotFound, MachineNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await lock_pools(connection, organization_id, [pool_id])
        await lock_machines(connection, organization_id, options.machine_ids)
        await connection.execute(LEAVE, pool_id=pool_id, machine_ids=options.machine_ids)
        return Reply(204, b"")

    return await once(services, write, work)
