"""The list of runs: filters, orders, projection, paging, and waiting for the list to have something.

No query reads a long column that the reply does not show, and the page's ids are found before any wide row is read.

Two indexes have an order of all of an organization's runs: by creation and, of one status, by the last change. What neither
serves is found by a scan (stores/scans.py), which looks at the newest 10,000 runs at most.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

from app.errors import Invalid
from app.limits import memory_budget
from app.models import TERMINAL, RunStatus
from app.runs import projection
from app.scheduling import rules
from app.services import Services
from app.stores import paging, search
from app.stores.database import Connection, Database
from app.stores.paging import Listing, Slice, in_order, page
from app.stores.scans import Scan, scan
from app.stores.statements import Statement, composed, fragment, statement

# As the index has it that has the order of changes: by the collation, no other index serves a condition on this.
_STATUS_BY_CHANGE = 'r.status COLLATE "POSIX"'

# How often a caller looks again that waits for anything but an assignment.
LOOK_AGAIN_SECONDS = 1.0


Order = Literal["created", "changed"]


@dataclass(frozen=True, slots=True)
class RunFilter:
    """The filters of a list; None means any.

    `ended_from` and `ended_to` are times of the end by the database's clock, so only runs that have ended match them.
    """

    organization_id: str
    workflow_id: UUID | None = None
    machine_id: UUID | None = None
    session_id: UUID | None = None
    status: str | None = None  # the vendor's `running_checks`, which no run ever has, too
    created_at_from: datetime | None = None
    created_at_to: datetime | None = None
    changed_from: datetime | None = None
    changed_to: datetime | None = None
    ended_from: datetime | None = None
    ended_to: datetime | None = None
    error_code: str | None = None
    bound_to: UUID | None = None  # the caller sees only what is assigned to this machine
    statuses: tuple[RunStatus, ...] | None = None  # one of these; not together with `status`

    @property
    def has_window_of_changes(self) -> bool:
        """Whether it asks for runs by their last change."""
        return any(at is not None for at in (self.changed_from, self.changed_to, self.ended_from, self.ended_to))

    @property
    def is_narrow(self) -> bool:
        """Whether it asks for runs of something, or of a time."""
        others = (self.workflow_id, self.machine_id, self.session_id, self.created_at_from, self.created_at_to)
        return self.has_window_of_changes or any(one is not None for one in others)

    def by_change(self) -> tuple[tuple[str, ...], str | None, dict[str, object]]:
        """The same filter for the index that has the order of changes.

        Conditions that this index serves, which exclude each other; what else is asked of each run (None: nothing); and the
        values of both.
        """
        window, values = self._window()
        statuses = [
            status
            for status in RunStatus
            if self.status in (None, status)
            and (self.statuses is None or status in self.statuses)
            and (status in TERMINAL or (self.ended_from, self.ended_to) == (None, None))
        ]
        if self.status is None:
            served = [f"{_STATUS_BY_CHANGE} = '{status}'" for status in statuses]
        else:
            served = [f"{_STATUS_BY_CHANGE} = :status" if statuses else "false AND :status::text IS NULL"]
            values["status"] = str(self.status)
        branches = tuple(f"r.organization_id = :organization_id AND {status}{window}" for status in served)
        beside, more = self._beside()
        asked = [beside] if beside else []
        if self.machine_id is not None:
            asked.append(f"({' OR '.join(f'({one})' for one in _SHOWS_MACHINE)})")
            more["machine_id"] = self.machine_id
        return branches, " AND ".join(asked) or None, values | more | {"organization_id": self.organization_id}

    def _beside(self) -> tuple[str, dict[str, object]]:
        """A condition for what it asks beside organization, status, machine and last change; and its values."""
        return paging.where(
            "r",
            workflow_id=self.workflow_id,
            session_id=self.session_id,
            created_at_from=self.created_at_from,
            created_at_to=self.created_at_to,
            error_code=self.error_code,
            assigned_machine_id=self.bound_to,
        )

    def _window(self) -> tuple[str, dict[str, object]]:
        """Conditions for what it asks of the last change, each with AND before it, and their values."""
        bounds = {
            "changed_from": ("r.changed_at >= :changed_from", self.changed_from),
            "changed_to": ("r.changed_at <= :changed_to", self.changed_to),
            "ended_from": ("r.changed_at >= :ended_from", self.ended_from),
            "ended_to": ("r.changed_at <= :ended_to", self.ended_to),
        }
        given: dict[str, object] = {name: value for name, (_, value) in bounds.items() if value is not None}
        return "".join(f" AND {bounds[name][0]}" for name in given), given

    def branches(self) -> tuple[tuple[str, ...], dict[str, object]]:
        """Conditions that exclude each other and together mean the filter, each served by one index; and their values.

        `machine_id` has three sources (assigned, reserved for the session, pinned), so that filter has three branches; they
        say what projection.RUN_SOURCE says.
        """
        beside, values = self._beside()
        common = f"r.organization_id = :organization_id{beside and ' AND '}{beside}"
        values["organization_id"] = self.organization_id
        # In a whole organization a status is found by its index, which has this collation. Of a workflow, session or machine
        # their own index is better than any that speaks of states, which statistics may take for short.
        narrow = (self.workflow_id, self.session_id, self.machine_id, self.bound_to)
        status = 'r.status COLLATE "C"' if narrow == (None,) * len(narrow) else "r.status || ''"
        if self.status is not None:
            common += f" AND {status} = :status"
            values["status"] = str(self.status)
        if self.statuses is not None:
            common += f" AND {status} = ANY (:statuses::text[])"
            values["statuses"] = tuple(one.value for one in self.statuses)
        window, bounds = self._window()
        if (self.ended_from, self.ended_to) != (None, None):
            window += f" AND NOT ({rules.is_active('r')})"
        common, values = f"{common}{window}", values | bounds
        if self.machine_id is None:
            return (common,), values
        values["machine_id"] = self.machine_id
        if self.bound_to is not None:
            return (f"{common} AND r.assigned_machine_id = :machine_id",), values
        return tuple(f"{common} AND {one}" for one in _SHOWS_MACHINE), values


# The three ways in which `machine_id` of a run is :machine_id.
_SHOWS_MACHINE = (
    "r.assigned_machine_id = :machine_id",
    f"r.assigned_machine_id IS NULL AND {rules.is_active('r')}"
    " AND r.session_id = (SELECT reserved_session_id FROM machines WHERE id = :machine_id)",
    "r.assigned_machine_id IS NULL AND r.pinned_machine_id = :machine_id"
    f" AND NOT ({rules.is_active('r')} AND EXISTS (SELECT FROM machines WHERE reserved_session_id = r.session_id))",
)


# --- runs -------------------------------------------------------------------------------------------------------------

FIELDS = projection.RUN_COLUMNS.keys() | projection.RUN_UNSUPPORTED.keys()


# What a run shows that can be long, or costs a look into another table, is read only if it is asked for. One statement for all
# projections: a connection keeps a hundred prepared statements, and one caller's must not push out everybody's. It is told
# by a bit for each key: to look for names in a list took longer than the rest of the page.
PRODUCED = ("output_data", "run_message_history", "usage_metadata")
_ATTACHED = ("input_attachment_ids", "output_attachment_ids")
_TEXTS = ("error", "main_prompt", *(name for name in projection.RUN_JSON if name not in PRODUCED))
_BITS = {
    name: 1 << place for place, name in enumerate((*_TEXTS, *PRODUCED, *_ATTACHED, "pool_ids", "scheduling_reason"))
}


def bits(fields: Collection[str]) -> int:
    """These keys as the bits that the statements get."""
    return sum(bit for name, bit in _BITS.items() if name in fields)


def is_shown(*fields: str) -> str:
    """A condition: the statement's `:shown` names one of these keys."""
    return f"(:shown::bigint & {bits(fields)} <> 0)"


def if_shown(name: str, column: str) -> str:
    """The column, or null where the statement's `:shown` says that the reply does not show it."""
    return f"CASE WHEN {is_shown(name)} THEN {column} END" if name in _BITS else column


def _octets(*names: str) -> str:
    """About how many bytes of JSON these texts take."""
    column = projection.RUN_COLUMNS
    texts = {name: column[name] if name in projection.RUN_JSON else f"to_json({column[name]})" for name in names}
    each = (f"CASE WHEN {is_shown(name)} THEN octet_length({text}::text) END" for name, text in texts.items())
    return " + ".join(f"coalesce({one}, 0)" for one in each)


_ALL = bits(FIELDS)

RUNS = Listing(
    "runs",
    "runs r",
    octets=f"""
        1200 + {_octets(*_TEXTS)} + CASE WHEN {is_shown("pool_ids")} THEN 39 * coalesce(cardinality(r.pool_ids), 0) ELSE 0 END
        + CASE WHEN {is_shown(*_ATTACHED)} THEN
              (SELECT 39 * count(*) FROM run_attachments a WHERE a.run_id = r.id AND {projection.CURRENT}) ELSE 0 END
        + CASE WHEN {is_shown(*PRODUCED)} THEN coalesce(
              (SELECT {_octets(*PRODUCED)} FROM run_outputs o WHERE o.run_id = r.id AND o.attempt = r.attempt), 0) ELSE 0 END
    """,
    row="r.id = listed.key",
)

ROWS = statement(
    "runs.rows",
    f"""
    SELECT {", ".join(f"{if_shown(name, column)} AS {name}" for name, column in projection.MANY_RUNS.items())}
    FROM {in_order("runs r")} {projection.RUN_SOURCE} {projection.outputs_source(is_shown(*PRODUCED))}
    ORDER BY page.n
    """,
)


BY_CHANGE = replace(RUNS, name="runs.changed", order=("changed_at", "id"))


# The texts that a search looks at, cheap ones first; `deep`: the history too.
_SEARCHED = search.found_in("r.id::text", "r.session_alias", "array_to_string(r.error, E'\\n')", "r.input_values::text")


def _found_in_outputs(*columns: str) -> str:
    """LIMIT: looked up for each run, never joined."""
    found = search.found_in(*(f"o.{column}::text" for column in columns))
    return (
        f"coalesce((SELECT {found} FROM run_outputs o WHERE o.run_id = r.id AND o.attempt = r.attempt LIMIT 1), false)"
    )


_SEARCHES = {
    deep: f"({_SEARCHED} OR {_found_in_outputs('output_data', *(('run_message_history',) if deep else ()))})"
    for deep in (False, True)
}
_SEARCH_SLICE = 4  # runs that a search looks at first: they may have megabytes


@dataclass(frozen=True, slots=True)
class Search:
    """A text that runs are searched for; `deep`: in their histories too."""

    text: str
    deep: bool = False


async def list_runs(
    database: Database,
    wanted: RunFilter,
    fields: Collection[str],
    part: Slice,
    order: Order = "created",
    searched: Search | None = None,
) -> dict[str, object]:
    """One page of runs, with these keys, newest first by this order. Raises Invalid as paging.page does."""
    told = bits(fields)

    async def read_runs(connection: Connection, ids: list[UUID]) -> list[dict[str, Any]]:
        return await projection.many(connection, await connection.fetch(ROWS, ids=ids, shown=told))

    shown, walks_changes = BY_CHANGE if order == "changed" else RUNS, order == "changed" or wanted.has_window_of_changes
    if searched is not None:
        branches, beside, values = wanted.by_change() if walks_changes else _by_creation(wanted)
        matches = " AND ".join(filter(None, (beside, _SEARCHES[searched.deep])))
        values |= {"pattern": search.pattern(searched.text)}
        first: list[UUID] = []
        if (ids := search.ids_beginning(searched.text)) is not None:
            first = await _beginning(database, wanted, ids)
            matches, values = f"r.id <> ALL (:first::uuid[]) AND {matches}", values | {"first": first}
        looks = Scan(BY_CHANGE if walks_changes else RUNS, branches, matches, values, shown, _SEARCH_SLICE, first)
        found = await scan(database, looks, part, read_runs, shown=told)
    elif not walks_changes and wanted.error_code is not None:
        branches, beside, values = _by_creation(wanted)
        looks = Scan(RUNS, branches, beside or "true", values, shown)
        found = await scan(database, looks, part, read_runs, shown=told)
    elif not walks_changes:
        branches, values = wanted.branches()
        found = await page(database, RUNS, branches, part, values, read_runs, shown=told)
    else:
        branches, beside, values = wanted.by_change()
        if order == "changed" and beside is None:
            counted = None if wanted.has_window_of_changes else wanted.branches()[0]
            found = await page(database, BY_CHANGE, branches, part, values, read_runs, counted=counted, shown=told)
        else:
            looks = Scan(BY_CHANGE, branches, beside or "true", values, shown)
            found = await scan(database, looks, part, read_runs, shown=told)
    items = [{name: value for name, value in run.items() if name in fields} for run in found.rows]
    return part.shown(items, found) | {
        "search_is_partial": searched is not None and found.is_partial,
        "list_is_partial": found.is_partial,
    }


def _by_creation(wanted: RunFilter) -> tuple[tuple[str, ...], str | None, dict[str, object]]:
    """As RunFilter.by_change, for the indexes that have the order of creation: none of them has the error's code."""
    branches, values = replace(wanted, error_code=None).branches()
    if wanted.error_code is None:
        return branches, None, values
    return branches, "r.error_code = :error_code", values | {"error_code": wanted.error_code}


async def _beginning(database: Database, wanted: RunFilter, ids: tuple[UUID, UUID]) -> list[UUID]:
    """The runs of this filter among all that there are whose ids are these or between them, newest first; 100 at most."""
    branches, values = wanted.branches()
    named = " UNION ALL ".join(
        f"SELECT r.id, r.created_at FROM (SELECT * FROM runs WHERE id BETWEEN :id_from AND :id_to OFFSET 0) AS r WHERE {branch}"
        for branch in branches
    )
    beginning = composed(
        "runs.beginning", fragment(f"SELECT id FROM ({named}) AS one ORDER BY created_at DESC, id LIMIT 100")
    )
    async with database.connection() as connection:
        return [row["id"] for row in await connection.fetch(beginning, id_from=ids[0], id_to=ids[1], **values)]


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
    memory_budget.reserve_reply(octets)
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
    f"""
    SELECT run.assigned_machine_id FROM unnest(:machine_ids::uuid[]) AS wanted (id), LATERAL (
        SELECT assigned_machine_id, status FROM runs
        WHERE assigned_machine_id = wanted.id AND {rules.is_active()} LIMIT 1
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
