"""Workflows: create, list, read, change, delete."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.openapi import operation
from app.api.requests import read, read_write, services
from app.api.responses import From, Part, To, json_reply, send
from app.api.scopes import Route
from app.errors import WorkflowNotFound
from app.resources import workflows
from app.schemas.resources import WorkflowCreate, WorkflowResponse, WorkflowUpdate, WorkflowVersionResponse
from app.schemas.values import SearchedPage, SearchText

router = APIRouter(route_class=Route, prefix="/v1/workflows", tags=["workflows"])


@router.post(
    "",
    status_code=201,
    response_model=WorkflowResponse,
    **operation(WorkflowNotFound, body=WorkflowCreate, write=True, scope="resources:write"),
)
async def create_workflow(request: Request) -> Response:
    """A new workflow."""
    options, write = await read(request, WorkflowCreate)
    return send(await workflows.create(services(request), write, options))


@router.get("", response_model=SearchedPage[WorkflowResponse], **operation(scope="runs:read", bound="runs:read"))
async def list_workflows(
    request: Request,
    part: Part,
    created_at_from: From = None,
    created_at_to: To = None,
    updated_at_from: From = None,
    updated_at_to: To = None,
    search: Annotated[SearchText, Query(description="Only those with this text in their id or name; no case.")] = "",
) -> Response:
    """Workflows, newest first."""
    principal = request.state.principal
    return json_reply(
        await workflows.list_workflows(
            services(request).database,
            principal,
            part,
            search,
            created_at_from=created_at_from,
            created_at_to=created_at_to,
            updated_at_from=updated_at_from,
            updated_at_to=updated_at_to,
        )
    )


@router.get(
    "/{workflow_id}",
    response_model=WorkflowResponse,
    **operation(WorkflowNotFound, scope="runs:read", bound="runs:read"),
)
async def get_workflow(workflow_id: UUID, request: Request) -> Response:
    """One workflow."""
    return json_reply(await workflows.get_seen(services(request).database, request.state.principal, workflow_id))


@router.get(
    "/{workflow_id}/versions",
    response_model=list[WorkflowVersionResponse],
    **operation(WorkflowNotFound, scope="runs:read"),
)
async def list_workflow_versions(
    workflow_id: UUID,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=workflows.MOST_VERSIONS, description="Most versions in the reply.")] = 1000,
) -> Response:
    """What each change of the name, the prompt or the schemas replaced, newest first; the last 1,000 are kept.

    The current version is the workflow itself.
    """
    own = services(request)
    versions = await workflows.list_versions(
        own.database,
        request.state.principal.organization_id,
        workflow_id,
        limit=limit,
        max_bytes=own.settings.max_reply_bytes,
    )
    return json_reply(versions)


@router.patch(
    "/{workflow_id}",
    response_model=WorkflowResponse,
    **operation(WorkflowNotFound, body=WorkflowUpdate, write=True, scope="resources:write"),
)
async def update_workflow(workflow_id: UUID, request: Request) -> Response:
    """Change what the body names; null clears a name or a schema."""
    options, write = await read(request, WorkflowUpdate)
    return send(await workflows.change(services(request), write, workflow_id, options))


@router.delete("/{workflow_id}", status_code=204, **operation(WorkflowNotFound, write=True, scope="resources:write"))
async def delete_workflow(workflow_id: UUID, request: Request) -> Response:
    """Remove a workflow and all its runs, with their secrets and files."""
    write = await read_write(request)
    return send(await workflows.delete(services(request), write, workflow_id))
