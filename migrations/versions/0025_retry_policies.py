"""Retry policies of workflows, and the retries that they have planned. The version before may go on running: what it ends is
not retried by a policy, and what it retries keeps its count.

The index comes before the primary key, as in 0019.

Revision ID: 0025
Revises: 0024
"""

from alembic import op

revision = "0025"
down_revision = "0024"

UP = [
    "ALTER TABLE workflows ADD COLUMN retry_policy json",
    "ALTER TABLE runs ADD COLUMN automatic_retries smallint DEFAULT 0",
    "ALTER TABLE run_events ADD COLUMN code text",
    """
    CREATE TABLE planned_retries (
        run_id uuid NOT NULL CONSTRAINT fk_planned_retries_run_id REFERENCES runs ON DELETE CASCADE,
        attempt integer NOT NULL,
        organization_id text NOT NULL,
        due_at timestamptz NOT NULL,
        look_at timestamptz NOT NULL,
        rule smallint NOT NULL,
        avoids_last_machine boolean NOT NULL,
        owes_event boolean NOT NULL
    )
    """,
    "CREATE INDEX ix_planned_retries_look_at ON planned_retries (look_at)",
    "ALTER TABLE planned_retries ADD CONSTRAINT pk_planned_retries PRIMARY KEY (run_id, attempt)",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE planned_retries")
    op.execute("ALTER TABLE run_events DROP COLUMN code")
    op.execute("ALTER TABLE runs DROP COLUMN automatic_retries")
    op.execute("ALTER TABLE workflows DROP COLUMN retry_policy")
