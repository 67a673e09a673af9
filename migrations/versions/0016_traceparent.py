"""The trace that an attempt belongs to. The version before goes on running: it leaves the column as it is.

Revision ID: 0016
Revises: 0015
"""

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN traceparent text")


def downgrade() -> None:
    op.execute("ALTER TABLE runs DROP COLUMN traceparent")
