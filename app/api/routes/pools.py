"""Pools: create, list, read, change, delete, and which machines are in them."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.openapi import operation
from app.api.requests import read, read_write, services
from app.api.responses import Part, including, json_reply, send
from app.api.scopes import Route
from app.errors import MachineNotFound, PoolNotFound
from app.limits import memory_budget
from app.resources import included, pools
from app.schemas.resources import (
    MachinePoolAssignment,
    PoolCreate,
    PoolDetails,
    PoolPage,
    PoolResponse,
    PoolUpdate,
    PoolWithMachines,
)

router = APIRouter(route_class=Route, prefix="/v1/pools", tags=["pools"])


@router.post(
    "",
    status_code=201,
    response_model=PoolResponse,
    **operation(PoolNotFound, body=PoolCreate, write=True, scope="resources:write"),
)
async def create_pool(request: Request) -> Response:
    """A new pool, without machines."""
    options, write = await read(request, PoolCreate)
    return send(await pools.create(services(request), write, options))


_Include = Annotated[str, including(included.OF_POOLS)]


@router.get("", response_model=PoolPage, **operation(scope="runs:read"))
async def list_pools(request: Request, part: Part, include: _Include = "") -> Response:
    """Pools, newest first."""
    own, organization_id = services(request), request.state.principal.organization_id
    wanted = included.names(include, included.OF_POOLS)
    page: dict[str, Any] = await pools.list_pools(own.database, organization_id, part)
    if wanted:
        page |= {"included": await included.of_pools(own, organization_id, page["items"])}
    return json_reply(page)


@router.get("/{pool_id}", response_model=PoolDetails, **operation(PoolNotFound, scope="runs:read"))
async def get_pool(
    pool_id: UUID,
    request: Request,
    include_machines: Annotated[bool, Query(description="Show its machines too.")] = False,
    include: _Include = "",
) -> Response:
    """One pool."""
    organization_id = request.state.principal.organization_id
    own = services(request)
    wanted = included.names(include, included.OF_POOLS)

    async def find() -> dict[str, Any]:
        async with own.database.connection() as connection:
            if not include_machines:
                return await pools.get(connection, organization_id, pool_id)
            return await pools.get_with_machines(
                connection,
                organization_id,
                pool_id,
                max_bytes=own.settings.max_reply_bytes,
                asked_by=("query", "include_machines"),
            )

    pool = await memory_budget.with_room(find)
    if wanted:
        pool |= {"included": await included.of_pools(own, organization_id, [pool])}
    return json_reply(pool)


@router.patch(
    "/{pool_id}",
    response_model=PoolResponse,
    **operation(PoolNotFound, body=PoolUpdate, write=True, scope="resources:write"),
)
async def update_pool(pool_id: UUID, request: Request) -> Response:
    """Change what the body names; null clears the description."""
    options, write = await read(request, PoolUpdate)
    return send(await pools.change(services(request), write, pool_id, options))


@router.delete("/{pool_id}", status_code=204, **operation(PoolNotFound, write=True, scope="resources:write"))
async def delete_pool(pool_id: UUID, request: Request) -> Response:
    """Remove a pool. Its machines stay; runs that ask for it keep waiting (`no_machine_in_pools`)."""
    write = await read_write(request)
    return send(await pools.delete(services(request), write, pool_id))


@router.post(
    "/{pool_id}/machines",
    response_model=PoolWithMachines,
    **operation(PoolNotFound, MachineNotFound, body=MachinePoolAssignment, write=True, scope="resources:write"),
)
async def add_machines_to_pool(pool_id: UUID, request: Request) -> Response:
    """Add machines to a pool: all of them or none."""
    options, write = await read(request, MachinePoolAssignment)
    return send(await pools.add_machines(services(request), write, pool_id, options))


@router.delete(
    "/{pool_id}/machines",
    status_code=204,
    **operation(PoolNotFound, MachineNotFound, body=MachinePoolAssignment, write=True, scope="resources:write"),
)
async def remove_machines_from_pool(pool_id: UUID, request: Request) -> Response:
    """Take machines out of a pool: all of them or none."""
    options, write = await read(request, MachinePoolAssignment)
    return send(await pools.remove_machines(services(request), write, pool_id, options))
