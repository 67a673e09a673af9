"""Retry finished runs in place: check -> stage -> switch -> settle. A retry is a set of one.

check    read the run and let the rules decide; a retry with secrets or files is refused here before anything is written
stage    write new secrets and files under fresh names that are on the deletion list first (staging.py)
switch   one statement: archive, clear, requeue, and take staged names off the deletion list. It takes effect only if the run's
         row is still in the version that the rules saw, and if it can lock the other rows that they relied on
settle   after the commit, loops delete the replaced secrets and files and look for a machine (background.py)

Retries that meet go through each statement together (stores/together.py). A retry goes through a transaction of its own if its
run is locked, if its run changes again and again, or if a twin is about to take its Idempotency-Key: the transaction waits for
the lock first, and then runs the same statements.

A process may be killed at any point: only the switch changes the run, so the run is either as before or retried.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID, uuid4

from app.access.auth import Principal
from app.errors import IdempotencyInProgress, Refusal, StorageUnavailable, VaultUnavailable
from app.idempotency import Reply, WriteRequest, attempt_or_replay, unless_replayed, wait_for_twin
from app.limits import memory_budget
from app.limits.quotas import Standing
from app.runs import quotas, replays, staging
from app.runs.retry_rules import Retry, decide
from app.runs.retry_statements import LOCK_RUN, Change, read, write
from app.runs.sessions import refuse_contradictions
from app.runs.staging import Staged
from app.scheduling.targets import missing_targets
from app.services import Services
from app.stores import deletions
from app.stores.database import Connection, Record, committing
from app.stores.deletions import Name
from app.stores.statements import json_bytes

__all__ = ["Busy", "Outcome", "Retry", "replied", "retry_runs"]


@dataclass(frozen=True, slots=True)
class Busy:
    """Nothing was changed: another transaction held the run, or changed it since it was read. Ask again."""


Outcome = Reply | Refusal | Busy


def replied(outcome: Outcome) -> Reply:
    """The reply to a request. Raises its refusal."""
    if isinstance(outcome, Busy):
        raise IdempotencyInProgress
    if isinstance(outcome, Refusal):
        raise outcome
    return outcome


async def retry_runs(
    services: Services, retries: Sequence[Retry], *, connection: Connection | None = None
) -> list[Outcome]:
    """Retry these runs, each as if it were alone; the outcomes are in the order of `retries`.

    With `connection` all of it happens in the caller's transaction, which the caller commits. Then secrets and files are not
    possible, a key must not be given, and a run that another transaction holds or has changed is Busy.
    """
    if connection is not None:
        return await _retry_within(connection, services, [_Asked.of(services, one) for one in retries])
    if len(retries) == 1:
        return [await _outcome(services, retries[0])]
    return await asyncio.gather(*(_outcome(services, one) for one in retries))


# --- the steps --------------------------------------------------------------------------------------------------------

# So often a run may change between reading and writing before its retry waits for its lock.
CHANGES = 3


@dataclass(frozen=True, slots=True)
class _Asked:
    """A retry, and what was staged for it."""

    retry: Retry
    cooldown_seconds: int
    new_session_id: UUID | None
    staged: Staged

    @classmethod
    def of(cls, services: Services, retry: Retry) -> "_Asked":
        new_session_id = uuid4() if retry.options.start_session else None
        staged = Staged(aliases=None if retry.options.sensitive_input_values is None else {})
        return cls(retry, services.settings.retry_cooldown_seconds, new_session_id, staged)

    def change(self, run: Record | None, missing: Sequence[Refusal]) -> Change:
        """The change to write. Raises the first of the refusals, and NoRoom and QuotaExceeded for too long a reply."""
        retry = self.retry
        refuse_contradictions(retry.options.session_id, retry.options.start_session)
        decided = decide(
            run,
            retry.options,
            new_session_id=self.new_session_id,
            expected_attempt=retry.expected_attempt,
            cooldown_seconds=self.cooldown_seconds,
            missing=missing,
        )
        if run is not None:
            memory_budget.reserve_reply(run["kept_octets"])
        for refusal in decided.refusals:
            raise refusal
        assert run is not None and decided.following is not None  # noqa: S101, PT018 - else it is refused
        return Change(self.retry, self.staged, run, decided.following)


async def _outcome(services: Services, retry: Retry) -> Outcome:
    try:
        return await _retry(services, retry)
    except Refusal as refusal:
        return refusal


async def _retry(services: Services, retry: Retry) -> Reply:
    """Raises every refusal of the route; then nothing has changed."""
    asked, options = _Asked.of(services, retry), retry.options
    refuse_contradictions(options.session_id, options.start_session)
    write = retry.write or WriteRequest(Principal(UUID(int=0), retry.organization_id, None), None, (), 0, 0)
    checked: Change | None = None
    if options.sensitive_input_values or options.file_inputs:
        staging.check_sizes(services, options.sensitive_input_values, options.file_inputs)
        found = await unless_replayed(services, write, replays.RUN, partial(_check, services, asked))
        if isinstance(found, Reply):
            return found
        [staged] = await staging.stage(
            services, retry.organization_id, [retry.run_id], options.sensitive_input_values, options.file_inputs
        )
        asked = replace(asked, staged=staged)
        checked = replace(found, staged=staged)
    return await attempt_or_replay(services, write, partial(_switch, services, asked, checked), replays.RUN)


async def _check(services: Services, asked: _Asked) -> Change:
    """Refuse before anything is staged. The decision holds for as long as the run's row does not change."""
    change = await _decided(services, asked)
    await _check_quotas(services, asked)
    return change


async def _check_quotas(services: Services, asked: _Asked) -> None:
    """Raises QuotaExceeded."""
    if services.run_quotas is not None and asked.retry.principal is not None:
        async with services.database.connection() as connection:
            await quotas.check(connection, services.run_quotas, asked.retry.principal, waiting=1)


async def _switch(services: Services, asked: _Asked, checked: Change | None) -> Reply:
    """Decide on a plain read and write in one statement; if that finds the run changed, again; if it is held, wait for it."""
    version = None
    for _ in range(CHANGES):
        change = checked or await _decided(services, asked)
        if (
            change.run["version"] == version
        ):  # so the run is held, or something else that is needed, or there is no room
            await _check_quotas(services, asked)
            break
        async with quotas.room(services.database, services.run_quotas, asked.retry.principal) as room:
            body = await _written(services, replace(change, room=room))
        if body is not None:
            return Reply(200, body)
        checked, version = None, change.run["version"]
    return await _switch_locked(services, asked)


async def _switch_locked(services: Services, asked: _Asked) -> Reply:
    """Wait for a twin, for the run, and for what else may be held, and then do the same in that transaction."""
    retry = asked.retry
    async with services.database.transaction() as connection:
        if retry.write is not None:
            await wait_for_twin(connection, retry.write)
        secret = await connection.fetchval(LOCK_RUN, run_id=retry.run_id, organization_id=retry.organization_id)
        names = [*asked.staged.names(), *([] if secret is None else [Name.secret(secret)])]
        if names:
            await connection.fetch(deletions.HOLD, **deletions.columns(names))
        [outcome] = await _retry_within(connection, services, [asked])
        if isinstance(outcome, Busy):  # a name was condemned: staging took longer than the grace time
            raise VaultUnavailable if asked.staged.secret_path is not None else StorageUnavailable
        return replied(outcome)


async def _retry_within(connection: Connection, services: Services, asked: Sequence[_Asked]) -> list[Outcome]:
    """All of them in the caller's transaction, with one statement each for reading and for each kind of writing."""
    outcomes: list[Outcome] = [Busy() for _ in asked]
    changes: dict[int, Change] = {}
    taken: set[UUID] = set()
    for place, run in enumerate(await read(connection, [one.retry for one in asked])):
        retry = asked[place].retry
        try:
            missing = await missing_targets(connection, retry.organization_id, retry.options)
            change = asked[place].change(run, missing)
        except Refusal as refusal:
            outcomes[place] = refusal
            continue
        if retry.run_id not in taken:  # one that is asked for twice is Busy the second time
            taken.add(retry.run_id)
            changes[place] = change
    admitted = await _admitted(connection, services, changes, outcomes)
    bodies = await write(connection, [changes[place] for place, _ in admitted], services.settings)
    for (place, standings), body in zip(admitted, bodies, strict=True):
        if body is not None:
            outcomes[place] = Reply(200, body, standings=standings)
    return outcomes


async def _admitted(
    connection: Connection, services: Services, changes: dict[int, Change], outcomes: list[Outcome]
) -> list[tuple[int, Sequence[Standing]]]:
    """The places of those that the quotas have room for; the outcomes of the others are their refusals."""
    admitted: list[tuple[int, Sequence[Standing]]] = []
    parties: dict[tuple[str, UUID | None], list[int]] = {}
    for place, change in changes.items():
        principal = change.retry.principal
        party = change.retry.organization_id, None if principal is None else principal.key_id
        parties.setdefault(party, []).append(place)
    for places in parties.values():
        count, standings, refusal = len(places), tuple[Standing, ...](), None
        principal = changes[places[0]].retry.principal
        if principal is not None and services.run_quotas is not None:
            count, standings, refusal = await quotas.admit_some(connection, services.run_quotas, principal, count)
        admitted += [(place, standings) for place in places[:count]]
        for place in places[count:]:
            outcomes[place] = refusal or Busy()
    return admitted


# --- together ---------------------------------------------------------------------------------------------------------


async def _decided(services: Services, asked: _Asked) -> Change:
    """Read the run, and decide. Raises the first refusal."""
    retry, missing = asked.retry, list[Refusal]()
    options = retry.options
    if options.machine_id is not None or options.pool_ids or options.session_id is not None:
        async with services.database.connection() as connection:
            missing = await missing_targets(connection, retry.organization_id, options, lock=False)
    run = await services.together.read(partial(_read_set, services), retry, retry.organization_id)
    return asked.change(run, missing)


async def _written(services: Services, change: Change) -> bytes | None:
    """The reply of the switch; None if it has not taken effect."""
    retry, length = change.retry, change.run["kept_octets"]
    if retry.options.input_values is not None:
        length += len(json_bytes(retry.options.input_values) or b"")

    if change.room is not quotas.NO_QUOTA:
        work, together = _write_counted_set, services.together.switch_counted
    else:
        work, together = _write_set, services.together.switch if change.is_plain() else services.together.switch_staged
    if length > memory_budget.FREE_BYTES:  # others would wait for it
        return (await work(services, [change]))[0]
    key = None if retry.write is None else retry.write.key
    marks = (retry.run_id,) if key is None else (retry.run_id, (retry.organization_id, key))
    return await together(partial(work, services), change, retry.organization_id, marks)


async def _read_set(services: Services, retries: Sequence[Retry]) -> list[Record | None]:
    async with services.database.connection() as connection:
        return await read(connection, retries)


async def _write_set(services: Services, changes: Sequence[Change]) -> list[bytes | None]:
    async with services.database.connection() as connection:
        with committing():
            return await write(connection, changes, services.settings)


async def _write_counted_set(services: Services, changes: Sequence[Change]) -> list[bytes | None]:
    """The same for those that the quotas on waiting runs must count: sets of one organization go one after the other."""
    async with services.database.transaction() as connection:
        await quotas.take_turns(connection, {change.retry.organization_id for change in changes})
        return await write(connection, changes, services.settings)
