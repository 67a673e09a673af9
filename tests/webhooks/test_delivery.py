"""How messages are delivered: at least once under one id, in time, again after a failure, and nobody delays another."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from email.utils import formatdate
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.services import Services
from app.webhooks.delivery import BATCH, SCHEDULE, Deliverer, delay_after
from app.webhooks.queue import FAN_OUT
from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack, settings_of
from tests.support.waiting import until
from tests.support.webhook_receiver import Answer, Message
from tests.webhooks.conftest import Hooked


def delivery(hooked: Hooked, endpoint_id: str, **expected: object) -> dict[str, Any]:
    """The endpoint's only delivery, once it is as expected."""

    def found() -> dict[str, Any] | None:
        [one] = hooked.deliveries(endpoint_id) or [{}]
        return one if one and all(one[name] == value for name, value in expected.items()) else None

    seen: dict[str, Any] = until(found, what=f"a delivery with {expected}")
    return seen


def last_tries(hooked: Hooked, delivery_id: str) -> list[dict[str, Any]]:
    tries: list[dict[str, Any]] = hooked.api.json_of(hooked.api.get(f"/v1/webhook-deliveries/{delivery_id}"))[
        "last_tries"
    ]
    return tries


def make_due(stack: Stack, delivery_id: str, **columns: object) -> None:
    """As if the time until the next try had passed."""
    stack.sql("UPDATE webhook_deliveries SET due_at = now() WHERE id = $1", UUID(delivery_id))


def seconds_until_next(stack: Stack, delivery_id: str) -> float:
    [row] = stack.sql("SELECT due_at - tried_at AS wait FROM webhook_deliveries WHERE id = $1", UUID(delivery_id))
    wait: timedelta = row["wait"]
    return wait.total_seconds()


# --- success and failure ----------------------------------------------------------------------------------------------


def test_a_confirmed_message_is_sent_once(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(204)
    run = hooked.ended()
    shown = delivery(hooked, endpoint_id, status="delivered")
    [message] = hooked.receiver.messages
    assert (shown["id"], shown["event_id"]) == (message.id, message.event["event_id"])
    assert (shown["run_id"], shown["attempt"]) == (run["id"], 1)
    assert (shown["tries"], shown["response_status"], shown["error"]) == (1, 204, None)
    assert shown["next_try_at"] is None
    assert shown["occurred_at"] == message.event["occurred_at"]
    assert hooked.get(endpoint_id)["failing_since"] is None
    assert message.headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404, 409, 500])
def test_only_2xx_is_success_and_no_redirect_is_followed(hooked: Hooked, status: int) -> None:
    endpoint_id = hooked.endpoint()["id"]
    location = {"Location": f"{hooked.receiver.url}/elsewhere"}
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(status, location, b"no " * 1000)
    hooked.ended()
    shown = delivery(hooked, endpoint_id, tries=1)
    assert (shown["status"], shown["response_status"]) == ("pending", status)
    assert shown["response_body"] == ("no " * 1000)[:1024]
    assert hooked.receiver.of("/elsewhere") == []
    assert hooked.get(endpoint_id)["failing_since"] is not None


def test_it_is_tried_again_on_schedule_under_one_id_and_then_no_more(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(500, body=b"\xff\x00 broken")
    hooked.ended()
    for tries, planned in enumerate(SCHEDULE, start=1):
        shown = delivery(hooked, endpoint_id, tries=tries, status="pending")
        assert 0.8 * planned - 0.1 <= seconds_until_next(stack, shown["id"]) <= 1.2 * planned + 0.1
        assert shown["next_try_at"] is not None
        make_due(stack, shown["id"])
    shown = delivery(hooked, endpoint_id, tries=len(SCHEDULE) + 1, status="failed")
    assert shown["next_try_at"] is None
    assert shown["response_body"] == "\ufffd\ufffd broken"
    messages = hooked.receiver.messages
    assert len({(message.id, message.body) for message in messages}) == 1
    assert len(messages) == len(SCHEDULE) + 1
    # The log has each of them, and as many when it is sent once more.
    last = {"response_status": 500, "response_body": "\ufffd\ufffd broken", "error": None}
    log = last_tries(hooked, shown["id"])
    assert [one | {"tried_at": 0, "duration_ms": 0} for one in log] == [last | {"tried_at": 0, "duration_ms": 0}] * 8
    assert log[0]["tried_at"] == shown["tried_at"]
    assert [one["tried_at"] for one in log] == sorted((one["tried_at"] for one in log), reverse=True)
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(200, body=b"at last")
    hooked.api.json_of(hooked.api.post(f"/v1/webhook-deliveries/{shown['id']}/resend"))
    shown = delivery(hooked, endpoint_id, status="delivered")
    newest, *others = last_tries(hooked, shown["id"])
    assert newest == {name: shown[name] for name in newest}
    assert newest["response_body"] == "at last"
    assert others == log[:-1]


def test_the_first_try_again_comes_by_itself(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint()["id"]
    answers = iter([Answer(500), Answer(200)])
    hooked.receiver.behaviours["/hook"] = lambda _: next(answers)
    hooked.ended()
    shown = delivery(hooked, endpoint_id, status="delivered")
    first, second = hooked.receiver.messages
    assert shown["tries"] == 2
    assert 3.5 < second.at - first.at < 9
    assert second.headers["webhook-timestamp"] > first.headers["webhook-timestamp"]
    assert hooked.get(endpoint_id)["failing_since"] is None


def test_retry_after_counts_between_once_and_twice_the_planned_delay() -> None:
    def spread(low: float, high: float) -> float:
        return (low + high) / 2

    def later(seconds: float) -> str:
        return formatdate(time.time() + seconds, usegmt=True)

    assert delay_after(1, None, spread) == 300
    assert delay_after(1, "10", spread) == 300
    assert delay_after(1, "400", spread) == 400
    assert delay_after(1, "99999999999999999999999", spread) == 600
    assert delay_after(1, later(-100), spread) == 300
    assert delay_after(1, later(450), spread) == pytest.approx(450, abs=2)
    assert delay_after(1, later(10**6), spread) == 600
    beyond = ("Mon, 01 Jan 99999999999 00:00:00 GMT", "Mon, 01 Jan 2026 00:00:00 +99999999999999")
    for nonsense in ("", "-1", "1.5", "soon", "²", "Mon, 99 Foo 2026 00:00:00 GMT", *beyond):
        assert delay_after(1, nonsense, spread) == 300, nonsense
    assert delay_after(len(SCHEDULE), "1", spread) is None


@pytest.mark.parametrize(("status", "counts"), [(429, True), (503, True), (500, False)])
def test_which_answers_may_ask_for_time(hooked: Hooked, stack: Stack, status: int, counts: bool) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(status, {"Retry-After": "3600"})
    hooked.ended()
    shown = delivery(hooked, endpoint_id, tries=1)
    wait = seconds_until_next(stack, shown["id"])
    assert (8 - 0.1 <= wait <= 12 + 0.1) if counts else (4 - 0.1 <= wait <= 6 + 0.1)


def test_gone_disables_the_endpoint_and_nothing_more_is_sent(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(410)
    hooked.ended()
    delivery(hooked, endpoint_id, status="failed", response_status=410)
    shown = hooked.get(endpoint_id)
    assert (shown["disabled"], shown["disabled_reason"]) == (True, "gone")
    hooked.ended()
    other = hooked.endpoint("/other")
    hooked.ended()
    until(lambda: hooked.receiver.of("/other"))
    assert len(hooked.receiver.of("/hook")) == 1
    assert [one["status"] for one in hooked.deliveries(other["id"])] != []


def test_five_days_of_failures_disable_the_endpoint(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(500)
    hooked.ended()
    waiting = delivery(hooked, endpoint_id, tries=1)
    failing_since = "UPDATE webhook_endpoints SET failing_since = now() - $2::interval WHERE id = $1"
    stack.sql(failing_since, UUID(endpoint_id), timedelta(days=4, hours=23))
    make_due(stack, waiting["id"])
    delivery(hooked, endpoint_id, tries=2)
    assert not hooked.get(endpoint_id)["disabled"]
    stack.sql(failing_since, UUID(endpoint_id), timedelta(days=5))
    make_due(stack, waiting["id"])
    delivery(hooked, endpoint_id, tries=3)
    shown = hooked.get(endpoint_id)
    assert (shown["disabled"], shown["disabled_reason"]) == (True, "failing")
    # What waits is not sent; enabling begins anew.
    make_due(stack, waiting["id"])
    delivery(hooked, endpoint_id, status="failed", error="endpoint_disabled")
    assert len(hooked.receiver.messages) == 3
    enabled = hooked.api.json_of(hooked.api.patch(f"/v1/webhook-endpoints/{endpoint_id}", json={"disabled": False}))
    assert (enabled["disabled"], enabled["disabled_reason"], enabled["failing_since"]) == (False, None, None)


def test_a_head_of_two_megabytes_is_no_answer(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint()["id"]
    head = b"HTTP/1.1 200 OK\r\n" + (b"A: " + b"a" * 50_000 + b"\r\n") * 40 + b"\r\n"
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(raw=head)
    hooked.ended()
    delivery(hooked, endpoint_id, tries=1, status="pending", error="no_answer", response_status=None)


def test_neither_a_url_nor_what_a_receiver_says_is_in_the_log(hooked: Hooked, hooking_server: Server) -> None:
    token, echo = secrets.token_hex(16), secrets.token_hex(16)
    endpoint_id = hooked.endpoint(f"/hook?token={token}")["id"]
    raw = f"HTTP/1.1 200 OK\r\ngarbage without colon\r\n{echo}\r\n\r\n".encode()
    hooked.receiver.behaviours[f"/hook?token={token}"] = lambda _: Answer(raw=raw)
    hooked.ended()
    shown = delivery(hooked, endpoint_id, status="delivered")
    log = hooking_server.app.log
    until(lambda: shown["id"] in log.read_text(), what="the line about it")
    assert token not in log.read_text()
    assert echo not in log.read_text()


@pytest.mark.parametrize("kept", [{"another": "name"}, {"secret": "whsec_1"}], ids=["before", "in the thread"])
def test_a_defect_is_a_failed_try(hooked: Hooked, hooking_server: Server, stack: Stack, kept: dict[str, str]) -> None:
    """Nobody foresaw this. It ends as a failure of the receiver's does, and is told as ours."""
    endpoint_id = hooked.endpoint()["id"]
    [row] = stack.sql("SELECT path FROM webhook_secrets WHERE endpoint_id = $1", UUID(endpoint_id))
    assert stack.bao.call("POST", f"secret/data/{row['path']}", {"data": kept})[0] == 200
    hooked.ended()
    for tries in range(1, len(SCHEDULE) + 1):
        shown = delivery(hooked, endpoint_id, tries=tries, status="pending", error="internal_error")
        assert seconds_until_next(stack, shown["id"]) >= 0.8 * SCHEDULE[tries - 1] - 0.1
        make_due(stack, shown["id"])
    shown = delivery(hooked, endpoint_id, tries=len(SCHEDULE) + 1, status="failed", error="internal_error")
    assert hooked.receiver.messages == []
    broke = [line for line in hooking_server.app.log.read_text().splitlines() if '"webhook_broke"' in line]
    assert sum(shown["id"] in line for line in broke) == len(SCHEDULE) + 1


def test_a_receiver_that_says_nothing_is_given_up_after_15_seconds(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = hooked.receiver.hang
    hooked.ended()
    shown = until(lambda: [one for one in hooked.deliveries(endpoint_id) if one["tries"]], 25)[0]
    assert (shown["error"], shown["response_status"]) == ("timeout", None)
    assert 14_000 < shown["duration_ms"] < 20_000


# --- nobody delays another --------------------------------------------------------------------------------------------


def test_a_dead_endpoint_delays_nobody(hooked: Hooked) -> None:
    """Of the same organization even: while one hangs with a long queue, of 20 messages to another 19 come within a second."""
    hooked.receiver.behaviours["/dead"] = hooked.receiver.hang
    hooked.endpoint("/dead")
    hooked.endpoint("/healthy")
    ended: dict[str, float] = {}
    for _ in range(20):
        run_id = hooked.started()
        hooked.api.report(run_id, status="success")
        ended[run_id] = time.monotonic()
        until(lambda: len(hooked.receiver.of("/healthy")) == len(ended))
    waits = [message.at - ended[message.event["run"]["id"]] for message in hooked.receiver.of("/healthy")]
    assert 1 <= len(hooked.receiver.of("/dead")) <= 8, "only so many are under way at once"
    assert sorted(waits)[18] < 1, waits


def test_organizations_whose_endpoints_hang_delay_no_other(
    hooked: Hooked, hooking_server: Server, stack: Stack
) -> None:
    """Together they have more to send than there are places, and none of them has failed yet."""
    hooked.receiver.behaviours["/dead"] = hooked.receiver.hang
    hooked.endpoint("/healthy")
    others: list[str] = []
    for _ in range(4):
        with hooking_server.client() as api:
            for _ in range(2):
                api.webhook_endpoint(f"{hooked.receiver.url}/dead")
            stack.new_events(api.organization, 20)
            others.append(api.organization)
    until(lambda: len(hooked.receiver.of("/dead")) >= 48)
    ended: dict[str, float] = {}
    for _ in range(20):
        run_id = hooked.started()
        hooked.api.report(run_id, status="success")
        ended[run_id] = time.monotonic()
        until(lambda: len(hooked.receiver.of("/healthy")) == len(ended))
    waits = [message.at - ended[message.event["run"]["id"]] for message in hooked.receiver.of("/healthy")]
    assert sorted(waits)[18] < 1, waits
    stack.sql("DELETE FROM webhook_events WHERE organization_id = ANY($1)", others)


def test_an_endpoint_that_failed_has_one_place(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint("/dead")["id"]
    hooked.receiver.behaviours["/dead"] = hooked.receiver.hang
    stack.sql("UPDATE webhook_endpoints SET failing_since = now() WHERE id = $1", UUID(endpoint_id))
    for _ in range(5):
        hooked.ended()
    hooked.endpoint("/healthy")
    hooked.ended()
    until(lambda: hooked.receiver.of("/healthy"))
    until(lambda: hooked.receiver.of("/dead"))
    assert len(hooked.receiver.of("/dead")) == 1


def test_what_is_dropped_delays_nobody(hooked: Hooked, hooking_server: Server, stack: Stack) -> None:
    """20,000 messages to an endpoint that is disabled, and meanwhile those of another organization."""
    hooked.endpoint("/healthy")
    with hooking_server.client() as api:
        disabled = api.webhook_endpoint(f"{hooked.receiver.url}/disabled")
        api.json_of(api.patch(f"/v1/webhook-endpoints/{disabled}", json={"disabled": True}))
        stack.sql(
            "WITH events AS (INSERT INTO webhook_events"
            " (id, organization_id, run_id, attempt, event_type, occurred_at, body, is_fanned_out)"
            " SELECT gen_random_uuid(), $1, gen_random_uuid(), 1, 'run_complete', now(), '{}', true"
            " FROM generate_series(1, 20000) RETURNING id)"
            " INSERT INTO webhook_deliveries (id, event_id, endpoint_id, organization_id)"
            " SELECT gen_random_uuid(), id, $2, $1 FROM events",
            api.organization,
            UUID(disabled),
        )
    dropped = "SELECT error FROM webhook_deliveries WHERE endpoint_id = $1 AND status = 'failed' LIMIT 1"
    until(lambda: stack.sql(dropped, UUID(disabled)) == [{"error": "endpoint_disabled"}], what="the first drop")
    waits: list[float] = []
    for _ in range(5):
        run_id = hooked.started()
        hooked.api.report(run_id, status="success")
        ended = time.monotonic()
        until(lambda: len(hooked.receiver.of("/healthy")) > len(waits))
        waits.append(hooked.receiver.messages[-1].at - ended)
    pending = "SELECT 1 FROM webhook_deliveries WHERE endpoint_id = $1 AND status = 'pending' LIMIT 1"
    are_left = stack.sql(pending, UUID(disabled))
    stack.sql("DELETE FROM webhook_events WHERE organization_id = $1", api.organization)
    assert max(waits) < 1, waits
    assert are_left, "it was over too soon to show anything"
    assert hooked.receiver.of("/disabled") == []


def test_endings_of_one_organization_keep_no_other_waiting(
    hooked: Hooked, hooking_server: Server, stack: Stack
) -> None:
    """Thousands of one organization are to be fanned out, and meanwhile another's run ends."""
    hooked.endpoint("/healthy")
    hooked.receiver.behaviours["/busy"] = hooked.receiver.hang
    with hooking_server.client() as api:
        api.webhook_endpoint(f"{hooked.receiver.url}/busy")
        stack.new_events(api.organization, 10_000)
    run_id = hooked.started()
    hooked.api.report(run_id, status="success")
    ended = time.monotonic()
    until(lambda: hooked.receiver.of("/healthy"))
    waiting = "SELECT count(*) AS n FROM webhook_events WHERE organization_id = $1 AND NOT is_fanned_out"
    [left] = stack.sql(waiting, api.organization)
    stack.sql("DELETE FROM webhook_events WHERE organization_id = $1", api.organization)
    [message] = hooked.receiver.of("/healthy")
    assert left["n"] > 1_000, "it was over too soon to show anything"
    assert message.at - ended < 1


NEW_EVENT = (
    "INSERT INTO webhook_events (id, organization_id, run_id, attempt, event_type, occurred_at, body)"
    " SELECT gen_random_uuid(), organization_id, gen_random_uuid(), 1, 'run_complete', now() - age * interval '1 s', '{}'"
    " FROM unnest($1::text[], $2::int[]) AS event (organization_id, age)"
)


def test_organizations_are_fanned_out_in_turns(stack: Stack) -> None:
    """Of as many as a batch has places for, each has a part of it; of more, the next batch begins after the last one."""

    def batch(run: Callable[..., list[dict[str, Any]]], after: str) -> Counter[str]:
        rows = run(FAN_OUT.sql, *FAN_OUT.arguments({"after": after, "batch": BATCH}))
        return Counter(row["organization_id"] for row in rows)

    busy, *quiet = [f"turns-{place:03}" for place in range(6)]
    with stack.held(NEW_EVENT, [busy] * 300 + quiet, [60] * 300 + [0] * 5) as run:
        assert batch(run, "turns") == {busy: BATCH // 6, **dict.fromkeys(quiet, 1)}
        assert batch(run, "turns") == {busy: BATCH}
    many = [f"turns-{place:03}" for place in range(BATCH + 50)]
    with stack.held(NEW_EVENT, many * 2, [60] * len(many) * 2) as run:
        assert batch(run, "turns") == dict.fromkeys(many[:BATCH], 1)
        assert batch(run, many[BATCH - 1]) == dict.fromkeys(many[BATCH:], 2)
        assert batch(run, "turns") == dict.fromkeys(many[:BATCH], 1)


# --- leases -----------------------------------------------------------------------------------------------------------


async def another_replica(stack: Stack, ahead: timedelta) -> None:
    """One round of another process whose clock is that much ahead, and all that it sends."""
    services = Services.open(settings_of(stack, WEBHOOK_ALLOW="127.0.0.0/8"))
    deliverer = Deliverer(services, ahead=ahead)
    try:
        await deliverer.round()
    finally:
        await deliverer.close()
        await services.close()


def test_what_is_being_sent_is_not_sent_by_another_until_the_lease_has_run_out(hooked: Hooked, stack: Stack) -> None:
    hooked.receiver.behaviours["/hook"] = hooked.receiver.hang
    endpoint_id = hooked.endpoint()["id"]
    hooked.ended()
    until(lambda: hooked.receiver.messages)
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(202)
    asyncio.run(another_replica(stack, timedelta(seconds=50)))
    assert len(hooked.receiver.messages) == 1
    asyncio.run(another_replica(stack, timedelta(seconds=61)))
    first, second = hooked.receiver.messages
    assert first.id == second.id
    shown = delivery(hooked, endpoint_id, status="delivered", response_status=202)
    # The first, answered at last, has no say any more.
    hooked.receiver.released.set()
    hooked.endpoint("/other")
    hooked.ended()
    until(lambda: hooked.receiver.of("/other"))
    assert shown in hooked.deliveries(endpoint_id)


# --- again by hand ----------------------------------------------------------------------------------------------------


def test_a_test_message_is_like_any_other(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint(description="with a test")["id"]
    hooked.endpoint("/other")
    api = hooked.api
    made = api.json_of(api.post(f"/v1/webhook-endpoints/{endpoint_id}/test"), 201)
    assert (made["status"], made["run_id"], made["attempt"]) == ("pending", None, None)
    shown = delivery(hooked, endpoint_id, status="delivered")
    assert shown["id"] == made["id"]
    [message] = hooked.receiver.messages
    assert message.path == "/hook"
    event = message.event
    assert event["event_type"] == "run_complete"
    assert event["run"].keys() == api.run().keys()
    assert (event["run"]["id"], event["run"]["organization_id"]) == (str(UUID(int=0)), api.organization)


def test_a_delivery_can_be_sent_again_whatever_became_of_it(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.ended()
    first = delivery(hooked, endpoint_id, status="delivered")
    api = hooked.api
    again = api.json_of(api.post(f"/v1/webhook-deliveries/{first['id']}/resend"))
    assert (again["id"], again["status"]) == (first["id"], "pending")
    until(lambda: len(hooked.receiver.messages) == 2)
    one, two = hooked.receiver.messages
    assert (one.id, one.body) == (two.id, two.body)
    delivery(hooked, endpoint_id, status="delivered")
    stack.sql("UPDATE webhook_deliveries SET status = 'failed' WHERE id = $1", UUID(first["id"]))
    api.json_of(api.post(f"/v1/webhook-deliveries/{first['id']}/resend"))
    until(lambda: len(hooked.receiver.messages) == 3)


def test_what_was_missed_since_a_time_is_recovered(hooked: Hooked, stack: Stack) -> None:
    """What failed, and what happened while the endpoint was disabled; not what it has, nor what is older."""
    endpoint_id = hooked.endpoint()["id"]
    api, path = hooked.api, f"/v1/webhook-endpoints/{endpoint_id}"
    too_old, had, failed = (hooked.ended()["id"] for _ in range(3))
    until(lambda: len(hooked.receiver.messages) == 3)
    until(lambda: all(one["status"] == "delivered" for one in hooked.deliveries(endpoint_id)))
    failed_events = "SELECT id FROM webhook_events WHERE run_id = ANY($1)"
    update = f"UPDATE webhook_deliveries SET status = 'failed' WHERE event_id IN ({failed_events})"
    stack.sql(update, [UUID(too_old), UUID(failed)])
    api.json_of(api.patch(path, json={"disabled": True}))
    missed = [hooked.ended()["id"] for _ in range(3)]
    refused = api.post(f"{path}/recover", json={"since": "2026-01-01T00:00:00Z"})
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_endpoint_disabled")
    api.json_of(api.patch(path, json={"disabled": False}))
    hooked.receiver.messages.clear()
    [row] = stack.sql("SELECT occurred_at FROM webhook_events WHERE run_id = $1", UUID(had))
    api.json_of(api.post(f"{path}/recover", json={"since": row["occurred_at"].isoformat()}), 202)
    until(lambda: not hooked.get(endpoint_id)["is_recovering"])
    until(
        lambda: all(one["status"] == "delivered" or one["run_id"] == too_old for one in hooked.deliveries(endpoint_id))
    )
    assert sorted(message.event["run"]["id"] for message in hooked.receiver.messages) == sorted([failed, *missed])


def test_what_was_sent_of_a_run_is_listed_also_when_the_run_is_gone(hooked: Hooked, foreign: Client) -> None:
    api = hooked.api
    endpoints = {hooked.endpoint(path)["id"] for path in ("/one", "/two")}
    run = hooked.ended()
    hooked.ended()
    path = f"/v1/runs/{run['id']}/webhook-deliveries"
    assert api.retry(run["id"]).status_code == 200
    api.report(run["id"], status="running")
    api.report(run["id"], status="error")

    def listed(**query: int) -> dict[str, Any]:
        found: dict[str, Any] = api.json_of(api.get(path, params=query))
        return found

    until(lambda: [one["status"] for one in listed()["items"]] == ["delivered"] * 4)
    items = listed()["items"]
    assert {(one["endpoint_id"], one["attempt"]) for one in items} == {(one, n) for one in endpoints for n in (1, 2)}
    assert [one["attempt"] for one in items] == [2, 2, 1, 1]
    assert all(one in hooked.deliveries(one["endpoint_id"]) for one in items)
    page = listed(skip=1, limit=2)
    assert page.items() >= {"items": items[1:3], "total": 4, "skip": 1, "limit": 2}.items()
    assert api.json_of(api.get(path, params={"after": page["next"]}))["items"] == items[3:]
    assert foreign.get(path).status_code == 404
    assert api.delete(f"/v1/runs/{run['id']}").status_code == 204
    assert listed()["items"] == items
    assert api.json_of(api.get(f"/v1/runs/{api.finished()['id']}/webhook-deliveries"))["items"] == []
    assert api.get(f"/v1/runs/{uuid4()}/webhook-deliveries").json()["code"] == "run_not_found"
    api.delete(f"/v1/webhook-endpoints/{items[0]['endpoint_id']}")
    assert listed()["total"] == 2


@pytest.mark.parametrize("what", ["webhook-deliveries", "events"])
def test_whether_there_is_a_run_is_found_out_without_reading_it(hooked: Hooked, stack: Stack, what: str) -> None:
    """What a run produced can be 100 MB, and an empty page says nothing of it: nobody may look there now."""
    api = hooked.api
    run_id = api.finished()["id"]
    events = "SELECT 1 FROM run_events WHERE run_id = $1::text::uuid"
    until(lambda: len(stack.sql(events, run_id)) == 3)
    stack.sql("DELETE FROM run_events WHERE run_id = $1::text::uuid", run_id)
    with stack.held("LOCK TABLE run_outputs IN ACCESS EXCLUSIVE MODE"):
        assert api.json_of(api.get(f"/v1/runs/{run_id}/{what}"))["items"] == []
        assert api.get(f"/v1/runs/{uuid4()}/{what}").json()["code"] == "run_not_found"


def test_more_than_a_batch_is_recovered(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    stack.sql(
        "INSERT INTO webhook_events (id, organization_id, run_id, attempt, event_type, occurred_at, body, is_fanned_out)"
        " SELECT gen_random_uuid(), $1, gen_random_uuid(), 1, 'run_complete', now() - interval '1 hour', '{}', true"
        " FROM generate_series(1, 250)",
        hooked.api.organization,
    )
    since = {"since": "2026-01-01T00:00:00Z"}
    hooked.api.json_of(hooked.api.post(f"/v1/webhook-endpoints/{endpoint_id}/recover", json=since), 202)
    until(lambda: len(hooked.receiver.messages) == 250)
    assert len({message.id for message in hooked.receiver.messages}) == 250


# --- what goes --------------------------------------------------------------------------------------------------------


def test_what_is_old_goes_with_its_deliveries(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    old, kept = hooked.ended()["id"], hooked.ended()["id"]
    until(lambda: [one["status"] for one in hooked.deliveries(endpoint_id)] == ["delivered"] * 2)
    age = "UPDATE webhook_events SET occurred_at = now() - $2::interval WHERE run_id = $1"
    stack.sql(age, UUID(old), timedelta(days=7))
    stack.sql(age, UUID(kept), timedelta(days=6, hours=23))
    until(lambda: [one["run_id"] for one in hooked.deliveries(endpoint_id)] == [kept])


def test_a_run_that_is_deleted_before_its_message_was_sent(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(500)
    run = hooked.ended()
    waiting = delivery(hooked, endpoint_id, tries=1)
    assert hooked.api.delete(f"/v1/runs/{run['id']}").status_code == 204
    make_due(stack, waiting["id"])
    delivery(hooked, endpoint_id, status="failed", error="run_deleted")
    assert len(hooked.receiver.messages) == 1


def test_nothing_is_sent_to_an_endpoint_that_was_deleted(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(500)
    hooked.ended()
    waiting = delivery(hooked, endpoint_id, tries=1)
    assert hooked.api.delete(f"/v1/webhook-endpoints/{endpoint_id}").status_code == 204
    make_due(stack, waiting["id"])
    state = "SELECT status FROM webhook_deliveries WHERE id = $1"
    until(lambda: stack.sql(state, UUID(waiting["id"])) == [{"status": "failed"}])
    assert len(hooked.receiver.messages) == 1
    for path in (f"/v1/webhook-deliveries/{waiting['id']}", f"/v1/webhook-endpoints/{endpoint_id}/deliveries"):
        assert hooked.api.get(path).status_code == 404


def test_a_changed_url_counts_for_what_waits(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    hooked.receiver.behaviours["/hook"] = lambda _: Answer(500)
    hooked.ended()
    waiting = delivery(hooked, endpoint_id, tries=1)
    patch = {"url": f"{hooked.receiver.url}/new"}
    changed = hooked.api.json_of(hooked.api.patch(f"/v1/webhook-endpoints/{endpoint_id}", json=patch))
    assert changed["failing_since"] is None, "the new one has not failed"
    make_due(stack, waiting["id"])
    until(lambda: hooked.receiver.of("/new"))
    assert hooked.receiver.of("/new")[0].id == waiting["id"]


def test_a_message_answers_to_nobody(hooked: Hooked) -> None:
    """Whatever a receiver does, the run is as it was."""
    hooked.endpoint()

    def slander(message: Message) -> Answer:
        return Answer(500, {"Set-Cookie": "a=b"}, message.body)

    hooked.receiver.behaviours["/hook"] = slander
    run = hooked.ended(output_data={"a": 1})
    until(lambda: hooked.receiver.messages)
    assert hooked.api.get_run(run["id"]) == run
