"""Fences: whether a report or an upload is still about what the run is at. An executor can be late, and there can be two.

attempt     one more with each retry
assignment  one more each time the run is given to a machine, also within an attempt
claim       chosen by an executor's process, and taken by the report that begins the attempt: of two processes one begins it

Without any of them nothing is fenced, as with the vendor's executors.
"""

from typing import Protocol
from uuid import UUID

from app.access.auth import Principal
from app.errors import AlreadyClaimed, AssignmentSuperseded, AttemptSuperseded, Invalid
from app.models import RunStatus
from app.stores.database import Record

NAMES = ("attempt", "assignment", "claim")
FIELDS = frozenset(NAMES)

# What `refuse_late` needs of a run. A claim is that of its attempt: a retry by the previous version leaves the old one behind.
COLUMNS = """
    status, attempt, assignment, assigned_machine_id, started_at, CASE WHEN claim_attempt = attempt THEN claim END AS claim
"""


class Fenced(Protocol):
    """What a report or an upload says of itself."""

    @property
    def attempt(self) -> int | None: ...
    @property
    def assignment(self) -> int | None: ...
    @property
    def claim(self) -> UUID | None: ...


def check(given: Fenced) -> None:
    """Raises Invalid for a claim without an assignment: it would fence nothing once the run is placed again."""
    if given.claim is not None and given.assignment is None:
        raise Invalid((("body", "assignment"), "This field is required with claim.", "missing"))


def require(principal: Principal, given: Fenced) -> None:
    """Raises Invalid for an executor that is bound to a machine and does not say all of this: it could be late."""
    if principal.machine_id is not None and (missing := [name for name in NAMES if getattr(given, name) is None]):
        sentence = "This field is required of a key that is bound to a machine."
        raise Invalid(*((("body", name), sentence, "missing") for name in missing))


def refuse_late(run: Record, given: Fenced, *, only_stops: bool = False) -> None:
    """Raises AttemptSuperseded, AssignmentSuperseded or AlreadyClaimed. `only_stops`: it may do without the claim."""
    if given.attempt not in (None, run["attempt"]):
        raise AttemptSuperseded(run["attempt"])
    if given.assignment is not None:
        # The run was taken from its machine and not given to another one yet. A run that never had a machine was not taken.
        taken = run["status"] == RunStatus.SCHEDULING and run["assigned_machine_id"] is None and run["assignment"] > 0
        if taken or given.assignment != run["assignment"]:
            raise AssignmentSuperseded(run["assignment"])
    if given.claim is None:
        is_another = run["claim"] is not None and not only_stops
    else:
        is_another = run["started_at"] is not None and given.claim != run["claim"]
    if is_another:
        raise AlreadyClaimed
