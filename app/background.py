"""Settle: one task per process that does what follows a commit. It is woken after commits and also polls, so nothing
depends on the wake-up; every replica runs one, and their work is divided by row locks.

Each round: assign machines, delete what is due, end silent runs, expire attachments and old idempotency keys, remove the
outputs of superseded attempts.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from app.errors import Unavailable
from app.events import prune_events
from app.runs.attachments import expire_attachments
from app.runs.ending import end_silent_runs, note_expired_secrets
from app.runs.outputs import PRUNE_OUTPUTS
from app.scheduling.placement import place
from app.services import Services
from app.stores import deletions
from app.stores.database import LockTimeout
from app.telemetry.logs import describe

log = logging.getLogger("app.background")

# Organizations that have both a waiting run and a machine that might take one.
WITH_WORK = """
WITH RECURSIVE waiting AS (
    (SELECT organization_id FROM runs
     WHERE status = 'scheduling' AND assigned_machine_id IS NULL ORDER BY organization_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.organization_id FROM runs r
            WHERE r.status = 'scheduling' AND r.assigned_machine_id IS NULL AND r.organization_id > waiting.organization_id
            ORDER BY r.organization_id LIMIT 1)
    FROM waiting WHERE waiting.organization_id IS NOT NULL
)
SELECT organization_id FROM waiting WHERE organization_id IS NOT NULL AND EXISTS (
    SELECT FROM machines m
    WHERE m.organization_id = waiting.organization_id AND m.status = 'connected' AND m.is_available
      AND NOT EXISTS (SELECT FROM runs r WHERE r.assigned_machine_id = m.id AND r.status IN ('scheduling', 'running')))
"""

FORGET_KEYS = """
DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM idempotency_keys WHERE expires_at <= now() ORDER BY expires_at LIMIT 1000 FOR UPDATE SKIP LOCKED))
"""

# The least rest between two rounds, in seconds. A lone wake-up is answered at once; under load each round does more for its
# price, and rests four times as long as it took (at most a period), so that requests have most of the process.
PLACEMENT_REST = 0.01
COLLECTOR_REST = 0.1
REST_FOR_WORK = 4


class Background:
    """The background task of one process."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._database = services.database
        self._secrets = services.secrets
        self._files = services.files
        self._wakeups = services.wakeups
        self._look_around_at = 0.0
        self._more_keys = asyncio.Event()
        self._more_outputs = asyncio.Event()
        self._more_events = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. A loop for each, so that a frozen Vault never delays an assignment."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop(self._place, self._wakeups.placement, PLACEMENT_REST))
            group.create_task(self._loop(self._collect, self._wakeups.collector, COLLECTOR_REST))
            group.create_task(self._loop(self._tidy, asyncio.Event()))
            group.create_task(self._loop(self._forget, self._more_keys))
            group.create_task(self._loop(self._prune, self._more_outputs))
            group.create_task(self._loop(self._announce, asyncio.Event()))
            group.create_task(self._loop(self._prune_events, self._more_events))

    async def _loop(self, work: Callable[[], Awaitable[None]], wake: asyncio.Event, rest: float = 0) -> None:
        period = self._settings.background_period_seconds
        while True:
            began = time.monotonic()
            try:
                await work()
            except Unavailable as error:
                log.warning({"event": "background_unavailable", "work": work.__name__, "code": error.code})
                wake.clear()  # whatever is woken now meets the same failure: wait a period
            except Exception as error:  # noqa: BLE001 - one bad round must not end the loop for ever
                log.error({"event": "background_failed", "work": work.__name__, **describe(error)})
            await asyncio.sleep(min(max(rest, REST_FOR_WORK * (time.monotonic() - began)), period))
            try:
                async with asyncio.timeout(period):
                    await wake.wait()
            except TimeoutError:
                continue
            finally:
                wake.clear()

    async def _place(self) -> None:
        """One pass for each organization that was woken and, once a period, for each that may have something to place."""
        woken = self._wakeups.take_organizations()
        if time.monotonic() >= self._look_around_at:
            # Also while wake-ups keep coming: another replica may have died between a commit and its wake-up.
            self._look_around_at = time.monotonic() + self._settings.background_period_seconds
            async with self._database.connection() as connection:
                woken.update(row["organization_id"] for row in await connection.fetch(WITH_WORK))
        for organization_id in woken:
            try:
                placed, again = await place(self._database, organization_id)
            except LockTimeout:  # another replica's pass over it takes long
                log.warning({"event": "placement_waits", "organization_id": organization_id})
                continue
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 - one organization's trouble must not hold up the others
                log.error({"event": "placement_failed", "organization_id": organization_id, **describe(error)})
                continue
            self._wakeups.assigned({one.machine.id for one in placed})
            if again:  # after the others had their turn
                self._wakeups.wake_placement(organization_id)

    async def _collect(self) -> None:
        while (
            await deletions.collect(self._database, self._secrets, self._files, noted=note_expired_secrets)
            == deletions.BATCH
        ):
            pass  # a full batch: there is more

    async def _tidy(self) -> None:
        organizations = await end_silent_runs(self._database, self._settings)
        organizations |= await expire_attachments(self._database)
        for organization_id in organizations:
            self._wakeups.wake(organization_id)

    async def _forget(self) -> None:
        async with self._database.connection() as connection:
            if await connection.execute(FORGET_KEYS) != "DELETE 0":
                self._more_keys.set()  # to forget: again, after a rest

    async def _prune(self) -> None:
        async with self._database.connection() as connection:
            if await connection.execute(PRUNE_OUTPUTS) != "DELETE 0":
                self._more_outputs.set()

    async def _prune_events(self) -> None:
        if await prune_events(self._database, self._settings.event_retention_days):
            self._more_events.set()

    async def _announce(self) -> None:
        """Assignments that other replicas made, for callers that wait here: one query for all of them."""
        machines: set[UUID] = self._wakeups.awaited_machines()
        if machines:
            async with self._database.connection() as connection:
                rows = await connection.fetch(
                    "SELECT assigned_machine_id FROM runs"
                    " WHERE assigned_machine_id = ANY($1::uuid[]) AND status = 'scheduling'",
                    list(machines),
                )
            self._wakeups.assigned({row["assigned_machine_id"] for row in rows})
