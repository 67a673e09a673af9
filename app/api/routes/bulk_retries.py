"""Bulk retries: jobs that retry many runs."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.openapi import operation
from app.api.requests import is_true, read, read_only, read_write, services
from app.api.responses import ONLY, After, Part, Skip, json_reply, send
from app.api.scopes import Route
from app.bulk import jobs
from app.bulk.dry_run import dry_run
from app.errors import BulkRetryEnded, BulkRetryNotFound, MachineNotFound, PoolNotFound
from app.schemas.bulk import (
    BulkDryRunResponse,
    BulkRetryCreate,
    BulkRetryItemResponse,
    BulkRetryResponse,
    Outcome,
)
from app.schemas.values import Page
from app.stores.paging import Slice

router = APIRouter(route_class=Route, prefix="/v1/bulk-retries", tags=["bulk retries"])

_REFUSALS = (BulkRetryNotFound, MachineNotFound, PoolNotFound)
_COMMAND = operation(BulkRetryNotFound, BulkRetryEnded, write=True, scope="runs:write")


@router.post(
    "",
    status_code=202,
    response_model=BulkRetryResponse,
    **operation(*_REFUSALS, body=BulkRetryCreate, write=True, scope="runs:write"),
)
async def create_bulk_retry(request: Request) -> Response:
    """Retry many runs: those listed, or those that match a filter now. The runs are chosen at once, and retried one after the
    other, each at the attempt that it had when it was chosen."""
    if is_true(request, "dry_run"):
        return await dry_run_bulk_retry(request)
    options, write = await read(request, BulkRetryCreate)
    return send(await jobs.create(services(request), write, options))


@router.post(
    "/dry-run",
    response_model=BulkDryRunResponse,
    **operation(*_REFUSALS, body=BulkRetryCreate, scope="runs:write"),
)
async def dry_run_bulk_retry(request: Request) -> Response:
    """What a bulk retry with this body would do. Nothing is changed.

    `POST /v1/bulk-retries?dry_run=true` is the same.
    """
    request.state.dry_run = True
    options = await read_only(request, BulkRetryCreate)
    return json_reply(await dry_run(services(request), request.state.principal, options))


@router.get("", response_model=Page[BulkRetryResponse], **operation(scope="runs:read"))
async def list_bulk_retries(
    request: Request,
    after: After = None,
    skip: Skip = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Items in the page.")] = 20,
) -> Response:
    """Bulk retries, newest first. A page shows at most 200,000 runs' worth of them."""
    part = Slice(skip, limit, services(request).settings.max_reply_bytes, after or None)
    organization_id = request.state.principal.organization_id
    return json_reply(await jobs.list_jobs(services(request).database, organization_id, part))


@router.get("/{bulk_retry_id}", response_model=BulkRetryResponse, **operation(BulkRetryNotFound, scope="runs:read"))
async def get_bulk_retry(bulk_retry_id: UUID, request: Request) -> Response:
    """One bulk retry, with what has become of its runs."""
    async with services(request).database.connection() as connection:
        organization_id = request.state.principal.organization_id
        return json_reply(await jobs.get(connection, organization_id, bulk_retry_id))


@router.get(
    "/{bulk_retry_id}/items",
    response_model=Page[BulkRetryItemResponse],
    **operation(BulkRetryNotFound, scope="runs:read"),
)
async def list_bulk_retry_items(
    bulk_retry_id: UUID, request: Request, part: Part, outcome: Annotated[Outcome | None, ONLY] = None
) -> Response:
    """The runs of a bulk retry, in its order."""
    organization_id = request.state.principal.organization_id
    return json_reply(await jobs.list_items(services(request).database, organization_id, bulk_retry_id, outcome, part))


async def _command(request: Request, bulk_retry_id: UUID, wanted: jobs.Command) -> Response:
    return send(await jobs.command(services(request), await read_write(request), bulk_retry_id, wanted))


@router.post("/{bulk_retry_id}/pause", response_model=BulkRetryResponse, **_COMMAND)
async def pause_bulk_retry(bulk_retry_id: UUID, request: Request) -> Response:
    """Retry no more of its runs until it is resumed. A paused one stays as it is."""
    return await _command(request, bulk_retry_id, "pause")


@router.post("/{bulk_retry_id}/resume", response_model=BulkRetryResponse, **_COMMAND)
async def resume_bulk_retry(bulk_retry_id: UUID, request: Request) -> Response:
    """Go on, also with the rest after the `first` have failed, and counting failures from 0 again."""
    return await _command(request, bulk_retry_id, "resume")


@router.post("/{bulk_retry_id}/abort", response_model=BulkRetryResponse, **_COMMAND)
async def abort_bulk_retry(bulk_retry_id: UUID, request: Request) -> Response:
    """End it: the runs that were not retried yet are skipped. Nothing is undone."""
    return await _command(request, bulk_retry_id, "abort")
