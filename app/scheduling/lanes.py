"""Lanes: the partitions of an organization's queue. Runs that may go to the same places wait in one lane.

The name of a lane says where its runs may go, and placement reads lanes in the order of their names: `any`, the lanes of pinned
machines, of pools and of sessions, and after all of these the lanes of held runs.
"""

import hashlib
from collections.abc import Iterable
from datetime import datetime
from typing import Final
from uuid import UUID

ANY: Final = "any"
MACHINE: Final = "machine:"
POOLS: Final = "pools:"
SESSION: Final = "session:"

# After the last lane of a pinned machine: the character sorts behind every digit of an id.
AFTER_MACHINES: Final = f"{MACHINE}~"

# The lane of a held run begins with this mark, and every lane of the queue sorts before it. The rest of the name is the lane
# that the run joins when it is due.
HELD: Final = "~"


def lane(
    session_id: UUID | None, pinned: UUID | None, pool_ids: Iterable[UUID] | None, is_priority: bool
) -> tuple[str, int]:
    """The lane in which a run waits, and its rank there: 0 goes before 1.

    Pools are hashed: an entry of an index has room for the ids of 71 pools, and a run may ask for more.
    """
    rank = 0 if is_priority and session_id is None else 1
    if session_id is not None:
        return f"{SESSION}{session_id}", rank
    if pinned is not None:
        return f"{MACHINE}{pinned}", rank
    pools = ",".join(sorted({str(pool) for pool in pool_ids or ()}))
    return (f"{POOLS}{hashlib.sha256(pools.encode()).hexdigest()}" if pools else ANY), rank


def held_lane(not_before: datetime | None, wanted: str) -> str:
    """The lane of a run that is held until `not_before` and then joins the lane `wanted`; None: the run is not held."""
    return wanted if not_before is None else f"{HELD}{wanted}"


def wanted_lane(lane: str) -> str:
    """The lane that a run joins when it is due; the lane itself if the run is not held."""
    return lane.removeprefix(HELD)
