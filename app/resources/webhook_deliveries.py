"""Deliveries of webhooks, as a caller sees them: list, look up, test, send again. webhooks/delivery.py sends them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import orjson

from app.access.auth import Principal
from app.errors import WebhookBodyDeleted, WebhookDeliveryNotFound, WebhookEndpointDisabled, WebhookEndpointNotFound
from app.idempotency import Reply, Resource, WriteRequest, once
from app.models import RunStatus
from app.resources import webhook_endpoints
from app.runs import attempts, projection
from app.schemas.webhooks import WebhookRecover
from app.services import Services
from app.stores.database import Connection, Database, Record
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import statement


def _of_event(column: str) -> str:
    return f"(SELECT event.{column} FROM webhook_events event WHERE event.id = webhook_deliveries.event_id)"


DELIVERY_COLUMNS = {
    "id": "webhook_deliveries.id::text",
    "endpoint_id": "webhook_deliveries.endpoint_id::text",
    "event_id": "webhook_deliveries.event_id::text",
    "event_type": _of_event("event_type"),
    "occurred_at": _of_event("occurred_at"),
    "run_id": _of_event("run_id::text"),
    "attempt": _of_event("attempt"),
    "status": "webhook_deliveries.status",
    "tries": "webhook_deliveries.tries",
    "next_try_at": "CASE WHEN webhook_deliveries.status = 'pending' THEN webhook_deliveries.due_at END",
    "tried_at": "webhook_deliveries.tried_at",
    "duration_ms": "webhook_deliveries.duration_ms",
    "response_status": "webhook_deliveries.response_status",
    "response_body": "webhook_deliveries.response_body",
    "error": "webhook_deliveries.error",
    "created_at": "webhook_deliveries.created_at",
}

LISTED_DELIVERIES = Listing(
    "webhooks.deliveries",
    "webhook_deliveries",
    octets="coalesce(octet_length(to_json(webhook_deliveries.response_body)::text), 0) + 1000",
    row="webhook_deliveries.id = listed.key",
)
DELIVERY_ROWS = statement(
    "webhooks.deliveries.rows",
    f"SELECT {columns(DELIVERY_COLUMNS)} FROM {in_order('webhook_deliveries')} ORDER BY page.n",
)

_OF_ENDPOINT = "(SELECT true FROM webhook_endpoints e WHERE e.id = webhook_deliveries.endpoint_id)"
_DELIVERY = f"FROM webhook_deliveries WHERE id = :delivery_id AND organization_id = :organization_id AND {_OF_ENDPOINT}"

GET_DELIVERY = statement("webhooks.delivery.get", f"SELECT {columns(DELIVERY_COLUMNS)} {_DELIVERY}")
GET_LOG = statement("webhooks.delivery.log", f"SELECT {columns(DELIVERY_COLUMNS)}, last_tries {_DELIVERY}")

# What belongs to a run: its events by its id alone, for a plan of an empty table could look the organization's up instead.
_OF_RUN = f"""
    webhook_deliveries.organization_id = :organization_id AND {_OF_ENDPOINT} AND webhook_deliveries.event_id = ANY (ARRAY(
        SELECT event.id FROM webhook_events event WHERE event.run_id = :run_id))
"""


async def get_delivery(connection: Connection, organization_id: str, delivery_id: UUID) -> dict[str, Any]:
    """One delivery. Raises WebhookDeliveryNotFound."""
    row = await connection.fetchrow(GET_DELIVERY, delivery_id=delivery_id, organization_id=organization_id)
    if row is None:
        raise WebhookDeliveryNotFound
    return dict(row.items())


async def get_log(connection: Connection, organization_id: str, delivery_id: UUID) -> dict[str, Any]:
    """One delivery with its last tries. Raises WebhookDeliveryNotFound."""
    row = await connection.fetchrow(GET_LOG, delivery_id=delivery_id, organization_id=organization_id)
    if row is None:
        raise WebhookDeliveryNotFound
    tries = orjson.loads(row["last_tries"])
    return dict(row.items()) | {
        "last_tries": [one | {"tried_at": datetime.fromisoformat(one["tried_at"])} for one in tries]
    }


async def list_of_run(database: Database, principal: Principal, run_id: UUID, part: Slice) -> dict[str, object]:
    """One page of what was sent of a run's endings, newest first, also of one that was deleted. Raises RunNotFound, and
    Invalid as paging.page does."""
    named = {"organization_id": principal.organization_id, "run_id": run_id}
    found = await page(database, LISTED_DELIVERIES, (_OF_RUN,), part, named, DELIVERY_ROWS)
    if not found.total.rows:
        async with database.connection() as connection:
            await attempts.check_known(connection, run_id, principal)
    return part.shown([dict(row.items()) for row in found.rows], found)


async def _show_delivery(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get_delivery(connection, principal.organization_id, ids[0]))


DELIVERY = Resource(_show_delivery)


async def list_deliveries(
    database: Database, organization_id: str, endpoint_id: UUID, status: str | None, part: Slice
) -> dict[str, object]:
    """One page of an endpoint's deliveries. Raises WebhookEndpointNotFound, and Invalid as paging.page does."""
    condition, values = where(
        "webhook_deliveries", endpoint_id=endpoint_id, organization_id=organization_id, status=status
    )
    async with database.connection() as connection:
        await webhook_endpoints.get(connection, organization_id, endpoint_id)
    found = await page(database, LISTED_DELIVERIES, (condition,), part, values, DELIVERY_ROWS)
    return part.shown([dict(row.items()) for row in found.rows], found)


# --- what a caller asks for ----------------------------------------------------------------------------------------------

# Fanned out already: it is for this endpoint alone.
INSERT_TEST = statement(
    "webhooks.insert_test",
    """
    WITH event AS (
        INSERT INTO webhook_events (id, organization_id, event_type, occurred_at, body, is_fanned_out)
        VALUES (:event_id, :organization_id, 'run_complete', :occurred_at, :body, true)
        RETURNING id, organization_id
    )
    INSERT INTO webhook_deliveries (id, event_id, endpoint_id, organization_id)
    SELECT :delivery_id, id, :endpoint_id, organization_id FROM event
    """,
)

LOCK_DELIVERY = statement(
    "webhooks.delivery.lock",
    """
    SELECT e.id IS NOT NULL AS is_known, e.disabled_at IS NOT NULL AS is_disabled, event.body IS NOT NULL AS has_body
    FROM (
        SELECT event_id, endpoint_id FROM webhook_deliveries
        WHERE id = :delivery_id AND organization_id = :organization_id FOR NO KEY UPDATE
    ) AS d
    CROSS JOIN LATERAL (SELECT body FROM webhook_events WHERE id = d.event_id LIMIT 1) AS event
    LEFT JOIN LATERAL (SELECT id, disabled_at FROM webhook_endpoints WHERE id = d.endpoint_id LIMIT 1) AS e ON true
    """,
)

# One that is being sent at this moment goes on.
RESEND = statement(
    "webhooks.delivery.resend",
    """
    UPDATE webhook_deliveries SET status = 'pending', tries = 0, due_at = now(), lease = NULL
    WHERE id = :delivery_id AND (status <> 'pending' OR lease IS NULL OR due_at <= now())
    """,
)

RECOVER = statement(
    "webhooks.start_recovery",
    """
    INSERT INTO webhook_recoveries (endpoint_id, organization_id, after_at, after_id, until)
    VALUES (:endpoint_id, :organization_id, :since, '00000000-0000-0000-0000-000000000000', now())
    ON CONFLICT (endpoint_id) DO UPDATE
    SET after_at = least(webhook_recoveries.after_at, excluded.after_at), after_id = excluded.after_id, until = excluded.until
    """,
)


async def send_test(services: Services, write: WriteRequest, endpoint_id: UUID) -> Reply:
    """Send an example to this endpoint. Raises WebhookEndpointNotFound, WebhookEndpointDisabled."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await _lock_enabled(connection, organization_id, endpoint_id)
        event_id, delivery_id, occurred_at = (
            uuid4(),
            uuid4(),
            datetime.fromtimestamp(services.database.clock.now(), UTC),
        )
        await connection.execute(
            INSERT_TEST,
            event_id=event_id,
            delivery_id=delivery_id,
            endpoint_id=endpoint_id,
            organization_id=organization_id,
            occurred_at=occurred_at,
            body=encode(_example(event_id, organization_id, occurred_at)),
        )
        shown = await _show_delivery(connection, write.principal, [delivery_id])
        return Reply(201, shown, [delivery_id], has_event=True)

    return await once(services, write, work, DELIVERY)


def _example(event_id: UUID, organization_id: str, occurred_at: datetime) -> dict[str, Any]:
    """A message of a run that does not exist: its ids are all zeros."""
    nobody = UUID(int=0)
    run: dict[str, Any] = dict.fromkeys([*projection.RUN_COLUMNS, *projection.RUN_UNSUPPORTED])
    run |= {
        "id": nobody,
        "workflow_id": nobody,
        "organization_id": organization_id,
        "status": RunStatus.SUCCESS,
        "attempt": 1,
        "is_priority": False,
        "output_data": {"test": True},
        "input_attachment_ids": [],
        "output_attachment_ids": [],
        **dict.fromkeys(("created_at", "started_at", "ended_at", "changed_at"), occurred_at),
    }
    return {"event_id": event_id, "event_type": "run_complete", "occurred_at": occurred_at, "run": run}


async def resend(services: Services, write: WriteRequest, delivery_id: UUID) -> Reply:
    """Send a delivery again, whatever became of it, under its old id. Raises WebhookDeliveryNotFound, WebhookEndpointDisabled,
    WebhookBodyDeleted."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        row: Record | None = await connection.fetchrow(
            LOCK_DELIVERY, delivery_id=delivery_id, organization_id=organization_id
        )
        if row is None or not row["is_known"]:
            raise WebhookDeliveryNotFound
        if row["is_disabled"]:
            raise WebhookEndpointDisabled
        if not row["has_body"]:
            raise WebhookBodyDeleted
        await connection.execute(RESEND, delivery_id=delivery_id)
        shown = await _show_delivery(connection, write.principal, [delivery_id])
        return Reply(200, shown, [delivery_id], has_event=True)

    return await once(services, write, work, DELIVERY)


async def recover(services: Services, write: WriteRequest, endpoint_id: UUID, options: WebhookRecover) -> Reply:
    """Begin to send again what the endpoint has missed since a time; the loop does it in batches. Raises
    WebhookEndpointNotFound, WebhookEndpointDisabled."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await _lock_enabled(connection, organization_id, endpoint_id)
        await connection.execute(RECOVER, endpoint_id=endpoint_id, organization_id=organization_id, since=options.since)
        return Reply(
            202, await webhook_endpoints.show(connection, write.principal, [endpoint_id]), [endpoint_id], has_event=True
        )

    return await once(services, write, work, webhook_endpoints.RESOURCE)


async def _lock_enabled(connection: Connection, organization_id: str, endpoint_id: UUID) -> None:
    row = await connection.fetchrow(
        webhook_endpoints.LOCK_ENDPOINT, endpoint_id=endpoint_id, organization_id=organization_id
    )
    if row is None:
        raise WebhookEndpointNotFound
    if row["is_disabled"]:
        raise WebhookEndpointDisabled
