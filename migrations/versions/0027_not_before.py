"""Runs that are held until their `not_before`, and machines that a retry prefers others to.

The version before goes on running, but it does not know that a run is held: to it the lane of a held run is one more lane of
the queue, and it gives the run a machine at once. It also does not know of the machine that a run avoids, and it skips every
run of a bulk retry with not_before or avoid_last_machine. So use both fields only when all replicas are of this version.

A held run has its `not_before` as `queued_at`, and its lane begins with `~`: no column and no index of the queue changes.

Revision ID: 0027
Revises: 0026
"""

from alembic import op

revision = "0027"
down_revision = "0026"

# Dropped first: one that was interrupted stays behind, and is no index.
INDEX = [
    "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_held",
    """
    CREATE INDEX CONCURRENTLY ix_runs_held ON runs (queued_at)
        WHERE status = 'scheduling' AND assigned_machine_id IS NULL AND lane > '~' COLLATE "C"
    """,
]


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN IF NOT EXISTS avoided_machine_id uuid")
    with op.get_context().autocommit_block():
        for statement in INDEX:
            op.execute(statement)


def downgrade() -> None:
    op.execute("DROP INDEX ix_runs_held")
    # Held runs wait in the queue from now on.
    op.execute(
        "UPDATE runs SET lane = substr(lane, 2), queued_at = least(queued_at, now())"
        " WHERE status = 'scheduling' AND assigned_machine_id IS NULL AND lane > '~' COLLATE \"C\""
    )
    op.execute("ALTER TABLE runs DROP COLUMN avoided_machine_id")
