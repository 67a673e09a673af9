"""Conclude: what becomes of a run when its delivery to an executor came to nothing, decided under the run's lock.

Temporal's workflow asks for it (handoff/), again and again until it is done; so it is fenced like a report, by attempt and
assignment, and doing it twice is doing it once. It knows nothing of Temporal.
"""

from uuid import UUID

from app.access.auth import Actor
from app.config import Settings
from app.events import By
from app.models import TERMINAL, RunStatus
from app.runs.ending import EndedBecause, end_runs
from app.stores.database import Database
from app.stores.statements import statement

LOCK_RUN = statement(
    "runs.conclude.lock",
    """
    SELECT status, attempt, assignment, assigned_machine_id FROM runs
    WHERE id = :run_id AND organization_id = :organization_id FOR NO KEY UPDATE
    """,
)

NOT_BEGUN = "not_begun"


async def conclude(
    database: Database,
    settings: Settings,
    run_id: UUID,
    organization_id: str,
    *,
    attempt: int,
    assignment: int,
    why: str,
    is_last: bool,
) -> str:
    """End the run if it is still at this attempt and an executor has begun it, or this was the last delivery.

    NOT_BEGUN if it can be delivered again; else how it stands, in one word. Raises DatabaseUnavailable.
    """
    async with database.transaction() as connection:
        run = await connection.fetchrow(LOCK_RUN, run_id=run_id, organization_id=organization_id)
        if run is None:
            return "deleted"
        if (run["attempt"], run["assignment"]) != (attempt, assignment):
            return "superseded"
        if run["status"] in TERMINAL:
            return str(run["status"])
        is_begun = run["status"] == RunStatus.RUNNING
        if not is_begun and run["assigned_machine_id"] is None:
            return "superseded"
        if is_begun and why == "refused":
            return "begun_elsewhere"  # by its executor, as one that waits by long poll
        if not is_begun and not is_last:
            return NOT_BEGUN
        status = RunStatus.CANCELLED if why == "cancelled" else RunStatus.ERROR
        sentence, code = None, None
        if status is RunStatus.ERROR:
            sentence, code = _sentence(why, settings, is_begun=is_begun), _code(why, is_begun=is_begun)
        actor = Actor(reason=f"Temporal: {why}")
        # Its executor is gone, or hears of it from Temporal by itself.
        by: By = "silence" if why == "silent" else "service"
        await end_runs(connection, [run_id], status, sentence, settings, actor, by, error_code=code, called_off=False)
        return status.value


def _code(why: str, *, is_begun: bool) -> EndedBecause:
    if not is_begun:
        return "not_started"
    match why:
        case "silent":
            return "executor_lost"
        case "timeout":
            return "run_timeout"
        case _:
            return "executor_gave_up"


def _sentence(why: str, settings: Settings, *, is_begun: bool) -> str:
    if not is_begun:
        return (
            "The run was delivered to its machine's executor several times, and none began it. Retry it when one works."
        )
    match why:
        case "silent":
            seconds = f"{settings.run_heartbeat_seconds:g}"
            return f"The executor gave no sign of life for {seconds} seconds, so the run was ended. Retry it when one is back."
        case "timeout":
            return f"The attempt took longer than {settings.run_timeout_seconds} seconds, so the run was ended."
        case _:
            return "The executor gave the run up without a report. Its own log says why."
