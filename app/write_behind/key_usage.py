"""When each API key was last used: noted in memory by requests, and written later, outside of any.

It knows ids of keys, and nothing of requests or of what they may do.
"""

import asyncio
from uuid import UUID

from app.stores.database import Database
from app.stores.statements import statement

# A key is written at most so often, whichever replicas it is used with.
EVERY_SECONDS = 60.0

# A process notes a key again only a little after that: a little before, the statement would still skip it.
_COME_BACK_SECONDS = EVERY_SECONDS + 5

# Keys that a process remembers. One that it has forgotten is asked about once more, and no harm done.
MOST_KEYS = 10_000

# A locked row is written the next time: nothing waits for a lock here.
WRITE = statement(
    "last_used.write",
    """
    UPDATE api_keys SET last_used_at = now() WHERE ctid = ANY (ARRAY(
        SELECT key.tid FROM unnest(:key_ids::uuid[]) AS used (id), LATERAL (
            SELECT ctid AS tid, last_used_at FROM api_keys WHERE id = used.id FOR NO KEY UPDATE SKIP LOCKED
        ) AS key
        WHERE key.last_used_at IS NULL OR key.last_used_at <= now() - make_interval(secs => :every_seconds)
    ))
    """,
)


class KeysUsed:
    """The keys that were used and are not written yet."""

    def __init__(self) -> None:
        self.event = asyncio.Event()  # set when there is something to write
        self._unwritten: dict[UUID, None] = {}
        self._next: dict[UUID, float] = {}  # when each may be written again; the oldest first

    def note(self, key_id: UUID, now: float) -> None:
        """The key is used, at `now` of time.monotonic."""
        if now < self._next.get(key_id, now):
            return
        self._next.pop(key_id, None)
        if len(self._next) >= MOST_KEYS:
            del self._next[next(iter(self._next))]
        self._next[key_id] = now + _COME_BACK_SECONDS
        if len(self._unwritten) < MOST_KEYS:
            self._unwritten[key_id] = None
        self.event.set()

    async def write(self, database: Database) -> None:
        """Write what has come together. Raises DatabaseUnavailable; then it is written the next time."""
        taken = list(self._unwritten)
        if not taken:
            return
        async with database.connection() as connection:
            await connection.execute(WRITE, key_ids=taken, every_seconds=EVERY_SECONDS)
        for key_id in taken:
            self._unwritten.pop(key_id, None)
