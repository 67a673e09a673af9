"""PATCH of machine_id and pool_ids: a run that waits in vain waits for another machine, in its old place."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.support.client import Client
from tests.support.scheduling import assigned
from tests.support.stack import Stack
from tests.support.waiting import until


def retarget(api: Client, run_id: str, expected: int = 200, /, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.patch(f"/v1/runs/{run_id}", json=body), expected)
    return found


def offline(api: Client) -> str:
    machine: str = api.machine()
    assert api.patch(f"/v1/machines/{machine}", json={"status": "disconnected"}).is_success
    return machine


def place(stack: Stack, run_id: str) -> tuple[datetime, int]:
    [row] = stack.sql("SELECT queued_at, queue_rank FROM runs WHERE id = $1", UUID(run_id))
    return row["queued_at"], row["queue_rank"]


def test_a_run_that_waits_for_a_dead_machine_takes_any(api: Client, stack: Stack) -> None:
    dead, machine = offline(api), api.machine()
    run = api.run(machine_id=dead)
    assert run["scheduling_reason"] == "machine_offline"
    before = place(stack, run["id"])
    after = retarget(api, run["id"], machine_id=None, reason="the desk is gone")
    assert (after["attempt"], after["machine_id"]) in ((1, None), (1, machine))
    assert assigned(api, run["id"]) == machine
    assert place(stack, run["id"]) == before
    [event] = [
        event
        for event in api.json_of(api.get(f"/v1/runs/{run['id']}/events"))["items"]
        if event["event"] == "retargeted"
    ]
    assert (event["changed"], event["reason"], event["by"]) == (["machine_id"], "the desk is gone", "request")
    assert (event["from_status"], event["to_status"], event["attempt"]) == ("scheduling", "scheduling", 1)


def test_another_machine_pools_and_any(api: Client) -> None:
    dead, other = offline(api), offline(api)
    pool = api.json_of(api.post("/v1/pools", json={"name": "desks"}), 201)["id"]
    run = api.run(pool_ids=[pool])["id"]
    pinned = retarget(api, run, machine_id=dead)
    assert (pinned["machine_id"], pinned["pool_ids"], pinned["scheduling_reason"]) == (dead, [pool], "machine_offline")
    unpinned = retarget(api, run, machine_id=None)
    assert (unpinned["machine_id"], unpinned["pool_ids"]) == (None, [pool])
    assert unpinned["scheduling_reason"] == "no_machine_in_pools"
    retarget(api, run, machine_id=other)
    anywhere = retarget(api, run, pool_ids=[])  # pools without a machine drop the pin, as in a retry
    assert (anywhere["machine_id"], anywhere["pool_ids"]) == (None, [])
    both = retarget(api, run, machine_id=other, pool_ids=[pool])
    assert (both["machine_id"], both["pool_ids"]) == (other, [pool])
    [waiting] = api.json_of(api.get("/v1/queue"))["items"]
    assert waiting["lane"] == f"machine:{other}"
    assert api.patch(f"/v1/machines/{other}", json={"status": "connected"}).is_success
    assert assigned(api, run) == other


def test_a_held_run_stays_held(api: Client) -> None:
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
    dead, machine = offline(api), api.machine()
    run = api.run(machine_id=dead, not_before=later)
    after = retarget(api, run["id"], machine_id=None)
    assert (after["scheduling_reason"], after["not_before"]) == ("not_before", run["not_before"])
    retarget(api, run["id"], not_before=None)
    assert assigned(api, run["id"]) == machine


def test_only_a_run_without_a_machine(api: Client) -> None:
    machine = api.machine()
    run = api.run()["id"]
    assigned(api, run)
    for end in (None, "running", "cancelled"):
        if end is not None:
            api.report(run, status=end)
        refused = retarget(api, run, 409, machine_id=None)
        assert refused["code"] == "run_not_waiting"
        assert refused["current_status"] == (end or "scheduling")
    assert api.get_run(run)["machine_id"] == machine


def test_what_is_unknown_or_foreign_changes_nothing(api: Client, foreign: Client) -> None:
    run = api.run(machine_id=offline(api))
    for body, code in (
        ({"machine_id": str(uuid4())}, "machine_not_found"),
        ({"machine_id": foreign.machine()}, "machine_not_found"),
        ({"pool_ids": [str(uuid4())]}, "pool_not_found"),
    ):
        assert retarget(api, run["id"], 404, **body)["code"] == code
    assert foreign.patch(f"/v1/runs/{run['id']}", json={"machine_id": None}).json()["code"] == "run_not_found"
    assert api.get_run(run["id"]) == run


@pytest.mark.parametrize("beside", [{"status": "cancelled"}, {"error": None}, {"attempt": 1}])
def test_nothing_else_beside_it(api: Client, beside: dict[str, Any]) -> None:
    run = api.run()["id"]
    [problem] = retarget(api, run, 422, machine_id=None, **beside)["detail"]
    assert problem["loc"] == ["body", *beside]


def test_a_resend_changes_nothing_twice(api: Client) -> None:
    run = api.run(machine_id=offline(api))["id"]
    headers = {"Idempotency-Key": uuid4().hex}
    first, second = (api.patch(f"/v1/runs/{run}", json={"pool_ids": []}, headers=headers) for _ in range(2))
    assert (first.content, second.headers["Idempotency-Status"]) == (second.content, "replayed")
    events = api.json_of(api.get(f"/v1/runs/{run}/events"))["items"]
    until(lambda: [event["event"] for event in events].count("retargeted") == 1)
