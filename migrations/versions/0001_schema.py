"""The first schema. Written as SQL: what is read here is what runs."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = [
    """
    CREATE TABLE api_keys (
        id uuid CONSTRAINT pk_api_keys PRIMARY KEY,
        organization_id text NOT NULL CONSTRAINT ck_api_keys_organization_id CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        user_id uuid,
        name text,
        key_hash bytea NOT NULL CONSTRAINT ck_api_keys_key_hash CHECK (length(key_hash) = 32),
        created_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz,
        revoked_at timestamptz,
        CONSTRAINT uq_api_keys_key_hash UNIQUE (key_hash)
    )
    """,
    """
    CREATE TABLE workflows (
        id uuid CONSTRAINT pk_workflows PRIMARY KEY,
        organization_id text NOT NULL CONSTRAINT ck_workflows_organization_id CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        user_id uuid,
        name text,
        main_prompt text NOT NULL,
        input_schema text,
        output_schema text,
        includes_file_exports boolean NOT NULL DEFAULT false,
        is_webhooks_enabled boolean NOT NULL DEFAULT false,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX ix_workflows_organization ON workflows (organization_id, created_at DESC, id DESC)",
    """
    CREATE TABLE machines (
        id uuid CONSTRAINT pk_machines PRIMARY KEY,
        organization_id text NOT NULL CONSTRAINT ck_machines_organization_id CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        user_id uuid,
        fingerprint text NOT NULL,
        unkey_key_id text NOT NULL,
        name text,
        version text,
        hostname text,
        os_info text,
        status text NOT NULL DEFAULT 'connected'
            CONSTRAINT ck_machines_status CHECK (status IN ('connected', 'disconnected', 'error')),
        is_available boolean NOT NULL DEFAULT true,
        alerts_enabled boolean NOT NULL DEFAULT true,
        reserved_session_id uuid,
        last_seen timestamptz NOT NULL DEFAULT now(),
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX ix_machines_organization ON machines (organization_id, created_at DESC, id DESC)",
    """
    CREATE UNIQUE INDEX uq_machines_reserved_session_id ON machines (reserved_session_id)
        WHERE reserved_session_id IS NOT NULL
    """,
    """
    CREATE TABLE pools (
        id uuid CONSTRAINT pk_pools PRIMARY KEY,
        organization_id text NOT NULL CONSTRAINT ck_pools_organization_id CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
        name text NOT NULL,
        description text,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX ix_pools_organization ON pools (organization_id, created_at DESC, id DESC)",
    """
    CREATE TABLE pool_machines (
        pool_id uuid CONSTRAINT fk_pool_machines_pool_id REFERENCES pools ON DELETE CASCADE,
        machine_id uuid CONSTRAINT fk_pool_machines_machine_id REFERENCES machines ON DELETE CASCADE,
        CONSTRAINT pk_pool_machines PRIMARY KEY (pool_id, machine_id)
    )
    """,
    "CREATE INDEX ix_pool_machines_machine_id ON pool_machines (machine_id)",
    # Rows that name a secret or a blob are protected by RESTRICT: a cascade would lose the names.
    """
    CREATE TABLE runs (
        id uuid CONSTRAINT pk_runs PRIMARY KEY,
        organization_id text NOT NULL,
        workflow_id uuid NOT NULL CONSTRAINT fk_runs_workflow_id REFERENCES workflows ON DELETE RESTRICT,
        user_id uuid,
        status text NOT NULL
            CONSTRAINT ck_runs_status CHECK (status IN ('scheduling', 'running', 'success', 'cancelled', 'error')),
        is_priority boolean NOT NULL DEFAULT false,
        attempt integer NOT NULL DEFAULT 1 CONSTRAINT ck_runs_attempt CHECK (attempt >= 1),
        pinned_machine_id uuid CONSTRAINT fk_runs_pinned_machine_id REFERENCES machines ON DELETE SET NULL,
        assigned_machine_id uuid CONSTRAINT fk_runs_assigned_machine_id REFERENCES machines ON DELETE SET NULL,
        pool_ids uuid[],
        input_values json,
        sensitive_input_aliases json,
        secret_path text,
        session_id uuid,
        session_alias text,
        release_session_after boolean,
        error text[],
        output_data json,
        run_message_history json,
        lane text COLLATE "C" NOT NULL,
        queue_rank smallint NOT NULL DEFAULT 1,
        created_at timestamptz NOT NULL DEFAULT now(),
        queued_at timestamptz NOT NULL DEFAULT now(),
        started_at timestamptz,
        ended_at timestamptz,
        reported_at timestamptz,
        CONSTRAINT ck_runs_scheduling_is_clear CHECK (
            status <> 'scheduling' OR (error IS NULL AND output_data IS NULL AND run_message_history IS NULL
                                       AND started_at IS NULL AND ended_at IS NULL)),
        CONSTRAINT ck_runs_running_has_started CHECK (status <> 'running' OR started_at IS NOT NULL),
        CONSTRAINT ck_runs_terminal_has_ended CHECK (status IN ('scheduling', 'running') OR ended_at IS NOT NULL),
        CONSTRAINT ck_runs_alias_has_session CHECK (session_alias IS NULL OR session_id IS NOT NULL),
        CONSTRAINT ck_runs_secret_has_aliases CHECK (secret_path IS NULL OR sensitive_input_aliases IS NOT NULL)
    )
    """,
    "CREATE INDEX ix_runs_organization ON runs (organization_id, created_at DESC, id DESC)",
    "CREATE INDEX ix_runs_workflow ON runs (workflow_id, organization_id, created_at DESC, id DESC)",
    "CREATE INDEX ix_runs_status ON runs (organization_id, status, created_at DESC, id DESC)",
    """
    CREATE INDEX ix_runs_assigned_machine ON runs (assigned_machine_id, created_at DESC, id DESC)
        WHERE assigned_machine_id IS NOT NULL
    """,
    """
    CREATE INDEX ix_runs_pinned_machine ON runs (pinned_machine_id, created_at DESC, id DESC)
        WHERE pinned_machine_id IS NOT NULL
    """,
    """
    CREATE INDEX ix_runs_session ON runs (session_id, organization_id, created_at DESC, id DESC)
        WHERE session_id IS NOT NULL
    """,
    """
    CREATE INDEX ix_runs_waiting ON runs (organization_id, lane, queue_rank, queued_at, id)
        WHERE status = 'scheduling' AND assigned_machine_id IS NULL
    """,
    """
    CREATE UNIQUE INDEX uq_runs_active_machine ON runs (assigned_machine_id)
        WHERE assigned_machine_id IS NOT NULL AND status IN ('scheduling', 'running')
    """,
    """
    CREATE INDEX ix_runs_active_session ON runs (session_id)
        WHERE session_id IS NOT NULL AND status IN ('scheduling', 'running')
    """,
    "CREATE INDEX ix_runs_reported ON runs (reported_at) WHERE status = 'running'",
    """
    CREATE TABLE run_attempts (
        run_id uuid CONSTRAINT fk_run_attempts_run_id REFERENCES runs ON DELETE CASCADE,
        attempt integer,
        status text NOT NULL CONSTRAINT ck_run_attempts_status CHECK (status IN ('success', 'cancelled', 'error')),
        error text[],
        machine_id uuid,
        session_id uuid,
        started_at timestamptz,
        ended_at timestamptz,
        retried_at timestamptz NOT NULL DEFAULT now(),
        retried_by_key_id uuid,
        retried_by_user_id uuid,
        overridden text[] NOT NULL,
        CONSTRAINT pk_run_attempts PRIMARY KEY (run_id, attempt)
    )
    """,
    """
    CREATE TABLE run_attachments (
        id uuid CONSTRAINT pk_run_attachments PRIMARY KEY,
        organization_id text NOT NULL,
        run_id uuid NOT NULL CONSTRAINT fk_run_attachments_run_id REFERENCES runs ON DELETE RESTRICT,
        user_id uuid,
        attachment_type text NOT NULL
            CONSTRAINT ck_run_attachments_attachment_type CHECK (attachment_type IN ('input', 'output')),
        filename text NOT NULL,
        content_type text NOT NULL,
        size_bytes bigint NOT NULL CONSTRAINT ck_run_attachments_size_bytes CHECK (size_bytes >= 0),
        storage_path text,
        target_path text,
        cleanup_imports_after_run boolean NOT NULL DEFAULT false,
        created_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz,
        CONSTRAINT uq_run_attachments_storage_path UNIQUE (storage_path),
        CONSTRAINT ck_run_attachments_storage_path CHECK (storage_path IS NOT NULL OR attachment_type = 'input')
    )
    """,
    "CREATE INDEX ix_run_attachments_run ON run_attachments (run_id, attachment_type)",
    "CREATE INDEX ix_run_attachments_organization ON run_attachments (organization_id, created_at DESC, id DESC)",
    """
    CREATE INDEX ix_run_attachments_expiry ON run_attachments (expires_at)
        WHERE expires_at IS NOT NULL AND storage_path IS NOT NULL
    """,
    """
    CREATE TABLE deletions (
        store text CONSTRAINT ck_deletions_store CHECK (store IN ('vault', 'storage')),
        name text,
        due_at timestamptz NOT NULL,
        condemned_at timestamptz,
        sweeps smallint NOT NULL DEFAULT 1 CONSTRAINT ck_deletions_sweeps CHECK (sweeps BETWEEN 1 AND 2),
        failures smallint NOT NULL DEFAULT 0,
        CONSTRAINT pk_deletions PRIMARY KEY (store, name)
    )
    """,
    "CREATE INDEX ix_deletions_due_at ON deletions (due_at)",
    """
    CREATE TABLE idempotency_keys (
        organization_id text,
        key text CONSTRAINT ck_idempotency_keys_key CHECK (key ~ '^[!-~]{1,255}$'),
        fingerprint bytea NOT NULL,
        status smallint NOT NULL,
        body bytea NOT NULL,
        expires_at timestamptz NOT NULL,
        CONSTRAINT pk_idempotency_keys PRIMARY KEY (organization_id, key)
    )
    """,
    "CREATE INDEX ix_idempotency_keys_expires_at ON idempotency_keys (expires_at)",
]


def upgrade() -> None:
    for statement in TABLES:
        op.execute(statement)


def downgrade() -> None:
    op.execute(
        "DROP TABLE idempotency_keys, deletions, run_attachments, run_attempts, runs,"
        " pool_machines, pools, machines, workflows, api_keys"
    )
