"""The wire types of workflows, machines and pools."""

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import Field

from app.schemas.retry_policies import RetryPolicy
from app.schemas.values import (
    EXAMPLE_ID,
    Description,
    Ids,
    Name,
    NonEmptyName,
    NotSupported,
    Page,
    Payload,
    PoolIds,
    Prompt,
    Reply,
    SearchedPage,
    Timestamp,
    Unsupported,
    WithIncluded,
    example,
)


class WorkflowCreate(Payload):
    """A new workflow."""

    model_config = example(name="Monthly report", main_prompt="Open the report, fill in the figures, and save it.")

    main_prompt: Prompt = Field(description="What the agent is told to do.")
    name: Name | None = Field(None, description="What people call it.")
    input_schema: Prompt | None = Field(
        None, description="JSON Schema of input_values, as text; kept as it is, not applied."
    )
    output_schema: Prompt | None = Field(
        None, description="JSON Schema of output_data, as text; kept as it is, not applied."
    )
    includes_file_exports: bool = Field(default=False, description="Its runs hand in files.")
    is_webhooks_enabled: bool = Field(
        default=False, description="Its runs' endings are sent to the organization's webhook endpoints."
    )
    retry_policy: RetryPolicy | None = Field(None, description="Which of its runs are retried by themselves, and when.")
    terminal_command_allowlist: NotSupported = None
    model_metadata: NotSupported = None
    post_run_check_failure_cleanup_prompt: NotSupported = None
    workflow_metadata: NotSupported = None
    post_run_checks: NotSupported = None


class WorkflowUpdate(Payload):
    """Absent keys stay as they are."""

    model_config = example(name="Weekly report")

    main_prompt: Prompt | None = Field(None, description="What the agent is told to do; null keeps it.")
    name: Name | None = Field(None, description="What people call it.")
    input_schema: Prompt | None = Field(
        None, description="JSON Schema of input_values, as text; kept as it is, not applied."
    )
    output_schema: Prompt | None = Field(
        None, description="JSON Schema of output_data, as text; kept as it is, not applied."
    )
    includes_file_exports: bool | None = Field(None, description="Its runs hand in files.")
    is_webhooks_enabled: bool | None = Field(
        None, description="Its runs' endings are sent to the organization's webhook endpoints."
    )
    retry_policy: RetryPolicy | None = Field(
        None, description="Which of its runs are retried by themselves, and when; null: none."
    )
    terminal_command_allowlist: NotSupported = None
    model_metadata: NotSupported = None
    post_run_check_failure_cleanup_prompt: NotSupported = None
    workflow_metadata: NotSupported = None
    post_run_checks: NotSupported = None


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
    is_webhooks_enabled: bool = Field(description="Its runs' endings are sent to the organization's webhook endpoints.")
    retry_policy: RetryPolicy | None = Field(description="Which of its runs are retried by themselves, and when.")
    version: int = Field(description="1 at creation, one more with each new name, prompt or schema.")
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


class WorkflowVersionResponse(Reply):
    """What a change of a workflow replaced."""

    workflow_id: UUID = Field(description="The workflow.")
    version: int = Field(description="The version that was replaced, as in workflow_version of runs.")
    name: str | None
    main_prompt: str = Field(description="What the agent was told to do.")
    input_schema: str | None = Field(description="JSON Schema of input_values, as text.")
    output_schema: str | None = Field(description="JSON Schema of output_data, as text.")
    replaced_at: datetime = Field(description="When it was replaced.")
    replaced_by_key_id: UUID | None = Field(description="The API key that replaced it.")
    replaced_by_user_id: UUID | None = Field(description="The user that key belongs to.")


MachineStatus = Literal["connected", "disconnected", "error"]

_ALERTS_TEXT = "Whether `downed_machines` is sent when it goes down, to the webhook endpoints that ask for this event."


class MachineCreate(Payload):
    """A machine that registers itself."""

    model_config = example(fingerprint="5f2b9c", unkey_key_id="key_1", hostname="desk-7")

    fingerprint: NonEmptyName = Field(description="Identifies the hardware.")
    unkey_key_id: NonEmptyName = Field(description="The vendor's id of the machine's key.")
    name: Name | None = Field(None, description="What people call it.")
    version: Name | None = Field(None, description="Version of the software that drives it.")
    hostname: Name | None = Field(None, description="Its name in the network.")
    os_info: Name | None = Field(None, description="Its operating system.")
    machine_parameters: NotSupported = None
    machine_sensitive_parameters: NotSupported = None


class MachineUpdate(Payload):
    """Absent keys stay as they are. `reserved_session_id: null` ends the session on this machine."""

    model_config = example(status="disconnected", is_available=False)

    name: Name | None = Field(None, description="What people call it.")
    version: Name | None = Field(None, description="Version of the software that drives it.")
    hostname: Name | None = Field(None, description="Its name in the network.")
    os_info: Name | None = Field(None, description="Its operating system.")
    status: MachineStatus | None = Field(None, description="Only a connected machine is given runs.")
    is_available: bool | None = Field(None, description="Only an available machine is given runs.")
    alerts_enabled: bool | None = Field(None, description=_ALERTS_TEXT)
    last_seen: Timestamp | None = Field(None, description="When it was last heard of.")
    reserved_session_id: None = Field(
        None, description="Only null: cancels the session's active runs, clears the reservation and frees the machine."
    )
    machine_parameters: NotSupported = None
    machine_sensitive_parameters: NotSupported = None


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
    alerts_enabled: bool = Field(description=_ALERTS_TEXT)
    reserved_session_id: UUID | None = Field(description="Only runs of this session are given to it.")
    machine_parameters: Unsupported
    machine_sensitive_parameters: Unsupported
    linked_keepalive_machine_id: Unsupported
    physical_server_id: Unsupported
    pools: list[PoolResponse]
    created_at: datetime
    last_seen: datetime = Field(description="When it was last heard of.")


class MachineWithIncluded(MachineResponse, WithIncluded):
    """A machine, and what `include` adds."""


class MachinePage(SearchedPage[MachineResponse], WithIncluded):
    """One page of machines."""


class MachineHealthError(Reply):
    """A machine that is given no runs because it is not connected."""

    machine_id: UUID = Field(description="The machine.")
    organization_id: str
    machine_name: str | None = Field(description="What people call it.")
    error: str = Field(description="Its status, and when it was last heard of.")
    status_code: None = Field(description="Always null: no machine is called.")


class MachinesHealth(Reply):
    """Which machines are connected, as this service knows it: no machine is called."""

    status: Literal["ok", "error"] = Field(description="`error` if one of them is not connected.")
    scope: Literal["organization"] = Field(description="Always `organization`: no key sees more.")
    checked_machines: int = Field(
        description="Machines that the key sees; of more than 1,000 those that were registered last."
    )
    healthy_machines: int = Field(description="Those that are connected.")
    errored_machines: list[MachineHealthError] = Field(description="Those that are not, newest first.")
    message: str = Field(description="The same in a sentence.")


class MachinePoolUpdate(Payload):
    """The pools a machine is in from now on."""

    model_config = example(pool_ids=[EXAMPLE_ID])

    pool_ids: PoolIds = Field(description="All pools it is in from now on.")


class PoolCreate(Payload):
    """A new pool."""

    model_config = example(name="Finance", description="Machines that may see the ledgers.")

    name: NonEmptyName = Field(description="What people call it.")
    description: Description | None = Field(None, description="What it is for.")
    pool_parameters: NotSupported = None
    pool_sensitive_parameters: NotSupported = None


class PoolUpdate(Payload):
    """Absent keys stay as they are."""

    model_config = example(description="Machines with the ledger software.")

    name: NonEmptyName | None = Field(None, description="What people call it; null keeps it.")
    description: Description | None = Field(None, description="What it is for; null clears it.")
    pool_parameters: NotSupported = None
    pool_sensitive_parameters: NotSupported = None


class PoolWithMachines(PoolResponse):
    """A pool and its machines."""

    machines: list[MachineResponse]


class PoolDetails(PoolResponse, WithIncluded):
    """A pool, and what the query adds."""

    machines: list[MachineResponse] = Field(default=[], description="Only with include_machines=true: its machines.")


class PoolPage(Page[PoolResponse], WithIncluded):
    """One page of pools."""


class MachinePoolAssignment(Payload):
    """Machines to add to a pool, or to take out of it."""

    model_config = example(machine_ids=[EXAMPLE_ID])

    machine_ids: Ids = Field(description="The machines.")


class KeyResponse(Reply):
    """An API key of the organization; never the key itself."""

    id: UUID = Field(description="Names the key in events, and for `keys revoke` of the command line.")
    organization_id: str
    name: str | None = Field(description="What the key is for.")
    scopes: list[str] = Field(description="What it may do; `*` is everything.")
    machine_id: UUID | None = Field(description="It sees and reports only runs that are assigned to this machine.")
    user_id: UUID | None = Field(description="The user it belongs to.")
    created_at: datetime
    last_used_at: datetime | None = Field(description="Its last request, to within a minute; null: it was never used.")
    expires_at: datetime | None = Field(description="From then on it is refused; null: it does not expire.")
    revoked_at: datetime | None = Field(description="When it was revoked: it is refused since then.")


class WhoAmI(Reply):
    """An API key."""

    organization_id: str
    key_id: UUID = Field(description="Names the key in events and in the list of keys.")
    name: str | None = Field(description="What the key is for.")
    user_id: UUID | None = Field(description="The user it belongs to.")
    scopes: list[str] = Field(description="What it may do; `*` is everything.")
    machine_id: UUID | None = Field(description="It sees and reports only runs that are assigned to this machine.")
    expires_at: datetime | None = Field(description="From then on it is refused.")
