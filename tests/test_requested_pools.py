"""Where a run may go: as many pools as a request may name."""

import random
from uuid import UUID

import pytest

from tests.support.client import Client
from tests.support.scheduling import assigned
from tests.support.server import Server
from tests.support.stack import Stack

MOST_POOLS = 100


@pytest.fixture(scope="module")
def server(quiet_server: Server) -> Server:
    return quiet_server


def pools_of(stack: Stack, organization: str, machine_id: str, count: int) -> list[str]:
    """New pools that a machine is in."""
    rows = stack.sql(
        "INSERT INTO pools (id, organization_id, name)"
        " SELECT gen_random_uuid(), $1, 'pool' FROM generate_series(1, $2::int) RETURNING id",
        organization,
        count,
    )
    ids = [row["id"] for row in rows]
    stack.sql("INSERT INTO pool_machines (machine_id, pool_id) SELECT $1, unnest($2::uuid[])", UUID(machine_id), ids)
    return [str(pool_id) for pool_id in ids]


@pytest.mark.parametrize("count", [1, 71, 72, MOST_POOLS])
def test_a_run_may_ask_for_many_pools(api: Client, stack: Stack, count: int) -> None:
    """Its lane names them all, and an entry of an index has room for 71."""
    machine_id = api.machine()
    pool_ids = pools_of(stack, api.organization, machine_id, count)
    run_id = api.run(pool_ids=pool_ids)["id"]
    assert assigned(api, run_id) == machine_id
    api.report(run_id, status="cancelled")
    retried = api.json_of(api.retry(run_id, pool_ids=pool_ids[::-1]))
    assert retried["pool_ids"] == pool_ids[::-1]
    assert assigned(api, run_id) == machine_id
    api.report(run_id, status="cancelled")
    bulk = {"workflow_id": api.workflow(), "count": 2, "pool_ids": pool_ids}
    runs = api.json_of(api.post("/v1/runs/bulk", json=bulk), 201)["created_runs"]
    assert assigned(api, runs[0]["id"]) == machine_id


def test_the_same_pools_are_one_lane_in_any_order(api: Client, stack: Stack) -> None:
    machine_id = api.machine(is_available=False)
    pool_ids = pools_of(stack, api.organization, machine_id, MOST_POOLS)
    asked = [pool_ids, random.sample(pool_ids, MOST_POOLS), pool_ids[1:], pool_ids[:-1]]
    for some in asked:
        api.run(pool_ids=some)
    rows = stack.sql("SELECT lane FROM runs WHERE organization_id = $1 ORDER BY queued_at", api.organization)
    lanes = [row["lane"] for row in rows]
    assert lanes[0] == lanes[1]
    assert len(set(lanes)) == 3
