"""Events of runs, and the reason of a retry. The version before goes on running: what it does leaves no event.

The service adds and reads events; old ones go by age, through a function that runs as its owner.

Revision ID: 0006
Revises: 0005
"""

from alembic import op

revision = "0006"
down_revision = "0005"

UP = [
    """
    CREATE TABLE run_events (
        organization_id text NOT NULL,
        xact bigint NOT NULL DEFAULT (pg_current_xact_id()::text)::bigint,
        id bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        run_id uuid NOT NULL,
        attempt integer NOT NULL,
        event text NOT NULL,
        from_status text,
        to_status text,
        key_id uuid,
        user_id uuid,
        request_id text,
        reason text,
        changed text[] NOT NULL,
        CONSTRAINT pk_run_events PRIMARY KEY (organization_id, xact, id)
    )
    """,
    "CREATE INDEX ix_run_events_run ON run_events (run_id)",
    "CREATE INDEX ix_run_events_at ON run_events USING brin (at)",
    """
    CREATE FUNCTION prune_run_events(days integer, most integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        pruned integer;
    BEGIN
        DELETE FROM run_events WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM run_events WHERE days > 0 AND at < now() - make_interval(days => days)
            LIMIT most FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS pruned = ROW_COUNT;
        RETURN pruned;
    END
    $$
    """,
    "REVOKE ALL ON FUNCTION prune_run_events FROM PUBLIC",
    "ALTER TABLE run_attempts ADD COLUMN reason text",
]

DOWN = [
    "ALTER TABLE run_attempts DROP COLUMN reason",
    "DROP FUNCTION prune_run_events",
    "DROP TABLE run_events",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
