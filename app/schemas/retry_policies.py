"""The wire types of a workflow's retry policy."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from app.schemas.values import NO_NUL, ErrorCode, Payload, example, storable_text, whole

MAX_RETRIES = 10
MAX_DELAY_SECONDS = 86_400
MAX_JITTER = 0.5
MAX_RULES = 20
MAX_CONTAINED = 500  # characters

Retries = Annotated[int, Field(ge=1, le=MAX_RETRIES), BeforeValidator(whole)]
Delay = Annotated[int, Field(ge=0, le=MAX_DELAY_SECONDS), BeforeValidator(whole)]
Contained = Annotated[
    str, Field(min_length=1, max_length=MAX_CONTAINED, json_schema_extra=NO_NUL), AfterValidator(storable_text)
]


class RetryRule(Payload):
    """Which endings are retried: all that is given must hold."""

    model_config = ConfigDict(extra="forbid") | example(status="error", error_code="executor_lost")

    status: Literal["error", "task_failed"] = Field(description="The attempt ended in this status.")
    error_contains: Contained | None = Field(
        None, description="One line of `error` contains this text; upper and lower case differ."
    )
    error_code: ErrorCode | None = Field(None, description="The attempt has this `error_code`.")


class RetryPolicy(Payload):
    """Which runs of a workflow are retried by themselves, how often and when.

    A field that is not known here is refused: without it other runs would be retried.
    """

    model_config = ConfigDict(
        extra="forbid",
        **example(
            max_retries=3,
            delays_seconds=[10, 60, 300],
            jitter=0.1,
            on=[{"status": "error", "error_code": "executor_lost"}, {"status": "error", "error_contains": "timed out"}],
        ),
    )

    max_retries: Retries = Field(description="Retries by the policy in a row, until somebody asks for a retry.")
    delays_seconds: Annotated[list[Delay], Field(min_length=1, max_length=MAX_RETRIES, fail_fast=True)] = Field(
        description="How long after its end an attempt is retried: the first time, the second time, and so on. The last one"
        " repeats."
    )
    jitter: Annotated[float, Field(ge=0, le=MAX_JITTER)] = Field(
        default=0.0, description="Each delay is up to this part of it shorter or longer: 0.1 is 10 %."
    )
    on: Annotated[list[RetryRule], Field(min_length=1, max_length=MAX_RULES, fail_fast=True)] | None = Field(
        None, description="The first rule that matches the ending decides; null: every ending in `error` is retried."
    )
    avoid_last_machine: bool = Field(
        default=False, description="The machine of the failed attempt is taken last for the retry, never excluded."
    )
    webhooks: Literal["final", "every"] = Field(
        default="final",
        description="final: an ending that the policy will retry sends no `run_complete`. every: each ending sends one.",
    )
