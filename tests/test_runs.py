"""The life of a run around the retry, over HTTP: create, list, read, report, wait, release, fall silent, delete."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from tests.support.client import RUN_KEYS, Client, file_input, file_inputs, secret_path
from tests.support.scheduling import starts
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import until

STATUSES = ("scheduling", "running", "success", "cancelled", "error", "task_failed")
TERMINAL = ("success", "cancelled", "error", "task_failed")
NOBODY = "00000000-0000-4000-8000-000000000000"

# The out-of-scope keys that SDKs send, and one that nobody knows.
UNKNOWN = {"main_prompt": "x", "model_metadata": {"a": 1}, "usage_metadata": {"a": 1}, "of_a_newer_sdk": [1]}


def brought_to(api: Client, status: str, **options: object) -> dict[str, Any]:
    """A run in this status, by the shortest way."""
    run = api.run(**options)
    if status != "scheduling":
        run = api.report(run["id"], status="running")
    return run if status in ("scheduling", "running") else api.report(run["id"], status=status)


def code(reply: httpx.Response) -> tuple[int, object]:
    """Status, and what the refusal says: its code, or where the first error is."""
    if reply.is_success:
        return reply.status_code, None
    problem = reply.json()
    return reply.status_code, problem["code"] if "code" in problem else problem["detail"][0]["loc"]


# --- create -----------------------------------------------------------------------------------------------------------


def test_a_new_run_shows_what_was_asked_for(server: Server, stack: Stack) -> None:
    user_id, organization = uuid4(), f"org-{uuid4().hex}"
    with server.client(organization, key=stack.new_key(organization, user_id)) as api:
        workflow_id, pool_id, machine_id = api.workflow(), api.pool(), api.machine(is_available=False)
        asked = {
            "workflow_id": workflow_id,
            "machine_id": machine_id,
            "pool_ids": [pool_id],
            "input_values": {"a": {"b": [1.0, None]}},
            "start_session": True,
            "session_alias": "first",
            "release_session_after": False,
            "is_priority": True,
        }
        reply = api.post("/v1/runs", json=asked | UNKNOWN | {"sensitive_input_values": {"pw": "x"}})
        run = api.json_of(reply, 201)
        assert run.keys() == RUN_KEYS
        assert run == run | {name: value for name, value in asked.items() if name != "start_session"} | {
            "user_id": str(user_id),
            "organization_id": organization,
            "status": "scheduling",
            "attempt": 1,
            "session_id": run["id"],
            "scheduling_reason": "machine_offline",
            "input_attachment_ids": [],
            "output_attachment_ids": [],
        }
        assert run["created_at"].endswith("Z")
        assert secret_path(run).startswith(f"runs/{organization}/{run['id']}/")
        nothing = ("error", "output_data", "run_message_history", "started_at", "ended_at", "assigned_machine_id")
        assert [run[name] for name in nothing] == [None] * len(nothing)
        assert api.get_run(run["id"]) == run


def test_null_equals_absent_at_creation(api: Client) -> None:
    names = ("input_values", "sensitive_input_values", "file_inputs", "machine_id", "pool_ids", "session_id")
    more = ("start_session", "session_alias", "release_session_after", "is_priority")
    bare, nulls = api.run(), api.run(**dict.fromkeys((*names, *more)))
    own = ("id", "workflow_id", "created_at", "changed_at")
    assert {name: bare[name] for name in bare if name not in own} == {
        name: nulls[name] for name in nulls if name not in own
    }
    assert api.run(file_inputs=[file_input(target_path=None, cleanup_imports_after_run=None)])["input_attachment_ids"]


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/bulk"])
def test_what_cannot_be_created(api: Client, foreign: Client, path: str, stack: Stack) -> None:
    base: dict[str, object] = {"workflow_id": api.workflow(), "count": 2}
    session_id = api.run(start_session=True)["session_id"]
    before = api.json_of(api.get("/v1/runs"))["total"]
    cases: list[tuple[dict[str, object], tuple[int, object]]] = [
        ({"workflow_id": NOBODY}, (404, "workflow_not_found")),
        ({"workflow_id": foreign.workflow()}, (404, "workflow_not_found")),
        ({"machine_id": NOBODY}, (404, "machine_not_found")),
        ({"machine_id": foreign.machine()}, (404, "machine_not_found")),
        ({"pool_ids": [api.pool(), foreign.pool()]}, (404, "pool_not_found")),
        ({"session_id": NOBODY}, (404, "session_not_found")),
        ({"session_id": foreign.run(start_session=True)["session_id"]}, (404, "session_not_found")),
        ({"session_id": session_id, "start_session": True}, (422, ["body", "start_session"])),
        ({"session_alias": "x"}, (422, ["body", "session_alias"])),
        ({"workflow_id": None}, (422, ["body", "workflow_id"])),
        ({"file_inputs": [file_input(filename="a/b")]}, (422, ["body", "file_inputs", 0, "filename"])),
        ({"file_inputs": file_inputs(101)}, (413, "payload_too_large")),
        ({"sensitive_input_values": {str(n): "x" for n in range(401)}}, (413, "payload_too_large")),
    ]
    for options, expected in cases:
        assert code(api.post(path, json=base | options)) == expected, options
        with_secret = {"sensitive_input_values": {"pw": "x"}} | options
        assert code(api.post(path, json=base | with_secret)) == expected, options
    assert api.json_of(api.get("/v1/runs"))["total"] == before
    assert stack.secret_paths(f"runs/{api.organization}/") == set()


# --- bulk -------------------------------------------------------------------------------------------------------------


def test_bulk_runs_share_nothing_but_the_session(api: Client, stack: Stack) -> None:
    body = {
        "workflow_id": api.workflow(),
        "count": 3,
        "sensitive_input_values": {"pw": "x"},
        "file_inputs": [file_input(b"1", "1.txt"), file_input(b"2", "2.txt")],
        "start_session": True,
        "session_alias": "all",
    }
    reply = api.json_of(api.post("/v1/runs/bulk", json=body), 201)
    assert (reply.keys(), reply["failed_count"], reply["errors"]) == ({"created_runs", "failed_count", "errors"}, 0, [])
    runs = reply["created_runs"]
    assert [api.get_run(run["id"]) for run in runs] == runs
    assert [run["scheduling_reason"] for run in runs] == ["waiting_for_machine"] + ["waiting_for_session"] * 2
    [session_id] = {run["session_id"] for run in runs}
    assert session_id not in {run["id"] for run in runs}
    paths = {secret_path(run) for run in runs}
    assert len(paths) == 3
    assert [stack.secret(path) for path in paths] == [{"pw": "x"}] * 3
    assert len(stack.blobs(api.organization)) == len({one for run in runs for one in run["input_attachment_ids"]}) == 6
    for run in runs:
        files = [api.json_of(api.get(f"/v1/run-attachments/{one}")) for one in run["input_attachment_ids"]]
        assert [(file["run_id"], file["filename"]) for file in files] == [(run["id"], "1.txt"), (run["id"], "2.txt")]
    # One goes with its own secret and files, and with no other's.
    assert api.delete(f"/v1/runs/{runs[0]['id']}").status_code == 204
    until(lambda: stack.secret(secret_path(runs[0])) is None, what="its secret is destroyed")
    until(lambda: len(stack.blobs(api.organization)) == 4, what="its files are deleted")
    assert len(stack.secret_paths(f"runs/{api.organization}/")) == 2


@pytest.mark.parametrize("count", [None, 0, -1, 1001, "2", 1.5, True])
def test_bulk_counts_that_are_refused(api: Client, count: object) -> None:
    reply = api.post("/v1/runs/bulk", json={"workflow_id": api.workflow(), "count": count})
    assert code(reply) == (422, ["body", "count"])


def test_bulk_is_limited_by_the_bytes_of_all_copies(stack: Stack) -> None:
    server = start_server(stack, MAX_BODY_BYTES=10_000)
    try:
        with server.client() as api:
            body = {"workflow_id": api.workflow(), "file_inputs": file_inputs(2, b"x" * 1000)}
            too_many = api.post("/v1/runs/bulk", json=body | {"count": 6})
            assert code(too_many) == (413, "payload_too_large")
            assert api.json_of(api.get("/v1/runs"))["total"] == 0
            assert len(api.json_of(api.post("/v1/runs/bulk", json=body | {"count": 5}), 201)["created_runs"]) == 5
    finally:
        server.app.stop()


def test_a_large_bulk_waits_for_its_own_writes_as_long_as_they_go_on(stack: Stack) -> None:
    """All writes together take longer than a call may wait for a slot; none of them is slow."""
    server = start_server(stack, VAULT_CONCURRENCY=1, VAULT_TIMEOUT_SECONDS=1)
    try:
        with server.client() as api:
            body = {"workflow_id": api.workflow(), "count": 700, "sensitive_input_values": {"pw": "x"}}
            assert len(api.json_of(api.post("/v1/runs/bulk", json=body), 201)["created_runs"]) == 700
    finally:
        server.app.stop()


# --- list -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(api: Client, foreign: Client) -> list[dict[str, Any]]:
    """Runs 0 to 7, oldest first: two workflows, two statuses, two sessions."""
    foreign.run()
    workflows = [api.workflow() for _ in range(2)]
    sessions = [api.run(workflow_id=workflows[0], start_session=True) for _ in range(2)]
    runs = sessions + [
        api.run(workflow_id=workflows[number % 2], session_id=sessions[number // 2 % 2]["id"]) for number in range(6)
    ]
    return [
        api.report(run["id"], status="cancelled") if number in (2, 3, 5) else run for number, run in enumerate(runs)
    ]


def listed(api: Client, runs: list[dict[str, Any]], **params: Any) -> tuple[list[int], int]:
    """Which of these runs, in the order of the list, and the total."""
    page = api.json_of(api.get("/v1/runs", params=params))
    assert page.keys() == {
        "items",
        "total",
        "total_is_estimate",
        "skip",
        "limit",
        "next",
        "list_is_partial",
        "search_is_partial",
    }
    assert (page["skip"], page["limit"]) == (params.get("skip", 0), params.get("limit", 100))
    ids = [run["id"] for run in runs]
    return [ids.index(item["id"]) for item in page["items"]], page["total"]


def test_filters_alone_and_together(api: Client, many: list[dict[str, Any]]) -> None:
    def where(**wanted: str) -> tuple[list[int], int]:
        found = [number for number, run in enumerate(many) if all(run[name] == wanted[name] for name in wanted)]
        return found[::-1], len(found)

    workflow_id, session_id = many[3]["workflow_id"], many[1]["session_id"]
    assert listed(api, many) == where() == ([7, 6, 5, 4, 3, 2, 1, 0], 8)
    combinations: list[dict[str, str]] = [
        {"workflow_id": workflow_id},
        {"status": "cancelled"},
        {"session_id": session_id},
        {"workflow_id": workflow_id, "status": "cancelled"},
        {"workflow_id": workflow_id, "session_id": session_id, "status": "scheduling"},
        {"workflow_id": NOBODY},
        {"session_id": NOBODY, "status": "running"},
    ]
    for wanted in combinations:
        assert listed(api, many, **wanted) == where(**wanted), wanted
    start, end = many[2]["created_at"], many[6]["created_at"]
    assert listed(api, many, created_at_from=start, created_at_to=end) == ([6, 5, 4, 3, 2], 5)
    assert listed(api, many, created_at_from=start, created_at_to=end, status="cancelled") == ([5, 3, 2], 3)
    assert listed(api, many, created_at_to=start.removesuffix("Z")) == ([2, 1, 0], 3)
    for skip in range(0, 10, 3):
        rest = [7, 6, 5, 4, 3, 2, 1, 0][skip : skip + 3]
        assert listed(api, many, skip=skip, limit=3) == (rest, 8)
    assert listed(api, many, status="cancelled", skip=1, limit=1) == ([3], 3)


@pytest.mark.parametrize(
    "query",
    [
        *("skip=-1", "skip=x", "limit=0", "limit=1001", "status=failed", "status="),
        *("workflow_id=x", "machine_id=x", "session_id=x", "created_at_from=yesterday", "created_at_to=5"),
        *("fields=nothing", "fields=id,%00", "wait=-1", "wait=31", "wait=nan", "wait=x"),
    ],
)
def test_a_bad_query_is_refused_at_once(api: Client, query: str) -> None:
    began = time.monotonic()
    reply = api.get(f"/v1/runs?{query}" if query.startswith("wait") else f"/v1/runs?{query}&wait=30")
    assert code(reply) == (422, ["query", query.partition("=")[0]])
    assert reply.json()["detail"][0]["msg"] != "Is not valid."
    assert time.monotonic() - began < 25


BASE = {"id", "workflow_id", "machine_id", "status", "created_at"}


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        (["error"], {"error"}),
        (["input_values,output_data", "id"], {"input_values", "output_data"}),
        (["main_prompt"], {"main_prompt"}),
        ([""], set()),
        ([",".join(sorted(RUN_KEYS))], RUN_KEYS),
    ],
)
def test_a_projection_has_its_fields_and_the_base(api: Client, fields: list[str], more: set[str]) -> None:
    run = api.finished("error", input_values={"a": 1})
    [item] = api.json_of(api.get("/v1/runs", params={"fields": fields}))["items"]
    assert item == {name: run[name] for name in BASE | more}


def test_the_machine_filter_means_the_machine_that_is_shown(api: Client) -> None:
    machine_id, other = api.machine(), api.machine()
    pool_id = api.pool(machine_id)
    holder = starts(api, start_session=True, pool_ids=[pool_id])
    held = api.run(session_id=holder["session_id"], machine_id=other)  # the session's machine wins over the pin
    waiting = api.run(machine_id=machine_id)
    done = starts(api, machine_id=other)
    api.report(done["id"], status="success")
    runs = [holder, held, waiting, done]
    assert [api.get_run(run["id"])["machine_id"] for run in runs] == [machine_id, machine_id, machine_id, other]
    assert listed(api, runs, machine_id=machine_id) == ([2, 1, 0], 3)
    assert listed(api, runs, machine_id=machine_id, status="scheduling") == ([2, 1], 2)
    assert listed(api, runs, machine_id=machine_id, skip=1, limit=1) == ([1], 3)
    assert listed(api, runs, machine_id=other) == ([3], 1)
    assert listed(api, runs, machine_id=NOBODY) == ([], 0)


def test_a_finished_run_never_shows_a_machine_that_it_was_not_on(api: Client) -> None:
    """Its own is gone, or it never had one; the session has gone on elsewhere."""
    machine_id, offline = api.machine(), api.machine(status="disconnected")
    done = starts(api, start_session=True)
    session_id = done["session_id"]
    never = api.run(session_id=session_id)
    pinned = api.run(session_id=session_id, machine_id=offline)
    assert [run["machine_id"] for run in (never, pinned)] == [machine_id] * 2, "while it waits, the session's decides"
    for run in (never, pinned):
        api.report(run["id"], status="cancelled")
    api.report(done["id"], status="success")
    assert api.delete(f"/v1/machines/{machine_id}").status_code == 204
    other = api.machine()
    moved = api.run(session_id=session_id)
    assert until(lambda: api.get_run(moved["id"])["machine_id"]) == other
    runs = [done, never, pinned, moved]
    assert [api.get_run(run["id"])["machine_id"] for run in runs] == [None, None, offline, other]
    assert listed(api, runs, machine_id=other) == ([3], 1)
    assert listed(api, runs, machine_id=offline) == ([2], 1)


# --- wait -------------------------------------------------------------------------------------------------------------


def test_a_waiting_list_answers_as_soon_as_it_has_a_run(api: Client) -> None:
    machine_id, workflow_id = api.machine(), api.workflow()
    reports: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"machine_id": machine_id, "status": "scheduling"}, {}),
        ({"machine_id": machine_id, "status": "running"}, {"status": "running"}),
        ({"workflow_id": workflow_id, "status": "success"}, {"status": "success"}),
    ]
    run_id = ""
    with ThreadPoolExecutor(1) as executor:
        for query, report in reports:
            began = time.monotonic()
            waiting = executor.submit(api.get, "/v1/runs", params=query | {"wait": 30})
            if report:
                api.report(run_id, **report)
            else:
                run_id = api.run(workflow_id=workflow_id)["id"]
            assert [item["id"] for item in api.json_of(waiting.result())["items"]] == [run_id]
            assert time.monotonic() - began < 25, query


def test_a_waiting_list_without_a_run_is_empty_in_the_end(api: Client) -> None:
    offline = api.machine(status="disconnected")
    wish = api.run(machine_id=offline)
    began = time.monotonic()
    query: dict[str, Any] = {"machine_id": offline, "status": "scheduling", "wait": 0.5}
    assert [item["id"] for item in api.json_of(api.get("/v1/runs", params=query))["items"]] == [wish["id"]]
    assert api.json_of(api.get("/v1/runs", params={"status": "running", "wait": 0.1}))["items"] == []
    assert time.monotonic() - began >= 0.6


# --- read -------------------------------------------------------------------------------------------------------------


def test_unknown_and_foreign_runs_get_the_same_reply(api: Client, foreign: Client) -> None:
    api.headers["X-Request-ID"] = "the-same"  # which a refusal names
    theirs = foreign.finished()
    replies = [
        reply
        for run_id in (theirs["id"], str(uuid4()))
        for reply in (
            api.get(f"/v1/runs/{run_id}"),
            api.get(f"/v1/runs/{run_id}/attempts"),
            api.patch(f"/v1/runs/{run_id}", json={"status": "error"}),
            api.patch(f"/v1/runs/{run_id}", json={"attempt": 99}),
            api.delete(f"/v1/runs/{run_id}"),
        )
    ]
    assert {code(reply) for reply in replies} == {(404, "run_not_found")}
    assert len({reply.content for reply in replies}) == 1
    assert foreign.get_run(theirs["id"]) == theirs


# --- report -----------------------------------------------------------------------------------------------------------

NEXT = {
    "scheduling": {"scheduling", "running", "error", "cancelled"},
    "running": {"running", *TERMINAL},  # task_failed too: only an executor that has begun knows it
    **{status: {status} for status in TERMINAL},
}


@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("after", [*STATUSES, None])
def test_every_transition(api: Client, before: str, after: str | None) -> None:
    for attempt in (None, 1, 2):
        run = brought_to(api, before)
        reply = api.patch(f"/v1/runs/{run['id']}", json={"status": after, "attempt": attempt} | UNKNOWN)
        target = after or before
        if attempt == 2:
            assert code(reply) == (409, "attempt_superseded")
            assert "attempt 1" in reply.json()["detail"]
        elif target not in NEXT[before]:
            assert code(reply) == (409, "invalid_transition")
            assert before in reply.json()["detail"]
            assert ("retry" in reply.json()["detail"]) == (before in TERMINAL)
        else:
            run = api.json_of(reply)
            assert run.keys() == RUN_KEYS
            assert run["status"] == target
            assert (run["started_at"] is None) == (before == "scheduling" and target != "running")
            assert (run["ended_at"] is None) == (target in ("scheduling", "running"))
        assert api.get_run(run["id"]) == run


TIMES = ("started_at", "ended_at")
PRODUCED: dict[str, Any] = {
    "error": ["it broke", ""],
    "error_code": "app.window_2",
    "output_data": {"answer": {"": 42}},
    "run_message_history": [{"role": "assistant"}, {}],
    "started_at": "2026-01-31T11:00:00.123456Z",
    "ended_at": "2026-01-31T12:00:00Z",
}


@pytest.mark.parametrize("name", [*PRODUCED, "output_attachment_ids"])
def test_a_scheduling_run_accepts_no_results(api: Client, name: str) -> None:
    run = brought_to(api, "scheduling")
    for status in ({}, {"status": "scheduling"}):
        reply = api.patch(f"/v1/runs/{run['id']}", json={name: PRODUCED.get(name, []), **status})
        assert code(reply) == (409, "invalid_transition")
    assert api.report(run["id"], **{name: None}, input_values={"a": 1}) == run | {"input_values": {"a": 1}}


@pytest.mark.parametrize(("before", "after"), [("scheduling", "error"), ("running", "success"), ("error", None)])
def test_results_are_kept_as_reported(api: Client, before: str, after: str | None) -> None:
    run = brought_to(api, before)
    ended = api.report(run["id"], status=after, input_values={"a": 1}, release_session_after=False, **PRODUCED)
    kept = PRODUCED if after else PRODUCED | {name: run[name] for name in TIMES}  # of an ended run, times are ignored
    assert ended == ended | kept | {"input_values": {"a": 1}, "release_session_after": False}
    # Absent keeps; null empties what may be empty: a terminal run has ended.
    assert api.report(run["id"]) == ended
    values = ("error", "error_code", "output_data", "run_message_history", "input_values", "release_session_after")
    emptied = api.report(run["id"], **dict.fromkeys((*values, "started_at", "ended_at", "output_attachment_ids")))
    assert emptied == ended | dict.fromkeys(values)
    retried = api.json_of(api.retry(run["id"]))
    assert {name: retried[name] for name in PRODUCED} == dict.fromkeys(PRODUCED)


def test_what_a_report_does_not_name_stays(api: Client) -> None:
    run_id = brought_to(api, "running")["id"]
    history = [{"role": "assistant", "content": "x" * 100_000}]
    api.report(run_id, output_data={"a": 1})
    api.report(run_id, run_message_history=history)
    assert api.report(run_id, output_data={"b": 2})["run_message_history"] == history
    ended = api.report(run_id, status="success", run_message_history=None)
    assert (ended["output_data"], ended["run_message_history"]) == ({"b": 2}, None)


def test_a_time_reported_early_is_kept(api: Client) -> None:
    run_id = brought_to(api, "running")["id"]
    times = {name: PRODUCED[name] for name in TIMES}
    api.report(run_id, **times)
    ended = api.report(run_id, status="success")
    assert {name: ended[name] for name in times} == times


def test_an_end_before_the_start_is_refused_or_shown_as_the_start(api: Client) -> None:
    run = brought_to(api, "running")
    reply = api.patch(
        f"/v1/runs/{run['id']}", json={name: PRODUCED[name] for name in TIMES} | {"ended_at": "2026-01-31"}
    )
    assert reply.status_code == 422
    early, late = "2026-01-31T11:00:00Z", "2026-01-31T11:00:00.000001Z"
    for status in ({}, {"status": "success"}):
        body = {"started_at": late, "ended_at": early, **status}
        assert code(api.patch(f"/v1/runs/{run['id']}", json=body)) == (422, ["body", "ended_at"])
    assert api.get_run(run["id"]) == run
    # Against the start that is stored, and the other way round: the executor's clock is wrong, and its work is not lost.
    assert api.report(run["id"], ended_at=early)["ended_at"] == run["started_at"]
    assert api.report(run["id"], started_at="2999-01-01T00:00:00Z")["ended_at"] == "2999-01-01T00:00:00Z"
    ended = api.report(run["id"], status="success", ended_at=early)
    assert (ended["started_at"], ended["ended_at"]) == ("2999-01-01T00:00:00Z",) * 2
    assert ended["changed_at"] < "2999"
    again = api.report(run["id"], status="success", started_at=early, ended_at=late)
    assert again == ended, "times of a run that has ended are ignored"
    # The service's own end, too.
    other = brought_to(api, "running")["id"]
    api.report(other, started_at="2999-01-01T00:00:00Z")
    cancelled = api.report(other, status="cancelled")
    assert cancelled["ended_at"] == cancelled["started_at"]


def test_only_a_new_status_is_a_change(api: Client) -> None:
    """Created, retried, started, ended: by the database's clock. Not an assignment, and not one more report."""
    machine_id = api.machine(status="disconnected")
    run = api.run(machine_id=machine_id)
    assert run["changed_at"] >= run["created_at"]
    api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"status": "connected"}))
    assigned = until(lambda: (found := api.get_run(run["id"]))["assigned_machine_id"] and found)
    assert assigned["changed_at"] == run["changed_at"]
    seen = [run["changed_at"]]
    for change in ({"status": "running"}, {"status": "error"}, None, {"status": "cancelled"}):
        changed = api.json_of(api.retry(run["id"])) if change is None else api.report(run["id"], **change)
        seen.append(changed["changed_at"])
        again = api.report(run["id"], input_values={"a": 1})
        assert again["changed_at"] == changed["changed_at"]
    assert seen == sorted(set(seen))


BAD_REPORTS: dict[str, list[Any]] = {
    "status": ["running_checks", "done", "", 1],
    "attempt": [0, "1", 1.5, 2**31],
    "error": ["it broke", [1], ["\x00"]],
    "error_code": ["", "Not lower", "a" * 101, "a\n", "ä", ["a"], 1],
    "output_data": [[], "x", {"a": "\x00"}, {"\x00": 1}],
    "run_message_history": [{}, ["x"], [{"a": 2**63 + 1}]],
    "started_at": [5, "yesterday", "2026-01-31"],
    "output_attachment_ids": ["x", ["x"], [NOBODY]],
    "input_values": [[]],
    "release_session_after": ["yes"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_REPORTS for value in BAD_REPORTS[name]])
def test_a_bad_report_is_refused(api: Client, name: str, value: object) -> None:
    run = brought_to(api, "running")
    status, loc = code(api.patch(f"/v1/runs/{run['id']}", json={name: value}))
    assert (status, isinstance(loc, list) and loc[:2]) == (422, ["body", name])
    assert api.get_run(run["id"]) == run


def test_output_attachments_are_what_was_uploaded(api: Client) -> None:
    run_id = brought_to(api, "running", file_inputs=[file_input()])["id"]
    [own_input] = api.get_run(run_id)["input_attachment_ids"]
    other = api.upload(brought_to(api, "running")["id"])["id"]
    uploaded = [api.upload(run_id)["id"] for _ in range(2)]
    for ids in (uploaded, uploaded[1:], uploaded[:1] * 2, [], None):
        assert api.report(run_id, output_attachment_ids=ids)["output_attachment_ids"] == uploaded
    for ids in ([other], [own_input], [*uploaded, other], [*uploaded, NOBODY]):
        reply = api.patch(f"/v1/runs/{run_id}", json={"status": "success", "output_attachment_ids": ids})
        assert code(reply) == (422, ["body", "output_attachment_ids"])
    assert api.get_run(run_id)["status"] == "running"
    # What has expired is gone, here too, before its row is collected.
    api.json_of(api.put(f"/v1/run-attachments/{uploaded[0]}", json={"expires_at": "2020-01-01T00:00:00Z"}))
    assert api.get_run(run_id)["output_attachment_ids"] == uploaded[1:]
    assert code(api.patch(f"/v1/runs/{run_id}", json={"output_attachment_ids": uploaded}))[0] == 422


def test_reports_of_a_superseded_attempt_change_nothing(api: Client) -> None:
    run_id = brought_to(api, "error")["id"]
    api.json_of(api.retry(run_id))
    running = api.report(run_id, status="running", attempt=2)
    for report in ({"status": "success"}, {"output_data": {"late": 1}}, {}):
        assert code(api.patch(f"/v1/runs/{run_id}", json={"attempt": 1} | report)) == (409, "attempt_superseded")
    assert api.get_run(run_id) == running


# --- the end of a session ---------------------------------------------------------------------------------------------

RELEASES: dict[str, Callable[[Client, str, str], object]] = {
    "at creation": lambda api, run_id, status: api.report(run_id, status=status),
    "before the end": lambda api, run_id, status: (
        api.report(run_id, release_session_after=True),
        api.report(run_id, status=status),
    ),
    "with the end": lambda api, run_id, status: api.report(run_id, status=status, release_session_after=True),
    "after the end": lambda api, run_id, status: (
        api.report(run_id, status=status),
        api.report(run_id, release_session_after=True),
    ),
    "with the same end again": lambda api, run_id, status: (
        api.report(run_id, status=status),
        api.report(run_id, status=status, release_session_after=True),
    ),
    "by a retry": lambda api, run_id, status: (
        api.report(run_id, status="error"),
        api.json_of(api.retry(run_id, release_session_after=True)),
        api.report(run_id, status="running"),
        api.report(run_id, status=status),
    ),
    "never": lambda api, run_id, status: (
        api.report(run_id, release_session_after=False),
        api.report(run_id, status=status),
        api.report(run_id, release_session_after=None),
    ),
}


@pytest.mark.parametrize("when", RELEASES)
@pytest.mark.parametrize("status", TERMINAL)
def test_release_at_any_end(api: Client, when: str, status: str) -> None:
    machine_id = api.machine()
    run = starts(api, start_session=True, release_session_after=when == "at creation")
    # A machine that is away takes no run, so nothing else changes its reservation.
    machine = api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"is_available": False}))
    assert machine["reserved_session_id"] == run["session_id"]
    RELEASES[when](api, run["id"], status)
    reserved = api.json_of(api.get(f"/v1/machines/{machine_id}"))["reserved_session_id"]
    assert reserved == (run["session_id"] if when == "never" else None)
    assert api.get_run(run["id"])["session_id"] == run["session_id"]


# --- silence ----------------------------------------------------------------------------------------------------------


def test_a_run_that_falls_silent_ends_in_error(stack: Stack) -> None:
    server = start_server(stack, RUN_SILENCE_SECONDS=3600, SECRET_RETENTION_SECONDS=0)
    try:
        with server.client() as api:
            machine_id = api.machine()
            silent = starts(api, sensitive_input_values={"pw": "x"})
            talking, waiting = brought_to(api, "running"), api.run()
            hours = "UPDATE runs SET reported_at = now() - interval '2 hours', queued_at = now() - interval '2 hours'"
            stack.sql(f"{hours} WHERE id = $1", UUID(silent["id"]))
            until(lambda: api.get_run(silent["id"])["status"] == "error", what="the silent run's end")
            ended = api.get_run(silent["id"])
            assert ended["error_code"] == "executor_lost"
            assert ["3600 seconds" in sentence for sentence in ended["error"]] == [True]
            moved = ("status", "error", "error_code", "ended_at", "changed_at", "last_report_at")
            assert ended == silent | {name: ended[name] for name in moved}
            assert api.get_run(talking["id"]) == talking
            until(lambda: api.get_run(waiting["id"])["assigned_machine_id"] == machine_id, what="its machine is free")
            until(lambda: stack.secret(secret_path(silent)) is None, what="its secret's retention has begun")
            # Any PATCH breaks the silence; a run that waits, or has ended, is not silent.
            stack.sql(f"{hours} WHERE organization_id = $1 AND status <> 'running'", api.organization)
            assert api.report(talking["id"])["status"] == "running"
            assert api.get_run(waiting["id"])["status"] == "scheduling"
            assert code(api.patch(f"/v1/runs/{silent['id']}", json={"status": "success"}))[0] == 409
    finally:
        server.app.stop()


# --- delete -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", STATUSES)
def test_delete_takes_everything_of_a_run_in_any_status(api: Client, stack: Stack, status: str) -> None:
    kept = api.run(sensitive_input_values={"pw": "kept"}, file_inputs=[file_input()])
    run = api.finished("error", sensitive_input_values={"pw": "x"}, file_inputs=[file_input()])
    if status != "error":
        api.json_of(api.retry(run["id"]))  # an archived attempt
    if status not in ("scheduling", "error"):
        api.report(run["id"], status="running")
        api.upload(run["id"])
    if status in ("success", "cancelled"):
        api.report(run["id"], status=status)
    gone = api.delete(f"/v1/runs/{run['id']}")
    assert (gone.status_code, gone.content) == (204, b"")
    for reply in (
        api.get(f"/v1/runs/{run['id']}"),
        api.get(f"/v1/runs/{run['id']}/attempts"),
        api.retry(run["id"]),
        api.delete(f"/v1/runs/{run['id']}"),
    ):
        assert code(reply) == (404, "run_not_found")
    assert [item["id"] for item in api.json_of(api.get("/v1/runs"))["items"]] == [kept["id"]]
    attachments = api.json_of(api.get("/v1/run-attachments"))["items"]
    assert [item["id"] for item in attachments] == kept["input_attachment_ids"]
    until(lambda: stack.secret_paths(f"runs/{api.organization}/") == {secret_path(kept)}, what="its secret is gone")
    until(lambda: stack.blobs(api.organization) == {attachments[0]["storage_path"]}, what="its files are gone")


@pytest.mark.parametrize("active", [True, False])
def test_delete_releases_the_session_of_an_active_run_alone(api: Client, *, active: bool) -> None:
    """A finished run has released it, if it was to: what is reserved now belongs to others."""
    machine_id = api.machine()
    run = starts(api, start_session=True, release_session_after=True)
    api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"is_available": False}))
    if not active:
        api.report(run["id"], status="success")
        other = api.run(session_id=run["session_id"])["id"]
        api.json_of(api.patch(f"/v1/machines/{machine_id}", json={"is_available": True}))
        until(lambda: api.get_run(other)["assigned_machine_id"] == machine_id, what="the session's next run")
    assert api.delete(f"/v1/runs/{run['id']}").status_code == 204
    reserved = api.json_of(api.get(f"/v1/machines/{machine_id}"))["reserved_session_id"]
    assert reserved == (None if active else run["session_id"])
