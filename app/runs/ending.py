"""Ending and deleting runs. Whatever makes a run terminal goes through `end_runs` or `ended`, and whatever removes its row
through `remove_runs`: they free the machine, release the session, and put secrets and blobs on the deletion list in the same
transaction.
"""

from collections.abc import Sequence
from uuid import UUID

from app.config import Settings
from app.errors import RunNotFound
from app.idempotency import Reply, WriteRequest, once
from app.models import RunStatus
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Database
from app.stores.deletions import Name

# --- end --------------------------------------------------------------------------------------------------------------

END = """
UPDATE runs SET status = $2, error = $3, ended_at = now()
WHERE id = ANY($1::uuid[]) AND status IN ('scheduling', 'running') RETURNING id
"""

# A finished run's secret stays retryable for the retention time. Only at the moment it ends: a second entry for a
# secret that was destroyed since would make it look kept.
RETAIN = """
INSERT INTO deletions (store, name, due_at)
SELECT 'vault', secret_path, now() + make_interval(secs => $2)
FROM runs WHERE id = ANY($1::uuid[]) AND secret_path IS NOT NULL
"""

RELEASE = """
UPDATE machines SET reserved_session_id = NULL FROM runs
WHERE runs.id = ANY($1::uuid[]) AND runs.release_session_after
  AND machines.reserved_session_id = runs.session_id AND machines.organization_id = runs.organization_id
"""


async def ended(connection: Connection, run_ids: Sequence[UUID], settings: Settings) -> None:
    """What follows in the same transaction when runs become terminal. Their machines are free by their status alone."""
    await connection.execute(RETAIN, run_ids, float(settings.secret_retention_seconds))
    await connection.execute(RELEASE, run_ids)


async def end_runs(
    connection: Connection, run_ids: Sequence[UUID], status: RunStatus, error: str | None, settings: Settings
) -> None:
    """End those of these locked runs that are active."""
    rows = await connection.fetch(END, run_ids, status.value, None if error is None else [error])
    await ended(connection, [row["id"] for row in rows], settings)


SILENT = """
SELECT id, organization_id FROM runs
WHERE status = 'running' AND reported_at <= now() - make_interval(secs => $1)
ORDER BY reported_at LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED
"""


async def end_silent_runs(database: Database, settings: Settings) -> set[str]:
    """End running runs whose executor has been silent for too long; returns their organizations."""
    silence = settings.run_silence_seconds
    if silence == 0:
        return set()
    async with database.transaction() as connection:
        rows = await connection.fetch(SILENT, float(silence))
        if rows:
            sentence = (
                f"The executor sent no report for {silence} seconds, so the run was ended. Retry it when one is back."
            )
            await end_runs(connection, [row["id"] for row in rows], RunStatus.ERROR, sentence, settings)
    return {row["organization_id"] for row in rows}


# --- delete -----------------------------------------------------------------------------------------------------------

LOCK_FOR_DELETE = "SELECT 1 FROM runs WHERE id = $1 AND organization_id = $2 FOR UPDATE"

LIST_NAMES = """
WITH attachments AS (
    DELETE FROM run_attachments WHERE run_id = ANY($1::uuid[]) RETURNING storage_path
)
SELECT 'storage', storage_path FROM attachments WHERE storage_path IS NOT NULL
UNION ALL
SELECT 'vault', secret_path FROM runs WHERE id = ANY($1::uuid[]) AND secret_path IS NOT NULL
"""

RELEASE_ACTIVE = f"{RELEASE} AND runs.status IN ('scheduling', 'running')"


async def remove_runs(connection: Connection, run_ids: Sequence[UUID]) -> None:
    """Remove locked runs, listing everything they name. The only way a run's row goes."""
    names = [Name(*row.values()) for row in await connection.fetch(LIST_NAMES, run_ids)]
    await deletions.due(connection, names)
    await connection.execute(RELEASE_ACTIVE, run_ids)
    await connection.execute("DELETE FROM runs WHERE id = ANY($1::uuid[])", run_ids)


async def delete(services: Services, write: WriteRequest, run_id: UUID) -> Reply:
    """Remove a run in any status. Raises RunNotFound."""

    async def work(connection: Connection) -> Reply:
        if not await connection.fetchval(LOCK_FOR_DELETE, run_id, write.principal.organization_id):
            raise RunNotFound
        await remove_runs(connection, [run_id])
        return Reply(204, b"")

    return await once(services, write, work)
