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
from sqlalchemy import (
    CTE,
    JSON,
    Boolean,
    ColumnElement,
    Integer,
    Text,
    TextClause,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    update,
)

from app import in_flight
from app.errors import (
    InputAttachmentsExpired,
    Invalid,
    Refusal,
    RetryTooSoon,
    RunNotFound,
    RunNotTerminal,
    SensitiveInputsExpired,
)
from app.events import record
from app.idempotency import Reply, WriteRequest, attempt_or_replay, check_or_replay, store_reply
from app.models import TERMINAL, Deletion, Run, RunAttachment, RunAttempt, RunOutput
from app.runs import projection, quotas, replays, staging
from app.runs.sessions import Session, next_session, refuse_contradictions
from app.runs.staging import Staged
from app.scheduling.targets import lane, missing_targets
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Record, committing
from app.stores.deletions import Name
from app.stores.statements import Statement, constant, fragment, json_bytes, statement

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
    works_at = run["ended_at"] + timedelta(seconds=cooldown_seconds)
    left = (works_at - run["now"]).total_seconds()
    # ended_at is by the executor's clock. If it is ahead by more than the cooldown, the clock is wrong: nobody waits for it.
    if not 0 < left <= 2 * cooldown_seconds:
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
    changed.discard("reason")
    return sorted(changed)


def _expired(run: Record) -> SensitiveInputsExpired:
    return SensitiveInputsExpired(sorted(orjson.loads(run["sensitive_input_aliases"])))


# --- the statements ---------------------------------------------------------------------------------------------------

_THE_RUN = (Run.id == bindparam("run_id"), Run.organization_id == bindparam("organization_id"))
_VERSION = literal_column("runs.xmin::text", Text)  # changes with every UPDATE of the row

_INPUTS = (
    select(func.count().label("count"), func.min(RunAttachment.expires_at).label("expires_first"))
    .where(RunAttachment.run_id == Run.id, RunAttachment.attachment_type == constant("input"))
    .lateral("inputs")
)

# What may be long of what the run keeps: the reply shows it.
_KEPT_OCTETS: ColumnElement[int] = sum(
    (
        func.coalesce(func.octet_length(cast(column, Text)), literal_column("0"))
        for column in (Run.input_values, Run.sensitive_input_aliases, Run.main_prompt, Run.model_metadata)
    ),
    start=literal_column("0", Integer),
)

# What the rules need to know of a run. Outputs and history are not read: a megabyte is never loaded to be cleared.
READ = statement(
    "runs.retry.read",
    select(
        _VERSION.label("version"),
        Run.status,
        Run.pinned_machine_id,
        Run.pool_ids,
        Run.is_priority,
        Run.session_id,
        Run.session_alias,
        Run.release_session_after,
        Run.secret_path,
        case((Run.secret_path.is_not(None), Run.sensitive_input_aliases)).label("sensitive_input_aliases"),
        (
            Run.secret_path.is_not(None)
            & exists()
            .where(
                Deletion.store == constant("vault"),
                Deletion.name == Run.secret_path,
                Deletion.condemned_at.is_(None),
                Deletion.due_at > func.clock_timestamp(),
            )
            .correlate(Run)
        ).label("secret_is_kept"),
        _INPUTS.c.count.label("input_count"),
        func.coalesce(_INPUTS.c.expires_first <= func.clock_timestamp(), literal_column("false")).label(
            "input_is_expired"
        ),
        Run.ended_at,
        func.clock_timestamp().label("now"),
        _KEPT_OCTETS.label("kept_octets"),
    )
    .select_from(Run)
    .join(_INPUTS, literal_column("true"))
    .where(*_THE_RUN),
)

# A statement of its own: one that had to wait for a lock sees all other tables as they were when it began to wait.
LOCK = statement("runs.retry.lock", select(Run.id).where(*_THE_RUN).with_for_update(key_share=True))

# A statement still sees what it removes, and not yet what takes its place.
_AFTER = {
    "output_data": "NULL",
    "run_message_history": "NULL",
    "usage_metadata": "NULL",
    "output_attachment_ids": "'[]'::json",
    "input_attachment_ids": f"coalesce(:input_ids::text[], {projection.RUN_COLUMNS['input_attachment_ids']})",
}


def _part(name: str, written: str) -> CTE:
    """A part of the statement in SQL, which speaks of the others by their names."""
    return fragment(written).columns().cte(name)


def _switch_statement(name: str, *guards: TextClause, first: Sequence[CTE] = (), also: Sequence[CTE] = ()) -> Statement:
    """All that a retry always does, in one round trip, if the run is still in the version that the rules saw, and the guards
    hold, which may look at what comes `first`: archive the attempt, list and remove the attachments that go, leave the outputs
    behind (a run has those of its own attempt number), clear and requeue the run, record the event, make the reply and store
    it under the key. What is done `also` must depend on `seen`, which is empty if nothing is to happen.
    """
    archive = (
        Run.id,
        Run.attempt,
        Run.status,
        Run.error,
        Run.assigned_machine_id,
        Run.session_id,
        Run.started_at,
        Run.ended_at,
    )
    seen = (
        select(*archive, Run.organization_id, Run.secret_path)
        .where(*_THE_RUN, bindparam("version", type_=Text) == _VERSION, fragment(quotas.ROOM), *guards)
        .with_for_update(key_share=True)
        .cte("seen")
        .prefix_with("MATERIALIZED")
    )
    # What follows is looked up by the key that was seen. Joined with it, by a plan that was made while the tables were empty,
    # they would all be read.
    run_id = select(seen.c.id).scalar_subquery()
    attempt = select(seen.c.attempt).scalar_subquery()
    archived = (
        insert(RunAttempt)
        .from_select(
            [
                RunAttempt.run_id,
                RunAttempt.attempt,
                RunAttempt.status,
                RunAttempt.error,
                RunAttempt.machine_id,
                RunAttempt.session_id,
                RunAttempt.started_at,
                RunAttempt.ended_at,
                RunAttempt.retried_by_key_id,
                RunAttempt.retried_by_user_id,
                RunAttempt.overridden,
                RunAttempt.reason,
            ],
            select(
                *(seen.c[column.key] for column in archive),
                bindparam("key_id", type_=RunAttempt.retried_by_key_id.type),
                bindparam("user_id", type_=RunAttempt.retried_by_user_id.type),
                bindparam("overridden", type_=RunAttempt.overridden.type),
                bindparam("reason", type_=RunAttempt.reason.type),
            ),
        )
        .cte("archived")
    )
    removed = (
        delete(RunAttachment)
        .where(
            RunAttachment.run_id == run_id,
            or_(RunAttachment.attachment_type == constant("output"), bindparam("replaces_inputs", type_=Boolean)),
        )
        .returning(RunAttachment.storage_path)
        .cte("removed")
    )
    listed = (
        insert(Deletion)
        .from_select(
            [Deletion.store, Deletion.name, Deletion.due_at],
            select(constant("storage"), removed.c.storage_path, func.now()).where(removed.c.storage_path.is_not(None)),
            include_defaults=False,
        )
        .cte("listed")
    )
    superseded = (
        update(RunOutput)
        .values(is_superseded=literal_column("true"))
        .where(RunOutput.run_id == run_id, RunOutput.attempt == attempt)
        .cte("superseded")
    )
    recorded = _part(
        "recorded",
        record(
            "seen",
            "'retried'",
            attempt="attempt + 1",
            from_status="status",
            to_status="'scheduling'",
            changed=":overridden::text[]",
        ),
    )
    aliases = bindparam("sensitive_input_aliases", type_=JSON)
    # A null override keeps what the run has.
    requeued = (
        update(Run)
        .where(Run.id == run_id)
        .values(
            {
                Run.status: constant("scheduling"),
                Run.attempt: Run.attempt + literal_column("1"),
                Run.queued_at: func.clock_timestamp(),
                Run.queued_by_key_id: bindparam("key_id"),
                Run.traceparent: bindparam("traceparent", type_=Run.traceparent.type),
                Run.lane: bindparam("lane"),
                Run.queue_rank: bindparam("queue_rank"),
                Run.error: null(),
                Run.started_at: null(),
                Run.ended_at: null(),
                Run.reported_at: null(),
                Run.assigned_machine_id: null(),
                Run.pinned_machine_id: bindparam("pinned_machine_id"),
                Run.pool_ids: func.coalesce(bindparam("pool_ids", type_=Run.pool_ids.type), Run.pool_ids),
                Run.is_priority: bindparam("is_priority"),
                Run.session_id: bindparam("session_id"),
                Run.session_alias: bindparam("session_alias"),
                Run.release_session_after: bindparam("release_session_after"),
                Run.input_values: func.coalesce(bindparam("input_values", type_=JSON), Run.input_values),
                Run.sensitive_input_aliases: func.coalesce(aliases, Run.sensitive_input_aliases),
                Run.secret_path: case(
                    (aliases.is_(None), Run.secret_path), else_=bindparam("secret_path", type_=Run.secret_path.type)
                ),
            }
        )
        .returning(Run)
        .cte("r")
    )
    # Made here, and not by a statement after it, because it must be stored by the same one.
    shown = (
        select(fragment(f"{projection.document(_AFTER)} AS body, ARRAY[r.id] AS ids"))
        .select_from(fragment(f"r {projection.RUN_SOURCE}"))
        .add_cte(requeued)
        .cte("shown")
        .prefix_with("MATERIALIZED")
    )
    parts = [*first, seen, archived, removed, listed, superseded, recorded, *also, store_reply(shown, status=200)]
    return statement(name, select(literal_column("body")).select_from(shown).add_cte(*parts))


SWITCH = _switch_statement("runs.retry.switch")

# The same, and what was staged becomes the run's: its names go off the list, a secret that it had goes on it, and its new files
# are attached.
SWITCH_STAGED = _switch_statement(
    "runs.retry.switch_staged",
    fragment("(SELECT count(*) FROM held) = cardinality(:names::text[])"),  # all are on the list, and none is condemned
    first=[_part("held", deletions.HELD)],
    also=[
        _part(
            "adopted",
            "DELETE FROM deletions WHERE ctid = ANY (ARRAY(SELECT tid FROM held WHERE EXISTS (SELECT FROM seen)))",
        ),
        _part(
            "due",
            f"""
            INSERT INTO deletions (store, name, due_at)
            SELECT 'vault', secret_path, now() FROM seen WHERE secret_path IS NOT NULL {deletions.DUE_EARLIER}
            """,
        ),
        _part("attached", f"{staging.ATTACHED} WHERE EXISTS (SELECT FROM seen)"),
    ],
)

# --- the steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Retry:
    """One request to retry a run; every step decides anew on what it has read."""

    write: WriteRequest
    run_id: UUID
    options: RunRetry
    new_session_id: UUID
    cooldown_seconds: int

    @property
    def organization_id(self) -> str:
        return self.write.principal.organization_id

    async def read(self, connection: Connection) -> Record | None:
        """Raises NoRoom and QuotaExceeded for a run whose reply would be too much now."""
        row = await connection.fetchrow(READ, run_id=self.run_id, organization_id=self.organization_id)
        if row is not None:
            in_flight.hold_reply(row["kept_octets"])
        return row

    def next(self, run: Record | None, missing: Sequence[Refusal] = ()) -> tuple[Record, Next]:
        """The run as it was read and its next attempt. Raises the first of the refusals."""
        decided = decide(
            run,
            self.options,
            new_session_id=self.new_session_id,
            cooldown_seconds=self.cooldown_seconds,
            missing=missing,
        )
        if isinstance(decided, list) or run is None:
            raise decided[0] if isinstance(decided, list) else RunNotFound()
        return run, decided


async def retry(services: Services, write: WriteRequest, run_id: UUID, options: RunRetry) -> Reply:
    """Reset a finished run and requeue it. Raises every refusal of the route; then nothing has changed."""
    refuse_contradictions(options.session_id, options.start_session)
    asked = _Retry(write, run_id, options, uuid4(), services.settings.retry_cooldown_seconds)
    staged = Staged(aliases=None if options.sensitive_input_values is None else {})
    decided: tuple[Record, Next] | None = None
    if options.sensitive_input_values or options.file_inputs:
        staging.check_sizes(services, options.sensitive_input_values, options.file_inputs)

        async def check(connection: Connection) -> tuple[Record, Next]:
            """Refuse before anything is staged. What is decided here holds for as long as the run's row does not change."""
            run = await asked.read(connection)
            decided = asked.next(run, await missing_targets(connection, asked.organization_id, options))
            await quotas.check(connection, services.run_quotas, write.principal, waiting=1)
            return decided

        checked = await check_or_replay(services, write, replays.RUN, check)
        if isinstance(checked, Reply):
            return checked
        decided = checked
        [staged] = await staging.stage(
            services, asked.organization_id, [run_id], options.sensitive_input_values, options.file_inputs
        )

    async def switch() -> Reply:
        return await _switch_at_once(services, asked, staged, decided) or await _switch(services, asked, staged)

    return await attempt_or_replay(services, write, switch, replays.RUN)


async def _switch_at_once(
    services: Services, asked: _Retry, staged: Staged, decided: tuple[Record, Next] | None
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
        room = await quotas.room(connection, services.run_quotas, asked.write.principal)
        with committing():
            if options.sensitive_input_values is None and options.file_inputs is None:
                reply = await _write(connection, SWITCH, asked, run, following, staged, room, input_ids=[])
            else:
                names, files = deletions.columns(staged.names()), staging.columns({asked.run_id: staged})
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
        if reply is None:
            await quotas.check(connection, services.run_quotas, asked.write.principal, waiting=1)
        return reply


async def _switch(services: Services, asked: _Retry, staged: Staged) -> Reply:
    """Decide every rule on the locked run, and do all that follows from it in the same transaction."""
    async with services.database.transaction() as connection:
        await connection.execute(LOCK, run_id=asked.run_id, organization_id=asked.organization_id)
        seen = await asked.read(connection)
        missing = await missing_targets(connection, asked.organization_id, asked.options)
        run, following = asked.next(seen, missing)
        standings = await quotas.admit(connection, services.run_quotas, asked.write.principal, waiting=1)
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
        await staging.adopt(connection, {asked.run_id: staged}, asked.write.principal)
    return replace(reply, standings=standings)


async def _write(
    connection: Connection,
    switch: Statement,
    asked: _Retry,
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
    write, options = asked.write, asked.options
    body = await connection.fetchval(
        switch,
        run_id=asked.run_id,
        organization_id=asked.organization_id,
        version=run["version"],
        **room,
        **write.actor(options.reason).parameters(),
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
        key=write.key,
        fingerprint=None if write.key is None else write.fingerprints[0],
        ttl_seconds=write.ttl_seconds,
        most_bytes=write.most_bytes,
        traceparent=write.traceparent,
        **more,
    )
    return None if body is None else Reply(200, body)
