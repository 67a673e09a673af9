"""Every refusal of the service, one class each: HTTP status and a stable code (RFC 9457 problem details).

Refusal
├── IncompleteRequest          400 incomplete_request
├── Unauthorized               401 unauthorized
├── InsufficientScope          403 insufficient_scope
├── NotFound                   404
│   ├── RunNotFound            run_not_found
│   ├── MachineNotFound        machine_not_found
│   ├── PoolNotFound           pool_not_found
│   ├── SessionNotFound        session_not_found
│   ├── WorkflowNotFound       workflow_not_found
│   ├── AttachmentNotFound     attachment_not_found
│   ├── WebhookEndpointNotFound    webhook_endpoint_not_found
│   ├── WebhookDeliveryNotFound    webhook_delivery_not_found
│   ├── BulkRetryNotFound      bulk_retry_not_found
│   ├── RouteNotFound          route_not_found
│   ├── AttemptNotFound        attempt_not_found
│   └── NotSupported           not_supported
├── MethodNotAllowed           405 method_not_allowed
├── RequestTimeout             408 request_timeout
│   └── HeadTooSlow
├── Conflict                   409
│   ├── RunNotTerminal             run_not_terminal
│   ├── AttemptChanged             attempt_changed
│   ├── SensitiveInputsExpired     sensitive_inputs_expired
│   ├── InputAttachmentsExpired    input_attachments_expired
│   ├── MachineDeleted             machine_deleted
│   ├── PoolDeleted                pool_deleted
│   ├── RetryTooSoon               retry_too_soon, with Retry-After
│   ├── InvalidTransition          invalid_transition
│   ├── AttemptSuperseded          attempt_superseded
│   ├── AssignmentSuperseded       assignment_superseded
│   ├── AlreadyClaimed             already_claimed
│   ├── TooManyWebhookEndpoints    too_many_webhook_endpoints
│   ├── TooManyWebhookSecrets      too_many_webhook_secrets
│   ├── WebhookEndpointDisabled    webhook_endpoint_disabled
│   ├── WebhookBodyDeleted         webhook_body_deleted
│   ├── BulkRetryEnded             bulk_retry_ended
│   └── IdempotencyInProgress      idempotency_in_progress
├── AttachmentBytesMissing     410 attachment_bytes_missing
├── PayloadTooLarge            413 payload_too_large
├── UriTooLong                 414 uri_too_long
├── UnsupportedMediaType       415 unsupported_media_type
├── RangeNotSatisfiable        416 range_not_satisfiable
├── QuotaExceeded              429 quota_exceeded, with Retry-After, RateLimit and RateLimit-Policy
├── HeadTooLarge               431 request_header_fields_too_large
├── Invalid                    422, in FastAPI's list form
├── InternalError              500 internal_error
└── Unavailable                503, with Retry-After
    ├── VaultUnavailable       vault_unavailable
    ├── StorageUnavailable     storage_unavailable
    ├── DatabaseUnavailable    database_unavailable
    │   └── OutcomeUnknown     database_unavailable; the change may have taken effect
    └── Overloaded             overloaded
        └── ReplyTooMuch       overloaded; the change has taken effect

A sentence here never carries anything a caller sent, except ids, statuses and names of secrets of the caller's own run.

One file: a caller handles every refusal, and so can a reader see every refusal at once.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import orjson

TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Refusal(Exception):
    """A request that is answered with an error; rendered in one place as `application/problem+json`."""

    status: ClassVar[int]
    code: ClassVar[str]
    detail: str = ""

    def __init__(
        self, detail: str | None = None, *, headers: Mapping[str, str] | None = None, **members: object
    ) -> None:
        """`members` are what a program can use of the sentence (RFC 9457 section 3.2), and no more than it says."""
        self.detail = detail or type(self).detail
        self.headers = dict(headers or {})
        self.members = members
        super().__init__(self.detail)

    media_type: ClassVar[str] = "application/problem+json"

    @classmethod
    def problem_type(cls) -> str:
        """The URI that names this kind of problem."""
        return f"urn:problem:{cls.code}"

    def body(self, request_id: str) -> bytes:
        """The problem details; `instance` names the occurrence, by the X-Request-ID of the reply."""
        retry_after = self.headers.get("Retry-After")
        return orjson.dumps(
            {
                "type": self.problem_type(),
                "title": TITLES[self.status],
                "status": self.status,
                "detail": self.detail,
                "instance": f"urn:request:{request_id}",
                "code": self.code,
                **({} if retry_after is None else {"retry_after": int(retry_after)}),
                **self.members,
            }
        )


class IncompleteRequest(Refusal):
    status, code = 400, "incomplete_request"
    detail = (
        "The client closed its sending side in the middle of the request; nothing was changed. Send the whole request."
    )


class Unauthorized(Refusal):
    status, code = 401, "unauthorized"
    detail = "Send a valid API key as `Authorization: Bearer <key>`."

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class InsufficientScope(Refusal):
    """RFC 6750 section 3.1. Decided by the key and the route alone, so it says nothing of what exists."""

    status, code = 403, "insufficient_scope"

    def __init__(self, scopes: Sequence[str], detail: str | None = None) -> None:
        super().__init__(
            detail or f"This API key lacks the scope {' or '.join(scopes)}; use a key that has it.",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{" ".join(scopes)}"'},
        )


class NotFound(Refusal):
    status = 404


class RunNotFound(NotFound):
    code, detail = "run_not_found", "No run with this id exists in your organization; check the id."


class MachineNotFound(NotFound):
    code, detail = "machine_not_found", "No machine with this id exists in your organization; check the id."


class PoolNotFound(NotFound):
    code, detail = "pool_not_found", "No pool with this id exists in your organization; check the ids."


class SessionNotFound(NotFound):
    code = "session_not_found"
    detail = "No session with this id exists in your organization; use the session_id of a run, or start_session."


class WorkflowNotFound(NotFound):
    code, detail = "workflow_not_found", "No workflow with this id exists in your organization; check the id."


class AttachmentNotFound(NotFound):
    code, detail = "attachment_not_found", "No attachment with this id exists in your organization; check the id."


class AttemptNotFound(NotFound):
    code = "attempt_not_found"
    detail = (
        "The run has no attempt with this number, or it is kept no longer; GET /v1/runs/{run_id}/attempts lists them."
    )


class WebhookEndpointNotFound(NotFound):
    code = "webhook_endpoint_not_found"
    detail = "No webhook endpoint with this id exists in your organization; check the id."


class WebhookDeliveryNotFound(NotFound):
    code = "webhook_delivery_not_found"
    detail = "No webhook delivery with this id exists in your organization; deliveries are kept for a limited time."


class BulkRetryNotFound(NotFound):
    code = "bulk_retry_not_found"
    detail = "No bulk retry with this id exists in your organization; they are kept for a limited time after their end."


class RouteNotFound(NotFound):
    code, detail = "route_not_found", "There is nothing at this path; see /docs for the routes."


class NotSupported(NotFound):
    """A route of the vendor's API that is not here."""

    code = "not_supported"

    def __init__(self, route: str) -> None:
        super().__init__(
            f"{route} is a route of the vendor's API that this service does not support; see /docs for the routes.",
            route=route,
        )


class MethodNotAllowed(Refusal):
    status, code = 405, "method_not_allowed"
    detail = "This path does not answer this method; the Allow header lists those it does."


class RequestTimeout(Refusal):
    status, code = 408, "request_timeout"
    detail = "The request body came too slowly; send it again over a faster connection."


class HeadTooSlow(RequestTimeout):
    detail = "The request's head came too slowly; send it again over a faster connection."


class QuotaExceeded(Refusal):
    status, code = 429, "quota_exceeded"
    detail = (
        "The request exceeds a quota, which violated-policies names; nothing was changed. "
        "Send it again after the seconds in Retry-After."
    )
    times = 0  # how often its party has been refused within a minute, where that is known

    @classmethod
    def problem_type(cls) -> str:
        """A problem type of IANA's registry, with its member `violated-policies`."""
        return "https://iana.org/assignments/http-problem-types#quota-exceeded"


class AttachmentBytesMissing(Refusal):
    """The row is there and the file store has lost its file: an operator's loss, and no wrong id."""

    status, code = 410, "attachment_bytes_missing"
    detail = (
        "The attachment is known, but its bytes are no longer in the file store. Nothing was changed. "
        "Upload the file again, or retry the run with file_inputs."
    )


class UriTooLong(Refusal):
    status, code = 414, "uri_too_long"
    detail = "The path and query of the request are too long; nothing was changed. Send at most 8192 bytes."


class HeadTooLarge(Refusal):
    status, code = 431, "request_header_fields_too_large"
    detail = "The request line and headers are too long; send shorter ones."


class Conflict(Refusal):
    status = 409


class RunNotTerminal(Conflict):
    code = "run_not_terminal"

    def __init__(self, current: str) -> None:
        super().__init__(
            f"The run is {current}; only a run in success, error or cancelled can be retried. Nothing was changed. "
            "Wait until it ends, or PATCH its status to cancelled if its executor died.",
            current_status=current,
        )


class AttemptChanged(Conflict):
    code = "attempt_changed"

    def __init__(self, current: int) -> None:
        super().__init__(
            f"The run is at attempt {current}, not at the expected one; nothing was changed. Read the run and decide again.",
            current_attempt=current,
        )


class SensitiveInputsExpired(Conflict):
    code = "sensitive_inputs_expired"

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"The run's stored secrets have expired: {', '.join(names)}. Send sensitive_input_values with all of them, "
            "or {} to go on without secrets.",
            names=list(names),
        )


class InputAttachmentsExpired(Conflict):
    code = "input_attachments_expired"
    detail = "An input attachment of the run has expired; send file_inputs with the files, or [] to go on without."


class InputExpiresBefore(InputAttachmentsExpired):
    detail = (
        "An input attachment of the run expires before not_before; nothing was changed. Give it more time with"
        " PUT /v1/run-attachments/{id}, ask for an earlier not_before, or retry with file_inputs."
    )


class RunNotWaiting(Conflict):
    code = "run_not_waiting"

    def __init__(self, status: str) -> None:
        is_assigned = status == "scheduling"
        state = "already has a machine" if is_assigned else f"is {status}"
        super().__init__(
            f"The run {state}; only a scheduling run without a machine can be moved. Nothing was changed. "
            "Read the run and decide again.",
            current_status=status,
        )


class MachineDeleted(Conflict):
    code = "machine_deleted"
    detail = (
        "The machine that this run was pinned to was deleted; nothing was changed. Send machine_id, or pool_ids"
        " ([] for any machine)."
    )


class PoolDeleted(Conflict):
    code = "pool_deleted"
    detail = (
        "A pool that this run was limited to was deleted; nothing was changed. Send pool_ids ([] for any machine),"
        " or machine_id."
    )


class RetryTooSoon(Conflict):
    code = "retry_too_soon"

    def __init__(self, seconds: int, from_: str) -> None:
        super().__init__(
            f"The run ended too recently to be retried. Retry it from {from_} on, in {seconds} s.",
            headers={"Retry-After": str(seconds)},
            retry_at=from_,
        )


class InvalidTransition(Conflict):
    code = "invalid_transition"


class AttemptSuperseded(Conflict):
    code = "attempt_superseded"

    def __init__(self, current: int) -> None:
        super().__init__(
            f"This report or file is for an earlier attempt; the run is at attempt {current}. Nothing was changed. "
            "Stop working on the old attempt.",
            attempt=current,
        )


class AssignmentSuperseded(Conflict):
    code = "assignment_superseded"

    def __init__(self, current: int) -> None:
        super().__init__(
            f"This report or file is for an earlier assignment; the run is at assignment {current} and was taken from that "
            "machine. Nothing was changed. Stop working on it.",
            assignment=current,
        )


class AlreadyClaimed(Conflict):
    code = "already_claimed"
    detail = (
        "Another executor process began this attempt, so only reports and uploads with its claim are accepted. "
        "Nothing was changed. Stop working on it, or PATCH status cancelled if that process died."
    )


class TooManyWebhookEndpoints(Conflict):
    code = "too_many_webhook_endpoints"

    def __init__(self, most: int) -> None:
        super().__init__(
            f"An organization can have at most {most} webhook endpoints; delete one that is not needed any more."
        )


class TooManyWebhookSecrets(Conflict):
    code = "too_many_webhook_secrets"

    def __init__(self, most: int) -> None:
        super().__init__(
            f"{most} signing secrets of this endpoint are in use: each signs for 24 hours after its rotation. "
            "Rotate again when the oldest has expired, or make a new endpoint."
        )


class WebhookEndpointDisabled(Conflict):
    code = "webhook_endpoint_disabled"
    detail = "The endpoint is disabled, so nothing is sent to it; PATCH disabled to false first."


class WebhookBodyDeleted(Conflict):
    code = "webhook_body_deleted"
    detail = "The run of this delivery was deleted, and its message with it; nothing was sent."


class BulkRetryEnded(Conflict):
    code = "bulk_retry_ended"

    def __init__(self, state: str) -> None:
        super().__init__(
            f"The bulk retry is {state}, so nothing was changed. Start a new one for the runs that remain.",
            current_state=state,
        )


class IdempotencyInProgress(Conflict):
    code = "idempotency_in_progress"
    detail = (
        "Another request still uses this Idempotency-Key, or holds the run that this one changes; nothing was changed. "
        "Send the same request again in a second."
    )

    def __init__(self) -> None:
        super().__init__(headers={"Idempotency-Status": "in_progress", "Retry-After": "1"})


class PayloadTooLarge(Refusal):
    status, code = 413, "payload_too_large"


class UnsupportedMediaType(Refusal):
    status, code = 415, "unsupported_media_type"
    detail = "Send the body as `Content-Type: application/json`, without Content-Encoding."


class RangeNotSatisfiable(Refusal):
    status, code = 416, "range_not_satisfiable"
    detail = "The requested range lies outside the file; Content-Range gives its size."


class Invalid(Refusal):
    """Bad input: FastAPI's list form, never with any part of the input in it."""

    status, code = 422, "invalid"
    media_type = "application/json"

    def __init__(self, *errors: tuple[tuple[str | int, ...], str, str]) -> None:
        self.errors = errors
        super().__init__("The request is not valid.")

    def body(self, request_id: str) -> bytes:
        return orjson.dumps({"detail": [{"loc": loc, "msg": msg, "type": kind} for loc, msg, kind in self.errors]})


class InternalError(Refusal):
    status, code = 500, "internal_error"
    detail = "The service failed because of a defect; report the X-Request-ID of this reply."


class Unavailable(Refusal):
    status = 503
    kind: str | None = None  # the failure in a word, for logs: `timeout`, `refused`, `authentication`

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"Retry-After": "2"})


class VaultUnavailable(Unavailable):
    code = "vault_unavailable"
    detail = "The secret store did not answer in time; nothing was changed. Send the request again."


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"
    detail = "The file store did not answer in time; nothing was changed. Send the request again."


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"
    detail = "The database did not answer in time; nothing was changed. Send the request again."


class Overloaded(Unavailable):
    code = "overloaded"
    detail = "The service is handling as many requests or bytes as it can; nothing was changed. Send the request again."


class ReplyTooMuch(Overloaded):
    detail = (
        "The change was made, but the server has too many large replies in memory to send this one. "
        "Read the result with GET, or send the request again with the same Idempotency-Key."
    )


class OutcomeUnknown(DatabaseUnavailable):
    kind = "lost_in_commit"
    detail = (
        "The connection to the database was lost while the change was being committed, so it may have taken effect. "
        "Sending the same request again with the same Idempotency-Key is safe."
    )
