"""What the database names compared with what Vault and the file store hold: for the command line, after a restore.

No secret is read, and nothing is written but marks that were asked for. It may run beside the service: a difference is looked
at twice, in the order that deletions.py keeps, so that what is just being written or deleted is none. Everything is done in
pages, so memory does not grow with what there is.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar
from uuid import UUID

from app.scheduling import rules
from app.stores.database import Database, Record
from app.stores.files import FileStore
from app.stores.statements import rows_of, statement
from app.stores.vault import VaultSecrets

T = TypeVar("T")

PAGE = 1000
AT_ONCE = 8  # questions to Vault and to the file store

_OF_A_RUN = re.compile(r"[^/]+/[A-Za-z0-9_-]{1,64}/([0-9a-f-]{36})/[0-9a-f-]{36}")


@dataclass(frozen=True, slots=True)
class Difference:
    """`orphaned`: it exists, and neither a row nor the deletion list names it. `missing`: a row needs it, and it is not there.

    `owner` is the row that needs a missing name.
    """

    kind: Literal["orphaned", "missing"]
    store: Literal["vault", "files"]
    name: str
    owner: str | None = None


# --- what is named ----------------------------------------------------------------------------------------------------

# Which of these names nobody names. Each is looked up by its key: as a join, everything would be read.
UNNAMED_SECRETS = statement(
    "comparison.unnamed_secrets",
    """
    SELECT name FROM unnest(:names::text[], :run_ids::uuid[]) AS listed (name, run_id)
    WHERE (SELECT true FROM deletions d WHERE d.store = 'vault' AND d.name = listed.name LIMIT 1) IS NULL
      AND (SELECT true FROM runs r WHERE r.id = listed.run_id AND r.secret_path = listed.name LIMIT 1) IS NULL
      AND (SELECT true FROM webhook_secrets w WHERE w.path = listed.name LIMIT 1) IS NULL
    """,
)

UNNAMED_FILES = statement(
    "comparison.unnamed_files",
    """
    SELECT name FROM unnest(:names::text[]) AS listed (name)
    WHERE (SELECT true FROM deletions d WHERE d.store = 'storage' AND d.name = listed.name LIMIT 1) IS NULL
      AND (SELECT true FROM run_attachments a WHERE a.storage_path = listed.name LIMIT 1) IS NULL
    """,
)

# --- what is needed ---------------------------------------------------------------------------------------------------


def _is_kept(store: str, name: str, *, until: str) -> str:
    """A condition: the list has this name and `until` holds of it."""
    return f"(SELECT true FROM deletions d WHERE d.store = '{store}' AND d.name = {name} AND {until} LIMIT 1)"


# An active run needs its secret; one that has ended needs it while a retry may keep it.
_SECRET_NEEDED = f"""
    run.secret_path IS NOT NULL AND ({rules.is_active("run")}
        OR {_is_kept("vault", "run.secret_path", until="d.condemned_at IS NULL AND d.due_at > now()")})
"""
# A name that is due counts as gone.
_FILE_NEEDED = f"""
    file.storage_path IS NOT NULL
    AND {_is_kept("storage", "file.storage_path", until="(d.condemned_at IS NOT NULL OR d.due_at <= now())")} IS NULL
"""

RUNS = statement(
    "comparison.runs",
    f"""
    SELECT id, CASE WHEN {_SECRET_NEEDED} THEN secret_path END AS name, NULL::bigint AS size
    FROM (SELECT id, status, secret_path FROM runs WHERE id > :after ORDER BY id LIMIT {PAGE}) AS run ORDER BY id
    """,
)
RUNS_AGAIN = statement(
    "comparison.runs_again",
    f"SELECT id, secret_path AS name, NULL::bigint AS size FROM {rows_of('runs', 'ids')} AS run WHERE {_SECRET_NEEDED}",
)


def _signing_secret(endpoint_id: str) -> str:
    """A lateral subquery: the secrets of an endpoint that still sign."""
    return f"""(
        SELECT path FROM webhook_secrets w
        WHERE w.endpoint_id = {endpoint_id} AND (w.expires_at IS NULL OR w.expires_at > now()) OFFSET 0
    ) AS secret"""


ENDPOINTS = statement(
    "comparison.endpoints",
    f"""
    SELECT page.id, secret.path AS name, NULL::bigint AS size
    FROM (SELECT id FROM webhook_endpoints WHERE id > :after ORDER BY id LIMIT {PAGE}) AS page
    LEFT JOIN LATERAL {_signing_secret("page.id")} ON true
    ORDER BY page.id
    """,
)
ENDPOINTS_AGAIN = statement(
    "comparison.endpoints_again",
    f"""
    SELECT wanted.id, secret.path AS name, NULL::bigint AS size
    FROM unnest(:ids::uuid[]) AS wanted (id), LATERAL {_signing_secret("wanted.id")}
    """,
)
FILES = statement(
    "comparison.files",
    f"""
    SELECT id, CASE WHEN {_FILE_NEEDED} THEN storage_path END AS name, size_bytes AS size
    FROM (SELECT id, storage_path, size_bytes FROM run_attachments WHERE id > :after ORDER BY id LIMIT {PAGE}) AS file
    ORDER BY id
    """,
)
FILES_AGAIN = statement(
    "comparison.files_again",
    f"""
    SELECT id, storage_path AS name, size_bytes AS size FROM {rows_of("run_attachments", "ids")} AS file
    WHERE {_FILE_NEEDED}
    """,
)


# A retry keeps a secret only while the deletion list says that it goes later. Destroying what is not there does no harm.
EXPIRE = statement(
    "comparison.expire",
    """
    UPDATE deletions SET due_at = now()
    WHERE store = 'vault' AND name = :name AND condemned_at IS NULL AND due_at > now()
    """,
)


async def mark_expired(database: Database, missing: Difference) -> bool:
    """Let the missing secret of an ended run expire now: a retry that would keep it is then refused. Whether it was marked."""
    if missing.kind != "missing" or missing.store != "vault" or not (missing.owner or "").startswith("run "):
        return False
    async with database.connection() as connection:
        return await connection.execute(EXPIRE, name=missing.name) == "UPDATE 1"


@dataclass(frozen=True, slots=True)
class _Need:
    """A row that names something."""

    id: UUID
    name: str
    size: int | None


async def compare(database: Database, secrets: VaultSecrets, files: FileStore) -> AsyncIterator[Difference]:
    """Every difference. Raises Unavailable when one of the three does not answer, and NotGrantedError when Vault's token may
    not list."""

    async def holds_secret(need: _Need) -> bool:
        return await secrets.holds(need.name)

    async def holds_file(need: _Need) -> bool:
        return await files.size(need.name) == need.size

    for prefix in (secrets.prefix, secrets.webhook_prefix):
        async for names in secrets.list_names(prefix):
            for name in await _orphaned(lambda names: _unnamed_secrets(database, names), names, secrets.exists):
                yield Difference("orphaned", "vault", name)
    async for names in files.list_names(PAGE):
        for name in await _orphaned(lambda names: _unnamed_files(database, names), names, _exists(files)):
            yield Difference("orphaned", "files", name)
    for rows, again, owner, store, holds in (
        (RUNS, RUNS_AGAIN, "run", "vault", holds_secret),
        (ENDPOINTS, ENDPOINTS_AGAIN, "webhook endpoint", "vault", holds_secret),
        (FILES, FILES_AGAIN, "attachment", "files", holds_file),
    ):
        after: UUID | None = UUID(int=0)
        while after is not None:
            async with database.connection() as connection:
                page = await connection.fetch(rows, after=after)
            after = page[-1]["id"] if len(page) >= PAGE else None
            gone = await _without(_needs(page), holds)
            if not gone:
                continue
            async with database.connection() as connection:
                still = set(_needs(await connection.fetch(again, ids=[need.id for need in gone])))
            for need in gone:
                if need in still:
                    yield Difference(
                        "missing", "vault" if store == "vault" else "files", need.name, f"{owner} {need.id}"
                    )


def _exists(files: FileStore) -> Callable[[str], Awaitable[bool]]:
    async def exists(name: str) -> bool:
        return await files.size(name) is not None

    return exists


async def _orphaned(
    unnamed: Callable[[Sequence[str]], Awaitable[list[str]]],
    names: Sequence[str],
    exists: Callable[[str], Awaitable[bool]],
) -> list[str]:
    """The names that no row names and that still exist: a name may have been deleted since it was listed."""
    candidates = await unnamed(names)
    return [name for name, there in await _each(candidates, exists) if there]


async def _without(needs: Sequence[_Need], holds: Callable[[_Need], Awaitable[bool]]) -> list[_Need]:
    return [need for need, there in await _each(needs, holds) if not there]


async def _each(items: Sequence[T], ask: Callable[[T], Awaitable[bool]]) -> list[tuple[T, bool]]:
    answers: list[tuple[T, bool]] = []
    for start in range(0, len(items), AT_ONCE):
        part = items[start : start + AT_ONCE]
        answers += zip(part, await asyncio.gather(*map(ask, part)), strict=True)
    return answers


def _needs(rows: Sequence[Record]) -> list[_Need]:
    return [_Need(row["id"], row["name"], row["size"]) for row in rows if row["name"] is not None]


async def _unnamed_secrets(database: Database, names: Sequence[str]) -> list[str]:
    owners = [_OF_A_RUN.fullmatch(name) for name in names]
    async with database.connection() as connection:
        rows = await connection.fetch(
            UNNAMED_SECRETS, names=list(names), run_ids=[_uuid(owner and owner[1]) for owner in owners]
        )
    return [row["name"] for row in rows]


def _uuid(text: str | None) -> UUID | None:
    try:
        return None if text is None else UUID(text)
    except ValueError:
        return None


async def _unnamed_files(database: Database, names: Sequence[str]) -> list[str]:
    async with database.connection() as connection:
        rows = await connection.fetch(UNNAMED_FILES, names=list(names))
    return [row["name"] for row in rows]
