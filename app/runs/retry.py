"""Retry a finished run in place: check -> stage -> switch -> settle.

check    plain reads, only to refuse early, before anything is written outside (skipped without secrets and files)
stage    new secrets and files are written under fresh names that are on the deletion list first (staging.py)
switch   one statement: archive, clear, requeue, and take what was staged off the deletion list. It takes effect only if the
         run's row is still the one that was read when the rules decided, and if none of what was staged was condemned.
         Else, and where more than the row decides (a target, inputs or a secret that are kept), one transaction: lock the
         run, decide every rule on what the lock shows, do the same; then commit
settle   after the commit the background task deletes what was replaced and looks for a machine (background.py)

A process killed anywhere leaves the run wholly before or wholly after: the switch is the only step that changes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, timedelta
from math import ceil
from uuid import UUID, uuid4

import orjson

from app import in_flight
from app.auth import Actor, Principal
from app.errors import (
    AttemptChanged,
    IdempotencyInProgress,
    InputAttachmentsExpired,
    Invalid,
    Refusal,
    RetryTooSoon,
    RunNotFound,
    RunNotTerminal,
    SensitiveInputsExpired,
)
from app.idempotency import Reply, WriteRequest, attempt_or_replay, check_or_replay
from app.models import TERMINAL
from app.quotas import Standing
from app.runs import quotas, replays, staging
from app.runs.retry_statements import LOCK, READ, SWITCH, SWITCH_STAGED
from app.runs.sessions import Session, next_session, refuse_contradictions
from app.runs.staging import Staged
from app.scheduling.targets import lane, missing_targets
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Record, committing
from app.stores.deletions import Name
from app.stores.statements import Statement, json_bytes

# --- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Next:
    """What the next attempt starts with, as far as the run's row says it."""

    pinned_machine_id: UUID | None
    pool_ids: list[UUID] | None
    is_priority: bool
    session: Session
    lane: str
    queue_rank: int


def decide(
    run: Record | None,
    options: RunRetry,
    *,
    new_session_id: UUID,
    expected_attempt: int | None = None,
    cooldown_seconds: int = 0,
    missing: Sequence[Refusal] = (),
) -> Next | list[Refusal]:
    """The next attempt, or everything that speaks against it, what counts most first.

    `run` is a row of READ, `missing` says which targets the organization does not have. Nothing is read, written or made up
    here: check, switch and the dry run decide by this one function, on what each of them has read.
    """
    if run is None:
        return [RunNotFound()]
    refusals: list[Refusal] = []
    if expected_attempt not in (None, run["attempt"]):
        refusals.append(AttemptChanged(run["attempt"]))
    if run["status"] not in TERMINAL:
        refusals.append(RunNotTerminal(run["status"]))
    following: Next | None = None
    try:
        following = plan(run, options, new_session_id)
    except Invalid as contradiction:
        refusals.append(contradiction)
    if options.sensitive_input_values is None and run["secret_path"] is not None and not run["secret_is_kept"]:
        refusals.append(_expired(run))
    if options.file_inputs is None and run["input_is_expired"]:
        refusals.append(InputAttachmentsExpired())
    refusals += missing
    if cooldown_seconds and (wait := _cools_down(run, cooldown_seconds)) is not None:
        refusals.append(wait)
    return refusals if refusals or following is None else following


def _cools_down(run: Record, cooldown_seconds: int) -> RetryTooSoon | None:
    """Why a run that has ended may not be retried yet."""
    if run["status"] not in TERMINAL:
        return None
    works_at = run["changed_at"] + timedelta(seconds=cooldown_seconds)
    left = (works_at - run["now"]).total_seconds()
    if not 0 < left <= cooldown_seconds:  # more: the database's clock was set back since, and nobody waits for that
        return None
    return RetryTooSoon(ceil(left), f"{works_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z")


def plan(run: Record, options: RunRetry, new_session_id: UUID) -> Next:
    """The next attempt, whether or not it may begin. Raises Invalid for an alias without a session."""
    session = next_session(run, options, new_session_id)
    pinned = next_pin(run, options)
    pool_ids = run["pool_ids"] if options.pool_ids is None else options.pool_ids
    is_priority = run["is_priority"] if options.is_priority is None else options.is_priority
    return Next(pinned, pool_ids, is_priority, session, *lane(session.id, pinned, pool_ids, is_priority))


def next_pin(run: Record, options: RunRetry) -> UUID | None:
    """The pinned machine of the next attempt; an assignment is always dropped, a pin only by pool_ids."""
    if options.machine_id is not None:
        return options.machine_id
    pinned: UUID | None = run["pinned_machine_id"]
    return pinned if options.pool_ids is None else None


def overridden(options: RunRetry) -> list[str]:
    """Names of the fields that change something, for the archive; never values."""
    changed = {name for name in options.model_fields_set if getattr(options, name) is not None}
    if options.reuse_session is not False:
        changed.discard("reuse_session")
    if not options.start_session:
        changed.discard("start_session")
    changed -= {"reason", "expected_attempt"}
    return sorted(changed)


def _expired(run: Record) -> SensitiveInputsExpired:
    return SensitiveInputsExpired(sorted(orjson.loads(run["sensitive_input_aliases"])))


# --- the steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retry:
    """What a request, a bulk retry or a policy asks for: retry this run of this organization, with these options."""

    run_id: UUID
    organization_id: str
    actor: Actor
    options: RunRetry
    expected_attempt: int | None = None  # if the run is at another attempt, the retry is refused
    principal: Principal | None = None  # whose quotas on waiting runs count; None: nobody's
    write: WriteRequest | None = None  # the request whose Idempotency-Key gets the reply; None: the reply is not stored
    traceparent: str | None = None

    @classmethod
    def of(cls, write: WriteRequest, run_id: UUID, options: RunRetry) -> "Retry":
        """What a request asks for."""
        principal, actor = write.principal, write.actor(options.reason)
        expected = options.expected_attempt
        return cls(run_id, principal.organization_id, actor, options, expected, principal, write, write.traceparent)


@dataclass(frozen=True, slots=True)
class Busy:
    """Nothing was changed: another transaction held the run, or changed it since it was read. Ask again."""


Outcome = Reply | Refusal | Busy


def replied(outcome: Outcome) -> Reply:
    """The reply to a request. Raises its refusal."""
    if isinstance(outcome, Refusal):
        raise outcome
    if isinstance(outcome, Busy):
        raise IdempotencyInProgress
    return outcome


async def retry_runs(
    services: Services, retries: Sequence[Retry], *, connection: Connection | None = None
) -> list[Outcome]:
    """Retry these runs, each as if it were alone; the outcomes are in the order of `retries`.

    With `connection` all of it happens in the caller's transaction, which the caller commits. Then secrets and files are not
    possible, no reply is stored under a key, and a run that another transaction holds is Busy.
    """
    outcomes: list[Outcome] = []
    for one in retries:
        try:
            if connection is None:
                outcomes.append(await _retry(services, one))
            else:
                outcomes.append(await _retry_within(connection, services, one))
        except Refusal as refusal:
            outcomes.append(refusal)
    return outcomes


async def _retry_within(connection: Connection, services: Services, retry: Retry) -> Outcome:
    asked = _Asked(retry, uuid4(), services.settings.retry_cooldown_seconds)
    missing = await missing_targets(connection, retry.organization_id, retry.options)
    run, following = asked.next(await asked.read(connection), missing)
    if retry.principal is not None:
        await quotas.admit(connection, services.run_quotas, retry.principal, waiting=1)
    if run["secret_path"] is not None and not await deletions.reclaim(connection, run["secret_path"]):
        return Busy()
    reply = await _write(connection, SWITCH, asked, run, following, Staged(), quotas.NO_QUOTA, input_ids=None)
    return Busy() if reply is None else reply


@dataclass(frozen=True, slots=True)
class _Asked:
    """A retry; every step decides anew on what it has read."""

    retry: Retry
    new_session_id: UUID
    cooldown_seconds: int

    @property
    def options(self) -> RunRetry:
        return self.retry.options

    async def read(self, connection: Connection) -> Record | None:
        """Raises NoRoom and QuotaExceeded for a run whose reply would be too much now."""
        retry = self.retry
        row = await connection.fetchrow(READ, run_id=retry.run_id, organization_id=retry.organization_id)
        if row is not None:
            in_flight.hold_reply(row["kept_octets"])
        return row

    def next(self, run: Record | None, missing: Sequence[Refusal] = ()) -> tuple[Record, Next]:
        """The run as it was read and its next attempt. Raises the first of the refusals."""
        decided = decide(
            run,
            self.options,
            new_session_id=self.new_session_id,
            expected_attempt=self.retry.expected_attempt,
            cooldown_seconds=self.cooldown_seconds,
            missing=missing,
        )
        if isinstance(decided, list) or run is None:
            raise decided[0] if isinstance(decided, list) else RunNotFound()
        return run, decided


async def _retry(services: Services, retry: Retry) -> Reply:
    """Reset a finished run and requeue it. Raises every refusal of the route; then nothing has changed."""
    options, principal = retry.options, retry.principal
    write = retry.write or WriteRequest(Principal(UUID(int=0), retry.organization_id, None), None, (), 0, 0)
    refuse_contradictions(options.session_id, options.start_session)
    asked = _Asked(retry, uuid4(), services.settings.retry_cooldown_seconds)
    staged = Staged(aliases=None if options.sensitive_input_values is None else {})
    decided: tuple[Record, Next] | None = None
    if options.sensitive_input_values or options.file_inputs:
        staging.check_sizes(services, options.sensitive_input_values, options.file_inputs)

        async def check(connection: Connection) -> tuple[Record, Next]:
            """Refuse before anything is staged. What is decided here holds for as long as the run's row does not change."""
            run = await asked.read(connection)
            decided = asked.next(run, await missing_targets(connection, retry.organization_id, options))
            if principal is not None:
                await quotas.check(connection, services.run_quotas, principal, waiting=1)
            return decided

        checked = await check_or_replay(services, write, replays.RUN, check)
        if isinstance(checked, Reply):
            return checked
        decided = checked
        [staged] = await staging.stage(
            services, retry.organization_id, [retry.run_id], options.sensitive_input_values, options.file_inputs
        )

    async def switch() -> Reply:
        return await _switch_at_once(services, asked, staged, decided) or await _switch(services, asked, staged)

    return await attempt_or_replay(services, write, switch, replays.RUN)


async def _switch_at_once(
    services: Services, asked: _Asked, staged: Staged, decided: tuple[Record, Next] | None
) -> Reply | None:
    """The switch without a transaction of several statements, where the rules need nothing but the run's row.

    They decide, or have `decided`, on a plain read, and the one statement that writes takes effect only if the row has not
    changed since. None if it has, if what was staged was condemned, or if the retry needs more: then nothing has happened.
    """
    options = asked.options
    if options.pool_ids or options.machine_id is not None or options.session_id is not None:
        return None
    async with services.database.connection() as connection:
        run, following = decided or asked.next(await asked.read(connection))
        keeps_a_secret = options.sensitive_input_values is None and run["secret_path"] is not None
        if keeps_a_secret or (options.file_inputs is None and run["input_count"]):
            return None
        principal = asked.retry.principal
        room = quotas.NO_QUOTA
        if principal is not None:
            room = await quotas.room(connection, services.run_quotas, principal)
        with committing():
            if options.sensitive_input_values is None and options.file_inputs is None:
                reply = await _write(connection, SWITCH, asked, run, following, staged, room, input_ids=[])
            else:
                names, files = deletions.columns(staged.names()), staging.columns({asked.retry.run_id: staged})
                reply = await _write(
                    connection,
                    SWITCH_STAGED,
                    asked,
                    run,
                    following,
                    staged,
                    room,
                    input_ids=[str(file.id) for file in staged.files],
                    **names,
                    **files,
                )
        if reply is None and principal is not None:
            await quotas.check(connection, services.run_quotas, principal, waiting=1)
        return reply


async def _switch(services: Services, asked: _Asked, staged: Staged) -> Reply:
    """Decide every rule on the locked run, and do all that follows from it in the same transaction."""
    retry, standings = asked.retry, tuple[Standing, ...]()
    async with services.database.transaction() as connection:
        await connection.execute(LOCK, run_id=retry.run_id, organization_id=retry.organization_id)
        seen = await asked.read(connection)
        missing = await missing_targets(connection, retry.organization_id, retry.options)
        run, following = asked.next(seen, missing)
        if retry.principal is not None:
            standings = await quotas.admit(connection, services.run_quotas, retry.principal, waiting=1)
        old_secret: str | None = run["secret_path"]
        if old_secret is not None:
            if staged.aliases is not None:
                await deletions.due(connection, [Name("vault", old_secret)])
            elif not await deletions.reclaim(connection, old_secret):
                raise _expired(run)
        new_inputs = None if asked.options.file_inputs is None else [str(file.id) for file in staged.files]
        reply = await _write(connection, SWITCH, asked, run, following, staged, quotas.NO_QUOTA, input_ids=new_inputs)
        if reply is None:  # the row is locked
            raise RunNotFound
        await staging.adopt(connection, {retry.run_id: staged}, retry.organization_id, retry.actor.user_id)
    return replace(reply, standings=standings)


async def _write(
    connection: Connection,
    switch: Statement,
    asked: _Asked,
    run: Record,
    following: Next,
    staged: Staged,
    room: Mapping[str, int | None],
    *,
    input_ids: list[str] | None,
    **more: object,
) -> Reply | None:
    """SWITCH or SWITCH_STAGED, which needs `more`; None if the run is no longer what was read, or there is no `room` for it.

    `input_ids` are those of the reply; None: those that it has.
    """
    retry, options, write = asked.retry, asked.options, asked.retry.write
    key = None if write is None else write.key
    body = await connection.fetchval(
        switch,
        run_id=retry.run_id,
        organization_id=retry.organization_id,
        version=run["version"],
        **room,
        **retry.actor.parameters(),
        by=retry.actor.by,
        bulk_retry_id=retry.actor.bulk_retry_id,
        overridden=overridden(options),
        replaces_inputs=options.file_inputs is not None,
        lane=following.lane,
        queue_rank=following.queue_rank,
        pinned_machine_id=following.pinned_machine_id,
        pool_ids=options.pool_ids,
        is_priority=following.is_priority,
        session_id=following.session.id,
        session_alias=following.session.alias,
        release_session_after=following.session.release_after,
        input_values=json_bytes(options.input_values),
        sensitive_input_aliases=json_bytes(staged.aliases),
        secret_path=staged.secret_path,
        input_ids=input_ids,
        key=key,
        fingerprint=None if write is None or key is None else write.fingerprints[0],
        ttl_seconds=0 if write is None else write.ttl_seconds,
        most_bytes=0 if write is None else write.most_bytes,
        traceparent=retry.traceparent,
        **more,
    )
    return None if body is None else Reply(200, body)
