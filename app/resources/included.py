"""What `include` adds to a reply: the objects that its items name, each once, as their own routes show them.

Everything is looked for in the caller's organization alone. The objects may have as many bytes as a page.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from app.access.auth import Principal
from app.errors import Invalid
from app.limits import memory_budget
from app.resources import machines, workflows
from app.services import Services
from app.stores.database import Connection
from app.stores.documents import columns, encode
from app.stores.statements import rows_of, statement

OF_RUNS = ("workflow", "machine", "machine.pools")
OF_MACHINES = ("pools",)
OF_POOLS = ("machines",)

Objects = list[dict[str, Any]]

_OWN = "organization_id = :organization_id"

WEIGH_OF_RUNS = statement(
    "included.weigh_of_runs",
    f"""
    SELECT (SELECT coalesce(sum({workflows.WORKFLOWS.octets}), 0)
            FROM {rows_of("workflows", "workflow_ids")} AS workflows WHERE {_OWN})::bigint
         + (SELECT coalesce(sum({machines.OCTETS}), 0)
            FROM {rows_of("machines", "machine_ids")} AS machines WHERE {_OWN})::bigint
    """,
)

WORKFLOWS = statement(
    "included.workflows",
    f"""
    SELECT {columns(workflows.COLUMNS)} FROM {rows_of("workflows", "workflow_ids")} AS workflows
    WHERE {_OWN} ORDER BY workflows.created_at DESC, workflows.id DESC
    """,
)

MACHINES = statement(
    "included.machines",
    f"""
    SELECT {columns(machines.COLUMNS)} FROM {rows_of("machines", "machine_ids")} AS machines
    WHERE {_OWN} ORDER BY machines.created_at DESC, machines.id DESC
    """,
)

# The machines of pools, and how many bytes they take: no further than to where there are too many of them.
MEMBERS = statement(
    "included.members",
    f"""
    WITH member AS MATERIALIZED (
        SELECT one.machine_id FROM unnest(:pool_ids::uuid[]) AS pool (id), LATERAL (
            SELECT machine_id FROM pool_machines WHERE pool_id = pool.id OFFSET 0
        ) AS one
        LIMIT :most::bigint + 1
    )
    SELECT (SELECT count(*) FROM member) > :most::bigint AS are_too_many, coalesce(sum(octets), 0)::bigint AS octets,
           array_agg(id) AS ids
    FROM (
        SELECT machines.id, {machines.OCTETS} AS octets FROM (SELECT DISTINCT machine_id FROM member) AS wanted, LATERAL (
            SELECT * FROM machines WHERE id = wanted.machine_id AND {_OWN} OFFSET 0
        ) AS machines
    ) AS weighed
    """,
)
MACHINE_BYTES = 500  # a machine takes more


def names(include: str, possible: Sequence[str]) -> frozenset[str]:
    """What a query asks for, separated by commas. Raises Invalid for an unknown name."""
    wanted = frozenset(name.strip(" ") for name in include.split(",")) - {""}
    if not wanted <= set(possible):
        raise Invalid(
            (("query", "include"), f"Must be names from this list, with commas: {', '.join(possible)}.", "include")
        )
    return wanted


async def of_runs(
    services: Services, principal: Principal, wanted: frozenset[str], runs: Sequence[dict[str, Any]]
) -> Objects:
    """The workflows and machines of these runs, and the pools of the machines.

    A key that is bound to a machine gets no pools. Raises Invalid, QuotaExceeded and Overloaded.
    """
    shows_pools = "machine.pools" in wanted and principal.machine_id is None
    workflow_ids = {run["workflow_id"] for run in runs} if "workflow" in wanted else set()
    machine_ids = {run["machine_id"] for run in runs} - {None} if wanted & {"machine", "machine.pools"} else set()
    own = {"organization_id": principal.organization_id}

    async def read(connection: Connection, hold: Callable[[int], None]) -> Objects:
        ids = {"workflow_ids": list(workflow_ids), "machine_ids": list(machine_ids)}
        hold(await connection.fetchval(WEIGH_OF_RUNS, **ids, **own))
        objects: Objects = []
        if workflow_ids:
            rows = await connection.fetch(WORKFLOWS, workflow_ids=ids["workflow_ids"], **own)
            objects += _typed("workflow", (workflows.show(row) for row in rows))
        if machine_ids:
            rows = await connection.fetch(MACHINES, machine_ids=ids["machine_ids"], **own)
            shown = await machines.show(connection, principal.organization_id, rows)
            objects += _typed("machine", shown) + (_pools(shown) if shows_pools else [])
        return objects

    if not workflow_ids and not machine_ids:
        return []
    return await _with_room(services, read, len(runs))


async def of_machines(shown: Sequence[dict[str, Any]]) -> Objects:
    """The pools of these machines, which show them already. Raises QuotaExceeded and Overloaded."""
    objects = _pools(shown)
    await memory_budget.reserve(memory_budget.held() + len(encode(objects)))
    return objects


async def of_pools(services: Services, organization_id: str, pools: Sequence[dict[str, Any]]) -> Objects:
    """The machines of these pools. Raises Invalid, QuotaExceeded and Overloaded."""
    own, max_bytes = {"organization_id": organization_id}, services.settings.max_reply_bytes

    async def read(connection: Connection, hold: Callable[[int], None]) -> Objects:
        found = await connection.fetchrow(
            MEMBERS, pool_ids=[pool["id"] for pool in pools], most=max_bytes // MACHINE_BYTES, **own
        )
        assert found is not None  # noqa: S101 - it counts
        hold(max_bytes + 1 if found["are_too_many"] else found["octets"])
        rows = await connection.fetch(MACHINES, machine_ids=found["ids"] or [], **own)
        return _typed("machine", await machines.show(connection, organization_id, rows))

    return await _with_room(services, read, len(pools))


async def _with_room(
    services: Services, read: Callable[[Connection, Callable[[int], None]], Awaitable[Objects]], items: int
) -> Objects:
    """What `read` reads, which says first how many bytes these are."""
    held = memory_budget.held()  # for the items

    def hold(octets: int) -> None:
        if octets > services.settings.max_reply_bytes:
            less = "ask for fewer items with limit" if items > 1 else "read them with their own routes"
            sentence = f"What it names has more than {services.settings.max_reply_bytes} bytes; {less}."
            raise Invalid((("query", "include"), sentence, "page_too_large"))
        memory_budget.reserve_reply(octets, beside=held)

    async def once() -> Objects:
        async with services.database.connection() as connection:
            return await read(connection, hold)

    return await memory_budget.with_room(once)


def _typed(kind: str, shown: Iterable[dict[str, Any]]) -> Objects:
    return [{"type": kind} | one for one in shown]


def _pools(shown: Sequence[dict[str, Any]]) -> Objects:
    pools = {pool["id"]: pool for machine in shown for pool in machine["pools"]}
    return _typed("pool", pools.values())
