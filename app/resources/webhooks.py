"""Webhook endpoints with their signing secrets, and the deliveries to them: what a caller asks for. What is sent, and when, is
in webhooks/delivery.py.

A secret is made here, written to Vault under a fresh name that is on the deletion list first, and shown by `get_secret` alone.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson

from app.access.auth import Principal
from app.errors import (
    DatabaseUnavailable,
    Invalid,
    OutcomeUnknown,
    TooManyWebhookEndpoints,
    TooManyWebhookSecrets,
    VaultUnavailable,
    WebhookBodyDeleted,
    WebhookDeliveryNotFound,
    WebhookEndpointDisabled,
    WebhookEndpointNotFound,
)
from app.idempotency import Reply, Resource, WriteRequest, check_or_replay, once
from app.models import RunStatus
from app.runs import attempts, projection
from app.schemas.webhooks import WebhookEndpointCreate, WebhookEndpointUpdate, WebhookRecover
from app.services import Services
from app.stores import deletions, locks
from app.stores.database import Connection, Database, Record
from app.stores.deletions import Name
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import statement
from app.webhooks import signing
from app.webhooks.addresses import Allowed, NotAllowed

MAX_ENDPOINTS = 20  # of an organization: each makes one more copy of every message
MAX_SECRETS = 5  # of an endpoint that sign at the same time
OVERLAP = timedelta(hours=24)  # how long a secret that was rotated away goes on signing
EVENT_TYPES = ["run_complete"]

# --- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS = {
    "id": "webhook_endpoints.id::text",
    "organization_id": "webhook_endpoints.organization_id",
    "user_id": "webhook_endpoints.user_id::text",
    "url": "webhook_endpoints.url",
    "description": "webhook_endpoints.description",
    "event_types": "webhook_endpoints.event_types",
    "disabled": "webhook_endpoints.disabled_at IS NOT NULL",
    "disabled_at": "webhook_endpoints.disabled_at",
    "disabled_reason": "webhook_endpoints.disabled_reason",
    "failing_since": "webhook_endpoints.failing_since",
    "is_recovering": "((SELECT true FROM webhook_recoveries w WHERE w.endpoint_id = webhook_endpoints.id) IS NOT NULL)",
    "created_at": "webhook_endpoints.created_at",
    "updated_at": "webhook_endpoints.updated_at",
}


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

_OWN = "id = :endpoint_id AND organization_id = :organization_id"

GET = statement("webhooks.endpoint.get", f"SELECT {columns(COLUMNS)} FROM webhook_endpoints WHERE {_OWN}")

LISTED = Listing(
    "webhooks.endpoints",
    "webhook_endpoints",
    octets="octet_length(to_json(webhook_endpoints)::text) + 100",
    row="webhook_endpoints.id = listed.key",
)
ROWS = statement(
    "webhooks.endpoints.rows",
    f"SELECT {columns(COLUMNS)} FROM {in_order('webhook_endpoints')} ORDER BY page.n",
)

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

LOCK = statement(
    "webhooks.endpoint.lock",
    f"SELECT disabled_at IS NOT NULL AS is_disabled FROM webhook_endpoints WHERE {_OWN} FOR NO KEY UPDATE",
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


async def get(connection: Connection, organization_id: str, endpoint_id: UUID) -> dict[str, Any]:
    """One endpoint. Raises WebhookEndpointNotFound."""
    row = await connection.fetchrow(GET, endpoint_id=endpoint_id, organization_id=organization_id)
    if row is None:
        raise WebhookEndpointNotFound
    return dict(row.items())


async def _show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get(connection, principal.organization_id, ids[0]))


RESOURCE = Resource(_show)


async def list_endpoints(database: Database, organization_id: str, part: Slice) -> dict[str, object]:
    """One page. Raises Invalid as pages.page does."""
    condition, values = where("webhook_endpoints", organization_id=organization_id)
    found = await page(database, LISTED, (condition,), part, values, ROWS)
    return part.shown([dict(row.items()) for row in found.rows], found)


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
    Invalid as pages.page does."""
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
    """One page of an endpoint's deliveries. Raises WebhookEndpointNotFound, and Invalid as pages.page does."""
    condition, values = where(
        "webhook_deliveries", endpoint_id=endpoint_id, organization_id=organization_id, status=status
    )
    async with database.connection() as connection:
        await get(connection, organization_id, endpoint_id)
    found = await page(database, LISTED_DELIVERIES, (condition,), part, values, DELIVERY_ROWS)
    return part.shown([dict(row.items()) for row in found.rows], found)


# --- endpoints --------------------------------------------------------------------------------------------------------

LOCK_ORGANIZATION = statement("webhooks.lock_organization", f"SELECT {locks.wait_for(locks.WEBHOOK_ENDPOINTS)}")

COUNT = statement(
    "webhooks.endpoint.count",
    """
    SELECT count(*) FROM (
        SELECT FROM webhook_endpoints WHERE organization_id = CAST(:organization_id AS text) LIMIT 1000) AS counted
    """,
)

INSERT = statement(
    "webhooks.endpoint.insert",
    """
    INSERT INTO webhook_endpoints (id, organization_id, user_id, url, description, event_types, disabled_at, disabled_reason)
    VALUES (:endpoint_id, :organization_id, :user_id, :url, :description, :event_types,
            CASE WHEN :disabled THEN now() END, CASE WHEN :disabled THEN 'requested' END)
    """,
)

# Null keeps, but for the description. Another address, or a new beginning: earlier failures count no more.
CHANGE = statement(
    "webhooks.endpoint.change",
    f"""
    UPDATE webhook_endpoints SET
        url = coalesce(CAST(:url AS text), url),
        event_types = coalesce(CAST(:event_types AS text[]), event_types),
        description = CASE WHEN :names_description THEN CAST(:description AS text) ELSE description END,
        disabled_at = CASE CAST(:disabled AS boolean)
            WHEN true THEN coalesce(disabled_at, now()) WHEN false THEN NULL ELSE disabled_at END,
        disabled_reason = CASE CAST(:disabled AS boolean)
            WHEN true THEN coalesce(disabled_reason, 'requested') WHEN false THEN NULL ELSE disabled_reason END,
        failing_since = CASE WHEN NOT :disabled OR :url <> url THEN NULL ELSE failing_since END,
        updated_at = now()
    WHERE {_OWN}
    """,
)

DELETE = statement("webhooks.endpoint.delete", f"DELETE FROM webhook_endpoints WHERE {_OWN}")


async def create(services: Services, write: WriteRequest, options: WebhookEndpointCreate) -> Reply:
    """A new endpoint, with a new secret. Raises Invalid, TooManyWebhookEndpoints, VaultUnavailable."""
    principal = write.principal
    _check_url(services, options.url)

    async def check(connection: Connection) -> None:
        if await connection.fetchval(COUNT, organization_id=principal.organization_id) >= MAX_ENDPOINTS:
            raise TooManyWebhookEndpoints(MAX_ENDPOINTS)

    if (replayed := await check_or_replay(services, write, RESOURCE, check)) is not None:
        return replayed
    endpoint_id = uuid4()
    path = await _stage_secret(services, principal.organization_id, endpoint_id)

    async def work(connection: Connection) -> Reply:
        await connection.execute(LOCK_ORGANIZATION, organization_id=principal.organization_id)
        await check(connection)
        await connection.execute(
            INSERT,
            endpoint_id=endpoint_id,
            organization_id=principal.organization_id,
            user_id=principal.user_id,
            url=options.url,
            description=options.description,
            event_types=list(dict.fromkeys(options.event_types or EVENT_TYPES)),
            disabled=bool(options.disabled),
        )
        await _adopt_secret(connection, endpoint_id, path)
        return Reply(201, await _show(connection, principal, [endpoint_id]), [endpoint_id])

    return await once(services, write, work, RESOURCE)


async def change(services: Services, write: WriteRequest, endpoint_id: UUID, options: WebhookEndpointUpdate) -> Reply:
    """Set what the request names. Raises WebhookEndpointNotFound, Invalid."""
    organization_id = write.principal.organization_id
    if options.url is not None:
        _check_url(services, options.url)

    async def work(connection: Connection) -> Reply:
        await connection.execute(
            CHANGE,
            endpoint_id=endpoint_id,
            organization_id=organization_id,
            url=options.url,
            event_types=None if options.event_types is None else list(dict.fromkeys(options.event_types)),
            names_description="description" in options.model_fields_set,
            description=options.description,
            disabled=options.disabled,
        )
        return Reply(200, await _show(connection, write.principal, [endpoint_id]), [endpoint_id])

    return await once(services, write, work, RESOURCE)


async def delete(services: Services, write: WriteRequest, endpoint_id: UUID) -> Reply:
    """Remove an endpoint with its secrets; what waits for it is not sent any more. Raises WebhookEndpointNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        if await connection.fetchrow(LOCK, endpoint_id=endpoint_id, organization_id=organization_id) is None:
            raise WebhookEndpointNotFound
        await remove_endpoint(connection, organization_id, endpoint_id)
        return Reply(204, b"")

    return await once(services, write, work)


async def remove_endpoint(connection: Connection, organization_id: str, endpoint_id: UUID) -> None:
    """Remove an endpoint, listing its secrets. The only way an endpoint's row goes."""
    rows = await connection.fetch(FORGET_SECRETS, endpoint_id=endpoint_id)
    await deletions.due(connection, [Name.secret(row["path"]) for row in rows])
    await connection.execute(DELETE, endpoint_id=endpoint_id, organization_id=organization_id)


def _check_url(services: Services, url: str) -> None:
    try:
        Allowed.parse(services.settings.webhook_allow).check(url)
    except NotAllowed as refused:
        raise Invalid((("body", "url"), str(refused), "webhook_url")) from None


# --- secrets ----------------------------------------------------------------------------------------------------------

CURRENT_SECRET = statement(
    "webhooks.secret.current",
    """
    SELECT current.path, current.created_at, (
        SELECT max(expires_at) FROM webhook_secrets previous
        WHERE previous.endpoint_id = current.endpoint_id AND previous.expires_at > now()
    ) AS previous_expires_at
    FROM webhook_secrets current WHERE current.endpoint_id = :endpoint_id AND current.expires_at IS NULL
    """,
)

ADD_SECRET = statement(
    "webhooks.secret.add",
    "INSERT INTO webhook_secrets (path, endpoint_id, created_at) VALUES (:path, :endpoint_id, clock_timestamp())",
)

# Its name in Vault is on the deletion list since it was rotated away.
FORGET_EXPIRED = statement(
    "webhooks.secret.forget_expired",
    "DELETE FROM webhook_secrets WHERE endpoint_id = :endpoint_id AND expires_at <= now()",
)

COUNT_SECRETS = statement(
    "webhooks.secret.count", "SELECT count(*) FROM webhook_secrets WHERE endpoint_id = :endpoint_id"
)

ROTATE_AWAY = statement(
    "webhooks.secret.rotate_away",
    """
    UPDATE webhook_secrets SET expires_at = now() + CAST(:overlap AS interval)
    WHERE endpoint_id = :endpoint_id AND expires_at IS NULL RETURNING path
    """,
)

FORGET_SECRETS = statement(
    "webhooks.secret.forget", "DELETE FROM webhook_secrets WHERE endpoint_id = :endpoint_id RETURNING path"
)


async def get_secret(services: Services, organization_id: str, endpoint_id: UUID) -> dict[str, Any]:
    """The current signing secret; organizations take turns. Raises WebhookEndpointNotFound, VaultUnavailable, Overloaded."""
    async with services.database.connection() as connection:
        await get(connection, organization_id, endpoint_id)
        row = await connection.fetchrow(CURRENT_SECRET, endpoint_id=endpoint_id)
    if row is None:  # deleted between the two
        raise WebhookEndpointNotFound
    turn = services.showing.reservation(organization_id)
    await turn.reserve(1)
    try:
        values = await services.secrets.read(row["path"], is_shown=True)
    finally:
        turn.release()
    if values is None:
        raise VaultUnavailable("The secret store does not have this endpoint's secret; rotate it to get a new one.")
    return {
        "secret": values["secret"],
        "created_at": row["created_at"],
        "previous_expires_at": row["previous_expires_at"],
    }


async def rotate_secret(services: Services, write: WriteRequest, endpoint_id: UUID) -> Reply:
    """A new secret; the one before it goes on signing for a day. Raises WebhookEndpointNotFound, TooManyWebhookSecrets,
    VaultUnavailable."""
    organization_id = write.principal.organization_id

    async def check(connection: Connection) -> None:
        if await connection.fetchrow(LOCK, endpoint_id=endpoint_id, organization_id=organization_id) is None:
            raise WebhookEndpointNotFound
        await connection.execute(FORGET_EXPIRED, endpoint_id=endpoint_id)
        if await connection.fetchval(COUNT_SECRETS, endpoint_id=endpoint_id) >= MAX_SECRETS:
            raise TooManyWebhookSecrets(MAX_SECRETS)

    if (replayed := await check_or_replay(services, write, RESOURCE, check)) is not None:
        return replayed
    path = await _stage_secret(services, organization_id, endpoint_id)

    async def work(connection: Connection) -> Reply:
        await check(connection)
        rows = await connection.fetch(ROTATE_AWAY, endpoint_id=endpoint_id, overlap=OVERLAP)
        old = [Name.secret(row["path"]) for row in rows]
        await deletions.due(connection, old, after_seconds=OVERLAP.total_seconds())
        await _adopt_secret(connection, endpoint_id, path)
        return Reply(200, await _show(connection, write.principal, [endpoint_id]), [endpoint_id])

    return await once(services, write, work, RESOURCE)


async def _stage_secret(services: Services, organization_id: str, endpoint_id: UUID) -> str:
    """Write a new secret under a fresh name that is on the deletion list; returns the name. Raises VaultUnavailable."""
    path = services.secrets.new_webhook_path(organization_id, endpoint_id)
    deadline = time.monotonic() + services.settings.stage_timeout_seconds
    try:
        async with services.database.transaction() as connection:
            await deletions.stage(connection, [Name.secret(path)], services.settings.stage_grace_seconds)
    except OutcomeUnknown:
        raise DatabaseUnavailable from None  # at most a name is listed that nothing was written under
    await services.secrets.write(path, {"secret": signing.new_secret()}, deadline=deadline)
    return path


async def _adopt_secret(connection: Connection, endpoint_id: UUID, path: str) -> None:
    """Make the endpoint name what was staged for it. Raises VaultUnavailable when that took so long that it is condemned."""
    await deletions.adopt(connection, [Name.secret(path)])
    await connection.execute(ADD_SECRET, path=path, endpoint_id=endpoint_id)


# --- deliveries -------------------------------------------------------------------------------------------------------

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
    """A message like any other, of a run that nobody has: its ids are all zeros."""
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
        return Reply(202, await _show(connection, write.principal, [endpoint_id]), [endpoint_id], has_event=True)

    return await once(services, write, work, RESOURCE)


async def _lock_enabled(connection: Connection, organization_id: str, endpoint_id: UUID) -> None:
    row = await connection.fetchrow(LOCK, endpoint_id=endpoint_id, organization_id=organization_id)
    if row is None:
        raise WebhookEndpointNotFound
    if row["is_disabled"]:
        raise WebhookEndpointDisabled
