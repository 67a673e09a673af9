"""Outputs, history and usage of runs: rows of their own, by run and attempt, so that a retry leaves them behind for nothing.

Only the report writes them, and only the background clears those of superseded attempts. The usage of an attempt stays as long
as the archived attempt. With ATTEMPT_OUTPUTS=all a retry marks nothing as superseded.
"""

from app.stores.database import Database
from app.stores.statements import statement

SAVED = ("output_data", "run_message_history", "usage_metadata")

# What the report does not name stays as it is.
SAVE_OUTPUTS = statement(
    "runs.outputs.save",
    """
    INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history, usage_metadata)
    VALUES (:run_id, :attempt, :output_data::json, :run_message_history::json, :usage_metadata::json)
    ON CONFLICT (run_id, attempt) DO UPDATE SET
        output_data = CASE WHEN :names_output_data THEN excluded.output_data ELSE run_outputs.output_data END,
        run_message_history = CASE WHEN :names_run_message_history THEN excluded.run_message_history
                                   ELSE run_outputs.run_message_history END,
        usage_metadata = CASE WHEN :names_usage_metadata THEN excluded.usage_metadata ELSE run_outputs.usage_metadata END
    """,
)

# At most 16 MiB and one more, as they are stored: the server takes some seconds for a gigabyte.
PRUNE_OUTPUTS = statement(
    "runs.outputs.prune",
    """
    WITH chosen AS MATERIALIZED (
        SELECT tid, has_usage FROM (
            SELECT tid, has_usage, sum(octets) OVER (ORDER BY tid) - octets AS before FROM (
                SELECT ctid AS tid, usage_metadata IS NOT NULL AS has_usage,
                       coalesce(pg_column_size(output_data), 0) + coalesce(pg_column_size(run_message_history), 0)
                           + coalesce(pg_column_size(usage_metadata), 0) AS octets
                FROM run_outputs WHERE is_superseded ORDER BY run_id LIMIT 200 FOR UPDATE SKIP LOCKED
            ) AS superseded
        ) AS summed
        WHERE before < 16 * 1024 * 1024
    ), emptied AS (
        UPDATE run_outputs SET output_data = NULL, run_message_history = NULL, is_superseded = false
        WHERE ctid = ANY (ARRAY(SELECT tid FROM chosen WHERE has_usage))
    ), removed AS (
        DELETE FROM run_outputs WHERE ctid = ANY (ARRAY(SELECT tid FROM chosen WHERE NOT has_usage))
    )
    SELECT count(*) FROM chosen
    """,
)


async def prune_outputs(database: Database) -> bool:
    """Clear a batch of what superseded attempts left; whether there may be more."""
    async with database.connection() as connection:
        cleared: int = await connection.fetchval(PRUNE_OUTPUTS)
    return cleared > 0
