"""The session rules: which session a run has next. Pure functions over a row and a request.

A session is an id shared by runs, for which one machine is reserved. Which machine that is, scheduling knows.
"""

from dataclasses import dataclass
from uuid import UUID

from app.errors import Invalid
from app.schemas.runs import RunRetry
from app.stores.database import Record


@dataclass(frozen=True, slots=True)
class Session:
    """A run's place in a session; all None outside one."""

    id: UUID | None
    alias: str | None
    release_after: bool | None


def refuse_contradictions(session_id: UUID | None, start_session: bool | None) -> None:
    """Raises Invalid for a body that asks for two sessions at once."""
    if session_id is not None and start_session:
        raise Invalid(
            (("body", "start_session"), "Send either session_id or start_session, not both.", "session_contradiction")
        )


def alias_needs_session(session: Session) -> Session:
    """Raises Invalid for an alias without a session to be known in."""
    if session.alias is not None and session.id is None:
        raise Invalid(
            (("body", "session_alias"), "The run has no session: send session_id or start_session.", "session_alias")
        )
    return session


def next_session(run: Record, options: RunRetry, new_session_id: UUID | None) -> Session:
    """The session of the next attempt; `new_session_id` is for start_session. release_session_after is applied last.

    Raises Invalid for an alias without a session.
    """
    session = Session(run["session_id"], run["session_alias"], run["release_session_after"])
    if options.session_id is not None:
        session = Session(options.session_id, session.alias, session.release_after)
    elif options.start_session:
        session = Session(new_session_id, session.alias, session.release_after)
    elif options.reuse_session is False:
        session = Session(None, None, None)
    if options.session_alias is not None:
        session = Session(session.id, options.session_alias, session.release_after)
    if options.release_session_after is not None:
        session = Session(session.id, session.alias, options.release_session_after)
    return alias_needs_session(session)
