"""Report: an executor's PATCH of a run, decided under the run's lock.

It knows which transitions a report may make. What follows when a run ends is in ending.py.
"""

from typing import Any
from uuid import UUID

from sqlalchemy import func, update

from app.errors import AttemptSuperseded, Invalid, InvalidTransition, RunNotFound
from app.idempotency import Reply, WriteRequest, once
from app.models import TERMINAL, Run, RunStatus
from app.runs import projection
from app.runs.ending import RELEASE, ended
from app.runs.outputs import SAVE_OUTPUTS, SAVED
from app.schemas.runs import RunUpdate
from app.services import Services
from app.stores.database import Connection
from app.stores.statements import json_text, sql

LOCK = "SELECT status, attempt, session_id FROM runs WHERE id = $1 AND organization_id = $2 FOR NO KEY UPDATE"

OUTPUTS_OF = f"""
SELECT count(*) FROM run_attachments a
WHERE a.run_id = $1 AND a.attachment_type = 'output' AND a.id = ANY($2::uuid[]) AND {projection.VISIBLE}
"""

# Only a retry reopens a terminal run.
TRANSITIONS = {
    RunStatus.SCHEDULING: {RunStatus.RUNNING, RunStatus.ERROR, RunStatus.CANCELLED},
    RunStatus.RUNNING: TERMINAL,
}

# What an attempt produces: a run that waits for its attempt has none of it.
PRODUCED = ("error", "output_data", "run_message_history", "output_attachment_ids", "started_at", "ended_at")


async def report(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    """An executor's PATCH, decided under the row lock. Raises every refusal of the route."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        run = await connection.fetchrow(LOCK, run_id, organization_id)
        if run is None:
            raise RunNotFound
        if options.attempt is not None and options.attempt != run["attempt"]:
            raise AttemptSuperseded(run["attempt"])
        current = RunStatus(run["status"])
        status = options.status or current
        _refuse_transition(current, status, options)
        if options.output_attachment_ids:
            wanted = set(options.output_attachment_ids)
            if await connection.fetchval(OUTPUTS_OF, run_id, list(wanted)) != len(wanted):
                raise Invalid(
                    (
                        ("body", "output_attachment_ids"),
                        "Must be ids of output attachments of this run; upload them with POST /v1/run-attachments first.",
                        "output_attachment_ids",
                    )
                )
        await connection.execute(*_update(run_id, current, status, options))
        if options.model_fields_set.intersection(SAVED):
            values = {name: json_text(getattr(options, name)) for name in SAVED}
            named = {f"names_{name}": name in options.model_fields_set for name in SAVED}
            await connection.execute(SAVE_OUTPUTS, run_id=run_id, attempt=run["attempt"], **values, **named)
        if status in TERMINAL and current not in TERMINAL:
            await ended(connection, [run_id], services.settings)
        elif status in TERMINAL and options.release_session_after:
            await connection.execute(RELEASE, [run_id])
        row = await connection.fetchrow(projection.GET_RUN, run_id, organization_id)
        if row is None:  # the row is locked
            raise RunNotFound
        return Reply(200, projection.encode(projection.run(row)))

    return await once(services, write, work)


def _refuse_transition(current: RunStatus, status: RunStatus, options: RunUpdate) -> None:
    if status != current and status not in TRANSITIONS.get(current, ()):
        hint = "Only POST /v1/runs/{run_id}/retry reopens it." if current in TERMINAL else "Report `running` first."
        raise InvalidTransition(f"A run that is {current} cannot become {status}. {hint}")
    if status is RunStatus.SCHEDULING and any(getattr(options, name) is not None for name in PRODUCED):
        raise InvalidTransition(
            "A scheduling run accepts no outputs, times, errors or history; report `running` first."
        )


def _update(run_id: UUID, current: RunStatus, status: RunStatus, options: RunUpdate) -> tuple[Any, ...]:
    """The UPDATE of exactly those columns of the run that the report names, as arguments for `execute`."""
    given = options.model_fields_set
    values: dict[str, Any] = {"status": status.value}
    if "input_values" in given:
        values["input_values"] = json_text(options.input_values)
    for name in ("error", "release_session_after"):
        if name in given:
            values[name] = getattr(options, name)
    for name in ("started_at", "ended_at"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    now = func.clock_timestamp()  # the database's: silence is measured by it, and servers' clocks differ
    if status is RunStatus.RUNNING:
        values["reported_at"] = now
        if current is not status:
            values.setdefault("started_at", now)
    if status in TERMINAL and current is not status:
        values.setdefault("ended_at", func.coalesce(Run.ended_at, now))
    statement, arguments = sql(update(Run).where(Run.id == run_id).values(**values))
    return statement, *arguments
