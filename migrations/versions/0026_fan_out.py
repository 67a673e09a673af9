"""Events are fanned out in turns of their organizations: an index that goes from one organization to the next.

The version before goes on running; it fans out the oldest first, by the index that it has. Nobody is kept from writing.

Revision ID: 0026
Revises: 0025
"""

from alembic import op

revision = "0026"
down_revision = "0025"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_webhook_events_turns")  # one that was interrupted stays behind
        op.execute(
            "CREATE INDEX CONCURRENTLY ix_webhook_events_turns ON webhook_events (organization_id, occurred_at)"
            " WHERE NOT is_fanned_out"
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_webhook_events_turns")
