"""The history of a run's current attempt, in pages that are bounded by bytes: screenshots make it long."""

from typing import Any
from uuid import UUID

import orjson

from app.access.auth import SEEN, Principal
from app.errors import RunNotFound
from app.limits import memory_budget
from app.runs import projection
from app.stores.database import Connection, Database, Record
from app.stores.statements import statement

PAGE_BYTES = 1024 * 1024  # bytes of messages in a page; a longer message has a page of its own

# `following` is the length of the first message that may be in the page, also if it is too long for it.
PAGE = statement(
    "runs.history.page",
    f"""
    WITH run AS MATERIALIZED (
        SELECT r.attempt, o.run_message_history AS history FROM runs r {projection.outputs_source()}
        WHERE r.id = :run_id AND {SEEN}
    ), message AS MATERIALIZED (
        SELECT n, value, octet_length(value::text) AS octets, sum(octet_length(value::text)) OVER (ORDER BY n) AS so_far
        FROM (
            SELECT n, value FROM run, json_array_elements(run.history) WITH ORDINALITY AS element (value, n)
            WHERE n > :after::bigint ORDER BY n LIMIT :limit::bigint
        ) AS wanted
    )
    SELECT run.attempt, coalesce(json_array_length(run.history), 0) AS total,
        (SELECT octets FROM message ORDER BY n LIMIT 1) AS following, page.value
    FROM run LEFT JOIN LATERAL (
        SELECT n, value FROM message WHERE so_far <= :most::bigint
    ) AS page ON true
    ORDER BY page.n
    """,
)


async def read(database: Database, run_id: UUID, principal: Principal, after: int, limit: int) -> dict[str, Any]:
    """At most `limit` messages beyond the first `after`, the oldest first; at least one, however long, if there are more.

    Raises RunNotFound, QuotaExceeded and Overloaded.
    """
    named: dict[str, Any] = {"run_id": run_id, "after": after, "limit": limit, **principal.sees()}

    async def find() -> list[Record]:
        async with database.connection() as connection:
            return await _find(connection, named)

    rows = await memory_budget.with_room(find)
    current, total = rows[0]["attempt"], rows[0]["total"]
    items = [orjson.Fragment(row["value"]) for row in rows if row["value"] is not None]
    seen = after + len(items)
    return {
        "items": items,
        "attempt": current,
        "total": total,
        "limit": limit,
        "next": seen if items and seen < total else None,
    }


async def _find(connection: Connection, named: dict[str, Any]) -> list[Record]:
    most = PAGE_BYTES
    while True:
        rows = await connection.fetch(PAGE, **named, most=most)
        if not rows:
            raise RunNotFound
        following = rows[0]["following"] or 0
        if following <= most:
            memory_budget.reserve_reply(sum(len(row["value"]) for row in rows if row["value"] is not None))
            return rows
        memory_budget.reserve_reply(following)
        most = following
