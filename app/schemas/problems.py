"""The wire types of refusals and of health."""

from typing import Literal

from pydantic import AwareDatetime, BaseModel, Field

from app.models import RunStatus
from app.schemas.values import example


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(
        description="`urn:problem:` and the code; of `quota_exceeded` the type that IANA has registered for it."
    )
    title: str = Field(description="The name of the status.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened and what to do.")
    instance: str = Field(description="`urn:request:` and the X-Request-ID of this reply, which the log knows.")
    code: str = Field(description="Stable name of the refusal.")
    current_status: RunStatus | None = Field(
        None, description="Of `run_not_terminal` and `invalid_transition`: the run's status."
    )
    attempt: int | None = Field(None, description="Of `attempt_superseded`: the attempt that the run is at.")
    current_attempt: int | None = Field(None, description="Of `attempt_changed`: the attempt that the run is at.")
    assignment: int | None = Field(None, description="Of `assignment_superseded`: the assignment that the run is at.")
    route: str | None = Field(None, description="Of `not_supported`: the vendor's route.")
    names: list[str] | None = Field(None, description="Of `sensitive_inputs_expired`: the secrets that are gone.")
    retry_at: AwareDatetime | None = Field(
        None, description="Of `retry_too_soon`: the moment from which a retry works."
    )
    violated_policies: list[str] | None = Field(
        None, alias="violated-policies", description="Of `quota_exceeded`: the quotas, as RateLimit-Policy names them."
    )
    retry_after: int | None = Field(None, description="Seconds, as in the header Retry-After, where there is one.")


class ValidationItem(BaseModel):
    """One thing wrong with a request: where, and what; never the value."""

    loc: list[str | int] = Field(description="Where: `body`, `path`, `query` or `header`, then the field.")
    msg: str = Field(description="What is wrong, and what would be right.")
    type: str = Field(description="Stable name of the kind of error.")


class ValidationProblem(BaseModel):
    """Bad input, in FastAPI's form."""

    model_config = example(detail=[{"loc": ["body", "machine_id"], "msg": "must be a UUID", "type": "uuid_parsing"}])

    detail: list[ValidationItem]


class Health(BaseModel):
    """`ok`, or what is down, or what is full."""

    status: Literal["ok", "degraded", "unavailable"] = Field(
        description="`degraded`: the disk of a store is full, so writes are refused. Reads work, and the reply is 200."
    )
    down: list[str] = Field(description="Dependencies that cannot be used.")
    reasons: dict[str, str] = Field(
        description="Why, by dependency: `unreachable`; `login_refused` (Vault); `not_migrated`, `incompatible`, "
        "`role_settings` (database); `marker_missing`, `marker_foreign` (storage); `disk_full` (database, storage). "
        "`webhooks` is `not_granted` when Vault's policy lacks their lines; the rest works."
    )


class Alive(Health):
    """`ok`, and the version."""

    version: str = Field(description="Version of the service.")
