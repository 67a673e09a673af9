"""Quotas on runs: how many may wait, and how many may be made in a minute, for a key and for its organization.

They are counted in the database, by index and never further than the quota goes, in the transaction that adds to them. No
request of an organization waits for another one, until little is left of a quota: then they take turns from the count to the
commit, so that the last of it is given once. A rest that is little for a bulk can be much for a single run: such a bulk decides
alone.

A run that is held until a time counts as one that waits from when it is asked for, and is not counted again when it is due.
"""

import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from math import ceil
from typing import NamedTuple

from app.access.auth import Principal
from app.errors import QuotaExceeded
from app.limits.quotas import Policy, RunQuotas, Standing, exceeded
from app.scheduling import rules
from app.stores import locks
from app.stores.database import Connection, Database, Record
from app.stores.statements import statement

# Runs of an organization that are looked at for one key: runs of other keys stand in between.
LOOKED_AT = 10_000

# Requests take turns if no more than this many runs are left of a quota. It is more than the requests that decide at the same
# moment without turns.
TURNS = 64

# The runs that are left before that are divided among this many keys and processes, for a second each.
SHARES = 64


def _waiting(organization_id: str, most: str) -> str:
    return f"""
    SELECT w.queued_by_key_id FROM runs w WHERE w.organization_id = {organization_id} AND {rules.unassigned("w")}
    ORDER BY w.lane, w.queue_rank, w.queued_at, w.id LIMIT {most}
    """


COUNT = statement(
    "runs.quotas.count",
    f"""
    WITH waiting AS MATERIALIZED ({_waiting(":organization_id", ":waiting_seen::int")}), created AS MATERIALIZED (
        SELECT c.created_at, c.queued_by_key_id FROM runs c
        WHERE c.organization_id = :organization_id AND c.created_at > now() - interval '60 s'
        ORDER BY c.created_at DESC, c.id DESC LIMIT :created_seen::int
    )
    SELECT (SELECT count(*) FROM waiting) AS organization_waiting,
           (SELECT count(*) FROM waiting WHERE queued_by_key_id = :key_id) AS key_waiting,
           (SELECT count(*) FROM created) AS organization_created,
           (SELECT count(*) FROM created WHERE queued_by_key_id = :key_id) AS key_created,
           (SELECT 60 - extract(epoch FROM now() - created_at)::float8 FROM created
            ORDER BY created_at DESC OFFSET :organization_free_after::int LIMIT 1) AS organization_seconds,
           (SELECT 60 - extract(epoch FROM now() - created_at)::float8 FROM created WHERE queued_by_key_id = :key_id
            ORDER BY created_at DESC OFFSET :key_free_after::int LIMIT 1) AS key_seconds
    """,
)

# A set locks its organizations in one order everywhere: two sets cannot wait for each other.
_ORGANIZATIONS = "FROM (SELECT id FROM unnest(:organization_ids::text[]) AS id ORDER BY hashtext(id) OFFSET 0) AS one"
TAKE_TURN = statement("runs.quotas.take_turn", f"SELECT {locks.wait_for(locks.QUOTA_TURN, 'one.id')} {_ORGANIZATIONS}")
BESIDE_OTHERS = statement(
    "runs.quotas.beside_others",
    f"SELECT {locks.wait_beside_others(locks.QUOTA_BESIDE_OTHERS, 'one.id')} {_ORGANIZATIONS}",
)
ALONE = statement("runs.quotas.alone", f"SELECT {locks.wait_for(locks.QUOTA_BESIDE_OTHERS, 'one.id')} {_ORGANIZATIONS}")


def room_of(retry: str) -> str:
    """Part of the statement that requeues runs: whether so few wait that this retry need not take turns. Null: no quota."""
    return f"""
    CASE WHEN {retry}.waiting_seen IS NULL THEN true ELSE (
        SELECT count(*) < {retry}.organization_room
               AND count(*) FILTER (WHERE queued_by_key_id = {retry}.key_id) < {retry}.key_room
        FROM ({_waiting(f"{retry}.organization_id", f"{retry}.waiting_seen")}) AS waiting
    ) END
    """


class Room(NamedTuple):
    """The columns of `room_of`."""

    waiting_seen: int | None
    organization_room: int
    key_room: int

    def after(self, organization: int, key: int) -> "Room":
        """The room after more runs of the organization and of the key wait."""
        return self._replace(organization_room=self.organization_room - organization, key_room=self.key_room - key)


NO_QUOTA = Room(None, 0, 0)


@asynccontextmanager
async def room(database: Database, quotas: RunQuotas | None, principal: Principal | None) -> AsyncIterator[Room]:
    """The columns of `room_of`, for a retry that is written in the block.

    A party that retries many runs a second, far from its quota, is counted once in a while. Retries that go uncounted after
    such a count, and retries that were under way when it began, are at most one of SHARES parts of the rest.
    """
    if principal is None or quotas is None or (quotas.key_waiting is None and quotas.organization_waiting is None):
        yield NO_QUOTA
        return
    now = time.monotonic()
    allowance = quotas.allowances.of(principal.key_id, now)
    if allowance.is_to_be_counted(now):
        with allowance.counting() as allow:
            async with database.connection() as connection:
                counted = await _count(connection, quotas, principal, 0)
            left = min(
                _before_turns(quotas.organization_waiting) - counted["organization_waiting"],
                _before_turns(quotas.key_waiting) - counted["key_waiting"],
            )
            allow(left // SHARES)
    if allowance.take():
        try:
            yield NO_QUOTA
        finally:
            allowance.end()
        return
    most, key_most = _before_turns(quotas.organization_waiting), _before_turns(quotas.key_waiting)
    yield Room(min(max(most, 0), LOOKED_AT) if quotas.key_waiting is None else LOOKED_AT, most, key_most)


async def take_turns(connection: Connection, organization_ids: Collection[str]) -> None:
    """Until the transaction ends no other set with retries of these organizations that must be counted is under way.

    So each set counts what the one before it has committed; a set can have more retries than are left of a quota.
    """
    await connection.execute(BESIDE_OTHERS, organization_ids=list(organization_ids))
    await connection.execute(TAKE_TURN, organization_ids=list(organization_ids))


def _before_turns(policy: Policy | None, more: int = 1) -> int:
    """The number of used runs up to which requests for `more` runs decide side by side."""
    return LOOKED_AT * 10 if policy is None else policy.quota - max(TURNS * more, policy.quota // 10)


async def check(
    connection: Connection, quotas: RunQuotas | None, principal: Principal, *, waiting: int, created: int = 0
) -> None:
    """Check that `waiting` more runs may wait and `created` more may be made, by a plain read. Raises QuotaExceeded."""
    if quotas is not None:
        _standings(quotas, await _count(connection, quotas, principal, created), waiting, created)


async def admit(
    connection: Connection, quotas: RunQuotas | None, principal: Principal, *, waiting: int, created: int = 0
) -> tuple[Standing, ...]:
    """The same, and so that it stays true until the transaction ends. Where the caller stands of which little is left.

    Raises QuotaExceeded.
    """
    if quotas is None:
        return ()

    async def decide() -> tuple[tuple[Standing, ...], bool]:
        return _standings(quotas, await _count(connection, quotas, principal, created), waiting, created)

    organizations = [principal.organization_id]
    if waiting > 1:
        _, is_near = await decide()
        await connection.execute(ALONE if is_near else BESIDE_OTHERS, organization_ids=organizations)
        standings, _ = await decide()
        return standings
    await connection.execute(BESIDE_OTHERS, organization_ids=organizations)
    standings, is_near = await decide()
    if is_near:
        await connection.execute(TAKE_TURN, organization_ids=organizations)
        standings, _ = await decide()
    return standings


async def admit_some(
    connection: Connection, quotas: RunQuotas | None, principal: Principal, wanted: int
) -> tuple[int, tuple[Standing, ...], QuotaExceeded | None]:
    """As `admit`: how many of `wanted` runs may wait, until the transaction ends; and the refusal of the other runs."""
    try:
        return wanted, await admit(connection, quotas, principal, waiting=wanted), None
    except QuotaExceeded as refusal:
        if wanted == 1 or quotas is None:
            return 0, (), refusal
    await connection.execute(ALONE, organization_ids=[principal.organization_id])
    counted = await _count(connection, quotas, principal, 0)
    left = min(
        wanted if policy is None else max(policy.quota - used, 0)
        for policy, used in (
            (quotas.key_waiting, counted["key_waiting"]),
            (quotas.organization_waiting, counted["organization_waiting"]),
        )
    )
    try:
        _standings(quotas, counted, left + 1, 0)
    except QuotaExceeded as refusal:
        return left, (), refusal
    return wanted, (), None


async def _count(connection: Connection, quotas: RunQuotas, principal: Principal, created: int) -> Record:
    row = await connection.fetchrow(
        COUNT,
        organization_id=principal.organization_id,
        key_id=principal.key_id,
        waiting_seen=_seen(quotas.key_waiting, quotas.organization_waiting),
        created_seen=_seen(quotas.key_created, quotas.organization_created) if created else 0,
        organization_free_after=_free_after(quotas.organization_created, created),
        key_free_after=_free_after(quotas.key_created, created),
    )
    assert row is not None  # noqa: S101 - a row of counts
    return row


def _seen(key: Policy | None, organization: Policy | None) -> int:
    """How many rows tell whether there is room."""
    if key is not None:
        return LOOKED_AT
    return 0 if organization is None else organization.quota


def _free_after(policy: Policy | None, created: int) -> int:
    """How many of the newest runs may stay in the minute if `created` more runs must fit."""
    return 0 if policy is None else max(policy.quota - created, 0)


def _standings(quotas: RunQuotas, counted: Record, waiting: int, created: int) -> tuple[tuple[Standing, ...], bool]:
    """The quotas with little left after this request, and whether that is too little for requests to decide side by side.

    Raises QuotaExceeded.
    """
    violated, near, is_near, is_too_large = [], [], False, False
    for policy, used, more, seconds in (
        (quotas.key_created, counted["key_created"], created, counted["key_seconds"]),
        (quotas.organization_created, counted["organization_created"], created, counted["organization_seconds"]),
        (quotas.key_waiting, counted["key_waiting"], waiting, None),
        (quotas.organization_waiting, counted["organization_waiting"], waiting, None),
    ):
        if policy is None or not more:
            continue
        until = None if policy.window is None else min(max(ceil(seconds or policy.window), 1), policy.window)
        if used + more > policy.quota:
            violated.append(Standing(policy, max(policy.quota - used, 0), until))
            is_too_large = is_too_large or more > policy.quota
        elif policy.near(policy.quota - used - more):
            near.append(Standing(policy, policy.quota - used - more, until))
        is_near = is_near or used + more > _before_turns(policy, more)
    if violated:
        raise exceeded(*violated, is_too_large=is_too_large)
    return tuple(near), is_near
