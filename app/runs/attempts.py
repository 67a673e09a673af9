"""The archive of a run's finished attempts. A retry writes it (retry.py); this only reads."""

from typing import Any
from uuid import UUID

from app.auth import SEEN, Principal
from app.errors import RunNotFound
from app.runs import projection
from app.stores.database import Connection
from app.stores.statements import statement

COUNT = statement(
    "runs.attempts.count",
    f"""
    SELECT (SELECT count(*) FROM run_attempts t WHERE t.run_id = r.id) AS total
    FROM runs r WHERE r.id = :run_id AND {SEEN}
    """,
)

PAGE = statement(
    "runs.attempts.page",
    f"""
    SELECT {projection.columns(projection.ATTEMPT_COLUMNS)} FROM run_attempts t
    WHERE t.run_id = :run_id ORDER BY t.attempt DESC OFFSET :skip LIMIT :limit
    """,
)


async def list_attempts(
    connection: Connection, run_id: UUID, principal: Principal, skip: int, limit: int
) -> dict[str, Any]:
    """One page, newest first. Raises RunNotFound."""
    total = await connection.fetchval(COUNT, run_id=run_id, **principal.sees())
    if total is None:
        raise RunNotFound
    rows = await connection.fetch(PAGE, run_id=run_id, skip=skip, limit=limit) if total > skip else []
    return {"items": [dict(row) for row in rows], "total": total, "skip": skip, "limit": limit}
