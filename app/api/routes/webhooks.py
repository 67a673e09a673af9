"""Webhooks: endpoints, their secrets, and what was sent to them."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response

from app.api.openapi import operation
from app.api.requests import read, read_write, services
from app.api.responses import ONLY, Part, json_reply, send
from app.api.scopes import Route
from app.errors import (
    RunNotFound,
    TooManyWebhookEndpoints,
    TooManyWebhookSecrets,
    VaultUnavailable,
    WebhookBodyDeleted,
    WebhookDeliveryNotFound,
    WebhookEndpointDisabled,
    WebhookEndpointNotFound,
)
from app.resources import webhook_deliveries, webhook_endpoints
from app.schemas.values import Page
from app.schemas.webhooks import (
    WebhookDeliveryLog,
    WebhookDeliveryResponse,
    WebhookEndpointCreate,
    WebhookEndpointResponse,
    WebhookEndpointUpdate,
    WebhookRecover,
    WebhookSecretResponse,
)

router = APIRouter(route_class=Route, prefix="/v1", tags=["webhooks"])

ENDPOINTS = "/webhook-endpoints"
ENDPOINT = f"{ENDPOINTS}/{{webhook_endpoint_id}}"
DELIVERY = "/webhook-deliveries/{webhook_delivery_id}"


@router.post(
    ENDPOINTS,
    status_code=201,
    response_model=WebhookEndpointResponse,
    **operation(
        WebhookEndpointNotFound,
        TooManyWebhookEndpoints,
        VaultUnavailable,
        body=WebhookEndpointCreate,
        write=True,
        scope="webhooks:write",
    ),
)
async def create_webhook_endpoint(request: Request) -> Response:
    """A new receiver of events, with a new signing secret; GET .../secret shows it."""
    options, write = await read(request, WebhookEndpointCreate)
    return send(await webhook_endpoints.create(services(request), write, options))


@router.get(ENDPOINTS, response_model=Page[WebhookEndpointResponse], **operation(scope="runs:read"))
async def list_webhook_endpoints(request: Request, part: Part) -> Response:
    """Endpoints, newest first."""
    organization_id = request.state.principal.organization_id
    return json_reply(await webhook_endpoints.list_endpoints(services(request).database, organization_id, part))


@router.get(ENDPOINT, response_model=WebhookEndpointResponse, **operation(WebhookEndpointNotFound, scope="runs:read"))
async def get_webhook_endpoint(webhook_endpoint_id: UUID, request: Request) -> Response:
    """One endpoint."""
    async with services(request).database.connection() as connection:
        organization_id = request.state.principal.organization_id
        return json_reply(await webhook_endpoints.get(connection, organization_id, webhook_endpoint_id))


@router.patch(
    ENDPOINT,
    response_model=WebhookEndpointResponse,
    **operation(WebhookEndpointNotFound, body=WebhookEndpointUpdate, write=True, scope="webhooks:write"),
)
async def update_webhook_endpoint(webhook_endpoint_id: UUID, request: Request) -> Response:
    """Change what the body names; null clears the description. What waits is sent to the new URL."""
    options, write = await read(request, WebhookEndpointUpdate)
    return send(await webhook_endpoints.change(services(request), write, webhook_endpoint_id, options))


@router.delete(ENDPOINT, status_code=204, **operation(WebhookEndpointNotFound, write=True, scope="webhooks:write"))
async def delete_webhook_endpoint(webhook_endpoint_id: UUID, request: Request) -> Response:
    """Remove an endpoint and its secrets; what waits for it is not sent any more."""
    write = await read_write(request)
    return send(await webhook_endpoints.delete(services(request), write, webhook_endpoint_id))


@router.get(
    f"{ENDPOINT}/secret",
    response_model=WebhookSecretResponse,
    **operation(WebhookEndpointNotFound, VaultUnavailable, scope="webhooks:write"),
)
async def get_webhook_secret(webhook_endpoint_id: UUID, request: Request) -> Response:
    """What its messages are signed with. No other reply shows it."""
    organization_id = request.state.principal.organization_id
    return json_reply(await webhook_endpoints.get_secret(services(request), organization_id, webhook_endpoint_id))


@router.post(
    f"{ENDPOINT}/rotate-secret",
    response_model=WebhookEndpointResponse,
    **operation(WebhookEndpointNotFound, TooManyWebhookSecrets, VaultUnavailable, write=True, scope="webhooks:write"),
)
async def rotate_webhook_secret(webhook_endpoint_id: UUID, request: Request) -> Response:
    """A new signing secret; for 24 hours messages are signed with the old one too."""
    write = await read_write(request)
    return send(await webhook_endpoints.rotate_secret(services(request), write, webhook_endpoint_id))


@router.post(
    f"{ENDPOINT}/test",
    status_code=201,
    response_model=WebhookDeliveryResponse,
    **operation(
        WebhookEndpointNotFound, WebhookDeliveryNotFound, WebhookEndpointDisabled, write=True, scope="webhooks:write"
    ),
)
async def test_webhook_endpoint(webhook_endpoint_id: UUID, request: Request) -> Response:
    """Send an example: a `run_complete` of a run whose ids are all zeros. The delivery shows what became of it."""
    write = await read_write(request)
    return send(await webhook_deliveries.send_test(services(request), write, webhook_endpoint_id))


@router.post(
    f"{ENDPOINT}/recover",
    status_code=202,
    response_model=WebhookEndpointResponse,
    **operation(
        WebhookEndpointNotFound, WebhookEndpointDisabled, body=WebhookRecover, write=True, scope="webhooks:write"
    ),
)
async def recover_webhook_endpoint(webhook_endpoint_id: UUID, request: Request) -> Response:
    """Send everything since a time that the endpoint has not received: what failed, and what happened while it was disabled."""
    options, write = await read(request, WebhookRecover)
    return send(await webhook_deliveries.recover(services(request), write, webhook_endpoint_id, options))


@router.get(
    f"{ENDPOINT}/deliveries",
    response_model=Page[WebhookDeliveryResponse],
    **operation(WebhookEndpointNotFound, scope="runs:read"),
)
async def list_webhook_deliveries(
    webhook_endpoint_id: UUID,
    request: Request,
    part: Part,
    status: Annotated[Literal["pending", "delivered", "failed"] | None, ONLY] = None,
) -> Response:
    """What was sent to an endpoint, and what waits, newest first."""
    organization_id = request.state.principal.organization_id
    return json_reply(
        await webhook_deliveries.list_deliveries(
            services(request).database, organization_id, webhook_endpoint_id, status, part
        )
    )


@router.get(
    "/runs/{run_id}/webhook-deliveries",
    response_model=Page[WebhookDeliveryResponse],
    **operation(RunNotFound, scope="runs:read"),
)
async def list_run_webhook_deliveries(run_id: UUID, request: Request, part: Part) -> Response:
    """What was sent of a run's endings, and what waits, newest first; also of a run that was deleted."""
    return json_reply(
        await webhook_deliveries.list_of_run(services(request).database, request.state.principal, run_id, part)
    )


@router.get(DELIVERY, response_model=WebhookDeliveryLog, **operation(WebhookDeliveryNotFound, scope="runs:read"))
async def get_webhook_delivery(webhook_delivery_id: UUID, request: Request) -> Response:
    """One delivery, with what was answered to each of the last tries."""
    async with services(request).database.connection() as connection:
        organization_id = request.state.principal.organization_id
        return json_reply(await webhook_deliveries.get_log(connection, organization_id, webhook_delivery_id))


@router.post(
    f"{DELIVERY}/resend",
    response_model=WebhookDeliveryResponse,
    **operation(
        WebhookDeliveryNotFound, WebhookEndpointDisabled, WebhookBodyDeleted, write=True, scope="webhooks:write"
    ),
)
async def resend_webhook_delivery(webhook_delivery_id: UUID, request: Request) -> Response:
    """Send a delivery again at once, whatever became of it; its id stays the same."""
    write = await read_write(request)
    return send(await webhook_deliveries.resend(services(request), write, webhook_delivery_id))
