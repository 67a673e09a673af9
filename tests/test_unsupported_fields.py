"""Nothing that changes what a run does is dropped in silence: it is stored and returned, or refused by its name."""

from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.client import Client, file_input
from tests.support.server import Server

NOBODY = str(uuid4())
MODEL = str(uuid4())

# Anything but null: what a caller means by an empty value we cannot know either.
VALUES: list[Any] = [{"a": 1}, {}, ["x"], [], "x", "", 0, False]

WORKFLOW = (
    *("terminal_command_allowlist", "model_metadata", "post_run_check_failure_cleanup_prompt"),
    *("workflow_metadata", "post_run_checks"),
)
MACHINE = ("machine_parameters", "machine_sensitive_parameters")
POOL = ("pool_parameters", "pool_sensitive_parameters")


def refused(reply: Any, *loc: str) -> None:
    assert reply.status_code == 422, reply.text
    [error] = reply.json()["detail"]
    assert (error["loc"], error["type"]) == (list(loc), "not_supported")
    assert "leave it out" in error["msg"]


class Things:
    """One of each, and the bodies that are accepted."""

    def __init__(self, api: Client) -> None:
        self.run = api.run()["id"]
        self.finished = api.finished()["id"]
        workflow, machine, pool = api.workflow(), api.machine(status="disconnected"), api.pool()
        run = {"workflow_id": workflow}
        self.writes: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
            ("POST", "/v1/runs", run, ("post_run_checks",)),
            ("POST", "/v1/runs/bulk", run | {"count": 2}, ("post_run_checks",)),
            ("PATCH", f"/v1/runs/{self.run}", {}, ("post_run_checks",)),
            ("POST", "/v1/workflows", {"main_prompt": "x"}, WORKFLOW),
            ("PATCH", f"/v1/workflows/{workflow}", {}, WORKFLOW),
            ("POST", "/v1/machines", {"fingerprint": "f", "unkey_key_id": "k"}, MACHINE),
            ("PATCH", f"/v1/machines/{machine}", {}, MACHINE),
            ("POST", "/v1/pools", {"name": "p"}, POOL),
            ("PATCH", f"/v1/pools/{pool}", {}, POOL),
            (
                "POST",
                f"/v1/runs/{self.finished}/retry",
                {},
                ("post_run_checks", "main_prompt", "main_agent_model_id", "model_metadata"),
            ),
        ]
        self.attempts = f"/v1/runs/{self.run}/attempts"
        self.lists = ["/v1/runs", "/v1/workflows", "/v1/machines", "/v1/pools", "/v1/run-attachments"]
        self.reads = [
            *self.lists,
            f"/v1/runs/{self.run}",
            self.attempts,
            f"/v1/workflows/{workflow}",
            f"/v1/machines/{machine}",
            f"/v1/pools/{pool}",
        ]


def test_fields_that_are_known_and_not_supported_are_refused(api: Client) -> None:
    things = Things(api)
    before = {path: api.get(path).content for path in things.reads}
    for method, path, body, names in things.writes:
        for name in names:
            for value in VALUES:
                refused(api.request(method, path, json=body | {name: value}), "body", name)
    assert {path: api.get(path).content for path in things.reads} == before


def test_their_null_is_accepted_and_so_is_every_key_that_nobody_knows(api: Client) -> None:
    for method, path, body, names in Things(api).writes:
        reply = api.request(method, path, json=body | dict.fromkeys(names) | {"of_a_newer_sdk": [{"x": 1}]})
        assert reply.is_success, reply.text


@pytest.mark.parametrize(
    "query",
    [
        *("search=x", "include=x", "tag_ids=1", "sort_mode=activity", "sort_mode=x"),
        *("deep_search=true", "deep_search=1", "deep_search=x", "include_tags=true", "include_tags=True"),
    ],
)
def test_queries_that_are_known_and_not_supported_are_refused(api: Client, query: str) -> None:
    things = Things(api)
    name = query.partition("=")[0]
    including = {path for path in things.reads if path.split("/")[2] in ("runs", "machines", "pools")} - {
        things.attempts
    }
    supported = {
        "search": {"/v1/runs", "/v1/workflows", "/v1/machines"},
        "deep_search": {"/v1/runs"},
        "include": including,
    }
    for path in set(things.reads) - supported.get(name, set()):
        refused(api.get(f"{path}?{query}"), "query", name)
        refused(api.get(f"{path}?x=1&{query}&limit=0"), "query", query.partition("=")[0])


@pytest.mark.parametrize(
    "query",
    [
        "deep_search=false&include_tags=false&include_machines=false&sort_mode=created_at_desc",
        "deep_search=False&include_tags=0&search=&include=&tag_ids=&sort_mode=",
        "of_a_newer_sdk=1&x=&Search=x",
    ],
)
def test_their_defaults_are_accepted_and_so_is_every_parameter_that_nobody_knows(api: Client, query: str) -> None:
    for path in Things(api).reads:
        assert api.json_of(api.get(f"{path}?{query}")) == api.json_of(api.get(path)), path


def test_the_defaults_that_the_newest_sdk_always_sends_are_accepted(api: Client) -> None:
    always = {"is_priority": False, "start_session": False}
    workflow = {"main_prompt": "x", "includes_file_exports": False, "is_webhooks_enabled": False}
    workflow_id = api.json_of(api.post("/v1/workflows", json=workflow), 201)["id"]
    run = api.run(workflow_id=workflow_id, **always, file_inputs=[file_input(cleanup_imports_after_run=False)])
    api.json_of(api.post("/v1/runs/bulk", json={"workflow_id": workflow_id, "count": 1} | always), 201)
    api.report(run["id"], status="cancelled")
    api.json_of(api.retry(run["id"], reuse_session=True, start_session=False))


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_a_prompt_and_models_of_a_run_are_kept_by_a_retry_and_its_usage_goes_with_its_outputs(api: Client) -> None:
    metadata = {"cache_detection_model_id": MODEL, "of_a_newer_sdk": [1.5, None, {"é": "☃"}]}
    run = api.run(main_prompt="Do that. ☃", model_metadata=metadata)
    assert (run["main_prompt"], run["model_metadata"], run["usage_metadata"]) == ("Do that. ☃", metadata, None)
    assert api.get_run(run["id"]) == run
    api.report(run["id"], status="running")
    usage = {"tokens": {"in": 12, "out": 3.5}, "": None}
    reported = api.report(run["id"], usage_metadata=usage, output_data={"a": 1})
    assert reported["usage_metadata"] == usage
    # Absent keeps, and what one report says another does not touch.
    assert api.report(run["id"], output_data={"a": 2})["usage_metadata"] == usage
    ended = api.report(run["id"], status="success")
    assert ended["usage_metadata"] == usage
    [listed] = api.json_of(api.get("/v1/runs"))["items"]
    assert listed == ended
    [projected] = api.json_of(api.get("/v1/runs?fields=usage_metadata,main_prompt,model_metadata"))["items"]
    assert (
        projected.items() >= {"usage_metadata": usage, "main_prompt": "Do that. ☃", "model_metadata": metadata}.items()
    )
    for overrides in ({}, {"input_values": {"a": 1}}, {"sensitive_input_values": {"pw": "x"}}):
        again = api.json_of(api.retry(run["id"], **overrides))
        kept = (again["main_prompt"], again["model_metadata"], again["usage_metadata"])
        assert kept == ("Do that. ☃", metadata, None)
        assert api.get_run(run["id"]) == again
        api.report(run["id"], status="running", usage_metadata={"tokens": 1})
        assert api.report(run["id"], status="error", usage_metadata=None)["usage_metadata"] is None


def test_the_usage_of_an_ended_run_can_be_reported_late(api: Client) -> None:
    run = api.finished()
    assert api.report(run["id"], usage_metadata={"cost": 1}) == run | {"usage_metadata": {"cost": 1}}


def test_the_main_agents_model_is_stored_in_the_metadata(api: Client) -> None:
    assert api.run(main_agent_model_id=MODEL)["model_metadata"] == {"main_agent_model_id": MODEL}
    given = {"main_agent_model_id": NOBODY, "fallback_model_1_id": NOBODY}
    run = api.run(main_agent_model_id=MODEL, model_metadata=given)
    assert run["model_metadata"] == given | {"main_agent_model_id": MODEL}
    assert api.run(main_agent_model_id=None, model_metadata=given)["model_metadata"] == given
    assert api.run(main_agent_model_id=None, model_metadata=None, main_prompt=None)["model_metadata"] is None
    reply = api.post("/v1/runs", json={"workflow_id": api.workflow(), "main_agent_model_id": "x"})
    assert [error["loc"] for error in api.json_of(reply, 422)["detail"]] == [["body", "main_agent_model_id"]]


def test_every_run_of_a_bulk_has_them(api: Client) -> None:
    body = {"workflow_id": api.workflow(), "count": 3, "main_prompt": "x", "model_metadata": {"a": 1}}
    made = api.json_of(api.post("/v1/runs/bulk", json=body | {"main_agent_model_id": MODEL}), 201)["created_runs"]
    assert [(run["main_prompt"], run["model_metadata"]) for run in made] == [
        ("x", {"a": 1, "main_agent_model_id": MODEL})
    ] * 3
    assert [api.get_run(run["id"]) for run in made] == made


@pytest.mark.parametrize("name", ["model_metadata", "usage_metadata"])
@pytest.mark.parametrize("value", [[1], "x", {"a": "\0"}, {"a\0": 1}, {"a": 2**63 + 1}, {"a": "x" * (256 * 1024)}])
def test_metadata_that_cannot_be_stored_is_refused(api: Client, name: str, value: object) -> None:
    if name == "usage_metadata":
        reply = api.patch(f"/v1/runs/{api.run()['id']}", json={name: value})
    else:
        reply = api.post("/v1/runs", json={"workflow_id": api.workflow(), name: value})
    assert [error["loc"] for error in api.json_of(reply, 422)["detail"]] == [["body", name]]


# --- routes -----------------------------------------------------------------------------------------------------------

ROUTES = {
    "/v1/runs/chain": "/v1/runs/chain",
    f"/v1/runs/{NOBODY}/generate-trajectory": "/v1/runs/{run_id}/generate-trajectory",
    "/v1/runs/x/trajectory": "/v1/runs/{run_id}/trajectory",
    f"/v1/runs/{NOBODY}/image/signed-url": "/v1/runs/{run_id}/image/signed-url",
    "/v1/workflows/prompt-image": "/v1/workflows/prompt-image",
    "/v1/workflows/prompt-images": "/v1/workflows/prompt-images",
    "/v1/workflows/bulk/tags": "/v1/workflows/bulk/tags",
    f"/v1/workflows/{NOBODY}/tags/{NOBODY}": "/v1/workflows/{workflow_id}/tags/{tag_id}",
    f"/v1/machines/{NOBODY}/cyberdriver/shutdown": "/v1/machines/{machine_id}/cyberdriver/shutdown",
    f"/v1/computer/{NOBODY}/display/screenshot": "/v1/computer",
    "/v1/trajectories": "/v1/trajectories",
    f"/v1/trajectories/{NOBODY}/duplicate": "/v1/trajectories",
    "/v1/connections": "/v1/connections",
    "/v1/model-configurations": "/v1/model-configurations",
    "/v1/usage/aggregate": "/v1/usage",
    "/v1/request-logs": "/v1/request-logs",
    "/v1/provider-credentials/openai": "/v1/provider-credentials",
    "/v1/workflow-tags/reorder": "/v1/workflow-tags",
    "/v1/workflow-tag-groups": "/v1/workflow-tag-groups",
}


def test_routes_of_the_vendor_that_are_not_here_are_refused_by_name(api: Client, server: Server) -> None:
    for path, name in ROUTES.items():
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            reply = api.request(method, f"{path}?limit=1", json={})
            problem = api.json_of(reply, 404)
            assert (problem["code"], problem["route"]) == ("not_supported", name), (method, path)
            assert name in problem["detail"]
        assert httpx.get(server.url + path, trust_env=False, verify=False).status_code == 401


def test_what_only_looks_like_one_of_them_is_what_it_was(api: Client) -> None:
    for path in ("/v1/tagsx", "/v1/nothing", "/trajectories", "/v1/runs/chain/x", "/v1/workflows/x/tagsx"):
        assert api.json_of(api.get(path), 404)["code"] == "route_not_found"
    [error] = api.json_of(api.get("/v1/runs/chains"), 422)["detail"]
    assert error["type"] == "uuid_parsing"


def test_the_vendors_paths_of_health_are_answered(server: Server) -> None:
    for path in ("/health", "/health/db"):
        reply = httpx.get(server.url + path, trust_env=False, verify=False)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok", "down": [], "reasons": {}})


def test_the_health_of_machines_needs_a_key_and_speaks_of_its_own(api: Client, foreign: Client, server: Server) -> None:
    path = "/v1/health/machines"
    assert httpx.get(server.url + path, trust_env=False, verify=False).status_code == 401
    foreign.machine(status="disconnected")
    nothing = api.json_of(api.get(path))
    assert (nothing["status"], nothing["checked_machines"], nothing["errored_machines"]) == ("ok", 0, [])
    api.machine()
    assert api.json_of(api.get(path)).items() >= {"status": "ok", "checked_machines": 1, "healthy_machines": 1}.items()
    broken = [api.machine(name="desk", status="disconnected"), api.machine(status="error")]
    found = api.json_of(api.get(path), 503)
    assert (found["status"], found["scope"]) == ("error", "organization")
    assert (found["checked_machines"], found["healthy_machines"]) == (3, 1)
    errors = {one["machine_id"]: one for one in found["errored_machines"]}
    assert errors.keys() == set(broken)
    assert errors[broken[0]].items() >= {"machine_name": "desk", "organization_id": api.organization}.items()
    assert "disconnected" in errors[broken[0]]["error"]
    bound = server.stack.new_key(api.organization, scopes=["runs:execute"], machine_id=broken[0])
    with server.client(api.organization, key=bound) as desk:
        assert desk.json_of(desk.get(path), 503)["checked_machines"] == 1
    writer = server.stack.new_key(api.organization, scopes=["runs:write"])
    with server.client(api.organization, key=writer) as client:
        assert client.get(path).status_code == 403
