"""What Temporal is to be told. The version before may go on running: the runs that it places are handed over by the sweep.

Revision ID: 0015
Revises: 0014
"""

from alembic import op

revision = "0015"
down_revision = "0014"

UP = [
    """
    CREATE TABLE dispatches (
        run_id uuid NOT NULL,
        assignment integer NOT NULL,
        kind text NOT NULL,
        attempt integer NOT NULL,
        machine_id uuid NOT NULL,
        organization_id text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        due_at timestamptz NOT NULL DEFAULT now(),
        failures smallint NOT NULL DEFAULT 0,
        CONSTRAINT pk_dispatches PRIMARY KEY (run_id, assignment, kind),
        CONSTRAINT ck_dispatches_kind CHECK (kind IN ('start', 'cancel'))
    )
    """,
    "CREATE INDEX ix_dispatches_due_at ON dispatches (due_at)",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE dispatches")
