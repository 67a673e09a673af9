"""Files of a run: an executor hands in outputs; anyone in the organization lists, reads, expires and deletes them.

Whatever changes an attachment locks its run first, as a retry does: the two never see each other half-done.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam
from sqlalchemy import delete as delete_from

from app.access.auth import SEEN, Principal
from app.errors import (
    AttachmentNotFound,
    AttemptSuperseded,
    InputAttachmentsExpired,
    InsufficientScope,
    Invalid,
    InvalidTransition,
    RunNotFound,
)
from app.idempotency import Reply, Resource, WriteRequest, check_or_replay, once
from app.models import TERMINAL, RunAttachment, RunStatus
from app.runs import fences, projection, replays, staging
from app.scheduling import rules
from app.schemas.attachments import AttachmentType, RunAttachmentCreate, RunAttachmentUpdate
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Database, Record
from app.stores.deletions import Name
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import by_id, rows_of, statement

COLUMNS = columns(projection.ATTACHMENT_COLUMNS)

# What the caller may see: a key that is bound to a machine, files of that machine's runs, and none of earlier attempts, which
# may have been on other machines. OFFSET 0: the run is looked up by its id for this attachment, not joined.
OF_CALLER = f"""EXISTS (
    SELECT FROM (SELECT * FROM runs WHERE id = a.run_id OFFSET 0) AS r
    WHERE a.organization_id = :organization_id AND {SEEN} AND (:bound_to::uuid IS NULL OR {projection.CURRENT})
    OFFSET 0)"""

GET = statement(
    "attachments.get",
    f"""
    SELECT {COLUMNS} FROM run_attachments a
    WHERE a.id = :attachment_id AND {OF_CALLER} AND {projection.VISIBLE}
    """,
)

# Its bytes. An expired file cannot be read, also before they are collected.
_READABLE = """
SELECT id, organization_id, filename, content_type, size_bytes, storage_path FROM run_attachments a
WHERE id = :attachment_id AND storage_path IS NOT NULL AND (expires_at IS NULL OR expires_at > now())
"""
READABLE = statement("attachments.readable", _READABLE)
READABLE_BY_CALLER = statement("attachments.readable_by_caller", f"{_READABLE} AND {OF_CALLER}")

OF_MACHINE = "EXISTS (SELECT FROM runs WHERE runs.id = a.run_id AND runs.assigned_machine_id = :machine_id)"

ATTACHMENTS = Listing(
    "attachments", "run_attachments a", octets="octet_length(to_json(a)::text)", row="a.id = listed.key"
)
ROWS = statement("attachments.rows", f"SELECT {COLUMNS} FROM {in_order('run_attachments a')} ORDER BY page.n")

# --- read -------------------------------------------------------------------------------------------------------------


async def get(database: Database, principal: Principal, attachment_id: UUID) -> dict[str, Any]:
    """One attachment. Raises AttachmentNotFound."""
    async with database.connection() as connection:
        return dict(await _get(connection, attachment_id, principal))


async def _get(connection: Connection, attachment_id: UUID, principal: Principal) -> Record:
    row = await connection.fetchrow(GET, attachment_id=attachment_id, **principal.sees())
    if row is None:
        raise AttachmentNotFound
    return row


async def readable(connection: Connection, attachment_id: UUID, principal: Principal | None) -> Record:
    """The columns for reading an attachment's bytes; None is a caller with a signed URL. Raises AttachmentNotFound."""
    if principal is None:
        row = await connection.fetchrow(READABLE, attachment_id=attachment_id)
    else:
        row = await connection.fetchrow(READABLE_BY_CALLER, attachment_id=attachment_id, **principal.sees())
    if row is None:
        raise AttachmentNotFound
    return row


async def _show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    attachment_id, run_id = ids
    await replays.refuse_gone(connection, principal, run_id)
    return encode(dict(await _get(connection, attachment_id, principal)))


async def _left(connection: Connection, principal: Principal, ids: Sequence[UUID], body: bytes) -> bytes:
    await replays.refuse_gone(connection, principal, ids[1])
    return body


# An attachment and its run: it ends with the run.
RESOURCE = Resource(_show, _left)


# The output files of one attempt. Those of the current one have no number.
_OF_ATTEMPT = f"""
    a.attachment_type = 'output'
    AND (a.attempt = :attempt OR ({projection.CURRENT} AND :attempt = (SELECT attempt FROM runs WHERE id = :run_id)))
"""


async def list_attachments(
    database: Database,
    principal: Principal,
    run_id: UUID | None,
    kind: AttachmentType | None,
    part: Slice,
    attempt: int | None = None,
) -> dict[str, object]:
    """One page of what runs have now, newest first; with `attempt`, of the output files of this attempt of one run.

    Raises Invalid, also as paging.page does.
    """
    if attempt is not None and run_id is None:
        raise Invalid((("query", "attempt"), "Send run_id, too: an attempt is one of a run.", "attempt_without_run"))
    organization_id = principal.organization_id
    if run_id is None:
        condition, values = where("a", organization_id=organization_id, attachment_type=kind)
    else:  # by the run, not along the organization's index because that has the order
        condition, values = where("a", run_id=run_id, attachment_type=kind)
        condition += " AND a.organization_id || '' = :organization_id"
        values["organization_id"] = organization_id
    if attempt is None or principal.machine_id is not None:
        condition += f" AND {projection.CURRENT}"
    if attempt is not None:
        condition, values = f"{condition} AND {_OF_ATTEMPT}", values | {"attempt": attempt}
    if principal.machine_id is not None:
        condition, values = f"{condition} AND {OF_MACHINE}", values | {"machine_id": principal.machine_id}
    found = await page(database, ATTACHMENTS, (f"{condition} AND {projection.VISIBLE}",), part, values, ROWS)
    return part.shown([dict(row) for row in found.rows], found)


# --- create -----------------------------------------------------------------------------------------------------------

_RUN = f"SELECT {fences.COLUMNS} FROM runs r WHERE id = :run_id AND {SEEN}"
READ_RUN = statement("attachments.read_run", _RUN)
LOCK_RUN = statement("attachments.lock_run", f"{_RUN} FOR NO KEY UPDATE")

INSERT = statement(
    "attachments.insert",
    f"""
    WITH a AS (
        INSERT INTO run_attachments (id, run_id, organization_id, user_id, attachment_type, filename, content_type,
                                     size_bytes, storage_path, target_path, cleanup_imports_after_run, expires_at)
        VALUES (:id, :run_id, :organization_id, :user_id, 'output', :filename, :content_type,
                :size_bytes, :storage_path, :target_path, :cleanup, :expires_at)
        RETURNING *
    )
    SELECT {COLUMNS} FROM a
    """,
)


async def create(services: Services, write: WriteRequest, options: RunAttachmentCreate) -> Reply:
    """Add an output to a running run, in the steps of a retry: check, stage, switch. Raises every refusal of the route."""
    if options.attachment_type != "output":
        raise Invalid(
            (
                ("body", "attachment_type"),
                "Only output can be added to an existing run; send inputs as file_inputs of the run or of its retry.",
                "attachment_type",
            )
        )
    fences.check(options)
    staging.check_sizes(services, None, [options])
    principal = write.principal

    async def check(connection: Connection) -> int:
        return _accepting(await connection.fetchrow(READ_RUN, run_id=options.run_id, **principal.sees()), options)

    attempt = await check_or_replay(services, write, RESOURCE, check)
    if isinstance(attempt, Reply):
        return attempt
    [staged] = await staging.stage(services, principal.organization_id, [options.run_id], None, [options])
    [file] = staged.files
    machine_id: UUID | None = None

    async def switch(connection: Connection) -> Reply:
        nonlocal machine_id
        run = await connection.fetchrow(LOCK_RUN, run_id=options.run_id, **principal.sees())
        if run is not None and run["attempt"] != attempt:
            raise AttemptSuperseded(run["attempt"])
        _accepting(run, options)
        await deletions.adopt(connection, staged.names())
        [row] = await connection.fetch(
            INSERT,
            id=file.id,
            run_id=options.run_id,
            organization_id=principal.organization_id,
            user_id=principal.user_id,
            filename=file.filename,
            content_type=file.content_type,
            size_bytes=file.size,
            storage_path=file.key,
            target_path=file.target_path,
            cleanup=file.cleanup,
            expires_at=options.expires_at,
        )
        machine_id = None if run is None else run["assigned_machine_id"]
        return Reply(201, encode(dict(row)), [file.id, options.run_id])

    reply = await once(services, write, switch, RESOURCE)
    if machine_id is not None:
        services.signs_of_life.note(principal.organization_id, machine_id)
    return reply


def _accepting(run: Record | None, options: fences.Fenced) -> int:
    """The run's attempt if it accepts outputs. Used on a plain read by check, and on the locked row by switch."""
    if run is None:
        raise RunNotFound
    fences.refuse_late(run, options)
    status = RunStatus(run["status"])
    if status is not RunStatus.RUNNING:
        hint = "Only POST /v1/runs/{run_id}/retry reopens it." if status in TERMINAL else "Report `running` first."
        raise InvalidTransition(f"A run that is {status} accepts no output files. {hint}", current_status=status.value)
    attempt: int = run["attempt"]
    return attempt


# --- change and delete ------------------------------------------------------------------------------------------------

# Its lock, as a new version of its row: a retry that has read the run's files before does not take effect then.
LOCK_RUN_OF = statement(
    "attachments.lock_run_of",
    """
    UPDATE runs SET attempt = attempt WHERE id = (
        SELECT run_id FROM run_attachments WHERE id = :attachment_id AND organization_id = :organization_id
    )
    """,
)

EXPIRE = statement(
    "attachments.expire",
    f"""
    WITH a AS (UPDATE run_attachments SET expires_at = :expires_at WHERE id = :attachment_id RETURNING *)
    SELECT {COLUMNS} FROM a
    """,
)

DELETE = statement(
    "attachments.delete", delete_from(RunAttachment).where(RunAttachment.id == bindparam("attachment_id"))
)


async def _lock(connection: Connection, attachment_id: UUID, principal: Principal) -> Record:
    """The attachment, under its run's lock. Raises AttachmentNotFound."""
    await connection.execute(LOCK_RUN_OF, attachment_id=attachment_id, organization_id=principal.organization_id)
    return await _get(connection, attachment_id, principal)


async def update(services: Services, write: WriteRequest, attachment_id: UUID, options: RunAttachmentUpdate) -> Reply:
    """Change when the file expires; a time in the past expires it now. Raises every refusal of the route.

    A key that is bound to a machine may do so only with outputs of its running run, and says which attempt it is at.
    """
    fences.require(write.principal, options)
    fences.check(options)

    async def work(connection: Connection) -> Reply:
        row = await _lock(connection, attachment_id, write.principal)
        is_bound = write.principal.machine_id is not None
        if is_bound or not fences.FIELDS.isdisjoint(options.model_fields_set):
            if is_bound:
                _refuse_input(row)
            run = await connection.fetchrow(READ_RUN, run_id=UUID(row["run_id"]), **write.principal.sees())
            _accepting(run, options)
        if "expires_at" in options.model_fields_set:
            if not row["storage_path"]:
                raise InputAttachmentsExpired
            [row] = await connection.fetch(EXPIRE, attachment_id=attachment_id, expires_at=options.expires_at)
        return Reply(200, encode(dict(row)), [attachment_id, UUID(row["run_id"])])

    return await once(services, write, work, RESOURCE)


def _refuse_input(row: Record) -> None:
    """Raises InsufficientScope: a retry needs its input files, and an executor has no say in retries."""
    if row["attachment_type"] != "output":
        sentence = "A key that is bound to a machine can change only output files of its running run."
        raise InsufficientScope(["runs:write"], sentence)


async def delete(services: Services, write: WriteRequest, attachment_id: UUID) -> Reply:
    """Remove the row and list its bytes in the same transaction. Raises AttachmentNotFound."""

    async def work(connection: Connection) -> Reply:
        row = await _lock(connection, attachment_id, write.principal)
        if row["storage_path"]:
            await deletions.due(connection, [Name.file(row["storage_path"])])
        await connection.execute(DELETE, attachment_id=attachment_id)
        return Reply(204, b"")

    return await once(services, write, work)


# --- expire -----------------------------------------------------------------------------------------------------------

# An active run keeps its inputs: it may be reading them. The run's lock keeps a retry from adopting what is expiring.
EXPIRED = statement(
    "attachments.expired",
    f"""
    SELECT a.id, run.organization_id FROM (
        SELECT id, run_id, attachment_type FROM run_attachments
        WHERE expires_at <= now() + :ahead AND storage_path IS NOT NULL ORDER BY expires_at
    ) AS a, LATERAL (
        SELECT organization_id FROM runs
        WHERE id = a.run_id AND (a.attachment_type = 'output' OR NOT {rules.is_active()})
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS run
    LIMIT 200
    """,
)

# Read again under the lock: a PUT may have given the file more time since the first look.
STILL_EXPIRED = statement(
    "attachments.still_expired",
    f"""
    SELECT id, storage_path FROM {rows_of("run_attachments", "ids")} AS file
    WHERE expires_at <= now() + :ahead AND storage_path IS NOT NULL
    """,
)

FORGET_OUTPUTS = statement(
    "attachments.forget_outputs",
    f"""DELETE FROM run_attachments WHERE {by_id("run_attachments", "ids", "one.attachment_type = 'output'")}""",
)

FORGET_BYTES = statement(
    "attachments.forget_bytes",
    f"UPDATE run_attachments SET storage_path = NULL WHERE {by_id('run_attachments', 'ids')}",
)


async def expire_attachments(database: Database, *, ahead: timedelta = timedelta(0)) -> set[str]:
    """Collect attachments past their expiry, one batch; returns their organizations.

    An output goes with its row. An input's row stays, without bytes, so that a retry can say that it has expired.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(EXPIRED, ahead=ahead)
        if rows:
            expired = await connection.fetch(STILL_EXPIRED, ids=[row["id"] for row in rows], ahead=ahead)
            ids = [row["id"] for row in expired]
            await connection.execute(FORGET_OUTPUTS, ids=ids)
            await connection.execute(FORGET_BYTES, ids=ids)
            await deletions.due(connection, [Name.file(row["storage_path"]) for row in expired])
    return {row["organization_id"] for row in rows}
