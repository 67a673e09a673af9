"""The rules of a retry, as pure functions of the request and the run's row. Nothing is read, written or made up here."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil
from uuid import UUID

import orjson

from app.access.auth import Actor, Principal
from app.errors import (
    AttemptChanged,
    InputAttachmentsExpired,
    InputExpiresBefore,
    Invalid,
    MachineDeleted,
    PoolDeleted,
    Refusal,
    RetryTooSoon,
    RunNotFound,
    RunNotTerminal,
    SensitiveInputsExpired,
)
from app.idempotency import WriteRequest
from app.models import TERMINAL
from app.runs.sessions import Session, next_session
from app.scheduling.held import held_until, too_far_ahead
from app.scheduling.lanes import held_lane, lane
from app.schemas.runs import RunRetry
from app.stores.database import Record


@dataclass(frozen=True, slots=True)
class Retry:
    """What a request, a bulk retry or a policy asks for: retry this run of this organization, with these options."""

    run_id: UUID
    organization_id: str
    actor: Actor
    options: RunRetry
    expected_attempt: int | None = None  # if the run is at another attempt, the retry is refused
    principal: Principal | None = None  # its quotas on waiting runs count; None: no quota
    write: WriteRequest | None = None  # its Idempotency-Key gets the reply; None: the reply is not stored
    traceparent: str | None = None

    @classmethod
    def of(cls, write: WriteRequest, run_id: UUID, options: RunRetry) -> "Retry":
        """What a request asks for."""
        principal, expected = write.principal, options.expected_attempt
        actor = write.actor(options.reason)
        return cls(run_id, principal.organization_id, actor, options, expected, principal, write, write.traceparent)


@dataclass(frozen=True, slots=True)
class Next:
    """The values that the next attempt starts with."""

    pinned_machine_id: UUID | None
    pool_ids: list[UUID] | None
    is_priority: bool
    session: Session
    lane: str
    queue_rank: int
    not_before: datetime | None  # None: the run takes its place in the queue at once


@dataclass(frozen=True, slots=True)
class Decision:
    """The next attempt, and everything that speaks against it, what counts most first. No attempt: there is no run."""

    refusals: Sequence[Refusal]
    following: Next | None


def decide(
    run: Record | None,
    options: RunRetry,
    *,
    new_session_id: UUID | None = None,
    expected_attempt: int | None = None,
    cooldown_seconds: int = 0,
    missing: Sequence[Refusal] = (),
) -> Decision:
    """Decide about a row of READ. `missing` has the refusals of targets that the organization does not have.

    Each step of a retry and the dry run decide by this one function.
    """
    if run is None:
        return Decision([RunNotFound()], None)
    refusals: list[Refusal] = []
    if expected_attempt not in (None, run["attempt"]):
        refusals.append(AttemptChanged(run["attempt"]))
    has_ended = run["status"] in TERMINAL
    if not has_ended:
        refusals.append(RunNotTerminal(run["status"]))
    try:
        session = next_session(run, options, new_session_id)
    except Invalid as contradiction:
        refusals.append(contradiction)
        session = next_session(run, options.model_copy(update={"session_alias": None}), new_session_id)
    not_before = held_until(options.not_before, run["now"])
    if not_before is not None and (too_late := too_far_ahead(not_before, run["now"])) is not None:
        refusals.append(too_late)
    # An active run keeps its secrets and its files.
    keeps_secret = options.sensitive_input_values is None and run["secret_path"] is not None
    if has_ended and keeps_secret and not run["secret_is_kept"]:
        refusals.append(SensitiveInputsExpired(sorted(orjson.loads(run["sensitive_input_aliases"]))))
    if has_ended and options.file_inputs is None and run["input_is_expired"]:
        refusals.append(InputAttachmentsExpired())
    elif has_ended and options.file_inputs is None and not_before is not None and run["input_expires_before"]:
        refusals.append(InputExpiresBefore())
    refusals += missing
    following = _next(run, options, session, not_before)
    if (gone := _deleted_target(run, options, following)) is not None:
        refusals.append(gone)
    if cooldown_seconds and has_ended and (wait := _cools_down(run, cooldown_seconds, not_before)) is not None:
        refusals.append(wait)
    return Decision(refusals, following)


def _next(run: Record, options: RunRetry, session: Session, not_before: datetime | None) -> Next:
    """An assignment is always dropped, a pin only by pool_ids."""
    pinned = options.machine_id
    if pinned is None and options.pool_ids is None:
        pinned = run["pinned_machine_id"]
    pool_ids = run["pool_ids"] if options.pool_ids is None else options.pool_ids
    is_priority = run["is_priority"] if options.is_priority is None else options.is_priority
    wanted, rank = lane(session.id, pinned, pool_ids, is_priority)
    return Next(pinned, pool_ids, is_priority, session, held_lane(not_before, wanted), rank, not_before)


def _deleted_target(run: Record, options: RunRetry, following: Next) -> Refusal | None:
    """Why a run cannot go where it has always gone. If a machine is reserved for its session, it goes there."""
    if options.machine_id is not None or options.pool_ids is not None or following.pinned_machine_id is not None:
        return None
    session_id = run["session_id"] if options.session_id is None else options.session_id
    if run["session_has_machine"] and following.session.id is not None and following.session.id == session_id:
        return None
    if run["pin_is_deleted"]:
        return MachineDeleted()
    return PoolDeleted() if run["pool_is_deleted"] else None


def _cools_down(run: Record, cooldown_seconds: int, not_before: datetime | None) -> RetryTooSoon | None:
    """Why a run that has ended may not be retried yet, or not for that time."""
    works_at = run["changed_at"] + timedelta(seconds=cooldown_seconds)
    left = (works_at - run["now"]).total_seconds()
    if not 0 < left <= cooldown_seconds:  # longer: the database's clock was set back; that counts as over
        return None
    if not_before is not None and works_at <= not_before:
        return None
    return RetryTooSoon(ceil(left), f"{works_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z")


def overridden(options: RunRetry) -> list[str]:
    """Names of the fields that change something, for the archive; never values."""
    changed = {name for name in options.model_fields_set if getattr(options, name) is not None}
    if options.reuse_session is not False:
        changed.discard("reuse_session")
    if not options.start_session:
        changed.discard("start_session")
    if options.automatic_retries is not False:
        changed.discard("automatic_retries")
    if not options.avoid_last_machine:
        changed.discard("avoid_last_machine")
    return sorted(changed - {"reason", "expected_attempt"})
