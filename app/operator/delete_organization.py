"""Delete an organization with all that it has. For the command line, in the role that owns the tables; no route does it.

Whatever names something in Vault or in the file store is removed by the functions that put names on the deletion list, and the
service deletes what is on it. Each batch is a transaction of its own and begins with what is there: a process that is killed
leaves nothing half-done, and the next one goes on.

The keys are revoked first, but a request that came in before may still write. So there are passes until nothing is left, and
one more when no such request can be under way. The rows of the keys go last: they say when that is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from app.access.auth import NOBODY
from app.resources.webhook_endpoints import remove_endpoint
from app.runs.deleting import remove_runs
from app.stores.database import IN_THE_WAY, Connection
from app.stores.statements import Statement, statement

# How often a batch is tried that others are in the way of, and the rest in between.
TRIES = 20
TRY_AGAIN_SECONDS = 0.5

# At the end of each pass something may have been made meanwhile.
PASSES = 20

COUNTED = 1_000_000

WAITING = "waiting"

# Called with what is being removed and how many of them are gone, or with WAITING and for how many seconds.
Progress = Callable[[str, int], None]

# For one transaction. The owner's role carries none of this, and a pooler may stand in between.
SETTINGS = statement(
    "organizations.settings",
    """
    SELECT set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true),
           set_config('lock_timeout', '2s', true), set_config('statement_timeout', '30s', true)
    """,
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that name nothing outside the database, removed in the order of an index that begins with the organization.

    `first` is before all of them: each batch goes on behind the one before it, and reads nothing twice.
    """

    table: str
    key: tuple[tuple[str, str], ...]  # columns and their types
    first: tuple[object, ...]
    batch: int
    where: str = "true"

    def statement(self) -> Statement:
        columns = ", ".join(name for name, _ in self.key)
        behind = ", ".join(f":{name}::{kind}" for name, kind in self.key)
        return statement(
            f"organizations.remove.{self.table}",
            f"""
            WITH batch AS MATERIALIZED (
                SELECT ctid AS tid, {columns} FROM {self.table}
                WHERE organization_id = :organization_id AND ({columns}) > ({behind}) AND {self.where}
                ORDER BY {columns} LIMIT {self.batch} FOR UPDATE
            ), removed AS (
                DELETE FROM {self.table} WHERE ctid = ANY (ARRAY(SELECT tid FROM batch))
            )
            SELECT {columns} FROM batch ORDER BY {columns}
            """,
        )


_CREATED = (("created_at", "timestamptz"), ("id", "uuid"))
_BEGINNING = (datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))

# What is removed after the endpoints and the runs, in this order: removing a run writes an event. A workflow for which there is
# a run again, by a request that was under way, stays for the next pass.
ROWS = (
    Rows("bulk_retries", _CREATED, _BEGINNING, 5),  # each with up to 10,000 items
    Rows(
        "workflows",
        _CREATED,
        _BEGINNING,
        500,
        "(SELECT true FROM runs WHERE workflow_id = workflows.id LIMIT 1) IS NULL",
    ),
    Rows("pools", _CREATED, _BEGINNING, 100),
    Rows("machines", _CREATED, _BEGINNING, 100),
    Rows("webhook_events", (("occurred_at", "timestamptz"), ("id", "uuid")), _BEGINNING, 500),
    Rows("idempotency_keys", (("key", "text"),), ("",), 500),
    Rows("stored_replies", (("until", "timestamptz"),), _BEGINNING[:1], 500),
    Rows("run_events", (("xact", "bigint"), ("id", "bigint")), (0, 0), 5000),
)
_REMOVE = {rows: rows.statement() for rows in ROWS}

# The newest first, as wherever many runs are locked.
LOCK_RUNS = statement(
    "organizations.lock_runs",
    """
    SELECT id, created_at FROM runs
    WHERE organization_id = :organization_id AND (created_at, id) < (:created_at::timestamptz, :id::uuid)
    ORDER BY created_at DESC, id DESC LIMIT 200 FOR UPDATE
    """,
)
_NEWEST = (datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1))

ENDPOINTS = statement(
    "organizations.endpoints",
    "SELECT id FROM webhook_endpoints WHERE organization_id = :organization_id LIMIT 20",
)

REVOKE_KEYS = statement(
    "organizations.revoke_keys",
    "UPDATE api_keys SET revoked_at = now() WHERE organization_id = :organization_id AND revoked_at IS NULL",
)
REVOKED_FOR = statement(
    "organizations.revoked_for",
    "SELECT extract(epoch FROM now() - max(revoked_at))::float FROM api_keys WHERE organization_id = :organization_id",
)
REMOVE_KEYS = statement(
    "organizations.remove_keys",
    "DELETE FROM api_keys WHERE organization_id = :organization_id AND revoked_at IS NOT NULL",
)

_COUNTED = {"runs": "runs", "webhook endpoints": "webhook_endpoints", "keys": "api_keys"} | {
    rows.table.replace("_", " "): rows.table for rows in ROWS
}
COUNT = statement(
    "organizations.count",
    "SELECT "
    + ", ".join(
        f"(SELECT count(*) FROM (SELECT FROM {table} WHERE organization_id = :organization_id LIMIT {COUNTED}) AS {table})"
        f' AS "{shown}"'
        for shown, table in _COUNTED.items()
    ),
)


async def count(connection: Connection, organization_id: str) -> dict[str, int]:
    """What an organization has, of each at most COUNTED; without what it has nothing of."""
    row = await connection.fetchrow(COUNT, organization_id=organization_id)
    return {name: number for name, number in (row or {}).items() if number}


async def delete(connection: Connection, organization_id: str, grace_seconds: float, progress: Progress) -> bool:
    """Remove all of it; False if something stays, which others must be making all the time.

    A request that was under way when the keys were revoked has ended after `grace_seconds`. Raises what the driver does:
    whatever is removed by then stays removed, and another call goes on.
    """
    for _ in range(PASSES):
        await connection.execute(REVOKE_KEYS, organization_id=organization_id)
        revoked_for = await connection.fetchval(REVOKED_FOR, organization_id=organization_id)
        await _remove_all(connection, organization_id, progress)
        if (await count(connection, organization_id)).keys() - {"keys"}:
            continue
        if revoked_for is None or revoked_for >= grace_seconds:
            await connection.execute(REMOVE_KEYS, organization_id=organization_id)
            return True
        progress(WAITING, round(grace_seconds - revoked_for))
        await asyncio.sleep(grace_seconds - revoked_for)
    return False


async def _remove_all(connection: Connection, organization_id: str, progress: Progress) -> None:
    """One pass."""

    async def endpoints(_: Sequence[object]) -> list[tuple[object, ...]]:
        rows = await connection.fetch(ENDPOINTS, organization_id=organization_id)
        for row in rows:
            await remove_endpoint(connection, organization_id, row["id"])
        return [tuple(row.values()) for row in rows]

    async def runs(behind: Sequence[object]) -> list[tuple[object, ...]]:
        created_at, run_id = behind
        rows = await connection.fetch(LOCK_RUNS, organization_id=organization_id, created_at=created_at, id=run_id)
        await remove_runs(connection, [row["id"] for row in rows], NOBODY, hands_over=False)
        return [(row["created_at"], row["id"]) for row in rows]

    await _in_batches(connection, "webhook endpoints", endpoints, (), progress)
    await _in_batches(connection, "runs", runs, _NEWEST, progress)
    for rows, remove in _REMOVE.items():

        async def batch(
            behind: Sequence[object], rows: Rows = rows, remove: Statement = remove
        ) -> list[tuple[object, ...]]:
            place = {name: value for (name, _), value in zip(rows.key, behind, strict=True)}
            found = await connection.fetch(remove, organization_id=organization_id, **place)
            return [tuple(row.values()) for row in found]

        await _in_batches(connection, rows.table.replace("_", " "), batch, rows.first, progress)


Batch = Callable[[Sequence[object]], Awaitable[list[tuple[object, ...]]]]


async def _in_batches(
    connection: Connection, name: str, remove: Batch, behind: Sequence[object], progress: Progress
) -> None:
    """`remove` gets the last key of the batch before, and returns those that it has removed, in order."""
    removed, failures = 0, 0
    while True:
        try:
            async with connection.driver.transaction():
                await connection.fetchrow(SETTINGS)
                keys = await remove(behind)
            connection.committed()
        except IN_THE_WAY:
            failures += 1
            if failures == TRIES:
                raise
            await asyncio.sleep(TRY_AGAIN_SECONDS)
            continue
        if not keys:
            return
        removed, failures, behind = removed + len(keys), 0, keys[-1]
        progress(name, removed)
