"""What happened to runs: who changed what and when, in the statement that changed it, and no reader misses one."""

import asyncio
import random
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from tests.support.client import Client, file_input
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.waiting import until


def events_of(client: Client, run_id: str, count: int) -> list[dict[str, Any]]:
    """The run's events, once there are so many: one shows when all older transactions have ended."""

    def look() -> list[dict[str, Any]]:
        page = client.json_of(client.get(f"/v1/runs/{run_id}/events"))
        assert page["total"] == len(page["items"]) or page["total"] > page["limit"]
        items: list[dict[str, Any]] = page["items"]
        return items if len(items) >= count else []

    found: list[dict[str, Any]] = until(look, what=f"{count} events")
    assert len(found) == count
    return found


def brief(event: dict[str, Any]) -> tuple[str, int, str | None, str | None]:
    return event["event"], event["attempt"], event["from_status"], event["to_status"]


def test_every_change_of_a_run_leaves_an_event(api: Client) -> None:
    machine = api.machine()
    run = api.run(machine_id=machine)
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    api.report(run["id"], status="running")
    api.report(run["id"], run_message_history=[])  # nothing happens to the run
    api.report(run["id"], status="error", error=["x"], reason="it hung")
    api.json_of(api.patch(f"/v1/machines/{machine}", json={"is_available": False}))
    assert api.retry(run["id"], reason="again", input_values={"a": 1}).status_code == 200
    assert api.delete(f"/v1/runs/{run['id']}", params={"reason": "no longer needed"}).status_code == 204
    found = events_of(api, run["id"], 6)
    assert [brief(event) for event in found] == [
        ("created", 1, None, "scheduling"),
        ("assigned", 1, "scheduling", "scheduling"),
        ("started", 1, "scheduling", "running"),
        ("ended", 1, "running", "error"),
        ("retried", 2, "error", "scheduling"),
        ("deleted", 2, "scheduling", None),
    ]
    assert [event["reason"] for event in found] == [None, None, None, "it hung", "again", "no longer needed"]
    assert [event["changed"] for event in found] == [[], [], [], ["error"], ["input_values"], []]
    assert found[1]["key_id"] is None, "the service assigned it by itself"
    assert all(event["key_id"] for event in found if event["event"] != "assigned")


def test_an_event_names_the_request_the_key_and_the_user(server: Server) -> None:
    user = uuid4()
    organization = f"org-{uuid4().hex[:12]}"
    with server.client(organization, key=server.stack.new_key(organization, user)) as client:
        run = client.finished()
        request_id = uuid4().hex
        reply = client.post(f"/v1/runs/{run['id']}/retry", json={}, headers={"X-Request-ID": request_id})
        assert reply.status_code == 200
        last = events_of(client, run["id"], 4)[-1]
        [key] = server.stack.sql("SELECT id FROM api_keys WHERE user_id = $1", user)
        assert (last["request_id"], last["user_id"], last["key_id"]) == (request_id, str(user), str(key["id"]))


def test_the_reasons_are_shown_with_the_attempt(api: Client) -> None:
    run = api.finished(input_values={})
    run_id = run["id"]
    assert api.retry(run_id, reason="first").status_code == 200
    api.report(run_id, status="cancelled", reason="stop it")
    assert api.retry(run_id).status_code == 200
    events_of(api, run_id, 6)
    second, first = api.json_of(api.get(f"/v1/runs/{run_id}/attempts"))["items"]
    assert (first["reason"], first["end_reason"]) == ("first", None)
    assert (second["reason"], second["end_reason"]) == (None, "stop it")


@pytest.mark.parametrize("reason", ["x" * 501, "a\x00b", 1])
def test_a_reason_has_a_bound(api: Client, reason: object) -> None:
    run = api.finished()
    reply = api.retry(run["id"], reason=reason)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == ["body", "reason"]
    assert api.delete(f"/v1/runs/{run['id']}", params={"reason": "x" * 501}).status_code == 422
    assert api.get_run(run["id"])["attempt"] == 1


def test_whatever_ends_a_run_leaves_an_event(api: Client) -> None:
    deleted, released = api.machine(), api.machine()
    pinned = api.run(machine_id=deleted)["id"]
    session = api.run(machine_id=released, start_session=True)["id"]
    until(lambda: api.get_run(session)["assigned_machine_id"])
    assert api.delete(f"/v1/machines/{deleted}").status_code == 204
    api.json_of(api.patch(f"/v1/machines/{released}", json={"reserved_session_id": None}))
    assert brief(events_of(api, pinned, 3)[-1]) == ("ended", 1, "scheduling", "error")
    assert brief(events_of(api, session, 3)[-1]) == ("ended", 1, "scheduling", "cancelled")


def test_an_expired_secret_leaves_an_event(stack: Stack, api: Client) -> None:
    run = api.finished(sensitive_input_values={"password": "x"})
    path = stack.sql("SELECT secret_path FROM runs WHERE id = $1::text::uuid", run["id"])[0]["secret_path"]
    stack.sql("UPDATE deletions SET due_at = now() WHERE name = $1", path)
    found = events_of(api, run["id"], 4)[-1]
    assert (found["event"], found["key_id"]) == ("secrets_expired", None)


def test_events_of_others_are_not_shown(api: Client, foreign: Client) -> None:
    run = api.finished()
    events_of(api, run["id"], 3)
    reply = foreign.get(f"/v1/runs/{run['id']}/events")
    assert (reply.status_code, reply.json()["code"]) == (404, "run_not_found")
    assert foreign.json_of(foreign.get("/v1/events"))["items"] == []
    assert api.get(f"/v1/runs/{uuid4()}/events").json()["code"] == "run_not_found"


@pytest.mark.parametrize("cursor", ["x", "1", "-1.1", "9999999999999999999.1", "1.1.1", ""])
def test_a_bad_cursor_is_refused(api: Client, cursor: str) -> None:
    reply = api.get("/v1/events", params={"after": cursor})
    if cursor:
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["query", "after"]


def test_no_value_gets_into_an_event(stack: Stack, api: Client) -> None:
    canary = uuid4().hex
    run_id = api.finished(
        input_values={canary: canary},
        sensitive_input_values={canary: canary},
        file_inputs=[file_input(canary.encode())],
    )["id"]
    body = {"input_values": {canary: canary}, "sensitive_input_values": {canary: canary}, canary: canary}
    assert api.retry(run_id, **body).status_code == 200
    api.report(run_id, status="running", input_values={canary: canary})
    api.report(run_id, status="error", error=[canary], output_data={canary: canary})
    rows = stack.sql("SELECT e::text AS row FROM run_events e WHERE run_id = $1::text::uuid", run_id)
    assert len(rows) == 6
    assert not [row for row in rows if canary in row["row"]]


def read_all(client: Client, after: str | None = None, limit: int = 7) -> tuple[list[dict[str, Any]], str | None]:
    items: list[dict[str, Any]] = []
    while True:
        page = client.json_of(client.get("/v1/events", params={"limit": limit} | ({"after": after} if after else {})))
        after = page["next"]
        items += page["items"]
        if not page["items"]:
            return items, after


def test_a_reader_misses_no_event_and_sees_none_twice_while_fifty_write(stack: Stack, server: Server) -> None:
    """Also of transactions that end in another order than they began in."""
    with server.client() as client:
        workflow = client.workflow()
        organization = client.organization
        done = asyncio.Event()

        async def write(number: int) -> int:
            """Transactions of our own, as long as chance will have it."""
            chance = random.Random(number)
            connection = await asyncpg.connect(stack.postgres.url, timeout=30)
            written = 0
            try:
                for _ in range(6):
                    async with connection.transaction():
                        for _ in range(chance.randint(1, 3)):
                            await connection.execute(
                                "INSERT INTO run_events (organization_id, run_id, attempt, event, request_id, changed)"
                                " VALUES ($1, gen_random_uuid(), 1, 'created', $2, '{}')",
                                organization,
                                f"{number}.{written}",
                            )
                            written += 1
                        await connection.execute("SELECT pg_sleep($1)", chance.random() / 20)
            finally:
                await connection.close()
            return written

        async def follow() -> list[str]:
            seen: list[str] = []
            after: str | None = None
            ended = False
            while True:
                items, after = await asyncio.to_thread(read_all, client, after)
                seen += [item["request_id"] for item in items]
                if ended and not items:
                    return seen
                ended = done.is_set()

        async def scenario() -> tuple[list[int], list[str]]:
            reader = asyncio.create_task(follow())
            counts = await asyncio.gather(*(write(number) for number in range(50)))
            # One more transaction that is older than all that follows keeps them back, and then shows them.
            done.set()
            return list(counts), await reader

        counts, seen = asyncio.run(scenario())
        assert workflow
        expected = {f"{number}.{one}" for number, count in enumerate(counts) for one in range(count)}
        assert len(seen) == len(set(seen)), "an event was seen twice"
        missing = expected - set(seen)
        if missing:  # the last ones may show a moment after the writers ended
            seen += [item["request_id"] for item in read_all(client, None, 1000)[0]]
        assert expected == set(seen)


def test_the_events_of_a_random_life_lead_to_what_the_run_is(api: Client) -> None:
    chance = random.Random(4)
    runs = [api.run()["id"] for _ in range(5)]
    for _ in range(120):
        run_id = chance.choice(runs)
        call = chance.choice(["running", "success", "error", "cancelled", "retry"])
        if call == "retry":
            api.retry(run_id)
        else:
            api.patch(f"/v1/runs/{run_id}", json={"status": call})
    replayed: dict[str, tuple[str, int]] = {}

    def replay() -> bool:
        for event in read_all(api, None, 50)[0]:
            status, _ = replayed.get(event["run_id"], (None, 0))
            assert event["from_status"] in (status, None) or replayed == {}
            replayed[event["run_id"]] = (event["to_status"], event["attempt"])
        shown = {run_id: api.get_run(run_id) for run_id in runs}
        same = replayed == {run_id: (run["status"], run["attempt"]) for run_id, run in shown.items()}
        if not same:
            replayed.clear()
        return same

    until(replay, what="the replayed lives")


def test_old_events_go_by_age(stack: Stack, server: Server) -> None:
    with server.client() as client:
        run_id = client.run()["id"]
        stack.sql(
            "UPDATE run_events SET at = now() - interval '91 days' WHERE run_id = $1::text::uuid AND event = 'created'",
            run_id,
        )
        query = "SELECT 1 FROM run_events WHERE run_id = $1::text::uuid AND event = 'created'"
        until(lambda: not stack.sql(query, run_id), what="the old event's end")


def test_a_stream_that_is_read_from_the_start_is_that_of_the_runs(api: Client) -> None:
    run = api.finished()
    of_run = events_of(api, run["id"], 3)
    streamed, _ = read_all(api)
    assert streamed == of_run
    reply: httpx.Response = api.get("/v1/events", params={"limit": 2})
    first = api.json_of(reply)
    assert [event["event"] for event in first["items"]] == ["created", "started"]
    second = api.json_of(api.get("/v1/events", params={"after": first["next"]}))
    assert [event["event"] for event in second["items"]] == ["ended"]
    assert api.json_of(api.get("/v1/events", params={"after": second["next"]}))["next"] == second["next"]
