"""Events and archived attempts say whether a request, a bulk retry or a policy asked for the retry.

The version before goes on running: it leaves the columns null, which means a request.

Revision ID: 0020
Revises: 0019
"""

from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.execute("ALTER TABLE run_events ADD COLUMN by text, ADD COLUMN bulk_retry_id uuid")
    op.execute("ALTER TABLE run_attempts ADD COLUMN retried_by text, ADD COLUMN bulk_retry_id uuid")


def downgrade() -> None:
    op.execute("ALTER TABLE run_attempts DROP COLUMN bulk_retry_id, DROP COLUMN retried_by")
    op.execute("ALTER TABLE run_events DROP COLUMN bulk_retry_id, DROP COLUMN by")
