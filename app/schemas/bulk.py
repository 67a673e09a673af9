"""The wire types of bulk retries: jobs that retry many runs."""

import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.models import TERMINAL, RunStatus
from app.schemas.values import (
    EXAMPLE_ID,
    AtMostRuns,
    ErrorCode,
    Inputs,
    NotSupported,
    Payload,
    PoolIds,
    Reason,
    Reply,
    Timestamp,
    example,
)

MAX_RUNS = 10_000  # in one bulk retry
MIN_PACE, MAX_PACE = 0.1, 1000.0  # retries a second

# --- what a caller sends ----------------------------------------------------------------------------------------------

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([1-9][0-9]{0,4})([smhd])")
_TIMESTAMP: TypeAdapter[datetime] = TypeAdapter(Timestamp)


def _moment(value: object) -> datetime | timedelta:
    if isinstance(value, str) and (found := _DURATION.fullmatch(value)):
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])
    try:
        return _TIMESTAMP.validate_python(value)
    except ValidationError:
        raise PydanticCustomError("time_or_duration", "neither a time nor a duration") from None


# A time, or how long before now: `24h`.
Moment = Annotated[
    datetime | timedelta,
    PlainValidator(_moment),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "string", "pattern": f"^{_DURATION.pattern}$"}]}
    ),
]


def _all_terminal(value: list[RunStatus]) -> list[RunStatus]:
    if not TERMINAL.issuperset(value):
        raise PydanticCustomError("terminal_status", "not terminal", {"expected": " or ".join(sorted(TERMINAL))})
    return list(dict.fromkeys(value))


Terminal = Annotated[
    list[Annotated[RunStatus, Field(strict=False, json_schema_extra={"enum": sorted(TERMINAL)})]],
    Field(min_length=1, max_length=10, fail_fast=True),
    AfterValidator(_all_terminal),
]


class BulkRetryFilter(Payload):
    """Which runs: those that every given field holds for. At least one field beside `status` is needed.

    A field that is not known here is refused: without it more runs would match.
    """

    model_config = ConfigDict(extra="forbid") | example(workflow_id=EXAMPLE_ID, created_at_from="24h")

    status: Terminal = Field([RunStatus.ERROR], description="Runs in one of these statuses.")
    workflow_id: UUID | None = Field(None, description="Runs of this workflow.")
    machine_id: UUID | None = Field(None, description="Runs whose machine_id is this.")
    session_id: UUID | None = Field(None, description="Runs of this session.")
    created_at_from: Moment | None = Field(None, description="Created at or after; also as how long ago: `24h`.")
    created_at_to: Moment | None = Field(None, description="Created at or before.")
    changed_from: Moment | None = Field(None, description="Created, retried, started or ended last at or after.")
    changed_to: Moment | None = Field(None, description="The same, at or before.")
    ended_from: Moment | None = Field(None, description="Ended at or after, by the database's clock.")
    ended_to: Moment | None = Field(None, description="Ended at or before, by the database's clock.")
    error_code: ErrorCode | None = Field(None, description="Ended with this error_code.")
    search: NotSupported = None
    deep_search: NotSupported = None


class BulkRetryOverrides(Payload):
    """What to change for the next attempt of every run. Absent and null both mean: keep. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid") | example(is_priority=True)

    input_values: Inputs | None = Field(None, description="Values of the workflow's variables.")
    machine_id: UUID | None = Field(None, description="Pin this machine; wins over pool_ids.")
    pool_ids: PoolIds | None = Field(None, description="The machine must be in all of these pools.")
    is_priority: bool | None = Field(None, description="Start before runs without priority.")
    reuse_session: bool | None = Field(None, description="false drops the session of each run.")
    release_session_after: bool | None = Field(None, description="Release the session's machine when a run ends.")
    not_before: Timestamp | None = Field(
        None, description="Start at this time or later, at most 30 days ahead. A time in the past means now."
    )
    avoid_last_machine: bool | None = Field(
        None, description="Of the machines that could start a run, take the one of its last attempt last."
    )
    # Each run has its own.
    sensitive_input_values: NotSupported = None
    file_inputs: NotSupported = None
    session_id: NotSupported = None
    session_alias: NotSupported = None
    start_session: NotSupported = None
    main_prompt: NotSupported = None
    main_agent_model_id: NotSupported = None
    model_metadata: NotSupported = None
    post_run_checks: NotSupported = None


class BulkRetryCreate(Payload):
    """Which runs to retry (`run_ids` or `filter`, not both), with which changes, and how fast."""

    model_config = example(
        filter={"workflow_id": EXAMPLE_ID, "created_at_from": "24h"},
        first=5,
        stop_after_failures=20,
        pace_per_second=10,
        reason="The application was down.",
    )

    run_ids: Annotated[list[UUID], Field(min_length=1, max_length=MAX_RUNS, fail_fast=True)] | None = Field(
        None, description="These runs, in this order. One that is named twice counts once."
    )
    filter: BulkRetryFilter | None = Field(
        None, description=f"All runs that match now, the oldest end first; more than {MAX_RUNS:,} are refused."
    )
    overrides: BulkRetryOverrides | None = Field(None, description="What to change for the next attempts.")
    pace_per_second: Annotated[float, Field(ge=MIN_PACE, le=MAX_PACE)] | None = Field(
        None, description="Most retries a second; null: as fast as it goes."
    )
    first: AtMostRuns | None = Field(
        default=0,
        description="Retry so many first, and the rest only when all of these have succeeded; 0: all at once.",
    )
    stop_after_failures: AtMostRuns | None = Field(
        default=0, description="Pause when so many of the retried runs have failed again; 0: never."
    )
    reason: Reason | None = Field(None, description="Why; kept with each attempt and event, never interpreted.")


# --- what is answered -------------------------------------------------------------------------------------------------

State = Literal["running", "paused", "completed", "aborted", "failed"]
Outcome = Literal["pending", "retried", "skipped"]


class BulkRetryBy(Reply):
    """Who asked for it."""

    key_id: UUID = Field(description="The API key that created the bulk retry.")
    user_id: UUID | None = Field(description="The user that key belongs to.")


class BulkRetryResponse(Reply):
    """A bulk retry, and what has become of its runs so far."""

    id: UUID
    state: State = Field(
        description="`completed`: every run was retried or skipped. `aborted`: a caller ended it. `failed`: see `failure`."
    )
    pause_reason: Literal["requested", "first_failed", "stop_after_failures"] | None = Field(
        description="Why it is paused: a caller asked for it; one of the `first` did not succeed; or so many failed."
    )
    waiting_for: Literal["first", "quota"] | None = Field(
        description="What keeps a running one from going on: the `first` have not ended yet, or the quota on waiting runs."
    )
    failure: Literal["key_revoked"] | None = Field(description="Why it failed: its key was revoked or has expired.")
    total: int = Field(description="Chosen runs.")
    pending: int = Field(description="Runs that were not looked at yet.")
    retried: int = Field(description="Runs that were retried.")
    skipped: int = Field(description="Runs that were not retried; their items say why.")
    succeeded: int = Field(description="Retried runs of which the new attempt ended in success.")
    failed: int = Field(description="Retried runs of which the new attempt ended in error.")
    cancelled: int = Field(description="Retried runs of which the new attempt was cancelled.")
    created_at: datetime
    ended_at: datetime | None
    by: BulkRetryBy = Field(description="Who asked for it.")
    reason: str | None = Field(description="Why, as the caller said.")
    filter: dict[str, Any] | None = Field(
        description="What the runs were chosen by, with times as they were then; null: run_ids were given."
    )
    overrides: dict[str, Any] = Field(description="What is changed for the next attempts.")
    pace_per_second: float | None = Field(description="Most retries a second.")
    first: int = Field(description="So many go first; 0: all at once.")
    stop_after_failures: int = Field(description="Pauses after so many failures; 0: never.")


class BulkRetryItemResponse(Reply):
    """One run of a bulk retry."""

    run_id: UUID
    attempt: int | None = Field(
        description="The attempt that the run had when it was chosen; null: there was no such run."
    )
    outcome: Outcome = Field(description="`retried`: it has got the attempt that follows.")
    code: str | None = Field(description="Why it was skipped.")
    detail: str | None = Field(description="The same as a sentence.")
    decided_at: datetime | None = Field(description="When it was retried or skipped.")
    result: RunStatus | None = Field(
        description="The status of the new attempt; null unless the run was retried and is still there."
    )


class BulkRetrySample(Reply):
    """A run that would not be retried."""

    run_id: UUID
    code: str = Field(description="Stable name of the refusal.")
    detail: str = Field(description="What to do.")


class BulkDryRunResponse(Reply):
    """What a bulk retry would do. Nothing is written."""

    total: int = Field(description="Chosen runs.")
    would_retry: int = Field(description="Runs that would be retried, as things are now. Quotas are not counted.")
    refusals: dict[str, int] = Field(description="How many would be skipped, by the code of the refusal.")
    will_wait: dict[str, int] = Field(
        description="How many of those that would be retried could not start at once, by their scheduling_reason."
    )
    sample: list[BulkRetrySample] = Field(description="Up to 100 runs of each code.")
