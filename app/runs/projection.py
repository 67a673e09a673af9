"""How rows are read and shown: the columns of each reply, and the bytes made of them.

Values that are JSON in the table are put into the reply as they are, without being parsed. UUIDs are read as text.
"""

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import orjson

from app.access.auth import SEEN, Principal
from app.errors import RunNotFound
from app.limits import memory_budget
from app.runs.carried import CARRIED
from app.scheduling import rules
from app.stores.database import Connection, Record
from app.stores.documents import columns, rfc3339
from app.stores.statements import rows_of, statement

# `m` is the machine reserved for an active run's session: a live session decides the machine. It says nothing of runs that
# have ended: their session may have gone on to a machine that they were never on.
RUN_SOURCE = f"""
LEFT JOIN LATERAL (
    SELECT id FROM machines
    WHERE r.session_id IS NOT NULL AND {rules.is_active("r")} AND reserved_session_id = r.session_id
      AND organization_id = r.organization_id
    LIMIT 1  -- it is unique; the limit keeps the planner from joining all machines with the few runs that are shown
) AS m ON true
"""

# An output is gone once it has expired, collected or not. An input's row stays: it is why a retry is refused.
VISIBLE = "(a.attachment_type = 'input' OR a.expires_at IS NULL OR a.expires_at > now())"

# Files of earlier attempts that stay are no files of the run.
CURRENT = "a.attempt IS NULL"


def _attachment_ids(kind: str) -> str:
    return (
        "ARRAY(SELECT a.id::text FROM run_attachments a"
        f" WHERE a.run_id = r.id AND a.attachment_type = '{kind}' AND {CURRENT} AND {VISIBLE} ORDER BY a.created_at, a.id)"
    )


def outputs_source(condition: str = "true") -> str:
    """A join for `o`: what the current attempt produced, one row at most. The limit keeps the planner from another kind of
    join, which made while the table is nearly empty would read all of it ever after."""
    return f"""
    LEFT JOIN LATERAL (
        SELECT * FROM run_outputs WHERE {condition} AND run_id = r.id AND attempt = r.attempt LIMIT 1
    ) AS o ON true
    """


# What keeps a waiting run in a session: one that is at work, or one that is before it in their lane. In the order of the
# queue: another index than its own would read all that waits.
_BEFORE = f"""runs o WHERE o.organization_id = r.organization_id AND o.lane = r.lane AND {rules.waits("o")}
    AND (o.queue_rank, o.queued_at, o.id) < (r.queue_rank, r.queued_at, r.id)
    ORDER BY o.queue_rank, o.queued_at, o.id"""
_WAITS_FOR_SESSION = f"(r.session_id IS NOT NULL AND ({rules.session_at_work('r')} OR {rules.exists(_BEFORE)}))"

_SILENT = "machines s WHERE s.id = r.assigned_machine_id AND s.status = 'disconnected' AND s.silenced_at IS NOT NULL"

_MEMBER = f"pool_machines one WHERE one.pool_id = r.pool_ids[1] AND {rules.in_all_pools('r', 'one.machine_id')}"

# What keeps the first of a lane, and hence all of them: it depends on nothing but what the lane wants.
_LANE_REASON = f"""
CASE
    WHEN m.id IS NOT NULL OR r.pinned_machine_id IS NOT NULL THEN (
        SELECT CASE
            WHEN t.status = 'disconnected' AND t.silenced_at IS NOT NULL THEN 'machine_not_responding'
            WHEN NOT ({rules.up("t")}) THEN 'machine_offline'
            WHEN (t.reserved_session_id IS NOT NULL AND t.reserved_session_id IS DISTINCT FROM r.session_id)
                OR {rules.occupied("t")} THEN 'machine_busy'
            ELSE 'waiting_for_machine'
        END
        FROM machines t WHERE t.id = coalesce(m.id, r.pinned_machine_id)
    )
    WHEN cardinality(r.pool_ids) > 0 AND NOT {rules.exists(_MEMBER)} THEN 'no_machine_in_pools'
    ELSE 'waiting_for_machine'
END
"""


def scheduling_reason(of_the_lane: str = _LANE_REASON) -> str:
    """Why a run has not started. Computed on read: it depends on other rows and would be stale when stored."""
    return f"""
CASE
    WHEN r.status <> 'scheduling' THEN NULL
    WHEN r.assigned_machine_id IS NOT NULL THEN
        CASE WHEN {rules.exists(_SILENT)} THEN 'machine_not_responding' ELSE 'assigned' END
    WHEN {rules.held("r")} THEN 'not_before'
    WHEN {_WAITS_FOR_SESSION} THEN 'waiting_for_session'
    ELSE {of_the_lane}
END
"""


# What a workflow's retry policy will do. A plan of an earlier attempt is void.
_NEXT_RETRY_AT = """
CASE WHEN r.status IN ('error', 'task_failed') THEN (
    SELECT due_at FROM planned_retries WHERE run_id = r.id AND attempt = r.attempt LIMIT 1
) END
"""
_RETRIES_LEFT = """
(SELECT CASE WHEN w.retry_policy IS NULL THEN NULL WHEN r.automatic_retries IS NULL THEN 0
     ELSE greatest((w.retry_policy->>'max_retries')::integer - r.automatic_retries, 0) END
 FROM workflows w WHERE w.id = r.workflow_id LIMIT 1)
"""

# Whether more reports are expected of the attempt's executor: it gave a claim, or it has reported since the run began. The
# start sets `changed_at` and `reported_at` a few microseconds apart.
IS_REPORTING = """(r.status = 'running' AND (
    (r.claim IS NOT NULL AND r.claim_attempt = r.attempt) OR r.reported_at > r.changed_at + interval '10 milliseconds'))"""

# From `runs r`, RUN_SOURCE and outputs_source.
RUN_COLUMNS = {
    "id": "r.id::text",
    "workflow_id": "r.workflow_id::text",
    "machine_id": "coalesce(r.assigned_machine_id, m.id, r.pinned_machine_id)::text",
    "assigned_machine_id": "r.assigned_machine_id::text",
    "user_id": "r.user_id::text",
    "organization_id": "r.organization_id",
    "status": "r.status",
    "scheduling_reason": scheduling_reason(),
    "not_before": f"CASE WHEN {rules.held('r')} THEN r.queued_at END",
    "attempt": "r.attempt",
    "assignment": "r.assignment",
    "is_priority": "r.is_priority",
    "error": "r.error",
    "error_code": "r.error_code",
    # A retry by the version before leaves that of the attempt before.
    "workflow_version": "CASE WHEN r.status <> 'scheduling' THEN r.workflow_version END",
    "output_data": "o.output_data",
    "output_attachment_ids": _attachment_ids("output"),
    "run_message_history": "o.run_message_history",
    "input_attachment_ids": _attachment_ids("input"),
    "input_values": "r.input_values",
    "sensitive_input_aliases": "r.sensitive_input_aliases",
    "pool_ids": "r.pool_ids::text[]",
    "session_id": "r.session_id::text",
    "session_alias": "r.session_alias",
    "release_session_after": "r.release_session_after",
    "created_at": "r.created_at",
    "started_at": "r.started_at",
    "ended_at": "r.ended_at",
    "changed_at": "r.changed_at",
    "next_retry_at": _NEXT_RETRY_AT,
    "retries_left": _RETRIES_LEFT,
    "last_report_at": "r.reported_at",
    "is_reporting": f"coalesce({IS_REPORTING}, false)",
    "main_prompt": "r.main_prompt",
    "model_metadata": "r.model_metadata",
    "usage_metadata": "o.usage_metadata",
    "traceparent": "r.traceparent",
} | {one.name: f"r.{one.name}" for one in CARRIED}
# For many runs at once: what is to be said of a lane is found out afterwards, by `many`.
_LANE = "lane "
MANY_RUNS = RUN_COLUMNS | {"scheduling_reason": scheduling_reason(f"'{_LANE}' || r.lane")}

RUN_BASE_FIELDS = ("id", "workflow_id", "machine_id", "status", "created_at")
RUN_UNSUPPORTED = {"post_run_checks": None}
RUN_JSON = (
    "output_data",
    "run_message_history",
    "usage_metadata",
    "sensitive_input_aliases",
    *(one.name for one in CARRIED if one.type == "json"),
)
_LONG_TEXTS = ("error", *(one.name for one in CARRIED if one.type == "text" and one.is_long))


def document(overrides: dict[str, str]) -> str:
    """A SQL expression for the bytes of a run's reply, with other expressions for some of its keys."""
    return f"convert_to({json_object(overrides)}::text, 'UTF8')"


def json_object(overrides: dict[str, str], without: Iterable[str] = ()) -> str:
    """A SQL expression for a run's reply as JSON, with other expressions for some of its keys, and without some."""
    shown = {name: rfc3339(text) if _is_time(name) else text for name, text in RUN_COLUMNS.items()} | overrides
    shown |= dict.fromkeys(RUN_UNSUPPORTED, "NULL")
    pairs = ", ".join(f"'{name}', {text}" for name, text in shown.items() if name not in set(without))
    return f"json_build_object({pairs})"


def _is_time(name: str) -> bool:
    return name.endswith("_at") or name == "not_before"


# About how many bytes of JSON a row of RUN_COLUMNS takes: 1200 of what is short, and 39 of an id.
_IDS = ("input_attachment_ids", "output_attachment_ids", "pool_ids")
OCTETS = " + ".join(
    [
        "1200",
        *(f"coalesce(octet_length(whole.{name}::text), 0)" for name in RUN_JSON),
        *(f"coalesce(octet_length(to_json(whole.{name})::text), 0)" for name in _LONG_TEXTS),
        *(f"coalesce(39 * cardinality(whole.{name}), 0)" for name in _IDS),
    ]
)
# Each column is found once, to be weighed and to be shown.
_WHOLE = f"""
    FROM (
        SELECT {columns(RUN_COLUMNS)} FROM runs r {RUN_SOURCE} {outputs_source()}
        WHERE r.id = :run_id AND {SEEN} OFFSET 0
    ) AS whole
"""
ORDINARY_BYTES = 64 * 1024

GET_RUN = statement("runs.get", f"SELECT * {_WHOLE} WHERE {OCTETS} <= :most::bigint")
WEIGH_RUN = statement("runs.weigh", f"SELECT {OCTETS} {_WHOLE}")


async def get(connection: Connection, run_id: UUID, principal: Principal) -> dict[str, Any]:
    """One run as it is sent. Raises RunNotFound for what the caller may not see, and NoRoom for a long one."""
    named: dict[str, Any] = {"run_id": run_id, **principal.sees()}
    row = await connection.fetchrow(GET_RUN, **named, most=ORDINARY_BYTES)
    while row is None:  # rarely: it is long, and perhaps longer now
        octets = await connection.fetchval(WEIGH_RUN, **named)
        if octets is None:
            raise RunNotFound
        memory_budget.reserve_reply(octets)
        row = await connection.fetchrow(GET_RUN, **named, most=octets)
    return run(row)


def run(row: Record) -> dict[str, Any]:
    """A run as it is sent."""
    document = dict(row.items())
    for name in RUN_JSON:
        value = document.get(name)
        if value is not None:
            document[name] = orjson.Fragment(value)
    return document | RUN_UNSUPPORTED


# The reason of one run in each lane, also if the run has changed meanwhile.
LANE_REASONS = statement(
    "runs.lane_reasons",
    f"""
    SELECT r.id::text, {_LANE_REASON} AS reason
    FROM {rows_of("runs", "run_ids")} AS r {RUN_SOURCE}
    """,
)


async def many(connection: Connection, rows: Iterable[Record]) -> list[dict[str, Any]]:
    """Rows of MANY_RUNS as they are sent. What each lane waits for is found out once, not once for each of its runs."""
    runs = [run(row) for row in rows]
    waiting = [one for one in runs if (one.get("scheduling_reason") or "").startswith(_LANE)]
    first = {one["scheduling_reason"]: one["id"] for one in waiting}
    if first:
        found = await connection.fetch(LANE_REASONS, run_ids=list(first.values()))
        reasons = {row["id"]: row["reason"] for row in found}
        for one in waiting:  # one that is gone meanwhile says nothing of the others
            one["scheduling_reason"] = reasons.get(first[one["scheduling_reason"]]) or "waiting_for_machine"
    return runs


def end_reason(run_id: str, attempt: str) -> str:
    """A SQL expression for why an attempt was ended."""
    return f"""(
        SELECT e.reason FROM run_events e WHERE e.run_id = {run_id} AND e.attempt = {attempt} AND e.event = 'ended' LIMIT 1
    )"""


# From `run_attempts t` and `o`, its row of run_outputs.
ATTEMPT_COLUMNS = {
    "run_id": "t.run_id::text",
    "attempt": "t.attempt",
    "status": "t.status",
    "error": "t.error",
    "error_code": "t.error_code",
    "machine_id": "t.machine_id::text",
    "session_id": "t.session_id::text",
    "started_at": "t.started_at",
    "ended_at": "t.ended_at",
    "retried_at": "t.retried_at",
    "by": "coalesce(t.retried_by, 'request')",
    "bulk_retry_id": "t.bulk_retry_id::text",
    "retried_by_key_id": "t.retried_by_key_id::text",
    "retried_by_key_name": "(SELECT k.name FROM api_keys k WHERE k.id = t.retried_by_key_id LIMIT 1)",
    "retried_by_user_id": "t.retried_by_user_id::text",
    "overridden": "t.overridden",
    "reason": "t.reason",
    "workflow_version": "t.workflow_version",
    "usage_metadata": "o.usage_metadata",
    "end_reason": end_reason("t.run_id", "t.attempt"),
}

ATTACHMENT_COLUMNS = {
    "id": "a.id::text",
    "run_id": "a.run_id::text",
    "user_id": "a.user_id::text",
    "organization_id": "a.organization_id",
    "attachment_type": "a.attachment_type",
    "filename": "a.filename",
    "content_type": "a.content_type",
    "size_bytes": "a.size_bytes",
    "storage_path": "coalesce(a.storage_path, '')",
    "target_path": "a.target_path",
    "cleanup_imports_after_run": "a.cleanup_imports_after_run",
    "created_at": "a.created_at",
    "expires_at": "a.expires_at",
    "attempt": "a.attempt",
}
