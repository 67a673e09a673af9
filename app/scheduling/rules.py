"""Words of the scheduler as SQL conditions: who waits, who is at work, which machine is idle.

Placement, lists and the reason of a waiting run must mean the same by them, and by the partial indexes that serve them
(models.py). Each takes the name that the row has in the statement.
"""

from app.models import IS_ACTIVE
from app.scheduling.lanes import HELD


def exists(source: str) -> str:
    """Whether there is a row, by a look into an index for each row that asks.

    EXISTS may become a join that reads a whole index, and a plan that was made while it was short is kept.
    """
    return f"((SELECT true FROM {source} LIMIT 1) IS NOT NULL)"


def is_of_held(lane: str) -> str:
    """The lane is one of held runs. "C": a lane that is not read from the table would have the database's collation."""
    return f"{lane} > '{HELD}' COLLATE " + '"C"'


def is_active(run: str = "") -> str:
    """Neither ended nor cancelled: in the queue, held until a time, given to a machine, or running."""
    return f"{run}.{IS_ACTIVE}" if run else IS_ACTIVE


def unassigned(run: str) -> str:
    """It has no machine yet: it waits in the queue, or is held until a time."""
    return f"{run}.status = 'scheduling' AND {run}.assigned_machine_id IS NULL"


def waits(run: str) -> str:
    """In the queue of its lane."""
    return f"{unassigned(run)} AND {run}.lane < '{HELD}' COLLATE " + '"C"'


def held(run: str) -> str:
    """Held until its `queued_at`: it waits for a time, and not for a machine."""
    return f"{unassigned(run)} AND {is_of_held(f'{run}.lane')}"


def at_work(run: str) -> str:
    """Running, or given to a machine that is about to start it. While one run of a session is, the others wait."""
    return f"({run}.status = 'running' OR ({run}.status = 'scheduling' AND {run}.assigned_machine_id IS NOT NULL))"


def session_at_work(run: str) -> str:
    """One of the run's session is at work."""
    return exists(f"runs colleague WHERE colleague.session_id = {run}.session_id AND {at_work('colleague')}")


def up(machine: str) -> str:
    return f"{machine}.status = 'connected' AND {machine}.is_available"


def occupied(machine: str) -> str:
    return exists(f"runs occupant WHERE occupant.assigned_machine_id = {machine}.id AND {is_active('occupant')}")


def idle(machine: str) -> str:
    """The machine could start a run now, unless it is reserved for another session."""
    return f"{up(machine)} AND NOT {occupied(machine)}"


def in_all_pools(run: str, machine_id: str) -> str:
    """The machine is in each of the run's pools."""
    member = exists(f"pool_machines member WHERE member.pool_id = wanted.id AND member.machine_id = {machine_id}")
    return f"NOT EXISTS (SELECT FROM unnest({run}.pool_ids) AS wanted (id) WHERE NOT {member})"
