"""Idempotency-Key on every write: the first successful reply is stored with its effect and replayed byte for byte.

No record says "in progress". Twins may both do the work; the primary key decides in the transaction that has the effect, and
the loser, whose work was rolled back, replays the winner's reply.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import CTE, bindparam, func, insert, literal_column, select

from app.auth import Actor, Principal
from app.errors import IdempotencyInProgress, Invalid, Refusal
from app.models import IdempotencyKey
from app.services import Services
from app.stores.database import Connection, Database, Deadlock, LockTimeout, StatementTimeout, UniqueViolation
from app.stores.statements import fragment, statement

T = TypeVar("T")

# Locks are taken in one order nearly everywhere. Where they cannot be, the loser of a deadlock does its work again.
TRIES = 3

FIND = """
SELECT fingerprint, status, body FROM idempotency_keys
WHERE organization_id = $1 AND key = $2 AND expires_at > now()
"""

# A key that is taken fails the statement, and with it all that the transaction has done.
STORE = "INSERT INTO idempotency_keys (organization_id, key, fingerprint, status, body, expires_at)"

STORE_REPLY = f"{STORE} VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))"

# An expired key that was not collected yet is free again.
FREE = "DELETE FROM idempotency_keys WHERE organization_id = $1 AND key = $2 AND expires_at <= now()"


def store_reply(shown: CTE, *, status: int) -> CTE:
    """Part of a statement that makes its own reply: store the `body` of `shown` under `:key`, if there is one.

    Its parameters are organization_id, key, fingerprint and ttl_seconds.
    """
    key = bindparam("key", type_=IdempotencyKey.key.type)
    return (
        insert(IdempotencyKey)
        .from_select(
            [
                IdempotencyKey.organization_id,
                IdempotencyKey.key,
                IdempotencyKey.fingerprint,
                IdempotencyKey.status,
                IdempotencyKey.body,
                IdempotencyKey.expires_at,
            ],
            select(
                bindparam("organization_id", type_=IdempotencyKey.organization_id.type),
                key,
                bindparam("fingerprint", type_=IdempotencyKey.fingerprint.type),
                literal_column(str(status)),
                literal_column("body"),
                func.now() + fragment("make_interval(secs => :ttl_seconds)"),
            )
            .select_from(shown)
            .where(key.is_not(None)),
        )
        .cte("stored")
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful reply, as it is sent and stored."""

    status: int
    body: bytes
    replayed: bool = False
    has_event: bool = False  # something is to be sent to webhooks


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """One write request: who sent it, and what makes a resend recognizable. `key` is None without the header."""

    principal: Principal
    key: str | None
    fingerprints: tuple[bytes, ...]  # under the server key, then under the previous one
    ttl_seconds: int
    request_id: str | None = None

    def actor(self, reason: str | None = None) -> Actor:
        """Who is behind the request, for the events that it causes."""
        return Actor(self.principal.key_id, self.principal.user_id, self.request_id, reason)


def fingerprint(server_key: str, method: str, path: str, body: bytes) -> bytes:
    """HMAC-SHA-256 of the request. Keyed, because the body can hold secrets that a plain digest would let anyone guess."""
    mac = hmac.new(server_key.encode(), f"{method}\n{path}\n".encode(), "sha256")
    mac.update(body)
    return mac.digest()


FORGET = statement(
    "idempotency.forget",
    """
    DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM idempotency_keys WHERE expires_at <= now() ORDER BY expires_at LIMIT 1000 FOR UPDATE SKIP LOCKED))
    """,
)


async def forget_keys(database: Database) -> bool:
    """Remove a batch of expired keys; whether there may be more."""
    async with database.connection() as connection:
        return await connection.execute(FORGET) != "DELETE 0"


async def find(connection: Connection, write: WriteRequest) -> Reply | None:
    """The stored reply of this very request. Raises Invalid when the key belongs to another request."""
    if write.key is None:
        return None
    row = await connection.fetchrow(FIND, write.principal.organization_id, write.key)
    if row is None:
        return None
    if not any(hmac.compare_digest(row["fingerprint"], own) for own in write.fingerprints):
        raise Invalid(
            (
                ("header", "Idempotency-Key"),
                "This Idempotency-Key was used for another request; use a new key for each new request.",
                "idempotency_key_reused",
            )
        )
    return Reply(row["status"], row["body"], replayed=True)


async def check_or_replay(
    services: Services, write: WriteRequest, check: Callable[[Connection], Awaitable[T]]
) -> Reply | T:
    """What `check` returns, or the reply to replay: for requests that write outside before they come to `once`.

    The check comes first. What refuses a resend may be the effect of the first request, and whoever has seen the effect
    finds the reply, which was committed with it; the other way round a commit could fall in between.
    """
    async with services.database.connection() as connection:
        try:
            seen = await check(connection)
        except Refusal:
            if (stored := await find(connection, write)) is None:
                raise
            return stored
        stored = await find(connection, write)
        return seen if stored is None else stored


async def once(services: Services, write: WriteRequest, work: Callable[[Connection], Awaitable[Reply]]) -> Reply:
    """Run `work` in one transaction and commit its reply with it; a resend gets the first reply and changes nothing.

    Raises whatever `work` raises, and what `attempt_or_replay` does.
    """

    async def attempt() -> Reply:
        async with services.database.transaction() as connection:
            reply = await work(connection)
            if write.key is not None:
                own = (write.principal.organization_id, write.key, write.fingerprints[0])
                await connection.execute(STORE_REPLY, *own, reply.status, reply.body, write.ttl_seconds)
        return reply

    return await attempt_or_replay(services, write, attempt)


async def attempt_or_replay(services: Services, write: WriteRequest, attempt: Callable[[], Awaitable[Reply]]) -> Reply:
    """Run `attempt`, which stores its reply under the key together with its effect, then wake the loops of this process; if the
    key is taken, replay.

    `attempt` runs again after a deadlock. Raises whatever it raises, and IdempotencyInProgress when a twin holds the key or
    the row for longer than 2 s.
    """
    try:
        for more in reversed(range(TRIES)):
            try:
                reply = await attempt()
                services.wakeups.wake(write.principal.organization_id)
                if reply.has_event:
                    services.wakeups.deliver()
                return reply
            except Deadlock:
                if not more:
                    raise
                continue
            except UniqueViolation as taken:
                if taken.constraint_name != "pk_idempotency_keys":
                    raise
            async with services.database.connection() as connection:
                if (stored := await find(connection, write)) is not None:
                    return stored
                await connection.execute(FREE, write.principal.organization_id, write.key)
        raise IdempotencyInProgress  # freed and taken again, each time
    except LockTimeout as timeout:
        is_slow = write.key is None and isinstance(timeout, StatementTimeout)  # nobody need be at work on it
        return await _replay(services, write, timeout if is_slow else IdempotencyInProgress())
    except Refusal as refusal:
        # A resend of a request that succeeded is refused by its own effect (the run is scheduling): look before refusing.
        if write.key is None or refusal.status >= 500:
            raise
        return await _replay(services, write, refusal)


async def _replay(services: Services, write: WriteRequest, otherwise: Refusal) -> Reply:
    async with services.database.connection() as connection:
        stored = await find(connection, write)
    if stored is None:
        raise otherwise from None
    return stored
