"""Placement through the API: which waiting run gets which machine, when, and what a waiting run says about it."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.scheduling import placement
from app.scheduling.placement import Left, place
from tests.support.client import Client
from tests.support.scheduling import Interrupted, Probe, Replica, assigned, reason, starts
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.waiting import NEVER


@pytest.fixture(scope="module")
def server(quiet_server: Server) -> Server:
    return quiet_server


def change(api: Client, machine_id: str, **fields: object) -> None:
    api.json_of(api.patch(f"/v1/machines/{machine_id}", json=fields))


def put_pools(api: Client, machine_id: str, *pool_ids: str) -> None:
    api.json_of(api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": pool_ids}))


# --- the immediate attempt --------------------------------------------------------------------------------------------


def test_a_new_run_gets_a_machine_at_once(api: Client) -> None:
    machine_id = api.machine()
    created = api.run()
    assert (created["machine_id"], created["assigned_machine_id"]) == (None, None)
    assert assigned(api, created["id"]) == machine_id
    run = api.get_run(created["id"])
    assert (run["machine_id"], run["status"], run["scheduling_reason"]) == (machine_id, "scheduling", "assigned")
    assert run["started_at"] is None
    running = api.report(run["id"], status="running")
    assert (running["machine_id"], running["assigned_machine_id"]) == (machine_id, machine_id)
    assert running["scheduling_reason"] is None
    done = api.report(run["id"], status="success")
    assert (done["machine_id"], done["scheduling_reason"]) == (machine_id, None)


def test_a_retried_run_drops_its_machine_and_gets_one_at_once(api: Client) -> None:
    failed = api.machine()
    run_id = starts(api)["id"]
    api.report(run_id, status="error")
    change(api, failed, status="error")
    waiting = api.json_of(api.retry(run_id))
    assert (waiting["machine_id"], waiting["assigned_machine_id"]) == (None, None)
    assert waiting["scheduling_reason"] == "waiting_for_machine"
    other = api.machine()
    assert assigned(api, run_id) == other
    # And without any change of machines in between:
    api.report(run_id, status="cancelled")
    assert api.json_of(api.retry(run_id))["assigned_machine_id"] is None
    assert assigned(api, run_id) == other


def test_bulk_runs_fill_all_machines_in_queue_order(api: Client) -> None:
    machines = {api.machine() for _ in range(3)}
    body = {"workflow_id": api.workflow(), "count": 5}
    runs = api.json_of(api.post("/v1/runs/bulk", json=body), 201)["created_runs"]
    assert {assigned(api, run["id"]) for run in runs[:3]} == machines
    assert [reason(api, run["id"]) for run in runs[3:]] == ["waiting_for_machine"] * 2
    api.report(runs[1]["id"], status="cancelled")
    assigned(api, runs[3]["id"])
    assert reason(api, runs[4]["id"]) == "waiting_for_machine"


ENDS: dict[str, Callable[[Client, str], httpx.Response]] = {
    "success": lambda api, run_id: api.patch(f"/v1/runs/{run_id}", json={"status": "success"}),
    "error": lambda api, run_id: api.patch(f"/v1/runs/{run_id}", json={"status": "error"}),
    "cancelled": lambda api, run_id: api.patch(f"/v1/runs/{run_id}", json={"status": "cancelled"}),
    "deleted": lambda api, run_id: api.delete(f"/v1/runs/{run_id}"),
    "workflow deleted": lambda api, run_id: api.delete(f"/v1/workflows/{api.get_run(run_id)['workflow_id']}"),
}


@pytest.mark.parametrize(
    ("end", "started"),
    [(end, started) for end in ENDS for started in (True, False) if started or end != "success"],
)
def test_a_freed_machine_takes_the_next_run(api: Client, end: str, *, started: bool) -> None:
    machine_id = api.machine()
    first = api.run()["id"]
    assigned(api, first)
    if started:
        api.report(first, status="running")
    second, third = api.run()["id"], api.run()["id"]
    assert reason(api, second) == "waiting_for_machine"
    assert ENDS[end](api, first).is_success
    assert assigned(api, second) == machine_id
    assert api.get_run(third)["assigned_machine_id"] is None


@pytest.mark.parametrize(
    "away",
    [{"status": "disconnected"}, {"status": "error"}, {"is_available": False}],
    ids=["disconnected", "error", "unavailable"],
)
def test_a_machine_that_is_away_takes_nothing_until_it_is_back(api: Client, away: dict[str, object]) -> None:
    probe, machine_id = Probe(api), api.machine(**away)
    run_id, pinned = api.run()["id"], api.run(machine_id=machine_id)["id"]
    probe.still_waits(run_id, pinned)
    assert [reason(api, one) for one in (run_id, pinned)] == ["waiting_for_machine", "machine_offline"]
    change(api, machine_id, status="connected", is_available=True)
    assert assigned(api, run_id) == machine_id
    assert reason(api, pinned) == "machine_busy"


def test_a_new_machine_takes_the_first_in_the_queue(api: Client) -> None:
    first, second = api.run()["id"], api.run()["id"]
    machine_id = api.machine()
    assert assigned(api, first) == machine_id
    assert reason(api, second) == "waiting_for_machine"


@pytest.mark.parametrize("route", ["machine", "pool"])
def test_a_machine_must_be_in_all_pools(api: Client, route: str) -> None:
    probe, one, two = Probe(api), api.machine(), api.machine()
    pools = [api.pool(one), api.pool(two)]
    both = api.run(pool_ids=pools)["id"]
    probe.still_waits(both)
    assert reason(api, both) == "no_machine_in_pools"
    if route == "machine":
        put_pools(api, two, *pools)
    else:
        api.json_of(api.post(f"/v1/pools/{pools[0]}/machines", json={"machine_ids": [two]}))
    assert assigned(api, both) == two
    again = api.run(pool_ids=pools)["id"]
    probe.still_waits(again)
    assert reason(api, again) == "waiting_for_machine"  # there is one in both, and it is busy


def test_a_machine_that_left_a_pool_is_not_used_for_it(api: Client) -> None:
    probe, machine_id = Probe(api), api.machine()
    pool_id = api.pool(machine_id)
    put_pools(api, machine_id)
    run_id = api.run(pool_ids=[pool_id])["id"]
    probe.still_waits(run_id)
    assert reason(api, run_id) == "no_machine_in_pools"


def test_no_pools_means_any_machine(api: Client) -> None:
    machine_id = api.machine()
    assert assigned(api, api.run(pool_ids=[])["id"]) == machine_id


def test_a_machine_of_another_organization_is_never_used(api: Client, foreign: Client) -> None:
    foreign.machine()
    probe = Probe(api)
    run_id = api.run()["id"]
    probe.still_waits(run_id)
    assert (
        api.post("/v1/runs", json={"workflow_id": api.workflow(), "machine_id": foreign.machine()}).status_code == 404
    )


# --- pins -------------------------------------------------------------------------------------------------------------


def test_a_pinned_run_waits_for_its_machine(api: Client) -> None:
    probe, wanted = Probe(api), api.machine()
    holder = starts(api, machine_id=wanted)["id"]
    pinned = api.run(machine_id=wanted, pool_ids=[api.pool()])  # the pin wins over the pools
    assert (pinned["machine_id"], pinned["assigned_machine_id"]) == (wanted, None)
    assert reason(api, pinned["id"]) == "machine_busy"
    api.machine()
    probe.still_waits(pinned["id"])
    api.report(holder, status="success")
    assert assigned(api, pinned["id"]) == wanted


def test_a_retry_keeps_a_pin_and_pool_ids_drop_it(api: Client) -> None:
    wanted, other = api.machine(), api.machine()
    pool_id = api.pool(other)
    run_id = starts(api, machine_id=wanted)["id"]
    api.report(run_id, status="error")
    change(api, wanted, status="disconnected")
    kept = api.json_of(api.retry(run_id))
    assert (kept["machine_id"], kept["assigned_machine_id"]) == (wanted, None)
    assert reason(api, run_id) == "machine_offline"
    api.report(run_id, status="cancelled")
    dropped = api.json_of(api.retry(run_id, pool_ids=[pool_id]))
    assert (dropped["machine_id"], dropped["pool_ids"]) == (None, [pool_id])
    assert assigned(api, run_id) == other
    api.report(run_id, status="cancelled")
    assert assigned(api, api.json_of(api.retry(run_id, machine_id=other, pool_ids=[]))["id"]) == other


def test_an_old_run_is_not_starved_behind_pinned_ones(api: Client) -> None:
    """More than a pass reads of a lane are pinned to a machine that is offline, and all of them are older."""
    offline = api.machine(status="disconnected")
    body = {"workflow_id": api.workflow(), "count": placement.MOST + 50}
    api.json_of(api.post("/v1/runs/bulk", json=body | {"machine_id": offline, "is_priority": True}), 201)
    api.json_of(api.post("/v1/runs/bulk", json=body | {"pool_ids": [api.pool()], "is_priority": True}), 201)
    run_id = api.run()["id"]
    machine_id = api.machine()
    assert assigned(api, run_id) == machine_id


def an_older_run_and_a_pinned_one(api: Client) -> tuple[str, str, str, str]:
    """A run that can go anywhere and a younger one that wants a machine, both waiting; that machine, and another.

    By its id the wanted machine is the first choice.
    """
    wanted, other = sorted(api.machine(is_available=False) for _ in range(2))
    return api.run()["id"], api.run(machine_id=wanted)["id"], wanted, other


BOTH_AVAILABLE = "UPDATE machines SET is_available = true WHERE organization_id = $1"


def test_a_run_that_can_go_anywhere_leaves_a_sought_machine_to_the_pinned_run(api: Client, stack: Stack) -> None:
    anywhere, pinned, wanted, other = an_older_run_and_a_pinned_one(api)
    # No pass, also none that an earlier wake-up has left over, looks before both are there and nobody holds them.
    with stack.held(placement.LOCK_ORGANIZATION.sql, api.organization):
        stack.sql(BOTH_AVAILABLE, api.organization)
        change(api, wanted, is_available=True)
    assert assigned(api, anywhere) == other
    assert assigned(api, pinned) == wanted


def test_the_queue_goes_before_what_others_seek(api: Client, stack: Stack) -> None:
    """To leave a sought machine to others is a choice among those that can be had now; it makes no older run wait."""
    anywhere, pinned, wanted, other = an_older_run_and_a_pinned_one(api)
    with ExitStack() as held:
        with stack.held(placement.LOCK_ORGANIZATION.sql, api.organization):
            stack.sql(BOTH_AVAILABLE, api.organization)
            held.enter_context(stack.held("SELECT 1 FROM machines WHERE id = $1 FOR NO KEY UPDATE", UUID(other)))
            change(api, wanted, is_available=True)
        assert assigned(api, anywhere) == wanted
    assert reason(api, pinned) == "machine_busy"


# --- the queue --------------------------------------------------------------------------------------------------------


def in_turn(api: Client, machine_id: str, count: int) -> list[str]:
    """Ends what the machine runs, again and again: the order in which it got its runs."""
    order = []
    for _ in range(count):
        query: dict[str, str | int] = {
            "machine_id": machine_id,
            "status": "scheduling",
            "wait": 10,
            "fields": "assigned_machine_id",
        }
        items = api.json_of(api.get("/v1/runs", params=query))["items"]
        [run_id] = [item["id"] for item in items if item["assigned_machine_id"] == machine_id]
        order.append(run_id)
        api.report(run_id, status="cancelled")
    return order


def test_priority_first_then_queue_time_whatever_the_runs_ask_for(api: Client) -> None:
    machine_id = api.machine(is_available=False)
    pool_id = api.pool(machine_id)
    wishes: list[dict[str, object]] = [{}, {"machine_id": machine_id}, {"pool_ids": [pool_id]}, {"start_session": True}]
    plain = [api.run(**wish, release_session_after=True)["id"] for wish in wishes]
    urgent = [api.run(**wish, is_priority=True, release_session_after=True)["id"] for wish in reversed(wishes)]
    change(api, machine_id, is_available=True)
    assert in_turn(api, machine_id, 8) == urgent + plain


def test_a_retried_run_queues_at_the_time_of_the_retry(api: Client) -> None:
    machine_id = api.machine()
    old = starts(api)["id"]
    between = api.run()["id"]
    change(api, machine_id, is_available=False)
    api.report(old, status="error")
    api.json_of(api.retry(old))
    late = api.run()["id"]
    urgent = api.run()["id"]
    api.report(urgent, status="cancelled")
    api.json_of(api.retry(urgent, is_priority=True))
    change(api, machine_id, is_available=True)
    assert in_turn(api, machine_id, 4) == [urgent, between, old, late]


# --- what changes between reading and locking -------------------------------------------------------------------------


# The run asks for a pool that machines one and two are in; one is the first choice.
@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("PATCH", "/v1/machines/{one}", {"status": "disconnected"}, "two"),
        ("PATCH", "/v1/machines/{one}", {"is_available": False}, "two"),
        ("PUT", "/v1/machines/{one}/pools", {"pool_ids": []}, "two"),
        ("DELETE", "/v1/machines/{one}", None, "two"),
        ("DELETE", "/v1/pools/{pool}", None, None),
        ("PATCH", "/v1/runs/{run}", {"status": "cancelled"}, None),
        ("DELETE", "/v1/runs/{run}", None, None),
    ],
)
def test_what_changed_since_it_was_read_is_not_assigned(
    server: Server, stack: Stack, method: str, path: str, body: object, expected: str | None
) -> None:
    with server.client() as client:
        organization, key = client.organization, client.headers["Authorization"].removeprefix("Bearer ")
        ids = {"one": client.machine(), "two": client.machine()}
        ids["pool"] = client.pool(*ids.values())
        client.pool(ids["two"])  # being in more pools makes it the second choice
        run_id = ids["run"] = client.finished(pool_ids=[ids["pool"]])["id"]

    async def scenario() -> None:
        async with Replica.run(stack, BACKGROUND_PERIOD_SECONDS=NEVER) as replica:
            services = replica.app.state.services
            services.wakeups.wake = lambda _: None  # this test makes the only pass
            assert (await replica.call(key, "POST", f"/v1/runs/{run_id}/retry"))[0] == 200

            def interruption() -> Any:
                return replica.call(key, method, path.format(**ids), body)

            database: Any = Interrupted(services.database, interruption)
            done = await place(database, organization)
            assert [str(one.machine.id) for one in done.placed] == ([ids[expected]] if expected else [])
            assert done.left is Left.HELD

    asyncio.run(scenario())


def test_one_organizations_trouble_does_not_hold_up_the_others(server: Server, stack: Stack) -> None:
    """Somebody reserved, by hand, another organization's machine for a session that wants to start."""
    with server.client() as troubled, server.client() as other:
        machine_id = troubled.machine(is_available=False)
        waiting = troubled.run(start_session=True, machine_id=machine_id)
        [row] = stack.sql(
            "INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id, reserved_session_id)"
            " VALUES (gen_random_uuid(), $1, 'f', 'k', $2) RETURNING id",
            other.organization,
            UUID(waiting["session_id"]),
        )
        change(troubled, machine_id, is_available=True)
        free = other.machine()
        assert assigned(other, other.run()["id"]) == free
        assert troubled.get_run(waiting["id"])["assigned_machine_id"] is None
        stack.sql("DELETE FROM machines WHERE id = $1", row["id"])
        change(troubled, machine_id, is_available=True)  # a change by hand wakes nobody
        assert assigned(troubled, waiting["id"]) == machine_id
