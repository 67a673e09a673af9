"""How often a run was given to a machine, and the claim of the executor process that began it.

The version before goes on running: it gives runs to machines without counting, and takes none away from them.

Revision ID: 0012
Revises: 0011
"""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute(
        "ALTER TABLE runs ADD COLUMN assignment integer NOT NULL DEFAULT 0,"
        " ADD COLUMN claim uuid, ADD COLUMN claim_attempt integer"
    )


def downgrade() -> None:
    op.execute("ALTER TABLE runs DROP COLUMN claim_attempt, DROP COLUMN claim, DROP COLUMN assignment")
