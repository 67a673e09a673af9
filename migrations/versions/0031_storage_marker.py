"""The id of the file store that this database's files are in. The store holds the same id, in a file of its own.

The version before knows nothing of it and goes on running.

Revision ID: 0031
Revises: 0030
"""

from alembic import op

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE storage_marker (
            is_only boolean NOT NULL DEFAULT true,
            store_id uuid NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pk_storage_marker PRIMARY KEY (is_only),
            CONSTRAINT ck_storage_marker_is_only CHECK (is_only)
        )
        """
    )


def downgrade() -> None:
    op.execute("DROP TABLE storage_marker")
