"""Workflows: what runs execute. A workflow goes with all its runs."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import orjson

from app.access.auth import Principal
from app.errors import Invalid, WorkflowNotFound
from app.idempotency import Reply, Resource, WriteRequest, once
from app.limits import memory_budget
from app.models import Workflow
from app.resources.patching import Change, locked_runs
from app.runs.deleting import remove_runs
from app.schemas.resources import WorkflowCreate, WorkflowUpdate
from app.schemas.retry_policies import RetryPolicy
from app.services import Services
from app.stores.database import Connection, Database, Record
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, where
from app.stores.scans import page_of_search
from app.stores.statements import json_bytes, statement

COLUMNS = {
    "id": "workflows.id::text",
    "user_id": "user_id::text",
    "organization_id": "organization_id",
    "name": "name",
    "main_prompt": "main_prompt",
    "input_schema": "input_schema",
    "output_schema": "output_schema",
    "includes_file_exports": "includes_file_exports",
    "is_webhooks_enabled": "is_webhooks_enabled",
    "retry_policy": "retry_policy",
    "version": "version",
    "created_at": "created_at",
    "updated_at": "updated_at",
}
UNSUPPORTED = {
    "includes_input_variables": False,
    "terminal_command_allowlist": None,
    "model_metadata": None,
    "post_run_check_failure_cleanup_prompt": None,
    "workflow_metadata": None,
    "old_versions": None,
    "tags": None,
    "post_run_checks": None,
}

_THE_WORKFLOW = "id = :workflow_id AND organization_id = :organization_id"

GET = statement("workflows.get", f"SELECT {columns(COLUMNS)} FROM workflows WHERE {_THE_WORKFLOW}")

WORKFLOWS = Listing(
    "workflows", "workflows", octets="octet_length(to_json(workflows)::text) + 300", row="workflows.id = listed.key"
)
ROWS = statement(
    "workflows.rows",
    f"SELECT {columns(COLUMNS)} FROM {in_order('workflows')} ORDER BY page.n",
)

INSERT = statement(
    "workflows.insert",
    """
    INSERT INTO workflows (id, organization_id, user_id, name, main_prompt, input_schema, output_schema,
                           includes_file_exports, is_webhooks_enabled, retry_policy)
    VALUES (:id, :organization_id, :user_id, :name, :main_prompt, :input_schema, :output_schema,
            :includes_file_exports, :is_webhooks_enabled, :retry_policy)
    """,
)

CHANGE = Change(
    Workflow,
    *("name", "main_prompt", "input_schema", "output_schema", "includes_file_exports", "is_webhooks_enabled"),
    *("retry_policy", "version"),
    always="updated_at = now()",
)

# What a run executes. A change of it makes a new version.
_VERSIONED = ("name", "main_prompt", "input_schema", "output_schema")
MOST_VERSIONS = 1000  # that are kept of a workflow, besides the current one

# The version that a PATCH replaces, if that changes anything of it: kept, and the oldest one goes.
REPLACE_VERSION = statement(
    "workflows.replace_version",
    f"""
    WITH old AS MATERIALIZED (
        SELECT id, version, {", ".join(_VERSIONED)} FROM workflows WHERE {_THE_WORKFLOW} FOR NO KEY UPDATE
    ), replaced AS (
        INSERT INTO workflow_versions (workflow_id, version, {", ".join(_VERSIONED)}, replaced_at, replaced_by_key_id,
                                       replaced_by_user_id)
        SELECT old.*, clock_timestamp(), :key_id, :user_id FROM old
        WHERE {" OR ".join(f"('{one}' = ANY(:named::text[]) AND old.{one} IS DISTINCT FROM :{one})" for one in _VERSIONED)}
        RETURNING version
    ), forgotten AS (
        DELETE FROM workflow_versions
        WHERE workflow_id = :workflow_id AND version <= (SELECT version FROM replaced) - {MOST_VERSIONS}
    )
    SELECT version FROM replaced
    """,
)

_VERSIONS = "FROM workflow_versions WHERE workflow_id = :workflow_id ORDER BY version DESC LIMIT :limit"

# A number of versions, the newest first, and the bytes of their JSON: all of them, or the first that are too many.
WEIGH_VERSIONS = statement(
    "workflows.weigh_versions",
    f"""
    SELECT count(*) AS count, coalesce(sum(octets), 0)::bigint AS octets,
           count(*) FILTER (WHERE total <= :max_bytes::bigint) AS fitting
    FROM (
        SELECT octets, sum(octets) OVER (ORDER BY version DESC) AS total
        FROM (SELECT version, octet_length(to_json(workflow_versions)::text) + 100 AS octets {_VERSIONS}) AS weighed
    ) AS summed
    """,
)
VERSIONS = statement(
    "workflows.versions",
    f"""
    SELECT workflow_id::text, version, {", ".join(_VERSIONED)}, replaced_at,
           replaced_by_key_id::text, replaced_by_user_id::text
    {_VERSIONS}
    """,
)
KNOWN = statement("workflows.known", f"SELECT 1 FROM workflows WHERE {_THE_WORKFLOW}")

# A run that is created meanwhile holds the key: this waits for it, and the next one finds no workflow.
LOCK_FOR_DELETE = statement("workflows.delete.lock", f"SELECT 1 FROM workflows WHERE {_THE_WORKFLOW} FOR UPDATE")
DELETE = statement("workflows.delete", f"DELETE FROM workflows WHERE {_THE_WORKFLOW}")


def show(row: Record) -> dict[str, Any]:
    """A workflow as it is sent."""
    policy = row["retry_policy"]
    return dict(row.items()) | {"retry_policy": None if policy is None else orjson.Fragment(policy)} | UNSUPPORTED


def _stored(policy: RetryPolicy | None) -> bytes | None:
    return None if policy is None else json_bytes(policy.model_dump(mode="json"))


async def get(connection: Connection, organization_id: str, workflow_id: UUID) -> dict[str, Any]:
    """One workflow. Raises WorkflowNotFound, and NoRoom and QuotaExceeded for a long one."""
    row = await connection.fetchrow(GET, workflow_id=workflow_id, organization_id=organization_id)
    if row is None:
        raise WorkflowNotFound
    memory_budget.reserve_reply(sum(len(row[name] or "") for name in ("main_prompt", "input_schema", "output_schema")))
    return show(row)


async def _show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get(connection, principal.organization_id, ids[0]))


RESOURCE = Resource(_show)

# Workflows of runs that are assigned to a machine: what a key that is bound to it sees.
OF_MACHINE = """EXISTS (
    SELECT FROM runs WHERE runs.assigned_machine_id = :machine_id AND runs.workflow_id = workflows.id)"""

USED = statement(
    "workflows.used",
    """
    SELECT EXISTS (
        SELECT FROM runs WHERE assigned_machine_id = :machine_id AND workflow_id = :workflow_id
          AND organization_id = :organization_id)
    """,
)


async def get_seen(database: Database, principal: Principal, workflow_id: UUID) -> dict[str, Any]:
    """One workflow. Raises WorkflowNotFound for what the caller may not see."""
    organization_id = principal.organization_id
    if principal.machine_id is not None:
        # The machine may have many runs and the workflow few, or the reverse.
        async with database.transaction(plans_see_values=True) as connection:
            if not await connection.fetchval(
                USED, machine_id=principal.machine_id, workflow_id=workflow_id, organization_id=organization_id
            ):
                raise WorkflowNotFound
    async with database.connection() as connection:
        return await get(connection, organization_id, workflow_id)


async def list_versions(
    database: Database, organization_id: str, workflow_id: UUID, *, limit: int, max_bytes: int
) -> list[dict[str, Any]]:
    """What changes of a workflow replaced, the newest first. Raises WorkflowNotFound; Invalid for more than `max_bytes`;
    QuotaExceeded and Overloaded."""

    async def read() -> list[dict[str, Any]]:
        async with database.connection() as connection:
            if not await connection.fetchval(KNOWN, workflow_id=workflow_id, organization_id=organization_id):
                raise WorkflowNotFound
            found = await connection.fetchrow(WEIGH_VERSIONS, workflow_id=workflow_id, limit=limit, max_bytes=max_bytes)
            assert found is not None  # noqa: S101 - it counts
            if found["count"] > 1 and found["octets"] > max_bytes:
                sentence = f"The reply would have more than {max_bytes} bytes; limit={max(1, found['fitting'])} fits."
                raise Invalid((("query", "limit"), sentence, "page_too_large"))
            memory_budget.reserve_reply(found["octets"])
            rows = await connection.fetch(VERSIONS, workflow_id=workflow_id, limit=limit)
            return [dict(row.items()) for row in rows]

    return await memory_budget.with_room(read)


async def list_workflows(
    database: Database, principal: Principal, part: Slice, searched: str = "", **filters: object
) -> dict[str, object]:
    """One page of what the caller may see; `filters` as in paging.where. Raises Invalid as paging.page does.

    `searched` is a text that must be in the id or the name.
    """
    condition, values = where("workflows", organization_id=principal.organization_id, **filters)
    if principal.machine_id is not None:
        condition, values = f"{condition} AND {OF_MACHINE}", values | {"machine_id": principal.machine_id}
    found = await page_of_search(
        database, WORKFLOWS, (condition,), part, values, ROWS, searched, ("workflows.id::text", "workflows.name")
    )
    return part.shown([show(row) for row in found.rows], found) | {"search_is_partial": found.is_partial}


async def create(services: Services, write: WriteRequest, options: WorkflowCreate) -> Reply:
    """A new workflow."""

    async def work(connection: Connection) -> Reply:
        workflow_id = uuid4()
        await connection.execute(
            INSERT,
            id=workflow_id,
            organization_id=write.principal.organization_id,
            user_id=write.principal.user_id,
            name=options.name,
            main_prompt=options.main_prompt,
            input_schema=options.input_schema,
            output_schema=options.output_schema,
            includes_file_exports=options.includes_file_exports,
            is_webhooks_enabled=options.is_webhooks_enabled,
            retry_policy=_stored(options.retry_policy),
        )
        return Reply(201, await _show(connection, write.principal, [workflow_id]), [workflow_id])

    return await once(services, write, work, RESOURCE)


async def change(services: Services, write: WriteRequest, workflow_id: UUID, options: WorkflowUpdate) -> Reply:
    """Set what the request names. Raises WorkflowNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        values = CHANGE.named(options)
        if "retry_policy" in values:
            values["retry_policy"] = _stored(options.retry_policy)
        if not values.keys().isdisjoint(_VERSIONED):
            version = await connection.fetchval(
                REPLACE_VERSION,
                workflow_id=workflow_id,
                organization_id=organization_id,
                named=list(values),
                key_id=write.principal.key_id,
                user_id=write.principal.user_id,
                **{name: values.get(name) for name in _VERSIONED},
            )
            if version is not None:
                values["version"] = version + 1
        await CHANGE.apply(connection, organization_id, workflow_id, values)
        return Reply(200, await _show(connection, write.principal, [workflow_id]), [workflow_id])

    return await once(services, write, work, RESOURCE)


async def delete(services: Services, write: WriteRequest, workflow_id: UUID) -> Reply:
    """Remove a workflow and its runs with everything they name. Raises WorkflowNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        own = {"workflow_id": workflow_id, "organization_id": organization_id}
        if not await connection.fetchval(LOCK_FOR_DELETE, **own):
            raise WorkflowNotFound
        async for run_ids in locked_runs(connection, "workflow_id", workflow_id, organization_id):
            await remove_runs(connection, run_ids, write.actor(), hands_over=services.settings.hands_over)
        await connection.execute(DELETE, **own)
        return Reply(204, b"")

    return await once(services, write, work)
