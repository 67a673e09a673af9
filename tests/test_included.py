"""`include`: the objects that a reply's items name, each once, as their own routes show them."""

from typing import Any

import pytest

from tests.support.client import Client
from tests.support.server import Server
from tests.support.waiting import until


def including(api: Client, path: str, include: str, **query: str) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.get(path, params={"include": include, **query}))
    return found


def shown(api: Client, kind: str, *ids: str) -> list[dict[str, Any]]:
    """As their own routes show them."""
    return [{"type": kind} | api.json_of(api.get(f"/v1/{kind}s/{one}")) for one in ids]


def in_any_order(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(objects, key=lambda one: one["id"])


def test_runs_bring_their_workflow_machine_and_its_pools(api: Client) -> None:
    workflow, other = api.workflow(), api.workflow()
    machine = api.machine(name="desk")
    pools = [api.pool(machine), api.pool(machine)]
    api.pool()
    runs = [api.run(workflow_id=workflow, machine_id=machine)["id"] for _ in range(2)]
    alone = api.run(workflow_id=other, machine_id=api.machine(status="disconnected"))["id"]
    until(lambda: api.get_run(runs[0])["assigned_machine_id"])

    one = including(api, f"/v1/runs/{runs[0]}", "workflow,machine,machine.pools")
    expected = shown(api, "workflow", workflow) + shown(api, "machine", machine) + shown(api, "pool", *pools)
    assert in_any_order(one.pop("included")) == in_any_order(expected)
    assert one == api.get_run(runs[0])
    # Of a list each object comes once, also with few fields; what is not asked for does not.
    page = including(api, "/v1/runs", " workflow , machine", workflow_id=workflow, fields="status")
    assert [run["id"] for run in page["items"]] == runs[::-1]
    assert in_any_order(page["included"]) == in_any_order(expected[:2])
    both = including(api, "/v1/runs", "workflow")
    assert in_any_order(both["included"]) == in_any_order(shown(api, "workflow", workflow, other))
    assert including(api, f"/v1/runs/{alone}", "machine.pools")["included"][0]["type"] == "machine"
    # Nothing names an object, and nothing is asked for.
    assert including(api, "/v1/runs", "machine,workflow", status="success")["included"] == []
    for query in ("", " , "):
        assert "included" not in including(api, "/v1/runs", query)
        assert "included" not in including(api, f"/v1/runs/{alone}", query)


def test_machines_bring_their_pools_and_pools_their_machines(api: Client) -> None:
    machines = [api.machine(name=name) for name in ("a", "b")]
    pool, empty = api.pool(*machines), api.pool()
    for path in ("/v1/machines", f"/v1/machines/{machines[0]}"):
        assert including(api, path, "pools")["included"] == shown(api, "pool", pool)
    expected = in_any_order(shown(api, "machine", *machines))
    for path in ("/v1/pools", f"/v1/pools/{pool}"):
        assert in_any_order(including(api, path, "machines")["included"]) == expected
    both = including(api, f"/v1/pools/{pool}", "machines", include_machines="true")
    assert (len(both["machines"]), len(both["included"])) == (2, 2)
    assert including(api, f"/v1/pools/{empty}", "machines")["included"] == []


@pytest.mark.parametrize(
    ("path", "include"),
    [
        *(("runs", include) for include in ("pools", "machines", "workflow,tags", "Workflow", "machine.pool", "\x00")),
        *(("machines", include) for include in ("workflow", "machines", "pools;workflow")),
        *(("pools", include) for include in ("pools", "machines.pools")),
    ],
)
def test_an_unknown_name_is_refused(api: Client, path: str, include: str) -> None:
    found = {"runs": lambda: api.run()["id"], "machines": api.machine, "pools": api.pool}[path]()
    for target in (f"/v1/{path}", f"/v1/{path}/{found}"):
        [error] = api.json_of(api.get(target, params={"include": include}), 422)["detail"]
        assert (error["loc"], error["type"]) == (["query", "include"], "include")
        assert "Must be names from this list" in error["msg"]
    api.json_of(api.get(f"/v1/{path}", params=[("include", ""), ("include", "pools")]), 422)
    api.json_of(api.get(f"/v1/{path}", params={"include": "," * 201}), 422)


def test_a_key_of_a_machine_gets_what_it_may_read_anyway(api: Client, server: Server) -> None:
    machine = api.machine()
    pool = api.pool(machine)
    run = api.run(machine_id=machine)
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    api.run()
    key = server.stack.new_key(api.organization, scopes=["runs:execute"], machine_id=machine)
    with server.client(api.organization, key=key) as desk:
        for path in ("/v1/runs", f"/v1/runs/{run['id']}"):
            found = including(desk, path, "workflow,machine,machine.pools")["included"]
            assert [(one["type"], one["id"]) for one in found] == [
                ("workflow", run["workflow_id"]),
                ("machine", machine),
            ]
        assert [one["id"] for one in including(desk, "/v1/machines", "pools")["included"]] == [pool]


def test_what_is_foreign_is_never_included(api: Client, foreign: Client, server: Server) -> None:
    """Also if a row named it, which no request can make."""
    run, workflow, machine = api.run()["id"], foreign.workflow(), foreign.machine()
    server.stack.sql(
        "UPDATE runs SET workflow_id = $2::uuid, pinned_machine_id = $3::uuid WHERE id = $1", run, workflow, machine
    )
    found = including(api, f"/v1/runs/{run}", "workflow,machine,machine.pools")
    assert (found["workflow_id"], found["machine_id"], found["included"]) == (workflow, machine, [])
