"""The look-around of placement is one round for all replicas. The version before may go on running: it looks around by itself.

Revision ID: 0009
Revises: 0008
"""

from alembic import op

revision = "0009"
down_revision = "0008"

TABLE = """
CREATE TABLE shared_rounds (
    name text CONSTRAINT pk_shared_rounds PRIMARY KEY,
    began_at timestamptz NOT NULL DEFAULT '-infinity',
    position text[],
    slices integer NOT NULL DEFAULT 0
)
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("DROP TABLE shared_rounds")
