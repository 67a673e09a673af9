"""Files of runs: hand in outputs, list, read, expire and delete."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api import downloads
from app.api.downloads import Ticket
from app.api.openapi import operation
from app.api.requests import read, read_write, services
from app.api.responses import ONLY, Part, json_reply, send
from app.api.scopes import Route
from app.errors import (
    AlreadyClaimed,
    AssignmentSuperseded,
    AttachmentBytesMissing,
    AttachmentNotFound,
    AttemptSuperseded,
    InputAttachmentsExpired,
    InvalidTransition,
    RangeNotSatisfiable,
    Refusal,
    RunNotFound,
    StorageUnavailable,
)
from app.runs import attachments
from app.schemas.attachments import (
    AttachmentType,
    DownloadUrlResponse,
    RunAttachmentCreate,
    RunAttachmentResponse,
    RunAttachmentUpdate,
)
from app.schemas.values import Page

router = APIRouter(route_class=Route, tags=["run-attachments"])

_PATH = "/v1/run-attachments"


def _download(*refusals: type[Refusal], public: bool = False) -> dict[str, Any]:
    """`operation` for a reply of bytes, whole or a range of them."""
    described = operation(
        *refusals,
        AttachmentBytesMissing,
        RangeNotSatisfiable,
        StorageUnavailable,
        scope=() if public else "runs:read",
        bound=None if public else "runs:read",
        public=public,
    )
    content = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
    described["responses"] |= {
        200: {"description": "The file.", "content": content},
        206: {"description": "The range of the file that was asked for.", "content": content},
    }
    described["openapi_extra"].setdefault("parameters", []).append(
        {
            "name": "Range",
            "in": "header",
            "required": False,
            # No example: pages that try requests out would send it.
            "description": "One range of bytes, as in RFC 9110 section 14 (`bytes=0-1023`); "
            "anything else is answered with the whole file.",
            "schema": {"type": "string"},
        }
    )
    return described | {"response_class": Response}


@router.get(_PATH, response_model=Page[RunAttachmentResponse], **operation(scope="runs:read", bound="runs:read"))
async def list_run_attachments(
    request: Request,
    part: Part,
    run_id: Annotated[UUID | None, ONLY] = None,
    attachment_type: Annotated[AttachmentType | None, ONLY] = None,
    attempt: Annotated[
        int | None,
        Query(
            ge=1,
            le=2**31 - 1,
            description="Beside run_id: only the output files of this attempt. Those of earlier attempts are kept if the"
            " service is set to ATTEMPT_OUTPUTS=all.",
        ),
    ] = None,
) -> Response:
    """Attachments that the organization's runs have now, newest first."""
    database, principal = services(request).database, request.state.principal
    return json_reply(await attachments.list_attachments(database, principal, run_id, attachment_type, part, attempt))


@router.post(
    _PATH,
    status_code=201,
    response_model=RunAttachmentResponse,
    **operation(
        RunNotFound,
        AttachmentNotFound,
        InvalidTransition,
        AttemptSuperseded,
        AssignmentSuperseded,
        AlreadyClaimed,
        StorageUnavailable,
        body=RunAttachmentCreate,
        write=True,
        scope="runs:execute",
        bound="runs:execute",
    ),
)
async def create_run_attachment(request: Request) -> Response:
    """Hand in an output of a running run.

    Refused if the run was retried or ended before the upload was complete.
    """
    options, write = await read(request, RunAttachmentCreate)
    return send(await attachments.create(services(request), write, options))


@router.get(
    _PATH + "/{attachment_id}",
    response_model=RunAttachmentResponse,
    **operation(AttachmentNotFound, scope="runs:read", bound="runs:read"),
)
async def get_run_attachment(attachment_id: UUID, request: Request) -> Response:
    """One attachment, without its bytes. An expired output is gone; an expired input is still described."""
    return json_reply(await attachments.get(services(request).database, request.state.principal, attachment_id))


@router.put(
    _PATH + "/{attachment_id}",
    response_model=RunAttachmentResponse,
    **operation(
        RunNotFound,
        AttachmentNotFound,
        InputAttachmentsExpired,
        InvalidTransition,
        AttemptSuperseded,
        AssignmentSuperseded,
        AlreadyClaimed,
        body=RunAttachmentUpdate,
        write=True,
        scope=("runs:execute", "runs:write"),
        bound="runs:execute",
    ),
)
async def update_run_attachment(attachment_id: UUID, request: Request) -> Response:
    """Change when the file expires; a time in the past expires it now.

    An expired input can be kept after all until its bytes are deleted; those of an active run are only deleted when it ends.
    A key that is bound to a machine can change only outputs of its running run.
    """
    options, write = await read(request, RunAttachmentUpdate)
    return send(await attachments.update(services(request), write, attachment_id, options))


@router.delete(
    _PATH + "/{attachment_id}", status_code=204, **operation(AttachmentNotFound, write=True, scope="runs:write")
)
async def delete_run_attachment(attachment_id: UUID, request: Request) -> Response:
    """Remove the attachment and its bytes, whatever the run's status.

    An input of an active run too, as deleting the run itself would: whoever asks for it wants it gone now, and the run goes
    on without it.
    """
    write = await read_write(request)
    return send(await attachments.delete(services(request), write, attachment_id))


@router.get(_PATH + "/{attachment_id}/download", **_download(AttachmentNotFound))
async def download_run_attachment(attachment_id: UUID, request: Request) -> Response:
    """The file's bytes, as a download."""
    own = services(request)
    async with own.database.connection() as connection:
        file = await attachments.readable(connection, attachment_id, request.state.principal)
    return await downloads.respond(own, file, request)


@router.get(
    _PATH + "/{attachment_id}/download-url",
    response_model=DownloadUrlResponse,
    **operation(AttachmentNotFound, StorageUnavailable, scope="runs:read", bound="runs:read"),
)
async def get_run_attachment_download_url(
    attachment_id: UUID,
    request: Request,
    expires_in: Annotated[int, Query(ge=10, le=3600, description="Seconds.")] = 300,
) -> Response:
    """A URL that anyone can download the file from, without an API key, until it expires."""
    own = services(request)
    async with own.database.connection() as connection:
        file = await attachments.readable(connection, attachment_id, request.state.principal)
    url = await own.files.signed_url(file["storage_path"], expires_in)
    if url is None:
        base = own.settings.public_url or str(request.base_url)
        url = base.rstrip("/") + Ticket.sign(own.settings, attachment_id, expires_in, own.database.clock.now()).url
    return json_reply({"url": url, "expires_in": expires_in})


@router.get("/downloads/{attachment_id}", **_download(AttachmentNotFound, public=True))
async def download_signed_url(
    attachment_id: str,
    request: Request,
    expires: Annotated[str, Query(description="Unix time.")] = "",
    signature: Annotated[str, Query(description="Proves that the URL is ours.")] = "",
) -> Response:
    """The file's bytes for whoever has the URL, until it expires."""
    own = services(request)
    file = await downloads.redeem(own.database, own.settings, Ticket(attachment_id, expires, signature))
    return await downloads.respond(own, file, request)
