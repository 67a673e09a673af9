"""Silence: machines that give no sign of life any more, and runs that their machines do not begin.

MACHINE_SILENCE_SECONDS  A machine that gave signs of life (write_behind/heartbeats.py) is disconnected if it gives none for
                         this long, until the next sign. While a run is running on it, only RUN_SILENCE_SECONDS counts.
START_TIMEOUT_SECONDS    A run that its machine does not begin in time is taken from it and placed again, and the machine is
                         disconnected as above. Only if the last run on it was begun with a claim: nothing else fences an
                         executor that is late.

Replicas divide the work by row locks. Each row is looked at again only after some time, so that what stays as it is does not
keep a round from the rest.
"""

import logging
from collections.abc import Sequence

from app.access.auth import Actor
from app.config import Settings
from app.events import record_events
from app.handoff import dispatches
from app.scheduling import downed_machines, rules
from app.stores.database import Connection, Database, Record
from app.stores.statements import by_id, rows_of, statement

log = logging.getLogger("app.machines")

MOST = 200  # machines, and runs, of one round

# --- machines ---------------------------------------------------------------------------------------------------------

# What it waits for is a sign of life: any moves `last_seen`, so that a look that comes too early is only put off.
SILENT = statement(
    "silence.machines",
    f"""
    WITH due AS MATERIALIZED (
        SELECT ctid AS tid, id, status = 'connected' AS is_up, last_seen FROM machines
        WHERE look_at <= now() ORDER BY look_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    ), judged AS MATERIALIZED (
        SELECT tid, CASE WHEN is_up THEN greatest(least(last_seen, now()), (
            SELECT CASE WHEN status = 'running' THEN now() END FROM runs
            WHERE assigned_machine_id = due.id AND {rules.is_active()} LIMIT 1
        )) + make_interval(secs => :seconds) END AS next
        FROM due
    ), changed AS (
        UPDATE machines SET
            look_at = CASE WHEN next > now() THEN next END,
            last_seen = least(last_seen, now()),  -- an executor whose clock is ahead must not be heard of for ever
            status = CASE WHEN next <= now() THEN 'disconnected' ELSE status END,
            silenced_at = CASE WHEN next <= now() THEN now() ELSE silenced_at END
        FROM judged WHERE machines.ctid = judged.tid
        RETURNING machines.*, coalesce(next <= now(), false) AS is_silent
    ), recorded AS (
        {downed_machines.recorded("(SELECT * FROM changed WHERE is_silent)", ":reason::text")}
    )
    SELECT id, organization_id, last_seen FROM changed WHERE is_silent
    """,
)

# --- runs -------------------------------------------------------------------------------------------------------------

# Runs before machines, as everybody locks them. A locked run is just being begun, ended or deleted.
OVERDUE = statement(
    "silence.overdue_runs",
    """
    SELECT id, organization_id, assigned_machine_id, pinned_machine_id, session_id FROM runs
    WHERE status = 'scheduling' AND assigned_machine_id IS NOT NULL
      AND awaited_since <= now() - make_interval(secs => :seconds)
    ORDER BY awaited_since LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
    """,
)

THEIR_MACHINES = statement(
    "silence.their_machines",
    """
    SELECT machine.* FROM unnest(:machine_ids::uuid[]) AS wanted (id), LATERAL (
        SELECT id, starts_with_claim, begun_session_id FROM machines WHERE id = wanted.id FOR NO KEY UPDATE SKIP LOCKED
    ) AS machine
    """,
)

# It keeps its place in the queue.
UNASSIGN = statement(
    "silence.unassign",
    f"""
    WITH unassigned AS (
        UPDATE runs SET assigned_machine_id = NULL, awaited_since = NULL WHERE {by_id("runs", "run_ids")}
        RETURNING id, organization_id, attempt, status
    )
    {record_events("unassigned", "'unassigned'", from_status="status", to_status="status")}
    """,
)

STAY = statement("silence.stay", f"UPDATE runs SET awaited_since = NULL WHERE {by_id('runs', 'run_ids')}")

# A machine that a caller has disconnected stays so. `reservations` are reservations of sessions that have not begun: they end.
DISCONNECT = statement(
    "silence.disconnect",
    f"""
    WITH before AS MATERIALIZED (
        SELECT tid, id, status = 'connected' AS was_up FROM {rows_of("machines", "machine_ids")} AS one
    ), changed AS (
        UPDATE machines SET
            silenced_at = CASE WHEN status = 'connected' OR silenced_at IS NOT NULL THEN now() END,
            status = CASE WHEN status = 'connected' THEN 'disconnected' ELSE status END,
            look_at = NULL,
            reserved_session_id = CASE WHEN reserved_session_id = ANY(:reservations::uuid[]) THEN NULL
                                  ELSE reserved_session_id END
        WHERE ctid = ANY (ARRAY(SELECT tid FROM before))
        RETURNING machines.*, (SELECT was_up FROM before WHERE before.id = machines.id) AS was_up
    )
    {downed_machines.recorded("(SELECT * FROM changed WHERE was_up)", ":reason::text")}
    """,
)

NOT_BEGUN = "The machine did not begin the run within {} s."
NO_SIGN = "The machine gave no sign of life for {} s."


async def look_for_silence(database: Database, settings: Settings) -> set[str]:
    """Both, one bounded round; the organizations that something was changed for. Raises DatabaseUnavailable."""
    changed: set[str] = set()
    if settings.machine_silence_seconds:
        changed |= await _disconnect_silent_machines(database, settings.machine_silence_seconds)
    if settings.start_timeout_seconds:
        seconds = settings.start_timeout_seconds
        changed |= await _take_back_runs(database, seconds, hands_over=settings.hands_over)
    return changed


async def _disconnect_silent_machines(database: Database, seconds: int) -> set[str]:
    async with database.connection() as connection:
        rows = await connection.fetch(SILENT, seconds=float(seconds), most=MOST, reason=NO_SIGN.format(seconds))
    for row in rows:
        log.warning(
            {
                "event": "machine_silent",
                "machine_id": str(row["id"]),
                "organization_id": row["organization_id"],
                "last_seen": row["last_seen"].isoformat(),
            }
        )
    return {row["organization_id"] for row in rows}


async def _take_back_runs(database: Database, seconds: int, *, hands_over: bool) -> set[str]:
    async with database.transaction() as connection:
        runs = await connection.fetch(OVERDUE, seconds=float(seconds), most=MOST)
        if not runs:
            return set()
        rows = await connection.fetch(THEIR_MACHINES, machine_ids=[run["assigned_machine_id"] for run in runs])
        machines = {row["id"]: row for row in rows}
        runs = [run for run in runs if run["assigned_machine_id"] in machines]  # the others, the next time
        fenced = [run for run in runs if machines[run["assigned_machine_id"]]["starts_with_claim"]]
        taken = [run for run in fenced if not _stays(run, machines[run["assigned_machine_id"]])]
        if hands_over:
            await dispatches.cancel(connection, [run["id"] for run in taken])
        await _write(connection, runs, fenced, taken, Actor(reason=NOT_BEGUN.format(seconds)))
    is_taken = {run["id"] for run in taken}
    for run in runs:
        log.warning(
            {
                "event": "run_not_begun",
                "run_id": str(run["id"]),
                "machine_id": str(run["assigned_machine_id"]),
                "organization_id": run["organization_id"],
                "then": "placed again" if run["id"] in is_taken else "stays",
            }
        )
    return {run["organization_id"] for run in taken}


def _stays(run: Record, machine: Record) -> bool:
    """Whether no other machine would do: the run is pinned, or its session has begun on this one."""
    begun = run["session_id"] is not None and run["session_id"] == machine["begun_session_id"]
    return begun or run["pinned_machine_id"] is not None


async def _write(
    connection: Connection, runs: Sequence[Record], fenced: Sequence[Record], taken: Sequence[Record], actor: Actor
) -> None:
    """`taken` go back to the queue, the rest of `runs` stays; the machines of those that are `fenced` do not respond."""
    is_taken = {run["id"] for run in taken}
    if staying := [run["id"] for run in runs if run["id"] not in is_taken]:
        await connection.execute(STAY, run_ids=staying)
    if taken:
        await connection.execute(UNASSIGN, run_ids=list(is_taken), **actor.parameters())
    if fenced:
        await connection.execute(
            DISCONNECT,
            machine_ids=[run["assigned_machine_id"] for run in fenced],
            reservations=[run["session_id"] for run in taken if run["session_id"] is not None],
            reason=actor.reason,
        )
