"""The work on planned retries: those that are due are given to the function that does every retry, a set at a time.

A set is one transaction: a plan goes by the same commit that retries its run, or that says why it was dropped. Each retry
names the attempt it expects, so a plan that a manual retry or a delete has overtaken does nothing. A replica that is killed
loses its locks with its connection, and another one goes on.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from app.access.auth import Actor, Principal
from app.errors import (
    AttemptChanged,
    QuotaExceeded,
    Refusal,
    RetryTooSoon,
    RunNotFound,
    RunNotTerminal,
    Unavailable,
)
from app.idempotency import Reply
from app.retry_policies.rules import reason
from app.runs.ending import drop_plans
from app.runs.retry import Outcome, Retry, retry_runs
from app.scheduling import rules
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores.database import Connection, Record
from app.stores.statements import Statement, statement
from app.telemetry import metrics

log = logging.getLogger("app.retry_policies")

SET = 64  # plans in one transaction
TURNS = 16  # in one round of the loop
BUSY_SECONDS = 0.1  # before a run is tried again that another transaction holds
LOOK_AGAIN_SECONDS = 1.0  # before a run is tried again that found no room
FAILED_SECONDS = 60.0  # before a run is tried again that met a defect

# The code of a plan if the workflow has no policy any more.
POLICY_REMOVED = "policy_removed"

NEXT_DUE = statement(
    "retry_policies.next_due",
    "SELECT extract(epoch FROM min(look_at) - clock_timestamp())::float8 FROM planned_retries",
)

DUE = statement(
    "retry_policies.due",
    f"""
    SELECT p.run_id, p.attempt, p.organization_id, p.rule, p.avoids_last_machine,
           (SELECT r.attempt <> p.attempt OR {rules.is_active("r")} FROM runs r
            WHERE r.id = p.run_id LIMIT 1) AS is_void,
           (SELECT w.retry_policy IS NULL FROM runs r, workflows w
            WHERE r.id = p.run_id AND w.id = r.workflow_id LIMIT 1) AS policy_is_removed
    FROM planned_retries p WHERE p.look_at <= clock_timestamp()
    ORDER BY p.look_at LIMIT :most FOR UPDATE OF p SKIP LOCKED
    """,
)

# Lock the runs that are still at the planned attempt and not locked by another transaction.
LOCK_ENDED = statement(
    "retry_policies.lock_ended",
    f"""
    SELECT run.id FROM unnest(:run_ids::uuid[], :attempts::integer[]) AS wanted (run_id, attempt), LATERAL (
        SELECT id FROM runs
        WHERE id = wanted.run_id AND attempt = wanted.attempt AND NOT {rules.is_active()}
        OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED
    ) AS run
    """,
)

# This transaction has locked the plans of both, so they are where they were.
_THOSE = """
    ctid = ANY (ARRAY(
        SELECT plan.tid FROM unnest(:run_ids::uuid[], :attempts::integer[]) AS wanted (run_id, attempt), LATERAL (
            SELECT ctid AS tid FROM planned_retries WHERE run_id = wanted.run_id AND attempt = wanted.attempt OFFSET 0
        ) AS plan
    ))
"""
REMOVE = statement("retry_policies.remove", f"DELETE FROM planned_retries WHERE {_THOSE}")
POSTPONE = statement(
    "retry_policies.postpone",
    f"UPDATE planned_retries SET look_at = clock_timestamp() + make_interval(secs => :wait_seconds) WHERE {_THOSE}",
)


@dataclass(slots=True)
class _Decided:
    """The outcomes of the plans of a set."""

    retried: list[Record] = field(default_factory=list)
    void: list[Record] = field(default_factory=list)
    busy: list[Record] = field(default_factory=list)
    waiting: list[Record] = field(default_factory=list)
    dropped: list[tuple[Record, str]] = field(default_factory=list)

    def add(self, plan: Record, outcome: Outcome) -> None:
        match outcome:
            case Reply():
                self.retried.append(plan)
            case AttemptChanged() | RunNotFound() | RunNotTerminal():
                self.void.append(plan)
            case QuotaExceeded() | RetryTooSoon() | Unavailable():
                self.waiting.append(plan)
            case Refusal():
                self.dropped.append((plan, outcome.code))
            case _:
                self.busy.append(plan)


class RetryWorker:
    """The work of one process. `round` is one turn of its loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._database = services.database
        self._one_by_one = False  # a set has failed: one of its runs is to blame

    async def round(self) -> bool | float | None:
        """Some sets. Whether there is more to do now, or in how many seconds there will be. Raises DatabaseUnavailable."""
        async with self._database.connection() as connection:
            seconds: float | None = await connection.fetchval(NEXT_DUE)
        if seconds is None or seconds > 0:
            self._one_by_one = False
            return seconds
        for _ in range(TURNS):
            if not await self._turn():  # other replicas have the others
                return BUSY_SECONDS
        return True

    async def _turn(self) -> bool:
        """One set; False if there is none. Raises DatabaseUnavailable."""
        due: Sequence[Record] = ()
        try:
            async with self._database.transaction() as connection:
                due = await connection.fetch(DUE, most=1 if self._one_by_one else SET)
                if due:
                    await self._work(connection, due)
        except Unavailable:
            raise
        except Exception:
            if len(due) == 1:
                async with self._database.transaction() as connection:
                    await _change(connection, POSTPONE, due, wait_seconds=FAILED_SECONDS)
            self._one_by_one = True
            raise
        return bool(due)

    async def _work(self, connection: Connection, due: Sequence[Record]) -> None:
        decided, wanted = _Decided(), list[Record]()
        for plan in due:
            if plan["is_void"]:  # no attempt comes back; and so no run is in the set twice
                decided.void.append(plan)
            elif plan["policy_is_removed"]:
                decided.dropped.append((plan, POLICY_REMOVED))
            else:
                wanted.append(plan)
        outcomes = await retry_runs(self._services, [_retry(plan) for plan in wanted], connection=connection)
        for plan, outcome in zip(wanted, outcomes, strict=True):
            decided.add(plan, outcome)
        has_event = await self._drop(connection, decided)
        await _change(connection, REMOVE, [*decided.retried, *decided.void])
        await _change(connection, POSTPONE, decided.busy, wait_seconds=BUSY_SECONDS)
        await _change(connection, POSTPONE, decided.waiting, wait_seconds=LOOK_AGAIN_SECONDS)

        def tell() -> None:
            for outcome, plans in (("retried", decided.retried), ("void", decided.void)):
                metrics.planned_retries.add(outcome, "", count=len(plans))
            metrics.retries.add("accepted", "", "policy", count=len(decided.retried))
            metrics.transitions.add("scheduling", "service", count=len(decided.retried))
            for plan in decided.retried:
                line = {"event": "run_retried_by_policy", "run_id": plan["run_id"], "attempt": plan["attempt"] + 1}
                log.info(line | {"organization_id": plan["organization_id"]})
            for organization_id in {plan["organization_id"] for plan in decided.retried}:
                self._services.wakeups.wake(organization_id)
            if has_event:
                self._services.wakeups.deliver()

        connection.after_commit(tell)

    async def _drop(self, connection: Connection, decided: _Decided) -> bool:
        """Drop the plans of runs that are not locked; the others are busy. Whether there is an event to send."""
        if not decided.dropped:
            return False
        rows = await connection.fetch(LOCK_ENDED, **_keys(plan for plan, _ in decided.dropped))
        locked = {row["id"] for row in rows}
        dropped = [(plan, code) for plan, code in decided.dropped if plan["run_id"] in locked]
        decided.busy += [plan for plan, _ in decided.dropped if plan["run_id"] not in locked]
        codes: dict[UUID, str] = {plan["run_id"]: code for plan, code in dropped}
        attempts = [plan["attempt"] for plan, _ in dropped]
        return await drop_plans(connection, codes, attempts, self._services.settings, Actor(by="policy"))


_PLAIN = RunRetry()
_AVOIDING = RunRetry.model_validate({"avoid_last_machine": True})


def _retry(plan: Record) -> Retry:
    actor = Actor(reason=reason(plan["rule"]), by="policy")
    # A policy has no key: only the organization's quota on waiting runs counts.
    principal = Principal(UUID(int=0), plan["organization_id"], None)
    return Retry(
        plan["run_id"],
        plan["organization_id"],
        actor,
        _AVOIDING if plan["avoids_last_machine"] else _PLAIN,
        expected_attempt=plan["attempt"],
        principal=principal,
    )


def _keys(plans: Iterable[Record]) -> dict[str, list[object]]:
    kept = list(plans)
    return {"run_ids": [plan["run_id"] for plan in kept], "attempts": [plan["attempt"] for plan in kept]}


async def _change(connection: Connection, how: Statement, plans: Sequence[Record], **more: object) -> None:
    if plans:
        await connection.execute(how, **_keys(plans), **more)
