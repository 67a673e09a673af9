"""The archive of a run's finished attempts, and what one attempt produced. A retry writes the archive; this only reads."""

from typing import Any
from uuid import UUID

import orjson

from app.access.auth import SEEN, Principal
from app.errors import AttemptNotFound, RunNotFound
from app.limits import memory_budget
from app.runs import projection
from app.stores.database import Connection, Database, Record
from app.stores.documents import columns
from app.stores.paging import Listing, Slice, page
from app.stores.statements import statement

KNOWN = statement("attempts.known", f"SELECT 1 FROM runs r WHERE r.id = :run_id AND {SEEN}")

_USAGE_OCTETS = """coalesce((
    SELECT octet_length(usage_metadata::text) FROM run_outputs WHERE run_id = t.run_id AND attempt = t.attempt LIMIT 1), 0)"""

ATTEMPTS = Listing(
    "attempts",
    "run_attempts t",
    octets=f"octet_length(to_json(t)::text) + {_USAGE_OCTETS}",
    row="t.run_id = :run_id AND t.attempt = listed.key",
    order=("attempt",),
)

_OUTPUTS = (
    "LEFT JOIN LATERAL (SELECT * FROM run_outputs WHERE run_id = t.run_id AND attempt = t.attempt LIMIT 1) AS o ON true"
)

ROWS = statement(
    "attempts.rows",
    f"""
    SELECT {columns(projection.ATTEMPT_COLUMNS)} FROM run_attempts t {_OUTPUTS}
    WHERE t.run_id = :run_id AND t.attempt = ANY(:attempts::integer[]) ORDER BY t.attempt DESC
    """,
)


async def check_known(connection: Connection, run_id: UUID, principal: Principal) -> None:
    """Whether there is such a run, without reading it. Raises RunNotFound for what the caller may not see."""
    if not await connection.fetchval(KNOWN, run_id=run_id, **principal.sees()):
        raise RunNotFound


async def list_attempts(database: Database, run_id: UUID, principal: Principal, part: Slice) -> dict[str, object]:
    """One page, newest first. A key that is bound to a machine is not told what earlier attempts used.

    Raises RunNotFound, and Invalid as paging.page does.
    """
    async with database.connection() as connection:
        await check_known(connection, run_id, principal)

    async def read(connection: Connection, attempts: list[int]) -> list[Record]:
        return await connection.fetch(ROWS, run_id=run_id, attempts=attempts)

    found = await page(database, ATTEMPTS, ("t.run_id = :run_id",), part, {"run_id": run_id}, read)
    items = [_shown(row) for row in found.rows]
    if principal.machine_id is not None:
        items = [one | {"usage_metadata": None} for one in items]
    return part.shown(items, found)


# --- one attempt ------------------------------------------------------------------------------------------------------


def _output_ids(which: str) -> str:
    return (
        "ARRAY(SELECT a.id::text FROM run_attachments a WHERE a.run_id = :run_id AND a.attachment_type = 'output'"
        f" AND {which} AND {projection.VISIBLE} ORDER BY a.created_at, a.id)"
    )


# Which attempt is the current one, and about how many bytes of JSON the wanted one takes.
WEIGH = statement(
    "attempts.weigh",
    f"""
    SELECT r.attempt AS current, 1200 + coalesce((
        SELECT coalesce(octet_length(output_data::text), 0) + coalesce(octet_length(run_message_history::text), 0)
            + coalesce(octet_length(usage_metadata::text), 0)
        FROM run_outputs WHERE run_id = r.id AND attempt = :attempt LIMIT 1
    ), 0) + coalesce((
        SELECT octet_length(to_json(t)::text) FROM run_attempts t WHERE t.run_id = r.id AND t.attempt = :attempt LIMIT 1
    ), 0) AS octets
    FROM runs r WHERE r.id = :run_id AND {SEEN}
    """,
)

_PRODUCED = ("output_data", "run_message_history")

# Superseded outputs are about to be removed.
ARCHIVED = statement(
    "attempts.archived",
    f"""
    SELECT {columns(projection.ATTEMPT_COLUMNS)}, t.outputs_are_kept,
           {_output_ids("a.attempt = :attempt")} AS output_attachment_ids,
           {", ".join(f"CASE WHEN NOT o.is_superseded THEN o.{name} END AS {name}" for name in _PRODUCED)}
    FROM run_attempts t {_OUTPUTS} WHERE t.run_id = :run_id AND t.attempt = :attempt
    """,
)

# The keys of an archived attempt, of a run. What a retry adds is null.
_OF_RUN = {
    **dict.fromkeys(projection.ATTEMPT_COLUMNS, "NULL::text"),
    "run_id": "r.id::text",
    "machine_id": "r.assigned_machine_id::text",
    **{
        name: projection.RUN_COLUMNS[name]
        for name in (
            *("attempt", "status", "error", "error_code", "session_id", "started_at", "ended_at", "workflow_version"),
            "usage_metadata",
        )
    },
    "overridden": "ARRAY[]::text[]",
    "end_reason": projection.end_reason("r.id", "r.attempt"),
    "outputs_are_kept": "true",
    "output_attachment_ids": _output_ids(projection.CURRENT),
    **{name: f"o.{name}" for name in _PRODUCED},
}


CURRENT = statement(
    "attempts.current",
    f"""
    SELECT {columns(_OF_RUN)} FROM runs r {projection.outputs_source()}
    WHERE r.id = :run_id AND r.attempt = :attempt AND {SEEN}
    """,
)


async def get(database: Database, run_id: UUID, attempt: int, principal: Principal) -> dict[str, Any]:
    """One attempt with what it produced. A key that is bound to a machine sees only the current one.

    Raises RunNotFound, AttemptNotFound, QuotaExceeded and Overloaded.
    """

    async def read() -> dict[str, Any]:
        async with database.connection() as connection:
            found = await connection.fetchrow(WEIGH, run_id=run_id, attempt=attempt, **principal.sees())
            if found is None:
                raise RunNotFound
            memory_budget.reserve_reply(found["octets"])
            row = None
            if attempt == found["current"]:
                row = await connection.fetchrow(CURRENT, run_id=run_id, attempt=attempt, **principal.sees())
            if row is None and principal.machine_id is None:  # or it was retried meanwhile
                row = await connection.fetchrow(ARCHIVED, run_id=run_id, attempt=attempt)
            if row is None:
                raise AttemptNotFound
            return _shown(row)

    return await memory_budget.with_room(read)


def _shown(row: Record) -> dict[str, Any]:
    """An attempt as it is sent."""
    shown = dict(row.items())
    for name in ("usage_metadata", *_PRODUCED):
        if shown.get(name) is not None:
            shown[name] = orjson.Fragment(shown[name])
    return shown
