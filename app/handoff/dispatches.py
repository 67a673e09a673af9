"""Dispatches: rows for messages to Temporal, written by the transaction that causes the message. temporal.py sends them.

`start`: a run was given to a machine. `cancel`: a machine's run was ended, or taken away from it, not by its executor. Without
TEMPORAL_ADDRESS nothing is written. This file knows the tables and nothing of Temporal.
"""

from collections.abc import Sequence
from uuid import UUID

from app.models import IS_ACTIVE
from app.stores.database import Connection
from app.stores.statements import rows_of, statement

# Part of a statement that gives runs to machines: `assigned` has the columns that are selected here.
STARTED = """
    INSERT INTO dispatches (run_id, attempt, assignment, kind, machine_id, organization_id)
    SELECT id, attempt, assignment, 'start', assigned_machine_id, organization_id FROM assigned
    ON CONFLICT (run_id, assignment, kind) DO NOTHING
"""

CANCEL = statement(
    "handoff.cancel",
    f"""
    INSERT INTO dispatches (run_id, attempt, assignment, kind, machine_id, organization_id)
    SELECT id, attempt, assignment, 'cancel', assigned_machine_id, organization_id FROM {rows_of("runs", "run_ids")} AS run
    WHERE assigned_machine_id IS NOT NULL AND {IS_ACTIVE}
    ON CONFLICT (run_id, assignment, kind) DO NOTHING
    """,
)


# --- what is due ------------------------------------------------------------------------------------------------------

# Taking a row also postpones it: whoever finds it again after that time, because this process died, tells Temporal again.
# `is_wanted`: the machine still has the run, and nobody has begun it. `may_come`: a start that is not settled may still be
# under way, so that Temporal does not know the workflow yet.
LEASE = statement(
    "handoff.lease",
    """
    UPDATE dispatches d SET due_at = now() + make_interval(secs => :lease_seconds)
    WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM dispatches WHERE due_at <= now() ORDER BY due_at LIMIT :most FOR UPDATE SKIP LOCKED
    ))
    RETURNING run_id, attempt, assignment, kind, machine_id, organization_id,
        (SELECT r.status = 'scheduling' AND r.assignment = d.assignment AND r.assigned_machine_id = d.machine_id
         FROM runs r WHERE r.id = d.run_id) IS TRUE AS is_wanted,
        kind = 'cancel' AND (SELECT true FROM dispatches start
         WHERE start.run_id = d.run_id AND start.assignment = d.assignment AND start.kind = 'start') IS TRUE AS may_come
    """,
)

_THESE = """
    SELECT listed.tid FROM unnest(:run_ids::uuid[], :assignments::integer[], :kinds::text[]) AS one (run_id, assignment, kind),
        LATERAL (
            SELECT ctid AS tid FROM dispatches
            WHERE run_id = one.run_id AND assignment = one.assignment AND kind = one.kind FOR UPDATE
        ) AS listed
"""

SETTLE = statement("handoff.settle", f"DELETE FROM dispatches WHERE ctid = ANY (ARRAY({_THESE}))")

# Not for long: what waits here is a machine's time.
POSTPONE = statement(
    "handoff.postpone",
    f"""
    UPDATE dispatches SET due_at = now() + make_interval(secs => least(0.5 * 2 ^ failures, 10)),
                          failures = least(failures + 1, 1000)
    WHERE ctid = ANY (ARRAY({_THESE}))
    """,
)

# A run that has a machine and was not begun in a while is handed over again: Temporal may have lost its data, and a replica
# without TEMPORAL_ADDRESS writes no row. Due so late that whatever is begun meanwhile is dropped without a call.
SWEEP = statement(
    "handoff.sweep",
    f"""
    WITH seen AS MATERIALIZED (
        SELECT id, attempt, assignment, assigned_machine_id, organization_id, status FROM runs
        WHERE assigned_machine_id > :after AND {IS_ACTIVE}
        ORDER BY assigned_machine_id LIMIT :most
    ), again AS (
        INSERT INTO dispatches (run_id, attempt, assignment, kind, machine_id, organization_id, due_at)
        SELECT id, attempt, assignment, 'start', assigned_machine_id, organization_id,
               now() + make_interval(secs => :after_seconds)
        FROM seen WHERE status = 'scheduling'
        ON CONFLICT (run_id, assignment, kind) DO NOTHING
    )
    SELECT assigned_machine_id FROM seen ORDER BY assigned_machine_id OFFSET :most - 1
    """,
)


# --- what transactions write ------------------------------------------------------------------------------------------


async def cancel(connection: Connection, run_ids: Sequence[UUID]) -> None:
    """Call off the executors of those of these locked runs that a machine has. To be called before they are changed."""
    await connection.execute(CANCEL, run_ids=run_ids)
