"""Report: an executor's PATCH of a run, decided under the run's lock.

It knows which transitions a report may make. What follows when a run ends is in ending.py.
"""

from typing import Any
from uuid import UUID

from sqlalchemy import Boolean, ColumnElement, Text, bindparam, case, func, literal_column, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute

from app.access.auth import SEEN, Principal
from app.errors import InsufficientScope, Invalid, InvalidTransition, RunNotFound
from app.events import By, announce, record_events
from app.handoff import dispatches
from app.idempotency import Reply, WriteRequest, once
from app.models import TERMINAL, Run, RunStatus, Workflow
from app.runs import fences, moving, projection, replays
from app.runs.ending import LEAVES, drop_plans, ended, release
from app.runs.outputs import SAVE_OUTPUTS, SAVED
from app.schemas.runs import RunUpdate
from app.services import Services
from app.stores.database import Connection
from app.stores.documents import encode
from app.stores.statements import constant, fragment, json_bytes, statement

LOCK_RUN = statement(
    "runs.report.lock", f"SELECT {fences.COLUMNS}, {LEAVES} FROM runs r WHERE id = :run_id AND {SEEN} FOR NO KEY UPDATE"
)

OUTPUTS_OF = statement(
    "runs.report.outputs_of",
    f"""
    SELECT count(*) FROM run_attachments a
    WHERE a.run_id = :run_id AND a.attachment_type = 'output' AND a.id = ANY(:ids::uuid[])
      AND {projection.CURRENT} AND {projection.VISIBLE}
    """,
)


def _if_named(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """What the report names is set, to null too; anything else stays."""
    given = bindparam(column.key, type_=column.type)
    return case((bindparam(f"names_{column.key}", type_=Boolean), given), else_=column)


_status = bindparam("status", type_=Text)
_starts = bindparam("starts", type_=Boolean)
_ends = bindparam("ends", type_=Boolean)
_now = func.clock_timestamp()  # the database's: silence is measured by it, and servers' clocks differ
_started_at = func.coalesce(
    bindparam("started_at", type_=Run.started_at.type), case((_starts, _now), else_=Run.started_at)
)
_ended_at = func.coalesce(bindparam("ended_at", type_=Run.ended_at.type), Run.ended_at, case((_ends, _now)))

# The executor reads the workflow's prompt once the run is `running`.
_workflow_version = (
    select(Workflow.version)
    .where(Workflow.id == Run.workflow_id)
    .correlate(Run)
    .limit(literal_column("1"))
    .scalar_subquery()
)

_reported = (
    update(Run)
    .where(Run.id == bindparam("run_id"))
    .values(
        {
            Run.status: _status,
            Run.input_values: _if_named(Run.input_values),
            Run.error: _if_named(Run.error),
            Run.error_code: _if_named(Run.error_code),
            Run.release_session_after: _if_named(Run.release_session_after),
            Run.started_at: _started_at,
            Run.ended_at: case((_ended_at.is_not(None), func.greatest(_ended_at, _started_at))),
            Run.changed_at: case((or_(_starts, _ends), _now), else_=Run.changed_at),
            Run.claim: case((_starts, bindparam("claim", type_=Run.claim.type)), else_=Run.claim),
            Run.claim_attempt: case((_starts, Run.attempt), else_=Run.claim_attempt),
            Run.workflow_version: case((_starts, _workflow_version), else_=Run.workflow_version),
            Run.reported_at: case((_status == constant("running"), _now), else_=Run.reported_at),
        }
    )
    .returning(Run.id, Run.organization_id, Run.attempt, Run.assigned_machine_id, Run.session_id)
    .cte("reported")
)

# What silence.py wants to know of the machine. Mostly it is as it was, and nothing is written.
_begun = (
    fragment(
        """
        UPDATE machines SET starts_with_claim = :claim::uuid IS NOT NULL, begun_session_id = reported.session_id
        FROM reported WHERE :starts::boolean AND machines.id = (SELECT assigned_machine_id FROM reported)
          AND (starts_with_claim, begun_session_id) IS DISTINCT FROM (:claim::uuid IS NOT NULL, reported.session_id)
        """
    )
    .columns()
    .cte("begun")
)

# An event for a new status; none for more of the same.
_event = "CASE WHEN :starts::boolean THEN 'started' ELSE 'ended' END"
_recorded = record_events(
    "reported", _event, from_status=":before::text", to_status=":status::text", changed=":changed::text[]"
)

UPDATE = statement(
    "runs.report.update",
    select(literal_column("1"))
    .select_from(_reported)
    .add_cte(
        _reported, _begun, fragment(f"{_recorded} WHERE :starts::boolean OR :ends::boolean").columns().cte("recorded")
    ),
)

# Only a retry reopens a terminal run.
TRANSITIONS = {
    RunStatus.SCHEDULING: {RunStatus.RUNNING, RunStatus.ERROR, RunStatus.CANCELLED},
    RunStatus.RUNNING: TERMINAL,
}

# The code of a plan that was dropped by a request.
REQUESTED = "requested"

# What an attempt produces: a run that waits for its attempt has none of it.
PRODUCED = (
    "error",
    "error_code",
    "output_data",
    "run_message_history",
    "output_attachment_ids",
    "started_at",
    "ended_at",
)


async def report(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    """An executor's PATCH, decided under the row lock. Raises every refusal of the route."""
    if "next_retry_at" in options.model_fields_set:
        return await _drop_planned_retry(services, write, run_id, options)
    if not moving.FIELDS.isdisjoint(options.model_fields_set):
        return await moving.move(services, write, run_id, options)
    _refuse_scope(write.principal, options)
    _refuse_times(options)
    machine_id: UUID | None = None

    async def work(connection: Connection) -> Reply:
        nonlocal machine_id
        run = await connection.fetchrow(LOCK_RUN, run_id=run_id, **write.principal.sees())
        if run is None:
            raise RunNotFound
        fences.refuse_late(run, options, only_stops=_only_stops(options))
        current = RunStatus(run["status"])
        status = options.status or current
        _refuse_transition(current, status, options)
        if write.principal.machine_id is not None and current in TERMINAL and run["claim"] is None:
            _refuse_more_than_status(current, options)
        if options.output_attachment_ids:
            wanted = set(options.output_attachment_ids)
            if await connection.fetchval(OUTPUTS_OF, run_id=run_id, ids=list(wanted)) != len(wanted):
                raise Invalid(
                    (
                        ("body", "output_attachment_ids"),
                        "Must be ids of output attachments of this run; upload them with POST /v1/run-attachments first.",
                        "output_attachment_ids",
                    )
                )
        if services.settings.hands_over and _calls_off(current, status):
            await dispatches.cancel(connection, [run_id])
        changes = _update(run_id, current, status, options)
        await connection.execute(UPDATE, **changes, **write.actor(options.reason).parameters())
        if options.model_fields_set.intersection(SAVED):
            values = {name: json_bytes(getattr(options, name)) for name in SAVED}
            named = {f"names_{name}": name in options.model_fields_set for name in SAVED}
            await connection.execute(SAVE_OUTPUTS, run_id=run_id, attempt=run["attempt"], **values, **named)
        has_event = False
        if status in TERMINAL and current not in TERMINAL:
            is_watched, has_policy = run["is_watched_and_has_policy"]
            has_event = await ended(
                connection,
                [run_id],
                status,
                services.settings,
                has_secrets=run["has_secrets"],
                has_session=run["has_session"],
                is_watched=is_watched,
                has_policy=has_policy,
            )
        elif status in TERMINAL and options.release_session_after:
            await release(connection, [run_id])
        if status is not current:
            by: By = "caller" if status is RunStatus.CANCELLED else "executor"
            announce(connection, status.value, by, [run_id], organization_id=write.principal.organization_id)
        shown = encode(await projection.get(connection, run_id, write.principal))
        machine_id = run["assigned_machine_id"]
        return Reply(200, shown, [run_id], has_event=has_event)

    reply = await once(services, write, work, replays.RUN)
    if machine_id is not None and not _only_stops(options):  # anybody can cancel: no sign of life
        services.signs_of_life.note(write.principal.organization_id, machine_id)
    return reply


# The fields that a request may have beside next_retry_at.
_DROPPING = {"next_retry_at", "reason"}


async def _drop_planned_retry(services: Services, write: WriteRequest, run_id: UUID, options: RunUpdate) -> Reply:
    """Drop the retry that the workflow's policy has planned, if there is one: this attempt was the last.

    Raises InsufficientScope, Invalid, RunNotFound and AttemptSuperseded.
    """
    principal = write.principal
    if not principal.may("runs:write"):
        raise InsufficientScope(["runs:write"], "next_retry_at needs runs:write; nothing was changed.")
    if others := sorted(options.model_fields_set - _DROPPING - fences.FIELDS):
        sentence = "Not together with next_retry_at; nothing was changed. Send it in a request of its own."
        raise Invalid(*((("body", name), sentence, "not_together") for name in others))

    async def work(connection: Connection) -> Reply:
        run = await connection.fetchrow(LOCK_RUN, run_id=run_id, **principal.sees())
        if run is None:
            raise RunNotFound
        fences.refuse_late(run, options, only_stops=True)
        actor, settings = write.actor(options.reason), services.settings
        has_event = await drop_plans(connection, {run_id: REQUESTED}, [run["attempt"]], settings, actor)
        shown = encode(await projection.get(connection, run_id, principal))
        return Reply(200, shown, [run_id], has_event=has_event)

    return await once(services, write, work, replays.RUN)


# All that a key without runs:execute may send: enough to stop a run. No claim is needed for that.
_STOPPING = {"status", "reason", "release_session_after"}


def _only_stops(options: RunUpdate) -> bool:
    return options.status in (None, RunStatus.CANCELLED) and options.model_fields_set <= _STOPPING | fences.FIELDS


def _refuse_scope(principal: Principal, options: RunUpdate) -> None:
    """Raises InsufficientScope for a report of a key that may only stop runs, and Invalid for one that does not say enough."""
    if not principal.may("runs:execute") and not (_only_stops(options) and options.model_fields_set <= _STOPPING):
        raise InsufficientScope(
            ["runs:execute"],
            "A key without runs:execute may send only status: cancelled, reason and release_session_after, or not_before.",
        )
    fences.require(principal, options)
    fences.check(options)


def _refuse_times(options: RunUpdate) -> None:
    """Raises Invalid for an end before the start in one report."""
    if options.started_at is not None and options.ended_at is not None and options.ended_at < options.started_at:
        raise Invalid((("body", "ended_at"), "Must not be before started_at.", "times_contradict"))


def _calls_off(current: RunStatus, status: RunStatus) -> bool:
    """Whether an executor is to be told: what it has ended itself it knows."""
    is_end = status in TERMINAL and current not in TERMINAL
    return is_end and (status is RunStatus.CANCELLED or current is RunStatus.SCHEDULING)


def _refuse_transition(current: RunStatus, status: RunStatus, options: RunUpdate) -> None:
    if status != current and status not in TRANSITIONS.get(current, ()):
        hint = "Only POST /v1/runs/{run_id}/retry reopens it." if current in TERMINAL else "Report `running` first."
        raise InvalidTransition(f"A run that is {current} cannot become {status}. {hint}", current_status=current.value)
    if status is RunStatus.SCHEDULING and any(getattr(options, name) is not None for name in PRODUCED):
        raise InvalidTransition(
            "A scheduling run accepts no outputs, times, errors or history; report `running` first.",
            current_status=current.value,
        )


def _refuse_more_than_status(current: RunStatus, options: RunUpdate) -> None:
    """Raises InvalidTransition for an executor that would change a run that has ended and that no executor's claim began."""
    if options.model_fields_set - fences.FIELDS - {"status", "reason"}:
        raise InvalidTransition(
            f"The run ended as {current} before this executor began it, so it accepts no report. Nothing was changed.",
            current_status=current.value,
        )


# Names that say nothing of what changed.
_NOT_CHANGES = {"status", "reason", *fences.NAMES}


def _update(run_id: UUID, current: RunStatus, status: RunStatus, options: RunUpdate) -> dict[str, Any]:
    """The parameters of UPDATE that say what changes."""
    given = options.model_fields_set
    return {
        "run_id": run_id,
        "status": status.value,
        "before": current.value,
        "starts": status is RunStatus.RUNNING and current is not status,
        "ends": status in TERMINAL and current is not status,
        "input_values": json_bytes(options.input_values),
        "names_input_values": "input_values" in given,
        "error": options.error,
        "names_error": "error" in given,
        "error_code": options.error_code,
        "names_error_code": "error_code" in given,
        "release_session_after": options.release_session_after,
        "names_release_session_after": "release_session_after" in given,
        "claim": options.claim,
        # Executors' clocks may be wrong: they change nothing of a run that has ended.
        "started_at": None if current in TERMINAL else options.started_at,
        "ended_at": None if current in TERMINAL else options.ended_at,
        "changed": sorted(given - _NOT_CHANGES),
    }
