"""Of a long reply under an Idempotency-Key only the ids are stored; what an organization has stored is counted.

The version before may go on running, but when it replays a reply of which only the ids are stored, it sends an empty one.

Revision ID: 0013
Revises: 0012
"""

from alembic import op

revision = "0013"
down_revision = "0012"

UP = [
    "ALTER TABLE idempotency_keys ADD COLUMN ids uuid[]",
    """
    CREATE TABLE stored_replies (
        organization_id text NOT NULL,
        until timestamptz NOT NULL,
        bytes bigint NOT NULL,
        CONSTRAINT pk_stored_replies PRIMARY KEY (organization_id, until)
    )
    """,
    "CREATE INDEX ix_stored_replies_until ON stored_replies (until)",
]

DOWN = [
    "DROP TABLE stored_replies",
    # What the version before could not replay.
    "DELETE FROM idempotency_keys WHERE body = '' AND status <> 204",
    "ALTER TABLE idempotency_keys DROP COLUMN ids",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
