"""Which key created a run or retried it last: a quota on waiting runs is also for a key.

Revision ID: 0014
Revises: 0013
"""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN queued_by_key_id uuid")


def downgrade() -> None:
    op.execute("ALTER TABLE runs DROP COLUMN queued_by_key_id")
