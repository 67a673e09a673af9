"""Bulk retries: jobs and their items. The version before may go on running.

Indexes are made the widest first and the primary key last, as in 0019.

Revision ID: 0023
Revises: 0022
"""

from alembic import op

revision = "0023"
down_revision = "0022"

UP = [
    """
    CREATE TABLE bulk_retries (
        id uuid NOT NULL,
        organization_id text NOT NULL,
        key_id uuid NOT NULL,
        user_id uuid,
        request_id text,
        traceparent text,
        state text NOT NULL DEFAULT 'running',
        pause_reason text,
        waiting_for text,
        failure text,
        reason text,
        filter json,
        overrides json NOT NULL,
        pace_per_second double precision,
        first integer NOT NULL DEFAULT 0,
        is_first_over boolean NOT NULL DEFAULT false,
        stop_after_failures integer NOT NULL DEFAULT 0,
        failures_forgiven integer NOT NULL DEFAULT 0,
        total integer NOT NULL,
        retried integer NOT NULL DEFAULT 0,
        skipped integer NOT NULL DEFAULT 0,
        created_at timestamptz NOT NULL DEFAULT now(),
        due_at timestamptz NOT NULL DEFAULT now(),
        moved_at timestamptz NOT NULL DEFAULT now(),
        ended_at timestamptz,
        CONSTRAINT ck_bulk_retries_organization_id CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_bulk_retries_state CHECK (state IN ('running', 'paused', 'completed', 'aborted', 'failed')),
        CONSTRAINT ck_bulk_retries_paused CHECK ((state = 'paused') = (pause_reason IS NOT NULL)),
        CONSTRAINT ck_bulk_retries_ended CHECK ((state IN ('running', 'paused')) = (ended_at IS NULL))
    )
    """,
    "CREATE INDEX ix_bulk_retries_organization ON bulk_retries (organization_id, created_at DESC, id DESC)",
    "CREATE INDEX ix_bulk_retries_under_way ON bulk_retries (organization_id) WHERE state IN ('running', 'paused')",
    "CREATE INDEX ix_bulk_retries_due_at ON bulk_retries (due_at) WHERE state = 'running'",
    "CREATE INDEX ix_bulk_retries_ended_at ON bulk_retries (ended_at) WHERE ended_at IS NOT NULL",
    "ALTER TABLE bulk_retries ADD CONSTRAINT pk_bulk_retries PRIMARY KEY (id)",
    """
    CREATE TABLE bulk_retry_items (
        bulk_retry_id uuid NOT NULL
            CONSTRAINT fk_bulk_retry_items_bulk_retry_id REFERENCES bulk_retries ON DELETE CASCADE,
        place integer NOT NULL,
        run_id uuid NOT NULL,
        attempt integer,
        outcome text NOT NULL DEFAULT 'pending',
        code text,
        detail text,
        decided_at timestamptz,
        CONSTRAINT ck_bulk_retry_items_outcome CHECK (outcome IN ('pending', 'retried', 'skipped')),
        CONSTRAINT ck_bulk_retry_items_code CHECK ((outcome = 'skipped') = (code IS NOT NULL))
    )
    """,
    "CREATE INDEX ix_bulk_retry_items_outcome ON bulk_retry_items (bulk_retry_id, outcome, place)",
    "ALTER TABLE bulk_retry_items ADD CONSTRAINT pk_bulk_retry_items PRIMARY KEY (bulk_retry_id, place)",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE bulk_retry_items, bulk_retries")
