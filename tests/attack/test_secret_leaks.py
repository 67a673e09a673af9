"""Unique secret values sent through every way in and every failure: afterwards they are nowhere but in OpenBao.

Looked through: a dump of the whole database, every byte that the stack has on disk (PostgreSQL's files, write-ahead log and
log, the services' logs, OpenBao's files and log, the file store) and every byte of every reply.
"""

import asyncio
import base64
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from app.api.validation import SENTENCES
from tests.support.canary import Mark
from tests.support.client import Client, file_input
from tests.support.faults import FaultyServer, Plan, fail_with_everything
from tests.support.outages import OUTAGES, is_ready
from tests.support.raw_http import raw_exchange
from tests.support.server import Server, start_server
from tests.support.stack import Stack, migrate
from tests.support.stored_state import SOAK, chance, resolved
from tests.support.waiting import until

LIMITS = {"MAX_BODY_BYTES": 2_000_000, "MAX_FILE_BYTES": 1000, "MAX_FILES": 2, "BODY_TIMEOUT_SECONDS": 0.5}
# Short, so that an outage is over soon.
PATIENCE = {"VAULT_TIMEOUT_SECONDS": 0.5, "DATABASE_TIMEOUT_SECONDS": 1.5, "STORAGE_TIMEOUT_SECONDS": 1}
# The loggers of asyncpg, SQLAlchemy and uvicorn hang on the root: all are at debug, and Python itself too.
LOUD = {"LOG_LEVEL": "debug", "PYTHONDEVMODE": "1", "PYTHONASYNCIODEBUG": "1"}
# PostgreSQL writes down every statement with all that it carries.
LOUD_POSTGRES = {
    "log_statement": "all",
    "log_parameter_max_length": -1,
    "log_parameter_max_length_on_error": -1,
    "log_min_messages": "debug1",
    "log_error_verbosity": "verbose",
}


class Spy:
    """Makes what is sent, keeps what comes back, and looks everywhere."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.secret, self.file, self.control = Mark(), Mark(), Mark()
        self.digits = Mark("123456789", 15)  # as many as a float keeps
        self.keys = [(stack.postgres.folder / "password").read_text()]
        self.replies: list[bytes] = []
        self.kinds: set[str] = set()

    @contextmanager
    def client(self, server: Server) -> Iterator[Client]:
        """A client of a new organization that has something stored on purpose; every reply to it is kept."""
        with server.client() as client:
            self.keys.append(client.headers["Authorization"].split()[1])
            client.event_hooks["response"] = [self._keep]
            client.finished(input_values={"on purpose": self.control.new()})
            yield client

    def _keep(self, reply: httpx.Response) -> None:
        reply.read()
        head = b"".join(name + b": " + value + b"\r\n" for name, value in reply.headers.raw)
        self.replies.append(head + b"\r\n" + reply.content)
        if reply.status_code == 422:
            self.kinds |= {error["type"] for error in reply.json()["detail"]}

    def secrets(self) -> dict[str, Any]:
        """Secrets of every shape, each with a canary of its own."""
        new, number = self.secret.new, int(self.digits.text)
        return {
            "password": new(),
            "escaped": new('"\\é🙂\n</script>%20'),
            "middle": f"é{new()}'--",
            "nested": {"inner": [new(), {"deep": new("\u2028")}], new(): True, "empty": None},
            "long": new("x" * 10_000),
            "pin": number,
            "fraction": float(f"0.{number}"),
            "list": [number, new()],
        }

    def files(self, count: int = 1) -> list[dict[str, object]]:
        contents = [b"\x00\xff" + self.file.new().encode() + b"\n" * 9 for _ in range(count)]
        return [file_input(content, f"{number}.txt") for number, content in enumerate(contents)]

    def body(self, **more: object) -> dict[str, Any]:
        return {"sensitive_input_values": self.secrets(), "file_inputs": self.files()} | more

    def assert_nowhere(self) -> None:
        """Secrets and keys are nowhere, files in the file store alone; the control shows that the search can find."""
        pg_dump = [str(self.stack.postgres.binaries / "pg_dump"), self.stack.postgres.url]
        dump = subprocess.run(pg_dump, capture_output=True, check=True, timeout=60).stdout
        self.stack.sql("CHECKPOINT")
        everything = {str(path): path.read_bytes() for path in self.stack.folder.rglob("*") if path.is_file()}
        del everything[str(self.stack.postgres.folder / "password")]
        everything |= {"the dump": dump, "a reply": b"\n".join(self.replies)}
        keys = re.compile(b"|".join(re.escape(key.encode()) for key in self.keys))
        for where, content in everything.items():
            for mark in (self.secret, self.digits):
                assert mark.found(content) is None, f"a secret is in {where}: {mark.found(content)!r}"
            if not where.startswith(str(self.stack.files)):
                assert self.file.found(content) is None, f"a file is in {where}: {self.file.found(content)!r}"
            assert keys.search(content) is None, f"a key is in {where}"

        holders = "\n".join(where for where, content in everything.items() if self.control.found(content))
        # Live rows; replies; what statements carry; dead rows too; and what was rolled back.
        for place in ("the dump", "a reply", str(self.stack.postgres.log), "/base/", "/pg_wal/"):
            assert place in holders, f"the search finds nothing in {place}"


@pytest.mark.parametrize("before", range(3))
def test_the_search_finds_every_form(before: int) -> None:
    mark = Mark()
    value = "?" * before + mark.new('"é')
    forms = [
        value.encode(),
        json.dumps({"a": [value]}).encode(),
        json.dumps(json.dumps(value)).encode(),
        str(httpx.QueryParams({"a": value})).encode(),
        base64.b64encode(value.encode()),
        base64.urlsafe_b64encode(value.encode()),
        value.encode().hex().encode(),
        repr(value.encode()).encode(),
        value.encode("utf-16"),
    ]
    assert all(mark.found(b"<" + form + b">") for form in forms)
    assert mark.found(Mark().text.encode()) is None


@pytest.fixture(scope="module")
def spy(broken: Stack) -> Spy:
    for name, value in LOUD_POSTGRES.items():
        broken.sql(f"ALTER SYSTEM SET {name} = '{value}'")
    broken.sql("SELECT pg_reload_conf()")
    migrate(broken.postgres, DATABASE_TIMEOUT_SECONDS=PATIENCE["DATABASE_TIMEOUT_SECONDS"])
    return Spy(broken)


@pytest.fixture(scope="module")
def server(spy: Spy) -> Iterator[Server]:
    """One server goes through all of it."""
    started = start_server(spy.stack, **LOUD, **PATIENCE, **LIMITS)
    spy.keys += [started.app.environment[name] for name in ("VAULT_TOKEN", "SERVER_KEY")]
    yield started
    started.app.stop()


@pytest.fixture
def client(spy: Spy, server: Server) -> Iterator[Client]:
    with spy.client(server) as client:
        yield client


def in_vault(stack: Stack, run_id: str) -> dict[str, str | None]:
    """What an executor of this run reads."""
    [run] = stack.sql("SELECT *, sensitive_input_aliases::text AS aliases FROM runs WHERE id = $1", run_id)
    return resolved(stack, run)


def as_stored(values: dict[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        for name, value in values.items()
    }


def ways_in(client: Client, spy: Spy) -> dict[str, tuple[int, dict[str, Any]]]:
    """Paths that take secrets, with the status of success and what else the body needs."""
    workflow_id = client.workflow()
    finished = client.finished(**spy.body())["id"]
    return {
        "/v1/runs": (201, {"workflow_id": workflow_id}),
        "/v1/runs/bulk": (201, {"workflow_id": workflow_id, "count": 2}),
        f"/v1/runs/{finished}/retry": (200, {}),
    }


def test_what_is_accepted_and_sent_again(spy: Spy, client: Client) -> None:
    for path, (status, more) in ways_in(client, spy).items():
        key = {"Idempotency-Key": uuid4().hex}
        body = spy.body(input_values={"on purpose": spy.control.new()}, **more)
        reply = client.post(path, json=body, headers=key)
        assert reply.status_code == status, reply.text
        again = client.post(path, json=body, headers=key)
        assert (again.content, again.headers["Idempotency-Status"]) == (reply.content, "replayed")
        assert client.post(path, json=spy.body(**more), headers=key).status_code == 422, "the key of another request"
        for run in reply.json().get("created_runs") or [reply.json()]:
            assert in_vault(spy.stack, run["id"]) == as_stored(body["sensitive_input_values"])
            client.report(run["id"], status="running")
            [upload] = spy.files()
            upload |= {"run_id": run["id"], "content_type": "text/plain", "attachment_type": "output"}
            assert client.post("/v1/run-attachments", json=upload).status_code == 201
    spy.assert_nowhere()


def bad_fields(spy: Spy) -> dict[str, list[dict[str, Any]]]:
    """Bodies that are refused for every kind of error that a body can have, with canaries inside what is wrong."""
    new = spy.secret.new
    [file] = spy.files()
    anywhere: list[dict[str, Any]] = [
        {"input_values": new()},
        {"input_values": {new(): float("inf")}},
        {"sensitive_input_values": [new()]},
        {"sensitive_input_values": {"password": new(), new(): float("nan")}},
        {"sensitive_input_values": {"password": new("\0")}},
        {"sensitive_input_values": {"password": new(), "number": 2**63 + 1}},
        {"sensitive_input_values": {new(str(index)): new() for index in range(1001)}},
        {"sensitive_input_values": {new("x" * 255): new()}},
        {"file_inputs": new()},
        {"file_inputs": [new()]},
        {"file_inputs": [{new(): new()}]},
        {"file_inputs": [file | {"content": new("*")}]},
        {"file_inputs": [file | {"content": {new(): new()}}]},
        {"file_inputs": [file | {"filename": "../" + new()}]},
        {"file_inputs": [file | {"target_path": "a/../" + new()}]},
        {"file_inputs": [file | {"cleanup_imports_after_run": new()}]},
        {"file_inputs": [file | {"filename": new("?")}]},
        {"file_inputs": [file | {"target_path": "C:\\in\\" + new("?")}]},
        {"file_inputs": [file, file]},
        {"input_values": {new(): {"$ref": new()}}},
        {"sensitive_input_values": {"password": f"vault://secret/runs/{new()}/x#{new()}"}},
        {"machine_id": new()},
        {"machine_id": {new(): new()}},
        {"pool_ids": [new()] * 101},
        {"session_alias": new("x" * 255)},
        {"session_alias": [new()]},
        {"session_id": str(uuid4()), "start_session": True},
    ]
    return {
        "/v1/runs": [*anywhere, {"workflow_id": None}, {"session_alias": "x"}],
        "/v1/runs/bulk": [*anywhere, {"count": new()}, {"count": 0}, {"count": 1001}],
        "retry": [*anywhere, {"reuse_session": new()}],
    }


def test_what_is_not_valid(spy: Spy, client: Client) -> None:
    new = spy.secret.new
    ways = ways_in(client, spy)
    for path, (_, more) in ways.items():
        for bad in bad_fields(spy)[path if path in ("/v1/runs", "/v1/runs/bulk") else "retry"]:
            # Beside the bad value are good ones, if that is not the secrets themselves.
            text = json.dumps(spy.body(**more) | bad)
            headers = {"Content-Type": "application/json", "Idempotency-Key": uuid4().hex}
            reply = client.post(path, content=text, headers=headers)
            assert reply.status_code == 422, (bad.keys(), reply.text)
        good = json.dumps(spy.body(**more)).encode()
        beside = f'"x": "{new()}"'.encode()
        for content in (
            good[:-40],
            good + b"}",
            good[:-1] + b', "x": ' + new().encode() + b"}",
            b"{" + beside + b', "y": "\xff"}',
            b"{" + beside + b', "y": "\\ud800"}',
            b"{" + beside + b', "y": ' + b"[" * 10_000,
            b"[" + good + b"]",
            json.dumps(new()).encode(),
            good.decode().encode("utf-16"),
        ):
            reply = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert reply.status_code == 422, content[:80]
    others: list[tuple[str, str, dict[str, Any]]] = [
        ("PATCH", f"/v1/runs/{uuid4()}", {"status": new(), "started_at": new(), "error": new(), new(): new()}),
        ("PATCH", f"/v1/runs/{uuid4()}", {"run_message_history": [{new(): new("\0")}], "attempt": new()}),
        ("PATCH", f"/v1/runs/{uuid4()}", {"ended_at": "2026-02-30T00:00:00Z", "output_data": {new(): new()}}),
        ("PATCH", f"/v1/machines/{uuid4()}", {"status": new(), "reserved_session_id": new(), "last_seen": [new()]}),
        ("POST", "/v1/run-attachments", spy.files()[0] | {"content_type": new(), "attachment_type": new()}),
        ("PATCH", f"/v1/runs/{uuid4()}", {"error": [new("x" * 90_000)] * 3}),
        ("PATCH", f"/v1/runs/{uuid4()}", {"error_code": new("!")}),
        ("POST", "/v1/bulk-retries", {"run_ids": [], "pace_per_second": new()}),
        ("POST", "/v1/bulk-retries", {"filter": {"status": ["running"], "created_at_from": new(), new(): new()}}),
        ("POST", "/v1/pools", {"name": "", "description": [new()]}),
        ("POST", "/v1/pools", {"name": new(), "pool_sensitive_parameters": {new(): new()}}),
        ("POST", "/v1/workflows", {"main_prompt": new("x" * 256 * 1024)}),
    ]
    for method, path, body in others:
        assert client.request(method, path, json=body).status_code == 422
    for query in ("skip", "limit", "wait", "fields", "workflow_id", "status", "created_at_from"):
        assert client.get("/v1/runs", params={query: new()}).status_code == 422
    assert client.get("/v1/runs", params={"skip": "1" + "0" * 5000}).status_code == 422
    assert client.get(f"/v1/pools/{uuid4()}", params={"include_machines": new()}).status_code == 422
    bad_key = {"Idempotency-Key": f"{new()} {new()}"}
    assert client.post("/v1/runs", json=spy.body(), headers=bad_key).status_code == 422
    unseen = {
        "string_unicode",
        "reference_not_supported",
    }  # the JSON parser refuses it before; it is said as not_supported
    assert SENTENCES.keys() - spy.kinds == unseen, "of every kind"
    assert b"Is not valid." not in b"".join(spy.replies), "a kind without a sentence"
    spy.assert_nowhere()


def test_what_is_refused(spy: Spy, server: Server, client: Client) -> None:
    waiting, finished = client.run(**spy.body()), client.finished(**spy.body())
    retry = f"/v1/runs/{finished['id']}/retry"
    many = {f"name {index}": spy.secret.new() for index in range(401)}

    def post(path: str, body: object, status: int, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = client.post(path, content=content, headers={"Content-Type": "application/json"} | headers)
        assert reply.status_code == status, reply.text

    post(f"/v1/runs/{waiting['id']}/retry", spy.body(), 409)
    post(f"/v1/runs/{uuid4()}/retry", spy.body(), 404)
    for target in ("machine_id", "session_id"):
        post(retry, spy.body(**{target: str(uuid4())}), 404)
    post(retry, spy.body(pool_ids=[str(uuid4())]), 404)
    post("/v1/runs", spy.body(workflow_id=str(uuid4())), 404)
    post(retry, spy.body(file_inputs=spy.files(3)), 413)
    post(retry, spy.body(file_inputs=[file_input(spy.file.new().encode() * 100)]), 413)
    post(retry, spy.body(sensitive_input_values=many), 413)
    post(retry, spy.body(sensitive_input_values={"x": spy.secret.new("x" * 1_000_000)}), 413)
    post(retry, spy.body(padding="x" * 2_000_000), 413)
    post(retry, spy.body(), 415, **{"Content-Type": f"text/{spy.secret.new()}"})
    post(retry, spy.body(), 415, **{"Content-Encoding": spy.secret.new()})
    for key in ("x", spy.secret.new(), f"rk_{spy.secret.new('x' * 20)}"):
        post(retry, spy.body(), 401, Authorization=f"Bearer {key}")
    post(retry, spy.body(), 401, Authorization=f"{spy.secret.new()} {spy.secret.new()}")

    body = json.dumps(spy.body()).encode()
    head = f"POST {retry} HTTP/1.1\r\nHost: x\r\nAuthorization: {client.headers['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    slow = raw_exchange(server.url, head.encode() + body[:-1])
    assert slow.startswith(b"HTTP/1.1 408 ")
    spy.replies.append(slow)
    spy.assert_nowhere()


def test_what_is_sent_in_the_wrong_place(spy: Spy, client: Client) -> None:
    """In paths, queries, headers and unknown keys, of every write route that the document names."""
    new = spy.secret.new
    document = client.json_of(client.get("/openapi.json"))
    writes = [
        (method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method != "get"
    ]
    assert len(writes) > 15
    run = client.finished(file_inputs=[file_input()])
    ids = {"run_id": run["id"], "attachment_id": run["input_attachment_ids"][0], "workflow_id": client.workflow()}
    ids |= {"machine_id": client.machine(), "pool_id": client.pool()}
    ids |= {"webhook_endpoint_id": client.webhook_endpoint()}
    sent = client.json_of(client.post(f"/v1/webhook-endpoints/{ids['webhook_endpoint_id']}/test"), 201)
    ids |= {"webhook_delivery_id": sent["id"]}
    ids |= {
        "bulk_retry_id": client.json_of(client.post("/v1/bulk-retries", json={"run_ids": [str(uuid4())]}), 202)["id"]
    }
    statuses = []
    for method, path, operation in sorted(writes, key=lambda write: write[0] == "DELETE"):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        [body] = document["components"]["schemas"].get(name, {}).get("examples", [{}])
        unknown = {new(): new(), "password": new(), "secrets": spy.secrets(), "output": {"sensitive": new()}}
        if name not in ("RunCreate", "RunBulkCreate", "RunRetry"):
            unknown["sensitive_input_values"] = spy.secrets()
        body |= unknown | {name: value for name, value in ids.items() if name in body}
        headers = {f"X-{new()}": new(), "X-Vault-Token": new(), "Cookie": f"{new()}={new()}", "User-Agent": new()}
        headers |= {"Referer": new(), "Origin": new(), "Range": new(), "X-Request-ID": new(" x"), "Accept": new()}
        for one in (path.format(**ids), re.sub("{[a-z_]+}", new(), path), f"{path}/{new()}"):
            reply = client.request(method, one, params={"password": new(), new(): new()}, json=body, headers=headers)
            statuses.append(reply.status_code)
        assert client.request(new().upper(), path).status_code == 400, "a method that HTTP does not know"
    assert max(statuses) < 500
    assert sum(status < 300 for status in statuses) > 12, statuses
    spy.assert_nowhere()


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage(spy: Spy, server: Server, client: Client, name: str) -> None:
    outage = OUTAGES[name]
    requests = [
        (path, status, spy.body(**more), {"Idempotency-Key": uuid4().hex})
        for path, (status, more) in ways_in(client, spy).items()
    ]

    def send() -> list[httpx.Response]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda one: client.post(one[0], json=one[2], headers=one[3]), requests))

    outage.begin(spy.stack)
    try:
        refused = send()
    finally:
        outage.end(spy.stack)
    assert [reply.status_code for reply in refused] == [503] * len(requests)
    assert {reply.json()["code"] for reply in refused} == {f"{outage.part}_unavailable"}
    until(lambda: is_ready(server), what="recovery")
    accepted = send()
    assert [reply.status_code for reply in accepted] == [status for _, status, _, _ in requests]
    for reply, (_, _, body, _) in zip(accepted, requests, strict=True):
        for run in reply.json().get("created_runs") or [reply.json()]:
            assert in_vault(spy.stack, run["id"]) == as_stored(body["sensitive_input_values"])
    spy.assert_nowhere()


def test_a_statement_that_fails_in_the_database(spy: Spy, client: Client) -> None:
    """PostgreSQL logs a cancelled statement with its parameters."""
    run = client.finished(**spy.body())

    async def retry_a_locked_run() -> httpx.Response:
        other = await asyncpg.connect(spy.stack.postgres.url)
        try:
            async with other.transaction():
                await other.execute("SELECT FROM runs WHERE id = $1 FOR UPDATE", run["id"])
                return await asyncio.to_thread(client.retry, run["id"], **spy.body())
        finally:
            await other.close()

    assert asyncio.run(retry_a_locked_run()).status_code == 409
    spy.assert_nowhere()


# Where a defect would have most to tell: what the call is given goes into the exception's text.
DEFECTS = [
    "vault write before#1",
    "vault write after#1",
    "put before#1",
    "runs.retry.switch_staged before#1",
    "runs.retry.switch_staged sent#1",  # it is still under way
]
# The same of a retry that waits for its run, in a transaction.
DEFECTS_IN_A_TRANSACTION = [
    "deletions.hold before#1",
    "COMMIT before#1",
]


def _retry_of_held(stack: Stack, client: Client, run_id: str, body: dict[str, Any]) -> int:
    """The status of a retry whose run is held until it waits."""
    with ThreadPoolExecutor(1) as threads:
        with stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run_id):
            retried = threads.submit(client.retry, run_id, **body)
            until(lambda: stack.waiting() or retried.done(), what="the wait for the run")
        return retried.result().status_code


def test_a_defect_at_any_point(spy: Spy) -> None:
    with FaultyServer(spy.stack) as server, spy.client(server) as client:
        run_id = client.finished(**spy.body())["id"]
        server.arm()
        assert client.retry(run_id, **spy.body()).status_code == 200
        others = sorted(set(server.points()) - set(DEFECTS))
    chosen = DEFECTS + DEFECTS_IN_A_TRANSACTION + (others if SOAK else chance("defects").sample(others, 3))
    for point in chosen:
        with FaultyServer(spy.stack, Plan(point, fail_with_everything), **LOUD) as server, spy.client(server) as client:
            run_id, body = client.finished(**spy.body())["id"], spy.body()
            server.arm()
            status = 0
            with suppress(httpx.RemoteProtocolError):
                if point in DEFECTS_IN_A_TRANSACTION:
                    status = _retry_of_held(spy.stack, client, run_id, body)
                else:
                    status = client.retry(run_id, **body).status_code
            # A reply that has begun can only go on or be broken off.
            assert status == 500 or point.startswith("http.response"), f"{point}: {status}"
            until(lambda server=server: "RuntimeError" in server.log(), what=f"a line about {point}")  # type: ignore[misc]
    print(f"{len(chosen)} of {len(DEFECTS + others)} points")
    spy.assert_nowhere()
