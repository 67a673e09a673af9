"""Idempotency-Key on every write: the first successful reply is stored with its effect and replayed byte for byte.

A reply is stored unless it is long, or unless its organization has used up its limit of stored bytes
(write_behind/reply_bytes.py). Then only the ids of the objects in the reply are stored, and a replay shows the objects as they
are now. No replay shows anything of a run that was deleted.

No record says "in progress". Twins may both do the work; the primary key decides in the transaction that has the effect. The
work of the loser is rolled back, and the loser replays the winner's reply.
"""

import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from app.access.auth import Actor, Principal
from app.errors import IdempotencyInProgress, Invalid, NotFound, Refusal
from app.limits.quotas import Standing
from app.services import Services
from app.stores import locks
from app.stores.database import Connection, Database, Deadlock, LockTimeout, StatementTimeout, UniqueViolation
from app.stores.statements import statement
from app.telemetry import metrics
from app.write_behind import reply_bytes

T = TypeVar("T")

# Locks are taken in one order nearly everywhere. Where they cannot be, the loser of a deadlock does its work again.
TRIES = 3

FIND = statement(
    "idempotency.find",
    """
    SELECT fingerprint, status, body, ids FROM (
        SELECT * FROM idempotency_keys WHERE organization_id = :organization_id AND key = :key OFFSET 0
    ) AS kept
    WHERE expires_at > now()
    """,
)


def _key(organization_id: str = ":organization_id::text", key: str = ":key::text") -> str:
    """SQL for the subject of a key's advisory lock."""
    return f"{organization_id} || ' ' || {key}"


# A key that is taken fails the statement, and with it all that the transaction has done.
STORE = statement(
    "idempotency.store",
    f"""
    INSERT INTO idempotency_keys (organization_id, key, fingerprint, status, body, ids, expires_at)
    SELECT :organization_id::text, :key::text, :fingerprint, :status, :body, :ids, now() + make_interval(secs => :ttl_seconds)
    FROM {locks.wait_for(locks.IDEMPOTENCY_KEY, _key())}
    """,
)

WAIT = statement("idempotency.wait", f"SELECT {locks.wait_for(locks.IDEMPOTENCY_KEY, _key())}")

# An expired key that was not collected yet is free again.
FREE = statement(
    "idempotency.free",
    "DELETE FROM idempotency_keys WHERE organization_id = :organization_id AND key = :key AND expires_at <= now()",
)


# Part of a statement that makes its own replies: store the rows of `shown` that have a key. If a body is longer, only the ids
# are stored.
STORED = """
    INSERT INTO idempotency_keys (organization_id, key, fingerprint, status, body, ids, expires_at)
    SELECT organization_id, key, fingerprint, http_status,
           CASE WHEN octet_length(body) <= most_bytes THEN body ELSE ''::bytea END, ids,
           now() + make_interval(secs => :ttl_seconds)
    FROM shown WHERE key IS NOT NULL
"""


def no_twin(write: str) -> str:
    """Part of a statement that stores replies: whether no twin of this write is under way. Until COMMIT none can begin.

    A write without a key has no twin.
    """
    lock = locks.try_for(locks.IDEMPOTENCY_KEY, _key(f"{write}.organization_id", f"{write}.key"))
    return f"CASE WHEN {write}.key IS NULL THEN true ELSE {lock} END"


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful reply, as it is sent and stored. `ids` are the ids of the objects in its body."""

    status: int
    body: bytes
    ids: Sequence[UUID] = ()
    replayed: bool = False
    has_event: bool = False  # something is to be sent to webhooks
    standings: Sequence[Standing] = ()  # quotas of which little is left; not stored


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """One write request: its caller, and the key and fingerprints that a resend is recognized by. No header: no key."""

    principal: Principal
    key: str | None
    fingerprints: tuple[bytes, ...]  # under the server key, then under the previous one
    ttl_seconds: int
    most_bytes: int  # a longer reply is stored as ids only
    request_id: str | None = None
    traceparent: str | None = None  # for the executor of the attempt that the request begins

    def actor(self, reason: str | None = None) -> Actor:
        """The caller, for the events that the request causes."""
        return Actor(self.principal.key_id, self.principal.user_id, self.request_id, reason)


@dataclass(frozen=True, slots=True)
class Resource:
    """The kind of object that the reply to a write shows, for its replays.

    `show` makes the reply again by its ids, with all as it is now. `left` is what a reply that was kept may still show. Both
    get the caller and the ids, and raise NotFound for what is gone.
    """

    show: Callable[[Connection, Principal, Sequence[UUID]], Awaitable[bytes]]
    left: Callable[[Connection, Principal, Sequence[UUID], bytes], Awaitable[bytes]] | None = None


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
    """Remove a batch of expired keys and of their counted bytes; whether there may be more keys."""
    async with database.connection() as connection:
        await connection.execute(reply_bytes.FORGET)
        return await connection.execute(FORGET) != "DELETE 0"


async def find(connection: Connection, write: WriteRequest, resource: Resource | None) -> Reply | None:
    """The stored reply of this very request.

    Raises Invalid when the key belongs to another request, and NotFound, as a replay, when what it showed is gone.
    """
    if write.key is None:
        return None
    row = await connection.fetchrow(FIND, organization_id=write.principal.organization_id, key=write.key)
    if row is None:
        return None
    if not any(hmac.compare_digest(row["fingerprint"], own) for own in write.fingerprints):
        metrics.idempotency.add("mismatch")
        raise Invalid(
            (
                ("header", "Idempotency-Key"),
                "This Idempotency-Key was used for another request; use a new key for each new request.",
                "idempotency_key_reused",
            )
        )
    body, ids = row["body"], row["ids"]
    if resource is not None and ids:  # the version before stored no ids, and every body
        try:
            if not body:
                body = await resource.show(connection, write.principal, ids)
            elif resource.left is not None:
                body = await resource.left(connection, write.principal, ids, body)
        except NotFound as gone:
            gone.headers["Idempotency-Status"] = "replayed"
            raise
    metrics.idempotency.add("replayed")
    return Reply(row["status"], body, replayed=True)


async def store(connection: Connection, write: WriteRequest, reply: Reply) -> None:
    """Store the reply under its key, if it has one, as the last act of the transaction that has its effect.

    Waits for a twin that is under way; raises UniqueViolation if it has stored its reply.
    """
    if write.key is not None:
        await connection.execute(
            STORE,
            organization_id=write.principal.organization_id,
            key=write.key,
            fingerprint=write.fingerprints[0],
            status=reply.status,
            body=reply.body if len(reply.body) <= write.most_bytes else b"",
            ids=reply.ids,
            ttl_seconds=write.ttl_seconds,
        )


async def wait_for_twin(connection: Connection, write: WriteRequest) -> None:
    """Until no twin is under way, nor can be before the end of this transaction. Raises LockTimeout."""
    if write.key is not None:
        await connection.execute(WAIT, organization_id=write.principal.organization_id, key=write.key)


async def check_or_replay(
    services: Services, write: WriteRequest, resource: Resource, check: Callable[[Connection], Awaitable[T]]
) -> Reply | T:
    """As `unless_replayed`, for a check that needs a connection."""

    async def connected() -> T:
        async with services.database.connection() as connection:
            return await check(connection)

    return await unless_replayed(services, write, resource, connected)


async def unless_replayed(
    services: Services, write: WriteRequest, resource: Resource, check: Callable[[], Awaitable[T]]
) -> Reply | T:
    """What `check` returns, or the reply to replay: for requests that write outside before they come to `once`.

    The check comes first. A resend may be refused because of the effect of the first request. After the check has seen the
    effect, the reply is found, because both were committed together. In the other order a commit could come in between.
    """
    try:
        seen = await check()
    except Refusal as refusal:
        if refusal.status >= 500:
            raise
        return await _replay(services, write, resource, refusal)
    if write.key is None:
        return seen
    async with services.database.connection() as connection:
        stored = await find(connection, write, resource)
    return seen if stored is None else stored


async def once(
    services: Services,
    write: WriteRequest,
    work: Callable[[Connection], Awaitable[Reply]],
    resource: Resource | None = None,
) -> Reply:
    """Run `work` in one transaction and commit its reply with it; a resend gets the first reply and changes nothing.

    `resource` is what the reply shows; None: nothing. Raises whatever `work` raises, and what `attempt_or_replay` does.
    """

    async def attempt() -> Reply:
        async with services.database.transaction() as connection:
            reply = await work(connection)
            await store(connection, write, reply)
        return reply

    return await attempt_or_replay(services, write, attempt, resource)


async def attempt_or_replay(
    services: Services, write: WriteRequest, attempt: Callable[[], Awaitable[Reply]], resource: Resource | None
) -> Reply:
    """Run `attempt`, which stores its reply under the key together with its effect, then wake the loops of this process; if the
    key is taken, replay.

    `attempt` runs again after a deadlock. Raises whatever it raises, and IdempotencyInProgress when a twin holds the key or
    the row for longer than 2 s.
    """
    try:
        for more in reversed(range(TRIES)):
            try:
                reply = await attempt()
                if write.key is not None and len(reply.body) <= write.most_bytes:
                    services.replies.count(write.principal.organization_id, len(reply.body))
                services.wakeups.wake(write.principal.organization_id)
                if reply.has_event:
                    services.wakeups.deliver()
                if write.key is not None:
                    metrics.idempotency.add("first")
                return reply
            except Deadlock:
                if not more:
                    raise
                continue
            except UniqueViolation as taken:
                if taken.constraint_name != "pk_idempotency_keys":
                    raise
            async with services.database.connection() as connection:
                if (stored := await find(connection, write, resource)) is not None:
                    return stored
                await connection.execute(FREE, organization_id=write.principal.organization_id, key=write.key)
        raise IdempotencyInProgress  # freed and taken again, each time
    except LockTimeout as timeout:
        is_slow = write.key is None and isinstance(
            timeout, StatementTimeout
        )  # a slow statement does not mean that a twin is at work
        if write.key is not None:
            metrics.idempotency.add("in_progress")
        return await _replay(services, write, resource, timeout if is_slow else IdempotencyInProgress())
    except Refusal as refusal:
        # A resend of a request that succeeded is refused by its own effect (the run is scheduling): look before refusing.
        if write.key is None or refusal.status >= 500:
            raise
        return await _replay(services, write, resource, refusal)


async def _replay(services: Services, write: WriteRequest, resource: Resource | None, otherwise: Refusal) -> Reply:
    if write.key is None:
        raise otherwise
    async with services.database.connection() as connection:
        stored = await find(connection, write, resource)
    if stored is None:
        raise otherwise from None
    return stored
