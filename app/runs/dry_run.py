"""What a retry would do, decided by the very function that decides the retry, on a plain read.

Nothing is written or locked, and neither Vault nor the file store is asked. A reply has names and counts, never a value.
Quotas are not counted: what is left of them may be another a moment later.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import orjson

from app.access.auth import Principal
from app.errors import Invalid, MachineNotFound, PoolNotFound, Refusal, RunNotFound, SessionNotFound
from app.runs import carried, projection, staging
from app.runs.retry_rules import Next, decide, overridden
from app.runs.retry_statements import READ
from app.runs.sessions import refuse_contradictions
from app.scheduling import rules
from app.scheduling.lanes import held_lane, lane
from app.scheduling.targets import missing_targets
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Record
from app.stores.statements import statement

SEEN = statement(
    "runs.dry_run.seen",
    f"""
    SELECT r.attempt, r.error IS NOT NULL AS has_error,
           coalesce(o.has_outputs, false) AS has_outputs, coalesce(o.has_history, false) AS has_history,
           (SELECT count(*) FROM run_attachments a
            WHERE a.run_id = r.id AND a.attachment_type = 'output' AND {projection.CURRENT}) AS output_attachments,
           {carried.HAS},
           (SELECT d.due_at FROM deletions d WHERE d.store = '{deletions.SECRETS}' AND d.name = r.secret_path) AS kept_until
    FROM runs r LEFT JOIN LATERAL (
        SELECT output_data IS NOT NULL AS has_outputs, run_message_history IS NOT NULL AS has_history
        FROM run_outputs WHERE run_id = r.id AND attempt = r.attempt
    ) AS o ON true
    WHERE r.id = :run_id AND r.organization_id = :organization_id
    """,
)

# The machines among which it is sought: the one that was named, those of the pools, or all.
_SOUGHT = f"""
                    SELECT * FROM machines WHERE id = coalesce(m.id, r.pinned_machine_id)
                    UNION ALL
                    SELECT one.* FROM pool_machines candidate, LATERAL (
                        SELECT * FROM machines WHERE id = candidate.machine_id LIMIT 1
                    ) AS one
                    WHERE candidate.pool_id = r.pool_ids[1] AND coalesce(m.id, r.pinned_machine_id) IS NULL
                      AND {rules.in_all_pools("r", "candidate.machine_id")}
                    UNION ALL
                    SELECT * FROM machines
                    WHERE organization_id = r.organization_id AND coalesce(m.id, r.pinned_machine_id) IS NULL
                      AND coalesce(cardinality(r.pool_ids), 0) = 0
"""


def placement(source: str) -> str:
    """SQL for where runs would go as a retry would leave them in the queue: the conditions of placement and of
    scheduling_reason are asked of them. `source` gives :organization_id and the other columns of PLACEMENT's."""
    return f"""
    SELECT r.lane, m.id::text AS session_machine_id, {projection.scheduling_reason()} AS reason,
           (SELECT count(*) FROM (
                SELECT FROM ({_SOUGHT}) AS t
                WHERE t.organization_id = r.organization_id AND {rules.idle("t")}
                  AND (t.reserved_session_id IS NULL OR t.reserved_session_id = r.session_id)
                LIMIT 1000
           ) AS eligible) AS eligible_machines
    FROM (
        SELECT :organization_id::text AS organization_id, 'scheduling' AS status, NULL::uuid AS assigned_machine_id,
               now() AS queued_at, {source}
    ) AS r {projection.RUN_SOURCE}
    """


PLACEMENT = statement(
    "runs.dry_run.placement",
    placement(
        """
        :run_id::uuid AS id, :pinned_machine_id::uuid AS pinned_machine_id, :pool_ids::uuid[] AS pool_ids,
        :session_id::uuid AS session_id, :lane::text AS lane, :queue_rank::smallint AS queue_rank
        """
    ),
)


async def dry_run(services: Services, principal: Principal, run_id: UUID, options: RunRetry) -> dict[str, Any]:
    """What the retry would do. Raises RunNotFound, PayloadTooLarge, and Invalid if that is the retry's first refusal."""
    refuse_contradictions(options.session_id, options.start_session)
    staging.check_sizes(services, options.sensitive_input_values, options.file_inputs)
    named = {"run_id": run_id, "organization_id": principal.organization_id}
    new_session_id = uuid4()
    async with services.database.transaction(snapshot=True) as connection:
        run = await connection.fetchrow(
            READ,
            run_ids=[run_id],
            organization_ids=[principal.organization_id],
            session_ids=[options.session_id],
            not_befores=[options.not_before],
        )
        seen = await connection.fetchrow(SEEN, **named)
        missing = await missing_targets(connection, principal.organization_id, options, lock=False)
        decided = decide(
            run,
            options,
            new_session_id=new_session_id,
            expected_attempt=options.expected_attempt,
            cooldown_seconds=services.settings.retry_cooldown_seconds,
            missing=missing,
        )
        refusals, following = decided.refusals, decided.following
        if run is None or seen is None or following is None:
            raise RunNotFound
        if refusals and isinstance(refusals[0], Invalid):
            raise refusals[0]
        placement = await _placement(connection, named, _unless_missing(following, missing))
    replaced = overridden(options)
    return {
        "run_id": str(run_id),
        "attempt": seen["attempt"] + 1,
        "would_retry": not refusals,
        "refusals": [_shown(refusal) for refusal in refusals],
        "cleared": {
            "outputs": seen["has_outputs"],
            "history": seen["has_history"],
            "error": seen["has_error"],
            "output_attachments": seen["output_attachments"],
        },
        "kept": _kept(run, seen, following, replaced),
        "replaced": replaced,
        "secrets": _secrets(run, seen, options),
        "placement": {
            "pinned_machine_id": following.pinned_machine_id and str(following.pinned_machine_id),
            "pool_ids": None if following.pool_ids is None else [str(pool_id) for pool_id in following.pool_ids],
            **placement,
        },
    }


def _unless_missing(following: Next, missing: Sequence[Refusal]) -> Next:
    """The same with ids that nobody has for what the organization does not have: another's machine, pool or session is looked
    for as one that does not exist, so that the reply says nothing of it."""
    gone = {type(refusal) for refusal in missing}
    pinned, pool_ids, session = following.pinned_machine_id, following.pool_ids, following.session
    if MachineNotFound in gone:
        pinned = uuid4()
    if PoolNotFound in gone:
        pool_ids = [uuid4()]
    if SessionNotFound in gone:
        session = replace(session, id=uuid4())
    new_lane, rank = lane(session.id, pinned, pool_ids, following.is_priority)
    new_lane = held_lane(following.not_before, new_lane)
    return Next(pinned, pool_ids, following.is_priority, session, new_lane, rank, following.not_before)


def _shown(refusal: Refusal) -> dict[str, Any]:
    detail = refusal.errors[0][1] if isinstance(refusal, Invalid) else refusal.detail
    return {"status": refusal.status, "code": refusal.code, "detail": detail}


def _kept(run: Record, seen: Record, following: Next, replaced: list[str]) -> list[str]:
    """Names of what the run has, and still has after the retry."""
    has = {
        **{one.name: seen[f"has_{one.name}"] for one in carried.REPLACED},
        "sensitive_input_values": run["secret_path"] is not None,
        "file_inputs": run["input_count"] > 0,
        "machine_id": following.pinned_machine_id is not None,
        "pool_ids": bool(following.pool_ids),
        "session_id": run["session_id"] is not None and following.session.id == run["session_id"],
        "session_alias": run["session_alias"] is not None and following.session.alias == run["session_alias"],
        "release_session_after": following.session.release_after is not None,
        "is_priority": following.is_priority,
        **{one.name: seen[f"has_{one.name}"] for one in carried.CARRIED if not one.is_replaced},
    }
    return [name for name, present in has.items() if present and name not in replaced]


def _secrets(run: Record, seen: Record, options: RunRetry) -> dict[str, Any]:
    """Names of the next attempt's secrets; until when those that it keeps are still there."""
    if options.sensitive_input_values is not None:
        return {"names": sorted(options.sensitive_input_values), "kept_until": None}
    if run["secret_path"] is None:
        return {"names": [], "kept_until": None}
    return {
        "names": sorted(orjson.loads(run["sensitive_input_aliases"])),
        "kept_until": seen["kept_until"] if run["secret_is_kept"] else None,
    }


async def _placement(connection: Connection, named: dict[str, Any], following: Next) -> dict[str, Any]:
    row = await connection.fetchrow(
        PLACEMENT,
        **named,
        pinned_machine_id=following.pinned_machine_id,
        pool_ids=following.pool_ids,
        session_id=following.session.id,
        lane=following.lane,
        queue_rank=following.queue_rank,
    )
    found = dict(row or {})
    waits = found["reason"] in ("waiting_for_session", "not_before")
    return {
        "session_machine_id": found["session_machine_id"],
        "eligible_machines": found["eligible_machines"],
        "expected_reason": "assigned" if found["eligible_machines"] and not waits else found["reason"],
    }
