"""Signs of life of machines: noted in memory by requests, and written later, outside of any.

A sign of life is an executor's look for work, a report or an upload for the machine's run, any request of a key that is bound
to the machine, and `status: connected`. What follows when they stop is in scheduling/silence.py.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from app.stores.database import Database
from app.stores.statements import statement

log = logging.getLogger("app.machines")

# `last_seen` of a machine moves at most so often; more often only where silence is noticed sooner.
EVERY_SECONDS = 10.0

# Machines that a process remembers while the database is away. It forgets the rest: they go on giving signs.
MOST_MACHINES = 20_000
BATCH = 1000

# A machine that is offline only because it was silent is connected again, if the sign came after that. A locked row is written
# the next time: nothing waits for a lock here.
WRITE = statement(
    "signs_of_life.write",
    """
    WITH heard AS MATERIALIZED (
        SELECT machine.* FROM unnest(:organization_ids::text[], :machine_ids::uuid[], :ages::float[])
            AS sign (organization_id, id, age), LATERAL (
            SELECT ctid AS tid, organization_id, status, last_seen, look_at,
                   silenced_at < clock_timestamp() - make_interval(secs => sign.age) AS is_back
            FROM machines WHERE id = sign.id FOR NO KEY UPDATE SKIP LOCKED
        ) AS machine
        WHERE machine.organization_id = sign.organization_id AND (
            machine.is_back OR machine.last_seen <= now() - make_interval(secs => :every)
            OR (machine.look_at IS NULL AND :silence > 0 AND machine.status = 'connected'))
    )
    UPDATE machines SET
        last_seen = greatest(machines.last_seen, now()),
        status = CASE WHEN heard.is_back AND heard.status = 'disconnected' THEN 'connected' ELSE heard.status END,
        silenced_at = CASE WHEN NOT heard.is_back THEN silenced_at END,
        look_at = CASE WHEN :silence > 0 AND (heard.is_back OR heard.status = 'connected')
                  THEN coalesce(machines.look_at, now() + make_interval(secs => :silence)) END
    FROM heard WHERE machines.ctid = heard.tid
    RETURNING machines.id, machines.organization_id, coalesce(heard.is_back, false) AS is_back
    """,
)

_Sign = tuple[str, UUID]  # organization and machine, as a request gave them


class SignsOfLife:
    """Signs of life of machines that are not written yet, and the machines with an executor that waits for work now."""

    def __init__(self, silence_seconds: float) -> None:
        self.event = asyncio.Event()  # set when there is something to write
        self._silence = silence_seconds
        self._every = min(EVERY_SECONDS, silence_seconds / 3) if silence_seconds else EVERY_SECONDS
        self._unwritten: dict[_Sign, float] = {}  # when the last one came, by time.monotonic
        self._waiting: dict[object, tuple[_Sign, Callable[[], bool]]] = {}
        self._counted_at = time.monotonic()

    def note(self, organization_id: str, machine_id: UUID) -> None:
        """A sign of life of a machine of this organization."""
        if len(self._unwritten) < MOST_MACHINES:
            self._unwritten[organization_id, machine_id] = time.monotonic()
            self.event.set()

    @contextmanager
    def waits(self, organization_id: str, machine_id: UUID, is_there: Callable[[], bool]) -> Iterator[None]:
        """The machine's executor waits for work: one long sign of life, while `is_there` says so."""
        sign, wait = (organization_id, machine_id), object()
        self.note(*sign)
        self._waiting[wait] = sign, is_there
        try:
            yield
        finally:
            del self._waiting[wait]

    async def write(self, database: Database) -> set[str]:
        """Write what has come together; the organizations of machines that are back. Raises DatabaseUnavailable."""
        now = time.monotonic()
        if now - self._counted_at >= self._every:
            self._counted_at = now
            for sign, is_there in self._waiting.values():
                if is_there():
                    self.note(*sign)
        taken, self._unwritten = self._unwritten, {}
        back: set[str] = set()
        try:
            signs = list(taken.items())
            for first in range(0, len(signs), BATCH):
                back |= await self._write(database, signs[first : first + BATCH], now)
        except Exception:
            self._unwritten = taken | self._unwritten
            raise
        return back

    async def _write(self, database: Database, signs: list[tuple[_Sign, float]], now: float) -> set[str]:
        async with database.connection() as connection:
            rows = await connection.fetch(
                WRITE,
                organization_ids=[organization_id for (organization_id, _), _ in signs],
                machine_ids=[machine_id for (_, machine_id), _ in signs],
                ages=[max(0.0, now - at) for _, at in signs],
                every=self._every,
                silence=float(self._silence),
            )
        back = [row for row in rows if row["is_back"]]
        for row in back:
            log.info({"event": "machine_back", "machine_id": str(row["id"]), "organization_id": row["organization_id"]})
        return {row["organization_id"] for row in back}
