"""Planned retries: the rows that say which attempt is to be retried when, written by the transaction that ends the attempt.

A plan is for one attempt. Code that retries or deletes the run meanwhile does not look for the plan: if the run is at another
attempt, the plan is void, is shown nowhere, and is removed when it is due (working.py).
"""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from app.access.auth import Actor
from app.config import Settings
from app.events import record_events
from app.retry_policies.rules import Dropped, Ending, Planned, RetryPolicy, decide, reason
from app.stores.database import Connection
from app.stores.statements import rows_of, statement
from app.telemetry import metrics

log = logging.getLogger("app.retry_policies")

# A secret is kept so much longer than until its plan is due: a retry can be late.
SECRET_SECONDS = 15 * 60

# Ended runs that may be retried by themselves, with what the rules need to know.
ENDED = statement(
    "retry_policies.ended",
    f"""
    SELECT run.id, run.organization_id, run.attempt, run.status, run.error, run.error_code, run.changed_at AS ended_at,
           run.automatic_retries, run.secret_path IS NOT NULL AS has_secret, workflow.retry_policy,
           (SELECT min(expires_at) FROM run_attachments
            WHERE run_id = run.id AND attachment_type = 'input') AS inputs_expire_at
    FROM {rows_of("runs", "run_ids")} AS run, LATERAL (
        SELECT retry_policy FROM workflows WHERE id = run.workflow_id OFFSET 0
    ) AS workflow
    WHERE workflow.retry_policy IS NOT NULL AND run.automatic_retries IS NOT NULL
    """,
)

# The plans of the attempts that have no code, and an event for each.
PLAN = statement(
    "retry_policies.plan",
    f"""
    WITH ended AS (
        SELECT * FROM unnest(:run_ids::uuid[], :attempts::integer[], :organization_ids::text[], :statuses::text[],
                             :codes::text[], :reasons::text[], :due_ats::timestamptz[], :rules::smallint[], :avoids::boolean[],
                             :owed::boolean[])
            AS ended (id, attempt, organization_id, status, code, reason, due_at, rule, avoids_last_machine, owes_event)
    ), planned AS (
        INSERT INTO planned_retries (run_id, attempt, organization_id, due_at, look_at, rule, avoids_last_machine, owes_event)
        SELECT id, attempt, organization_id, due_at, due_at, rule, avoids_last_machine, owes_event FROM ended
        WHERE code IS NULL
    )
    {
        record_events(
            "ended",
            "CASE WHEN code IS NULL THEN 'retry_planned' ELSE 'retry_dropped' END",
            from_status="status",
            to_status="status",
            by="'policy'",
            code="code",
            actor="NULL, NULL, NULL, reason",
        )
    }
    """,
)

# A plan that another transaction has locked is waited for: it may have a new place by then.
DROP = statement(
    "retry_policies.drop",
    f"""
    WITH dropped AS (
        DELETE FROM planned_retries WHERE ctid = ANY (ARRAY(
            SELECT plan.tid FROM unnest(:run_ids::uuid[], :attempts::integer[]) AS wanted (run_id, attempt), LATERAL (
                SELECT ctid AS tid FROM planned_retries
                WHERE run_id = wanted.run_id AND attempt = wanted.attempt FOR UPDATE
            ) AS plan
        ))
        RETURNING run_id AS id, attempt, organization_id, owes_event
    ), told AS (
        SELECT dropped.*, (:codes::text[])[array_position(:run_ids::uuid[], dropped.id)] AS code,
               (SELECT status FROM runs WHERE runs.id = dropped.id) AS status
        FROM dropped
    ), recorded AS (
        {record_events("told", "'retry_dropped'", from_status="status", to_status="status", by=":by::text", code="code")}
    )
    SELECT id, organization_id, code, owes_event FROM told
    """,
)


@dataclass(slots=True)
class Plans:
    """The plans for the runs that a transaction has ended."""

    due: dict[UUID, datetime] = field(default_factory=dict)  # by run
    silent: set[UUID] = field(default_factory=set)  # runs that send no `run_complete` for this ending


async def make(connection: Connection, run_ids: Sequence[UUID], settings: Settings) -> Plans:
    """Plan the retries of runs that this transaction has ended, as the policies of their workflows say."""
    plans = Plans()
    rows, decisions = [], list[Planned | Dropped]()
    for row in await connection.fetch(ENDED, run_ids=run_ids):
        ending = Ending(
            row["status"],
            row["error"] or (),
            row["error_code"],
            row["ended_at"],
            row["automatic_retries"],
            row["has_secret"],
            row["inputs_expire_at"],
        )
        decided = decide(
            RetryPolicy.parse(row["retry_policy"]),
            ending,
            spread=random.uniform(-1, 1),  # noqa: S311 - it spreads load, and keeps nothing secret
            cooldown_seconds=settings.retry_cooldown_seconds,
            keeps_secrets=settings.secret_retention_seconds > 0,
        )
        if decided is None:
            continue
        rows.append(row)
        decisions.append(decided)
        if isinstance(decided, Planned):
            plans.due[row["id"]] = decided.due_at
            if decided.owes_event:
                plans.silent.add(row["id"])
    if not rows:
        return plans
    planned = [one if isinstance(one, Planned) else None for one in decisions]
    codes = [one.code if isinstance(one, Dropped) else None for one in decisions]
    await connection.execute(
        PLAN,
        run_ids=[row["id"] for row in rows],
        attempts=[row["attempt"] for row in rows],
        organization_ids=[row["organization_id"] for row in rows],
        statuses=[row["status"] for row in rows],
        codes=codes,
        reasons=[reason(one.rule) for one in decisions],
        due_ats=[None if one is None else one.due_at for one in planned],
        rules=[one.rule for one in decisions],
        avoids=[one is not None and one.avoids_last_machine for one in planned],
        owed=[one is not None and one.owes_event for one in planned],
    )

    def tell() -> None:
        for row, code in zip(rows, codes, strict=True):
            _tell(row["id"], row["organization_id"], code)

    connection.after_commit(tell)
    return plans


async def drop(connection: Connection, codes: Mapping[UUID, str], attempts: Sequence[int], actor: Actor) -> list[UUID]:
    """Drop the plans of these runs and attempts, each with its code. Returns the runs with an ending that is still to be sent.

    The caller has locked the runs: none of them is at another attempt.
    """
    rows = await connection.fetch(
        DROP, run_ids=[*codes], attempts=attempts, codes=[*codes.values()], by=actor.by, **actor.parameters()
    )

    def tell() -> None:
        for row in rows:
            _tell(row["id"], row["organization_id"], row["code"])

    connection.after_commit(tell)
    return [row["id"] for row in rows if row["owes_event"]]


def _tell(run_id: UUID, organization_id: str, code: str | None) -> None:
    metrics.planned_retries.add("planned" if code is None else "dropped", code or "")
    line = {"run_id": run_id} | ({"event": "retry_planned"} if code is None else {"event": "retry_dropped"})
    log.info(line | {"organization_id": organization_id} | ({} if code is None else {"code": code}))
