"""Ended runs and archived attempts can go by age. The version before may go on running.

The indexes are built without keeping anybody from writing.

Revision ID: 0018
Revises: 0017
"""

from alembic import op

revision = "0018"
down_revision = "0017"

FUNCTION = [
    """
    CREATE OR REPLACE FUNCTION prune_run_attempts(days integer, most integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        pruned integer;
    BEGIN
        DELETE FROM run_attempts WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM run_attempts WHERE days > 0 AND retried_at < now() - make_interval(days => days)
            LIMIT most FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS pruned = ROW_COUNT;
        RETURN pruned;
    END
    $$
    """,
    "REVOKE ALL ON FUNCTION prune_run_attempts FROM PUBLIC",
]

# Dropped first: one that was interrupted stays behind, and is no index.
INDEXES = [
    "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_ended",
    "CREATE INDEX CONCURRENTLY ix_runs_ended ON runs (ended_at) WHERE status IN ('success', 'error', 'cancelled')",
    "DROP INDEX CONCURRENTLY IF EXISTS ix_run_attempts_retried_at",
    "CREATE INDEX CONCURRENTLY ix_run_attempts_retried_at ON run_attempts USING brin (retried_at)",
]


def upgrade() -> None:
    for statement in FUNCTION:
        op.execute(statement)
    with op.get_context().autocommit_block():
        for statement in INDEXES:
            op.execute(statement)


def downgrade() -> None:
    op.execute("DROP FUNCTION prune_run_attempts")
    op.execute("DROP INDEX ix_run_attempts_retried_at")
    op.execute("DROP INDEX ix_runs_ended")
