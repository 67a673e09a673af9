"""The wire types: what a caller may send, and every key of what we answer.

Requests are checked strictly (no coercion between JSON types) and unknown keys are ignored: newer SDKs send keys that we do
not know. Replies are declared here for the OpenAPI document; they are built where they are read (views.py).
"""

import binascii
import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import pybase64
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.models import RunStatus

MAX_TEXT = 100_000  # characters in a prompt, a schema or one error line
MAX_NAME = 255  # characters in a name
MAX_IDS = 100  # pools of a run, pools of a machine, machines in one pool change
MAX_VARIABLES = 1_000  # names in input_values or sensitive_input_values
MAX_INTEGER = 2**63 - 1

# --- what PostgreSQL and JSON can hold --------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")


def _storable_text(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("string_nul", "NUL is not allowed")
    if _SURROGATE.search(value):
        raise PydanticCustomError("string_unicode", "lone surrogates are not allowed")
    return value


T = TypeVar("T")


def _storable_json(value: T) -> T:
    """Refuse what the stores would change or reject. Depth is bounded by the JSON parser (200)."""
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            _storable_text(item)
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise PydanticCustomError("finite_number", "numbers must be finite")
        elif isinstance(item, int) and not -MAX_INTEGER - 1 <= item <= MAX_INTEGER:
            raise PydanticCustomError("number_out_of_range", "integers must fit 64 bits")
    return value


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)?")


def _rfc3339(value: object) -> object:
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        raise PydanticCustomError("datetime_parsing", "not RFC 3339")
    return value


def _utc(value: datetime) -> datetime:
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("datetime_parsing", "out of range") from None


def _whole(value: object) -> object:
    """1.0 is an integer, as JSON Schema has it: some languages send every number with a fraction."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The patterns say in the document what the validators check; those give the better sentences.
NO_NUL = {"pattern": "^[^\\u0000]*$"}

Attempt = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
# A length before a validator, or its error would be the one of a list.
Text = Annotated[str, Field(max_length=MAX_TEXT, json_schema_extra=NO_NUL), AfterValidator(_storable_text)]
Name = Annotated[str, Field(max_length=MAX_NAME, json_schema_extra=NO_NUL), AfterValidator(_storable_text)]
JsonObject = Annotated[
    dict[str, JsonValue], Field(json_schema_extra={"propertyNames": NO_NUL}), AfterValidator(_storable_json)
]
Variables = Annotated[
    dict[str, JsonValue],
    Field(max_length=MAX_VARIABLES, json_schema_extra={"propertyNames": NO_NUL}),
    AfterValidator(_storable_json),
]
# A time without an offset is read as UTC: the SDK sends what datetime.isoformat() gives. Strings alone pass the first check;
# strict would then refuse them too, because what a validator returns no longer counts as JSON.
Timestamp = Annotated[datetime, Field(strict=False), BeforeValidator(_rfc3339), AfterValidator(_utc)]
PoolIds = Annotated[list[UUID], Field(max_length=MAX_IDS)]

# --- files ------------------------------------------------------------------------------------------------------------

_HIDDEN = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_HIDDEN}]")
_FILENAME = {"pattern": rf"^(?![\s.]*$)(?![A-Za-z]:)[^{_HIDDEN}/\\]*[^{_HIDDEN}/\\\s][^{_HIDDEN}/\\]*$"}
_TARGET_PATH = {"pattern": rf"^(?!(.*[/\\:])?[\s.]*\.[\s.]*([/\\:]|$))[^{_HIDDEN}]*[^{_HIDDEN}\s][^{_HIDDEN}]*$"}
_DRIVE = re.compile(r"[A-Za-z]:")  # on Windows, what follows is on another drive
_NO_NAME = re.compile(r"[\s.]*")  # Windows takes dots and spaces from the end of a name


def _filename(value: str) -> str:
    """A bare name: it becomes a path on the machine and a Content-Disposition here."""
    if (
        _NO_NAME.fullmatch(value)
        or _DRIVE.match(value)
        or "/" in value
        or "\\" in value
        or _CONTROL.search(value)
        or len(value.encode()) > MAX_NAME
    ):
        raise PydanticCustomError("filename", "unsafe filename")
    return value


def _target_path(value: str) -> str:
    """A path on the machine, Windows or POSIX: never climbing, never hiding characters."""
    parts = re.split(r"[/\\:]", value)  # C:.. climbs from C:'s current folder
    if not value.strip() or _CONTROL.search(value) or any("." in part and _NO_NAME.fullmatch(part) for part in parts):
        raise PydanticCustomError("target_path", "unsafe path")
    return value


def _base64(value: object) -> object:
    """RFC 4648 section 4, strictly: no whitespace, no missing padding, no other alphabet."""
    if not isinstance(value, str):
        return value  # the type check says what is wrong
    try:
        return pybase64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise PydanticCustomError("base64", "not base64") from None


Base64 = Annotated[
    bytes, BeforeValidator(_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64", "format": "byte"})
]
FileName = Annotated[
    str,
    Field(min_length=1, max_length=MAX_NAME, json_schema_extra=_FILENAME),
    AfterValidator(_storable_text),
    AfterValidator(_filename),
]
TargetPath = Annotated[
    str,
    Field(max_length=4096, json_schema_extra=_TARGET_PATH),
    AfterValidator(_storable_text),
    AfterValidator(_target_path),
]


class Payload(BaseModel):
    """A request body."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


Unsupported = Annotated[None, Field(description="Not supported; always null.")]

_ID = "3c90c3cc-0d44-4b50-8888-8dd25736052a"


def _example(**values: Any) -> ConfigDict:
    """A body for the document; ids in it stand for the caller's own."""
    return ConfigDict(json_schema_extra={"examples": [values]})


class Reply(BaseModel):
    """A reply: every key is always present."""

    model_config = ConfigDict(json_schema_mode_override="serialization")


class FileInput(Payload):
    """A file for the machine."""

    filename: FileName = Field(
        description="Bare file name, without any path; at most 255 bytes of UTF-8.", examples=["invoice.pdf"]
    )
    content: Base64 = Field(description="The bytes, base64.", examples=["aGVsbG8="])
    target_path: TargetPath | None = Field(None, description="Where to put it on the machine (Windows or POSIX path).")
    cleanup_imports_after_run: bool | None = Field(
        default=False, description="Delete it from the machine after the run."
    )


# --- runs -------------------------------------------------------------------------------------------------------------


class _Overrides(Payload):
    input_values: Variables | None = Field(
        None, description="Values of the workflow's variables.", examples=[{"user": "Ada"}]
    )
    sensitive_input_values: Variables | None = Field(
        None,
        description="Secrets by name, any JSON. They go to Vault; replies show aliases.",
        examples=[{"password": "s3cret"}],
    )
    file_inputs: list[FileInput] | None = Field(None, description="Input files.")
    machine_id: UUID | None = Field(None, description="Pin this machine; wins over pool_ids.")
    pool_ids: PoolIds | None = Field(None, description="The machine must be in all of these pools.")
    session_id: UUID | None = Field(None, description="Join this session.")
    start_session: bool | None = Field(default=False, description="Start a new session. Not together with session_id.")


class _SessionOverrides(_Overrides):
    session_alias: Name | None = Field(None, description="Name of this run within its session.")
    release_session_after: bool | None = Field(None, description="Release the session's machine when this run ends.")


class RunRetry(_SessionOverrides):
    """What to change for the next attempt. Absent and null both mean: keep."""

    model_config = _example(
        input_values={"customer": "Ada"},
        sensitive_input_values={"password": "s3cret"},
        file_inputs=[{"filename": "invoice.pdf", "content": "aGVsbG8=", "target_path": "C:\\in\\invoice.pdf"}],
        is_priority=True,
    )

    reuse_session: bool | None = Field(default=True, description="false drops the session, unless a new one is given.")
    is_priority: bool | None = Field(None, description="Start before runs without priority.")


class RunCreate(_SessionOverrides):
    """A new run of a workflow."""

    model_config = _example(
        workflow_id=_ID,
        input_values={"customer": "Ada"},
        sensitive_input_values={"password": "s3cret"},
        start_session=True,
        session_alias="morning",
    )

    workflow_id: UUID = Field(description="What to run.")
    is_priority: bool | None = Field(default=False, description="Start before runs without priority.")


class RunBulkCreate(_SessionOverrides):
    """Many runs that are alike."""

    model_config = _example(workflow_id=_ID, count=2, input_values={"customer": "Ada"})

    workflow_id: UUID = Field(description="What to run.")
    count: Count = Field(description="How many runs.")
    is_priority: bool | None = Field(default=False, description="Start before runs without priority.")


class RunUpdate(Payload):
    """An executor's report. Absent keys stay as they are; null empties a value."""

    model_config = _example(
        status="success",
        attempt=1,
        output_data={"total": 42},
        run_message_history=[{"role": "assistant", "content": "Done."}],
    )

    status: RunStatus | None = Field(None, strict=False, description="The run's new status.")
    attempt: Attempt | None = Field(None, description="The attempt this report is for; an older one is refused.")
    error: Annotated[list[Text], Field(max_length=1000)] | None = Field(None, description="What went wrong.")
    output_data: JsonObject | None = Field(None, description="The result.")
    output_attachment_ids: Annotated[list[UUID], Field(max_length=1000)] | None = Field(
        None, description="Checked against the run's output attachments; the attachments themselves are the truth."
    )
    run_message_history: Annotated[list[JsonObject], Field(max_length=100_000)] | None = Field(
        None, description="What was said and done."
    )
    input_values: Variables | None = Field(None, description="Values of the workflow's variables.")
    started_at: Timestamp | None = Field(None, description="When the work began; default: now.")
    ended_at: Timestamp | None = Field(None, description="When the work ended; default: now.")
    release_session_after: bool | None = Field(None, description="Release the session's machine when this run ends.")


SCHEDULING_REASONS = Literal[
    "assigned",
    "waiting_for_machine",
    "machine_offline",
    "machine_busy",
    "no_machine_in_pools",
    "waiting_for_session",
]


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
    attempt: int = Field(description="1 at creation, one more with each retry.")
    is_priority: bool = Field(description="Starts before runs without priority.")
    error: list[str] | None = Field(description="What went wrong.")
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
    started_at: datetime | None
    ended_at: datetime | None
    main_prompt: Unsupported
    model_metadata: Unsupported
    usage_metadata: Unsupported
    post_run_checks: Unsupported


class RunProjection(RunResponse):
    """A run in a list; with `fields=`, only those keys and the base fields are present."""

    model_config = ConfigDict(
        json_schema_extra={"required": ["id", "workflow_id", "machine_id", "status", "created_at"]}
    )


class RunAttemptResponse(Reply):
    """A finished attempt that a retry replaced."""

    run_id: UUID
    attempt: int
    status: RunStatus
    error: list[str] | None = Field(description="What went wrong.")
    machine_id: UUID | None = Field(description="The machine that was assigned.")
    session_id: UUID | None
    started_at: datetime | None
    ended_at: datetime | None
    retried_at: datetime
    retried_by_key_id: UUID | None = Field(description="The API key that asked for the retry.")
    retried_by_user_id: UUID | None = Field(description="The user that key belongs to.")
    overridden: list[str] = Field(description="Names of the fields the retry changed; never values.")


class Page(Reply, Generic[T]):
    """One page of a list."""

    items: list[T]
    total: int = Field(description="Items in all pages.")
    skip: int = Field(description="Items passed over.")
    limit: int = Field(description="Most items in a page.")


class RunBulkCreateResponse(Reply):
    """All or nothing: failed_count is always 0."""

    created_runs: list[RunResponse] = Field(description="The new runs.")
    failed_count: int = Field(description="Always 0.")
    errors: list[str] = Field(description="Always empty.")


# --- attachments ------------------------------------------------------------------------------------------------------

AttachmentType = Literal["input", "output"]
_MEDIA_TYPE = r"^[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}( ?; ?[A-Za-z0-9_-]+=[A-Za-z0-9_.-]+)*$"


class RunAttachmentCreate(FileInput):
    """A file that an executor hands in for its run."""

    model_config = _example(
        run_id=_ID, filename="report.csv", content="YSxiCg==", content_type="text/csv", attachment_type="output"
    )

    run_id: UUID = Field(description="The run; it must be running.")
    content_type: str = Field(
        pattern=_MEDIA_TYPE, max_length=MAX_NAME, description="Media type.", examples=["text/csv"]
    )
    attachment_type: Annotated[AttachmentType, WithJsonSchema({"type": "string", "enum": ["output"]})] = Field(
        description="Only `output` can be added to an existing run."
    )
    expires_at: Timestamp | None = Field(
        None, description="When the file is deleted; null keeps it as long as the run."
    )


class RunAttachmentUpdate(Payload):
    """Absent keeps the expiry, null removes it."""

    model_config = _example(expires_at="2030-01-31T12:00:00Z")

    expires_at: Timestamp | None = Field(
        None, description="When the file is deleted; null keeps it as long as the run."
    )


class RunAttachmentResponse(Reply):
    """A file of a run."""

    id: UUID
    run_id: UUID
    user_id: UUID | None = Field(description="The user whose API key created it, if the key has one.")
    organization_id: str | None
    attachment_type: AttachmentType
    filename: str
    content_type: str
    size_bytes: int = Field(description="Size of the file itself.")
    storage_path: str = Field(description="Key in the file store; empty once an expired input's bytes were deleted.")
    target_path: str | None = Field(description="Where to put it on the machine.")
    cleanup_imports_after_run: bool = Field(description="Delete it from the machine after the run.")
    created_at: datetime
    expires_at: datetime | None = Field(description="When the file is deleted; null keeps it as long as the run.")


class DownloadUrlResponse(Reply):
    """A URL that works without an API key until it expires."""

    url: str = Field(description="Good for GET alone.")
    expires_in: int = Field(description="Seconds.")


# --- workflows, machines, pools ---------------------------------------------------------------------------------------


class WorkflowCreate(Payload):
    """A new workflow."""

    model_config = _example(name="Monthly report", main_prompt="Open the report, fill in the figures, and save it.")

    main_prompt: Text = Field(description="What the agent is told to do.")
    name: Name | None = Field(None, description="What people call it.")
    input_schema: Text | None = Field(
        None, description="JSON Schema of input_values, as text; kept as it is, not applied."
    )
    output_schema: Text | None = Field(
        None, description="JSON Schema of output_data, as text; kept as it is, not applied."
    )
    includes_file_exports: bool = Field(default=False, description="Its runs hand in files.")
    is_webhooks_enabled: bool = Field(default=False, description="Kept for clients; this service sends no webhooks.")


class WorkflowUpdate(Payload):
    """Absent keys stay as they are."""

    model_config = _example(name="Weekly report")

    main_prompt: Text | None = Field(None, description="What the agent is told to do; null keeps it.")
    name: Name | None = Field(None, description="What people call it.")
    input_schema: Text | None = Field(
        None, description="JSON Schema of input_values, as text; kept as it is, not applied."
    )
    output_schema: Text | None = Field(
        None, description="JSON Schema of output_data, as text; kept as it is, not applied."
    )
    includes_file_exports: bool | None = Field(None, description="Its runs hand in files.")
    is_webhooks_enabled: bool | None = Field(None, description="Kept for clients; this service sends no webhooks.")


class WorkflowResponse(Reply):
    """A workflow."""

    id: UUID
    user_id: UUID | None = Field(description="The user whose API key created it, if the key has one.")
    organization_id: str | None
    name: str | None
    main_prompt: str = Field(description="What the agent is told to do.")
    input_schema: str | None = Field(description="JSON Schema of input_values, as text.")
    output_schema: str | None = Field(description="JSON Schema of output_data, as text.")
    includes_file_exports: bool = Field(description="Its runs hand in files.")
    is_webhooks_enabled: bool = Field(description="Kept for clients; this service sends no webhooks.")
    includes_input_variables: bool = Field(description="Always false.")
    terminal_command_allowlist: Unsupported
    model_metadata: Unsupported
    post_run_check_failure_cleanup_prompt: Unsupported
    workflow_metadata: Unsupported
    old_versions: Unsupported
    tags: Unsupported
    post_run_checks: Unsupported
    created_at: datetime
    updated_at: datetime


MachineStatus = Literal["connected", "disconnected", "error"]


class MachineCreate(Payload):
    """A machine that registers itself."""

    model_config = _example(fingerprint="5f2b9c", unkey_key_id="key_1", hostname="desk-7")

    fingerprint: Name = Field(min_length=1, description="Identifies the hardware.")
    unkey_key_id: Name = Field(min_length=1, description="The vendor's id of the machine's key.")
    name: Name | None = Field(None, description="What people call it.")
    version: Name | None = Field(None, description="Version of the software that drives it.")
    hostname: Name | None = Field(None, description="Its name in the network.")
    os_info: Name | None = Field(None, description="Its operating system.")


class MachineUpdate(Payload):
    """Absent keys stay as they are. `reserved_session_id: null` ends the session on this machine."""

    model_config = _example(status="disconnected", is_available=False)

    name: Name | None = Field(None, description="What people call it.")
    version: Name | None = Field(None, description="Version of the software that drives it.")
    hostname: Name | None = Field(None, description="Its name in the network.")
    os_info: Name | None = Field(None, description="Its operating system.")
    status: MachineStatus | None = Field(None, description="Only a connected machine is given runs.")
    is_available: bool | None = Field(None, description="Only an available machine is given runs.")
    alerts_enabled: bool | None = Field(None, description="Kept for clients; this service sends no alerts.")
    last_seen: Timestamp | None = Field(None, description="When it was last heard of.")
    reserved_session_id: None = Field(
        None, description="Only null: cancels the session's active runs, clears the reservation and frees the machine."
    )


class PoolResponse(Reply):
    """A pool."""

    id: UUID
    organization_id: str
    name: str
    description: str | None = Field(description="What it is for.")
    pool_parameters: Unsupported
    pool_sensitive_parameters: Unsupported
    machine_count: int = Field(description="Machines in it.")
    created_at: datetime
    updated_at: datetime


class MachineResponse(Reply):
    """A machine."""

    id: UUID
    fingerprint: str = Field(
        description="Identifies the hardware."
    )  # SDKs before 2.2.59 cannot read a machine without it
    unkey_key_id: str = Field(description="The vendor's id of the machine's key.")
    user_id: UUID | None = Field(description="The user whose API key created it, if the key has one.")
    organization_id: str | None
    name: str | None
    version: str | None = Field(description="Version of the software that drives it.")
    hostname: str | None = Field(description="Its name in the network.")
    os_info: str | None = Field(description="Its operating system.")
    status: MachineStatus = Field(description="Only a connected machine is given runs.")
    is_available: bool = Field(description="Only an available machine is given runs.")
    alerts_enabled: bool = Field(description="Kept for clients; this service sends no alerts.")
    reserved_session_id: UUID | None = Field(description="Only runs of this session are given to it.")
    machine_parameters: Unsupported
    machine_sensitive_parameters: Unsupported
    linked_keepalive_machine_id: Unsupported
    physical_server_id: Unsupported
    pools: list[PoolResponse]
    created_at: datetime
    last_seen: datetime = Field(description="When it was last heard of.")


class MachinePoolUpdate(Payload):
    """The pools a machine is in from now on."""

    model_config = _example(pool_ids=[_ID])

    pool_ids: PoolIds = Field(description="All pools it is in from now on.")


class PoolCreate(Payload):
    """A new pool."""

    model_config = _example(name="Finance", description="Machines that may see the ledgers.")

    name: Name = Field(min_length=1, description="What people call it.")
    description: Text | None = Field(None, description="What it is for.")


class PoolUpdate(Payload):
    """Absent keys stay as they are."""

    model_config = _example(description="Machines with the ledger software.")

    name: Name | None = Field(None, min_length=1, description="What people call it; null keeps it.")
    description: Text | None = Field(None, description="What it is for; null clears it.")


class PoolWithMachines(PoolResponse):
    """A pool and its machines."""

    machines: list[MachineResponse]


class MachinePoolAssignment(Payload):
    """Machines to add to a pool, or to take out of it."""

    model_config = _example(machine_ids=[_ID])

    machine_ids: Annotated[list[UUID], Field(max_length=1000)] = Field(description="The machines.")


# --- errors and health ------------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="`urn:problem:` and the code.")
    title: str = Field(description="The name of the status.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened and what to do.")
    code: str = Field(description="Stable name of the refusal.")


class ValidationItem(BaseModel):
    """One thing wrong with a request: where, and what; never the value."""

    loc: list[str | int] = Field(description="Where: `body`, `path`, `query` or `header`, then the field.")
    msg: str = Field(description="What is wrong, and what would be right.")
    type: str = Field(description="Stable name of the kind of error.")


class ValidationProblem(BaseModel):
    """Bad input, in FastAPI's form."""

    detail: list[ValidationItem]


class Health(BaseModel):
    """`ok`, or what is down."""

    status: Literal["ok", "unavailable"]
    down: list[str] = Field(description="Dependencies that did not answer.")
