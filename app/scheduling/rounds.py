"""When organizations are looked at for something to place; what a look does is in placement.py."""

import logging
import time

from app.errors import Unavailable
from app.scheduling.placement import place
from app.services import Services
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


async def place_woken(services: Services) -> None:
    """One pass for each organization that was woken and, once a period, for each that may have something to place."""
    database, wakeups = services.database, services.wakeups
    woken = wakeups.take_organizations()
    if time.monotonic() >= wakeups.look_around_at:
        # Also while wake-ups keep coming: another replica may have died between a commit and its wake-up.
        wakeups.look_around_at = time.monotonic() + services.settings.background_period_seconds
        async with database.connection() as connection:
            woken.update(row["organization_id"] for row in await connection.fetch(WITH_WORK))
    for organization_id in woken:
        try:
            placed, again = await place(database, organization_id)
        except LockTimeout:  # another replica's pass over it takes long
            log.warning({"event": "placement_waits", "organization_id": organization_id})
            continue
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 - one organization's trouble must not hold up the others
            log.error({"event": "placement_failed", "organization_id": organization_id, **describe(error)})
            continue
        wakeups.assigned({one.machine.id for one in placed})
        if again:  # after the others had their turn
            wakeups.wake_placement(organization_id)
