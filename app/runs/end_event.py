"""The event of a run's end, `run_complete`: one row for each ended run, with the run as GET shows it. webhooks/ sends it."""

from collections.abc import Sequence
from uuid import UUID

from app.config import Settings
from app.runs import projection
from app.stores.database import Connection
from app.stores.documents import rfc3339
from app.webhooks import outbox

# The keys of a run that may be as long as the body of a request, in the order in which an event leaves them out.
_UNBOUNDED = (
    "run_message_history",
    "output_data",
    "usage_metadata",
    "input_values",
    "main_prompt",
    "model_metadata",
    "error",
    "sensitive_input_aliases",
    "output_attachment_ids",
)
_ENVELOPE = 400  # bytes of the event around the run, more than it ever has
_EVENT_RUNS = 20  # in one statement, so that it reads a bounded amount even if all values were stored compressed


def _unbounded_rows() -> str:
    """VALUES for each of these keys: its turn, its name and its value as JSON.

    A column that is JSON is not converted: a function would read all of it.
    """
    columns = projection.RUN_COLUMNS
    shown = {name: columns[name] if name in projection.RUN_JSON else f"to_json({columns[name]})" for name in _UNBOUNDED}
    return ", ".join(f"({turn}, '{name}', {text})" for turn, (name, text) in enumerate(shown.items()))


# One event for each run, with the run as GET shows it now, if the workflow wants events and the organization has an endpoint. A
# text that is larger than the limit even as it is stored (compressed) is not read. OFFSET 0: computed once for each run.
RECORD = outbox.insert_events(
    "runs.record_ended",
    f"""
    SELECT event.id, r.organization_id, event.run_id, r.attempt, 'run_complete', event.at,
           convert_to(concat(
               '{{"event_id":"', event.id, '","event_type":"run_complete","occurred_at":"', {rfc3339("event.at")},
               '",', '"truncated":' || long.left_out::text || ',', '"run":', short.shown, ',', long.shown, '}}}}'), 'UTF8')
    FROM unnest(CAST(:run_ids AS uuid[])) AS ended (run_id)
    CROSS JOIN LATERAL (SELECT * FROM runs WHERE runs.id = ended.run_id LIMIT 1) AS r
    CROSS JOIN LATERAL (SELECT FROM workflows WHERE workflows.id = r.workflow_id AND is_webhooks_enabled LIMIT 1) AS wanted
    CROSS JOIN LATERAL (
        SELECT FROM webhook_endpoints e WHERE e.organization_id = r.organization_id LIMIT 1
    ) AS listening
    {projection.RUN_SOURCE} {projection.outputs_source()}
    CROSS JOIN LATERAL (SELECT r.id AS run_id, gen_random_uuid() AS id, clock_timestamp() AS at OFFSET 0) AS event
    CROSS JOIN LATERAL (
        SELECT left({projection.json_object({"scheduling_reason": "NULL"}, without=_UNBOUNDED)}::text, -1) AS shown OFFSET 0
    ) AS short
    CROSS JOIN LATERAL (
        SELECT string_agg(
                   concat(to_json(key), ':', CASE WHEN fits THEN value END, CASE WHEN NOT fits THEN 'null' END), ',') AS shown,
               json_agg(key ORDER BY turn) FILTER (WHERE NOT fits) AS left_out
        FROM (
            SELECT turn, key, value, coalesce(value = 'null', false) OR octet_length(short.shown) + {_ENVELOPE}
                + sum(octets + octet_length(key) + 4) OVER (ORDER BY turn DESC) <= :max_bytes AS fits
            FROM (
                SELECT turn, key, value, coalesce(octet_length(value), :max_bytes) AS octets
                FROM (
                    SELECT turn, key, CASE WHEN json IS NULL THEN 'null' WHEN pg_column_size(json) <= :max_bytes THEN json::text
                        END AS value
                    FROM (VALUES {_unbounded_rows()}) AS column_of_run (turn, key, json) OFFSET 0
                ) AS read
            ) AS measured
        ) AS decided
    ) AS long
    """,
)


async def write_end_events(connection: Connection, run_ids: Sequence[UUID], settings: Settings) -> bool:
    """Write the events of these endings; whether there is one to send."""
    recorded = False
    for start in range(0, len(run_ids), _EVENT_RUNS):
        some = run_ids[start : start + _EVENT_RUNS]
        done = await connection.execute(RECORD, run_ids=some, max_bytes=settings.webhook_max_bytes)
        recorded |= done != "INSERT 0 0"
    return recorded
