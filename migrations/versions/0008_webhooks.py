"""Webhooks: endpoints with their signing secrets, the outbox of events, and deliveries. The version before may go on running.

Revision ID: 0008
Revises: 0007
"""

from alembic import op

revision = "0008"
down_revision = "0007"

UP = [
    """
    CREATE TABLE webhook_endpoints (
        id uuid CONSTRAINT pk_webhook_endpoints PRIMARY KEY,
        organization_id text NOT NULL,
        user_id uuid,
        url text NOT NULL,
        description text,
        event_types text[] NOT NULL,
        disabled_at timestamptz,
        disabled_reason text,
        failing_since timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT ck_webhook_endpoints_organization_id CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_webhook_endpoints_disabled CHECK ((disabled_at IS NULL) = (disabled_reason IS NULL)),
        CONSTRAINT ck_webhook_endpoints_disabled_reason CHECK (disabled_reason IN ('requested', 'gone', 'failing'))
    )
    """,
    "CREATE INDEX ix_webhook_endpoints_organization ON webhook_endpoints (organization_id, created_at DESC, id DESC)",
    """
    CREATE TABLE webhook_secrets (
        path text CONSTRAINT pk_webhook_secrets PRIMARY KEY,
        endpoint_id uuid NOT NULL
            CONSTRAINT fk_webhook_secrets_endpoint_id REFERENCES webhook_endpoints ON DELETE RESTRICT,
        created_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz
    )
    """,
    "CREATE INDEX ix_webhook_secrets_endpoint_id ON webhook_secrets (endpoint_id)",
    "CREATE UNIQUE INDEX uq_webhook_secrets_current ON webhook_secrets (endpoint_id) WHERE expires_at IS NULL",
    # A quarter of a megabyte of JSON costs more to compress, in the transaction that ends a run, than to write.
    """
    CREATE TABLE webhook_events (
        id uuid CONSTRAINT pk_webhook_events PRIMARY KEY,
        organization_id text NOT NULL,
        run_id uuid,
        attempt integer,
        event_type text NOT NULL,
        occurred_at timestamptz NOT NULL,
        body bytea STORAGE EXTERNAL,
        is_fanned_out boolean NOT NULL DEFAULT false
    )
    """,
    "CREATE UNIQUE INDEX uq_webhook_events_run_attempt ON webhook_events (run_id, attempt)",
    "CREATE INDEX ix_webhook_events_new ON webhook_events (occurred_at) WHERE NOT is_fanned_out",
    "CREATE INDEX ix_webhook_events_organization ON webhook_events (organization_id, occurred_at, id)",
    "CREATE INDEX ix_webhook_events_occurred_at ON webhook_events (occurred_at)",
    """
    CREATE TABLE webhook_deliveries (
        id uuid CONSTRAINT pk_webhook_deliveries PRIMARY KEY,
        event_id uuid NOT NULL
            CONSTRAINT fk_webhook_deliveries_event_id REFERENCES webhook_events ON DELETE CASCADE,
        endpoint_id uuid NOT NULL,
        organization_id text NOT NULL,
        status text NOT NULL DEFAULT 'pending',
        tries smallint NOT NULL DEFAULT 0,
        due_at timestamptz NOT NULL DEFAULT now(),
        lease uuid,
        created_at timestamptz NOT NULL DEFAULT now(),
        tried_at timestamptz,
        duration_ms integer,
        response_status smallint,
        response_body text,
        error text,
        CONSTRAINT ck_webhook_deliveries_status CHECK (status IN ('pending', 'delivered', 'failed'))
    )
    """,
    "CREATE UNIQUE INDEX uq_webhook_deliveries_event_endpoint ON webhook_deliveries (event_id, endpoint_id)",
    "CREATE INDEX ix_webhook_deliveries_pending ON webhook_deliveries (endpoint_id, due_at) WHERE status = 'pending'",
    "CREATE INDEX ix_webhook_deliveries_endpoint ON webhook_deliveries (endpoint_id, created_at DESC, id DESC)",
    """
    CREATE TABLE webhook_recoveries (
        endpoint_id uuid CONSTRAINT pk_webhook_recoveries PRIMARY KEY
            CONSTRAINT fk_webhook_recoveries_endpoint_id REFERENCES webhook_endpoints ON DELETE CASCADE,
        organization_id text NOT NULL,
        after_at timestamptz NOT NULL,
        after_id uuid NOT NULL,
        until timestamptz NOT NULL,
        moved_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX ix_webhook_recoveries_moved_at ON webhook_recoveries (moved_at)",
]

# Signing secrets that are in use stay in Vault: list them for deletion, as everything that nothing names any more.
DOWN = [
    """
    INSERT INTO deletions (store, name, due_at) SELECT 'vault', path, now() FROM webhook_secrets
    ON CONFLICT (store, name) DO UPDATE SET due_at = least(deletions.due_at, excluded.due_at)
    """,
    "DROP TABLE webhook_recoveries, webhook_deliveries, webhook_events, webhook_secrets, webhook_endpoints",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
