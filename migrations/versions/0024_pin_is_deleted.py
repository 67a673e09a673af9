"""A run remembers that the machine to which it was pinned was deleted.

The version before goes on running: where it deletes a machine, the runs that were pinned to it may go anywhere.

Revision ID: 0024
Revises: 0023
"""

from alembic import op

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN pin_is_deleted boolean NOT NULL DEFAULT false")


def downgrade() -> None:
    op.execute("ALTER TABLE runs DROP COLUMN pin_is_deleted")
