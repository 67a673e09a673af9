"""Machines and the pools they are in.

Locks are taken in one order everywhere: pools, runs, machines; each kind by id or newest first. What appears between two of
them is looked for again under the last lock.

One file: everything here takes the same locks.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID, uuid4

from app.access.auth import Actor, Principal
from app.config import Settings
from app.errors import InsufficientScope, Invalid, MachineNotFound, PoolNotFound
from app.handoff import dispatches
from app.idempotency import Reply, Resource, WriteRequest, once
from app.models import Machine, RunStatus
from app.resources.patching import Change, Owner, locked_runs
from app.runs.ending import end_runs
from app.scheduling import downed_machines, rules
from app.schemas.resources import MachineCreate, MachinePoolUpdate, MachineUpdate
from app.schemas.values import MAX_POOLS
from app.services import Services
from app.stores.database import Connection, Database, Deadlock, Record
from app.stores.documents import columns, encode
from app.stores.paging import Listing, Slice, in_order, where
from app.stores.scans import page_of_search
from app.stores.statements import by_id, locked, rows_of, statement

log = logging.getLogger("app.runs")

# --- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS = {
    "id": "machines.id::text",
    "fingerprint": "machines.fingerprint",
    "unkey_key_id": "machines.unkey_key_id",
    "user_id": "machines.user_id::text",
    "organization_id": "machines.organization_id",
    "name": "machines.name",
    "version": "machines.version",
    "hostname": "machines.hostname",
    "os_info": "machines.os_info",
    "status": "machines.status",
    "is_available": "machines.is_available",
    "alerts_enabled": "machines.alerts_enabled",
    "reserved_session_id": "machines.reserved_session_id::text",
    "pools": (
        # One by one: a join that was planned on an empty table would read all pools for each machine.
        "ARRAY(SELECT one.id::text FROM pool_machines, LATERAL ("
        "SELECT id, created_at FROM pools WHERE pools.id = pool_machines.pool_id LIMIT 1) AS one"
        " WHERE pool_machines.machine_id = machines.id ORDER BY one.created_at DESC, one.id DESC)"
    ),
    "created_at": "machines.created_at",
    "last_seen": "machines.last_seen",
}
UNSUPPORTED = {
    "machine_parameters": None,
    "machine_sensitive_parameters": None,
    "linked_keepalive_machine_id": None,
    "physical_server_id": None,
}

POOL_COLUMNS = {
    "id": "pools.id::text",
    "organization_id": "pools.organization_id",
    "name": "pools.name",
    "description": "pools.description",
    "machine_count": "(SELECT count(*) FROM pool_machines WHERE pool_machines.pool_id = pools.id)",
    "created_at": "pools.created_at",
    "updated_at": "pools.updated_at",
}
POOL_UNSUPPORTED = {"pool_parameters": None, "pool_sensitive_parameters": None}

_THE_MACHINE = "id = :machine_id AND organization_id = :organization_id"

GET = statement("machines.get", f"SELECT {columns(COLUMNS)} FROM machines WHERE {_THE_MACHINE}")

POOLS = statement(
    "pools.get",
    f"""
    SELECT {columns(POOL_COLUMNS)} FROM {rows_of("pools", "pool_ids")} AS pools
    WHERE organization_id = :organization_id
    """,
)

# About how many bytes of JSON a pool takes, and a machine with all of its pools.
POOL_OCTETS = "octet_length(to_json(pools)::text) + 150"
OCTETS = f"""
octet_length(to_json(machines)::text) + 250 + coalesce((
    SELECT sum(one.octets) FROM pool_machines, LATERAL (
        SELECT {POOL_OCTETS} AS octets FROM pools WHERE pools.id = pool_machines.pool_id LIMIT 1
    ) AS one
    WHERE pool_machines.machine_id = machines.id
), 0)
"""

MACHINES = Listing("machines", "machines", octets=OCTETS, row="machines.id = listed.key")
ROWS = statement("machines.rows", f"SELECT {columns(COLUMNS)} FROM {in_order('machines')} ORDER BY page.n")


MOST_CHECKED = 1000  # machines in one reply about health: the newest ones


def show_pool(row: Record) -> dict[str, Any]:
    """A pool as it is sent."""
    return dict(row.items()) | POOL_UNSUPPORTED


async def show(connection: Connection, organization_id: str, rows: Iterable[Record]) -> list[dict[str, Any]]:
    """Machines as they are sent, each with its pools."""
    machines = [dict(row.items()) | UNSUPPORTED for row in rows]
    wanted = {pool_id for machine in machines for pool_id in machine["pools"]}
    found = await connection.fetch(POOLS, pool_ids=list(wanted), organization_id=organization_id) if wanted else []
    pools = {row["id"]: show_pool(row) for row in found}
    for machine in machines:
        machine["pools"] = [pools[pool_id] for pool_id in machine["pools"] if pool_id in pools]
    return machines


def health(machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which of these machines, as they are shown, are connected, and which are not."""
    errored = [
        {
            "machine_id": machine["id"],
            "organization_id": machine["organization_id"],
            "machine_name": machine["name"],
            "error": f"The machine is in status {machine['status']}; last seen at {machine['last_seen']:%Y-%m-%dT%H:%M:%SZ}.",
            "status_code": None,
        }
        for machine in machines
        if machine["status"] != "connected"
    ]
    healthy = len(machines) - len(errored)
    return {
        "status": "error" if errored else "ok",
        "scope": "organization",
        "checked_machines": len(machines),
        "healthy_machines": healthy,
        "errored_machines": errored,
        "message": f"{healthy} of {len(machines)} machines are connected.",
    }


async def get(connection: Connection, organization_id: str, machine_id: UUID) -> dict[str, Any]:
    """One machine. Raises MachineNotFound."""
    row = await connection.fetchrow(GET, machine_id=machine_id, organization_id=organization_id)
    if row is None:
        raise MachineNotFound
    [machine] = await show(connection, organization_id, [row])
    return machine


async def _show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await get(connection, principal.organization_id, ids[0]))


RESOURCE = Resource(_show)


async def list_machines(
    database: Database, organization_id: str, part: Slice, searched: str = "", **filters: object
) -> dict[str, object]:
    """One page; `filters` as in paging.where. Raises Invalid as paging.page does.

    `searched` is a text that must be in the id, the name or the hostname.
    """
    condition, values = where("machines", organization_id=organization_id, **filters)

    async def read(connection: Connection, ids: list[UUID]) -> list[dict[str, Any]]:
        return await show(connection, organization_id, await connection.fetch(ROWS, ids=ids))

    texts = ("machines.id::text", "machines.name", "machines.hostname")
    found = await page_of_search(database, MACHINES, (condition,), part, values, read, searched, texts)
    return part.shown(found.rows, found) | {"search_is_partial": found.is_partial}


# --- create and change ------------------------------------------------------------------------------------------------

INSERT = statement(
    "machines.insert",
    """
    INSERT INTO machines (id, organization_id, user_id, fingerprint, unkey_key_id, name, version, hostname, os_info)
    VALUES (:id, :organization_id, :user_id, :fingerprint, :unkey_key_id, :name, :version, :hostname, :os_info)
    """,
)

CHANGE = Change(
    Machine,
    *("name", "version", "hostname", "os_info", "status", "is_available", "alerts_enabled", "last_seen"),
    "reserved_session_id",
    # A status that a caller sets holds until a caller sets another one.
    always="silenced_at = CASE WHEN 'status' = ANY(:named::text[]) THEN NULL ELSE silenced_at END",
)

# The active runs of the session that a machine is reserved for.
_SESSION_RUNS = f"""
FROM runs
WHERE session_id = (SELECT reserved_session_id FROM machines WHERE {_THE_MACHINE})
  AND organization_id = :organization_id AND {rules.is_active()}
"""
_LOCK_SESSION_RUNS = f"SELECT id {_SESSION_RUNS} ORDER BY created_at DESC, id DESC FOR NO KEY UPDATE"
LOCK_SESSION_RUNS = statement("machines.session.lock_runs", _LOCK_SESSION_RUNS)
FREE_SESSION_RUNS = statement("machines.session.free_runs", f"{_LOCK_SESSION_RUNS} SKIP LOCKED")
COUNT_SESSION_RUNS = statement("machines.session.count_runs", f"SELECT count(*) {_SESSION_RUNS}")

LOCK_RESERVATION = statement(
    "machines.session.lock_machine",
    f"SELECT reserved_session_id FROM machines WHERE {_THE_MACHINE} FOR NO KEY UPDATE",
)

# Whether it is connected; it stays so until this transaction changes it.
LOCK_STATUS = statement(
    "machines.lock_status", f"SELECT status = 'connected' FROM machines WHERE {_THE_MACHINE} FOR NO KEY UPDATE"
)
RECORD_DOWN = statement(
    "machines.record_down",
    downed_machines.recorded(f"(SELECT * FROM machines WHERE {_THE_MACHINE})", ":reason::text"),
)

SESSION_ENDED = "The session was ended: its machine's reservation was cleared. Retry the run to start it again."


async def create(services: Services, write: WriteRequest, options: MachineCreate) -> Reply:
    """A new machine, connected and available."""
    principal = write.principal

    async def work(connection: Connection) -> Reply:
        machine_id = uuid4()
        await connection.execute(
            INSERT,
            id=machine_id,
            organization_id=principal.organization_id,
            user_id=principal.user_id,
            fingerprint=options.fingerprint,
            unkey_key_id=options.unkey_key_id,
            name=options.name,
            version=options.version,
            hostname=options.hostname,
            os_info=options.os_info,
        )
        return Reply(201, await _show(connection, principal, [machine_id]), [machine_id])

    return await once(services, write, work, RESOURCE)


async def change(services: Services, write: WriteRequest, machine_id: UUID, options: MachineUpdate) -> Reply:
    """Set what the request names; a cleared reservation also ends its session.

    Raises MachineNotFound, and InsufficientScope for a key that is bound to a machine and would end its session.

    A machine that goes offline keeps its active run: it may come back.
    """
    organization_id = write.principal.organization_id
    if write.principal.machine_id not in (None, machine_id):
        raise MachineNotFound
    if write.principal.machine_id is not None and "reserved_session_id" in options.model_fields_set:
        raise InsufficientScope(["resources:write"], "A key that is bound to a machine cannot end its session.")

    async def work(connection: Connection) -> Reply:
        values = CHANGE.named(options)
        ends_session = False
        if "reserved_session_id" in values:
            ends_session = await _end_session(connection, organization_id, machine_id, services.settings, write.actor())
            if ends_session:
                values.setdefault("is_available", True)
            else:
                del values["reserved_session_id"]
        own = {"machine_id": machine_id, "organization_id": organization_id}
        goes_down = options.status in ("disconnected", "error") and await connection.fetchval(LOCK_STATUS, **own)
        if values:
            await CHANGE.apply(connection, organization_id, machine_id, values)
        if goes_down:
            await connection.execute(RECORD_DOWN, **own, reason=f"A request set the machine to {options.status}.")
        shown = await _show(connection, write.principal, [machine_id])
        return Reply(200, shown, [machine_id], has_event=ends_session or bool(goes_down))

    reply = await once(services, write, work, RESOURCE)
    if options.status == "connected":
        services.signs_of_life.note(organization_id, machine_id)
    return reply


async def _end_session(
    connection: Connection, organization_id: str, machine_id: UUID, settings: Settings, actor: Actor
) -> bool:
    """Lock the machine and cancel the active runs of its session; False if it is not reserved. Raises Deadlock."""
    own = {"machine_id": machine_id, "organization_id": organization_id}
    await connection.fetch(LOCK_SESSION_RUNS, **own)
    if await connection.fetchval(LOCK_RESERVATION, **own) is None:
        return False
    # A run came into the session meanwhile, and a transaction holds it that may wait for the machine: begin again.
    rows = await connection.fetch(FREE_SESSION_RUNS, **own)
    if len(rows) < await connection.fetchval(COUNT_SESSION_RUNS, **own):
        raise Deadlock
    await end_runs(
        connection,
        [row["id"] for row in rows],
        RunStatus.CANCELLED,
        SESSION_ENDED,
        settings,
        actor,
        "session_ended",
        error_code="session_released",
    )
    line = {"event": "session_released", "machine_id": machine_id, "organization_id": organization_id}
    connection.after_commit(lambda: log.info(line))
    return True


# --- delete -----------------------------------------------------------------------------------------------------------

_KNOWN = f"SELECT 1 FROM machines WHERE {_THE_MACHINE}"
KNOWN = statement("machines.known", _KNOWN)
LOCK_FOR_DELETE = statement("machines.delete.lock", f"{_KNOWN} FOR UPDATE")
DELETE = statement("machines.delete", f"DELETE FROM machines WHERE {_THE_MACHINE}")

DETACH = statement(
    "machines.delete.detach",
    f"""
    UPDATE runs SET assigned_machine_id = nullif(assigned_machine_id, :machine_id),
                    pinned_machine_id = nullif(pinned_machine_id, :machine_id),
                    pin_is_deleted = pin_is_deleted OR pinned_machine_id IS NOT DISTINCT FROM :machine_id
    WHERE {by_id("runs", "run_ids")}
    """,
)

MACHINE_DELETED = (
    "The machine was deleted while the run needed it. Retry the run, with another machine_id if it needs one."
)


async def delete(services: Services, write: WriteRequest, machine_id: UUID) -> Reply:
    """Remove a machine; its active runs end with an error, and all its runs stay. Raises MachineNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        own = {"machine_id": machine_id, "organization_id": organization_id}
        if not await connection.fetchval(KNOWN, **own):
            raise MachineNotFound
        await _detach_runs(connection, machine_id, organization_id, services.settings, write.actor())
        if not await connection.fetchval(LOCK_FOR_DELETE, **own):
            raise MachineNotFound
        # Runs that were pinned or assigned to it meanwhile.
        await _detach_runs(connection, machine_id, organization_id, services.settings, write.actor())
        await connection.execute(DELETE, **own)
        return Reply(204, b"", has_event=True)  # perhaps: of the runs that it ended

    return await once(services, write, work)


async def _detach_runs(
    connection: Connection, machine_id: UUID, organization_id: str, settings: Settings, actor: Actor
) -> None:
    """End the active runs of a machine and take it out of all its runs.

    The foreign key would do the latter too, but in one statement: too long for a machine with a long history.
    """
    columns: tuple[Owner, ...] = ("assigned_machine_id", "pinned_machine_id")
    for column in columns:
        async for run_ids in locked_runs(connection, column, machine_id, organization_id):
            if settings.hands_over:
                await dispatches.cancel(connection, run_ids)
            # In this order: the event of an ending shows the run as it will be.
            await connection.execute(DETACH, run_ids=run_ids, machine_id=machine_id)
            await end_runs(
                connection,
                run_ids,
                RunStatus.ERROR,
                MACHINE_DELETED,
                settings,
                actor,
                "machine_deleted",
                error_code="machine_deleted",
            )


# --- pools of a machine -----------------------------------------------------------------------------------------------

# A pool that is being given machines cannot be deleted meanwhile.
LOCK_POOLS = statement(
    "pools.lock",
    locked("pools", "pool_ids", "FOR KEY SHARE", "organization_id = :organization_id"),
)

# Placement skips machines while their pools are being changed.
LOCK_MACHINES = statement(
    "machines.lock",
    locked("machines", "machine_ids", "FOR NO KEY UPDATE", "organization_id = :organization_id"),
)

LEAVE_OTHERS = statement(
    "pools.leave_others",
    "DELETE FROM pool_machines WHERE machine_id = :machine_id AND pool_id <> ALL(:pool_ids::uuid[])",
)

JOIN = statement(
    "pools.join",
    """
    INSERT INTO pool_machines (pool_id, machine_id)
    SELECT pool_id, machine_id FROM unnest(:pool_ids::uuid[]) AS pool_id CROSS JOIN unnest(:machine_ids::uuid[]) AS machine_id
    ON CONFLICT DO NOTHING RETURNING machine_id
    """,
)

# For locked machines: another request that puts them into pools waits for this one, and then sees its rows.
IN_TOO_MANY = statement(
    "pools.in_too_many",
    """
    SELECT 1 FROM unnest(:machine_ids::uuid[]) AS machine (id)
    WHERE (SELECT count(*) FROM pool_machines WHERE pool_machines.machine_id = machine.id) > :most LIMIT 1
    """,
)


async def lock_pools(connection: Connection, organization_id: str, pool_ids: Iterable[UUID]) -> None:
    """Raises PoolNotFound if the organization lacks one of them."""
    wanted = list(set(pool_ids))
    if len(await connection.fetch(LOCK_POOLS, pool_ids=wanted, organization_id=organization_id)) != len(wanted):
        raise PoolNotFound


async def lock_machines(connection: Connection, organization_id: str, machine_ids: Iterable[UUID]) -> None:
    """Raises MachineNotFound if the organization lacks one of them."""
    wanted = list(set(machine_ids))
    if len(await connection.fetch(LOCK_MACHINES, machine_ids=wanted, organization_id=organization_id)) != len(wanted):
        raise MachineNotFound


async def join(connection: Connection, pool_ids: Iterable[UUID], machine_ids: Iterable[UUID]) -> None:
    """Put locked machines into locked pools. Raises Invalid if one of them would then be in too many."""
    rows = await connection.fetch(JOIN, pool_ids=list(pool_ids), machine_ids=list(machine_ids))
    joined = list({row["machine_id"] for row in rows})
    if joined and await connection.fetchval(IN_TOO_MANY, machine_ids=joined, most=MAX_POOLS):
        raise Invalid(
            (
                ("body", "machine_ids"),
                f"A machine may be in at most {MAX_POOLS} pools; take it out of others first.",
                "too_many_pools",
            )
        )


async def set_pools(services: Services, write: WriteRequest, machine_id: UUID, options: MachinePoolUpdate) -> Reply:
    """Put a machine into exactly these pools. Raises MachineNotFound, PoolNotFound."""
    organization_id = write.principal.organization_id

    async def work(connection: Connection) -> Reply:
        await lock_pools(connection, organization_id, options.pool_ids)
        await lock_machines(connection, organization_id, [machine_id])
        await connection.execute(LEAVE_OTHERS, machine_id=machine_id, pool_ids=options.pool_ids)
        await join(connection, options.pool_ids, [machine_id])
        return Reply(200, await _show(connection, write.principal, [machine_id]), [machine_id])

    return await once(services, write, work, RESOURCE)
