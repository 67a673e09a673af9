"""When a run was created, retried, started or ended last, by the database's clock; and an index that has the order of it.

The version before may go on running. It does not know the column: a new row gets the default, and for a change of the status a
trigger sets it. The trigger's function runs only for statements that leave the column as it is, so this version never calls it.
The version before looks for old runs by `ended_at`, now without an index.

Rows that exist get an estimate: the reported end, but not before the last time that the database's clock gave the run, and not
after now. Rows are filled in batches and the index is built without keeping anybody from writing.

Revision ID: 0021
Revises: 0020
"""

from alembic import op
from sqlalchemy import text

revision = "0021"
down_revision = "0020"

# Once more after an interruption: what comes before the batches is committed then.
COLUMN = [
    "ALTER TABLE runs ADD COLUMN IF NOT EXISTS changed_at timestamptz",
    "ALTER TABLE runs ALTER COLUMN changed_at SET DEFAULT clock_timestamp()",
    """
    CREATE OR REPLACE FUNCTION set_changed_at() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.changed_at := clock_timestamp();
        RETURN NEW;
    END
    $$
    """,
    "REVOKE ALL ON FUNCTION set_changed_at FROM PUBLIC",
    """
    CREATE OR REPLACE TRIGGER set_changed_at BEFORE UPDATE OF status ON runs FOR EACH ROW
        WHEN (NEW.status <> OLD.status AND NEW.changed_at IS NOT DISTINCT FROM OLD.changed_at)
        EXECUTE FUNCTION set_changed_at()
    """,
]

BATCH = 1000
FILL = f"""
WITH page AS MATERIALIZED (
    SELECT id FROM runs WHERE id > :after ORDER BY id LIMIT {BATCH}
), filled AS (
    UPDATE runs SET changed_at = least(now(), CASE status
        WHEN 'scheduling' THEN queued_at
        WHEN 'running' THEN greatest(queued_at, started_at)
        ELSE greatest(queued_at, reported_at, ended_at) END)
    WHERE id IN (SELECT id FROM page) AND changed_at IS NULL
)
SELECT id FROM page ORDER BY id DESC LIMIT 1
"""

# A constraint that is validated apart needs no lock that keeps writers out while all rows are read.
NOT_NULL = [
    "ALTER TABLE runs DROP CONSTRAINT IF EXISTS ck_runs_changed_at",
    "ALTER TABLE runs ADD CONSTRAINT ck_runs_changed_at CHECK (changed_at IS NOT NULL) NOT VALID",
    "ALTER TABLE runs VALIDATE CONSTRAINT ck_runs_changed_at",
    "ALTER TABLE runs ALTER COLUMN changed_at SET NOT NULL",
    "ALTER TABLE runs DROP CONSTRAINT ck_runs_changed_at",
]

# Its status has a collation of its own, as that of ix_runs_status has ("C", the same order): so a condition says which of the
# two serves it. Dropped first: one that was interrupted stays behind, and is no index.
INDEX = [
    "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_changed",
    'CREATE INDEX CONCURRENTLY ix_runs_changed ON runs (organization_id, status COLLATE "POSIX", changed_at, id)',
    "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_ended",
]

# 0019 says why: while the table is short, the new index must not be the one that was made last.
MADE_AFTER = (
    "ix_runs_workflow",
    "ix_runs_session",
    "ix_runs_pinned_machine",
    "ix_runs_assigned_machine",
    "ix_runs_active_session",
    "ix_runs_session_at_work",
    "uq_runs_active_machine",
    "pk_runs",
)
LONG = 8 * 1024 * 1024  # bytes of the table


def upgrade() -> None:
    for statement in COLUMN:
        op.execute(statement)
    with op.get_context().autocommit_block():
        after: object = "00000000-0000-0000-0000-000000000000"
        while after is not None:
            after = op.get_bind().execute(text(FILL), {"after": after}).scalar()
        for statement in [*NOT_NULL, *INDEX]:
            op.execute(statement)
        for index in MADE_AFTER:
            for left in ("ccnew", "ccold"):
                op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {index}_{left}")
            if op.get_bind().execute(text(f"SELECT pg_relation_size('runs') < {LONG}")).scalar_one():
                op.execute(f"REINDEX INDEX CONCURRENTLY {index}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_runs_ended")
        op.execute(
            "CREATE INDEX CONCURRENTLY ix_runs_ended ON runs (ended_at) WHERE status IN ('success', 'error', 'cancelled')"
        )
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ix_runs_changed")
        op.execute("DROP TRIGGER IF EXISTS set_changed_at ON runs")
        op.execute("DROP FUNCTION IF EXISTS set_changed_at")
        op.execute("ALTER TABLE runs DROP COLUMN IF EXISTS changed_at")
