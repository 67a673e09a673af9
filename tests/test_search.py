"""Search: runs by what they hold, workflows and machines by their names, and what a search could not look at."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.slow_rows import slow_rows
from tests.support.stack import Stack


def page_of(api: Client, path: str = "/v1/runs", **params: object) -> dict[str, Any]:
    page: dict[str, Any] = api.json_of(api.get(path, params={name: str(value) for name, value in params.items()}))
    return page


def found(api: Client, search: str, path: str = "/v1/runs", **params: object) -> list[str]:
    page = page_of(api, path, search=search, **params)
    ids = [item["id"] for item in page["items"]]
    assert (page["total"], page["total_is_estimate"], page["search_is_partial"]) == (len(ids), False, False)
    return ids


def test_runs_are_found_by_what_they_hold(api: Client, foreign: Client) -> None:
    runs: dict[str, str] = {}
    workflow_id = api.workflow()
    wanted: dict[str, dict[str, Any]] = {
        "input": {"input_values": {"customer": "Ada Lovelace", "deep": {"list": ["Ångström"]}}},
        "alias": {"start_session": True, "session_alias": "Morning Shift"},
        "output": {},
        "error": {},
    }
    for name, given in wanted.items():
        runs[name] = api.run(workflow_id=workflow_id, **given)["id"]
    for name in ("output", "error"):
        api.report(runs[name], status="running")
    api.report(
        runs["output"], status="success", output_data={"total": "100%_\\"}, run_message_history=[{"said": "Hush"}]
    )
    api.report(runs["error"], status="error", error=["The window", "Invoice 7 did not open"])
    foreign.run(input_values={"customer": "Ada Lovelace"})
    for text, names in {
        "ada love": ["input"],
        "ÅNGSTRÖM": ["input"],
        '"customer"': ["input"],
        "morning": ["alias"],
        "invoice 7": ["error"],
        "0%_": ["output"],
        "_": ["output"],
        "%": ["output"],
        "\\\\": ["output"],  # as JSON has it
        "100__": [],
        "1%0": [],
        "Hush": [],
        "scheduling": [],
        "": ["error", "output", "alias", "input"],
    }.items():
        assert found(api, text) == [runs[name] for name in names], text
    assert found(api, "hush", deep_search="true", workflow_id=workflow_id) == [runs["output"]]
    # Beside every other filter, in both orders.
    assert found(api, "o", status="error") == found(api, "o", status="error", order="changed") == [runs["error"]]
    assert found(api, "a", status="running", order="changed") == []
    # What an attempt said is gone with a retry, as for every reader.
    api.json_of(api.retry(runs["error"]))
    api.json_of(api.retry(runs["output"]))
    assert found(api, "invoice 7") == found(api, "100%") == []


def test_a_deep_search_says_what_it_needs(api: Client) -> None:
    run = api.run()
    for given in ({}, {"status": "error"}, {"order": "changed"}):
        reply = api.get("/v1/runs", params={"search": "x", "deep_search": "true", **given})
        assert reply.status_code == 422
        [problem] = reply.json()["detail"]
        assert (problem["loc"], problem["type"]) == (["query", "deep_search"], "deep_search")
        assert all(name in problem["msg"] for name in ("workflow_id", "machine_id", "session_id", "created_at_from"))
    for narrow in (
        {"workflow_id": run["workflow_id"]},
        {"created_at_from": run["created_at"]},
        {"changed_from": run["created_at"]},
    ):
        assert found(api, run["id"][9:], deep_search="true", **narrow) == [run["id"]]
    assert page_of(api, deep_search="true")["total"] == 1, "without a text there is nothing to search"


@pytest.mark.parametrize(
    "query",
    ["search=%00", "search=" + 201 * "x", "search=a&search=b", "search=a&wait=1", "search=a&deep_search=perhaps"],
)
@pytest.mark.parametrize("path", ["runs", "workflows", "machines"])
def test_what_cannot_be_searched_for(api: Client, path: str, query: str) -> None:
    if path != "runs" and ("wait" in query or "deep" in query):
        pytest.skip("runs have these")
    assert api.get(f"/v1/{path}?{query}").status_code == 422


def test_workflows_and_machines_are_found_by_name(api: Client, foreign: Client) -> None:
    bodies: dict[str, list[dict[str, Any]]] = {
        "workflows": [{"main_prompt": "x", "name": f"Post_invoices {number}"} for number in range(3)],
        "machines": [
            {"fingerprint": "f", "unkey_key_id": "k", "name": f"Desk {number}", "hostname": f"HOST{number}.post_"}
            for number in range(3)
        ],
    }
    for path, made in bodies.items():
        ids = [api.json_of(api.post(f"/v1/{path}", json=body), 201)["id"] for body in made]
        foreign.json_of(foreign.post(f"/v1/{path}", json=made[0]), 201)
        assert found(api, "POST_", f"/v1/{path}") == ids[::-1]
        assert found(api, made[1]["name"].lower(), f"/v1/{path}") == ids[1:2]
        assert found(api, ids[2][3:20].upper(), f"/v1/{path}") == ids[2:]
        assert found(api, "postx", f"/v1/{path}") == []
        first = page_of(api, f"/v1/{path}", search="post_", limit=2)
        assert ([one["id"] for one in first["items"]], first["total"]) == (ids[:0:-1], 3)
        second = page_of(api, f"/v1/{path}", search="post_", limit=2, after=first["next"])
        assert ([one["id"] for one in second["items"]], second["total"], second["next"]) == (ids[:1], 3, None)


# --- what a search cannot look at -------------------------------------------------------------------------------------


def add_runs(stack: Stack, api: Client, workflow_id: str, count: int, text: str, *, age_days: int) -> None:
    """Ended runs, a second apart, with these input values."""
    stack.sql(
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane, ended_at, created_at, changed_at, input_values)"
        " SELECT gen_random_uuid(), $1, $2::uuid, 'error', 'any', at, at, at, json_build_object('text', $5::text) FROM ("
        "  SELECT now() - make_interval(days => $4) - n * interval '1 s' AS at FROM generate_series(1, $3::int) AS n) AS one",
        api.organization,
        workflow_id,
        count,
        age_days,
        text,
    )


@pytest.mark.parametrize("order", ["created", "changed"])
def test_the_newest_ten_thousand_are_looked_at_and_next_goes_on(api: Client, stack: Stack, order: str) -> None:
    workflow_id = api.workflow()
    add_runs(stack, api, workflow_id, 10_000, "hay", age_days=1)
    add_runs(stack, api, workflow_id, 3, "needle", age_days=2)
    page = page_of(api, search="NEEDLE", order=order)
    assert (page["items"], page["search_is_partial"], page["total_is_estimate"]) == ([], True, True)
    seen: list[str] = []
    pages = 0
    while page["next"] is not None:
        page = page_of(api, search="NEEDLE", order=order, limit=2, after=page["next"])
        seen += [item["id"] for item in page["items"]]
        pages += 1
        assert page["total"] >= len(seen)
    assert (len(set(seen)), len(seen), page["total"], page["search_is_partial"]) == (3, 3, 3, False)
    assert pages < 10
    # The beginning of an id is looked for among all.
    for text in (seen[2], seen[2][:8], seen[2][:11].upper(), seen[2].replace("-", "")[:20]):
        page = page_of(api, search=text, order=order)
        assert [item["id"] for item in page["items"]] == [seen[2]], text
        assert (page["total"], page["search_is_partial"]) == (1, True)
        assert page_of(api, search=text, order=order, status="success")["items"] == []
    assert page_of(api, search=seen[2][1:9], order=order)["items"] == [], "not the beginning"
    assert page_of(api, search=seen[2][:7], order=order)["items"] == [], "too short a beginning"
    # It comes first, once, and others that hold it come after it.
    add_runs(stack, api, workflow_id, 2, f"see {seen[2]}", age_days=0)
    page = page_of(api, search=seen[2], order=order, limit=1)
    assert ([item["id"] for item in page["items"]], page["total"]) == ([seen[2]], 3)
    more = page_of(api, search=seen[2], order=order, limit=1, after=page["next"])
    rest = page_of(api, search=seen[2], order=order, limit=5, after=more["next"])
    assert [len(one["items"]) for one in (more, rest)] == [1, 1]
    assert seen[2] not in {item["id"] for one in (more, rest) for item in one["items"]}
    by_skip = page_of(api, search=seen[2], order=order)["items"]
    assert by_skip == page["items"] + more["items"] + rest["items"]


def test_a_search_ends_after_a_second_and_goes_on_from_there(api: Client, stack: Stack) -> None:
    add_runs(stack, api, api.workflow(), 100, "hay", age_days=20)
    add_runs(stack, api, api.workflow(), 1, "needle", age_days=21)
    with slow_rows(stack, api.organization):
        began = time.monotonic()
        page, pages = page_of(api, search="needle", fields="id"), 1
        assert page["search_is_partial"]
        while not page["items"]:
            assert page["next"] is not None
            page, pages = page_of(api, search="needle", fields="id", after=page["next"]), pages + 1
        took = time.monotonic() - began
    assert 1 < pages < 20
    assert took / pages < 3, "a second for each, and what one slice takes"
    assert page["total"] == 1


def test_searches_at_once_find_what_each_asks_for(api: Client) -> None:
    runs = [api.run(input_values={"number": f"<{number}>"})["id"] for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda number: found(api, f"<{number}>"), range(6))) == [[run] for run in runs]
