"""Make, list, rotate and revoke API keys, for the command line, in the role that owns the tables. The service itself may only
list the keys of an organization. access/auth.py finds out the caller of a request by its key.
"""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from app.stores.database import Connection, Database, Record
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import statement


class NewKey(NamedTuple):
    """The columns of a new key."""

    id: UUID
    organization_id: str
    user_id: UUID | None
    name: str | None
    key_hash: bytes
    expires_at: datetime | None
    scopes: list[str]
    machine_id: UUID | None


INSERT = statement(
    "keys.insert",
    """
    INSERT INTO api_keys (id, organization_id, user_id, name, key_hash, expires_at, scopes, machine_id)
    SELECT :id::uuid, :organization_id, :user_id::uuid, :name, :key_hash::bytea, :expires_at::timestamptz,
           :scopes::text[], :machine_id::uuid
    WHERE :machine_id::uuid IS NULL OR EXISTS (
        SELECT FROM machines WHERE machines.id = :machine_id::uuid AND machines.organization_id = :organization_id::text)
    """,
)

ROTATE = statement(
    "keys.rotate",
    """
    WITH old AS MATERIALIZED (
        SELECT * FROM api_keys
        WHERE id = :old_id AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()) FOR NO KEY UPDATE
    ), ending AS (
        UPDATE api_keys SET expires_at = least(expires_at, now() + make_interval(secs => :overlap_seconds))
        WHERE id = (SELECT id FROM old)
    )
    INSERT INTO api_keys (id, organization_id, user_id, name, key_hash, expires_at, scopes, machine_id)
    SELECT :id::uuid, organization_id, user_id, name, :key_hash::bytea, expires_at, scopes, machine_id FROM old
    """,
)

# What a list of keys shows.
SHOWN = (
    *("id", "organization_id", "name", "scopes", "machine_id", "user_id"),
    *("created_at", "last_used_at", "expires_at", "revoked_at"),
)

LIST = statement(
    "keys.list",
    f"""
    SELECT {", ".join(SHOWN)}
    FROM api_keys WHERE :organization_id::text IS NULL OR organization_id = :organization_id ORDER BY created_at
    """,
)

# What the service shows of an organization's keys; never anything of the key itself.
LISTED = Listing("api_keys", "api_keys", octets="octet_length(to_json(api_keys)::text)", row="api_keys.id = listed.key")
ROWS = statement(
    "api_keys.rows",
    f"""
    SELECT api_keys.id::text, organization_id, name, scopes, machine_id::text, user_id::text, created_at, last_used_at,
           expires_at, revoked_at
    FROM {in_order("api_keys")} ORDER BY page.n
    """,
)

REVOKE = statement("keys.revoke", "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = :id")


async def insert(connection: Connection, key: NewKey) -> bool:
    """False if its organization has no such machine."""
    return await connection.execute(INSERT, **key._asdict()) == "INSERT 0 1"


async def rotate(connection: Connection, old_id: UUID, new_id: UUID, key_hash: bytes, overlap_seconds: float) -> bool:
    """A key like the old one, which ends after the overlap; False if there is none that still works."""
    done = await connection.execute(
        ROTATE, old_id=old_id, id=new_id, key_hash=key_hash, overlap_seconds=overlap_seconds
    )
    return done == "INSERT 0 1"


async def list_keys(connection: Connection, organization_id: str | None) -> list[Record]:
    """Those of an organization, or all; the oldest first."""
    return await connection.fetch(LIST, organization_id=organization_id)


async def list_page(database: Database, organization_id: str, part: Slice) -> dict[str, object]:
    """One page of an organization's keys, newest first. Raises Invalid as paging.page does."""
    condition, values = where("api_keys", organization_id=organization_id)
    found = await page(database, LISTED, (condition,), part, values, ROWS)
    return part.shown([dict(row.items()) for row in found.rows], found)


async def revoke(connection: Connection, key_id: UUID) -> bool:
    """End a key at once; False if there is none. A second time is harmless."""
    return await connection.execute(REVOKE, id=key_id) == "UPDATE 1"
