"""The list of runs: filters, projection, paging, and waiting for the list to have something.

No query reads a long column that the reply does not show, and the page's ids are found before any wide row is read.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from app import in_flight
from app.errors import Invalid
from app.models import RunStatus
from app.runs import projection
from app.services import Services
from app.stores import pages
from app.stores.database import Connection, Database
from app.stores.pages import Listing, Slice, in_order, page
from app.stores.statements import Statement, composed, fragment, statement

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

    def branches(self) -> tuple[tuple[str, ...], dict[str, object]]:
        """Conditions that exclude each other and together mean the filter, each served by one index; and their values.

        `machine_id` has three sources (assigned, reserved for the session, pinned), so that filter has three branches; they
        say what projection.RUN_SOURCE says.
        """
        common, values = pages.where(
            "r",
            organization_id=self.organization_id,
            workflow_id=self.workflow_id,
            session_id=self.session_id,
            created_at_from=self.created_at_from,
            created_at_to=self.created_at_to,
            assigned_machine_id=self.bound_to,
        )
        if self.status is not None:
            # In a whole organization it is found by its index, which has this collation. Of a workflow, session or machine
            # their own index is better than any that speaks of states, which statistics may take for short.
            narrow = (self.workflow_id, self.session_id, self.machine_id, self.bound_to)
            status = 'r.status COLLATE "C"' if narrow == (None,) * len(narrow) else "r.status || ''"
            common += f" AND {status} = :status"
            values["status"] = self.status.value
        if self.machine_id is None:
            return (common,), values
        values["machine_id"] = self.machine_id
        if self.bound_to is not None:
            return (f"{common} AND r.assigned_machine_id = :machine_id",), values
        reserved = "(SELECT reserved_session_id FROM machines WHERE id = :machine_id)"
        unreserved = (
            f"NOT ({projection.IS_ACTIVE} AND EXISTS (SELECT FROM machines WHERE reserved_session_id = r.session_id))"
        )
        return (
            f"{common} AND r.assigned_machine_id = :machine_id",
            f"{common} AND r.assigned_machine_id IS NULL AND {projection.IS_ACTIVE} AND r.session_id = {reserved}",
            f"{common} AND r.assigned_machine_id IS NULL AND r.pinned_machine_id = :machine_id AND {unreserved}",
        ), values


# --- runs -------------------------------------------------------------------------------------------------------------

FIELDS = projection.RUN_COLUMNS.keys() | projection.RUN_UNSUPPORTED.keys()


# What a run shows that can be long, or costs a look into another table, is read only if it is asked for. One statement for all
# projections: a connection keeps a hundred prepared statements, and one caller's must not push out everybody's. It is told
# by a bit for each key: to look for names in a list took longer than the rest of the page.
_PRODUCED = ("output_data", "run_message_history", "usage_metadata")
_ATTACHED = ("input_attachment_ids", "output_attachment_ids")
_TEXTS = ("error", "main_prompt", *(name for name in projection.RUN_JSON if name not in _PRODUCED))
_BITS = {
    name: 1 << place for place, name in enumerate((*_TEXTS, *_PRODUCED, *_ATTACHED, "pool_ids", "scheduling_reason"))
}


def bits(fields: Collection[str]) -> int:
    """What the statements are told of these keys."""
    return sum(bit for name, bit in _BITS.items() if name in fields)


def _shown(*fields: str) -> str:
    return f"(:shown::bigint & {bits(fields)} <> 0)"


def _if_shown(name: str) -> str:
    column = projection.MANY_RUNS[name]
    return f"CASE WHEN {_shown(name)} THEN {column} END" if name in _BITS else column


def _octets(*names: str) -> str:
    """About how many bytes of JSON these texts take."""
    column = projection.RUN_COLUMNS
    texts = {name: column[name] if name in projection.RUN_JSON else f"to_json({column[name]})" for name in names}
    each = (f"CASE WHEN {_shown(name)} THEN octet_length({text}::text) END" for name, text in texts.items())
    return " + ".join(f"coalesce({one}, 0)" for one in each)


_ALL = bits(FIELDS)

RUNS = Listing(
    "runs",
    "runs r",
    octets=f"""
        1200 + {_octets(*_TEXTS)} + CASE WHEN {_shown("pool_ids")} THEN 39 * coalesce(cardinality(r.pool_ids), 0) ELSE 0 END
        + CASE WHEN {_shown(*_ATTACHED)} THEN
              (SELECT 39 * count(*) FROM run_attachments a WHERE a.run_id = r.id) ELSE 0 END
        + CASE WHEN {_shown(*_PRODUCED)} THEN coalesce(
              (SELECT {_octets(*_PRODUCED)} FROM run_outputs o WHERE o.run_id = r.id AND o.attempt = r.attempt), 0) ELSE 0 END
    """,
    row="r.id = listed.key",
)

ROWS = statement(
    "runs.rows",
    f"""
    SELECT {", ".join(f"{_if_shown(name)} AS {name}" for name in projection.MANY_RUNS)}
    FROM {in_order("runs r")} {projection.RUN_SOURCE} {projection.outputs_source(_shown(*_PRODUCED))}
    ORDER BY page.n
    """,
)


async def list_runs(database: Database, wanted: RunFilter, fields: Collection[str], part: Slice) -> dict[str, object]:
    """One page of runs, with these keys. Raises Invalid as pages.page does."""
    branches, values = wanted.branches()
    told = bits(fields)

    async def read_runs(connection: Connection, ids: list[UUID]) -> list[dict[str, Any]]:
        return await projection.many(connection, await connection.fetch(ROWS, ids=ids, shown=told))

    found = await page(database, RUNS, branches, part, values, read_runs, shown=told)
    return part.shown([{name: value for name, value in run.items() if name in fields} for run in found.rows], found)


OCTETS = statement(
    "runs.octets",
    f"""
    SELECT coalesce(max(octets), 0)::bigint FROM (
        SELECT sum((SELECT {RUNS.octets} FROM {RUNS.source} WHERE {RUNS.row}))
                   OVER (ORDER BY n ROWS UNBOUNDED PRECEDING) AS octets
        FROM unnest(:ids::uuid[]) WITH ORDINALITY AS listed (key, n)
    ) AS weighed
    """,
)


async def read(connection: Connection, ids: Sequence[UUID], max_bytes: int) -> list[dict[str, Any]] | None:
    """These runs, whole; None if they are more than one and have more bytes. Raises NoRoom."""
    octets = await connection.fetchval(OCTETS, ids=ids, shown=_ALL)
    if len(ids) > 1 and octets > max_bytes:
        return None
    in_flight.hold_reply(octets)
    return await projection.many(connection, await connection.fetch(ROWS, ids=ids, shown=_ALL))


def shown_fields(fields: Sequence[str] | None) -> Collection[str]:
    """The keys that `fields` asks for; it may be repeated or comma-separated. Raises Invalid for an unknown one."""
    if fields is None:
        return FIELDS
    names = {name.strip(" ") for part in fields for name in part.split(",")} - {""}
    if not names <= FIELDS:
        raise Invalid(
            (("query", "fields"), f"Must be names of fields of a run: {', '.join(sorted(FIELDS))}.", "fields")
        )
    return names | set(projection.RUN_BASE_FIELDS)


# --- waiting ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _exists(branch: str) -> Statement:
    return composed("runs.exists", fragment(f"SELECT EXISTS (SELECT FROM runs r WHERE {branch})"))


async def wait_for_run(services: Services, wanted: RunFilter, seconds: float) -> None:
    """Return when the list has a run (with machine_id: one that is assigned to it), or after `seconds`.

    No database connection is held while waiting. An assignment wakes who waits for it; anything else is looked for again
    and again. Raises DatabaseUnavailable.
    """
    machine_id = wanted.machine_id if wanted.status in (None, RunStatus.SCHEDULING) else None
    branches, values = wanted.branches()
    exists = _exists(branches[0])
    until = time.monotonic() + seconds
    with nullcontext() if machine_id is None else services.wakeups.listen(machine_id) as assigned:
        while True:
            async with services.database.connection() as connection:
                if await connection.fetchval(exists, **values):
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
    SELECT run.assigned_machine_id FROM unnest(:machine_ids::uuid[]) AS wanted (id), LATERAL (
        SELECT assigned_machine_id, status FROM runs
        WHERE assigned_machine_id = wanted.id AND status IN ('scheduling', 'running') LIMIT 1
    ) AS run
    WHERE run.status = 'scheduling'
    """,
)


async def announce_assignments(services: Services) -> None:
    """Assignments that other replicas made, for callers that wait here: one query for all of them."""
    machines = services.wakeups.awaited_machines()
    if machines:
        async with services.database.connection() as connection:
            rows = await connection.fetch(ASSIGNED, machine_ids=list(machines))
        services.wakeups.assigned({row["assigned_machine_id"] for row in rows})
