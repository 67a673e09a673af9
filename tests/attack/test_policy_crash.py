"""A replica that is killed while it retries by policy: each planned retry still happens once, or is dropped once."""

from collections.abc import Iterator
from uuid import UUID

import pytest

from tests.support.client import Client
from tests.support.faults import FaultyServer, Plan, work_on_planned_retries_as_process
from tests.support.stack import Stack
from tests.support.stored_state import SOAK, chance
from tests.support.waiting import until

RUNS = 4
ALWAYS = ("retry_policies.remove after#1", "COMMIT before#1", "COMMIT sent#1", "COMMIT after#1")


@pytest.fixture(scope="module")
def idle(attacked: Stack) -> Iterator[FaultyServer]:
    """It answers, and leaves the work to others."""
    with FaultyServer(attacked, BACKGROUND="none") as server:
        yield server


def failed_runs(stack: Stack, api: Client) -> list[UUID]:
    """Runs whose retry is due; the first one's pool is gone."""
    body = {"main_prompt": "Do it.", "retry_policy": {"max_retries": 1, "delays_seconds": [0]}}
    workflow_id = api.json_of(api.post("/v1/workflows", json=body), 201)["id"]
    pool = api.pool()
    runs = [api.run(workflow_id=workflow_id, pool_ids=[pool] * (number == 0))["id"] for number in range(RUNS)]
    for run_id in runs:
        assert api.report(run_id, status="error")["next_retry_at"]
    assert api.delete(f"/v1/pools/{pool}").status_code == 204
    return [UUID(run_id) for run_id in runs]


def is_over(stack: Stack) -> bool:
    """PostgreSQL has noticed that the replica died: its transaction is over."""
    return not stack.sql("SELECT FROM pg_stat_activity WHERE application_name = 'runs-api' AND xact_start IS NOT NULL")


def test_killed_at_any_point_each_planned_retry_happens_once(attacked: Stack, idle: FaultyServer) -> None:
    with idle.client() as api:
        failed_runs(attacked, api)
        passed = dict.fromkeys(work_on_planned_retries_as_process(attacked, Plan()))
        every = [point for point in passed if point.endswith("#1")]
        assert set(ALWAYS) <= set(every), every
        others = [point for point in every if point not in ALWAYS]
        for point in [*ALWAYS, *(others if SOAK else chance("policy crash").sample(others, 2))]:
            runs = failed_runs(attacked, api)
            work_on_planned_retries_as_process(attacked, Plan(point))
            until(lambda: is_over(attacked))
            work_on_planned_retries_as_process(attacked, Plan())
            rows = attacked.sql(
                "SELECT run_id, string_agg(event || coalesce(' ' || code, ''), ', ' ORDER BY id) AS told FROM run_events"
                " WHERE run_id = ANY($1) AND event LIKE '%retr%' GROUP BY run_id",
                runs,
            )
            told = {row["run_id"]: row["told"] for row in rows}
            expected = ["retry_planned, retry_dropped pool_deleted", *["retry_planned, retried"] * (RUNS - 1)]
            assert [told[run_id] for run_id in runs] == expected, point
            assert not attacked.sql("SELECT FROM planned_retries WHERE run_id = ANY($1)", runs), point
