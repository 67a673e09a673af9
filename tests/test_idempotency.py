"""Idempotency-Key, sentence by sentence (contract, section 7), on every route that writes."""

import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.idempotency import fingerprint
from tests.support.client import Client, file_input
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import NEVER, until

REUSED = {
    "loc": ["header", "Idempotency-Key"],
    "msg": "This Idempotency-Key was used for another request; use a new key for each new request.",
    "type": "idempotency_key_reused",
}
NEW_KEY = "another key of the tests, longer than 32 characters"


@pytest.fixture(scope="module")
def server(quiet_server: Server) -> Server:
    return quiet_server


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """A request, and one without a key that makes a second effect of the first visible."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    later: "WriteRequest | None" = None

    def send(self, client: Client, key: str | None = None, **changes: object) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        body = None if self.body is None and not changes else (self.body or {}) | changes
        return client.request(self.method, self.path, json=body, headers=headers)


def _retry(api: Client) -> WriteRequest:
    run = api.finished(sensitive_input_values={"pw": "old"}, file_inputs=[file_input()])
    body = {"sensitive_input_values": {"pw": "new"}, "file_inputs": [file_input(b"new")]}
    return WriteRequest(
        "POST", f"/v1/runs/{run['id']}/retry", body, WriteRequest("PATCH", f"/v1/runs/{run['id']}", CANCEL)
    )


def _create(api: Client) -> WriteRequest:
    body = {"workflow_id": api.workflow(), "sensitive_input_values": {"pw": "x"}, "file_inputs": [file_input()]}
    return WriteRequest("POST", "/v1/runs", body)


def _report(api: Client) -> WriteRequest:
    path = f"/v1/runs/{api.run()['id']}"
    return WriteRequest("PATCH", path, {"status": "running"}, WriteRequest("PATCH", path, {"status": "success"}))


def _upload(api: Client) -> WriteRequest:
    run_id = api.run()["id"]
    api.report(run_id, status="running")
    body = file_input() | {"run_id": run_id, "content_type": "text/plain", "attachment_type": "output"}
    return WriteRequest("POST", "/v1/run-attachments", body)


def _expire(api: Client) -> WriteRequest:
    path = f"/v1/run-attachments/{api.run(file_inputs=[file_input()])['input_attachment_ids'][0]}"
    return WriteRequest(
        "PUT", path, {"expires_at": "2090-01-01T00:00:00Z"}, WriteRequest("PUT", path, {"expires_at": None})
    )


def _change(path: str, **body: object) -> WriteRequest:
    return WriteRequest("PATCH", path, body, WriteRequest("PATCH", path, dict.fromkeys(body, "later")))


def _join(api: Client) -> WriteRequest:
    path, body = f"/v1/pools/{api.pool()}/machines", {"machine_ids": [api.machine()]}
    return WriteRequest("POST", path, body, WriteRequest("DELETE", path, body))


def _leave(api: Client) -> WriteRequest:
    machine_id = api.machine()
    path, body = f"/v1/pools/{api.pool(machine_id)}/machines", {"machine_ids": [machine_id]}
    return WriteRequest("DELETE", path, body, WriteRequest("POST", path, body))


def _pools_of_a_machine(api: Client) -> WriteRequest:
    path = f"/v1/machines/{api.machine()}/pools"
    return WriteRequest("PUT", path, {"pool_ids": [api.pool()]}, WriteRequest("PUT", path, {"pool_ids": []}))


CANCEL = {"status": "cancelled"}
WRITES: dict[str, Callable[[Client], WriteRequest]] = {
    "POST /v1/runs": _create,
    "POST /v1/runs/bulk": lambda api: WriteRequest(
        "POST", "/v1/runs/bulk", {"workflow_id": api.workflow(), "count": 2}
    ),
    "POST /v1/runs/{run_id}/retry": _retry,
    "PATCH /v1/runs/{run_id}": _report,
    "DELETE /v1/runs/{run_id}": lambda api: WriteRequest("DELETE", f"/v1/runs/{api.run()['id']}"),
    "POST /v1/run-attachments": _upload,
    "PUT /v1/run-attachments/{attachment_id}": _expire,
    "DELETE /v1/run-attachments/{attachment_id}": lambda api: WriteRequest("DELETE", _expire(api).path),
    "POST /v1/workflows": lambda _: WriteRequest("POST", "/v1/workflows", {"main_prompt": "Do it."}),
    "PATCH /v1/workflows/{workflow_id}": lambda api: _change(f"/v1/workflows/{api.workflow()}", name="now"),
    "DELETE /v1/workflows/{workflow_id}": lambda api: WriteRequest("DELETE", f"/v1/workflows/{api.workflow()}"),
    "POST /v1/machines": lambda _: WriteRequest("POST", "/v1/machines", {"fingerprint": "f", "unkey_key_id": "k"}),
    "PATCH /v1/machines/{machine_id}": lambda api: _change(f"/v1/machines/{api.machine()}", name="now"),
    "DELETE /v1/machines/{machine_id}": lambda api: WriteRequest("DELETE", f"/v1/machines/{api.machine()}"),
    "PUT /v1/machines/{machine_id}/pools": _pools_of_a_machine,
    "POST /v1/pools": lambda _: WriteRequest("POST", "/v1/pools", {"name": "pool"}),
    "PATCH /v1/pools/{pool_id}": lambda api: _change(f"/v1/pools/{api.pool()}", name="now"),
    "DELETE /v1/pools/{pool_id}": lambda api: WriteRequest("DELETE", f"/v1/pools/{api.pool()}"),
    "POST /v1/pools/{pool_id}/machines": _join,
    "DELETE /v1/pools/{pool_id}/machines": _leave,
}
every_write = pytest.mark.parametrize("route", WRITES)


def rows(stack: Stack, organization: str) -> set[tuple[str, str]]:
    """Everything an organization has, and what is staged for it."""
    # Not the whole deletion list: the collector works on it.
    query = """
    SELECT 'run' AS kind, runs::text AS content FROM runs WHERE organization_id = $1
    UNION ALL SELECT 'attempt', a::text FROM run_attempts a JOIN runs r ON r.id = run_id WHERE r.organization_id = $1
    UNION ALL SELECT 'attachment', run_attachments::text FROM run_attachments WHERE organization_id = $1
    UNION ALL SELECT 'workflow', workflows::text FROM workflows WHERE organization_id = $1
    UNION ALL SELECT 'machine', machines::text FROM machines WHERE organization_id = $1
    UNION ALL SELECT 'pool', pools::text FROM pools WHERE organization_id = $1
    UNION ALL SELECT 'member', p::text FROM pool_machines p JOIN pools ON id = pool_id WHERE organization_id = $1
    UNION ALL SELECT 'key', idempotency_keys::text FROM idempotency_keys WHERE organization_id = $1
    UNION ALL SELECT 'staged', name FROM deletions WHERE sweeps = 2 AND '/' || name LIKE '%/' || $1 || '/%'
    """
    return {(row["kind"], row["content"]) for row in stack.sql(query, organization)}


def assert_first(reply: httpx.Response) -> None:
    assert reply.is_success, reply.text
    assert "Idempotency-Status" not in reply.headers


def assert_replayed(reply: httpx.Response, first: httpx.Response) -> None:
    assert (reply.status_code, reply.headers.get("Idempotency-Status")) == (first.status_code, "replayed"), reply.text
    assert reply.content == first.content
    assert reply.headers.get("content-type") == first.headers.get("content-type")


def assert_reused(reply: httpx.Response) -> None:
    assert (reply.status_code, reply.json()) == (422, {"detail": [REUSED]})
    assert "Idempotency-Status" not in reply.headers


def assert_in_progress(reply: httpx.Response) -> None:
    assert (reply.status_code, reply.json()["code"]) == (409, "idempotency_in_progress")
    assert reply.headers["Idempotency-Status"] == "in_progress"
    assert int(reply.headers["Retry-After"]) >= 1


def spellings(path: str) -> list[str]:
    """The same path, its ids written in every way that the routes understand."""
    begin, _, end = path.partition("/v1/")
    found = re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", end)
    written: list[Callable[[str], str]] = [
        str,
        lambda id_: id_.upper(),
        lambda id_: id_.replace("-", ""),
        lambda id_: f"%7B{id_.upper()}%7D",
        lambda id_: f"urn:uuid:{id_}",
    ]
    paths = [path]
    for write in written:
        other = end
        for id_ in found:
            other = other.replace(id_, write(id_))
        paths.append(f"{begin}/v1/{other}")
    return paths if found else paths[:2]


# --- on every write ---------------------------------------------------------------------------------------------------


def test_no_write_is_missing_here(api: Client) -> None:
    """Nor takes a route a key without saying so."""
    documented = {
        f"{method.upper()} {path}": [parameter["name"] for parameter in operation.get("parameters", ())]
        for path, operations in api.get("/openapi.json").json()["paths"].items()
        for method, operation in operations.items()
        if "/webhook-" not in path  # tests/webhooks has those
        and "/bulk-retries" not in path  # tests/test_bulk_retries.py has those
        and not path.endswith("/dry-run")  # it writes nothing
    }
    assert {route for route in documented if not route.startswith("GET ")} == WRITES.keys()
    assert {route for route, names in documented.items() if "Idempotency-Key" in names} == WRITES.keys()


@every_write
def test_a_resend_gets_the_first_reply_and_changes_nothing(api: Client, stack: Stack, route: str) -> None:
    write, key = WRITES[route](api), secrets.token_hex(8)
    first = write.send(api, key)
    assert_first(first)
    if write.later is not None:
        assert write.later.send(api).is_success
    before = rows(stack, api.organization)
    for path in spellings(write.path):
        assert_replayed(replace(write, path=path).send(api, key), first)
    assert rows(stack, api.organization) == before


@every_write
def test_a_key_is_for_one_request(api: Client, stack: Stack, route: str) -> None:
    write, key = WRITES[route](api), secrets.token_hex(8)
    first = write.send(api, key)
    assert_first(first)
    before = rows(stack, api.organization)
    assert_reused(write.send(api, key, unknown_to_this_server=1))
    assert_reused(WriteRequest("POST", "/v1/pools", {"name": "other path"}).send(api, key))
    assert_reused(WriteRequest("DELETE", f"/v1/pools/{uuid4()}").send(api, key))  # also when it would be refused
    if write.method != "DELETE" and write.path.count("/") == 3 and not write.path.endswith("/bulk"):
        assert_reused(WriteRequest("DELETE", write.path, write.body).send(api, key))
    assert rows(stack, api.organization) == before
    assert_replayed(write.send(api, key), first)


@every_write
def test_a_refusal_is_not_stored(api: Client, stack: Stack, route: str) -> None:
    write, key = WRITES[route](api), secrets.token_hex(8)
    before = rows(stack, api.organization)
    if "{" in route:
        known = write.path.split("/")[3]
        refused = WriteRequest(write.method, write.path.replace(known, str(uuid4())), write.body).send(api, key)
        assert refused.status_code == 404
    else:
        assert WriteRequest(write.method, write.path, {}).send(api, key).status_code == 422
    assert rows(stack, api.organization) == before
    first = write.send(api, key)
    assert_first(first)
    assert_replayed(write.send(api, key), first)


def test_a_conflict_is_not_stored(api: Client) -> None:
    run_id = api.run()["id"]
    retry = WriteRequest("POST", f"/v1/runs/{run_id}/retry", {})
    refused = retry.send(api, "again")
    assert (refused.status_code, refused.json()["code"]) == (409, "run_not_terminal")
    assert "Idempotency-Status" not in refused.headers
    api.report(run_id, status="cancelled")
    first = retry.send(api, "again")
    assert_first(first)
    assert_replayed(retry.send(api, "again"), first)


def test_a_failure_of_ours_is_not_stored(api: Client, stack: Stack) -> None:
    write = _retry(api)
    stack.bao.freeze()
    try:
        failed = write.send(api, "once")
    finally:
        stack.bao.thaw()
    assert (failed.status_code, failed.json()["code"]) == (503, "vault_unavailable")
    first = write.send(api, "once")
    assert_first(first)
    assert_replayed(write.send(api, "once"), first)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forgetful(stack: Stack) -> Iterator[Server]:
    """A server that keeps no reply, however short: only the ids of what it shows."""
    started = start_server(stack, IDEMPOTENCY_MAX_REPLY_BYTES=0, BACKGROUND_PERIOD_SECONDS=NEVER)
    yield started
    started.app.stop()


@pytest.fixture
def brief(forgetful: Server) -> Iterator[Client]:
    with forgetful.client() as client:
        yield client


@pytest.fixture(params=["kept", "by its ids"])
def either(request: pytest.FixtureRequest, server: Server, forgetful: Server) -> Iterator[Client]:
    """A client whose replies are kept, and one of whose replies only the ids are."""
    with (server if request.param == "kept" else forgetful).client() as client:
        yield client


def kept(stack: Stack, organization: str) -> list[int]:
    """How long the replies are that are stored for an organization, oldest first; 0 for those that are not."""
    query = "SELECT octet_length(body) AS size FROM idempotency_keys WHERE organization_id = $1 ORDER BY expires_at"
    return [row["size"] for row in stack.sql(query, organization)]


def assert_gone(reply: httpx.Response, code: str) -> None:
    assert (reply.status_code, reply.json()["code"]) == (404, code)
    assert reply.headers["Idempotency-Status"] == "replayed"


@every_write
def test_a_reply_of_which_the_ids_are_kept_shows_what_is_there_now(brief: Client, stack: Stack, route: str) -> None:
    write, key = WRITES[route](brief), secrets.token_hex(8)
    first = write.send(brief, key)
    assert_first(first)
    assert kept(stack, brief.organization) == [0]

    def replay() -> httpx.Response:
        before = rows(stack, brief.organization)
        reply = write.send(brief, key)
        assert (reply.status_code, reply.headers["Idempotency-Status"]) == (first.status_code, "replayed")
        assert reply.headers.get("content-type") == first.headers.get("content-type")
        assert rows(stack, brief.organization) == before
        return reply

    if not first.content:
        assert replay().content == b""
        return
    assert replay().json() == first.json()
    if write.later is not None:
        assert write.later.send(brief).is_success
        now = replay().json()
        assert now != first.json()
        assert now["id"] == first.json()["id"]


def test_a_long_reply_is_not_kept(api: Client, stack: Stack) -> None:
    """Reports of a long run, with a key each, as executors send them."""
    run_id = api.run()["id"]
    long = {"status": "running", "output_data": {"x": "y" * 1_000_000}}
    for number in range(5):
        first = api.patch(f"/v1/runs/{run_id}", json=long, headers={"Idempotency-Key": str(number)})
        assert_first(first)
    assert kept(stack, api.organization) == [0] * 5
    again = api.patch(f"/v1/runs/{run_id}", json=long, headers={"Idempotency-Key": "4"})
    assert (again.json(), again.headers["Idempotency-Status"]) == (first.json(), "replayed")


def test_a_long_reply_to_a_retry_is_not_kept(api: Client, stack: Stack) -> None:
    for size, stored in ((60_000, True), (70_000, False)):
        run = api.finished(input_values={"x": "y" * size})
        write = WriteRequest("POST", f"/v1/runs/{run['id']}/retry", {})
        first = write.send(api, str(size))
        assert_first(first)
        assert kept(stack, api.organization)[-1] == (len(first.content) if stored else 0)
        again = write.send(api, str(size))
        assert (again.json(), again.headers["Idempotency-Status"]) == (first.json(), "replayed")


@pytest.mark.parametrize(
    "route",
    [
        "POST /v1/runs",
        "POST /v1/runs/{run_id}/retry",
        "PATCH /v1/runs/{run_id}",
        "POST /v1/run-attachments",
        "PUT /v1/run-attachments/{attachment_id}",
    ],
)
def test_a_replay_shows_nothing_of_a_run_that_is_gone(either: Client, stack: Stack, route: str) -> None:
    write = WRITES[route](either)
    first = write.send(either, "the-key")
    assert_first(first)
    run_id = first.json().get("run_id", first.json()["id"])
    assert either.delete(f"/v1/runs/{run_id}").status_code == 204
    before = rows(stack, either.organization)
    for _ in range(2):
        assert_gone(write.send(either, "the-key"), "run_not_found")
    assert rows(stack, either.organization) == before
    assert_reused(write.send(either, "the-key", unknown_to_this_server=1))


def test_a_replay_of_a_bulk_leaves_out_what_is_gone(either: Client) -> None:
    write = WriteRequest("POST", "/v1/runs/bulk", {"workflow_id": either.workflow(), "count": 3})
    first = write.send(either, "the-key")
    assert_first(first)
    runs = first.json()["created_runs"]
    for gone, left in ((1, [runs[0], runs[2]]), (0, [runs[2]]), (2, [])):
        assert either.delete(f"/v1/runs/{runs[gone]['id']}").status_code == 204
        again = write.send(either, "the-key")
        assert (again.status_code, again.headers["Idempotency-Status"]) == (201, "replayed")
        assert again.json() == first.json() | {"created_runs": left}


def test_a_replay_of_a_bulk_is_not_larger_than_any_other_reply(brief: Client) -> None:
    """Its runs have grown since."""
    write = WriteRequest("POST", "/v1/runs/bulk", {"workflow_id": brief.workflow(), "count": 5})
    first = write.send(brief, "the-key")
    for run in first.json()["created_runs"]:
        brief.report(run["id"], status="running", output_data={"x": "y" * 8_000_000})
    refused = write.send(brief, "the-key")
    assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")
    assert refused.json()["detail"].startswith("The request has succeeded.")


@pytest.mark.parametrize("name", ["workflow", "machine", "pool"])
def test_a_kept_reply_outlives_anything_but_a_run(server: Server, forgetful: Server, name: str) -> None:
    for one in (server, forgetful):
        with one.client() as client:
            write = WRITES[f"POST /v1/{name}s"](client)
            first = write.send(client, "the-key")
            assert client.delete(f"/v1/{name}s/{first.json()['id']}").status_code == 204
            again = write.send(client, "the-key")
            if one is server:
                assert_replayed(again, first)
            else:
                assert_gone(again, f"{name}_not_found")


def test_a_bound_key_is_shown_its_own_run_or_nothing(brief: Client, forgetful: Server, stack: Stack) -> None:
    """Its report was long, and the run has gone to another machine since."""
    machine_id = brief.machine()
    run_id = brief.run(machine_id=machine_id)["id"]
    run = until(lambda: (run := brief.get_run(run_id))["assigned_machine_id"] and run, what="the assignment")
    key = stack.new_key(brief.organization, scopes=("runs:read", "runs:execute"), machine_id=machine_id)
    body = {"status": "running", "attempt": 1, "assignment": run.get("assignment"), "claim": str(uuid4())}
    with forgetful.client(brief.organization, key=key) as executor:
        report = WriteRequest("PATCH", f"/v1/runs/{run_id}", body)
        assert_first(report.send(executor, "the-key"))
        assert report.send(executor, "the-key").headers["Idempotency-Status"] == "replayed"
        brief.report(run_id, status="cancelled")
        brief.json_of(brief.retry(run_id, machine_id=brief.machine(is_available=False)))
        assert_gone(report.send(executor, "the-key"), "run_not_found")
        assert report.send(brief, "the-key").json()["code"] == "attempt_superseded", "not a key of the organization's"


def test_an_organization_has_a_share_of_what_is_kept(stack: Stack) -> None:
    """Beyond it nothing is refused, and nothing but ids is stored; also by a replica that had no part in it."""
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    with ExitStack() as closing:
        replicas = []
        for _ in range(2):
            replicas.append(start_server(stack, IDEMPOTENCY_MAX_STORED_BYTES=1000))
            closing.callback(replicas[-1].app.stop)
        with replicas[0].client() as other:
            organization, token = other.organization, other.headers["Authorization"].split()[1]
        clients = [closing.enter_context(one.client(organization, key=token)) for one in replicas]

        def is_kept(client: Client) -> bool:
            key = secrets.token_hex(8)
            first = write.send(client, key)
            assert_first(first)
            query = "SELECT body FROM idempotency_keys WHERE organization_id = $1 AND key = $2"
            [row] = stack.sql(query, organization, key)
            again = write.send(client, key)
            assert (again.json(), again.headers["Idempotency-Status"]) == (first.json(), "replayed")
            assert row["body"] in (first.content, b"")
            return bool(row["body"])

        assert is_kept(clients[0])
        until(lambda: not is_kept(clients[0]), what="its share is used up")
        assert is_kept(clients[1])  # which learns of it by the next look
        until(lambda: not is_kept(clients[1]), what="the other replica has learned of it")
        with replicas[0].client() as other:
            assert_first(write.send(other, "the-key"))
            assert kept(stack, other.organization) > [0]
        # What was stored since a replica's last look is added by its next one, with a new time: not before that has come.
        counted = "SELECT sum(bytes)::bigint AS bytes FROM stored_replies WHERE organization_id = $1"
        stored = "SELECT sum(length(body))::bigint AS bytes FROM idempotency_keys WHERE organization_id = $1"
        until(lambda: stack.sql(counted, organization) == stack.sql(stored, organization), what="all is counted")
        # Their time has come.
        stack.sql("UPDATE idempotency_keys SET expires_at = now() WHERE organization_id = $1", organization)
        stack.sql("UPDATE stored_replies SET until = now() - interval '1 s' WHERE organization_id = $1", organization)
        for client in clients:
            until(partial(is_kept, client), what="there is room again")
        left = "SELECT 1 FROM stored_replies WHERE organization_id = $1 AND until <= now()"
        until(lambda: not stack.sql(left, organization), what="what was counted is forgotten")


# --- scope ------------------------------------------------------------------------------------------------------------


def test_a_key_belongs_to_its_organization(api: Client, server: Server, stack: Stack) -> None:
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    with server.client() as foreign, server.client(api.organization) as colleague:
        first, theirs = write.send(api, "the-key"), write.send(foreign, "the-key")
        assert_first(first)
        assert_first(theirs)
        assert theirs.json()["organization_id"] == foreign.organization
        assert_replayed(write.send(colleague, "the-key"), first)
        assert_replayed(write.send(foreign, "the-key"), theirs)
        assert api.json_of(api.get("/v1/pools"))["total"] == 1
        assert len(stack.sql("SELECT 1 FROM idempotency_keys WHERE organization_id = $1", api.organization)) == 1


# --- lifetime ---------------------------------------------------------------------------------------------------------


def test_a_key_lives_a_day(api: Client, stack: Stack) -> None:
    assert_first(WriteRequest("POST", "/v1/pools", {"name": "pool"}).send(api, "the-key"))
    query = "SELECT expires_at - now() BETWEEN '23:59' AND '24:00' AS a_day FROM idempotency_keys WHERE organization_id = $1"
    assert stack.sql(query, api.organization) == [{"a_day": True}]


def test_a_keys_life_can_be_set_and_is_forgotten_after_it(stack: Stack) -> None:
    short = start_server(stack, IDEMPOTENCY_TTL_SECONDS=1)
    try:
        with short.client() as api:
            assert_first(WriteRequest("POST", "/v1/pools", {"name": "pool"}).send(api, "the-key"))
            query = "SELECT 1 FROM idempotency_keys WHERE organization_id = $1"
            until(lambda: not stack.sql(query, api.organization), what="the key is forgotten")
            assert_first(WriteRequest("POST", "/v1/pools", {"name": "another"}).send(api, "the-key"))
    finally:
        short.app.stop()


@pytest.mark.parametrize("same", [True, False])
def test_an_expired_key_is_free_again(api: Client, stack: Stack, *, same: bool) -> None:
    """Before anyone has forgotten it, for the same request and for another."""
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    first = write.send(api, "the-key")
    stack.sql("UPDATE idempotency_keys SET expires_at = now() WHERE organization_id = $1", api.organization)
    second = write.send(api, "the-key") if same else write.send(api, "the-key", name="another")
    assert_first(second)
    assert second.json()["id"] != first.json()["id"]
    assert_replayed(write.send(api, "the-key", name=second.json()["name"]), second)
    assert api.json_of(api.get("/v1/pools"))["total"] == 2


def test_of_twins_with_an_expired_key_one_wins(api: Client, stack: Stack) -> None:
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    write.send(api, "the-key")
    stack.sql("UPDATE idempotency_keys SET expires_at = now() WHERE organization_id = $1", api.organization)
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: write.send(api, "the-key"), range(8)))
    [first] = [reply for reply in replies if "Idempotency-Status" not in reply.headers]
    assert_first(first)
    for reply in replies:
        if reply is not first:
            assert_replayed(reply, first)
    assert api.json_of(api.get("/v1/pools"))["total"] == 2


# --- the key itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["!", "~", "a", "0" * 255, '"quoted"', "%00,;=", "".join(map(chr, range(33, 127)))])
def test_keys_of_visible_ascii(api: Client, key: str) -> None:
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    first = write.send(api, key)
    assert_first(first)
    assert_replayed(write.send(api, key), first)


BAD_KEYS: dict[str, list[bytes]] = {
    "empty": [b""],
    "too long": [b"a" * 256],
    "a space": [b"a b"],
    "a tab": [b"a\tb"],
    "latin-1": [b"caf\xe9"],
    "utf-8": ["café".encode()],
    "twice": [b"a", b"b"],
    "twice the same": [b"a", b"a"],
}


@pytest.mark.parametrize("keys", BAD_KEYS.values(), ids=BAD_KEYS.keys())
@pytest.mark.parametrize("body", [b'{"name": "pool"}', b"not JSON"])
def test_other_keys_are_refused_before_anything_else(api: Client, stack: Stack, keys: list[bytes], body: bytes) -> None:
    headers = [(b"Idempotency-Key", key) for key in keys]
    for method, path in (("POST", "/v1/pools"), ("DELETE", f"/v1/pools/{uuid4()}")):
        refused = api.request(method, path, content=body, headers=headers)
        assert refused.status_code == 422
        assert refused.json() == {
            "detail": [
                {
                    "loc": ["header", "Idempotency-Key"],
                    "msg": "Must be 1 to 255 visible ASCII characters, sent once.",
                    "type": "idempotency_key",
                }
            ]
        }
    assert rows(stack, api.organization) == set()


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_replicas_and_rotated_keys_recognize_a_request(server: Server, stack: Stack) -> None:
    """A rotation in two steps, with old and new replicas side by side in each: nothing is done twice."""
    old_key = stack.environment()["SERVER_KEY"]
    with ExitStack() as closing:

        def started(**keys: str) -> Server:
            made = start_server(stack, **keys)
            closing.callback(made.app.stop)
            return made

        first_step = started(SERVER_KEY_PREVIOUS=NEW_KEY)
        second_step = started(SERVER_KEY=NEW_KEY, SERVER_KEY_PREVIOUS=old_key)
        after = started(SERVER_KEY=NEW_KEY)
        with server.client() as client:
            organization, token = client.organization, client.headers["Authorization"].split()[1]
        replicas = (server, first_step, second_step, after)
        clients = [closing.enter_context(one.client(organization, key=token)) for one in replicas]
        write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
        known = {0: (0, 1, 2), 1: (0, 1, 2), 2: (1, 2, 3), 3: (1, 2, 3)}  # by whom what one stored is recognized
        for number, others in known.items():
            first = write.send(clients[number], f"key-{number}")
            assert_first(first)
            for other, client in enumerate(clients):
                reply = write.send(client, f"key-{number}")
                if other in others:
                    assert_replayed(reply, first)
                else:
                    assert_reused(reply)


def test_the_body_is_not_stored_and_not_to_be_guessed(api: Client, stack: Stack) -> None:
    """A plain digest would let anyone who reads the table try passwords; nor is a reply's alias the value."""
    canary = secrets.token_hex(16)
    write = _retry(api)
    body = {"sensitive_input_values": {"password": canary}}
    assert_first(WriteRequest("POST", write.path, body).send(api, "the-key"))
    [row] = stack.sql("SELECT * FROM idempotency_keys WHERE organization_id = $1", api.organization)
    assert canary not in str(row)
    sent = api.build_request("POST", write.path, json=body).content
    assert row["fingerprint"] == fingerprint(stack.environment()["SERVER_KEY"], "POST", write.path, sent)
    assert row["fingerprint"] != fingerprint("", "POST", write.path, sent)


# --- twins ------------------------------------------------------------------------------------------------------------


def test_a_twin_waits_shortly_and_gets_the_first_reply(api: Client, stack: Stack) -> None:
    write = _retry(api)
    run_id = write.path.split("/")[3]
    with ThreadPoolExecutor(2) as threads:
        with stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run_id):
            twins = [threads.submit(write.send, api, "the-key") for _ in range(2)]
            until(lambda: stack.waiting() == 2, what="both have come to the switch")
        replies = [twin.result() for twin in twins]
    first, second = sorted(replies, key=lambda reply: "Idempotency-Status" in reply.headers)
    assert_first(first)
    assert_replayed(second, first)
    assert api.get_run(run_id)["attempt"] == 2


def test_a_twin_that_waits_too_long_for_the_run(api: Client, stack: Stack) -> None:
    write = _retry(api)
    run_id = write.path.split("/")[3]
    before = rows(stack, api.organization)
    # One after the other: two that wait behind each other for one row may also end by the time-out of a statement.
    with stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run_id):
        with_key, without_key = write.send(api, "the-key"), write.send(api, None)
        assert_in_progress(with_key)
        assert_in_progress(without_key)  # one of two retries of a run loses with a 409, also without a key
    assert {row for row in rows(stack, api.organization) if row[0] != "staged"} == before
    assert_first(write.send(api, "the-key"))


def test_a_twin_that_waits_for_one_after_the_other(api: Client, stack: Stack) -> None:
    """Each wait is shorter than the longest one allowed; together they are too long."""
    write = _retry(api)
    run_id = write.path.split("/")[3]
    with ThreadPoolExecutor(1) as threads, stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run_id):
        first = threads.submit(write.send, api, "the-key")
        until(lambda: stack.waiting() or first.done(), what="the wait for the run")
        time.sleep(0.7)  # not a wait for something: the second one's own patience must outlast the first one's
        assert_in_progress(write.send(api, "the-key"))
        assert_in_progress(first.result())
    assert_first(write.send(api, "the-key"))


HOLD_KEY = """
INSERT INTO idempotency_keys (organization_id, key, fingerprint, status, body, expires_at)
VALUES ($1, 'the-key', $2, 201, '{"first": true}', now() + interval '1 hour')
"""


@pytest.mark.parametrize("commit", [True, False])
def test_a_twin_that_waits_too_long_for_the_key(api: Client, stack: Stack, *, commit: bool) -> None:
    """The first is about to commit, and takes its time."""
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    sent = api.build_request("POST", write.path, json=write.body).content
    mark = fingerprint(stack.environment()["SERVER_KEY"], "POST", write.path, sent)
    with stack.held(HOLD_KEY, api.organization, mark, commit=commit):
        assert_in_progress(write.send(api, "the-key"))
    resent = write.send(api, "the-key")
    if commit:
        assert (resent.content, resent.headers["Idempotency-Status"]) == (b'{"first": true}', "replayed")
    else:
        assert_first(resent)
    assert api.json_of(api.get("/v1/pools"))["total"] == (0 if commit else 1)


def test_a_twin_waits_for_the_key_and_then_replays(api: Client, stack: Stack) -> None:
    write = WriteRequest("POST", "/v1/pools", {"name": "pool"})
    sent = api.build_request("POST", write.path, json=write.body).content
    mark = fingerprint(stack.environment()["SERVER_KEY"], "POST", write.path, sent)
    with ThreadPoolExecutor(2) as threads:
        with stack.held(HOLD_KEY, api.organization, mark, commit=True):
            twin = threads.submit(write.send, api, "the-key")
            other = threads.submit(write.send, api, "the-key", name="another")
            until(lambda: stack.waiting() == 2, what="both wait for the key")
        assert (twin.result().content, twin.result().headers["Idempotency-Status"]) == (b'{"first": true}', "replayed")
        assert_reused(other.result())
    assert api.json_of(api.get("/v1/pools"))["total"] == 0
