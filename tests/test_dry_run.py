"""Say beforehand what will happen: the dry run of a retry, and the queue."""

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.client import Client, file_input
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until

PAIRS = 120 * (1 + int(os.environ.get("SOAK", "0")))


def dry(client: Client, run_id: str, **body: object) -> dict[str, Any]:
    found: dict[str, Any] = client.json_of(client.post(f"/v1/runs/{run_id}/retry?dry_run=true", json=body))
    return found


def test_what_a_retry_would_do(api: Client) -> None:
    machine = api.machine()
    run = api.finished(
        status="error",
        input_values={"a": 1},
        sensitive_input_values={"password": "x"},
        file_inputs=[file_input()],
        machine_id=machine,
    )
    found = dry(api, run["id"], input_values={"a": 2}, is_priority=True)
    kept_until = found["secrets"].pop("kept_until")
    assert kept_until > run["ended_at"]
    assert found == {
        "run_id": run["id"],
        "attempt": 2,
        "would_retry": True,
        "refusals": [],
        "cleared": {"outputs": True, "history": True, "error": True, "output_attachments": 1},
        "kept": ["sensitive_input_values", "file_inputs", "machine_id"],
        "replaced": ["input_values", "is_priority"],
        "secrets": {"names": ["password"]},
        "placement": {
            "pinned_machine_id": machine,
            "pool_ids": None,
            "session_machine_id": None,
            "eligible_machines": 1,
            "expected_reason": "assigned",
        },
    }


def test_all_that_speaks_against_a_retry_is_said_at_once(stack: Stack, api: Client) -> None:
    run = api.finished(sensitive_input_values={"b": "x", "a": "y"})
    stack.sql(
        "UPDATE deletions SET condemned_at = now() WHERE name = (SELECT secret_path FROM runs WHERE id::text = $1)",
        run["id"],
    )
    body = {"machine_id": str(uuid4()), "pool_ids": [str(uuid4())], "session_id": str(uuid4())}
    found = dry(api, run["id"], **body)
    codes = ["sensitive_inputs_expired", "machine_not_found", "pool_not_found", "session_not_found"]
    assert [refusal["code"] for refusal in found["refusals"]] == codes
    assert [refusal["status"] for refusal in found["refusals"]] == [409, 404, 404, 404]
    assert not found["would_retry"]
    waiting = api.run()["id"]
    assert [refusal["code"] for refusal in dry(api, waiting)["refusals"]] == ["run_not_terminal"]


@pytest.mark.parametrize(
    ("query", "body", "status"),
    [
        ("dry_run=true", {"session_id": str(uuid4()), "start_session": True}, 422),
        ("dry_run=true", {"session_alias": "x"}, 422),
        ("dry_run=true", {"input_values": 1}, 422),
        ("dry_run=maybe", {}, 422),
        ("dry_run=true&dry_run=false", {}, 422),
        ("dry_run=true", {"sensitive_input_values": {str(n): "x" for n in range(401)}}, 413),
    ],
)
def test_what_is_wrong_with_the_request_is_refused_as_ever(
    api: Client, query: str, body: dict[str, Any], status: int
) -> None:
    run = api.finished()
    assert api.post(f"/v1/runs/{run['id']}/retry?{query}", json=body).status_code == status
    assert api.get_run(run["id"])["attempt"] == 1


def test_a_dry_run_of_what_is_not_there_or_not_allowed(server: Server, api: Client, foreign: Client) -> None:
    run = api.finished()
    for client, run_id in ((api, str(uuid4())), (foreign, run["id"])):
        reply = client.post(f"/v1/runs/{run_id}/retry?dry_run=true")
        assert (reply.status_code, reply.json()["code"]) == (404, "run_not_found")
    key = server.stack.new_key(api.organization, scopes=["runs:read"])
    with server.client(api.organization, key=key) as client:
        assert client.post(f"/v1/runs/{run['id']}/retry?dry_run=true").status_code == 403


def test_the_documented_route_and_the_parameter_are_the_same(api: Client) -> None:
    run = api.finished("error", input_values={"user": "ada"})
    for body in (
        {},
        {"reason": "again", "input_values": {"user": "grace"}},
        {"machine_id": str(uuid4())},
        {"machine_id": 1},
    ):
        replies = [
            api.post(f"/v1/runs/{run['id']}/{way}", json=body) for way in ("retry/dry-run", "retry?dry_run=true")
        ]
        assert [reply.status_code for reply in replies] == [422 if body.get("machine_id") == 1 else 200] * 2
        [first, second] = [reply.json() for reply in replies]
        assert first == second
        if replies[0].status_code == 200 and "machine_id" in body:  # one that does not exist
            assert first["placement"]["expected_reason"] is None
    assert api.get_run(run["id"])["attempt"] == 1
    assert api.post(f"/v1/runs/{uuid4()}/retry/dry-run").status_code == 404


def test_a_dry_run_writes_nothing_locks_nothing_and_uses_up_no_key(quiet_server: Server) -> None:
    stack = quiet_server.stack
    with quiet_server.client() as api:
        run = api.finished(machine_id=api.machine(), sensitive_input_values={"password": "x"})
        machine = api.machine()  # that gives no signs of life: they lock its row
        secrets, blobs = stack.secret_paths(), stack.blobs()
        row = stack.sql("SELECT xmin::text, ctid::text FROM runs WHERE id::text = $1", run["id"])
        desk = stack.sql("SELECT xmin::text, xmax::text FROM machines WHERE id::text = $1", machine)
        headers = {"Idempotency-Key": uuid4().hex}
        body = {
            "sensitive_input_values": {"password": "canary-of-the-dry-run"},
            "file_inputs": [file_input(b"canary-of-the-dry-run")],
            "input_values": {"x": "canary-of-the-dry-run"},
            "machine_id": machine,
        }
        with stack.held("SELECT FROM runs WHERE id::text = $1 FOR UPDATE", run["id"]):
            reply = api.post(f"/v1/runs/{run['id']}/retry?dry_run=true", json=body, headers=headers)
        assert reply.status_code == 200
        assert "canary" not in reply.text
        assert reply.json()["secrets"] == {"names": ["password"], "kept_until": None}
        assert row == stack.sql("SELECT xmin::text, ctid::text FROM runs WHERE id::text = $1", run["id"])
        assert desk == stack.sql("SELECT xmin::text, xmax::text FROM machines WHERE id::text = $1", machine)
        assert (secrets, blobs) == (stack.secret_paths(), stack.blobs())
        assert not stack.sql("SELECT FROM idempotency_keys WHERE key = $1", headers["Idempotency-Key"])
        assert api.post(f"/v1/runs/{run['id']}/retry", json={}, headers=headers).status_code == 200


class World:
    """Runs in every state, and bodies of every kind."""

    def __init__(self, api: Client, stack: Stack, seed: int) -> None:
        self.api, self.stack, self.chance = api, stack, random.Random(seed)
        self.machines = [api.machine() for _ in range(2)] + [str(uuid4())]
        self.pools = [api.pool(self.machines[0]), api.pool(), str(uuid4())]
        self.sessions = [api.run(start_session=True)["session_id"], str(uuid4())]
        self.workflow = api.workflow()

    def run(self) -> str:
        chance, api = self.chance, self.api
        options: dict[str, Any] = {"workflow_id": self.workflow}
        if chance.random() < 0.4:
            options["sensitive_input_values"] = {"p": "x"}
        if chance.random() < 0.3:
            options["file_inputs"] = [file_input()]
        if chance.random() < 0.3:
            options["machine_id"] = chance.choice(self.machines[:2])
        if chance.random() < 0.3:
            options |= {"start_session": True, "session_alias": "a"}
        run_id: str = api.json_of(api.post("/v1/runs", json=options), 201)["id"]
        if chance.random() < 0.85:
            api.report(run_id, status="running")
            if chance.random() < 0.9:
                api.report(run_id, status=chance.choice(["success", "error", "cancelled"]))
        if chance.random() < 0.2:
            name = "(SELECT secret_path FROM runs WHERE id::text = $1)"
            self.stack.sql(
                f"UPDATE deletions SET condemned_at = now(), due_at = 'infinity' WHERE name = {name}", run_id
            )
        if chance.random() < 0.2:
            self.stack.sql("UPDATE run_attachments SET expires_at = now() WHERE run_id::text = $1", run_id)
        return run_id if chance.random() < 0.97 else str(uuid4())

    def body(self) -> dict[str, Any]:
        chance = self.chance
        every: dict[str, Any] = {
            "input_values": chance.choice([{}, {"a": 1}, None]),
            "sensitive_input_values": chance.choice([{}, {"q": "new"}, None]),
            "file_inputs": chance.choice([[], [file_input(b"new")], None]),
            "machine_id": chance.choice([*self.machines, None]),
            "pool_ids": chance.choice([[], self.pools[:1], self.pools[:2], self.pools, None]),
            "reuse_session": chance.choice([True, False, None]),
            "session_id": chance.choice([*self.sessions, None]),
            "start_session": chance.choice([True, False]),
            "session_alias": chance.choice(["b", None]),
            "release_session_after": chance.choice([True, False, None]),
            "is_priority": chance.choice([True, False, None]),
        }
        return {name: every[name] for name in chance.sample(list(every), chance.randint(0, 4))}


def test_a_dry_run_foretells_the_retry(quiet_server: Server) -> None:
    seed = random.randrange(10**6)
    with quiet_server.client() as api:
        world = World(api, quiet_server.stack, seed)
        for number in range(PAIRS):
            where = f"seed {seed}, pair {number}"
            run_id, body = world.run(), world.body()
            foretold = api.post(f"/v1/runs/{run_id}/retry?dry_run=true", json=body)
            done: httpx.Response = api.post(f"/v1/runs/{run_id}/retry", json=body)
            if foretold.status_code != 200:
                told, got = ({**reply.json(), "instance": None} for reply in (foretold, done))
                assert told == got, where
                continue
            told = foretold.json()
            if not told["would_retry"]:
                first = told["refusals"][0]
                shown = {name: done.json()[name] for name in ("status", "code", "detail")}
                assert shown == first, where
                continue
            assert done.status_code == 200, f"{where}: {done.text}"
            run = done.json()
            assert run["attempt"] == told["attempt"], where
            names = sorted(run["sensitive_input_aliases"] or {})
            assert names == told["secrets"]["names"], where
            assert (run["pool_ids"] or None) == (told["placement"]["pool_ids"] or None), where
            if told["placement"]["expected_reason"] != "assigned":
                assert run["scheduling_reason"] in (told["placement"]["expected_reason"], "waiting_for_machine"), where
            [attempt, *_] = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
            assert attempt["overridden"] == told["replaced"], where


def test_the_queue_says_who_waits_for_what(api: Client) -> None:
    machine = api.machine(status="disconnected")
    pool = api.pool(machine)
    first = api.run(machine_id=machine)["id"]
    api.run(machine_id=machine)
    second = api.run(pool_ids=[pool])["id"]
    session = api.run(start_session=True)
    lanes = api.json_of(api.get("/v1/queue"))["items"]
    assert [lane["head_run_id"] for lane in lanes] == [first, second, session["id"]]
    assert [lane["waiting"] for lane in lanes] == [2, 1, 1]
    assert [lane["reason"] for lane in lanes] == ["machine_offline", "waiting_for_machine", "waiting_for_machine"]
    assert lanes[0]["wants"] == {"session_id": None, "machine_id": machine, "pool_ids": None}
    assert lanes[1]["wants"]["pool_ids"] == [pool]
    assert lanes[2]["wants"]["session_id"] == session["session_id"]
    assert lanes[0]["oldest_queued_at"] < lanes[1]["oldest_queued_at"] < lanes[2]["oldest_queued_at"]


def test_the_queue_shows_the_oldest_run_though_priority_goes_before_it(api: Client) -> None:
    old = api.run()
    urgent = api.run(is_priority=True)
    [lane] = api.json_of(api.get("/v1/queue"))["items"]
    assert (lane["head_run_id"], lane["waiting"]) == (urgent["id"], 2)
    assert lane["oldest_queued_at"] == old["created_at"] or lane["oldest_queued_at"] < urgent["created_at"]


def test_the_queue_of_others_is_not_shown(api: Client, foreign: Client) -> None:
    foreign.run()
    assert api.json_of(api.get("/v1/queue"))["items"] == []


@pytest.mark.alone
def test_a_long_queue_costs_no_more(quiet_server: Server) -> None:
    with quiet_server.client() as api:
        workflow = api.workflow()
        quiet_server.stack.sql(
            "INSERT INTO runs (id, organization_id, workflow_id, status, lane, queued_at)"
            " SELECT gen_random_uuid(), $1, $2::text::uuid, 'scheduling', 'pools:' || n % 600, now() - n * interval '1 s'"
            " FROM generate_series(1, 30000) AS n",
            api.organization,
            workflow,
        )
        quiet_server.stack.sql("ANALYZE runs")
        took = []
        for _ in range(3):
            began = time.monotonic()
            lanes = api.json_of(api.get("/v1/queue"))["items"]
            took.append(time.monotonic() - began)
        assert min(took) < 0.5
        assert len(lanes) == 200
        assert {lane["waiting"] for lane in lanes} == {50}
        quiet_server.stack.sql("DELETE FROM runs WHERE organization_id = $1", api.organization)


@pytest.fixture
def surprised(stack: Stack) -> Iterator[Server]:
    """A server whose database is about to hold much more than its statistics say."""
    with own_database(stack, "queue") as own:
        own.sql("ALTER TABLE runs SET (autovacuum_enabled = false)")
        started = start_server(own, BACKGROUND="none", DATABASE_POOL_SIZE=2)
        yield started
        started.app.stop()


@pytest.mark.alone
@pytest.mark.parametrize("lane", ["pools", "session"])
@pytest.mark.parametrize("finished", [0, 2000])
def test_a_crowd_that_the_statistics_do_not_know_costs_no_more(surprised: Server, lane: str, finished: int) -> None:
    """It took longer than the statement timeout: 503."""
    with surprised.client() as api:
        workflow, stack = api.workflow(), surprised.stack
        run = (
            "INSERT INTO runs (id, organization_id, workflow_id, status, started_at, ended_at, lane, session_id)"
            " SELECT gen_random_uuid(), $1, $2::text::uuid,"
        )
        alone = f"{run} 'success', now(), now(), 'any', NULL FROM generate_series(1, $3::int)"
        stack.sql(alone, api.organization, workflow, finished)
        stack.sql(f"{run} 'scheduling', NULL, NULL, 'any', NULL", api.organization, workflow)
        stack.sql("ANALYZE runs")
        assert api.get("/v1/queue").status_code == 200  # and a plan is kept
        crowd = (
            f"{run} 'scheduling', NULL, NULL, $3 || ':' || n % 600,"
            " CASE WHEN $3 = 'session' THEN md5((n % 600)::text)::uuid END FROM generate_series(1, 30000) AS n"
        )
        stack.sql(crowd, api.organization, workflow, lane)
        took = []
        for _ in range(8):
            began = time.monotonic()
            lanes = api.json_of(api.get("/v1/queue"))["items"]
            took.append(time.monotonic() - began)
            assert len(lanes) == 200
        assert sorted(took)[4] < 0.5, took


def test_a_refusal_says_what_a_program_can_use(stack: Stack, api: Client) -> None:
    waiting = api.run()["id"]
    request_id = uuid4().hex
    reply = api.post(f"/v1/runs/{waiting}/retry", json={}, headers={"X-Request-ID": request_id})
    assert reply.json()["instance"] == f"urn:request:{request_id}"
    assert reply.json()["current_status"] == "scheduling"
    run = api.finished(sensitive_input_values={"b": "x", "a": "y"})
    assert api.retry(run["id"]).status_code == 200
    late = api.patch(f"/v1/runs/{run['id']}", json={"status": "running", "attempt": 1})
    assert (late.json()["code"], late.json()["attempt"]) == ("attempt_superseded", 2)
    api.report(run["id"], status="cancelled")
    name = "(SELECT secret_path FROM runs WHERE id::text = $1)"
    stack.sql(f"UPDATE deletions SET condemned_at = now() WHERE name = {name}", run["id"])
    assert api.retry(run["id"]).json()["names"] == ["a", "b"]


# --- what a run keeps, over all states --------------------------------------------------------------------------------

KEPT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "secret": {"sensitive_input_values": {"password": "x"}},
    "file": {"file_inputs": [file_input()]},
    "both": {"sensitive_input_values": {"password": "x"}, "file_inputs": [file_input()]},
}
EXPIRE = {
    "secret": "UPDATE deletions SET due_at = now() WHERE name = (SELECT secret_path FROM runs WHERE id::text = $1)",
    "file": "UPDATE run_attachments SET expires_at = now() - interval '1 s' WHERE run_id::text = $1",
}


@pytest.mark.parametrize("has_expired", [False, True])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("state", ["scheduling", "running", "success", "error", "cancelled"])
def test_a_dry_run_and_the_retry_say_the_same_of_what_is_kept(
    quiet_server: Server, stack: Stack, state: str, kept: str, *, has_expired: bool
) -> None:
    with quiet_server.client() as api:
        run_id = api.run(**KEPT[kept])["id"]
        if state not in ("scheduling", "cancelled"):
            api.report(run_id, status="running")
        if state not in ("scheduling", "running"):
            api.report(run_id, status=state)
        for what, expire in EXPIRE.items() if has_expired else ():
            if kept in (what, "both"):
                stack.sql(expire, run_id)
        found = dry(api, run_id)
        retried = api.retry(run_id)
        wanted = []
        if state in ("scheduling", "running"):
            wanted = ["run_not_terminal"]
        elif has_expired:
            wanted = {
                "nothing": [],
                "secret": ["sensitive_inputs_expired"],
                "file": ["input_attachments_expired"],
                "both": ["sensitive_inputs_expired", "input_attachments_expired"],
            }[kept]
        assert [refusal["code"] for refusal in found["refusals"]] == wanted
        assert (retried.status_code, retried.json().get("code")) == ((409, wanted[0]) if wanted else (200, None))


# --- targets that are gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["machine", "pool"])
def test_a_run_whose_target_was_deleted_is_not_sent_elsewhere(api: Client, gone: str) -> None:
    other = api.machine()
    target = api.machine() if gone == "machine" else api.pool(api.machine())
    wish: dict[str, Any] = {"machine_id": target} if gone == "machine" else {"pool_ids": [target]}
    runs = [api.finished("error", **wish)["id"] for _ in range(4)]
    assert api.delete(f"/v1/{gone}s/{target}").status_code == 204
    for run_id in runs[:2]:
        for answer in (api.retry(run_id), api.retry(run_id, is_priority=True), api.retry(run_id, file_inputs=[])):
            assert (answer.status_code, answer.json()["code"]) == (409, f"{gone}_deleted")
            assert "pool_ids" in answer.json()["detail"]
        assert [refusal["code"] for refusal in dry(api, run_id)["refusals"]] == [f"{gone}_deleted"]
        assert api.get_run(run_id)["machine_id"] in (None, api.get_run(run_id)["assigned_machine_id"])
    anywhere = api.json_of(api.retry(runs[0], pool_ids=[]))
    pinned = api.json_of(api.retry(runs[1], machine_id=other))
    assert (anywhere["attempt"], pinned["attempt"], pinned["machine_id"]) == (2, 2, other)
    # What was sent anew is what the run has from now on.
    for run_id in runs[:2]:
        api.report(run_id, status="cancelled")
        assert dry(api, run_id)["refusals"] == []
        assert api.json_of(api.retry(run_id))["attempt"] == 3


def test_a_live_session_decides_although_the_target_was_deleted(api: Client) -> None:
    pinned, reserved = api.machine(status="disconnected"), api.machine()
    first = api.run(start_session=True, machine_id=reserved)["id"]
    until(lambda: api.get_run(first)["assigned_machine_id"] == reserved)
    run_id = api.run(session_id=first, machine_id=pinned)["id"]
    api.report(run_id, status="cancelled")
    assert api.delete(f"/v1/machines/{pinned}").status_code == 204
    assert dry(api, run_id)["refusals"] == []
    assert [refusal["code"] for refusal in dry(api, run_id, reuse_session=False)["refusals"]] == ["machine_deleted"]
    assert api.retry(run_id, reuse_session=False).json()["code"] == "machine_deleted"
    assert api.json_of(api.retry(run_id))["machine_id"] == reserved


def test_a_run_that_the_deletion_of_its_machine_ended(api: Client) -> None:
    machine = api.machine()
    run_id = api.run(machine_id=machine)["id"]
    assert api.delete(f"/v1/machines/{machine}").status_code == 204
    assert api.get_run(run_id)["status"] == "error"
    assert api.retry(run_id).json()["code"] == "machine_deleted"


def test_what_is_anothers_looks_like_what_does_not_exist(api: Client, foreign: Client) -> None:
    run_id = api.finished("error")["id"]
    busy = foreign.machine()
    session = foreign.run(start_session=True, machine_id=busy)["id"]
    until(lambda: foreign.get_run(session)["assigned_machine_id"] == busy)
    there: dict[str, list[Any]] = {
        "machine_id": [
            busy,
            foreign.machine(),
            foreign.machine(status="disconnected"),
            foreign.machine(is_available=False),
        ],
        "pool_ids": [[foreign.pool()], [foreign.pool(foreign.machine())]],
        "session_id": [session],
    }
    for name, values in there.items():
        for value in values:
            unknown = [str(uuid4())] if isinstance(value, list) else str(uuid4())
            seen, other = dry(api, run_id, **{name: value}), dry(api, run_id, **{name: unknown})
            assert str(seen).replace(str(value), "?") == str(other).replace(str(unknown), "?"), (name, seen, other)


def test_a_dry_run_sees_one_moment(api: Client, server: Server) -> None:
    """Retried and ended again and again meanwhile: what it says of the attempt fits what it says of the status."""
    run_id = api.finished("error")["id"]
    stop = threading.Event()

    def change() -> None:
        with server.client(api.organization, key=api.headers["Authorization"].split()[1]) as other:
            while not stop.is_set():
                other.retry(run_id)
                other.report(run_id, status="running")
                other.report(run_id, status="error", error=["it broke"], output_data={"answer": 42})

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(40):
            found = dry(api, run_id)
            has_ended = [refusal["code"] for refusal in found["refusals"]] != ["run_not_terminal"]
            assert found["cleared"]["error"] == found["cleared"]["outputs"] == has_ended, found
    finally:
        stop.set()
        changing.join()
