"""What stays of an attempt: its usage, and with ATTEMPT_OUTPUTS=all its outputs and files; and the versions of workflows.

The version before goes on running. What it retries keeps nothing, and a run that it starts has no workflow_version of its own:
it shows none, or that of an earlier attempt. A workflow that it changes keeps its version. It also shows files of earlier
attempts as files of the run, and removes them with a retry. So set ATTEMPT_OUTPUTS=all only when all replicas are of this
version.

Revision ID: 0030
Revises: 0029
"""

from alembic import op

revision = "0030"
down_revision = "0029"

# An attempt that goes by age takes its outputs and files along. The outputs are only marked: a loop removes them in batches.
PRUNE = """
    CREATE OR REPLACE FUNCTION prune_run_attempts(days integer, most integer) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        pruned integer;
    BEGIN
        WITH old AS (
            DELETE FROM run_attempts WHERE ctid = ANY (ARRAY(
                SELECT ctid FROM run_attempts WHERE days > 0 AND retried_at < now() - make_interval(days => days)
                LIMIT most FOR UPDATE SKIP LOCKED))
            RETURNING run_id, attempt
        ), outputs AS (
            UPDATE run_outputs SET is_superseded = true, usage_metadata = NULL WHERE ctid = ANY (ARRAY(
                SELECT one.tid FROM old, LATERAL (
                    SELECT ctid AS tid, usage_metadata, is_superseded FROM run_outputs
                    WHERE run_id = old.run_id AND attempt = old.attempt OFFSET 0 FOR UPDATE
                ) AS one
                WHERE usage_metadata IS NOT NULL OR NOT is_superseded))
        ), files AS (
            DELETE FROM run_attachments WHERE ctid = ANY (ARRAY(
                SELECT one.tid FROM old, LATERAL (
                    SELECT ctid AS tid FROM run_attachments
                    WHERE run_id = old.run_id AND attachment_type = 'output' AND attempt = old.attempt OFFSET 0 FOR UPDATE
                ) AS one))
            RETURNING storage_path
        ), listed AS (
            INSERT INTO deletions (store, name, due_at)
            SELECT 'storage', storage_path, now() FROM files WHERE storage_path IS NOT NULL
        )
        SELECT count(*) INTO pruned FROM old;
        RETURN pruned;
    END
    $$
"""
PRUNE_BEFORE = """
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
"""

UP = [
    "ALTER TABLE workflows ADD COLUMN version integer NOT NULL DEFAULT 1",
    """
    CREATE TABLE workflow_versions (
        workflow_id uuid NOT NULL CONSTRAINT fk_workflow_versions_workflow_id REFERENCES workflows ON DELETE CASCADE,
        version integer NOT NULL,
        name text,
        main_prompt text NOT NULL,
        input_schema text,
        output_schema text,
        replaced_at timestamptz NOT NULL DEFAULT now(),
        replaced_by_key_id uuid,
        replaced_by_user_id uuid,
        CONSTRAINT pk_workflow_versions PRIMARY KEY (workflow_id, version)
    )
    """,
    "ALTER TABLE runs ADD COLUMN workflow_version integer",
    """
    ALTER TABLE run_attempts ADD COLUMN workflow_version integer,
                             ADD COLUMN outputs_are_kept boolean NOT NULL DEFAULT false
    """,
    "ALTER TABLE run_attachments ADD COLUMN attempt integer",
    PRUNE,
]

DOWN = [
    # What was kept of earlier attempts goes, its bytes by the deletion list.
    """
    WITH files AS (DELETE FROM run_attachments WHERE attempt IS NOT NULL RETURNING storage_path)
    INSERT INTO deletions (store, name, due_at)
    SELECT 'storage', storage_path, now() FROM files WHERE storage_path IS NOT NULL
    """,
    """
    UPDATE run_outputs SET is_superseded = true FROM runs
    WHERE runs.id = run_outputs.run_id AND run_outputs.attempt < runs.attempt AND NOT is_superseded
    """,
    PRUNE_BEFORE,
    "ALTER TABLE run_attachments DROP COLUMN attempt",
    "ALTER TABLE run_attempts DROP COLUMN outputs_are_kept, DROP COLUMN workflow_version",
    "ALTER TABLE runs DROP COLUMN workflow_version",
    "DROP TABLE workflow_versions",
    "ALTER TABLE workflows DROP COLUMN version",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
