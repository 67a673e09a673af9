"""Lists of any length: pages by cursor, totals that are exact while lists are short and shared when they are long."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import combinations
from typing import Any
from uuid import uuid4

import pytest

from tests.support.client import Client
from tests.support.scrapes import scrape
from tests.support.server import Server
from tests.support.slow_rows import slow_rows
from tests.support.stack import Stack
from tests.support.waiting import until

EXACT = 10_000


def page_of(api: Client, path: str, **params: object) -> dict[str, Any]:
    page: dict[str, Any] = api.json_of(api.get(path, params={name: str(value) for name, value in params.items()}))
    more = {"/v1/runs": {"list_is_partial", "search_is_partial"}}
    more |= {searched: {"search_is_partial"} for searched in ("/v1/workflows", "/v1/machines")}
    assert page.keys() == {"items", "total", "total_is_estimate", "skip", "limit", "next"} | more.get(path, set())
    return page


def walked(api: Client, path: str, **params: object) -> list[Any]:
    """All items, by `next` alone."""
    items: list[Any] = []
    after: dict[str, str] = {}
    while True:
        page = page_of(api, path, **params, **after)
        assert len(page["items"]) == page["limit"] or page["next"] is None or page.get("list_is_partial")
        items += page["items"]
        if page["next"] is None:
            return items
        after = {"after": page["next"]}


def add_runs(stack: Stack, api: Client, count: int, age_days: int = 1) -> None:
    """Ended runs, a second apart, of a workflow of this organization."""
    stack.sql(
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane, ended_at, created_at, changed_at)"
        " SELECT gen_random_uuid(), $1, $2::uuid, 'success', 'any', at, at, at FROM ("
        "  SELECT now() - make_interval(days => $4) - n * interval '1 s' AS at FROM generate_series(1, $3::int) AS n) AS one",
        api.organization,
        api.workflow(),
        count,
        age_days,
    )


# --- cursors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lists(api: Client, stack: Stack) -> dict[str, int]:
    """Every list that has cursors, and how long it is."""
    run_id = api.finished()["id"]
    for number in range(6):
        api.pool()
        api.machine(status="disconnected")
        api.webhook_endpoint(f"https://localhost/{number}")
        api.json_of(api.retry(run_id))
        api.report(run_id, status="running")
        api.upload(run_id)
        api.run()
        if number < 5:
            api.report(run_id, status="error")
        else:
            api.report(run_id, status="success")
    [endpoint, *_] = page_of(api, "/v1/webhook-endpoints")["items"]
    stack.sql(
        "WITH event AS ("
        " INSERT INTO webhook_events (id, organization_id, run_id, attempt, event_type, occurred_at, is_fanned_out)"
        " SELECT gen_random_uuid(), $1, $2::uuid, n, 'run_complete', now(), true FROM generate_series(1, 7) AS n RETURNING id)"
        " INSERT INTO webhook_deliveries (id, organization_id, event_id, endpoint_id, status)"
        " SELECT gen_random_uuid(), $1, id, $3::uuid, 'delivered' FROM event",
        api.organization,
        run_id,
        endpoint["id"],
    )
    return {
        "/v1/runs": 7,
        "/v1/workflows": 7,
        "/v1/machines": 6,
        "/v1/pools": 6,
        "/v1/webhook-endpoints": 6,
        "/v1/run-attachments": 1,
        f"/v1/runs/{run_id}/attempts": 6,
        f"/v1/runs/{run_id}/events": 20,
        f"/v1/webhook-endpoints/{endpoint['id']}/deliveries": 7,
        f"/v1/runs/{run_id}/webhook-deliveries": 7,
    }


def test_the_pages_of_every_list_follow_each_other_by_cursor(api: Client, lists: dict[str, int]) -> None:
    for path, count in lists.items():
        whole = page_of(api, path)
        assert (whole["total"], whole["next"], whole["total_is_estimate"]) == (len(whole["items"]), None, False), path
        assert whole["total"] >= count, path
        for limit in (1, 2, 3, whole["total"]):
            assert walked(api, path, limit=limit) == whole["items"], path
        if whole["total"] > 3:
            first = page_of(api, path, limit=2)
            beyond = page_of(api, path, limit=1, skip=1, after=first["next"])
            assert beyond["items"] == whole["items"][3:4], "what is passed over comes after the cursor"
            assert (beyond["skip"], beyond["total"]) == (1, whole["total"])
            assert page_of(api, path, after="", limit=2) == first, "an empty one is none"


def test_what_is_no_cursor_of_the_list_is_refused_by_name(api: Client, lists: dict[str, int]) -> None:
    cursors = {path: page_of(api, path, limit=1)["next"] for path in lists}
    known = {path: cursor for path, cursor in cursors.items() if cursor is not None}
    assert len(known) == 9

    def encoded(text: str) -> str:
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    some = base64.urlsafe_b64decode(known["/v1/runs"] + "==").decode()
    wrong = [
        *("x", "!", "a" * 200, "a" * 201, "\u2603", "%00", known["/v1/runs"][:-1], known["/v1/runs"] + "="),
        *(encoded(text) for text in ("runs", some + " ", some + "0", some.replace("-", ""), some.upper())),
        encoded(f"runs {10**17 * 9} {uuid4()}"),
        encoded("attempts 9999999999"),
        "1.2.3",
    ]
    for path in known:
        foreign = [cursor for other, cursor in known.items() if other.split("/")[-1] != path.split("/")[-1]]
        if path.endswith("deliveries"):
            foreign = [cursor for other, cursor in known.items() if not other.endswith("deliveries")]
        for cursor in [*wrong, *foreign]:
            reply = api.get(path, params={"after": cursor})
            assert reply.status_code == 422, (path, cursor)
            [problem] = reply.json()["detail"]
            assert problem["loc"] == ["query", "after"]
            assert cursor not in problem["msg"] or len(cursor) < 4


def test_new_runs_move_nothing_on_the_pages_that_follow(api: Client) -> None:
    runs = [api.run()["id"] for _ in range(5)][::-1]
    first = page_of(api, "/v1/runs", limit=2)
    api.run()
    assert api.delete(f"/v1/runs/{runs[1]}").status_code == 204, "the very run that the cursor names"
    second = page_of(api, "/v1/runs", limit=2, after=first["next"])
    assert [run["id"] for run in second["items"]] == runs[2:4]
    assert second["total"] == 5


def test_filters_go_with_cursors(api: Client, stack: Stack) -> None:
    """One that means three conditions, and rows that were made at one moment."""
    machine_id, offline = api.machine(), api.machine(status="disconnected")
    session = api.run(machine_id=machine_id, start_session=True)["session_id"]
    until(
        lambda: page_of(api, "/v1/runs", machine_id=machine_id, status="scheduling")["items"][0]["assigned_machine_id"]
    )
    for number in range(4):
        api.run(session_id=session)
        api.run(machine_id=offline)
        api.run(machine_id=machine_id)
        if number:
            stack.sql("UPDATE runs SET created_at = $2 WHERE organization_id = $1", api.organization, datetime.now(UTC))
    for wanted, count in (
        ({"machine_id": machine_id}, 9),
        ({"machine_id": offline}, 4),
        ({"status": "scheduling"}, 13),
    ):
        whole = page_of(api, "/v1/runs", **wanted)
        assert whole["total"] == len(whole["items"]) == count
        assert walked(api, "/v1/runs", limit=2, **wanted) == whole["items"]
        assert walked(api, "/v1/runs", limit=2, fields="status", **wanted) == [
            {name: run[name] for name in ("id", "workflow_id", "machine_id", "status", "created_at")}
            for run in whole["items"]
        ]


# --- by the last change -----------------------------------------------------------------------------------------------


def ids(page: dict[str, Any]) -> list[str]:
    return [run["id"] for run in page["items"]]


@pytest.fixture
def changed_runs(api: Client) -> list[dict[str, Any]]:
    """Runs of every status, in sessions, of two workflows and on machines; whole, as they are when all has settled."""
    machines = [api.machine(), api.machine(status="disconnected")]
    workflows = [api.workflow(), api.workflow()]
    made = []
    for number in range(12):
        run = api.run(
            workflow_id=workflows[number % 2],
            machine_id=machines[1] if number % 3 else None,
            start_session=number % 6 == 1,
        )
        made.append(run["id"])
        if number % 3 == 0:
            until(lambda: api.get_run(made[-1])["assigned_machine_id"], what="it is on the machine that is up")
        if number < 10:
            code = {"error_code": f"window.{number}"} if number in (2, 5) else {}
            api.report(made[-1], status=("running", "cancelled", "error")[number % 3], **code)
        if number % 3 == 0:
            api.report(made[-1], status=("success", "error")[number % 2])
    for number in (1, 6, 0):  # the oldest ones have changed last
        api.json_of(api.retry(made[number]))
    api.report(made[6], status="cancelled")
    until(lambda: api.get_run(made[0])["assigned_machine_id"])
    return [api.get_run(run_id) for run_id in made]


def test_runs_by_their_last_change(api: Client, changed_runs: list[dict[str, Any]]) -> None:
    made = [run["id"] for run in changed_runs]
    newest = sorted(changed_runs, key=lambda run: run["changed_at"], reverse=True)
    assert [made.index(run["id"]) for run in newest[:4]] == [6, 0, 1, 11]
    page = page_of(api, "/v1/runs", order="changed")
    assert (page["items"], page["total"], page["list_is_partial"]) == (newest, 12, False)
    assert walked(api, "/v1/runs", order="changed", limit=5) == newest
    assert ids(page_of(api, "/v1/runs")) == ids(page_of(api, "/v1/runs", order="created")) == made[::-1]
    assert api.get("/v1/runs", params={"order": "age"}).status_code == 422
    first = page_of(api, "/v1/runs", order="changed", limit=1)["next"]
    for other in ({}, {"order": "changed", "workflow_id": newest[0]["workflow_id"]}):
        assert api.get("/v1/runs", params={"after": first, **other}).status_code == 422, "a cursor of another list"
    # A run that changes between two pages comes first, and moves no other.
    api.report(made[1], status="cancelled")
    assert page_of(api, "/v1/runs", order="changed", after=first, limit=2)["items"] == newest[1:2] + newest[3:4]


def test_every_filter_means_the_same_in_every_order(api: Client, changed_runs: list[dict[str, Any]]) -> None:
    times = sorted(run["changed_at"] for run in changed_runs)
    terminal = ("success", "error", "cancelled", "task_failed")
    some = changed_runs[7]
    filters: dict[str, tuple[object, Any]] = {
        "status": ("cancelled", lambda run: run["status"] == "cancelled"),
        "workflow_id": (some["workflow_id"], lambda run: run["workflow_id"] == some["workflow_id"]),
        "machine_id": (some["machine_id"], lambda run: run["machine_id"] == some["machine_id"]),
        "session_id": (some["session_id"], lambda run: run["session_id"] == some["session_id"]),
        "created_at_to": (
            changed_runs[8]["created_at"],
            lambda run: run["created_at"] <= changed_runs[8]["created_at"],
        ),
        "error_code": ("window.5", lambda run: run["error_code"] == "window.5"),
        "changed_from": (times[3], lambda run: run["changed_at"] >= times[3]),
        "changed_to": (times[9], lambda run: run["changed_at"] <= times[9]),
        "ended_from": (times[2], lambda run: run["status"] in terminal and run["changed_at"] >= times[2]),
        "ended_to": (times[8], lambda run: run["status"] in terminal and run["changed_at"] <= times[8]),
    }
    seen = 0
    for names in [*combinations(filters, 1), *combinations(filters, 2), ("workflow_id", "status", "changed_from")]:
        for order in ("created", "changed"):
            wanted = {name: filters[name][0] for name in names}
            expected = [run for run in changed_runs if all(filters[name][1](run) for name in names)]
            expected.sort(key=lambda run: run[f"{order}_at"], reverse=True)
            page = page_of(api, "/v1/runs", order=order, **wanted)
            assert page["items"] == expected, (names, order)
            assert (page["total"], page["next"], page["list_is_partial"]) == (len(expected), None, False)
            if len(names) == 1 and len(expected) > 3:
                assert walked(api, "/v1/runs", order=order, limit=2, **wanted) == expected, (names, order)
                beyond = page_of(api, "/v1/runs", order=order, skip=2, limit=1, **wanted)
                assert (beyond["items"], beyond["total"]) == (expected[2:3], len(expected))
            seen += len(expected)
    assert seen > 200
    assert ids(page_of(api, "/v1/runs", status="running", ended_to=times[9])) == []


def test_beside_another_filter_the_newest_ten_thousand_changes_are_looked_at(api: Client, stack: Stack) -> None:
    hidden = api.finished()
    wanted = {"workflow_id": hidden["workflow_id"]}
    newer = api.finished(workflow_id=hidden["workflow_id"])["id"]
    stack.sql("UPDATE runs SET changed_at = now() - interval '2 days' WHERE id = $1", hidden["id"])
    add_runs(stack, api, EXACT - 2)
    everything = page_of(api, "/v1/runs", order="changed", **wanted)
    assert (ids(everything), everything["total"], everything["list_is_partial"]) == ([newer, hidden["id"]], 2, False)
    add_runs(stack, api, 2)
    for order, window in (("changed", {}), ("created", {"changed_to": datetime.now(UTC).isoformat()})):
        page = page_of(api, "/v1/runs", order=order, **wanted, **window)
        assert (ids(page), page["total"]) == ([newer], 1)
        assert (page["total_is_estimate"], page["list_is_partial"]) == (True, True)
    page = page_of(api, "/v1/runs", order="changed", limit=1, **wanted)
    assert ids(page) == [newer]
    page = page_of(api, "/v1/runs", order="changed", limit=1, after=page["next"], **wanted)
    assert (ids(page), page["total"], page["list_is_partial"]) == ([hidden["id"]], 2, False), "from there on it saw all"
    # An empty page goes on, too.
    stack.sql(
        "UPDATE runs SET changed_at = now() - interval '3 days' WHERE workflow_id = $1::uuid", hidden["workflow_id"]
    )
    page = page_of(api, "/v1/runs", order="changed", **wanted)
    assert (page["items"], page["total"], page["list_is_partial"]) == ([], 0, True)
    assert len(walked(api, "/v1/runs", order="changed", **wanted)) == 2


# --- totals -----------------------------------------------------------------------------------------------------------


def counts(server: Server) -> float:
    """How often a long list of runs was counted."""
    return scrape(server.url).total("db_client_operation_duration_seconds_count", db_query_summary="runs.count")


def test_up_to_ten_thousand_a_total_is_exact_to_the_moment(api: Client, server: Server, stack: Stack) -> None:
    add_runs(stack, api, EXACT - 2)
    before = counts(server)
    workflow_id, runs = api.workflow(), []
    for number in (EXACT - 1, EXACT):
        runs.append(api.run(workflow_id=workflow_id)["id"])
        assert page_of(api, "/v1/runs", limit=1)["total"] == number
    assert counts(server) == before, "it comes with the page"
    for number in (EXACT - 1, EXACT, EXACT - 1):
        if number == EXACT:
            runs.append(api.run(workflow_id=workflow_id)["id"])
        else:
            assert api.delete(f"/v1/runs/{runs.pop()}").status_code == 204
        assert page_of(api, "/v1/runs", limit=1)["total"] == number
    # From the other side: once a list was long, it is looked at again when it is not.
    add_runs(stack, api, 3)
    assert page_of(api, "/v1/runs", limit=1)["total"] == EXACT + 2
    stack.sql(
        "DELETE FROM runs WHERE id IN (SELECT id FROM runs WHERE organization_id = $1 AND workflow_id <> $2::uuid LIMIT 3)",
        api.organization,
        workflow_id,
    )
    until(lambda: page_of(api, "/v1/runs", limit=1)["total"] == EXACT - 1, 5)
    runs.append(api.run(workflow_id=workflow_id)["id"])
    assert page_of(api, "/v1/runs", limit=1)["total"] == EXACT
    api.delete(f"/v1/runs/{runs.pop()}")
    assert page_of(api, "/v1/runs", limit=1)["total"] == EXACT - 1


def test_a_long_list_is_counted_once_for_all_and_is_a_second_old_at_most(
    api: Client, foreign: Client, server: Server, stack: Stack
) -> None:
    add_runs(stack, api, EXACT + 500)
    add_runs(stack, foreign, EXACT + 700)
    workflow_id = api.workflow()
    before, began, asked = counts(server), time.monotonic(), 0
    with ThreadPoolExecutor(8) as threads:
        while time.monotonic() - began < 2:
            pages = list(threads.map(lambda _: page_of(api, "/v1/runs", limit=1), range(16)))
            assert {page["total"] for page in pages} == {EXACT + 500}
            asked += len(pages)
    took = time.monotonic() - began
    assert asked > 16
    assert 1 <= counts(server) - before <= took + 1, f"{asked} pages in {took:.1f} s"
    # Each organization and each filter has its own.
    assert page_of(foreign, "/v1/runs", limit=1)["total"] == EXACT + 700
    assert page_of(api, "/v1/runs", limit=1, status="success")["total"] == EXACT + 500
    assert page_of(api, "/v1/runs", limit=1, status="scheduling")["total"] == 0
    api.run(workflow_id=workflow_id)
    created = time.monotonic()
    until(lambda: page_of(api, "/v1/runs", limit=1)["total"] == EXACT + 501, 10)
    assert time.monotonic() - created < 5, "a second, on a busy machine"
    assert page_of(api, "/v1/runs", limit=1, status="scheduling")["total"] == 1, "short lists are exact beside it"
    # What lies beyond the end is not looked for, and deep pages are there by both ways.
    beyond = page_of(api, "/v1/runs", limit=5, skip=2**31 - 1)
    assert (beyond["items"], beyond["total"], beyond["next"]) == ([], EXACT + 501, None)
    last = page_of(api, "/v1/runs", limit=100, skip=EXACT + 450)
    assert (len(last["items"]), last["next"]) == (51, None)
    deep = page_of(api, "/v1/runs", limit=1, skip=EXACT + 449)
    assert page_of(api, "/v1/runs", limit=100, after=deep["next"])["items"] == last["items"]


def test_a_list_that_takes_too_long_to_count_or_to_pass_over_is_no_outage(
    api: Client, server: Server, stack: Stack
) -> None:
    add_runs(stack, api, EXACT + 100)
    add_runs(stack, api, 500, age_days=20)
    stack.sql("VACUUM ANALYZE runs")
    with slow_rows(stack, api.organization):
        before = counts(server)
        with ThreadPoolExecutor(4) as threads:
            pages = list(threads.map(lambda _: page_of(api, "/v1/runs", limit=2), range(4)))
        for page in pages:
            assert page["total_is_estimate"]
            assert page["total"] > EXACT
            assert len(page["items"]) == 2
        assert page_of(api, "/v1/runs", limit=2, after=pages[0]["next"])["total_is_estimate"]
        assert counts(server) - before == 1, "counting is not tried again at once"
        reply = api.get("/v1/runs", params={"skip": EXACT + 550, "limit": 1})
        assert reply.status_code == 422
        [problem] = reply.json()["detail"]
        assert (problem["loc"], problem["type"]) == (["query", "skip"], "skip_too_large")
        assert "after=" in problem["msg"]
