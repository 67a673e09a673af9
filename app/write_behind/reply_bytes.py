"""How many bytes of replies each organization has stored under its Idempotency-Keys, against the share that it may have.

It is kept roughly, so that no request pays for it: each process counts what it has stored and adds that to a table once a
period, which tells it in return what all of them have. Meanwhile an organization can pass its share by what it stores in a
period. What was counted is forgotten with the replies, by the time at which they expire.
"""

from collections import Counter

from app.stores.database import Database
from app.stores.statements import statement

# Replies are counted together that expire within so much of their life: an organization has some 25 rows at most.
_SLICES = 24

ADD = statement(
    "replies.add",
    f"""
    INSERT INTO stored_replies (organization_id, until, bytes)
    SELECT organization_id, to_timestamp(ceil((extract(epoch FROM now()) + slice * {_SLICES}) / slice) * slice), bytes
    FROM unnest(:organization_ids::text[], :bytes::bigint[]) AS counted (organization_id, bytes),
         (SELECT greatest(1, :ttl_seconds::bigint / {_SLICES}::float) AS slice) AS life
    ON CONFLICT (organization_id, until) DO UPDATE SET bytes = stored_replies.bytes + excluded.bytes
    """,
)

STORED = statement(
    "replies.stored",
    """
    SELECT wanted.organization_id, (
        SELECT coalesce(sum(bytes), 0)::bigint FROM (
            SELECT * FROM stored_replies WHERE organization_id = wanted.organization_id OFFSET 0
        ) AS own
        WHERE until > now()
    ) AS bytes
    FROM unnest(:organization_ids::text[]) AS wanted (organization_id)
    """,
)

FORGET = statement(
    "replies.forget",
    """
    DELETE FROM stored_replies WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM stored_replies WHERE until <= now() ORDER BY until LIMIT 1000 FOR UPDATE SKIP LOCKED))
    """,
)


class StoredReplies:
    """What this process knows of them. `longest` is the largest reply that is stored, `share` what an organization may have."""

    def __init__(self, longest: int, share: int, ttl_seconds: int) -> None:
        self._longest = longest
        self._share = share
        self._ttl_seconds = ttl_seconds
        self._counted: Counter[str] = Counter()  # since the last exchange
        self._stored: dict[str, int] = {}  # at the last exchange, by those who had stored something or too much

    def most_bytes(self, organization_id: str) -> int:
        """How long the next reply may be that is stored for this organization."""
        stored = self._stored.get(organization_id, 0) + self._counted[organization_id]
        return self._longest if stored < self._share else 0

    def count(self, organization_id: str, size: int) -> None:
        """Note that these bytes were stored."""
        self._counted[organization_id] += size

    async def exchange(self, database: Database) -> None:
        """Add what was counted to what all have, and read that. Raises DatabaseUnavailable; then it is counted again later."""
        counted, self._counted = self._counted, Counter()
        new = {name: size for name, size in sorted(counted.items()) if size}  # in one order everywhere: rows are locked
        full = {name for name, size in self._stored.items() if size >= self._share}
        if not new and not full:
            return
        try:
            async with (
                database.transaction() as connection
            ):  # if it fails, nothing was added, and the sums are counted again
                if new:
                    await connection.execute(
                        ADD, organization_ids=list(new), bytes=list(new.values()), ttl_seconds=self._ttl_seconds
                    )
                rows = await connection.fetch(STORED, organization_ids=list(full.union(new)))
        except BaseException:
            self._counted.update(new)
            raise
        self._stored = {row["organization_id"]: row["bytes"] for row in rows}
