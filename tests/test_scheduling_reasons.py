"""Why runs wait, shown on long lists: found out once for each case, not once for each run."""

import time
from uuid import UUID, uuid4

import pytest

from tests.support.client import Client
from tests.support.scheduling import reason
from tests.support.server import Server
from tests.support.stack import Stack

# Every machine is in every pool but the last.
POOLS = 20
MACHINES = 400
RUNS = 1000

FILL_POOLS = """
WITH fleet AS (
    INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id)
    SELECT gen_random_uuid(), $1, n, 'key' FROM generate_series(1, $2::int) AS n RETURNING id
)
INSERT INTO pool_machines (pool_id, machine_id) SELECT pool_id, fleet.id FROM fleet, unnest($3::uuid[]) AS pool_id
"""


@pytest.fixture(scope="module")
def server(quiet_server: Server) -> Server:
    return quiet_server


@pytest.mark.alone
def test_the_reason_of_many_runs_that_want_the_same_is_found_out_once(api: Client, stack: Stack) -> None:
    """One look through those pools takes some milliseconds. One for each run passed `statement_timeout`."""
    pools = [UUID(api.pool()) for _ in range(POOLS)]
    stack.sql(FILL_POOLS, api.organization, MACHINES, pools[:-1])
    wanted = {"workflow_id": api.workflow(), "pool_ids": [str(pool) for pool in pools]}
    began = time.monotonic()
    created = api.json_of(api.post("/v1/runs/bulk", json=wanted | {"count": RUNS}), 201)["created_runs"]
    assert {run["scheduling_reason"] for run in created} == {"no_machine_in_pools"}
    assert time.monotonic() - began < 2.5
    began = time.monotonic()
    listed = api.json_of(api.get("/v1/runs", params={"limit": RUNS, "fields": "scheduling_reason"}))["items"]
    assert [run["scheduling_reason"] for run in listed] == ["no_machine_in_pools"] * RUNS
    assert time.monotonic() - began < 2.5


@pytest.mark.alone
def test_the_reason_of_a_run_in_a_long_session_does_not_depend_on_its_length(api: Client, stack: Stack) -> None:
    """The first of 50,000 that wait: nothing is before it, and nothing of the session has begun."""
    session_id, workflow_id = uuid4(), UUID(api.workflow())
    stack.sql(
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane, session_id, queued_at)"
        " SELECT gen_random_uuid(), $1, $2, 'scheduling', 'session:' || $3::uuid, $3, now() + n * interval '1 ms'"
        " FROM generate_series(1, 50000) AS n",
        api.organization,
        workflow_id,
        session_id,
    )
    [first, second] = stack.sql(
        "SELECT id::text FROM runs WHERE session_id = $1 ORDER BY queued_at LIMIT 2", session_id
    )
    took: dict[str, list[float]] = {first["id"]: [], second["id"]: []}
    for _ in range(20):  # until other tests have let each be as quick as it is
        for run_id, expected in ((first["id"], "waiting_for_machine"), (second["id"], "waiting_for_session")):
            began = time.monotonic()
            assert reason(api, run_id) == expected
            took[run_id].append(time.monotonic() - began)
        if min(took[first["id"]]) < 3 * min(took[second["id"]]):
            break
    assert min(took[first["id"]]) < 3 * min(took[second["id"]]), took


def test_a_list_says_of_each_run_what_the_run_itself_says(api: Client) -> None:
    """One page with every reason there is."""
    offline, busy, idle = api.machine(is_available=False), api.machine(), api.machine(is_available=False)
    empty, filled = api.pool(), api.pool(idle)
    wishes: list[dict[str, object]] = [
        {},
        {"machine_id": offline},
        {"machine_id": busy},
        {"machine_id": busy},
        {"pool_ids": [filled]},
        {"pool_ids": [empty]},
        {"pool_ids": [filled, empty]},
        {"start_session": True, "machine_id": offline},
        {"start_session": True, "pool_ids": [empty]},
        {"start_session": True},
    ]
    runs = [api.run(**wish) for wish in wishes]
    for run in runs[-3:]:
        runs += [api.run(session_id=run["session_id"], machine_id=offline), api.run(session_id=run["session_id"])]
    runs.append(api.finished())
    listed = api.json_of(api.get("/v1/runs", params={"fields": "scheduling_reason,assigned_machine_id"}))["items"]
    shown = {run["id"]: reason(api, run["id"]) for run in runs}
    assert {run["id"]: run["scheduling_reason"] for run in listed} == shown
    expected = {"assigned", "waiting_for_machine", "machine_offline", "machine_busy", "no_machine_in_pools"}
    assert set(shown.values()) == expected | {"waiting_for_session", None}
