"""What only the database knows of the whole service: who waits, what is due, which machines there are. For metrics.

One statement, at most every ten seconds in a process. It reads along indexes and counts up to fixed limits, and
no scrape waits for it longer than a second.
"""

import asyncio
import time
from functools import partial

from app.config import Settings
from app.errors import DatabaseUnavailable
from app.runs import projection
from app.scheduling import rules
from app.stores.database import Database
from app.stores.pool import party
from app.stores.single_flight import SingleFlight
from app.stores.statements import statement
from app.telemetry import metrics

KEPT_SECONDS = 10.0
PATIENCE_SECONDS = 1.0
# After a failure it is tried again sooner.
FAILED_SECONDS = 2.0

RUNS_COUNTED = 100_000
LANES_EXPLAINED = 500
MACHINES_COUNTED = 20_000
DELETIONS_COUNTED = 100_000
DELIVERIES_SEEN = 10_000
DISPATCHES_SEEN = 10_000
PLANS_COUNTED = 10_000
SILENT_COUNTED = 10_000

# A running run counts as silent after this many seconds without a report.
LEAST_SILENT_SECONDS = 180.0

# Runs that wait are counted by lane, from the index of the queue alone; why they do is asked of the head of each of the longest
# lanes. A name on the deletion list has been due since it was first taken: its failures tell how long ago that was.
GAUGES = statement(
    "gauges.read",
    f"""
    WITH waiting AS MATERIALIZED (
        SELECT organization_id, lane, count(*) AS runs, min(queued_at) AS oldest FROM (
            SELECT q.organization_id, q.lane, q.queued_at FROM runs q WHERE {rules.waits("q")}
            ORDER BY q.organization_id, q.lane LIMIT {RUNS_COUNTED}
        ) AS queue GROUP BY organization_id, lane
    ), explained AS MATERIALIZED (
        SELECT lanes.runs, {projection.scheduling_reason()} AS reason
        FROM (SELECT * FROM waiting ORDER BY runs DESC LIMIT {LANES_EXPLAINED}) AS lanes
        CROSS JOIN LATERAL (
            SELECT * FROM runs q
            WHERE q.organization_id = lanes.organization_id AND q.lane = lanes.lane AND {rules.waits("q")}
            ORDER BY q.queue_rank, q.queued_at, q.id LIMIT 1
        ) AS r
        {projection.RUN_SOURCE}
    ), due AS MATERIALIZED (
        SELECT store, due_at
            - make_interval(secs => 5 * (2 ^ least(failures, 7) - 1) + 320 * greatest(failures - 7, 0)) AS since
        FROM (
            SELECT store, due_at, failures FROM deletions WHERE due_at <= now() + interval '325 seconds'
            ORDER BY due_at LIMIT {DELETIONS_COUNTED}
        ) AS listed WHERE failures > 0 OR due_at <= now()
    ), untold AS MATERIALIZED (
        SELECT created_at FROM dispatches ORDER BY due_at LIMIT {DISPATCHES_SEEN}
    ), planned AS MATERIALIZED (
        SELECT due_at FROM planned_retries ORDER BY look_at LIMIT {PLANS_COUNTED}
    ), machines_seen AS MATERIALIZED (
        SELECT CASE
            WHEN m.silenced_at IS NOT NULL THEN 'silent'
            WHEN m.status <> 'connected' THEN 'disconnected'
            WHEN {rules.occupied("m")} THEN 'busy'
            WHEN NOT m.is_available THEN 'unavailable'
            WHEN m.reserved_session_id IS NOT NULL THEN 'reserved'
            ELSE 'idle' END AS state
        FROM (SELECT * FROM machines ORDER BY id LIMIT {MACHINES_COUNTED}) AS m
    )
    SELECT 'runs_waiting' AS name, reason AS label, sum(runs)::float AS value FROM explained
    WHERE reason IS NOT NULL GROUP BY reason
    UNION ALL
    SELECT 'runs_waiting', 'other', greatest(0, (SELECT coalesce(sum(runs), 0) FROM waiting)
        - (SELECT coalesce(sum(runs), 0) FROM explained))::float
    UNION ALL
    SELECT 'runs_oldest_waiting_age_seconds', NULL, coalesce(extract(epoch FROM now() - min(oldest)), 0)::float FROM waiting
    UNION ALL
    SELECT 'runs_held', NULL, count(*)::float FROM (
        SELECT FROM runs q WHERE {rules.held("q")} ORDER BY q.queued_at LIMIT {RUNS_COUNTED}
    ) AS held
    UNION ALL
    SELECT 'runs_running', NULL, count(*)::float FROM (
        SELECT FROM runs WHERE status = 'running' AND reported_at IS NOT NULL ORDER BY reported_at LIMIT {RUNS_COUNTED}
    ) AS running
    UNION ALL
    SELECT 'runs_oldest_silent_age_seconds', NULL, coalesce(extract(epoch FROM now() - (
        SELECT reported_at FROM runs WHERE status = 'running' AND reported_at IS NOT NULL
        ORDER BY reported_at LIMIT 1)), 0)::float
    UNION ALL
    SELECT 'runs_silent', NULL, count(*)::float FROM (
        SELECT FROM runs r WHERE status = 'running' AND reported_at < now() - make_interval(secs => :silent_seconds)
            AND {projection.IS_REPORTING}
        ORDER BY reported_at LIMIT {SILENT_COUNTED}
    ) AS silent
    UNION ALL
    SELECT 'runs_machines', state, count(*)::float FROM machines_seen GROUP BY state
    UNION ALL
    SELECT 'runs_deletions_pending', store, count(*)::float FROM due GROUP BY store
    UNION ALL
    SELECT 'runs_deletions_oldest_age_seconds', store, greatest(0, extract(epoch FROM now() - min(since)))::float
    FROM due GROUP BY store
    UNION ALL
    SELECT 'runs_dispatches_pending', NULL, count(*)::float FROM untold
    UNION ALL
    SELECT 'runs_dispatches_oldest_age_seconds', NULL, coalesce(extract(epoch FROM now() - min(created_at)), 0)::float
    FROM untold
    UNION ALL
    SELECT 'runs_planned_retries', NULL, count(*)::float FROM planned
    UNION ALL
    SELECT 'runs_planned_retries_oldest_overdue_seconds', NULL,
        greatest(0, coalesce(extract(epoch FROM now() - min(due_at)), 0))::float FROM planned
    UNION ALL
    SELECT 'runs_webhook_oldest_pending_age_seconds', NULL, coalesce(extract(epoch FROM now() - least(
        (SELECT occurred_at FROM webhook_events WHERE NOT is_fanned_out ORDER BY occurred_at LIMIT 1),
        (SELECT min(created_at) FROM (
            SELECT created_at FROM webhook_deliveries WHERE status = 'pending'
            ORDER BY endpoint_id, due_at LIMIT {DELIVERIES_SEEN}) AS pending))), 0)::float
    """,
)

# Series that are shown with 0: a series that comes and goes looks like a failed scrape.
_NOTHING: dict[str, tuple[str, ...]] = {
    "runs_waiting": (
        "waiting_for_machine",
        "machine_offline",
        "machine_not_responding",
        "machine_busy",
        "no_machine_in_pools",
        "waiting_for_session",
    ),
    "runs_machines": ("idle", "busy", "reserved", "unavailable", "silent", "disconnected"),
    "runs_deletions_pending": ("vault", "files"),
    "runs_deletions_oldest_age_seconds": ("vault", "files"),
}
_LABELS = {"storage": "files"}


class Gauges:
    """The values as they were read last. All who ask at once share one question."""

    def __init__(self, settings: Settings) -> None:
        self._silent_seconds = max(float(settings.machine_silence_seconds), LEAST_SILENT_SECONDS)
        self._found: metrics.Readings = {}
        self._until = 0.0
        self._reading: SingleFlight[None] = SingleFlight()

    async def read(self, database: Database) -> metrics.Readings:
        """Empty while the database does not answer; then it is counted as an error."""
        if self._reading.is_under_way or time.monotonic() >= self._until:
            await self._reading.join(partial(self._read, database))
        return self._found

    async def _read(self, database: Database) -> None:
        party.set("loop metrics")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                async with database.connection() as connection:
                    rows = await connection.fetch(GAUGES, silent_seconds=self._silent_seconds)
        except (DatabaseUnavailable, TimeoutError):
            metrics.scrape_errors.add()
            self._found, self._until = {}, time.monotonic() + FAILED_SECONDS
        else:
            found: dict[str, dict[metrics.Labels, float]] = {
                name: dict.fromkeys(((label,) for label in labels), 0.0) for name, labels in _NOTHING.items()
            }
            for row in rows:
                label = row["label"]
                values = () if label is None else (str(_LABELS.get(label, label)),)
                found.setdefault(row["name"], {})[values] = row["value"]
            self._found, self._until = found, time.monotonic() + KEPT_SECONDS
