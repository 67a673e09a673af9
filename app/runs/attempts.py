"""The archive of a run's finished attempts. A retry writes it (retry.py); this only reads."""

from uuid import UUID

from app.access.auth import SEEN, Principal
from app.errors import RunNotFound
from app.runs import projection
from app.stores.database import Connection, Database, Record
from app.stores.documents import columns
from app.stores.paging import Listing, Slice, page
from app.stores.statements import statement

KNOWN = statement("attempts.known", f"SELECT 1 FROM runs r WHERE r.id = :run_id AND {SEEN}")

ATTEMPTS = Listing(
    "attempts",
    "run_attempts t",
    octets="octet_length(to_json(t)::text)",
    row="t.run_id = :run_id AND t.attempt = listed.key",
    order=("attempt",),
)

ROWS = statement(
    "attempts.rows",
    f"""
    SELECT {columns(projection.ATTEMPT_COLUMNS)} FROM run_attempts t
    WHERE t.run_id = :run_id AND t.attempt = ANY(:attempts::integer[]) ORDER BY t.attempt DESC
    """,
)


async def check_known(connection: Connection, run_id: UUID, principal: Principal) -> None:
    """Whether there is such a run, without reading it. Raises RunNotFound for what the caller may not see."""
    if not await connection.fetchval(KNOWN, run_id=run_id, **principal.sees()):
        raise RunNotFound


async def list_attempts(database: Database, run_id: UUID, principal: Principal, part: Slice) -> dict[str, object]:
    """One page, newest first. Raises RunNotFound, and Invalid as paging.page does."""
    async with database.connection() as connection:
        await check_known(connection, run_id, principal)

    async def read(connection: Connection, attempts: list[int]) -> list[Record]:
        return await connection.fetch(ROWS, run_id=run_id, attempts=attempts)

    found = await page(database, ATTEMPTS, ("t.run_id = :run_id",), part, {"run_id": run_id}, read)
    return part.shown([dict(row) for row in found.rows], found)
