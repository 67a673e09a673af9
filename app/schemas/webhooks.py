"""The wire types of webhook endpoints and deliveries, and of what is sent to a receiver."""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from app.schemas.resources import MachineStatus
from app.schemas.runs import RunResponse
from app.schemas.values import Name, Payload, Reply, Timestamp, example

EventType = Literal["run_complete", "downed_machines"]

# What is accepted everywhere: an https URL of a host by name, at its own port or a high one. Which others are accepted the
# service decides (webhooks/addresses.py): that cannot be said in a pattern.
_NAME = "[A-Za-z0-9]([A-Za-z0-9-]{0,38}[A-Za-z0-9])?"
URL_PATTERN = (
    rf"^https://({_NAME}\.){{0,4}}[A-Za-z]([A-Za-z0-9-]{{0,18}}[A-Za-z0-9])?(:(443|[2-9][0-9]{{3}}|[1-5][0-9]{{4}}))?"
    r"([/?][!$-\[\]^-~]*)?$"
)

WebhookUrl = Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra={"pattern": URL_PATTERN})]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=10)]

_URL_TEXT = "Where events are POSTed: https, a public host, without user, password and fragment."
_TYPES_TEXT = "Which events are sent."
_DESCRIPTION_TEXT = "What it is for."


class WebhookEndpointCreate(Payload):
    """A new receiver of the organization's events."""

    model_config = example(url="https://example.com/webhooks/runs", description="Billing")

    url: WebhookUrl = Field(description=_URL_TEXT)
    event_types: EventTypes | None = Field(None, description=f"{_TYPES_TEXT} Default: `run_complete` alone.")
    description: Name | None = Field(None, description=_DESCRIPTION_TEXT)
    disabled: bool | None = Field(default=False, description="true sends nothing until it is enabled.")


class WebhookEndpointUpdate(Payload):
    """Absent keys stay as they are."""

    model_config = example(disabled=False)

    url: WebhookUrl | None = Field(None, description=_URL_TEXT)
    event_types: EventTypes | None = Field(None, description=_TYPES_TEXT)
    description: Name | None = Field(None, description=_DESCRIPTION_TEXT)
    disabled: bool | None = Field(
        None, description="true sends nothing any more, also of what waits; false sends again, and forgets failures."
    )


class WebhookRecover(Payload):
    """From when on events are sent again."""

    model_config = example(since="2026-01-31T12:00:00Z")

    since: Timestamp = Field(description="Events from this time on that the endpoint has not received are sent to it.")


class WebhookEndpointResponse(Reply):
    """A receiver of events. Its signing secret is shown by GET .../secret alone."""

    id: UUID
    organization_id: str
    user_id: UUID | None = Field(description="The user whose API key created it, if the key has one.")
    url: str = Field(description="Where events are POSTed.")
    description: str | None = Field(description=_DESCRIPTION_TEXT)
    event_types: list[str] = Field(description=_TYPES_TEXT)
    disabled: bool = Field(description="Nothing is sent to it.")
    disabled_at: datetime | None = Field(description="Since when.")
    disabled_reason: Literal["requested", "gone", "failing"] | None = Field(
        description="`requested` by a caller, `gone` because it answered 410, `failing` after five days without a success."
    )
    failing_since: datetime | None = Field(description="The first failure since it last answered with success.")
    is_recovering: bool = Field(description="Earlier events are being sent again.")
    created_at: datetime
    updated_at: datetime


class WebhookSecretResponse(Reply):
    """What an endpoint's messages are signed with."""

    secret: str = Field(description="`whsec_` and base64: give it to the receiver's library as it is.")
    created_at: datetime
    previous_expires_at: datetime | None = Field(
        description="Until then messages are signed with the secrets before it too; null if they are not."
    )


class WebhookDeliveryResponse(Reply):
    """One event on its way to one endpoint."""

    id: UUID = Field(description="The message's id (`webhook-id`), the same each time it is sent.")
    endpoint_id: UUID = Field(description="Where it is sent.")
    event_id: UUID = Field(description="`event_id` in the body, the same for all endpoints.")
    event_type: str = Field(description="What happened.")
    occurred_at: datetime = Field(description="When.")
    run_id: UUID | None = Field(description="The run; null for a test and for `downed_machines`.")
    attempt: int | None = Field(description="The run's attempt that ended; null if there is no run.")
    status: Literal["pending", "delivered", "failed"] = Field(description="`failed`: it is not tried again by itself.")
    tries: int = Field(description="How often it was sent since it was made or resent.")
    next_try_at: datetime | None = Field(description="When it is sent next; null unless pending.")
    tried_at: datetime | None = Field(description="When it was last sent.")
    duration_ms: int | None = Field(description="How long the receiver took for the last one.")
    response_status: int | None = Field(description="The receiver's last status.")
    response_body: str | None = Field(description="The first 1,024 bytes of the receiver's last answer, as text.")
    error: str | None = Field(
        description=(
            "Why nothing was answered: `timeout`, `connection_failed`, `tls_failed`, `no_answer`, `address_not_allowed`, "
            "`internal_error` (a defect of ours); or why it is not sent: `endpoint_disabled`, `run_deleted`."
        )
    )
    created_at: datetime


class WebhookTry(Reply):
    """What became of one sending."""

    tried_at: datetime = Field(description="When it was answered, or given up.")
    duration_ms: int = Field(description="How long the receiver took.")
    response_status: int | None = Field(description="The receiver's status.")
    response_body: str | None = Field(description="The first 1,024 bytes of its answer, as text.")
    error: str | None = Field(description="Why nothing was answered.")


class WebhookDeliveryLog(WebhookDeliveryResponse):
    """A delivery with what became of each sending."""

    last_tries: list[WebhookTry] = Field(description="The last 8 sendings, newest first, also those before a resend.")


class RunCompletedEvent(Reply):
    """The body of a `run_complete` message."""

    event_id: UUID = Field(description="One for each ending of a run.")
    event_type: Literal["run_complete"] = Field(description="What happened.")
    occurred_at: datetime = Field(description="When.")
    run: RunResponse = Field(description="The run as GET showed it at that moment.")
    truncated: list[str] | None = Field(
        None, description="Present if the body was too large: fields of the run that are null for that reason."
    )


class DownedMachine(Reply):
    """A machine that went down."""

    machine_id: UUID = Field(description="The machine.")
    organization_id: str
    name: str | None = Field(description="What people call it.")
    status: MachineStatus = Field(description="`disconnected` or `error`.")
    last_seen: datetime = Field(description="When it was last heard of.")
    reason: str = Field(description="Why it is down, in a sentence.")


class DownedMachinesEvent(Reply):
    """The body of a `downed_machines` message."""

    event_id: UUID = Field(description="One for each time that a machine goes down.")
    event_type: Literal["downed_machines"] = Field(description="What happened.")
    occurred_at: datetime = Field(description="When.")
    organization_id: str
    machines: list[DownedMachine] = Field(description="Always one machine.")
