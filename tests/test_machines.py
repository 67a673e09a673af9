"""Machines: what they are, how a session on one is ended, and what becomes of their runs."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.support.client import Client
from tests.support.stack import Stack
from tests.support.waiting import until

KEYS = {
    "id",
    "fingerprint",
    "unkey_key_id",
    "user_id",
    "organization_id",
    "name",
    "version",
    "hostname",
    "os_info",
    "status",
    "is_available",
    "alerts_enabled",
    "reserved_session_id",
    "machine_parameters",
    "machine_sensitive_parameters",
    "linked_keepalive_machine_id",
    "physical_server_id",
    "pools",
    "created_at",
    "last_seen",
}
TEXTS = {"name": "desk", "version": "1.2", "hostname": "desk.local", "os_info": "Windows 11"}


def create(api: Client, **fields: object) -> dict[str, Any]:
    body = {"fingerprint": "f", "unkey_key_id": "k"} | fields
    created: dict[str, Any] = api.json_of(api.post("/v1/machines", json=body), 201)
    return created


def get(api: Client, machine_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.get(f"/v1/machines/{machine_id}"))
    return found


def patch(api: Client, machine_id: str, **fields: object) -> dict[str, Any]:
    changed: dict[str, Any] = api.json_of(api.patch(f"/v1/machines/{machine_id}", json=fields))
    return changed


def delete(api: Client, machine_id: str) -> None:
    response = api.delete(f"/v1/machines/{machine_id}")
    assert (response.status_code, response.content) == (204, b"")


def assigned(api: Client, run_id: str, machine_id: str) -> None:
    until(lambda: api.get_run(run_id)["assigned_machine_id"] == machine_id, what="the assignment")


# --- what a machine is ------------------------------------------------------------------------------------------------


def test_create_and_get(api: Client) -> None:
    machine = create(api, **TEXTS, unknown="ignored", machine_parameters=None)
    assert machine.keys() == KEYS
    assert machine == machine | TEXTS | {
        "fingerprint": "f",
        "unkey_key_id": "k",
        "organization_id": api.organization,
        "status": "connected",
        "is_available": True,
        "alerts_enabled": True,
        "reserved_session_id": None,
        "machine_parameters": None,
        "pools": [],
    }
    assert get(api, machine["id"]) == machine
    assert {name: create(api)[name] for name in TEXTS} == dict.fromkeys(TEXTS)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"fingerprint": "f"},
        {"unkey_key_id": "k"},
        {"fingerprint": "", "unkey_key_id": "k"},
        {"fingerprint": "f", "unkey_key_id": "k", "name": "x" * 256},
        {"fingerprint": "f", "unkey_key_id": "k", "hostname": "a\0b"},
    ],
)
def test_create_refuses(api: Client, body: dict[str, object]) -> None:
    api.json_of(api.post("/v1/machines", json=body), 422)


def test_list_is_filtered_and_paged(api: Client, foreign: Client) -> None:
    create(foreign)
    machines = [create(api, name=f"desk {number % 2}") for number in range(4)]
    ids = [machine["id"] for machine in machines]
    patch(api, ids[2], status="disconnected")

    def listed(**params: str | int) -> list[int]:
        page = api.json_of(api.get("/v1/machines", params=params))
        assert page["total"] >= len(page["items"])
        assert all(item.keys() == KEYS for item in page["items"])
        return [ids.index(item["id"]) for item in page["items"]]

    assert listed() == listed(of_a_newer_sdk="ignored") == [3, 2, 1, 0]
    assert listed(skip=1, limit=2) == [2, 1]
    assert listed(name="desk 1") == [3, 1]
    assert listed(name="desk") == []
    assert listed(status="disconnected") == [2]
    assert listed(status="connected", name="desk 0") == [0]
    assert listed(created_at_from=machines[2]["created_at"]) == [3, 2]
    assert listed(created_at_to=machines[2]["created_at"]) == [2, 1, 0]
    # As the SDK sends a time: naive, or with an offset.
    at = datetime.fromisoformat(machines[1]["created_at"]).replace(tzinfo=None)
    assert listed(created_at_from=at.isoformat(), created_at_to=(at + timedelta(microseconds=0)).isoformat()) == [1]
    assert api.json_of(api.get("/v1/machines?status=disconnected"))["total"] == 1
    for query in ("status=lost", "created_at_from=yesterday", "name=%00", f"name={'x' * 256}"):
        api.json_of(api.get(f"/v1/machines?{query}"), 422)


def test_patch_sets_what_it_names(api: Client) -> None:
    machine = create(api, **TEXTS)
    assert patch(api, machine["id"]) == patch(api, machine["id"], unknown=1) == machine
    # null clears a text, and leaves alone what cannot be null.
    cleared = patch(api, machine["id"], name=None, status=None, is_available=None, last_seen=None, alerts_enabled=None)
    assert cleared == machine | {"name": None}
    news = {
        "version": "2",
        "status": "error",
        "is_available": False,
        "alerts_enabled": False,
        "last_seen": "2031-02-03T04:05:06Z",
    }
    assert patch(api, machine["id"], **news) == cleared | news
    assert get(api, machine["id"]) == cleared | news


@pytest.mark.parametrize(
    "body",
    [
        {"status": "lost"},
        {"is_available": "yes"},
        {"last_seen": 5},
        {"reserved_session_id": str(uuid4())},
        {"name": "\0"},
        [],
    ],
)
def test_patch_refuses(api: Client, body: object) -> None:
    machine = create(api)
    api.json_of(api.patch(f"/v1/machines/{machine['id']}", json=body), 422)
    assert get(api, machine["id"]) == machine


def test_unknown_and_foreign_ids_get_the_same_reply(api: Client, foreign: Client) -> None:
    api.headers["X-Request-ID"] = "the-same"  # which a refusal names
    theirs = foreign.machine()
    before = get(foreign, theirs)
    own_pool = api.pool()
    replies = [
        reply
        for machine_id in (theirs, str(uuid4()))
        for reply in (
            api.get(f"/v1/machines/{machine_id}"),
            api.patch(f"/v1/machines/{machine_id}", json={"name": "mine", "reserved_session_id": None}),
            api.patch(f"/v1/machines/{machine_id}", json={}),
            api.delete(f"/v1/machines/{machine_id}"),
            api.get(f"/v1/machines/{machine_id}/pools"),
            api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": [own_pool]}),
        )
    ]
    assert {api.json_of(reply, 404)["code"] for reply in replies} == {"machine_not_found"}
    assert len({reply.content for reply in replies}) == 1
    assert get(foreign, theirs) == before
    api.json_of(api.get("/v1/machines/7"), 422)


def test_set_pools(api: Client, foreign: Client) -> None:
    machine_id, neighbor = api.machine(), api.machine()
    first, second, third = api.pool(machine_id, neighbor), api.pool(machine_id), api.pool()

    def put(*pool_ids: str) -> list[str]:
        machine = api.json_of(api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": pool_ids}))
        assert machine == get(api, machine_id)
        assert api.json_of(api.get(f"/v1/machines/{machine_id}/pools")) == machine["pools"]
        return [pool["id"] for pool in machine["pools"]]

    assert put(third, first, third) == [third, first]
    assert {pool["machine_count"] for pool in get(api, machine_id)["pools"]} == {1, 2}
    for unknown in (str(uuid4()), foreign.pool()):
        refused = api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": [second, unknown]})
        assert api.json_of(refused, 404)["code"] == "pool_not_found"
    assert [pool["id"] for pool in get(api, machine_id)["pools"]] == [third, first]
    assert put() == []
    assert [pool["id"] for pool in get(api, neighbor)["pools"]] == [first]
    api.json_of(api.put(f"/v1/machines/{machine_id}/pools", json={}), 422)
    api.json_of(api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": [str(uuid4())] * 101}), 422)


# --- placement follows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [{"status": "disconnected"}, {"status": "error"}, {"is_available": False}])
def test_a_machine_that_comes_back_takes_the_waiting_run(api: Client, away: dict[str, object]) -> None:
    machine_id = api.machine(**away)
    run_id = api.run(machine_id=machine_id)["id"]
    assert api.get_run(run_id)["scheduling_reason"] == "machine_offline"
    patch(api, machine_id, status="connected", is_available=True)
    assigned(api, run_id, machine_id)


def test_a_new_machine_and_a_new_pool_take_waiting_runs(api: Client) -> None:
    anywhere = api.run()["id"]
    machine_id = api.machine()
    assigned(api, anywhere, machine_id)
    other, pool_id = api.machine(), api.pool()
    pooled = api.run(pool_ids=[pool_id])["id"]
    api.json_of(api.put(f"/v1/machines/{other}/pools", json={"pool_ids": [pool_id]}))
    assigned(api, pooled, other)


def test_a_machine_that_goes_offline_keeps_its_run(api: Client) -> None:
    machine_id = api.machine()
    run_id = api.run()["id"]
    assigned(api, run_id, machine_id)
    api.report(run_id, status="running")
    patch(api, machine_id, status="disconnected")
    run = api.get_run(run_id)
    assert (run["status"], run["assigned_machine_id"]) == ("running", machine_id)
    assert api.report(run_id, status="success")["machine_id"] == machine_id


# --- ending a session -------------------------------------------------------------------------------------------------


def test_clearing_a_reservation_ends_the_session(api: Client, stack: Stack) -> None:
    machine_id = api.machine()
    done = api.run(start_session=True, sensitive_input_values={"password": "one"})
    session_id = done["session_id"]
    assigned(api, done["id"], machine_id)
    api.report(done["id"], status="running")
    done = api.report(done["id"], status="success")
    running = api.run(session_id=session_id, sensitive_input_values={"password": "two"})["id"]
    assigned(api, running, machine_id)
    api.report(running, status="running")
    waiting = api.run(session_id=session_id)["id"]
    pinned = api.run(machine_id=machine_id)["id"]
    unrelated = api.run(start_session=True)["id"]
    assert get(api, machine_id)["reserved_session_id"] == session_id
    assert api.get_run(pinned)["scheduling_reason"] == "machine_busy"

    patch(api, machine_id, is_available=False)
    freed = patch(api, machine_id, reserved_session_id=None)

    assert (freed["reserved_session_id"], freed["is_available"]) == (None, True)
    for run_id in (running, waiting):
        run = api.get_run(run_id)
        assert run["status"] == "cancelled"
        assert run["ended_at"] is not None
        assert "session was ended" in run["error"][0]
        assert run["error_code"] == "session_released"
        assert run["session_id"] == session_id
    assert api.get_run(done["id"]) == done
    # Secrets of a cancelled run stay retryable, and are on the list to be destroyed later.
    rows = stack.sql(
        "SELECT d.due_at > now() AS later FROM runs r JOIN deletions d ON d.name = r.secret_path WHERE r.id = $1",
        UUID(running),
    )
    assert [row["later"] for row in rows] == [True]
    # The machine is free for the next in the queue.
    until(lambda: machine_id in (api.get_run(pinned)["assigned_machine_id"], api.get_run(unrelated)["machine_id"]))
    assert api.get_run(unrelated)["status"] == "scheduling"
    again = api.json_of(api.retry(running))
    assert (again["status"], again["session_id"]) == ("scheduling", session_id)


def test_a_cleared_machine_can_be_kept_unavailable(api: Client) -> None:
    machine_id = api.machine()
    run = api.run(start_session=True)
    assigned(api, run["id"], machine_id)
    cleared = patch(api, machine_id, reserved_session_id=None, is_available=False, name="broken")
    assert (cleared["reserved_session_id"], cleared["is_available"], cleared["name"]) == (None, False, "broken")
    assert api.get_run(run["id"])["status"] == "cancelled"


def test_clearing_no_reservation_changes_nothing(api: Client) -> None:
    machine_id = api.machine()
    run_id = api.run()["id"]
    assigned(api, run_id, machine_id)
    patch(api, machine_id, is_available=False)
    before = get(api, machine_id)
    assert patch(api, machine_id, reserved_session_id=None) == before
    assert api.get_run(run_id)["status"] == "scheduling"
    assert patch(api, machine_id, reserved_session_id=None, name="new") == before | {"name": "new"}


# --- deletion ---------------------------------------------------------------------------------------------------------


def test_delete_ends_active_runs_and_keeps_all(api: Client, stack: Stack) -> None:
    machine_id = api.machine()
    pool_id = api.pool(machine_id)
    done = api.run(machine_id=machine_id)["id"]
    assigned(api, done, machine_id)
    api.report(done, status="running")
    api.report(done, status="success", output_data={"answer": 42})
    running = api.run(sensitive_input_values={"password": "canary"})["id"]
    assigned(api, running, machine_id)
    api.report(running, status="running")
    pinned = api.run(machine_id=machine_id)["id"]
    waiting = api.run(pool_ids=[pool_id])["id"]

    delete(api, machine_id)

    for run_id in (running, pinned):
        run = api.get_run(run_id)
        assert (run["status"], run["machine_id"], run["assigned_machine_id"]) == ("error", None, None)
        assert run["ended_at"] is not None
        assert "machine was deleted" in run["error"][0]
        assert run["error_code"] == "machine_deleted"
    kept = api.get_run(done)
    assert (kept["status"], kept["machine_id"], kept["output_data"]) == ("success", None, {"answer": 42})
    assert kept["error"] is None
    assert api.get_run(waiting)["scheduling_reason"] == "no_machine_in_pools"
    api.json_of(api.get(f"/v1/machines/{machine_id}"), 404)
    assert api.json_of(api.get(f"/v1/pools/{pool_id}?include_machines=true"))["machines"] == []
    retained = stack.sql(
        "SELECT d.due_at > now() AS later FROM runs r JOIN deletions d ON d.name = r.secret_path WHERE r.id = $1",
        UUID(running),
    )
    assert [row["later"] for row in retained] == [True]
    # The pin is gone with its machine, and a retry has to say where the run goes now.
    other = api.machine()
    assert api.json_of(api.retry(pinned), 409)["code"] == "machine_deleted"
    assert api.json_of(api.retry(pinned, pool_ids=[]))["machine_id"] is None
    assigned(api, pinned, other)


def test_a_session_outlives_its_machine(api: Client) -> None:
    machine_id = api.machine()
    first = api.run(start_session=True)
    assigned(api, first["id"], machine_id)
    api.report(first["id"], status="running")
    second = api.run(session_id=first["session_id"])
    assert second["machine_id"] == machine_id
    delete(api, machine_id)
    assert api.get_run(first["id"])["status"] == "error"
    run = api.get_run(second["id"])
    assert (run["status"], run["machine_id"]) == ("scheduling", None)
    other = api.machine()
    assigned(api, second["id"], other)
    assert get(api, other)["reserved_session_id"] == first["session_id"]


def test_delete_of_a_machine_with_many_runs(api: Client, stack: Stack) -> None:
    machine_id, other, workflow_id = api.machine(), api.machine(), api.workflow()
    insert = (
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane, ended_at, {column})"
        " SELECT gen_random_uuid(), $1, $2, 'success', 'any', now(), $3 FROM generate_series(1, $4)"
    )
    for column, owner, count in (
        ("assigned_machine_id", machine_id, 450),
        ("pinned_machine_id", machine_id, 450),
        ("assigned_machine_id", other, 3),
    ):
        stack.sql(insert.format(column=column), api.organization, UUID(workflow_id), UUID(owner), count)
    # All of them have one creation time: batches are told apart by id.
    delete(api, machine_id)
    rows = stack.sql(
        "SELECT coalesce(assigned_machine_id, pinned_machine_id) AS machine, count(*) AS runs, min(status) AS status"
        " FROM runs WHERE organization_id = $1 GROUP BY 1 ORDER BY 2",
        api.organization,
    )
    assert [(row["machine"] and str(row["machine"]), row["runs"]) for row in rows] == [(other, 3), (None, 900)]
    assert {row["status"] for row in rows} == {"success"}


def test_delete_is_idempotent(api: Client) -> None:
    machine_id, key = api.machine(), {"Idempotency-Key": str(uuid4())}
    for replayed in (None, "replayed"):
        gone = api.delete(f"/v1/machines/{machine_id}", headers=key)
        assert (gone.status_code, gone.headers.get("Idempotency-Status")) == (204, replayed)
    api.json_of(api.delete(f"/v1/machines/{machine_id}"), 404)


# --- races ------------------------------------------------------------------------------------------------------------


def test_delete_against_everything_that_needs_the_machine(api: Client, stack: Stack) -> None:
    """Whatever the order, no run waits for a machine that is gone, and nobody sees a failure of ours."""
    workflow_id = api.workflow()
    codes: set[int] = set()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(12):
            machine_id = api.machine(status="disconnected")
            # Finished and pinned: a retry without override keeps the pin without asking for the machine again.
            kept = [api.run(workflow_id=workflow_id, machine_id=machine_id)["id"] for _ in range(3)]
            for run_id in kept:
                api.report(run_id, status="cancelled")
            own_pool = api.pool(machine_id)
            pin = {"workflow_id": workflow_id, "machine_id": machine_id}
            work = [
                *(pool.submit(api.retry, run_id) for run_id in kept[:2]),
                pool.submit(api.retry, kept[2], machine_id=machine_id),
                pool.submit(api.post, "/v1/runs", json=pin),
                pool.submit(api.delete, f"/v1/machines/{machine_id}"),
                pool.submit(api.post, "/v1/runs", json=pin),
                pool.submit(api.patch, f"/v1/machines/{machine_id}", json={"status": "connected"}),
                pool.submit(api.delete, f"/v1/pools/{own_pool}"),
            ]
            codes |= {one.result().status_code for one in work}
            api.json_of(api.get(f"/v1/machines/{machine_id}"), 404)
    assert codes <= {200, 201, 204, 404, 409}  # 409: machine_deleted; a deadlock would be a 503
    stuck = stack.sql(
        "SELECT id, status, lane FROM runs WHERE organization_id = $1 AND status IN ('scheduling', 'running')"
        " AND lane LIKE 'machine:%'",
        api.organization,
    )
    assert stuck == []


def test_clearing_against_the_end_of_the_run(api: Client, stack: Stack) -> None:
    """A run's own end and the end of its session meet on the same two rows."""
    machine_id, workflow_id = api.machine(), api.workflow()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            run = api.run(workflow_id=workflow_id, start_session=True, release_session_after=True)
            assigned(api, run["id"], machine_id)
            api.report(run["id"], status="running")
            ended = pool.submit(api.patch, f"/v1/runs/{run['id']}", json={"status": "success"})
            cleared = pool.submit(api.patch, f"/v1/machines/{machine_id}", json={"reserved_session_id": None})
            assert cleared.result().status_code == 200
            assert ended.result().status_code in (200, 409)
            wanted = "success" if ended.result().status_code == 200 else "cancelled"
            assert api.get_run(run["id"])["status"] == wanted
            assert get(api, machine_id)["reserved_session_id"] is None


def test_pool_changes_of_one_machine_at_once(api: Client) -> None:
    machine_ids = [api.machine() for _ in range(4)]
    pool_ids = [api.pool() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            work = [
                *(
                    pool.submit(api.put, f"/v1/machines/{one}/pools", json={"pool_ids": pool_ids})
                    for one in machine_ids
                ),
                *(
                    pool.submit(api.post, f"/v1/pools/{one}/machines", json={"machine_ids": machine_ids[::-1]})
                    for one in pool_ids
                ),
                *(
                    pool.submit(api.request, "DELETE", f"/v1/pools/{one}/machines", json={"machine_ids": machine_ids})
                    for one in pool_ids
                ),
            ]
            assert {one.result().status_code for one in work} <= {200, 204}


def test_a_pool_goes_while_machines_join_it(api: Client) -> None:
    machine_ids = [api.machine() for _ in range(3)]
    codes: set[int] = set()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            pool_id = api.pool(machine_ids[0])
            work = [
                pool.submit(api.put, f"/v1/machines/{machine_ids[0]}/pools", json={"pool_ids": [pool_id]}),
                pool.submit(api.post, f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids}),
                pool.submit(api.delete, f"/v1/pools/{pool_id}"),
                pool.submit(api.put, f"/v1/machines/{machine_ids[1]}/pools", json={"pool_ids": [pool_id]}),
                pool.submit(api.post, f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids}),
            ]
            codes |= {one.result().status_code for one in work}
            assert get(api, machine_ids[0])["pools"] == []
    assert codes <= {200, 204, 404}
