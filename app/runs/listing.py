"""The list of runs: filters, projection, paging, and waiting for the list to have something.

No query reads a column that the reply does not show, and the page's ids are found before any wide row is read.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from app.errors import Invalid
from app.models import RunStatus
from app.runs import projection
from app.services import Services
from app.stores.database import Database
from app.stores.statements import statement

# How often a caller looks again that waits for anything but an assignment.
LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RunFilter:
    """What a list is limited to; None means any."""

    organization_id: str
    workflow_id: UUID | None = None
    machine_id: UUID | None = None
    session_id: UUID | None = None
    status: RunStatus | None = None
    created_at_from: datetime | None = None
    created_at_to: datetime | None = None
    bound_to: UUID | None = None  # the caller sees only what is assigned to this machine

    def arms(self) -> tuple[list[str], list[Any]]:
        """Conditions that exclude each other and together mean the filter, each served by one index; and their values.

        `machine_id` has three sources (assigned, reserved for the session, pinned), so that filter has three arms; they say
        what projection.RUN_SOURCE says.
        """
        values: list[Any] = [self.organization_id]

        def bind(value: object) -> str:
            values.append(value)
            return f"${len(values)}"

        conditions = ["r.organization_id = $1"]
        if self.workflow_id is not None:
            conditions.append(f"r.workflow_id = {bind(self.workflow_id)}")
        if self.session_id is not None:
            conditions.append(f"r.session_id = {bind(self.session_id)}")
        if self.status is not None:
            conditions.append(f"r.status = {bind(self.status.value)}")
        if self.created_at_from is not None:
            conditions.append(f"r.created_at >= {bind(self.created_at_from)}")
        if self.created_at_to is not None:
            conditions.append(f"r.created_at <= {bind(self.created_at_to)}")
        if self.bound_to is not None:
            conditions.append(f"r.assigned_machine_id = {bind(self.bound_to)}")
        common = " AND ".join(conditions)
        if self.machine_id is None:
            return [common], values
        machine = bind(self.machine_id)
        if self.bound_to is not None:
            return [f"{common} AND r.assigned_machine_id = {machine}"], values
        reserved = f"(SELECT reserved_session_id FROM machines WHERE id = {machine})"
        unreserved = (
            f"NOT ({projection.IS_ACTIVE} AND EXISTS (SELECT FROM machines WHERE reserved_session_id = r.session_id))"
        )
        return [
            f"{common} AND r.assigned_machine_id = {machine}",
            f"{common} AND r.assigned_machine_id IS NULL AND {projection.IS_ACTIVE} AND r.session_id = {reserved}",
            f"{common} AND r.assigned_machine_id IS NULL AND r.pinned_machine_id = {machine} AND {unreserved}",
        ], values


@dataclass(frozen=True, slots=True)
class Projection:
    """The columns to read, and the always-null keys to show; None means all."""

    columns: Sequence[str] | None = None
    unsupported: dict[str, None] | None = None


_NEWEST_FIRST = "ORDER BY created_at DESC, id DESC"


FIELDS = projection.RUN_COLUMNS.keys() | projection.RUN_UNSUPPORTED.keys()


async def list_runs(database: Database, wanted: RunFilter, shown: Projection, skip: int, limit: int) -> dict[str, Any]:
    """One page."""
    arms, values = wanted.arms()
    total = " + ".join(f"(SELECT count(*) FROM runs r WHERE {arm})" for arm in arms)
    if len(arms) == 1:
        page = f"SELECT r.id, r.created_at FROM runs r WHERE {arms[0]} {_NEWEST_FIRST} OFFSET {skip:d} LIMIT {limit:d}"
    else:
        # Each arm gives its own newest, in index order; the page is cut from their merge.
        newest = " UNION ALL ".join(
            f"(SELECT r.id, r.created_at FROM runs r WHERE {arm} {_NEWEST_FIRST} LIMIT {skip + limit:d})"
            for arm in arms
        )
        page = f"SELECT id, created_at FROM ({newest}) AS newest {_NEWEST_FIRST} OFFSET {skip:d} LIMIT {limit:d}"
    statement = (
        f"WITH page AS MATERIALIZED ({page})"
        f" SELECT {projection.columns(projection.MANY_RUNS, shown.columns)}"
        f" FROM page JOIN runs r ON r.id = page.id {projection.RUN_SOURCE}"
        " ORDER BY page.created_at DESC, page.id DESC"
    )
    async with database.connection() as connection:
        count = await connection.fetchval(f"SELECT {total}", *values)
        rows = await connection.fetch(statement, *values) if count > skip else []
        items = await projection.many(connection, rows, shown.unsupported)
    return {"items": items, "total": count, "skip": skip, "limit": limit}


def shown_fields(fields: Sequence[str] | None) -> Projection:
    """What `fields` asks for; it may be repeated or comma-separated. Raises Invalid for an unknown field."""
    if fields is None:
        return Projection()
    names = {name.strip(" ") for part in fields for name in part.split(",")} - {""}
    if not names <= FIELDS:
        raise Invalid(
            (("query", "fields"), f"Must be names of fields of a run: {', '.join(sorted(FIELDS))}.", "fields")
        )
    chosen = names | set(projection.RUN_BASE_FIELDS)
    return Projection(
        [name for name in projection.RUN_COLUMNS if name in chosen],
        {name: None for name in projection.RUN_UNSUPPORTED if name in chosen},
    )


async def wait_for_run(services: Services, wanted: RunFilter, seconds: float) -> None:
    """Return when the list has a run (with machine_id: one that is assigned to it), or after `seconds`.

    No database connection is held while waiting. An assignment wakes who waits for it; anything else is looked for again
    and again. Raises DatabaseUnavailable.
    """
    machine_id = wanted.machine_id if wanted.status in (None, RunStatus.SCHEDULING) else None
    arms, values = wanted.arms()
    exists = f"SELECT EXISTS (SELECT FROM runs r WHERE {arms[0]})"
    until = time.monotonic() + seconds
    with nullcontext() if machine_id is None else services.wakeups.listen(machine_id) as assigned:
        while True:
            async with services.database.connection() as connection:
                if await connection.fetchval(exists, *values):
                    return
            left = until - time.monotonic()
            if left <= 0 or services.wakeups.stopping:
                return
            if assigned is None:
                await asyncio.sleep(min(left, LOOK_AGAIN_SECONDS))
                continue
            try:
                async with asyncio.timeout(left):
                    await assigned.wait()
            except TimeoutError:
                return
            assigned.clear()


ASSIGNED = statement(
    "runs.assigned",
    """
    SELECT assigned_machine_id FROM runs
    WHERE assigned_machine_id = ANY(:machine_ids::uuid[]) AND status = 'scheduling'
    """,
)


async def announce_assignments(services: Services) -> None:
    """Assignments that other replicas made, for callers that wait here: one query for all of them."""
    machines = services.wakeups.awaited_machines()
    if machines:
        async with services.database.connection() as connection:
            rows = await connection.fetch(ASSIGNED, machine_ids=list(machines))
        services.wakeups.assigned({row["assigned_machine_id"] for row in rows})
