"""Machines: register, list, read, change, delete, and which pools they are in."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.openapi import operation
from app.api.requests import read, read_write, services
from app.api.responses import ONLY, From, Part, To, including, json_reply, send
from app.api.scopes import Route
from app.errors import MachineNotFound, PoolNotFound
from app.resources import included, machines
from app.schemas.resources import (
    MachineCreate,
    MachinePage,
    MachinePoolUpdate,
    MachineResponse,
    MachinesHealth,
    MachineStatus,
    MachineUpdate,
    MachineWithIncluded,
    PoolResponse,
)
from app.schemas.values import Name, SearchText
from app.stores.documents import encode
from app.stores.paging import Slice

_HEALTH = operation(scope="runs:read", bound="runs:read")
_HEALTH["responses"][503]["content"]["application/json"] = {"schema": {"$ref": "#/components/schemas/MachinesHealth"}}

router = APIRouter(route_class=Route, prefix="/v1/machines", tags=["machines"])


health_router = APIRouter(route_class=Route, prefix="/v1/health", tags=["health"])


@health_router.get("/machines", response_model=MachinesHealth, **_HEALTH)
async def get_machines_health(request: Request) -> Response:
    """Which machines are connected. 503 if one is not, as the vendor has it."""
    own, principal = services(request), request.state.principal
    part = Slice(0, machines.MOST_CHECKED, own.settings.max_reply_bytes, None)
    page: Any = await machines.list_machines(own.database, principal.organization_id, part, id=principal.machine_id)
    found = machines.health(page["items"])
    return Response(encode(found), 503 if found["errored_machines"] else 200, media_type="application/json")


@router.post(
    "",
    status_code=201,
    response_model=MachineResponse,
    **operation(MachineNotFound, body=MachineCreate, write=True, scope="resources:write"),
)
async def create_machine(request: Request) -> Response:
    """Register a machine. It is connected and available at once."""
    options, write = await read(request, MachineCreate)
    return send(await machines.create(services(request), write, options))


_Include = Annotated[str, including(included.OF_MACHINES)]


@router.get("", response_model=MachinePage, **operation(scope="runs:read", bound="runs:read"))
async def list_machines(
    request: Request,
    part: Part,
    name: Annotated[Name | None, Query(description="Exactly this name.")] = None,
    status: Annotated[MachineStatus | None, ONLY] = None,
    created_at_from: From = None,
    created_at_to: To = None,
    search: Annotated[
        SearchText, Query(description="Only those with this text in their id, name or hostname; no case.")
    ] = "",
    include: _Include = "",
) -> Response:
    """Machines, newest first."""
    principal = request.state.principal
    wanted = included.names(include, included.OF_MACHINES)
    page: dict[str, Any] = await machines.list_machines(
        services(request).database,
        principal.organization_id,
        part,
        search,
        id=principal.machine_id,  # a key that is bound to a machine sees no other
        name=name,
        status=status,
        created_at_from=created_at_from,
        created_at_to=created_at_to,
    )
    if wanted:
        page |= {"included": await included.of_machines(page["items"])}
    return json_reply(page)


def _refuse_others(machine_id: UUID, request: Request) -> None:
    """A key that is bound to a machine sees no other."""
    if request.state.principal.machine_id not in (None, machine_id):
        raise MachineNotFound


@router.get(
    "/{machine_id}",
    response_model=MachineWithIncluded,
    **operation(MachineNotFound, scope="runs:read", bound="runs:read"),
)
async def get_machine(machine_id: UUID, request: Request, include: _Include = "") -> Response:
    """One machine."""
    wanted = included.names(include, included.OF_MACHINES)
    _refuse_others(machine_id, request)
    async with services(request).database.connection() as connection:
        machine = await machines.get(connection, request.state.principal.organization_id, machine_id)
    if wanted:
        machine |= {"included": await included.of_machines([machine])}
    return json_reply(machine)


@router.patch(
    "/{machine_id}",
    response_model=MachineResponse,
    **operation(MachineNotFound, body=MachineUpdate, write=True, scope="resources:write", bound="runs:execute"),
)
async def update_machine(machine_id: UUID, request: Request) -> Response:
    """Change what the body names; null clears a text.

    `reserved_session_id: null` ends the session on this machine: its active runs are cancelled, the machine is free again.
    """
    options, write = await read(request, MachineUpdate)
    return send(await machines.change(services(request), write, machine_id, options))


@router.delete("/{machine_id}", status_code=204, **operation(MachineNotFound, write=True, scope="resources:write"))
async def delete_machine(machine_id: UUID, request: Request) -> Response:
    """Remove a machine. Active runs pinned or assigned to it end with an error; all its runs stay, without a machine."""
    write = await read_write(request)
    return send(await machines.delete(services(request), write, machine_id))


@router.get(
    "/{machine_id}/pools",
    response_model=list[PoolResponse],
    **operation(MachineNotFound, scope="runs:read", bound="runs:read"),
)
async def get_machine_pools(machine_id: UUID, request: Request) -> Response:
    """The pools a machine is in, newest first."""
    _refuse_others(machine_id, request)
    async with services(request).database.connection() as connection:
        machine = await machines.get(connection, request.state.principal.organization_id, machine_id)
    return json_reply(machine["pools"])


@router.put(
    "/{machine_id}/pools",
    response_model=MachineResponse,
    **operation(MachineNotFound, PoolNotFound, body=MachinePoolUpdate, write=True, scope="resources:write"),
)
async def update_machine_pools(machine_id: UUID, request: Request) -> Response:
    """Put a machine into exactly these pools. Answers the machine: that is what every SDK reads."""
    options, write = await read(request, MachinePoolUpdate)
    return send(await machines.set_pools(services(request), write, machine_id, options))
