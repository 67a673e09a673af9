"""Pools: create, list, read, change, delete, and which machines are in them."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app import pools
from app.docs import operation
from app.errors import MachineNotFound, PoolNotFound
from app.parts import parts
from app.payload import read, read_write
from app.replies import Limit, Skip, json_reply, send
from app.schemas import MachinePoolAssignment, Page, PoolCreate, PoolResponse, PoolUpdate, PoolWithMachines

router = APIRouter(prefix="/v1/pools", tags=["pools"])


@router.post("", status_code=201, response_model=PoolResponse, **operation(body=PoolCreate, write=True))
async def create_pool(request: Request) -> Response:
    """A new pool, without machines."""
    options, write = await read(request, PoolCreate)
    return send(await pools.create(parts(request), write, options))


@router.get("", response_model=Page[PoolResponse], **operation())
async def list_all(request: Request, skip: Skip = 0, limit: Limit = 100) -> Response:
    """Pools, newest first."""
    organization_id = request.state.principal.organization_id
    return json_reply(await pools.list_pools(parts(request).database, organization_id, skip, limit))


@router.get("/{pool_id}", response_model=PoolWithMachines | PoolResponse, **operation(PoolNotFound))
async def get_pool(
    pool_id: UUID,
    request: Request,
    include_machines: Annotated[bool, Query(description="Show its machines too.")] = False,
) -> Response:
    """One pool."""
    organization_id = request.state.principal.organization_id
    async with parts(request).database.connection() as connection:
        return json_reply(await pools.get(connection, organization_id, pool_id, include_machines=include_machines))


@router.patch("/{pool_id}", response_model=PoolResponse, **operation(PoolNotFound, body=PoolUpdate, write=True))
async def update_pool(pool_id: UUID, request: Request) -> Response:
    """Change what the body names; null clears the description."""
    options, write = await read(request, PoolUpdate)
    return send(await pools.change(parts(request), write, pool_id, options))


@router.delete("/{pool_id}", status_code=204, **operation(PoolNotFound, write=True))
async def delete_pool(pool_id: UUID, request: Request) -> Response:
    """Remove a pool. Its machines stay; runs that ask for it keep waiting (`no_machine_in_pools`)."""
    write = await read_write(request)
    return send(await pools.delete(parts(request), write, pool_id))


@router.post(
    "/{pool_id}/machines",
    response_model=PoolWithMachines,
    **operation(PoolNotFound, MachineNotFound, body=MachinePoolAssignment, write=True),
)
async def add_machines(pool_id: UUID, request: Request) -> Response:
    """Add machines to a pool: all of them or none."""
    options, write = await read(request, MachinePoolAssignment)
    return send(await pools.add_machines(parts(request), write, pool_id, options))


@router.delete(
    "/{pool_id}/machines",
    status_code=204,
    **operation(PoolNotFound, MachineNotFound, body=MachinePoolAssignment, write=True),
)
async def remove_machines(pool_id: UUID, request: Request) -> Response:
    """Take machines out of a pool: all of them or none."""
    options, write = await read(request, MachinePoolAssignment)
    return send(await pools.remove_machines(parts(request), write, pool_id, options))
