"""API keys: who is calling, and on behalf of which organization."""

import hashlib
import re
import secrets
from dataclasses import dataclass
from uuid import UUID

from app.errors import Unauthorized
from app.stores.database import Connection

_KEY = re.compile(rb"[A-Za-z0-9_-]{20,128}")

# Its own statement, before the body is read: the digest is looked up, so a comparison leaks nothing about a stored key.
AUTHENTICATE = """
SELECT id, organization_id, user_id FROM api_keys
WHERE key_hash = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: an API key and the organization (and user) it belongs to."""

    key_id: UUID
    organization_id: str
    user_id: UUID | None


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a change, and why they say they do; nobody when the service acts by itself."""

    key_id: UUID | None = None
    user_id: UUID | None = None
    request_id: str | None = None
    reason: str | None = None

    def parameters(self) -> dict[str, object]:
        """What a statement with `recording` takes of it."""
        return {
            "key_id": self.key_id,
            "user_id": self.user_id,
            "request_id": self.request_id,
            "reason": self.reason,
        }


NOBODY = Actor()


def new_key() -> str:
    """A key with 256 bits of entropy, shown once; only its digest is kept."""
    return f"rk_{secrets.token_urlsafe(32)}"


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def bearer(header: bytes | None) -> bytes:
    """The key in an Authorization header (RFC 6750). Raises Unauthorized."""
    scheme, _, key = (header or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not _KEY.fullmatch(key.strip()):
        raise Unauthorized
    return key.strip()


async def authenticate(connection: Connection, key: bytes) -> Principal:
    """Raises Unauthorized for a key that is unknown, expired or revoked."""
    row = await connection.fetchrow(AUTHENTICATE, digest(key))
    if row is None:
        raise Unauthorized
    return Principal(*row.values())
