"""Webhook endpoints and their signing secrets, as a caller sees them.

A secret is made here and written under a fresh name that is on the deletion list first. Only `get_secret` shows it.
"""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from app.access.auth import Principal
from app.errors import (
    DatabaseUnavailable,
    Invalid,
    OutcomeUnknown,
    TooManyWebhookEndpoints,
    TooManyWebhookSecrets,
    VaultUnavailable,
    WebhookEndpointNotFound,
)
from app.idempotency import Reply, Resource, WriteRequest, check_or_replay, once
from app.schemas.webhooks import WebhookEndpointCreate, WebhookEndpointUpdate
from app.services import Services
from app.stores import deletions, locks
from app.stores.database import Connection, Database
from app.stores.deletions import Name
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, page, where
from app.stores.statements import statement
from app.webhooks import signing
from app.webhooks.addresses import Allowed, NotAllowed

MAX_ENDPOINTS = 20  # endpoints of an organization: each makes one more copy of every message
MAX_SECRETS = 5  # secrets of an endpoint that sign at the same time
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

LOCK_ENDPOINT = statement(
    "webhooks.endpoint.lock",
    f"SELECT disabled_at IS NOT NULL AS is_disabled FROM webhook_endpoints WHERE {_OWN} FOR NO KEY UPDATE",
)


async def get(connection: Connection, organization_id: str, endpoint_id: UUID) -> dict[str, Any]:
    """One endpoint. Raises WebhookEndpointNotFound."""
    row = await connection.fetchrow(GET, endpoint_id=endpoint_id, organization_id=organization_id)
    if row is None:
        raise WebhookEndpointNotFound
    return dict(row.items())


async def show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get(connection, principal.organization_id, ids[0]))


RESOURCE = Resource(show)


async def list_endpoints(database: Database, organization_id: str, part: Slice) -> dict[str, object]:
    """One page. Raises Invalid as paging.page does."""
    condition, values = where("webhook_endpoints", organization_id=organization_id)
    found = await page(database, LISTED, (condition,), part, values, ROWS)
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
        return Reply(201, await show(connection, principal, [endpoint_id]), [endpoint_id])

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
        return Reply(200, await show(connection, write.principal, [endpoint_id]), [endpoint_id])

    return await once(services, write, work, RESOURCE)


async def delete(services: Services, write: WriteRequest, endpoint_id: UUID) -> Reply:
    """Remove an endpoint with its secrets; what waits for it is not sent any more. Raises WebhookEndpointNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        if await connection.fetchrow(LOCK_ENDPOINT, endpoint_id=endpoint_id, organization_id=organization_id) is None:
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
        if await connection.fetchrow(LOCK_ENDPOINT, endpoint_id=endpoint_id, organization_id=organization_id) is None:
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
        return Reply(200, await show(connection, write.principal, [endpoint_id]), [endpoint_id])

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
