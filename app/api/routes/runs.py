"""Runs: create, list, read, report, delete, and retry."""

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from app import events
from app.api.openapi import ETAG, IF_NONE_MATCH, operation
from app.api.requests import (
    is_head,
    is_true,
    known_tags,
    may_still_send,
    read,
    read_only,
    read_write,
    services,
    still_known,
    while_connected,
)
from app.api.responses import ONLY, EventsAfter, Limit, Part, Skip, including, json_reply, send
from app.api.scopes import Route
from app.errors import (
    AlreadyClaimed,
    AssignmentSuperseded,
    AttemptChanged,
    AttemptNotFound,
    AttemptSuperseded,
    InputAttachmentsExpired,
    Invalid,
    InvalidTransition,
    MachineDeleted,
    MachineNotFound,
    PoolDeleted,
    PoolNotFound,
    RetryTooSoon,
    RunNotFound,
    RunNotTerminal,
    RunNotWaiting,
    SensitiveInputsExpired,
    SessionNotFound,
    StorageUnavailable,
    VaultUnavailable,
    WorkflowNotFound,
)
from app.resources import included
from app.runs import attempts, create, deleting, history, reading, report
from app.runs.dry_run import dry_run
from app.runs.listing import FIELDS, Order, RunFilter, Search, list_runs, shown_fields, wait_for_run
from app.runs.retry import Retry, replied, retry_runs
from app.schemas.runs import (
    DryRunResponse,
    ListedStatus,
    RunAttemptDetails,
    RunAttemptResponse,
    RunBulkCreate,
    RunBulkCreateResponse,
    RunCreate,
    RunEventResponse,
    RunHistoryPage,
    RunPage,
    RunResponse,
    RunRetry,
    RunUpdate,
    RunWithIncluded,
)
from app.schemas.values import ErrorCode, Flag, Number, Page, Reason, SearchText, Timestamp
from app.telemetry import metrics

router = APIRouter(route_class=Route, prefix="/v1/runs", tags=["runs"])

_TARGETS = (MachineNotFound, PoolNotFound, SessionNotFound)
_STORES = (VaultUnavailable, StorageUnavailable)

_FIELD = f" *({'|'.join(sorted(FIELDS))})? *"
_FieldNames = Annotated[str, Field(json_schema_extra={"pattern": f"^{_FIELD}(,{_FIELD})*$"})]


_RETRY_REFUSALS = (
    RunNotFound,
    *_TARGETS,
    RunNotTerminal,
    AttemptChanged,
    SensitiveInputsExpired,
    InputAttachmentsExpired,
    MachineDeleted,
    PoolDeleted,
    RetryTooSoon,
    *_STORES,
)


@router.post(
    "/{run_id}/retry",
    response_model=RunResponse,
    **operation(*_RETRY_REFUSALS, body=RunRetry, write=True, scope="runs:write"),
)
async def retry_run(run_id: UUID, request: Request) -> Response:
    """Reset a finished run in place and queue it again.

    Clears outputs, history and output attachments; replaces what the body overrides; keeps the rest.
    """
    # Not a parameter of the framework's, which would cost every retry. The document names the route below instead: a reply
    # of two forms makes no client.
    if request.scope["query_string"] and is_true(request, "dry_run"):
        return await dry_run_retry(run_id, request)
    options, write = await read(request, RunRetry)
    [outcome] = await retry_runs(services(request), [Retry.of(write, run_id, options)])
    return send(replied(outcome))


@router.post(
    "/{run_id}/retry/dry-run",
    response_model=DryRunResponse,
    **operation(RunNotFound, body=RunRetry, scope="runs:write"),
)
async def dry_run_retry(run_id: UUID, request: Request) -> Response:
    """What a retry with this body would do, and every refusal that it would get, except quotas.

    Nothing is changed. `POST /v1/runs/{run_id}/retry?dry_run=true` is the same.
    """
    request.state.dry_run = True  # the edge counts no retry
    options = await read_only(request, RunRetry)
    return json_reply(await dry_run(services(request), request.state.principal, run_id, options))


@router.post(
    "",
    status_code=201,
    response_model=RunResponse,
    **operation(RunNotFound, WorkflowNotFound, *_TARGETS, *_STORES, body=RunCreate, write=True, scope="runs:write"),
)
async def create_run(request: Request) -> Response:
    """Queue a new run of a workflow."""
    options, write = await read(request, RunCreate)
    return send(await create.create(services(request), write, options))


@router.post(
    "/bulk",
    status_code=201,
    response_model=RunBulkCreateResponse,
    **operation(WorkflowNotFound, *_TARGETS, *_STORES, body=RunBulkCreate, write=True, scope="runs:write"),
)
async def bulk_create_runs(request: Request) -> Response:
    """Queue many runs that are alike: all of them or none."""
    options, write = await read(request, RunBulkCreate)
    reply = await create.create_bulk(services(request), write, options)
    if not reply.replayed:
        metrics.transitions.add("scheduling", "caller", count=options.count)
    return send(reply)


_GET = operation(RunNotFound, scope="runs:read", bound="runs:read")
_GET["openapi_extra"]["parameters"] = [IF_NONE_MATCH]
_GET["responses"] |= {
    200: {"description": "The run.", "headers": ETAG},
    304: {"description": "The run is as the reply with this ETag showed it.", "headers": ETAG},
}


_Include = Annotated[str, including(included.OF_RUNS)]


@router.get("/{run_id}", response_model=RunWithIncluded, **_GET)
async def get_run(
    run_id: UUID,
    request: Request,
    fields: Annotated[list[_FieldNames] | None, Query(description="Only these keys, and the base fields.")] = None,
    include: _Include = "",
) -> Response:
    """One run. Leave run_message_history out with `fields`, and read it in pages, if it has screenshots.

    With `include` the reply has no ETag: what it adds may change while the run does not.
    """
    own, principal = services(request), request.state.principal
    if wanted := included.names(include, included.OF_RUNS):
        run = (await reading.read(own.database, run_id, principal, shown_fields(fields))).run
        assert run is not None  # noqa: S101 - no tag was given
        return json_reply(run | {"included": await included.of_runs(own, principal, wanted, [run])})
    found = await reading.read(own.database, run_id, principal, shown_fields(fields), known_tags(request))
    headers = {"ETag": found.tag}
    if found.run is None:
        return Response(None, 304, headers)
    return json_reply(found.run, headers)


@router.get(
    "/{run_id}/history",
    response_model=RunHistoryPage,
    **operation(RunNotFound, scope="runs:read", bound="runs:read"),
)
async def get_run_history(
    run_id: UUID,
    request: Request,
    after: Annotated[
        int, Query(ge=0, le=2**31 - 1, description="Messages to pass over; `next` of the page before.")
    ] = 0,
    limit: Limit = 100,
) -> Response:
    """The current attempt's run_message_history in pages of about 1 MiB at most, oldest message first.

    A page has at least one message, however long. `after` may be any number: `total` minus 3 shows the last three. If
    `attempt` is another one than in the page before, the run was retried: begin again.
    """
    database, principal = services(request).database, request.state.principal
    return json_reply(await history.read(database, run_id, principal, after, limit))


@router.get(
    "/{run_id}/attempts",
    response_model=Page[RunAttemptResponse],
    **operation(RunNotFound, scope="runs:read", bound="runs:read"),
)
async def list_run_attempts(run_id: UUID, request: Request, part: Part) -> Response:
    """The archive of finished attempts, newest first."""
    return json_reply(await attempts.list_attempts(services(request).database, run_id, request.state.principal, part))


@router.get(
    "/{run_id}/attempts/{attempt}",
    response_model=RunAttemptDetails,
    **operation(RunNotFound, AttemptNotFound, scope="runs:read", bound="runs:read"),
)
async def get_run_attempt(
    run_id: UUID,
    attempt: Annotated[Number, Path(description="Its number, from 1.")],
    request: Request,
) -> Response:
    """One attempt with what it produced: the current one, or an earlier one.

    The outputs of earlier attempts are kept if the service is set to ATTEMPT_OUTPUTS=all. A key that is bound to a machine sees
    only the current attempt.
    """
    return json_reply(await attempts.get(services(request).database, run_id, attempt, request.state.principal))


@router.get(
    "/{run_id}/events",
    response_model=Page[RunEventResponse],
    **operation(RunNotFound, scope="runs:read", bound="runs:read"),
)
async def list_run_events(
    run_id: UUID, request: Request, after: EventsAfter = None, skip: Skip = 0, limit: Limit = 100
) -> Response:
    """What happened to a run, oldest first; also to one that was deleted. An event shows once all older changes have ended."""
    organization_id = request.state.principal.organization_id
    async with services(request).database.connection() as connection:
        page = await events.list_of_run(connection, organization_id, run_id, after, skip, limit)
        if request.state.principal.machine_id is not None or not page["total"]:
            await attempts.check_known(connection, run_id, request.state.principal)
    return json_reply(page)


@router.get("", name="list_runs", response_model=RunPage, **operation(scope="runs:read", bound="runs:read"))
async def list_all(
    request: Request,
    part: Part,
    workflow_id: Annotated[UUID | None, ONLY] = None,
    machine_id: Annotated[UUID | None, Query(description="Runs whose machine_id is this.")] = None,
    session_id: Annotated[UUID | None, ONLY] = None,
    status: Annotated[
        ListedStatus | None,
        Query(description="Only runs in this status. No run is in `running_checks`: the page is empty."),
    ] = None,
    created_at_from: Annotated[Timestamp | None, Query(description="Created at or after.")] = None,
    created_at_to: Annotated[Timestamp | None, Query(description="Created at or before.")] = None,
    changed_from: Annotated[
        Timestamp | None,
        Query(description="Created, retried, started or ended last at or after this, as changed_at says."),
    ] = None,
    changed_to: Annotated[Timestamp | None, Query(description="The same, at or before this.")] = None,
    ended_from: Annotated[
        Timestamp | None, Query(description="Ended at or after this, by the service's own clock: changed_at.")
    ] = None,
    ended_to: Annotated[Timestamp | None, Query(description="The same, at or before this.")] = None,
    error_code: Annotated[
        ErrorCode | None,
        Query(description="Only those with this value; among the newest 10,000 that the other filters leave."),
    ] = None,
    order: Annotated[
        Order,
        Query(
            description="`changed`: those that were created, retried, started or ended last come first. Beside a workflow, a"
            " machine, a session or a time of creation only the newest 10,000 changes are looked at (`list_is_partial`)."
        ),
    ] = "created",
    search: Annotated[
        SearchText,
        Query(
            description="Runs that hold this text in their id, input_values, output_data, error or session_alias, in any case."
            " The newest 10,000 runs that the other filters leave are looked at, for a second (`search_is_partial`)."
            " The beginning of an id (8 digits or more) is looked for among all runs, and what it finds comes first."
        ),
    ] = "",
    deep_search: Annotated[
        Flag,
        Query(
            description="Search in run_message_history too. Also name a workflow, a machine, a session or a window of time."
        ),
    ] = False,
    fields: Annotated[list[_FieldNames] | None, Query(description="Only these keys, and the base fields.")] = None,
    include: _Include = "",
    wait: Annotated[
        float,
        Query(ge=0, le=30, description="Seconds to hold the reply until there is a run (assigned to machine_id)."),
    ] = 0,
) -> Response:
    """Runs, newest first.

    With changed_from, changed_to, ended_from or ended_to beside the order of creation, as with order=changed beside another
    filter, the newest 10,000 changes are looked at; list_is_partial says whether there are more.
    """
    principal = request.state.principal
    wanted = RunFilter(
        principal.organization_id,
        workflow_id,
        machine_id,
        session_id,
        status,
        created_at_from,
        created_at_to,
        changed_from,
        changed_to,
        ended_from,
        ended_to,
        error_code,
        bound_to=principal.machine_id,
    )
    searched = None if not search else Search(search, deep_search)
    if searched is not None:
        _refuse_search(wanted, searched, wait)
    own, shown, related = services(request), shown_fields(fields), included.names(include, included.OF_RUNS)
    looking_for_work: AbstractContextManager[None] = nullcontext()
    if is_head(request):  # a probe: it does not wait, and nobody looks for work with it
        return json_reply(await list_runs(own.database, wanted, shown, part))
    is_own = principal.machine_id in (None, machine_id)
    if is_own and machine_id is not None and status == "scheduling" and principal.may("runs:execute"):
        looking_for_work = own.signs_of_life.waits(
            principal.organization_id, machine_id, lambda: may_still_send(request)
        )
    with looking_for_work:
        if wait:
            with request.app.state.limits.long_poll(principal):
                await while_connected(request, wait_for_run(own, wanted, wait))
            await still_known(request)
    page: dict[str, Any] = await list_runs(own.database, wanted, shown, part, order, searched)
    if related:
        page |= {"included": await included.of_runs(own, principal, related, page["items"])}
    return json_reply(page)


def _refuse_search(wanted: RunFilter, searched: Search, wait: float) -> None:
    """Raises Invalid for a search that would wait, and for a deep one of all that an organization has."""
    if wait:
        raise Invalid((("query", "wait"), "Must be 0 beside search.", "wait_for_search"))
    if searched.deep and not wanted.is_narrow:
        sentence = (
            "Beside deep_search=true, name workflow_id, machine_id or session_id, or a window of time: created_at_from,"
            " created_at_to, changed_from, changed_to, ended_from or ended_to."
        )
        raise Invalid((("query", "deep_search"), sentence, "deep_search"))


@router.patch(
    "/{run_id}",
    response_model=RunResponse,
    **operation(
        RunNotFound,
        MachineNotFound,
        PoolNotFound,
        InvalidTransition,
        AttemptSuperseded,
        AssignmentSuperseded,
        AlreadyClaimed,
        RunNotWaiting,
        InputAttachmentsExpired,
        body=RunUpdate,
        write=True,
        scope=("runs:execute", "runs:write"),
        bound="runs:execute",
    ),
)
async def update_run(run_id: UUID, request: Request) -> Response:
    """An executor's report: status, outputs, history."""
    options, write = await read(request, RunUpdate)
    return send(await report.report(services(request), write, run_id, options))


@router.delete("/{run_id}", status_code=204, **operation(RunNotFound, write=True, scope="runs:write"))
async def delete_run(
    run_id: UUID,
    request: Request,
    reason: Annotated[Reason | None, Query(description="Why; kept with the event.")] = None,
) -> Response:
    """Remove a run with everything it has; an active one frees its machine."""
    write = await read_write(request)
    return send(await deleting.delete(services(request), write, run_id, reason))
