"""The workflow: one attempt of a run on one machine, from its hand-off to its end.

Temporal brings the attempt to an executor, notices when one dies, hands on a cancellation and keeps the time. What the run is
at, only our database knows: the claim decides who begins it (so a second delivery is safe), and when a delivery has failed,
`conclude` looks there. It imports nothing of ours: a history must replay the same years later (docs/temporal.md, "Upgrades").
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, TimeoutError, TimeoutType  # noqa: A004 - Temporal's

WORKFLOW, EXECUTE, CONCLUDE = "run_attempt", "execute_run", "conclude"
QUEUE = "runs-api"  # the queue of the workflow workers (`python -m app worker`)
DELIVERIES = 3
REPORTED, SUPERSEDED = "reported", "superseded"  # what executors answer; anything else says that they gave it up
NOT_BEGUN = "not_begun"  # answer of `conclude` if no executor has begun the run: it can be delivered again

_CONCLUDE_SECONDS = 10.0
_AGAIN_AFTER = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))


@dataclass(frozen=True)
class Run:
    """What an executor is given: ids and nothing else, because histories are clear text."""

    run_id: str
    attempt: int
    assignment: int
    machine_id: str
    organization_id: str


@dataclass(frozen=True)
class Order:
    """The workflow's input."""

    run: Run
    queue: str
    heartbeat_seconds: float
    timeout_seconds: float


@dataclass(frozen=True)
class Conclusion:
    """A delivery came to nothing. `why` is one of `silent`, `timeout`, `failed`, `refused`, `cancelled`."""

    run: Run
    why: str
    is_last: bool


@workflow.defn(name=WORKFLOW)
class RunAttempt:
    """Deliver until an executor has begun the run, and make sure that the run ends."""

    @workflow.run
    async def run(self, order: Order) -> str:
        """How it went, for people who look at the history."""
        for delivery in range(1, DELIVERIES + 1):
            try:
                answer: object = await workflow.execute_activity(
                    EXECUTE,
                    order.run,
                    task_queue=order.queue,
                    heartbeat_timeout=timedelta(seconds=order.heartbeat_seconds),
                    start_to_close_timeout=timedelta(seconds=order.timeout_seconds),
                    # Whether to deliver again is not for the engine to say: see `conclude`.
                    retry_policy=RetryPolicy(maximum_attempts=1),
                    cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                )
                if answer == REPORTED:
                    return REPORTED
                why = "refused" if answer == SUPERSEDED else "failed"
            except ActivityError as failed:
                why = _why(failed)
            is_last = delivery == DELIVERIES or why == "cancelled"
            outcome = await _conclude(Conclusion(order.run, why, is_last))
            if outcome != NOT_BEGUN:
                break
        return outcome


async def _conclude(conclusion: Conclusion) -> str:
    """Until it has been done, also when the workflow is cancelled meanwhile."""
    concluded: asyncio.Task[str] = workflow.start_activity(
        CONCLUDE,
        conclusion,
        result_type=str,
        start_to_close_timeout=timedelta(seconds=_CONCLUDE_SECONDS),
        retry_policy=_AGAIN_AFTER,
    )
    try:
        return await asyncio.shield(concluded)
    except asyncio.CancelledError:
        return await concluded


def _why(failed: ActivityError) -> str:
    if workflow.cancellation_reason() is not None:
        return "cancelled"
    cause = failed.cause
    if isinstance(cause, TimeoutError):
        return "silent" if cause.type == TimeoutType.HEARTBEAT else "timeout"
    return "failed"
