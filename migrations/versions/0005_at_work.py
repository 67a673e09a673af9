"""Which run of a session is at work is looked up, not searched for among all that wait in it.

The version before may go on running. The index is built without keeping anybody from writing.

Revision ID: 0005
Revises: 0004
"""

from alembic import op

revision = "0005"
down_revision = "0004"

# Dropped first: one that was interrupted stays behind, and is no index.
UP = [
    "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_session_at_work",
    """
    CREATE INDEX CONCURRENTLY ix_runs_session_at_work ON runs (session_id)
        WHERE session_id IS NOT NULL AND (status = 'running' OR (status = 'scheduling' AND assigned_machine_id IS NOT NULL))
    """,
]


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for statement in UP:
            op.execute(statement)


def downgrade() -> None:
    op.execute("DROP INDEX ix_runs_session_at_work")
