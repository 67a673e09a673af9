"""The deletion list and its collector: the only code that deletes from Vault or the file store.

The invariant, true after every commit: everything that exists in Vault or storage is named by a run, one of its attachments
or a webhook endpoint, or is on this list; everything that an active run names exists.

A name gets on the list
- before it is first written (staged), due after a grace time, and is taken off by the commit that adopts it;
- when the commit that replaced or removed it makes it due now;
- when a run finishes: its secret is due after the retention time, and a retry that keeps it takes it off.

Rules: a due row is condemned first, committed, and only then deleted outside, with no transaction open; condemned is never
undone; only rows that are not condemned can be taken off. A staged name that was never adopted is deleted twice, a day apart,
because a stalled writer may write after the first time. All times are the database's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from typing import Final, Literal, NamedTuple, Self

from app.errors import StorageUnavailable, Unavailable, VaultUnavailable
from app.stores.database import Connection, Database
from app.stores.files import FileStore
from app.stores.secrets import SecretStore
from app.stores.statements import statement
from app.telemetry import metrics

log = logging.getLogger("app.deletions")

Store = Literal["vault", "storage"]

# The stores as the rows of the list name them.
SECRETS: Final = "vault"
FILES: Final = "storage"


class Name(NamedTuple):
    """Something outside the database: a secret's path or a blob's key."""

    store: Store
    name: str

    @classmethod
    def secret(cls, path: str) -> Self:
        """The name of a secret."""
        return cls(SECRETS, path)

    @classmethod
    def file(cls, key: str) -> Self:
        """The name of a file's bytes."""
        return cls(FILES, key)


# --- getting on the list, and off it ----------------------------------------------------------------------------------

# Two sweeps: see above. A staged name is fresh, so there is no conflict to think about.
STAGE = statement(
    "deletions.stage",
    """
    INSERT INTO deletions (store, name, due_at, sweeps)
    SELECT store, name, now() + make_interval(secs => :grace_seconds), 2
    FROM unnest(:stores::text[], :names::text[]) AS staged (store, name)
    """,
)

# Those of the staged `:names` that can be taken off, locked. Each is looked up by its key, as in FINISH. One that the collector
# condemned while this waited for its lock is left out, and nothing else ever changes a staged name.
HELD = """
    SELECT listed.tid FROM unnest(:stores::text[], :names::text[]) AS staged (store, name), LATERAL (
        SELECT ctid AS tid FROM deletions
        WHERE store = staged.store AND name = staged.name AND condemned_at IS NULL FOR UPDATE
    ) AS listed
"""

ADOPT = statement("deletions.adopt", f"DELETE FROM deletions WHERE ctid = ANY (ARRAY({HELD}))")

# The same of many retries, each of which has a place. What others hold is passed over. A name `is_kept` if it is of a secret
# that a retry keeps: it must not be due.
FREE = """
    SELECT named.place, listed.tid
    FROM unnest(:name_places::bigint[], :stores::text[], :names::text[], :names_are_kept::bool[])
        AS named (place, store, name, is_kept), LATERAL (
        SELECT ctid AS tid FROM deletions
        WHERE store = named.store AND name = named.name AND condemned_at IS NULL
          AND (NOT named.is_kept OR due_at > clock_timestamp())
        OFFSET 0 FOR UPDATE SKIP LOCKED
    ) AS listed
"""

# Waits for a collector that holds one of these names.
HOLD = statement("deletions.hold", HELD)

# Due earlier wins: a secret that waits for its retention time to pass goes at once when a retry replaces it.
DUE_EARLIER = "ON CONFLICT (store, name) DO UPDATE SET due_at = least(deletions.due_at, excluded.due_at)"

DUE = statement(
    "deletions.due",
    f"""
    INSERT INTO deletions (store, name, due_at)
    SELECT store, name, now() + make_interval(secs => :after_seconds)
    FROM unnest(:stores::text[], :names::text[]) AS gone (store, name)
    {DUE_EARLIER}
    """,
)


def columns(names: Iterable[Name]) -> dict[str, list[str]]:
    """The parameters of statements about names."""
    ordered = sorted(names)  # one order everywhere: two writers of the same rows cannot deadlock
    return {"stores": [name.store for name in ordered], "names": [name.name for name in ordered]}


async def stage(connection: Connection, names: Sequence[Name], grace_seconds: float) -> None:
    """List names before anything is written under them, and after a commit: this one statement may be all of it."""
    await connection.execute(STAGE, **columns(names), grace_seconds=grace_seconds)


async def adopt(connection: Connection, names: Sequence[Name]) -> None:
    """Take staged names off the list because this transaction makes a run name them.

    Raises VaultUnavailable or StorageUnavailable if one was condemned meanwhile: staging took longer than the grace time.
    """
    if names and await connection.execute(ADOPT, **columns(names)) != f"DELETE {len(names)}":
        raise (VaultUnavailable if any(name.store == "vault" for name in names) else StorageUnavailable)


async def due(connection: Connection, names: Sequence[Name], *, after_seconds: float = 0) -> None:
    """Put names on the list that no row names after this transaction; they are deleted now or after a while."""
    if names:
        await connection.execute(DUE, **columns(names), after_seconds=after_seconds)


# --- the collector ----------------------------------------------------------------------------------------------------

# Taking a row also postpones it: if this process dies the row is due again later, ever less often while deletes fail.
# By ctid: joined by name, the planner may run the subquery again for each row, lock more than the batch, and take seconds.
CONDEMN = statement(
    "deletions.condemn",
    """
    UPDATE deletions
    SET condemned_at = coalesce(condemned_at, now()),
        due_at = now() + :ahead + make_interval(secs => 5 * 2 ^ least(failures, 6)),
        failures = least(failures + 1, 1000)
    WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM deletions WHERE due_at <= now() + :ahead ORDER BY due_at LIMIT :batch FOR UPDATE SKIP LOCKED
    ))
    RETURNING store, name, failures = 1 AS is_new
    """,
)

# Locked in the order in which they are named, as by everyone who changes many rows of the list; then by ctid, because the
# planner, which thinks the list is short, would join two batches row by row. A row that changed while this waited for its
# lock stays, and is swept again later.
FINISH = statement(
    "deletions.finish",
    """
    WITH swept AS (
        SELECT listed.* FROM unnest(:stores::text[], :names::text[]) AS gone (store, name), LATERAL (
            SELECT ctid AS tid, sweeps FROM deletions WHERE store = gone.store AND name = gone.name FOR UPDATE
        ) AS listed
    ), again AS (
        UPDATE deletions SET sweeps = 1, failures = 0, due_at = now() + :ahead + interval '1 day'
        WHERE ctid = ANY (ARRAY(SELECT tid FROM swept WHERE sweeps = 2))
    )
    DELETE FROM deletions WHERE ctid = ANY (ARRAY(SELECT tid FROM swept WHERE sweeps = 1))
    """,
)

BATCH = 200


async def collect(
    database: Database,
    secrets: SecretStore,
    files: FileStore,
    *,
    ahead: timedelta = timedelta(0),
    batch: int = BATCH,
    noted: Callable[[Connection, list[Name]], Awaitable[None]] | None = None,
) -> int:
    """Delete what is due, one batch; returns how many rows were taken. `ahead` reads the database's clock that much later.

    `noted` is told of the names in the transaction that condemns them.

    Raises DatabaseUnavailable. A delete that fails is logged by kind and tried again later.
    """
    async with database.transaction() as connection:
        rows = await connection.fetch(CONDEMN, batch=batch, ahead=ahead)
        names = [Name(row["store"], row["name"]) for row in rows]
        if noted is not None and (fresh := [Name(row["store"], row["name"]) for row in rows if row["is_new"]]):
            await noted(connection, fresh)

    async def destroy(name: Name) -> list[Name]:
        try:
            await secrets.destroy(name.name)
        except Unavailable:
            return []
        return [name]

    async def delete(keys: list[str]) -> list[Name]:
        return [Name.file(key) for key in await files.delete(keys)]

    work = [destroy(name) for name in names if name.store == SECRETS]
    if keys := [name.name for name in names if name.store == FILES]:
        work.append(delete(keys))
    deleted = [name for gone in await asyncio.gather(*work) for name in gone]
    if deleted:
        async with database.connection() as connection:
            await connection.execute(FINISH, **columns(deleted), ahead=ahead)
    for store, label in _LABELS.items():
        wanted, gone = (sum(name.store == store for name in some) for some in (names, deleted))
        if wanted:
            _tell(label, gone, failed=wanted - gone)
    return len(rows)


# What a store is called in logs and metrics.
_LABELS: dict[Store, str] = {SECRETS: "vault", FILES: "files"}


def _tell(store: str, deleted: int, *, failed: int) -> None:
    """One line for a batch."""
    metrics.deletions.add(store, count=deleted)
    metrics.deletions_failed.add(store, count=failed)
    if deleted:
        log.info({"event": "deleted", "store": store, "count": deleted})
    if failed:
        log.warning({"event": "delete_failed", "store": store, "count": failed})


async def collect_all(
    database: Database,
    secrets: SecretStore,
    files: FileStore,
    *,
    noted: Callable[[Connection, list[Name]], Awaitable[None]],
) -> None:
    """Delete all that is due. As `collect`."""
    while await collect(database, secrets, files, noted=noted) == BATCH:
        pass  # a full batch: there is more
