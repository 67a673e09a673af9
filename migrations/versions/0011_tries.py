"""The log of a webhook's delivery keeps each of its last tries, not only what became of the last one. The version before may go
on running: what it sends is not in that log.

Revision ID: 0011
Revises: 0010
"""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute("ALTER TABLE webhook_deliveries ADD COLUMN last_tries jsonb NOT NULL DEFAULT '[]'")


def downgrade() -> None:
    op.execute("ALTER TABLE webhook_deliveries DROP COLUMN last_tries")
