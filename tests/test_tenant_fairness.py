"""Placement among many organizations: what one of them has waiting makes no other one wait."""

import statistics
import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from app.scheduling import placement
from tests.support.client import Client
from tests.support.scheduling import assigned
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import NEVER


@pytest.fixture(scope="module")
def stack(stack: Stack) -> Iterator[Stack]:
    """A database of its own: its crowds would slow the other tests down."""
    with own_database(stack, "tenants") as own:
        yield own


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Server]:
    """It makes a pass for nobody but those that were woken."""
    started = start_server(stack, BACKGROUND_PERIOD_SECONDS=NEVER)
    yield started
    started.app.stop()


MACHINES = """
INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id)
SELECT gen_random_uuid(), $1, n, 'key' FROM generate_series(1, $2::int) AS n
"""

# Run n is the next one of lane n % lanes, which wants a pool of its own.
WAITING = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, pool_ids, queued_at)
SELECT gen_random_uuid(), $1::text, $2, 'scheduling', 'pools:' || md5((n % $4)::text),
       ARRAY[md5($1::text || (n % $4))::uuid], now() + n * interval '1 us'
FROM generate_series(1, $3::int) AS n
"""

# Each is the only one of its session, and wants a machine that is offline; the last can go anywhere.
SESSIONS = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, session_id, pinned_machine_id, queued_at)
SELECT session, $1::text, $2::uuid, 'scheduling', 'session:' || session, session, CASE WHEN n < $3 THEN $4::uuid END,
       now() + n * interval '1 us'
FROM generate_series(1, $3::int) AS n, LATERAL (SELECT md5($1::text || n)::uuid AS session) AS made
"""


ASSIGNED = "SELECT FROM runs WHERE organization_id = $1 AND assigned_machine_id IS NOT NULL"


def seconds_to_place(api: Client, run_id: str) -> float:
    """From a retry's reply until its machine can be read."""
    api.report(run_id, status="cancelled")
    api.json_of(api.retry(run_id))
    began = time.monotonic()
    assigned(api, run_id)
    return time.monotonic() - began


def delays_nobody(crowd: Client, machine_id: str, api: Client) -> None:
    """Another organization's retries get their machine as soon beside passes over the crowd as without, or within 1 s."""
    api.machine()
    run_id = api.run()["id"]
    assigned(api, run_id)
    alone, beside = [], []
    for _ in range(15):
        alone.append(seconds_to_place(api, run_id))
        crowd.json_of(crowd.patch(f"/v1/machines/{machine_id}", json={"name": "woken"}))
        beside.append(seconds_to_place(api, run_id))
    assert statistics.median(beside) < max(1.0, 3 * statistics.median(alone)), (alone, beside)


def test_120000_waiting_runs_of_one_organization_do_not_delay_another(server: Server, stack: Stack) -> None:
    """In 600 lanes, of which none can start; its 200 idle machines make every pass look at all of them."""
    with server.client() as crowd, server.client() as api:
        machine_id = crowd.machine()
        stack.sql(MACHINES, crowd.organization, 199)
        stack.sql(WAITING, crowd.organization, UUID(crowd.workflow()), 120_000, 600)
        stack.sql("ANALYZE")
        delays_nobody(crowd, machine_id, api)


def test_an_organization_of_many_lanes_is_served_apart_and_in_its_order(server: Server, stack: Stack) -> None:
    """More sessions wait than one slice of lanes has, and more machines are idle than one slice of machines."""
    count = 5 * placement.SLICE
    with server.client() as crowd, server.client() as api:
        offline, workflow_id = crowd.machine(is_available=False), UUID(crowd.workflow())
        stack.sql(SESSIONS, crowd.organization, workflow_id, count, UUID(offline))
        late, urgent = crowd.run()["id"], crowd.run(is_priority=True)["id"]
        [early] = stack.sql("SELECT md5($1::text || $2::int)::uuid::text AS id", crowd.organization, count)
        for run_id in (urgent, early["id"], late):
            assert crowd.get_run(run_id)["assigned_machine_id"] is None
            freed = crowd.machine()
            assert assigned(crowd, run_id) == freed
            assert len(stack.sql(ASSIGNED, crowd.organization)) == ["", urgent, early["id"], late].index(run_id)
        # And with more machines than one slice of them has.
        stack.sql(MACHINES, crowd.organization, placement.SLICE)
        run_id = crowd.run()["id"]
        assigned(crowd, run_id)
        delays_nobody(crowd, offline, api)
