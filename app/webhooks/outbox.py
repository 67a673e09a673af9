"""The outbox: one row for each event, written by the transaction that causes the event. delivery.py sends them.

This file knows the table and nothing of runs: the writer of an event makes its body.
"""

from app.models import WebhookEvent
from app.stores.statements import Statement, fragment, statement


def inserted(selected: str) -> str:
    """SQL that writes the events that `selected` finds: its columns are id, organization_id, run_id, attempt, event_type,
    occurred_at, body. An event that is about no run has neither run_id nor attempt."""
    return f"""
    INSERT INTO {WebhookEvent.__tablename__} (id, organization_id, run_id, attempt, event_type, occurred_at, body)
    {selected}
    ON CONFLICT (run_id, attempt) DO NOTHING
    """


def insert_events(name: str, selected: str) -> Statement:
    """A statement that writes the events that `selected` finds, as in `inserted`."""
    return statement(name, fragment(inserted(selected)))


# The log of what was sent stays; what it said goes with the run.
FORGET_BODIES = statement(
    "webhooks.forget_bodies",
    "UPDATE webhook_events SET body = NULL WHERE run_id = ANY(:run_ids) AND body IS NOT NULL",
)
