"""API keys: who is calling, and on behalf of which organization. It makes and changes no keys (access/keys.py)."""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import bindparam, func, literal_column, or_, select

from app.errors import Unauthorized
from app.models import ApiKey
from app.stores.database import Connection, Database
from app.stores.statements import statement

_KEY = re.compile(rb"[A-Za-z0-9_-]{20,128}")

# What a key may do (RFC 6750 section 3: the scope of a token). `*` may do everything.
SCOPES = ("runs:read", "runs:write", "runs:execute", "resources:write", "webhooks:write", "keys:read")
EVERYTHING = "*"

# A key that is bound to a machine may have no other scopes: it belongs to an executor.
EXECUTOR_SCOPES = frozenset({"runs:read", "runs:execute"})

# Its own statement, before the body is read: the digests are looked up, so a comparison leaks nothing about a stored key.
AUTHENTICATE = statement(
    "auth.authenticate",
    """
    SELECT api_keys.key_hash, api_keys.id, organization_id, user_id, scopes, machine_id
    FROM unnest(:key_hashes::bytea[]) AS given (key_hash), LATERAL (
        SELECT * FROM api_keys WHERE key_hash = given.key_hash OFFSET 0
    ) AS api_keys
    WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
    """,
)

STILL_VALID = statement(
    "auth.still_valid",
    select(literal_column("1")).where(
        ApiKey.id == bindparam("key_id"),
        ApiKey.revoked_at.is_(None),
        or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()),
    ),
)

WHOAMI = statement(
    "auth.whoami",
    """
    SELECT organization_id, id::text AS key_id, name, user_id::text, scopes, machine_id::text, expires_at
    FROM api_keys WHERE id = :key_id
    """,
)


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: an API key, the organization (and user) it belongs to, and what it may do.

    A key that is bound to a machine sees and reports only runs that are assigned to that machine.
    """

    key_id: UUID
    organization_id: str
    user_id: UUID | None
    scopes: Sequence[str] = (EVERYTHING,)
    machine_id: UUID | None = None

    def may(self, scope: str) -> bool:
        """Whether the key has this scope."""
        return EVERYTHING in self.scopes or scope in self.scopes

    def sees(self) -> dict[str, object]:
        """The parameters that limit a statement to rows that the caller may see."""
        return {"organization_id": self.organization_id, "bound_to": self.machine_id}


# Part of a condition on runs `r`: nothing but its own runs for a key that is bound to a machine.
SEEN = "r.organization_id = :organization_id AND (:bound_to::uuid IS NULL OR r.assigned_machine_id = :bound_to::uuid)"


@dataclass(frozen=True, slots=True)
class Actor:
    """The caller that makes a change, and the reason that it gives; empty if the service acts by itself.

    `by` and `bulk_retry_id` are kept with retries only: a request, a bulk retry or a workflow's policy asked for it.
    """

    key_id: UUID | None = None
    user_id: UUID | None = None
    request_id: str | None = None
    reason: str | None = None
    by: Literal["request", "bulk", "policy"] = "request"
    bulk_retry_id: UUID | None = None

    def parameters(self) -> dict[str, object]:
        """The parameters of a statement that contains `events.record`."""
        return {
            "key_id": self.key_id,
            "user_id": self.user_id,
            "request_id": self.request_id,
            "reason": self.reason,
        }


NOBODY = Actor()


def new_key() -> str:
    """A key with 256 bits of entropy, shown once; only its digest is kept."""
    return f"runs_{secrets.token_urlsafe(32)}"


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def bearer(header: bytes | None) -> bytes:
    """The key in an Authorization header (RFC 6750). Raises Unauthorized."""
    scheme, _, key = (header or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not _KEY.fullmatch(key.strip()):
        raise Unauthorized
    return key.strip()


async def find_principals(database: Database, key_hashes: Sequence[bytes]) -> list[Principal | None]:
    """Who has these keys, by their digests; None for one that is unknown, expired or revoked."""
    async with database.connection() as connection:
        rows = await connection.fetch(AUTHENTICATE, key_hashes=list(set(key_hashes)))
    known = {}
    for row in rows:
        key_hash, *rest = row.values()
        known[key_hash] = Principal(*rest)
    return [known.get(key_hash) for key_hash in key_hashes]


async def still_valid(connection: Connection, principal: Principal) -> None:
    """Raises Unauthorized for a key that was revoked or has expired since it was authenticated."""
    if await connection.fetchval(STILL_VALID, key_id=principal.key_id) is None:
        raise Unauthorized


async def whoami(connection: Connection, principal: Principal) -> dict[str, Any]:
    """What the key is and what it may do. Raises Unauthorized if it has gone meanwhile."""
    row = await connection.fetchrow(WHOAMI, key_id=principal.key_id)
    if row is None:
        raise Unauthorized
    return dict(row.items())
