"""Stage: write a request's secrets and files under fresh names that are already on the deletion list.

No transaction is open and no pooled connection is used while a store answers. Whatever happens afterwards, a name is either
adopted by the switch or deleted by the collector.
"""

import asyncio
import mimetypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

from app.errors import DatabaseUnavailable, OutcomeUnknown, PayloadTooLarge
from app.schemas.attachments import File, RunAttachmentCreate
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, committing
from app.stores.deletions import Name
from app.stores.files import file_headers
from app.stores.statements import statement


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that has its bytes in the store and is not yet a run's."""

    id: UUID
    key: str
    filename: str
    content_type: str
    size: int
    target_path: str | None
    cleanup: bool


@dataclass(frozen=True, slots=True)
class Staged:
    """The secret and the files that were written for one run; none by default."""

    secret_path: str | None = None
    aliases: dict[str, str] | None = None
    files: Sequence[StagedFile] = ()

    def names(self) -> list[Name]:
        secret = [Name.secret(self.secret_path)] if self.secret_path is not None else []
        return secret + [Name.file(file.key) for file in self.files]


def content_type(file: File) -> str:
    """The media type that an executor gave, else the one that the name suggests."""
    if isinstance(file, RunAttachmentCreate):
        return file.content_type
    return mimetypes.guess_type(file.filename, strict=True)[0] or "application/octet-stream"


def check_sizes(
    services: Services, secrets: dict[str, Any] | None, files: Sequence[File] | None, *, copies: int = 1
) -> None:
    """Raises PayloadTooLarge for what will be staged `copies` times. Base64 was decoded when the body was read."""
    settings = services.settings
    files = files or ()
    secret_bytes = copies * services.secrets.size(secrets) if secrets else 0
    most = min(settings.max_bulk_secret_bytes, settings.max_body_bytes)
    if copies > 1 and secret_bytes > most:
        raise PayloadTooLarge(
            f"count times the bytes of sensitive_input_values may be at most {most}; send fewer runs at a time."
        )
    if copies > 1 and copies * len(files) > settings.max_bulk_files:
        raise PayloadTooLarge(
            f"count times the files may be at most {settings.max_bulk_files}; send fewer runs at a time."
        )
    if any(len(file.content) > settings.max_file_bytes for file in files):
        raise PayloadTooLarge(f"A file may have at most {settings.max_file_bytes} bytes; send a smaller file.")
    if copies * sum(len(file.content) for file in files) > settings.max_body_bytes:
        raise PayloadTooLarge(
            f"count times the files' bytes may be at most {settings.max_body_bytes}; send fewer runs or smaller files."
        )


async def stage(
    services: Services,
    organization_id: str,
    run_ids: Sequence[UUID],
    secrets: dict[str, Any] | None,
    files: Sequence[File] | None,
) -> list[Staged]:
    """Write the secrets and files once per run. Raises VaultUnavailable, StorageUnavailable, DatabaseUnavailable."""
    planned = plan(services, organization_id, run_ids, secrets, files)
    names = [name for staged in planned for name in staged.names()]
    if names:
        deadline = time.monotonic() + services.settings.stage_timeout_seconds
        try:
            await services.together.stage_names(partial(_stage_names, services), names, organization_id)
        except OutcomeUnknown:
            raise DatabaseUnavailable from None  # at most names are listed that nothing was written under
        # The timeout for a slot is meant for waiting behind other requests. A request with many writes queues its own writes
        # here, where only the deadline counts, so that no more of them wait for a slot than run at the same time.
        secret_turns = asyncio.Semaphore(services.secrets.writes_at_once)
        file_turns = asyncio.Semaphore(services.settings.storage_concurrency)

        async def write(path: str, values: dict[str, Any]) -> None:
            async with secret_turns:
                await services.secrets.write(path, values, deadline=deadline)

        async def put(file: StagedFile, content: bytes) -> None:
            async with file_turns:
                headers = file_headers(file.filename, file.content_type)
                await services.files.put(file.key, content, deadline=deadline, attributes=headers)

        contents = [file.content for file in files or ()]
        try:
            async with asyncio.TaskGroup() as group:
                for staged in planned:
                    if staged.secret_path is not None and secrets:
                        group.create_task(write(staged.secret_path, secrets))
                    for file, content in zip(staged.files, contents, strict=True):
                        group.create_task(put(file, content))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # one refusal is enough for one reply
    return planned


async def _stage_names(services: Services, names: Sequence[Sequence[Name]]) -> list[None]:
    async with services.database.connection() as connection:
        with committing():
            every = [name for some in names for name in some]
            await deletions.stage(connection, every, services.settings.stage_grace_seconds)
    return [None for _ in names]


def plan(
    services: Services,
    organization_id: str,
    run_ids: Sequence[UUID],
    secrets: dict[str, Any] | None,
    files: Sequence[File] | None,
) -> list[Staged]:
    """Fresh names for what each run will have; nothing is written."""
    aliases = services.secrets.aliases(secrets or {})

    def one(run_id: UUID) -> Staged:
        # In order: files of one request are created at the same time, and lists break the tie by id.
        ids = sorted(uuid4() for _ in files or ())
        path = services.secrets.new_path(organization_id, run_id) if secrets else None
        return Staged(
            path,
            None if secrets is None else aliases(path) if path else {},
            [
                StagedFile(
                    file_id,
                    services.files.new_key(organization_id, run_id),
                    file.filename,
                    content_type(file),
                    len(file.content),
                    file.target_path,
                    bool(file.cleanup_imports_after_run),
                )
                for file_id, file in zip(ids, files or (), strict=True)
            ],
        )

    return [one(run_id) for run_id in run_ids]


def attached(organization_id: str, user_id: str) -> str:
    """SQL that makes attachments of the rows of `file`, for this organization and user (SQL expressions)."""
    return f"""
    INSERT INTO run_attachments (id, run_id, organization_id, user_id, attachment_type, filename, content_type,
                                 size_bytes, storage_path, target_path, cleanup_imports_after_run)
    SELECT file.id, file.run_id, {organization_id}, {user_id}, 'input', filename, content_type,
           size_bytes, storage_path, target_path, cleanup
    FROM unnest(:file_ids::uuid[], :file_run_ids::uuid[], :filenames::text[], :content_types::text[], :sizes::bigint[],
                :storage_paths::text[], :target_paths::text[], :cleanups::bool[])
        AS file (id, run_id, filename, content_type, size_bytes, storage_path, target_path, cleanup)
    """


ATTACH = statement("runs.staging.attach", attached(":organization_id::text", ":user_id::uuid"))


def columns(staged: Mapping[UUID, Staged]) -> dict[str, list[Any]]:
    """The parameters of `attached`, but for who attaches."""
    files = [(run_id, file) for run_id, one in staged.items() for file in one.files]
    return {
        "file_ids": [file.id for _, file in files],
        "file_run_ids": [run_id for run_id, _ in files],
        "filenames": [file.filename for _, file in files],
        "content_types": [file.content_type for _, file in files],
        "sizes": [file.size for _, file in files],
        "storage_paths": [file.key for _, file in files],
        "target_paths": [file.target_path for _, file in files],
        "cleanups": [file.cleanup for _, file in files],
    }


async def adopt(
    connection: Connection, staged: Mapping[UUID, Staged], organization_id: str, user_id: UUID | None
) -> None:
    """Make runs name what was staged for them, in the transaction that changes or creates them.

    Raises VaultUnavailable or StorageUnavailable if staging took longer than the grace time and a name was condemned.
    """
    await deletions.adopt(connection, [name for one in staged.values() for name in one.names()])
    files = columns(staged)
    if files["file_ids"]:
        await connection.execute(ATTACH, organization_id=organization_id, user_id=user_id, **files)
