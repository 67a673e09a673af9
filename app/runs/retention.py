"""Retention: ended runs and archived attempts go after as many days as the settings say; by default they stay for ever.

Small batches, so that a round holds no row for long; its loop rests between them. Runs go through `remove_runs`, which lists
what they name outside, as everything that removes a run.
"""

from app.access.auth import Actor
from app.config import Settings
from app.runs.deleting import remove_runs
from app.stores.database import Database
from app.stores.statements import loose_scan, statement

# Runs of one organization after the other, until there are enough. `changed_at` is the end by the database's clock; `ended_at`
# may come from a clock that is wrong. A locked run is just being retried or deleted.
ENDED_LONG_AGO = statement(
    "retention.ended_long_ago",
    f"""
    WITH RECURSIVE {loose_scan("organization", "organization_id", "runs WHERE true")}
    SELECT old.id
    FROM organization, unnest(ARRAY['success', 'error', 'cancelled', 'task_failed']) AS terminal (status), LATERAL (
        SELECT id FROM runs
        WHERE organization_id = organization.organization_id AND status COLLATE "POSIX" = terminal.status
          AND changed_at <= now() - make_interval(days => :days)
        ORDER BY changed_at LIMIT :most FOR UPDATE SKIP LOCKED
    ) AS old
    LIMIT :most
    """,
)

# The function belongs to the database's owner: the service itself may not change the archive.
PRUNE_ATTEMPTS = statement("retention.prune_attempts", "SELECT prune_run_attempts(:days::int, 2000)")

BATCH = 100
WHY = "It was kept for {} days after its end (RUN_RETENTION_DAYS)."


async def remove_old_runs(database: Database, settings: Settings) -> bool:
    """Remove a batch of runs that ended too many days ago; whether there may be more. Raises DatabaseUnavailable."""
    days = settings.run_retention_days
    if days == 0:
        return False
    async with database.transaction() as connection:
        rows = await connection.fetch(ENDED_LONG_AGO, days=days, most=BATCH)
        if rows:
            actor = Actor(reason=WHY.format(days))
            await remove_runs(connection, [row["id"] for row in rows], actor, hands_over=settings.hands_over)
    return len(rows) == BATCH


async def prune_attempts(database: Database, days: int) -> bool:
    """Remove a batch of attempts that were retried too many days ago; whether there may be more."""
    if days == 0:
        return False
    async with database.connection() as connection:
        pruned: int = await connection.fetchval(PRUNE_ATTEMPTS, days=days)
    return pruned > 0
