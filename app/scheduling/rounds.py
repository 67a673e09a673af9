"""When each organization gets a pass of placement (placement.py).

Organizations that were woken take turns, and each turn is one bounded pass. Organizations with long passes take turns among
themselves, so that they delay no other organization. If a wake-up was lost, the look-around finds the waiting runs: it reads
the first run of each lane and the idle machines, and makes a pass only where a run can start. All replicas share one round.
"""

import logging
import time

from app.errors import Unavailable
from app.scheduling import lanes, rules
from app.scheduling.placement import Left, place
from app.services import Services
from app.stores.database import LockTimeout
from app.stores.statements import statement
from app.stores.wakeups import Turns
from app.telemetry.logs import describe

log = logging.getLogger("app.background")

# After a pass, an organization rests REST_FOR_WORK times as long as the pass took, within these bounds in seconds. If it is
# alone, it is served at once. Under load each of its passes places more runs, and other organizations come in between.
REST_FOR_WORK = 4
LEAST_REST = 0.01
LONGEST_REST = 1.0

# Slices of 1,000 machines and lanes: more than any organization has.
ALL_SLICES = 10_000

# The longest rest between two rounds of the look-around: after a lost wake-up, the run is found within 10 s. After a round of
# several slices the rest is REST_FOR_SLICE for each, about fifty times as long as a slice takes.
LOOK_AROUND_SECONDS = 8.0
REST_FOR_SLICE = 0.35
LANES_OF_SLICE = 500  # lanes in one slice
LANES_OF_ORGANIZATION = 200  # lanes of one organization in one slice
BEYOND_HELD = lanes.HELD * 2  # after the last lane of held runs


async def place_woken(services: Services) -> None:
    """A pass for each organization that was woken, in turn."""
    await _place_in_turn(services, services.wakeups.placement, slices=1)


async def place_large(services: Services) -> None:
    """The same for those for which one slice is not enough."""
    await _place_in_turn(services, services.wakeups.large_placement, slices=ALL_SLICES)


async def _place_in_turn(services: Services, turns: Turns, *, slices: int) -> None:
    while (organization_id := turns.take()) is not None:
        began = time.monotonic()
        try:
            left = await _pass(services, organization_id, slices=slices)
        except Unavailable:
            turns.wake(organization_id)
            raise
        took = time.monotonic() - began
        rest = min(max(LEAST_REST, REST_FOR_WORK * took), LONGEST_REST)
        turns.rest(organization_id, rest, again=left in (Left.MORE, Left.HELD))


async def _pass(services: Services, organization_id: str, *, slices: int = 1) -> Left:
    """One pass; machines that got a run are told. Raises DatabaseUnavailable."""
    try:
        hands_over = services.settings.hands_over
        done = await place(services.database, organization_id, slices=slices, hands_over=hands_over)
    except LockTimeout:
        log.warning({"event": "placement_waits", "organization_id": organization_id})
        return Left.HELD
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001 - one organization's trouble must not hold up the others
        log.error({"event": "placement_failed", "organization_id": organization_id, **describe(error)})
        return Left.NOTHING
    services.wakeups.placed({one.machine.id for one in done.placed})
    if done.left is Left.LARGE:
        services.wakeups.large_placement.wake(organization_id)
    return done.left


# --- the look-around --------------------------------------------------------------------------------------------------

# Whether a machine is idle for the first run of a lane, as a pass would decide it. If there are too many machines to look at,
# the answer is yes, and the pass decides.
_FREE = f"({rules.idle('m')} AND m.reserved_session_id IS NULL)"
_NAMED = f"""machines m
    WHERE m.id = coalesce(head.reserved_machine_id, head.pinned_machine_id) AND {rules.idle("m")}
      AND (m.reserved_session_id IS NULL OR m.id = head.reserved_machine_id)"""
_POOLED = f"""(
        SELECT machine_id, row_number() OVER () AS n FROM pool_machines WHERE pool_id = head.pool_ids[1]
        LIMIT 1 + 500 / cardinality(head.pool_ids)
    ) AS member CROSS JOIN LATERAL (SELECT * FROM machines WHERE id = member.machine_id LIMIT 1) AS m
    WHERE member.n > 500 / cardinality(head.pool_ids) OR ({_FREE} AND {rules.in_all_pools("head", "m.id")})"""
_ANY = f"""(
        SELECT *, row_number() OVER () AS n FROM machines WHERE organization_id = head.organization_id
        ORDER BY created_at DESC, id DESC LIMIT 1001
    ) AS m WHERE m.n > 1000 OR {_FREE}"""

_FIRST_OF_LANE = f"""
    SELECT r.organization_id, r.lane, r.session_id, r.pinned_machine_id, r.pool_ids FROM runs r
    WHERE {rules.unassigned("r")} AND (r.organization_id, r.lane) > ({{organization_id}}, {{lane}})
    ORDER BY r.organization_id, r.lane, r.queue_rank, r.queued_at, r.id LIMIT 1
"""

# The next slice of the round that all replicas share, if it is due and no other replica works on it. It hops from lane to lane
# of all organizations and keeps the organizations in which the first run of a lane could start now. An organization with many
# lanes is left to a pass. At the first lane of held runs, the scan goes on behind all held runs of the organization.
LOOK_AROUND = statement(
    "placement.look_around",
    f"""
    WITH RECURSIVE first_of_all AS (
        INSERT INTO shared_rounds (name) VALUES ('placement') ON CONFLICT DO NOTHING
    ), round AS MATERIALIZED (
        SELECT coalesce(position, ARRAY['', '']) AS position FROM shared_rounds
        WHERE name = 'placement' AND (position IS NOT NULL OR now() >= began_at + make_interval(
            secs => greatest(:period::float, least(slices * :rest_for_slice::float, :longest::float))))
        FOR UPDATE SKIP LOCKED
    ), heads AS MATERIALIZED (
        SELECT 1 AS n, 1 AS of_organization, first.* FROM round CROSS JOIN LATERAL (
            {_FIRST_OF_LANE.format(organization_id="round.position[1]", lane="round.position[2]")}
        ) AS first
        UNION ALL
        SELECT h.n + 1, CASE WHEN next.organization_id = h.organization_id THEN h.of_organization + 1 ELSE 1 END, next.*
        FROM heads h CROSS JOIN LATERAL (
            {
        _FIRST_OF_LANE.format(
            organization_id="h.organization_id",
            lane=f"CASE WHEN h.of_organization = {LANES_OF_ORGANIZATION} OR {rules.is_of_held('h.lane')}"
            f" THEN '{BEYOND_HELD}' ELSE h.lane END",
        )
    }
        ) AS next
        WHERE h.n < {LANES_OF_SLICE}
    ), moved AS (
        UPDATE shared_rounds SET
            began_at = CASE WHEN shared_rounds.position IS NULL THEN now() ELSE began_at END,
            slices = CASE WHEN shared_rounds.position IS NULL THEN 0 ELSE slices + 1 END,
            position = (SELECT ARRAY[organization_id, lane] FROM heads WHERE n = {LANES_OF_SLICE})
        FROM round WHERE shared_rounds.name = 'placement'
        RETURNING shared_rounds.position IS NOT NULL AS more
    ), wishes AS MATERIALIZED (
        SELECT DISTINCT h.organization_id, h.of_organization = {LANES_OF_ORGANIZATION} AS is_large,
               m.id AS reserved_machine_id, h.pinned_machine_id, h.pool_ids
        FROM heads h LEFT JOIN LATERAL (
            SELECT id FROM machines WHERE reserved_session_id = h.session_id LIMIT 1
        ) AS m ON true
        WHERE NOT {rules.is_of_held("h.lane")} AND (h.session_id IS NULL OR NOT {rules.session_at_work("h")})
    )
    SELECT (SELECT more FROM moved) AS more, ARRAY(
        SELECT DISTINCT head.organization_id FROM wishes head WHERE head.is_large OR CASE
            WHEN coalesce(head.reserved_machine_id, head.pinned_machine_id) IS NOT NULL THEN {rules.exists(_NAMED)}
            WHEN cardinality(head.pool_ids) > 0 THEN {rules.exists(_POOLED)}
            ELSE {rules.exists(_ANY)}
        END
    ) AS startable
    """,
)


async def look_around(services: Services) -> bool:
    """A slice of the round that is due, and a pass where a run could start; whether the round goes on."""
    async with services.database.connection() as connection:
        found = await connection.fetchrow(
            LOOK_AROUND,
            period=services.settings.background_period_seconds,
            rest_for_slice=REST_FOR_SLICE,
            longest=LOOK_AROUND_SECONDS,
        )
        if found is None or found["more"] is None:
            return False
    for organization_id in found["startable"]:
        if await _pass(services, organization_id) in (Left.MORE, Left.HELD):
            services.wakeups.placement.wake(organization_id)
    return bool(found["more"])
