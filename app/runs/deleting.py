"""The deletion of runs: by request, with their workflow or organization, and by age.

All code that removes a run calls `remove_runs`. In the same transaction it releases the session and puts secrets and files on
the deletion list.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import bindparam, literal_column, select

from app.access.auth import Actor
from app.errors import RunNotFound
from app.events import record_events
from app.handoff import dispatches
from app.idempotency import Reply, WriteRequest, once
from app.models import Run
from app.runs.ending import RELEASE_ACTIVE, release
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection
from app.stores.deletions import Name
from app.stores.statements import by_id, rows_of, statement
from app.telemetry import metrics
from app.webhooks import outbox

LOCK_FOR_DELETE = statement(
    "runs.ending.lock_for_delete",
    select(literal_column("1"))
    .where(Run.id == bindparam("run_id"), Run.organization_id == bindparam("organization_id"))
    .with_for_update(),
)

LIST_NAMES = statement(
    "runs.ending.list_names",
    f"""
    WITH attachments AS (
        DELETE FROM run_attachments WHERE run_id = ANY(:run_ids::uuid[]) RETURNING storage_path
    )
    SELECT '{deletions.FILES}', storage_path FROM attachments WHERE storage_path IS NOT NULL
    UNION ALL
    SELECT '{deletions.SECRETS}', secret_path FROM {rows_of("runs", "run_ids")} AS run WHERE secret_path IS NOT NULL
    """,
)

DELETE = statement(
    "runs.ending.delete",
    f"""
    WITH deleted AS (
        DELETE FROM runs WHERE {by_id("runs", "run_ids")} RETURNING id, organization_id, attempt, status
    )
    {record_events("deleted", "'deleted'", from_status="status")}
    """,
)


async def remove_runs(connection: Connection, run_ids: Sequence[UUID], actor: Actor, *, hands_over: bool) -> None:
    """Remove locked runs, listing everything they name. The only way a run's row goes.

    `hands_over`: executors at Temporal are to be called off. Those that are not hear of it when they report.
    """
    if hands_over:
        await dispatches.cancel(connection, run_ids)
    names = [Name(*row.values()) for row in await connection.fetch(LIST_NAMES, run_ids=run_ids)]
    await deletions.due(connection, names)
    await connection.execute(outbox.FORGET_BODIES, run_ids=run_ids)
    await release(connection, run_ids, RELEASE_ACTIVE)
    await connection.execute(DELETE, run_ids=run_ids, **actor.parameters())
    count, by = len(run_ids), "service" if actor.key_id is None else "caller"
    connection.after_commit(lambda: metrics.transitions.add("deleted", by, count=count))


async def delete(services: Services, write: WriteRequest, run_id: UUID, reason: str | None) -> Reply:
    """Remove a run in any status. Raises RunNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        if not await connection.fetchval(LOCK_FOR_DELETE, run_id=run_id, organization_id=organization_id):
            raise RunNotFound
        await remove_runs(connection, [run_id], write.actor(reason), hands_over=services.settings.hands_over)
        return Reply(204, b"")

    return await once(services, write, work)
