"""The wire types of runs: what a caller may send, and every key of what we answer.

Replies are declared here for the OpenAPI document; they are built where they are read (runs/projection.py).

One file: a field of a run stands in requests and in the reply.
"""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import ConfigDict, Field

from app.models import RunStatus
from app.schemas.attachments import FileInputs
from app.schemas.values import (
    EXAMPLE_ID,
    Assignment,
    Attempt,
    Count,
    ErrorCode,
    Ids,
    Inputs,
    JsonObject,
    Lines,
    Metadata,
    Name,
    NotSupported,
    Payload,
    PoolIds,
    Prompt,
    Reason,
    Reply,
    SearchedPage,
    Secrets,
    Timestamp,
    Unsupported,
    Variables,
    WithIncluded,
    example,
    examples,
)

# The statuses that a list may be asked for. No run here is in `running_checks`, which the vendor's clients may ask for.
ListedStatus = Literal["scheduling", "running", "success", "cancelled", "error", "task_failed", "running_checks"]


class _Overrides(Payload):
    input_values: Inputs | None = Field(
        None, description="Values of the workflow's variables.", examples=[{"user": "Ada"}]
    )
    sensitive_input_values: Secrets | None = Field(
        None,
        description="Secrets by name, any JSON. They go to Vault; replies show aliases.",
        examples=[{"password": "s3cret"}],
    )
    file_inputs: FileInputs | None = Field(None, description="Input files.")
    machine_id: UUID | None = Field(None, description="Pin this machine; wins over pool_ids.")
    pool_ids: PoolIds | None = Field(None, description="The machine must be in all of these pools.")
    session_id: UUID | None = Field(None, description="Join this session.")
    start_session: bool | None = Field(default=False, description="Start a new session. Not together with session_id.")
    not_before: Timestamp | None = Field(
        None,
        description="Start at this time or later, at most 30 days ahead, by the service's own clock. The past means now.",
    )
    post_run_checks: NotSupported = None


class _SessionOverrides(_Overrides):
    session_alias: Name | None = Field(None, description="Name of this run within its session.")
    release_session_after: bool | None = Field(None, description="Release the session's machine when this run ends.")


class RunRetry(_SessionOverrides):
    """What to change for the next attempt. Absent and null both mean: keep."""

    # The first is what a page that tries requests out sends by itself: it replaces nothing.
    model_config = examples(
        {"reason": "The application was down."},
        {"input_values": {"customer": "Ada"}, "is_priority": True},
        {
            "sensitive_input_values": {"password": "s3cret"},
            "file_inputs": [
                {"filename": "invoice.pdf", "content": "aGVsbG8=", "target_path": "C:\\in\\invoice.pdf"},
            ],
        },
    )
    EXAMPLE_NAMES = ("reason only", "other inputs, with priority", "other secrets and files")

    reuse_session: bool | None = Field(default=True, description="false drops the session, unless a new one is given.")
    is_priority: bool | None = Field(None, description="Start before runs without priority.")
    reason: Reason | None = Field(None, description="Why; kept with the attempt and the event, never interpreted.")
    expected_attempt: Attempt | None = Field(
        None, description="Retry only if the run is at this attempt; else 409 attempt_changed."
    )
    automatic_retries: bool | None = Field(
        default=True,
        description="false: the workflow's retry policy does not retry the attempt that this retry begins.",
    )
    avoid_last_machine: bool | None = Field(
        default=False, description="Of the machines that could start it, take the one of the last attempt last."
    )
    # A run keeps its own, and a retry cannot replace it.
    main_prompt: NotSupported = None
    main_agent_model_id: NotSupported = None
    model_metadata: NotSupported = None


class _New(_SessionOverrides):
    workflow_id: UUID = Field(description="What to run.")
    is_priority: bool | None = Field(default=False, description="Start before runs without priority.")
    main_prompt: Prompt | None = Field(
        None, description="What the agent is told to do, instead of the workflow's prompt."
    )
    model_metadata: Metadata | None = Field(
        None, description="Which models this run uses; kept and shown, not interpreted.", examples=[{}]
    )
    main_agent_model_id: UUID | None = Field(
        None, description="Kept and shown as main_agent_model_id of model_metadata, whose own it replaces."
    )


class RunCreate(_New):
    """A new run of a workflow."""

    model_config = example(
        workflow_id=EXAMPLE_ID,
        input_values={"customer": "Ada"},
        sensitive_input_values={"password": "s3cret"},
        start_session=True,
        session_alias="morning",
    )


class RunBulkCreate(_New):
    """Many runs that are alike."""

    model_config = example(workflow_id=EXAMPLE_ID, count=2, input_values={"customer": "Ada"})

    count: Count = Field(description="How many runs.")


class RunUpdate(Payload):
    """An executor's report, or another not_before or machine for a waiting run.

    Absent keys stay as they are; null empties a value.
    """

    model_config = example(
        status="success",
        attempt=1,
        output_data={"total": 42},
        run_message_history=[{"role": "assistant", "content": "Done."}],
    )

    status: RunStatus | None = Field(None, strict=False, description="The run's new status.")
    attempt: Attempt | None = Field(None, description="The attempt this report is for; an older one is refused.")
    assignment: Assignment | None = Field(
        None, description="The assignment this report is for; an older one is refused. Required with claim."
    )
    claim: UUID | None = Field(
        None,
        description="Chosen by the executor's process, and sent with all of its reports. The one that began the attempt is "
        "the only one that is accepted.",
    )
    error: Lines | None = Field(None, description="What went wrong; at most 256 KiB in all, as UTF-8 in JSON.")
    error_code: ErrorCode | None = Field(
        None,
        description="What went wrong, as a word that programs compare. The service's own endings have one, too:"
        " `executor_lost`, `not_started`, `run_timeout`, `executor_gave_up`, `machine_deleted`, `session_released`.",
    )
    output_data: JsonObject | None = Field(None, description="The result.")
    output_attachment_ids: Ids | None = Field(
        None, description="Checked against the run's output attachments; the attachments themselves are the truth."
    )
    run_message_history: Annotated[list[JsonObject], Field(max_length=100_000, fail_fast=True)] | None = Field(
        None, description="What was said and done."
    )
    usage_metadata: Metadata | None = Field(None, description="What the attempt used; kept and shown, not interpreted.")
    post_run_checks: NotSupported = None
    input_values: Variables | None = Field(None, description="Values of the workflow's variables.")
    started_at: Timestamp | None = Field(
        None, description="When the work began; default: now. Shown, never trusted; ignored once the run has ended."
    )
    ended_at: Timestamp | None = Field(
        None,
        description="When the work ended, not before started_at; default: now. Shown, never trusted; ignored once the run has"
        " ended. An end before the start that is known is shown as the start.",
    )
    reason: Reason | None = Field(None, description="Why it ends; kept with the event, never interpreted.")
    release_session_after: bool | None = Field(None, description="Release the session's machine when this run ends.")
    next_retry_at: None = Field(
        None,
        description="Only null: drops the retry that the workflow's policy has planned. Needs runs:write, and a request of its"
        " own.",
    )
    not_before: Timestamp | None = Field(
        None,
        description="Only for a run that has no machine yet, with the scope runs:write, and beside nothing but reason: start at"
        " this time or later, at most 30 days ahead; null: start now.",
    )
    machine_id: UUID | None = Field(
        None,
        description="Only for a run that has no machine yet, with the scope runs:write, and beside nothing but pool_ids and"
        " reason: pin this machine; null: no longer pin one. The run keeps its place in the queue.",
    )
    pool_ids: PoolIds | None = Field(
        None,
        description="The same: the machine must be in all of these pools; [] or null: any machine. Without machine_id, an"
        " earlier pin goes.",
    )


EVENTS = Literal[
    "created",
    "assigned",
    "started",
    "ended",
    "retried",
    "deleted",
    "secrets_expired",
    "unassigned",
    "retry_planned",
    "retry_dropped",
    "rescheduled",
    "retargeted",
    "due",
]

SCHEDULING_REASONS = Literal[
    "assigned",
    "waiting_for_machine",
    "machine_offline",
    "machine_busy",
    "machine_not_responding",
    "no_machine_in_pools",
    "waiting_for_session",
    "not_before",
]


_VERSION_TEXT = "The version of its workflow when the attempt became `running`; null until then."


class RunResponse(Reply):
    """A run."""

    id: UUID
    workflow_id: UUID
    machine_id: UUID | None = Field(
        description="The assigned machine, else (while active) the session's reserved one, else the pinned one."
    )
    assigned_machine_id: UUID | None = Field(description="Null until a machine is assigned.")
    user_id: UUID | None = Field(description="The user whose API key created it, if the key has one.")
    organization_id: str | None
    status: RunStatus
    scheduling_reason: SCHEDULING_REASONS | None = Field(description="Why a scheduling run has not started.")
    not_before: datetime | None = Field(
        description="The run is held until this time, and then takes its place in the queue; null: it is not held."
    )
    attempt: int = Field(description="1 at creation, one more with each retry.")
    assignment: int = Field(description="0 at creation, one more each time it is given to a machine; never reset.")
    traceparent: str | None = Field(
        description="W3C Trace Context of the request that queued this attempt, for its executor to go on with; null if there"
        " was none and the service makes no traces."
    )
    is_priority: bool = Field(description="Starts before runs without priority.")
    error: list[str] | None = Field(description="What went wrong.")
    error_code: str | None = Field(description="The same as a word that programs compare, if the report gave one.")
    workflow_version: int | None = Field(description=_VERSION_TEXT)
    output_data: dict[str, Any] | None = Field(description="The result.")
    output_attachment_ids: list[str] = Field(description="Files that the executor handed in.")
    run_message_history: list[dict[str, Any]] | None = Field(description="What was said and done.")
    input_attachment_ids: list[str] = Field(description="Files for the machine.")
    input_values: dict[str, Any] | None = Field(description="Values of the workflow's variables.")
    sensitive_input_aliases: dict[str, str] | None = Field(
        description="Where each secret is in Vault; never the secret."
    )
    pool_ids: list[UUID] | None = Field(description="The machine must be in all of these.")
    session_id: UUID | None = Field(description="Runs of one session use one machine, one after the other.")
    session_alias: str | None = Field(description="Name of this run within its session.")
    release_session_after: bool | None = Field(description="Release the session's machine when this run ends.")
    created_at: datetime
    started_at: datetime | None = Field(description="When the work began, as the executor reported it.")
    ended_at: datetime | None = Field(description="When the work ended, as the executor reported it.")
    changed_at: datetime = Field(
        description="When it was created, retried, started or ended last, by the service's own clock."
    )
    next_retry_at: datetime | None = Field(
        description="When the workflow's retry policy will retry this attempt; null: it will not."
    )
    retries_left: int | None = Field(
        description="Retries that the workflow's policy still allows, a planned one included; null: there is no policy."
    )
    last_report_at: datetime | None = Field(
        description="When the executor last reported on this attempt while it was running; null: not yet."
    )
    is_reporting: bool = Field(
        description="More reports are expected: the run is running, and its executor gave a claim or has reported since the"
        " start. If last_report_at is then older than a few minutes, look at the machine."
    )
    main_prompt: str | None = Field(description="What the agent is told to do; null: the workflow's prompt.")
    model_metadata: dict[str, Any] | None = Field(description="Which models this run uses, as given.")
    usage_metadata: dict[str, Any] | None = Field(description="What the attempt used, as reported.")
    post_run_checks: Unsupported


class RunHistoryPage(Reply):
    """Messages of a run's current attempt, the oldest first."""

    items: list[dict[str, Any]] = Field(description="Messages of run_message_history.")
    attempt: int = Field(description="The attempt that they are of.")
    total: int = Field(description="Messages of the attempt.")
    limit: int = Field(description="Most items in a page.")
    next: int | None = Field(description="`after` of the page that follows; null: this is the last one.")


class RunProjection(RunResponse):
    """A run; with `fields=`, only those keys and the base fields are present."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["id", "workflow_id", "machine_id", "status", "created_at"]}
    )


class RunWithIncluded(RunProjection, WithIncluded):
    """A run, and what `include` adds; with `fields=`, only those keys and the base fields are present."""


class RunPage(SearchedPage[RunProjection], WithIncluded):
    """One page of runs."""

    list_is_partial: bool = Field(
        description="true: there are more runs than were looked at for this page, which are 10,000 at most where no index"
        " serves these filters in this order. Go on with `next`, or ask for a shorter time."
    )


class RunAttemptResponse(Reply):
    """A finished attempt that a retry replaced."""

    run_id: UUID
    attempt: int
    status: RunStatus
    error: list[str] | None = Field(description="What went wrong.")
    error_code: str | None = Field(description="The same as a word that programs compare, if the report gave one.")
    machine_id: UUID | None = Field(description="The machine that was assigned.")
    session_id: UUID | None
    started_at: datetime | None
    ended_at: datetime | None
    retried_at: datetime
    by: Literal["request", "bulk", "policy"] = Field(
        description="Who retried it: a request, a bulk retry or the workflow's policy."
    )
    bulk_retry_id: UUID | None = Field(description="The bulk retry that it was part of.")
    retried_by_key_id: UUID | None = Field(description="The API key that asked for the retry.")
    retried_by_key_name: str | None = Field(description="What that key is for, as its name says now.")
    retried_by_user_id: UUID | None = Field(description="The user that key belongs to.")
    overridden: list[str] = Field(description="Names of the fields the retry changed; never values.")
    reason: str | None = Field(description="Why the retry was asked for.")
    workflow_version: int | None = Field(description=_VERSION_TEXT)
    usage_metadata: dict[str, Any] | None = Field(
        description="What the attempt used, as reported; null for a key that is bound to a machine."
    )
    end_reason: str | None = Field(description="Why the attempt was ended, as far as its event is still kept.")


class RunAttemptDetails(RunAttemptResponse):
    """One attempt with what it produced: an earlier one, or the current one."""

    retried_at: datetime | None = Field(description="null: it is the current attempt.")  # type: ignore[assignment]
    by: Literal["request", "bulk", "policy"] | None = Field(  # type: ignore[assignment]
        description="Who retried it; null: it is the current attempt."
    )
    outputs_are_kept: bool = Field(
        description="false: ATTEMPT_OUTPUTS was `none` when it was retried, and its outputs were cleared."
    )
    output_data: dict[str, Any] | None = Field(description="The result.")
    output_attachment_ids: list[str] = Field(description="Files that the executor handed in.")
    run_message_history: list[dict[str, Any]] | None = Field(description="What was said and done.")


class RunEventResponse(Reply):
    """One change of a run. Names of fields, never values."""

    at: datetime = Field(description="When.")
    run_id: UUID
    attempt: int = Field(description="The attempt that the run was at after the change.")
    event: EVENTS = Field(description="What happened.")
    from_status: RunStatus | None = Field(description="The status before; null for a new run.")
    to_status: RunStatus | None = Field(description="The status after; null once the run is deleted.")
    by: Literal["request", "bulk", "policy", "service"] = Field(
        description="Who made it: a request, a bulk retry, the workflow's policy, or the service by itself."
    )
    bulk_retry_id: UUID | None = Field(description="The bulk retry that it was part of.")
    key_id: UUID | None = Field(description="The API key behind it; null for what the service did by itself.")
    by_key_name: str | None = Field(description="What that key is for, as its name says now.")
    user_id: UUID | None = Field(description="The user that key belongs to.")
    request_id: str | None = Field(description="X-Request-ID of the request behind it.")
    reason: str | None = Field(description="Why, as the caller said.")
    changed: list[str] = Field(description="Names of the fields that the request gave.")
    code: str | None = Field(
        description="Of `retry_dropped`: the code of the refusal, `policy_removed` or `requested`."
    )


class EventPage(Reply):
    """Events of an organization from a cursor on, oldest first."""

    items: list[RunEventResponse]
    next: str = Field(description="Send it as `after` to go on from here, also when `items` is empty.")
    limit: int = Field(description="Most items in a page.")


class RunBulkCreateResponse(Reply):
    """All or nothing: failed_count is always 0."""

    created_runs: list[RunResponse] = Field(description="The new runs.")
    failed_count: int = Field(description="Always 0.")
    errors: list[str] = Field(description="Always empty.")


class DryRunRefusal(Reply):
    """One thing that speaks against a retry."""

    status: int = Field(description="The status that the retry would be refused with.")
    code: str = Field(description="Stable name of the refusal.")
    detail: str = Field(description="What to do.")


class DryRunCleared(Reply):
    """What of the finished attempt goes."""

    outputs: bool = Field(description="It has output data.")
    history: bool = Field(description="It has a message history.")
    error: bool = Field(description="It has errors.")
    output_attachments: int = Field(description="Files that the executor handed in.")


class DryRunSecrets(Reply):
    """The next attempt's secrets."""

    names: list[str] = Field(description="By name, never the values.")
    kept_until: datetime | None = Field(description="Until when the kept ones are still there; null for new ones.")


class DryRunPlacement(Reply):
    """Where the next attempt would run, as things stand now."""

    pinned_machine_id: UUID | None = Field(description="The machine it would be pinned to.")
    pool_ids: list[UUID] | None = Field(description="The pools that its machine must be in.")
    session_machine_id: UUID | None = Field(description="The machine that is reserved for its session, which decides.")
    eligible_machines: int = Field(description="Machines that could start it now, counted to 1,000.")
    expected_reason: SCHEDULING_REASONS | None = Field(
        description="Its scheduling_reason right after the retry. Null: the machine that it names does not exist."
    )


class DryRunResponse(Reply):
    """What a retry would do. Names and counts, never a value."""

    run_id: UUID
    attempt: int = Field(description="The number that the next attempt would have.")
    would_retry: bool = Field(
        description="Nothing speaks against it but perhaps a quota (429): those are not counted here."
    )
    refusals: list[DryRunRefusal] = Field(description="All that speaks against it; the retry gives the first.")
    cleared: DryRunCleared = Field(description="What goes.")
    kept: list[str] = Field(description="Names of what the run has and keeps.")
    replaced: list[str] = Field(description="Names of what the body replaces.")
    secrets: DryRunSecrets = Field(description="The next attempt's secrets.")
    placement: DryRunPlacement = Field(description="Where it would run.")


class LaneWants(Reply):
    """What all runs of a lane want."""

    session_id: UUID | None = Field(description="The machine of this session.")
    machine_id: UUID | None = Field(description="This machine.")
    pool_ids: list[UUID] | None = Field(description="A machine that is in all of these pools.")


class LaneResponse(Reply):
    """Runs that wait for the same."""

    lane: str = Field(description="Names the lane; its form may change.")
    wants: LaneWants = Field(description="What its runs want; all null: any machine.")
    waiting: int = Field(description="How many runs wait, counted to 1,000.")
    oldest_queued_at: datetime = Field(description="Since when the oldest of them waits.")
    head_run_id: UUID = Field(description="The run that starts next.")
    reason: SCHEDULING_REASONS | None = Field(description="Why it has not started: its scheduling_reason.")


class QueueResponse(Reply):
    """Who waits, for what, how long."""

    items: list[LaneResponse] = Field(description="At most 200 lanes, the one with the oldest run first.")
    held: int = Field(description="Runs that are held until their not_before and wait in no lane, counted to 1,000.")
