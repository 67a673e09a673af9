"""What attempts produce moves from runs to a table of its own. Stop the replicas for this one: the version before reads
and writes the columns that go.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
incompatible = True  # replicas that lack it refuse to serve (migrations/env.py)

UP = [
    """
    CREATE TABLE run_outputs (
        run_id uuid CONSTRAINT fk_run_outputs_run_id REFERENCES runs ON DELETE CASCADE,
        attempt integer,
        output_data json,
        run_message_history json,
        is_superseded boolean NOT NULL DEFAULT false,
        CONSTRAINT pk_run_outputs PRIMARY KEY (run_id, attempt)
    )
    """,
    "CREATE INDEX ix_run_outputs_superseded ON run_outputs (run_id) WHERE is_superseded",
    """
    INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history)
    SELECT id, attempt, output_data, run_message_history FROM runs
    WHERE output_data IS NOT NULL OR run_message_history IS NOT NULL
    """,
    """
    ALTER TABLE runs
        DROP CONSTRAINT ck_runs_scheduling_is_clear,
        DROP COLUMN output_data,
        DROP COLUMN run_message_history,
        ADD CONSTRAINT ck_runs_scheduling_is_clear CHECK (
            status <> 'scheduling' OR (error IS NULL AND started_at IS NULL AND ended_at IS NULL))
    """,
    "ALTER TABLE idempotency_keys DROP CONSTRAINT ck_idempotency_keys_key",
]

DOWN = [
    """
    ALTER TABLE runs
        DROP CONSTRAINT ck_runs_scheduling_is_clear,
        ADD COLUMN output_data json,
        ADD COLUMN run_message_history json
    """,
    """
    UPDATE runs SET output_data = o.output_data, run_message_history = o.run_message_history
    FROM run_outputs o WHERE o.run_id = runs.id AND o.attempt = runs.attempt
    """,
    """
    ALTER TABLE runs ADD CONSTRAINT ck_runs_scheduling_is_clear CHECK (
        status <> 'scheduling' OR (error IS NULL AND output_data IS NULL AND run_message_history IS NULL
                                   AND started_at IS NULL AND ended_at IS NULL))
    """,
    "DROP TABLE run_outputs",
    "ALTER TABLE idempotency_keys ADD CONSTRAINT ck_idempotency_keys_key CHECK (key ~ '^[!-~]{1,255}$')",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
