"""The tables. The migrations are written by hand; `alembic check` proves that they and this file agree.

This file has columns, indexes and constraints. The rules for changes of a row are in the file of its subject. An attribute may
have another name than its column: the column keeps the older name, which the version still running reads.

One file: the tables and their indexes are read together with a migration.
"""

import enum
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    SmallInteger,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ORGANIZATION_PATTERN = "^[A-Za-z0-9_-]{1,64}$"


class RunStatus(enum.StrEnum):
    """The states of a run; the wire and the table use the same words.

    ERROR: the attempt broke off. TASK_FAILED: the executor did its work, and says that the task itself failed. Only an executor
    sets it; the service's own endings are ERROR or CANCELLED.
    """

    SCHEDULING = "scheduling"
    RUNNING = "running"
    SUCCESS = "success"
    CANCELLED = "cancelled"
    ERROR = "error"
    TASK_FAILED = "task_failed"


ACTIVE = frozenset({RunStatus.SCHEDULING, RunStatus.RUNNING})
TERMINAL = frozenset(RunStatus) - ACTIVE


# SQL for ACTIVE; rules.is_active() says it of a row with an alias.
IS_ACTIVE = "status IN ('scheduling', 'running')"
_IS_WAITING = "status = 'scheduling' AND assigned_machine_id IS NULL"
_IS_HELD = f"{_IS_WAITING} AND lane > '~' COLLATE \"C\""
_IS_UNDER_WAY = "state IN ('running', 'paused')"
_IS_AT_WORK = "(status = 'running' OR (status = 'scheduling' AND assigned_machine_id IS NOT NULL))"


class Base(DeclarativeBase):
    """The base of all tables. Constraints have names, so that errors and migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads this as a class attribute
        str: Text,
        UUID: Uuid,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: ARRAY(Text),
        list[UUID]: ARRAY(Uuid),
        bytes: LargeBinary,
    }


def _organization_check() -> CheckConstraint:
    return CheckConstraint(f"organization_id ~ '{ORGANIZATION_PATTERN}'", name="organization_id")


class ApiKey(Base):
    """A bearer key, stored as its SHA-256: the key has 256 bits of entropy, so a slow hash would add nothing."""

    __tablename__ = "api_keys"
    __table_args__ = (
        _organization_check(),
        CheckConstraint("length(key_hash) = 32", name="key_hash"),
        CheckConstraint(
            "scopes <> '{}' AND scopes <@ "
            "'{*,runs:read,runs:write,runs:execute,resources:write,webhooks:write,keys:read}'",
            name="scopes",
        ),
        CheckConstraint("machine_id IS NULL OR scopes <@ '{runs:read,runs:execute}'", name="bound"),
        Index("ix_api_keys_organization", "organization_id", text("created_at DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    user_id: Mapped[UUID | None]
    name: Mapped[str | None]
    key_hash: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(server_default=text("'{*}'"))
    # No foreign key: when its machine is deleted, the key must see no run, instead of all runs.
    machine_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Workflow(Base):
    """What a run executes."""

    __tablename__ = "workflows"
    __table_args__ = (
        _organization_check(),
        Index("ix_workflows_organization", "organization_id", text("created_at DESC"), text("id DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    user_id: Mapped[UUID | None]
    name: Mapped[str | None]
    main_prompt: Mapped[str]
    input_schema: Mapped[str | None]
    output_schema: Mapped[str | None]
    includes_file_exports: Mapped[bool] = mapped_column(server_default=text("false"))
    is_webhooks_enabled: Mapped[bool] = mapped_column(server_default=text("false"))
    retry_policy: Mapped[dict[str, Any] | None]
    version: Mapped[int] = mapped_column(server_default=text("1"))  # one more with each new name, prompt or schema
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WorkflowVersion(Base):
    """What a PATCH of a workflow replaced: its name, prompt and schemas as they were."""

    __tablename__ = "workflow_versions"

    workflow_id: Mapped[UUID] = mapped_column(ForeignKey("workflows.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    main_prompt: Mapped[str]
    input_schema: Mapped[str | None]
    output_schema: Mapped[str | None]
    replaced_at: Mapped[datetime] = mapped_column(server_default=func.now())
    replaced_by_key_id: Mapped[UUID | None]
    replaced_by_user_id: Mapped[UUID | None]


class Machine(Base):
    """A desktop that executes runs, one at a time."""

    __tablename__ = "machines"
    __table_args__ = (
        _organization_check(),
        CheckConstraint("status IN ('connected', 'disconnected', 'error')", name="status"),
        Index("ix_machines_organization", "organization_id", text("created_at DESC"), text("id DESC")),
        Index(
            "uq_machines_reserved_session_id",
            "reserved_session_id",
            unique=True,
            postgresql_where=text("reserved_session_id IS NOT NULL"),
        ),
        Index("ix_machines_look_at", "look_at", postgresql_where=text("look_at IS NOT NULL")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    user_id: Mapped[UUID | None]
    fingerprint: Mapped[str]
    unkey_key_id: Mapped[str]
    name: Mapped[str | None]
    version: Mapped[str | None]
    hostname: Mapped[str | None]
    os_info: Mapped[str | None]
    status: Mapped[str] = mapped_column(server_default="connected")
    is_available: Mapped[bool] = mapped_column(server_default=text("true"))
    alerts_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    reserved_session_id: Mapped[UUID | None]
    last_seen: Mapped[datetime] = mapped_column(server_default=func.now())
    # When the service next checks whether the machine is silent. Null while it is offline, and until its first sign of life.
    silence_check_at: Mapped[datetime | None] = mapped_column("look_at")
    # Since when the machine is offline only because it was silent.
    offline_by_silence_since: Mapped[datetime | None] = mapped_column("silenced_at")
    # Whether the last run that began on this machine had a claim.
    last_start_had_claim: Mapped[bool] = mapped_column("starts_with_claim", server_default=text("false"))
    # The session of the last run that began on this machine.
    last_started_session_id: Mapped[UUID | None] = mapped_column("begun_session_id")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Pool(Base):
    """A named set of machines."""

    __tablename__ = "pools"
    __table_args__ = (
        _organization_check(),
        Index("ix_pools_organization", "organization_id", text("created_at DESC"), text("id DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    name: Mapped[str]
    description: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PoolMachine(Base):
    """Membership of a machine in a pool."""

    __tablename__ = "pool_machines"
    __table_args__ = (Index("ix_pool_machines_machine_id", "machine_id"),)

    pool_id: Mapped[UUID] = mapped_column(ForeignKey("pools.id", ondelete="CASCADE"), primary_key=True)
    machine_id: Mapped[UUID] = mapped_column(ForeignKey("machines.id", ondelete="CASCADE"), primary_key=True)


class Run(Base):
    """One execution of a workflow, retried in place.

    JSON columns are `json`, not `jsonb`: they are stored and returned, never searched, and `json` keeps numbers as sent.
    PostgreSQL parses each CHECK again for every statement that writes. The CHECKs therefore only keep states consistent. They
    repeat no rule that a wire type or an API key already guarantees (the shape of JSON, the form of organization ids).
    `secret_path` names the run's secret in Vault. A row that names a secret or a file is never removed by a cascade.
    """

    __tablename__ = "runs"
    __table_args__ = (
        CheckConstraint(
            "status IN ('scheduling', 'running', 'success', 'cancelled', 'error', 'task_failed')", name="status"
        ),
        CheckConstraint("attempt >= 1", name="attempt"),
        CheckConstraint(
            "status <> 'scheduling' OR (error IS NULL AND started_at IS NULL AND ended_at IS NULL)",
            name="scheduling_is_clear",
        ),
        CheckConstraint("status <> 'running' OR started_at IS NOT NULL", name="running_has_started"),
        CheckConstraint(f"{IS_ACTIVE} OR ended_at IS NOT NULL", name="terminal_has_ended"),
        CheckConstraint("session_alias IS NULL OR session_id IS NOT NULL", name="alias_has_session"),
        CheckConstraint("secret_path IS NULL OR sensitive_input_aliases IS NOT NULL", name="secret_has_aliases"),
        # Lists, newest first: one index per filter. Each index suffices for an index-only count.
        Index("ix_runs_organization", "organization_id", text("created_at DESC"), text("id DESC")),
        Index("ix_runs_workflow", "workflow_id", "organization_id", text("created_at DESC"), text("id DESC")),
        # In the database this index has the collation "C" on status, so the planner uses it only for conditions with that
        # collation (runs/listing.py). Conditions on status and another column have their own indexes: with old statistics,
        # the planner could prefer this index for them, and read all active runs.
        Index("ix_runs_status", "organization_id", "status", text("created_at DESC"), text("id DESC")),
        Index(
            "ix_runs_assigned_machine",
            "assigned_machine_id",
            text("created_at DESC"),
            text("id DESC"),
            postgresql_where=text("assigned_machine_id IS NOT NULL"),
        ),
        Index(
            "ix_runs_pinned_machine",
            "pinned_machine_id",
            text("created_at DESC"),
            text("id DESC"),
            postgresql_where=text("pinned_machine_id IS NOT NULL"),
        ),
        Index(
            "ix_runs_session",
            "session_id",
            "organization_id",
            text("created_at DESC"),
            text("id DESC"),
            postgresql_where=text("session_id IS NOT NULL"),
        ),
        # The queue: the next run of a lane (queue partition) is its first entry (placement.py).
        Index(
            "ix_runs_waiting",
            "organization_id",
            "lane",
            "queue_rank",
            "queued_at",
            "id",
            postgresql_where=text(_IS_WAITING),
        ),
        # Beyond its lanes stand the runs that are held, which are due at their `queued_at` (held.py).
        Index("ix_runs_held", "queued_at", postgresql_where=text(_IS_HELD)),
        # A machine has at most one active run, even if the code has a defect.
        Index(
            "uq_runs_active_machine",
            "assigned_machine_id",
            unique=True,
            postgresql_where=text(f"assigned_machine_id IS NOT NULL AND {IS_ACTIVE}"),
        ),
        # The active runs of a session; and separately the run at work, because many runs may wait for it.
        Index("ix_runs_active_session", "session_id", postgresql_where=text(f"session_id IS NOT NULL AND {IS_ACTIVE}")),
        Index(
            "ix_runs_session_at_work",
            "session_id",
            postgresql_where=text(f"session_id IS NOT NULL AND {_IS_AT_WORK}"),
        ),
        # The running runs by their last report, to find silent ones.
        Index("ix_runs_reported", "reported_at", postgresql_where=text("status = 'running'")),
        # Runs by their last change, and ended runs by age. Its status has the collation "POSIX", which orders like "C": the
        # collation of a condition decides which of the two indexes the planner uses.
        Index("ix_runs_changed", "organization_id", "status", "changed_at", "id"),
        # The runs that a machine was given and has not begun.
        Index(
            "ix_runs_awaited",
            "awaited_since",
            postgresql_where=text("status = 'scheduling' AND assigned_machine_id IS NOT NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    workflow_id: Mapped[UUID] = mapped_column(ForeignKey("workflows.id", ondelete="RESTRICT"))
    user_id: Mapped[UUID | None]
    status: Mapped[str]
    is_priority: Mapped[bool] = mapped_column(server_default=text("false"))
    attempt: Mapped[int] = mapped_column(server_default=text("1"))
    assignment: Mapped[int] = mapped_column(server_default=text("0"))  # how often the run was given to a machine
    # The claim of the executor process that began the run, and its attempt: a claim of an earlier attempt is not valid.
    claim: Mapped[UUID | None]
    claim_attempt: Mapped[int | None]
    pinned_machine_id: Mapped[UUID | None] = mapped_column(ForeignKey("machines.id", ondelete="SET NULL"))
    pin_is_deleted: Mapped[bool] = mapped_column(server_default=text("false"))  # was its pinned machine deleted
    assigned_machine_id: Mapped[UUID | None] = mapped_column(ForeignKey("machines.id", ondelete="SET NULL"))
    avoided_machine_id: Mapped[UUID | None]  # that another one is preferred to; no foreign key: it excludes nothing
    # Since when the machine should have begun the run; null once it has begun it.
    start_awaited_since: Mapped[datetime | None] = mapped_column("awaited_since")
    pool_ids: Mapped[list[UUID] | None]
    input_values: Mapped[dict[str, Any] | None]
    sensitive_input_aliases: Mapped[dict[str, Any] | None]
    secret_path: Mapped[str | None]
    session_id: Mapped[UUID | None]
    session_alias: Mapped[str | None]
    release_session_after: Mapped[bool | None]
    error: Mapped[list[str] | None]
    error_code: Mapped[str | None]
    workflow_version: Mapped[int | None]  # of the workflow when the attempt became `running`
    main_prompt: Mapped[str | None]
    model_metadata: Mapped[dict[str, Any] | None]
    # In byte order: placement.py skips from one lane to the next.
    lane: Mapped[str] = mapped_column(Text(collation="C"))
    queue_rank: Mapped[int] = mapped_column(SmallInteger, server_default=text("1"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    queued_at: Mapped[datetime] = mapped_column(server_default=func.now())
    # Retries by the workflow's policy since a request or a bulk retry last asked for this run; null: none are wanted.
    automatic_retries: Mapped[int | None] = mapped_column(SmallInteger, server_default=text("0"))
    queued_by_key_id: Mapped[UUID | None]  # the key that created the run or last retried it
    traceparent: Mapped[str | None]  # from the request that queued the run: the run's executor continues the trace
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    reported_at: Mapped[datetime | None]
    # When the run was last created, retried, started or ended, by the database's clock. `started_at` and `ended_at` may come
    # from an executor's clock: they are shown, and no decision uses them.
    changed_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class StorageMarker(Base):
    """The id of the file store that holds the files; one row at most (stores/storage_marker.py)."""

    __tablename__ = "storage_marker"
    __table_args__ = (CheckConstraint("is_only", name="is_only"),)

    is_only: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    store_id: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class RunOutput(Base):
    """The outputs, the history and the usage of an attempt. A run shows those of its current attempt.

    They have a table of their own, so that a retry need not touch their bytes: to clear a long history in place, PostgreSQL
    would delete it in pieces of 2 KB. A background loop clears superseded rows; the usage of an archived attempt stays.
    """

    __tablename__ = "run_outputs"
    __table_args__ = (Index("ix_run_outputs_superseded", "run_id", postgresql_where=text("is_superseded")),)

    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    output_data: Mapped[dict[str, Any] | None]
    run_message_history: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    usage_metadata: Mapped[dict[str, Any] | None]
    is_superseded: Mapped[bool] = mapped_column(server_default=text("false"))


class RunAttempt(Base):
    """A finished attempt, archived by the retry that replaced it. It has the names of overridden fields, never values."""

    __tablename__ = "run_attempts"
    __table_args__ = (
        CheckConstraint("status IN ('success', 'cancelled', 'error', 'task_failed')", name="status"),
        Index("ix_run_attempts_retried_at", "retried_at", postgresql_using="brin"),
    )

    # The row names no secret and no file, so a cascade may delete it with its run.
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    error: Mapped[list[str] | None]
    error_code: Mapped[str | None]
    machine_id: Mapped[UUID | None]  # no foreign key: the archive outlives machines
    session_id: Mapped[UUID | None]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    retried_at: Mapped[datetime] = mapped_column(server_default=func.now())
    retried_by_key_id: Mapped[UUID | None]
    retried_by_user_id: Mapped[UUID | None]
    retried_by: Mapped[str | None]  # request, bulk or policy; null: a request, archived by an earlier version
    bulk_retry_id: Mapped[UUID | None]
    overridden: Mapped[list[str]]
    reason: Mapped[str | None]
    workflow_version: Mapped[int | None]
    outputs_are_kept: Mapped[bool] = mapped_column(server_default=text("false"))  # as ATTEMPT_OUTPUTS was then


class RunEvent(Base):
    """One change of a run (events.py): who, when, the old and the new status; names of changed fields, never values.

    `xact` is the transaction that wrote the event. Readers continue from the last event that they saw, but transactions do not
    commit in the order in which they began. No CHECKs and few indexes, because every retry writes an event.
    """

    __tablename__ = "run_events"
    __table_args__ = (
        Index("ix_run_events_run", "run_id"),
        Index("ix_run_events_at", "at", postgresql_using="brin"),
    )

    organization_id: Mapped[str] = mapped_column(primary_key=True)
    xact: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, server_default=text("(pg_current_xact_id()::text)::bigint")
    )
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    run_id: Mapped[UUID]
    attempt: Mapped[int]
    event: Mapped[str]
    from_status: Mapped[str | None]
    to_status: Mapped[str | None]
    key_id: Mapped[UUID | None]
    user_id: Mapped[UUID | None]
    request_id: Mapped[str | None]
    reason: Mapped[str | None]
    changed: Mapped[list[str]]
    by: Mapped[str | None]  # request, bulk or policy; null: a request if there is a key, else the service
    bulk_retry_id: Mapped[UUID | None]
    code: Mapped[str | None]  # why a planned retry was dropped


class PlannedRetry(Base):
    """A retry that a workflow's policy has planned for an ended attempt (app/retry_policies).

    `next_try_at` is at first `due_at`, and later if a try was not possible.
    """

    __tablename__ = "planned_retries"
    __table_args__ = (Index("ix_planned_retries_look_at", "look_at"),)

    # Names nothing outside the database, so it may go with its run.
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    organization_id: Mapped[str]
    due_at: Mapped[datetime]
    next_try_at: Mapped[datetime] = mapped_column("look_at")
    rule: Mapped[int] = mapped_column(SmallInteger)  # number of the rule that matched; 0: the policy has no rules
    avoids_last_machine: Mapped[bool]
    owes_event: Mapped[bool]  # the attempt's `run_complete` was not sent, and is if the plan is dropped


class RunAttachment(Base):
    """A file of a run. `storage_path` names its bytes; it is null after the bytes of an expired input were deleted."""

    __tablename__ = "run_attachments"
    __table_args__ = (
        CheckConstraint("attachment_type IN ('input', 'output')", name="attachment_type"),
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
        CheckConstraint("storage_path IS NOT NULL OR attachment_type = 'input'", name="storage_path"),
        Index("ix_run_attachments_run", "run_id", "attachment_type"),
        Index("ix_run_attachments_organization", "organization_id", text("created_at DESC"), text("id DESC")),
        Index(
            "ix_run_attachments_expiry",
            "expires_at",
            postgresql_where=text("expires_at IS NOT NULL AND storage_path IS NOT NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id", ondelete="RESTRICT"))
    user_id: Mapped[UUID | None]
    attachment_type: Mapped[str]
    filename: Mapped[str]
    content_type: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    storage_path: Mapped[str | None] = mapped_column(unique=True)
    target_path: Mapped[str | None]
    cleanup_imports_after_run: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    attempt: Mapped[int | None]  # of an output that stays after a retry: the earlier attempt; null: the current one


class Deletion(Base):
    """The deletion list: names in Vault or the file store to delete at `due_at` (deletions.py has the rules)."""

    __tablename__ = "deletions"
    __table_args__ = (
        CheckConstraint("store IN ('vault', 'storage')", name="store"),
        CheckConstraint("sweeps BETWEEN 1 AND 2", name="sweeps"),
        Index("ix_deletions_due_at", "due_at"),
    )

    store: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    due_at: Mapped[datetime]
    condemned_at: Mapped[datetime | None]
    sweeps: Mapped[int] = mapped_column(SmallInteger, server_default=text("1"))
    failures: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))


class IdempotencyKey(Base):
    """The first successful reply under a caller's Idempotency-Key, stored with its effect.

    `ids` are the ids of the objects that the reply shows. An empty `body` means: only the ids are kept, or the reply was a 204.
    """

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_expires_at", "expires_at"),)

    organization_id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes]
    status: Mapped[int] = mapped_column(SmallInteger)
    body: Mapped[bytes]
    ids: Mapped[list[UUID] | None]
    expires_at: Mapped[datetime]


class StoredReply(Base):
    """Bytes of an organization's stored replies that expire at about the same time (write_behind/reply_bytes.py)."""

    __tablename__ = "stored_replies"
    __table_args__ = (Index("ix_stored_replies_until", "until"),)

    organization_id: Mapped[str] = mapped_column(primary_key=True)
    until: Mapped[datetime] = mapped_column(primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)


class WebhookEndpoint(Base):
    """A URL that gets an organization's events. Deliveries have no foreign key to it: they are deleted by age, or when due."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (
        _organization_check(),
        CheckConstraint("(disabled_at IS NULL) = (disabled_reason IS NULL)", name="disabled"),
        CheckConstraint("disabled_reason IN ('requested', 'gone', 'failing')", name="disabled_reason"),
        Index("ix_webhook_endpoints_organization", "organization_id", text("created_at DESC"), text("id DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    user_id: Mapped[UUID | None]
    url: Mapped[str]
    description: Mapped[str | None]
    event_types: Mapped[list[str]]
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    failing_since: Mapped[datetime | None]  # the first failure since the last success
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookSecret(Base):
    """A signing secret of an endpoint, by its path in Vault. A rotated secret also signs until `expires_at`."""

    __tablename__ = "webhook_secrets"
    __table_args__ = (
        Index("ix_webhook_secrets_endpoint_id", "endpoint_id"),
        Index("uq_webhook_secrets_current", "endpoint_id", unique=True, postgresql_where=text("expires_at IS NULL")),
    )

    path: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="RESTRICT"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]


class WebhookEvent(Base):
    """The outbox: one event for each end of a run, and for each machine that went down, in the bytes that are sent.

    A test event and one of a machine have no run.

    `body` is null after its run was deleted.
    """

    __tablename__ = "webhook_events"
    __table_args__ = (
        Index("uq_webhook_events_run_attempt", "run_id", "attempt", unique=True),
        Index("ix_webhook_events_new", "occurred_at", postgresql_where=text("NOT is_fanned_out")),
        Index("ix_webhook_events_turns", "organization_id", "occurred_at", postgresql_where=text("NOT is_fanned_out")),
        Index("ix_webhook_events_organization", "organization_id", "occurred_at", "id"),
        Index("ix_webhook_events_occurred_at", "occurred_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    run_id: Mapped[UUID | None]  # no foreign key: the log of what was sent outlives the run
    attempt: Mapped[int | None]
    event_type: Mapped[str]
    occurred_at: Mapped[datetime]
    body: Mapped[bytes | None]
    is_fanned_out: Mapped[bool] = mapped_column(server_default=text("false"))


class WebhookDelivery(Base):
    """The delivery of one event to one endpoint. Its id is the message's id, the same each time the message is sent.

    `lease` is the token of the process that sends it now. The lease ends at `due_at`.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        Index("uq_webhook_deliveries_event_endpoint", "event_id", "endpoint_id", unique=True),
        Index("ix_webhook_deliveries_pending", "endpoint_id", "due_at", postgresql_where=text("status = 'pending'")),
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", text("created_at DESC"), text("id DESC")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    event_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_events.id", ondelete="CASCADE"))
    endpoint_id: Mapped[UUID]
    organization_id: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="pending")
    tries: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lease: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    tried_at: Mapped[datetime | None]
    duration_ms: Mapped[int | None]
    response_status: Mapped[int | None] = mapped_column(SmallInteger)
    response_body: Mapped[str | None]
    error: Mapped[str | None]
    last_tries: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'"))  # the newest first


class WebhookRecovery(Base):
    """The progress of a recovery: an endpoint's events since a time are sent to it again, in batches."""

    __tablename__ = "webhook_recoveries"
    __table_args__ = (Index("ix_webhook_recoveries_moved_at", "moved_at"),)

    endpoint_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), primary_key=True)
    organization_id: Mapped[str]
    after_at: Mapped[datetime]
    after_id: Mapped[UUID]
    until: Mapped[datetime]
    moved_at: Mapped[datetime] = mapped_column(server_default=func.now())


class BulkRetry(Base):
    """A job that retries many runs (app/bulk). Its row is locked by the replica that works on it.

    `moved_at` is the time of the job's last turn. `due_at` is the earliest time of its next turn.
    """

    __tablename__ = "bulk_retries"
    __table_args__ = (
        _organization_check(),
        CheckConstraint("state IN ('running', 'paused', 'completed', 'aborted', 'failed')", name="state"),
        CheckConstraint("(state = 'paused') = (pause_reason IS NOT NULL)", name="paused"),
        CheckConstraint(f"({_IS_UNDER_WAY}) = (ended_at IS NULL)", name="ended"),
        Index("ix_bulk_retries_organization", "organization_id", text("created_at DESC"), text("id DESC")),
        Index("ix_bulk_retries_under_way", "organization_id", postgresql_where=text(_IS_UNDER_WAY)),
        Index("ix_bulk_retries_due_at", "due_at", postgresql_where=text("state = 'running'")),
        Index("ix_bulk_retries_ended_at", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    organization_id: Mapped[str]
    key_id: Mapped[UUID]  # no foreign key: the job outlives its creator's key
    user_id: Mapped[UUID | None]
    request_id: Mapped[str | None]
    traceparent: Mapped[str | None]
    state: Mapped[str] = mapped_column(server_default="running")
    pause_reason: Mapped[str | None]
    waiting_for: Mapped[str | None]
    failure: Mapped[str | None]
    reason: Mapped[str | None]
    filter: Mapped[dict[str, Any] | None]
    overrides: Mapped[dict[str, Any]]
    pace_per_second: Mapped[float | None]
    first: Mapped[int] = mapped_column(server_default=text("0"))
    is_first_over: Mapped[bool] = mapped_column(server_default=text("false"))  # the rest may be retried
    stop_after_failures: Mapped[int] = mapped_column(server_default=text("0"))
    failures_forgiven: Mapped[int] = mapped_column(server_default=text("0"))  # failures before the last resume
    total: Mapped[int]
    retried: Mapped[int] = mapped_column(server_default=text("0"))
    skipped: Mapped[int] = mapped_column(server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())
    moved_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]


class BulkRetryItem(Base):
    """One run of a bulk retry, with the attempt that the run had when it was chosen; null: the run did not exist.

    The row names no secret and no file, so a cascade deletes it with its job.
    """

    __tablename__ = "bulk_retry_items"
    __table_args__ = (
        CheckConstraint("outcome IN ('pending', 'retried', 'skipped')", name="outcome"),
        CheckConstraint("(outcome = 'skipped') = (code IS NOT NULL)", name="code"),
        Index("ix_bulk_retry_items_outcome", "bulk_retry_id", "outcome", "place"),
    )

    bulk_retry_id: Mapped[UUID] = mapped_column(ForeignKey("bulk_retries.id", ondelete="CASCADE"), primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)  # its place in the job, from 1
    run_id: Mapped[UUID]  # no foreign key: the item outlives the run
    attempt: Mapped[int | None]
    outcome: Mapped[str] = mapped_column(server_default="pending")
    code: Mapped[str | None]
    detail: Mapped[str | None]
    decided_at: Mapped[datetime | None]


class Dispatch(Base):
    """A call to Temporal that is to be made (handoff/dispatches.py). No foreign key: a cancel outlives its run."""

    __tablename__ = "dispatches"
    __table_args__ = (
        CheckConstraint("kind IN ('start', 'cancel')", name="kind"),
        Index("ix_dispatches_due_at", "due_at"),
    )

    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    assignment: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    machine_id: Mapped[UUID]
    organization_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())
    failures: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))


class SharedRound(Base):
    """The progress of a round that all replicas share: a replica that is free takes the next slice.

    `position` is null while no round is under way. `slices` is the number of full slices so far.
    """

    __tablename__ = "shared_rounds"

    name: Mapped[str] = mapped_column(primary_key=True)
    began_at: Mapped[datetime] = mapped_column(server_default=text("'-infinity'"))
    position: Mapped[list[str] | None]
    slices: Mapped[int] = mapped_column(server_default=text("0"))
