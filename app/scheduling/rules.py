"""Words of the scheduler as SQL conditions: who waits, who is at work, which machine is idle.

Placement, lists and the reason of a waiting run must mean the same by them, and by the partial indexes that serve them
(models.py). Each takes the name that the row has in the statement.
"""


def waits(run: str) -> str:
    """In the queue of its lane."""
    return f"{run}.status = 'scheduling' AND {run}.assigned_machine_id IS NULL"


def at_work(run: str) -> str:
    """Running, or given to a machine that is about to start it. While one run of a session is, the others wait."""
    return f"({run}.status = 'running' OR ({run}.status = 'scheduling' AND {run}.assigned_machine_id IS NOT NULL))"


def up(machine: str) -> str:
    return f"{machine}.status = 'connected' AND {machine}.is_available"


def occupied(machine: str) -> str:
    return (
        "EXISTS (SELECT FROM runs occupant"
        f" WHERE occupant.assigned_machine_id = {machine}.id AND occupant.status IN ('scheduling', 'running'))"
    )


def idle(machine: str) -> str:
    """It could start a run now, if it is reserved for nobody else."""
    return f"{up(machine)} AND NOT {occupied(machine)}"
