"""Bulk retries whose replicas are killed wherever they can be: no run is retried twice, and the job ends with true counts."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.support.bulk_retries import ended, job_of, many_failed, start
from tests.support.client import Client
from tests.support.faults import FaultyServer, Plan, work_on_bulk_retries_as_process
from tests.support.stack import Stack
from tests.support.stored_state import SOAK, chance
from tests.support.waiting import until

RUNS = 5
ALWAYS = ("bulk.move after#1", "COMMIT before#1", "COMMIT sent#1", "COMMIT after#1")


@pytest.fixture(scope="module")
def idle(attacked: Stack) -> Iterator[FaultyServer]:
    """It answers, and leaves the work to others."""
    with FaultyServer(attacked, BACKGROUND="none") as server:
        yield server


def started(stack: Stack, client: Client, count: int) -> dict[str, Any]:
    workflow_id = client.workflow()
    many_failed(stack, client.organization, workflow_id, count)
    return start(client, filter={"workflow_id": workflow_id})


def is_over(stack: Stack) -> bool:
    """PostgreSQL has noticed that the replica died: its transaction is over."""
    return not stack.sql("SELECT FROM pg_stat_activity WHERE application_name = 'runs-api' AND xact_start IS NOT NULL")


def assert_true(stack: Stack, job: dict[str, Any]) -> None:
    """What the job says is what the events say, and no run was retried by it twice."""
    rows = stack.sql(
        "SELECT i.outcome, r.attempt, (SELECT count(*) FROM run_events e WHERE e.run_id = i.run_id AND e.event = 'retried'"
        " AND e.bulk_retry_id = i.bulk_retry_id) AS times, (SELECT count(*) FROM run_events e WHERE e.run_id = i.run_id"
        " AND e.event = 'retried') AS retries FROM bulk_retry_items i LEFT JOIN runs r ON r.id = i.run_id"
        " WHERE i.bulk_retry_id = $1",
        UUID(job["id"]),
    )
    assert len(rows) == job["total"] == job["retried"] + job["skipped"]
    assert all(row["times"] == (row["outcome"] == "retried") for row in rows)
    assert all(row["attempt"] in (None, 1 + row["retries"]) for row in rows)
    assert sum(row["outcome"] == "retried" for row in rows) == job["retried"]


def test_killed_at_any_point_each_run_is_retried_once(attacked: Stack, idle: FaultyServer) -> None:
    with idle.client() as client:
        started(attacked, client, RUNS)
        every = [
            point for point in dict.fromkeys(work_on_bulk_retries_as_process(attacked, Plan())) if point.endswith("#1")
        ]
        assert set(ALWAYS) <= set(every), every
        others = [point for point in every if point not in ALWAYS]
        points = [*ALWAYS, *(others if SOAK else chance("bulk crash").sample(others, 2))]
        for point in points:
            job = started(attacked, client, RUNS)
            work_on_bulk_retries_as_process(attacked, Plan(point))
            until(lambda: is_over(attacked))
            work_on_bulk_retries_as_process(attacked, Plan())
            done = job_of(client, job["id"])
            assert (done["state"], done["retried"]) == ("completed", RUNS), point
            assert_true(attacked, done)


def test_two_replicas_one_killed_beside_manual_retries_and_deletes(attacked: Stack, idle: FaultyServer) -> None:
    random = chance("bulk replicas")
    with idle.client() as client:
        job = started(attacked, client, 2_000 if SOAK else 200)
        rows = attacked.sql("SELECT run_id FROM bulk_retry_items WHERE bulk_retry_id = $1", UUID(job["id"]))
        runs = [str(row["run_id"]) for row in rows]
        over = threading.Event()

        def meddle(seed: int) -> None:
            own = chance(f"meddle {seed}")
            with idle.client(client.organization) as other:
                while not over.is_set():
                    run_id = own.choice(runs)
                    with suppress(httpx.TransportError):
                        match own.randrange(4):
                            case 0:
                                reply = other.delete(f"/v1/runs/{run_id}")
                            case 1:
                                reply = other.patch(f"/v1/runs/{run_id}", json={"status": "error"})
                            case _:
                                reply = other.retry(run_id)
                        assert reply.status_code < 500, reply.text

        with ThreadPoolExecutor(2) as threads:
            meddlers = [threads.submit(meddle, seed) for seed in range(2)]
            try:
                with FaultyServer(attacked) as last:
                    for _ in range(4 if SOAK else 1):
                        with FaultyServer(attacked):  # killed at the end of the block
                            wait_for_progress(client, job["id"])
                            threading.Event().wait(random.random() / 20)
                    done = ended(client, job)
                    assert not last.died
            finally:
                over.set()
            for meddler in meddlers:
                meddler.result()
        assert done["state"] == "completed"
        assert_true(attacked, done)


def wait_for_progress(client: Client, job_id: str) -> None:
    retried = job_of(client, job_id)["retried"]
    until(lambda: (job := job_of(client, job_id))["retried"] > retried or job["ended_at"])
