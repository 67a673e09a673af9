"""Machines that fall silent, and runs that their machines do not begin.

The version before goes on running: what it gives to a machine is not awaited, and what begins there says nothing of claims.
The index on runs is built without keeping anybody from writing.

Revision ID: 0017
Revises: 0016
"""

from alembic import op

revision = "0017"
down_revision = "0016"

# Once more after an interruption: what comes before the index is committed then.
UP = [
    """
    ALTER TABLE machines
        ADD COLUMN IF NOT EXISTS look_at timestamptz,
        ADD COLUMN IF NOT EXISTS silenced_at timestamptz,
        ADD COLUMN IF NOT EXISTS starts_with_claim boolean NOT NULL DEFAULT false,
        ADD COLUMN IF NOT EXISTS begun_session_id uuid
    """,
    "CREATE INDEX IF NOT EXISTS ix_machines_look_at ON machines (look_at) WHERE look_at IS NOT NULL",
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS awaited_since timestamptz",
]

# Dropped first: one that was interrupted stays behind, and is no index.
INDEX = [
    "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_awaited",
    """
    CREATE INDEX CONCURRENTLY ix_runs_awaited ON runs (awaited_since)
        WHERE status = 'scheduling' AND assigned_machine_id IS NOT NULL
    """,
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)
    with op.get_context().autocommit_block():
        for statement in INDEX:
            op.execute(statement)


def downgrade() -> None:
    op.execute("ALTER TABLE runs DROP COLUMN awaited_since")
    op.execute(
        "ALTER TABLE machines DROP COLUMN begun_session_id, DROP COLUMN starts_with_claim,"
        " DROP COLUMN silenced_at, DROP COLUMN look_at"
    )
