"""Pools: named sets of machines. A run can ask for a machine that is in all of some pools."""

from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import func, update

from app.errors import PoolNotFound
from app.idempotency import Reply, WriteRequest, once
from app.models import Pool
from app.resources import machines
from app.resources.crud import changes, page
from app.resources.machines import JOIN, POOL_COLUMNS, POOLS, lock_machines, lock_pools, show_pool
from app.runs import projection
from app.schemas.resources import MachinePoolAssignment, PoolCreate, PoolUpdate
from app.services import Services
from app.stores.database import Connection, Database
from app.stores.statements import sql

MEMBERS = f"""
SELECT {projection.columns(machines.COLUMNS)} FROM machines JOIN pool_machines ON pool_machines.machine_id = machines.id
WHERE pool_machines.pool_id = $1 AND machines.organization_id = $2
ORDER BY machines.created_at DESC, machines.id DESC
"""

INSERT = "INSERT INTO pools (id, organization_id, name, description) VALUES ($1, $2, $3, $4)"

LEAVE = "DELETE FROM pool_machines WHERE pool_id = $1 AND machine_id = ANY($2::uuid[])"

LOCK_FOR_DELETE = "SELECT 1 FROM pools WHERE id = $1 AND organization_id = $2 FOR UPDATE"

LOCK_MEMBERS = """
SELECT machines.id FROM machines JOIN pool_machines ON pool_machines.machine_id = machines.id
WHERE pool_machines.pool_id = $1 ORDER BY machines.id FOR NO KEY UPDATE OF machines
"""


async def get(
    connection: Connection, organization_id: str, pool_id: UUID, *, include_machines: bool = False
) -> dict[str, Any]:
    """One pool, with its machines if asked for. Raises PoolNotFound."""
    row = await connection.fetchrow(POOLS, [pool_id], organization_id)
    if row is None:
        raise PoolNotFound
    pool = show_pool(row)
    if include_machines:
        members = await connection.fetch(MEMBERS, pool_id, organization_id)
        pool["machines"] = await machines.show(connection, organization_id, members)
    return pool


async def list_pools(database: Database, organization_id: str, skip: int, limit: int) -> dict[str, Any]:
    """One page."""
    own = [Pool.organization_id == organization_id]
    async with database.connection() as connection:
        rows, total = await page(connection, Pool, POOL_COLUMNS, own, skip, limit)
    return {"items": [show_pool(row) for row in rows], "total": total, "skip": skip, "limit": limit}


async def create(services: Services, write: WriteRequest, options: PoolCreate) -> Reply:
    """A new pool, empty."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        pool_id = uuid4()
        await connection.execute(INSERT, pool_id, organization_id, options.name, options.description)
        return Reply(201, projection.encode(await get(connection, organization_id, pool_id)))

    return await once(services, write, work)


async def change(services: Services, write: WriteRequest, pool_id: UUID, options: PoolUpdate) -> Reply:
    """Set what the request names. Raises PoolNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        own = update(Pool).where(Pool.id == pool_id, Pool.organization_id == organization_id)
        statement, values = sql(own.values(**changes(Pool, options), updated_at=func.now()))
        await connection.execute(statement, *values)
        return Reply(200, projection.encode(await get(connection, organization_id, pool_id)))

    return await once(services, write, work)


async def delete(services: Services, write: WriteRequest, pool_id: UUID) -> Reply:
    """Remove a pool; runs that ask for it keep waiting. Raises PoolNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        if not await connection.fetchval(LOCK_FOR_DELETE, pool_id, organization_id):
            raise PoolNotFound
        await connection.fetch(LOCK_MEMBERS, pool_id)
        await connection.execute("DELETE FROM pools WHERE id = $1", pool_id)
        return Reply(204, b"")

    return await once(services, write, work)


async def add_machines(services: Services, write: WriteRequest, pool_id: UUID, options: MachinePoolAssignment) -> Reply:
    """Add machines; those that are in it stay. Raises PoolNotFound, MachineNotFound; then none was added."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await lock_pools(connection, organization_id, [pool_id])
        await lock_machines(connection, organization_id, options.machine_ids)
        await connection.execute(JOIN, [pool_id], options.machine_ids)
        return Reply(200, projection.encode(await get(connection, organization_id, pool_id, include_machines=True)))

    return await once(services, write, work)


async def remove_machines(
    services: Services, write: WriteRequest, pool_id: UUID, options: MachinePoolAssignment
) -> Reply:
    """Take machines out; those that are not in it stay out. Raises PoolNotFound, MachineNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await lock_pools(connection, organization_id, [pool_id])
        await lock_machines(connection, organization_id, options.machine_ids)
        await connection.execute(LEAVE, pool_id, options.machine_ids)
        return Reply(204, b"")

    return await once(services, write, work)
