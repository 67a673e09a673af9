"""What a request carries has bounds, and so has what is made of it: no request costs others their time or memory."""

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from pydantic import SecretStr

from app.access.auth import Principal
from app.config import Settings
from app.resources.machines import list_machines
from app.resources.pools import list_pools
from app.resources.workflows import list_workflows
from app.runs.attachments import list_attachments
from app.runs.listing import FIELDS, RunFilter, list_runs
from app.stores.database import Database
from app.stores.paging import Slice
from tests.support.client import Client, file_input, file_inputs
from tests.support.server import Server, start_server
from tests.support.stack import Stack

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Server]:
    """A server that has seen nothing else, so that its memory says something."""
    started = start_server(stack)
    yield started
    started.app.stop()


class Watch:
    """What the server's process used within a block."""

    def __init__(self, server: Server) -> None:
        self._process = Path(f"/proc/{server.app.pid}")
        self._psutil = psutil.Process(server.app.pid)

    def _status(self, name: str) -> int:
        [line] = [line for line in (self._process / "status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024

    def _processor_seconds(self) -> float:
        """Its own work: what others do with the machine does not count."""
        times = self._psutil.cpu_times()
        return times.user + times.system

    def __enter__(self) -> "Watch":
        (self._process / "clear_refs").write_text("5")  # the peak begins anew
        self._before = self._status("VmRSS")
        self._began = self._processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._processor_seconds() - self._began
        self.grown = self._status("VmHWM") - self._before


def code(reply: httpx.Response) -> tuple[int, Any]:
    """A refusal: its status, and its code or where it is and of what kind."""
    body = reply.json()
    if reply.status_code == 422:
        return 422, [(error["loc"], error["type"]) for error in body["detail"]]
    return reply.status_code, body.get("code")


def send(api: Client, method: str, path: str, content: str) -> httpx.Response:
    return api.request(method, path, content=content, headers={"Content-Type": "application/json"})


# --- errors -----------------------------------------------------------------------------------------------------------


def many(value: str, count: int) -> str:
    return f"[{','.join([value] * count)}]"


NUL = '{"a": "\\u0000"}'
POOL = f'"{uuid4()}"'
LONG_NAMES = {f"{number:0256d}": 1 for number in range(1000)}

# Lists of a megabyte and less, each item of which is wrong; and how the request is refused.
LISTS: dict[str, tuple[str, str, str, tuple[int, Any]]] = {
    "empty files": ("POST", "/v1/runs", f'"file_inputs": {many("{}", 100_000)}', (413, "payload_too_large")),
    "numbers for files": ("POST", "/v1/runs", f'"file_inputs": {many("1", 200_000)}', (413, "payload_too_large")),
    "files in files": ("POST", "/v1/runs", f'"file_inputs": {many(many("{}", 90), 1_000)}', (413, "payload_too_large")),
    "files of a retry": ("POST", "retry", f'"file_inputs": {many("{}", 100_000)}', (413, "payload_too_large")),
    "files of a bulk": ("POST", "/v1/runs/bulk", f'"file_inputs": {many("{}", 100_000)}', (413, "payload_too_large")),
    "long history": ("PATCH", "run", f'"run_message_history": {many("{}", 110_000)}', (422, "too_long")),
    "history of numbers": ("PATCH", "run", f'"run_message_history": {many("1", 100_000)}', (422, "dict_type")),
    "history of lists": ("PATCH", "run", f'"run_message_history": {many(many("[]", 20), 5_000)}', (422, "dict_type")),
    "history of NUL": (
        "PATCH",
        "run",
        f'"run_message_history": {many(NUL, 66_000)}',
        (422, "string_nul"),
    ),
    "errors": ("PATCH", "run", f'"error": {many("{}", 1000)}', (422, "string_type")),
    "outputs": ("PATCH", "run", f'"output_attachment_ids": {many("[]", 1000)}', (422, "uuid_type")),
    "pools": ("POST", "/v1/runs", f'"pool_ids": {many(POOL, 25_000)}', (422, "too_long")),
    "no pools": ("POST", "/v1/runs", f'"pool_ids": {many("1", 200_000)}', (422, "uuid_type")),
    "names": ("PATCH", "run", f'"input_values": {json.dumps(LONG_NAMES)}', (422, "name_too_long")),
}


@pytest.mark.parametrize("what", LISTS)
def test_an_error_for_each_of_very_many_items_is_never_made(api: Client, server: Server, what: str) -> None:
    method, path, field, (status, kind) = LISTS[what]
    run_id = api.run()["id"]
    paths = {"run": f"/v1/runs/{run_id}", "retry": f"/v1/runs/{run_id}/retry"}
    content = f'{{"workflow_id": "{api.workflow()}", "count": 1, {field}}}'
    with Watch(server) as watch:
        reply = send(api, method, paths.get(path, path), content)
    assert reply.status_code == status, reply.text
    assert kind in reply.text
    assert len(reply.content) < 4096
    assert watch.seconds < 0.4, "it was 3.7 s; it is 0.04 s"
    assert watch.grown < 100 * MIB, f"{watch.grown // MIB} MiB; it was 900"


def test_the_errors_of_several_files_are_shown_together(api: Client) -> None:
    files = [file_input(filename="a/b"), file_input(), file_input() | {"content": "%"}]
    reply = api.post("/v1/runs", json={"workflow_id": api.workflow(), "file_inputs": files})
    assert code(reply) == (
        422,
        [(["body", "file_inputs", 0, "filename"], "filename"), (["body", "file_inputs", 2, "content"], "base64")],
    )


def test_a_list_of_ids_has_a_thousand_at_most(api: Client) -> None:
    path, ids = f"/v1/pools/{api.pool()}/machines", [str(uuid4()) for _ in range(1001)]
    assert code(api.post(path, json={"machine_ids": ids})) == (422, [(["body", "machine_ids"], "too_long")])
    assert api.post(path, json={"machine_ids": ids[:1000]}).json()["code"] == "machine_not_found"


# --- sentences --------------------------------------------------------------------------------------------------------


def test_of_very_many_errors_twenty_are_shown(api: Client) -> None:
    files = [{"filename": "a.txt", "content": "no base64"}] * 30
    reply = api.retry(api.finished()["id"], file_inputs=files)
    assert reply.status_code == 422, reply.text
    assert [error["loc"][2] for error in reply.json()["detail"]] == list(range(20))


def test_a_refusal_says_the_bound_or_the_allowed_values(api: Client) -> None:
    """They are ours; what was sent is not in it."""
    run, pool, long = f"/v1/runs/{api.run()['id']}", f"/v1/pools/{api.pool()}", "zqxjk" * 60_000
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        (
            "PATCH",
            run,
            {"status": "zqxjk"},
            "'scheduling', 'running', 'success', 'cancelled', 'error' or 'task_failed'",
        ),
        ("PATCH", run, {"attempt": 0}, "1 or more"),
        ("PATCH", run, {"attempt": 2**31}, "2147483647 or less"),
        ("PATCH", run, {"error": ["zqxjk"] * 1001}, "at most 1000 entries"),
        ("PATCH", run, {"error": ["zqxjk" * 20_001]}, "at most 100000 characters"),
        ("PATCH", run, {"input_values": {"zqxjk" * 52: 1}}, "at most 255 characters"),
        ("PATCH", run, {"input_values": {f"zqxjk{n}": 1 for n in range(1001)}}, "at most 1000 entries"),
        ("PATCH", run, {"usage_metadata": {"zqxjk": long}}, "at most 262144 bytes"),
        ("PATCH", pool, {"description": long}, "at most 10000 characters"),
        ("PATCH", pool, {"name": ""}, "1 or more characters"),
        ("PATCH", pool, {"name": long}, "at most 255 characters"),
        ("POST", "/v1/workflows", {"main_prompt": long}, "at most 262144 bytes"),
        ("POST", "/v1/workflows", {"main_prompt": "x", "input_schema": "☃" * 87_382}, "at most 262144 bytes"),
        ("POST", "/v1/run-attachments", file_input() | {"content_type": "zqxjk"}, "like text/csv"),
        ("POST", "/v1/runs", {"pool_ids": [pool.rpartition("/")[2]] * 101}, "at most 100 entries"),
        ("GET", "/v1/runs?limit=1001", {}, "1000 or less"),
        ("GET", "/v1/runs?limit=0", {}, "1 or more"),
        ("GET", "/v1/runs?wait=31", {}, "30"),
        ("GET", "/v1/runs?status=zqxjk", {}, "'scheduling', 'running'"),
        ("GET", "/v1/runs?fields=zqxjk", {}, "run_message_history"),
        ("GET", "/v1/machines?status=zqxjk", {}, "'connected', 'disconnected' or 'error'"),
    ]
    for method, path, body, bound in cases:
        reply = api.request(method, path, json=body or None)
        assert reply.status_code == 422, (path, reply.text)
        assert any(bound in error["msg"] for error in reply.json()["detail"]), (path, reply.text)
        assert "zqxjk" not in reply.text
        assert "Is not valid." not in reply.text


def test_what_is_just_within_a_bound_is_accepted(api: Client) -> None:
    prompt = "☃" * (256 * 1024 // 3)
    body = {"main_prompt": prompt, "input_schema": prompt, "output_schema": prompt, "name": "n" * 255}
    workflow = api.json_of(api.post("/v1/workflows", json=body), 201)
    assert workflow == workflow | body
    run = api.run(main_prompt=prompt, input_values={"n" * 255: 1}, sensitive_input_values={"☃" * 255: "x"})
    assert (run["main_prompt"], run["input_values"]) == (prompt, {"n" * 255: 1})
    pool = {"name": "n", "description": "☃" * 10_000}
    assert api.json_of(api.post("/v1/pools", json=pool), 201).items() >= pool.items()


LARGEST_ERROR = 256 * 1024


def test_the_lines_of_an_error_have_a_bound_in_all(api: Client, stack: Stack) -> None:
    """In bytes as they are in JSON, so that a default page of the list fits whatever they are."""
    run = api.run()
    path = f"/v1/runs/{run['id']}"
    api.report(run["id"], status="running")
    most = [["x" * 65_536] * 4, ["é" * 32_768] * 4, ["☃" * 87_381, "x"], ["\x01" * 43_690, "\n\n"], ["x" * 262] * 1000]
    for lines in most:
        if len(lines) < 1000:
            reply = api.patch(path, json={"error": [*lines, "x"]})
            assert code(reply) == (422, [(["body", "error"], "too_many_bytes_in_all")])
            assert str(LARGEST_ERROR) in reply.text
        assert api.report(run["id"], error=lines)["error"] == lines
    assert code(api.patch(path, json={"error": ["x" * 263] * 1000})) == (
        422,
        [(["body", "error"], "too_many_bytes_in_all")],
    )
    # What was stored before stays, and can be read.
    stack.sql("UPDATE runs SET error = ARRAY[repeat('x', 1000000)] WHERE id = $1", run["id"])
    assert api.get_run(run["id"])["error"] == ["x" * 1_000_000]


def test_a_default_page_of_the_longest_errors_fits(api: Client, stack: Stack) -> None:
    workflow = api.workflow()
    stack.sql(
        "INSERT INTO runs (id, organization_id, workflow_id, status, error, created_at, queued_at, lane, queue_rank, ended_at)"
        " SELECT gen_random_uuid(), $1, $2, 'error', ARRAY[repeat(E'\\x01', 43690)] || array_fill(''::text, ARRAY[999]),"
        " now(), now(), '', 0, now() FROM generate_series(1, 100)",
        api.organization,
        workflow,
    )
    assert len(api.json_of(api.get("/v1/runs"))["items"]) == 100


# --- bulk -------------------------------------------------------------------------------------------------------------

TOO_MUCH: dict[str, dict[str, Any]] = {
    "a secret": {"count": 100, "sensitive_input_values": {"pw": "x" * 900_000}},
    "names of secrets": {"count": 1000, "sensitive_input_values": {f"{n:03d}{'é' * 250}": "x" for n in range(400)}},
    "files": {"count": 1000, "file_inputs": file_inputs(20, b"")},
    "the bytes of files": {"count": 200, "file_inputs": [file_input(b"x" * MIB)]},
    "input values": {"count": 1000, "input_values": {"a": "x" * 90_000}},
    "a prompt": {"count": 1000, "main_prompt": "x" * 100_000},
    "a prompt of what JSON escapes": {"count": 200, "main_prompt": "\x01" * 100_000},
    "models": {"count": 1000, "model_metadata": {"a": "x" * 100_000}},
    "an alias of the session": {
        "count": 1000,
        "start_session": True,
        "session_alias": "\x01" * 255,
        "input_values": {"a": "x" * 33_000},
    },
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_what_a_bulk_makes_many_times_is_bounded_by_all_of_it(
    api: Client, server: Server, stack: Stack, what: str
) -> None:
    body = {"workflow_id": api.workflow()} | TOO_MUCH[what]
    with Watch(server) as watch:
        reply = api.post("/v1/runs/bulk", json=body)
    assert code(reply) == (413, "payload_too_large")
    assert "count" in reply.json()["detail"]
    assert watch.seconds < 1
    assert watch.grown < 150 * MIB, f"{watch.grown // MIB} MiB"
    assert api.json_of(api.get("/v1/runs"))["total"] == 0
    assert stack.secret_paths(f"runs/{api.organization}/") == set()
    assert stack.blobs(api.organization) == set()
    # One of them is none too many.
    api.json_of(api.post("/v1/runs/bulk", json=body | {"count": 1}), 201)


def test_as_many_as_fit_are_made(api: Client, server: Server) -> None:
    """Near every bound at once, and still bearable."""
    body = {
        "workflow_id": api.workflow(),
        "count": 30,
        "input_values": {"a": "x" * 100_000},
        "sensitive_input_values": {f"{n:03d}{'é' * 250}": "x" for n in range(400)},
        "file_inputs": file_inputs(3, b""),
    }
    with Watch(server) as watch:
        reply = api.post("/v1/runs/bulk", json=body)
    assert len(api.json_of(reply, 201)["created_runs"]) == 30
    assert 20 * MIB < len(reply.content) < 32 * MIB
    assert watch.grown < 500 * MIB, f"{watch.grown // MIB} MiB"


def test_the_bounds_of_a_bulk_are_settings(stack: Stack) -> None:
    server = start_server(stack, MAX_BULK_FILES=6, MAX_BULK_SECRET_BYTES=5000, MAX_REPLY_BYTES=MIB)
    try:
        with server.client() as api:
            bulk = {"workflow_id": api.workflow()}
            cases: list[tuple[int, dict[str, Any], int]] = [
                (3, {"file_inputs": file_inputs(2)}, 4),
                (4, {"sensitive_input_values": {"pw": "x" * 1000}}, 5),
                (9, {"input_values": {"a": "x" * 100_000}}, 11),
            ]
            for fits, body, more in cases:
                too_many = api.post("/v1/runs/bulk", json=bulk | body | {"count": more})
                assert code(too_many) == (413, "payload_too_large")
                api.json_of(api.post("/v1/runs/bulk", json=bulk | body | {"count": fits}), 201)
            # One run alone is not a bulk.
            api.run(file_inputs=file_inputs(7), sensitive_input_values={"pw": "x" * 6000})
    finally:
        server.app.stop()


# --- pools ------------------------------------------------------------------------------------------------------------

MOST_POOLS = 100


def add(api: Client, pool_id: str, *machine_ids: str) -> httpx.Response:
    return api.post(f"/v1/pools/{pool_id}/machines", json={"machine_ids": machine_ids})


def pools_of(api: Client, machine_id: str) -> int:
    return len(api.json_of(api.get(f"/v1/machines/{machine_id}"))["pools"])


def filled(api: Client, stack: Stack, pools: int) -> tuple[str, list[str]]:
    """A machine that is in so many pools."""
    machine_id = api.machine(status="disconnected")
    made = stack.sql(
        "INSERT INTO pools (id, organization_id, name) SELECT gen_random_uuid(), $1, 'p' FROM generate_series(1, $2)"
        " RETURNING id::text",
        api.organization,
        pools,
    )
    ids = [row["id"] for row in made]
    api.json_of(api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": ids}))
    return machine_id, ids


def test_a_machine_is_in_no_more_pools_by_one_way_than_by_the_other(api: Client, stack: Stack) -> None:
    machine_id, ids = filled(api, stack, MOST_POOLS)
    free, more = api.machine(), api.pool()
    reply = api.put(f"/v1/machines/{machine_id}/pools", json={"pool_ids": [*ids, more]})
    assert code(reply) == (422, [(["body", "pool_ids"], "too_long")])
    reply = add(api, more, free, machine_id)
    assert code(reply) == (422, [(["body", "machine_ids"], "too_many_pools")])
    assert "100 pools" in reply.text
    assert (pools_of(api, machine_id), pools_of(api, free)) == (MOST_POOLS, 0), "none was added"
    api.json_of(add(api, ids[0], machine_id, free))  # it is in it
    assert api.request("DELETE", f"/v1/pools/{ids[0]}/machines", json={"machine_ids": [machine_id]}).is_success
    api.json_of(add(api, more, machine_id))
    assert pools_of(api, machine_id) == MOST_POOLS


def test_many_at_once_do_not_pass_the_limit_either(api: Client, stack: Stack) -> None:
    machine_id, _ = filled(api, stack, MOST_POOLS - 3)
    pools = [api.pool() for _ in range(12)]
    with ThreadPoolExecutor(len(pools)) as threads:
        statuses = [reply.status_code for reply in threads.map(lambda pool: add(api, pool, machine_id), pools)]
    assert sorted(statuses) == [200] * 3 + [422] * 9
    assert pools_of(api, machine_id) == MOST_POOLS


# --- pages ------------------------------------------------------------------------------------------------------------


def fits(reply: httpx.Response) -> int:
    """The limit that the refusal of a page names."""
    assert code(reply) == (422, [(["query", "limit"], "page_too_large")])
    [found] = re.findall(r"limit=(\d+)", reply.json()["detail"][0]["msg"])
    return int(found)


def all_pages(api: Client, path: str, limit: int) -> list[Any]:
    """Every item, as a caller finds it who adds `limit` to `skip`, and takes the limit that is named when one is refused."""
    items: list[Any] = []
    separator = "&" if "?" in path else "?"
    while True:
        reply = api.get(f"{path}{separator}skip={len(items)}&limit={limit}")
        if reply.status_code == 422:
            smaller = fits(reply)
            assert 1 <= smaller < limit
            limit = smaller
            continue
        page = api.json_of(reply)
        assert len(reply.content) < 40 * MIB or len(page["items"]) == 1
        assert len(page["items"]) == min(limit, page["total"] - len(items)), "a page is never cut short"
        items += page["items"]
        if len(items) >= page["total"]:
            return items


def test_a_page_of_machines_in_pools_with_long_descriptions(api: Client, server: Server, stack: Stack) -> None:
    machine_id, _ = filled(api, stack, 60)
    stack.sql("UPDATE pools SET description = repeat('x', 10000) WHERE organization_id = $1", api.organization)
    stack.sql(
        "WITH made AS (INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id, status)"
        " SELECT gen_random_uuid(), $1, 'f', 'k', 'disconnected' FROM generate_series(1, 299) RETURNING id)"
        " INSERT INTO pool_machines SELECT pools.id, made.id FROM made, pools WHERE pools.organization_id = $1",
        api.organization,
    )
    with Watch(server) as watch:
        smaller = fits(api.get("/v1/machines?limit=300"))
        assert 40 < smaller < 60, "32 MiB of 60 times 10 KB"
        reply = api.get(f"/v1/machines?limit={smaller}")
        assert len(api.json_of(reply)["items"]) == smaller
        assert 30 * MIB < len(reply.content) < 32 * MIB
        assert fits(api.get(f"/v1/machines?limit={smaller + 1}")) == smaller
        pool_id = api.json_of(api.get("/v1/pools?limit=1"))["items"][0]["id"]
        whole = api.get(f"/v1/pools/{pool_id}?include_machines=true")
        assert code(whole) == (422, [(["query", "include_machines"], "pool_too_large")])
        for path in (f"/v1/pools/{pool_id}?include=machines", "/v1/pools?limit=2&include=machines"):
            assert code(api.get(path)) == (422, [(["query", "include"], "page_too_large")])
        assert api.json_of(api.get(f"/v1/pools/{pool_id}"))["machine_count"] == 300
        extra = api.machine(status="disconnected")
        assert code(add(api, pool_id, extra)) == (422, [(["body", "machine_ids"], "pool_too_large")])
        assert pools_of(api, extra) == 0
    assert watch.grown < 200 * MIB, f"{watch.grown // MIB} MiB; it was 1,700"
    assert watch.seconds < 1
    assert len(api.json_of(api.get(f"/v1/machines/{machine_id}"))["pools"]) == 60


def test_a_page_of_runs_with_long_histories(api: Client, server: Server, stack: Stack) -> None:
    workflow_id = api.workflow()
    [first, *rest] = [api.run(workflow_id=workflow_id)["id"] for _ in range(12)]
    api.report(first, status="running")
    api.report(first, run_message_history=[{"a": "x" * 1000}] * 4000)
    stack.sql(
        "INSERT INTO run_outputs (run_id, attempt, run_message_history)"
        " SELECT copy.run_id, 1, run_message_history FROM run_outputs, unnest($2::uuid[]) AS copy (run_id)"
        " WHERE run_outputs.run_id = $1",
        first,
        rest,
    )
    assert fits(api.get("/v1/runs")) == 8, "32 MiB of 4 MB each"
    assert len({run["id"] for run in all_pages(api, "/v1/runs", 100)}) == 12
    with Watch(server) as watch:
        assert len(api.json_of(api.get("/v1/runs?fields=status"))["items"]) == 12
        assert len(api.json_of(api.get("/v1/runs?fields=input_values,output_data"))["items"]) == 12
    assert watch.seconds < 0.5, "what is not shown is not weighed"
    # The rest weighs nothing; and one run is always served.
    stack.sql("UPDATE run_outputs SET run_message_history = NULL WHERE run_id = ANY($1::uuid[])", rest[1:])
    assert len(api.json_of(api.get("/v1/runs"))["items"]) == 12
    stack.sql("UPDATE runs SET main_prompt = repeat('x', 40000000) WHERE id = $1", rest[-1])
    assert fits(api.get("/v1/runs?limit=5")) == 1
    [newest] = api.json_of(api.get("/v1/runs?limit=1"))["items"]
    assert len(newest["main_prompt"]) == 40_000_000
    assert len(all_pages(api, "/v1/runs?status=scheduling", 3)) == 11


def test_every_list_has_the_bound(stack: Stack) -> None:
    """With a bound of 1 MiB, and what JSON writes six times as long."""
    server = start_server(stack, MAX_REPLY_BYTES=MIB)
    try:
        with server.client() as api:
            run_id = api.run()["id"]
            for _ in range(4):
                api.report(run_id, status="running")
                api.report(run_id, status="error", error=["\x01" * 43_690])
                api.json_of(api.retry(run_id))
            for _ in range(30):
                api.json_of(api.post("/v1/pools", json={"name": "\x01" * 255, "description": "\x01" * 10_000}), 201)
            path = "/".join(["☃" * 248] * 16)
            long_names = [file_input(filename="f" * 255, target_path=f"{path}/{number}") for number in range(100)]
            other = api.run(file_inputs=long_names)["id"]
            long = "\x01" * 40_000
            for _ in range(4):
                api.json_of(api.post("/v1/workflows", json={"main_prompt": long, "output_schema": long}), 201)
            assert fits(api.get("/v1/workflows")) == 2
            assert fits(api.get(f"/v1/runs/{run_id}/attempts")) == 3
            assert 10 < fits(api.get("/v1/pools")) < 20
            assert 70 < fits(api.get(f"/v1/run-attachments?run_id={other}")) < 100
            assert api.get(f"/v1/run-attachments?run_id={run_id}").is_success
            paths = ["/v1/workflows", f"/v1/runs/{run_id}/attempts", "/v1/pools", "/v1/run-attachments", "/v1/runs"]
            for path in paths:
                items = all_pages(api, path, 100)
                names = [item.get("id") or item["attempt"] for item in items]
                assert len(set(names)) == len(names)
                total = api.json_of(api.get(f"{path}?limit=1"))["total"]
                assert len(names) == total > 1
    finally:
        server.app.stop()


def test_pages_of_all_kinds_are_few_statements(stack: Stack) -> None:
    """A connection keeps a hundred: the pages of one caller must not push out everybody's."""

    async def prepared() -> int:
        database = Database(Settings.model_construct(database_url=SecretStr(stack.postgres.as_app(stack.url))))
        try:
            nobody = Principal(uuid4(), "nobody", None)
            everything, of_machine = RunFilter("nobody"), RunFilter("nobody", machine_id=uuid4())
            for wanted in (everything, of_machine):
                for number in range(1, 40):
                    part = Slice(number, 2 * number, 10**6 + number)
                    await list_runs(database, wanted, sorted(FIELDS)[: number % 20], part)
                    await list_attachments(database, nobody, None, None, part)
                    await list_machines(database, "nobody", part)
                    await list_pools(database, "nobody", part)
                    await list_workflows(database, nobody, part)
            async with database.connection() as connection:
                query = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '/* %.find */%'"
                count: int = await connection.fetchval(query)
                return count
        finally:
            database.close()

    assert asyncio.run(prepared()) == 6, "one for each list, and two for runs"
