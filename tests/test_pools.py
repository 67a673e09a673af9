"""Pools: what they are, which machines are in them, and what happens to runs that ask for them."""

from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.client import Client
from tests.support.waiting import until

KEYS = {
    "id",
    "organization_id",
    "name",
    "description",
    "pool_parameters",
    "pool_sensitive_parameters",
    "machine_count",
    "created_at",
    "updated_at",
}


def create(api: Client, **fields: object) -> dict[str, Any]:
    created: dict[str, Any] = api.json_of(api.post("/v1/pools", json={"name": "accounting"} | fields), 201)
    return created


def add(api: Client, pool_id: str, *machine_ids: str) -> httpx.Response:
    return api.post(f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids})


def remove(api: Client, pool_id: str, *machine_ids: str) -> httpx.Response:
    return api.request("DELETE", f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids})


def members(api: Client, pool_id: str) -> list[str]:
    pool = api.json_of(api.get(f"/v1/pools/{pool_id}", params={"include_machines": "true"}))
    assert pool["machine_count"] == len(pool["machines"])
    return [machine["id"] for machine in pool["machines"]]


def test_create_and_get(api: Client) -> None:
    pool = create(api, description="For invoices", unknown="ignored", pool_parameters=None)
    assert pool.keys() == KEYS
    assert pool["organization_id"] == api.organization
    assert (pool["name"], pool["description"], pool["machine_count"]) == ("accounting", "For invoices", 0)
    assert pool["pool_parameters"] is pool["pool_sensitive_parameters"] is None
    assert pool["created_at"].endswith("Z")
    assert api.json_of(api.get(f"/v1/pools/{pool['id']}")) == pool
    with_machines = api.json_of(api.get(f"/v1/pools/{pool['id']}?include_machines=true"))
    assert with_machines == pool | {"machines": []}
    assert api.json_of(api.get(f"/v1/pools/{pool['id']}?include_machines=false")) == pool


@pytest.mark.parametrize("body", [{}, {"name": None}, {"name": ""}, {"name": 7}, {"name": "x" * 256}, {"name": "a\0b"}])
def test_create_refuses(api: Client, body: dict[str, object]) -> None:
    api.json_of(api.post("/v1/pools", json=body), 422)


def test_list_is_paged_newest_first(api: Client, foreign: Client) -> None:
    create(foreign)
    ids = [create(api, name=f"pool {number}")["id"] for number in range(5)]
    assert [pool["id"] for pool in api.json_of(api.get("/v1/pools"))["items"]] == ids[::-1]
    page = api.json_of(api.get("/v1/pools?skip=1&limit=2"))
    assert [pool["id"] for pool in page["items"]] == [ids[3], ids[2]]
    assert (page["total"], page["skip"], page["limit"]) == (5, 1, 2)
    assert page["items"][0].keys() == KEYS
    beyond = api.json_of(api.get("/v1/pools?skip=5"))
    assert (beyond["items"], beyond["total"]) == ([], 5)
    for query in ("skip=-1", "limit=0", "limit=1001", "limit=x"):
        api.json_of(api.get(f"/v1/pools?{query}"), 422)


def test_patch(api: Client) -> None:
    pool = create(api, description="old")
    changed = api.json_of(api.patch(f"/v1/pools/{pool['id']}", json={"name": "new"}))
    assert changed == pool | {"name": "new", "updated_at": changed["updated_at"]}
    assert changed["updated_at"] > pool["updated_at"]
    cleared = api.json_of(api.patch(f"/v1/pools/{pool['id']}", json={"name": None, "description": None}))
    assert (cleared["name"], cleared["description"]) == ("new", None)
    api.json_of(api.patch(f"/v1/pools/{pool['id']}", json={"name": ""}), 422)


def test_unknown_and_foreign_ids_get_the_same_reply(api: Client, foreign: Client) -> None:
    api.headers["X-Request-ID"] = "the-same"  # which a refusal names
    theirs, their_machine = foreign.pool(), foreign.machine()
    own, own_machine = api.pool(), api.machine()
    replies = [
        reply
        for pool_id in (theirs, str(uuid4()))
        for reply in (
            api.get(f"/v1/pools/{pool_id}"),
            api.get(f"/v1/pools/{pool_id}?include_machines=true"),
            api.patch(f"/v1/pools/{pool_id}", json={"name": "mine"}),
            api.delete(f"/v1/pools/{pool_id}"),
            add(api, pool_id, own_machine),
            remove(api, pool_id, own_machine),
        )
    ]
    assert {api.json_of(reply, 404)["code"] for reply in replies} == {"pool_not_found"}
    assert len({reply.content for reply in replies}) == 1
    for machine_id in (their_machine, str(uuid4())):
        for change in (add, remove):
            refused = change(api, own, own_machine, machine_id)
            assert api.json_of(refused, 404)["code"] == "machine_not_found"
    assert members(api, own) == []
    assert foreign.json_of(foreign.get(f"/v1/pools/{theirs}"))["name"] == "pool"


def test_machines_join_and_leave(api: Client) -> None:
    pool_id, other = create(api)["id"], create(api)["id"]
    first, second, third = api.machine(), api.machine(), api.machine()
    joined = api.json_of(add(api, pool_id, first, second, first))
    assert joined.keys() == KEYS | {"machines"}
    assert [machine["id"] for machine in joined["machines"]] == [second, first]
    assert [pool["id"] for pool in joined["machines"][0]["pools"]] == [pool_id]
    assert joined["machines"][0]["pools"][0]["machine_count"] == joined["machine_count"] == 2
    api.json_of(add(api, pool_id, second, third))
    api.json_of(add(api, other, second))
    assert members(api, pool_id) == [third, second, first]
    left = remove(api, pool_id, first, second)
    assert (left.status_code, left.content) == (204, b"")
    assert remove(api, pool_id, first).status_code == 204
    assert members(api, pool_id) == [third]
    assert members(api, other) == [second]
    assert api.json_of(add(api, pool_id))["machine_count"] == 1
    api.json_of(api.post(f"/v1/pools/{pool_id}/machines", json={}), 422)
    api.json_of(api.request("DELETE", f"/v1/pools/{pool_id}/machines"), 422)


def test_writes_are_idempotent(api: Client) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    first = api.post("/v1/pools", json={"name": "once"}, headers=key)
    again = api.post("/v1/pools", json={"name": "once"}, headers=key)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Idempotency-Status"] == "replayed"
    assert api.json_of(api.get("/v1/pools"))["total"] == 1
    key = {"Idempotency-Key": str(uuid4())}
    for replayed in (None, "replayed"):
        gone = api.delete(f"/v1/pools/{first.json()['id']}", headers=key)
        assert (gone.status_code, gone.headers.get("Idempotency-Status")) == (204, replayed)


def test_a_machine_that_joins_takes_the_waiting_run(api: Client) -> None:
    machine_id = api.machine()
    pool_ids = [api.pool(machine_id), api.pool()]
    run_id = api.run(pool_ids=pool_ids)["id"]
    assert api.get_run(run_id)["scheduling_reason"] == "no_machine_in_pools"
    api.json_of(add(api, pool_ids[1], machine_id))
    until(lambda: api.get_run(run_id)["assigned_machine_id"] == machine_id, what="the assignment")


def test_runs_of_a_deleted_pool_keep_waiting(api: Client) -> None:
    machine_id = api.machine(is_available=False)
    pool_id = api.pool(machine_id)
    run_id = api.run(pool_ids=[pool_id])["id"]
    assert api.delete(f"/v1/pools/{pool_id}").status_code == 204
    api.json_of(api.get(f"/v1/pools/{pool_id}"), 404)
    assert api.json_of(api.get(f"/v1/machines/{machine_id}"))["pools"] == []
    api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"is_available": True}))
    other = api.run()["id"]
    until(lambda: api.get_run(other)["assigned_machine_id"] == machine_id, what="the other run's assignment")
    waiting = api.get_run(run_id)
    assert (waiting["status"], waiting["scheduling_reason"]) == ("scheduling", "no_machine_in_pools")
    assert waiting["pool_ids"] == [pool_id]
