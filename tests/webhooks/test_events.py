"""Which endings are sent, and what is said of them."""

import json
import secrets
from typing import Any
from uuid import UUID

import pytest

from tests.support.client import file_input
from tests.support.server import start_server
from tests.support.stack import Stack
from tests.support.waiting import until
from tests.webhooks.conftest import Hooked


def received(hooked: Hooked, count: int = 1, path: str = "/hook") -> list[dict[str, Any]]:
    until(lambda: len(hooked.receiver.of(path)) >= count, what=f"{count} messages")
    return [message.event for message in hooked.receiver.of(path)]


def test_a_report_that_ends_a_run_is_sent_as_get_shows_it(hooked: Hooked) -> None:
    hooked.endpoint()
    run_id = hooked.started(
        input_values={"n": 1.0, "text": "ü\u2028</script>"},
        sensitive_input_values={"password": "x"},
        file_inputs=[file_input()],
        start_session=True,
        session_alias="a",
        release_session_after=True,
    )
    output = hooked.api.upload(run_id)["id"]
    hooked.api.report(
        run_id,
        status="error",
        error=["it broke", "badly"],
        output_data={"big": 2**60, "nested": [{"x": None}]},
        run_message_history=[{"role": "assistant", "content": "done"}],
        output_attachment_ids=[output],
    )
    [event] = received(hooked)
    assert event.keys() == {"event_id", "event_type", "occurred_at", "run"}
    assert event["event_type"] == "run_complete"
    UUID(event["event_id"])
    assert event["occurred_at"].endswith("Z")
    assert event["run"] == hooked.api.get_run(run_id)
    assert event["run"]["attempt"] == 1


def test_every_way_of_ending_is_sent_once(hooked: Hooked, stack: Stack) -> None:
    hooked.endpoint()
    api = hooked.api
    reported = hooked.ended()["id"]
    task_failed = hooked.ended(status="task_failed")["id"]
    waiting = str(api.run(workflow_id=hooked.workflow_id)["id"])
    api.report(waiting, status="cancelled")
    # A deleted machine ends what needs it.
    machine_id = api.machine()
    pinned = [str(api.run(workflow_id=hooked.workflow_id, machine_id=machine_id)["id"]) for _ in range(3)]
    assert api.delete(f"/v1/machines/{machine_id}").status_code == 204
    # A session that is cleared at its machine ends what belongs to it.
    session_machine = api.machine()
    in_session = api.run(workflow_id=hooked.workflow_id, start_session=True, machine_id=session_machine)
    until(lambda: api.get_run(in_session["id"])["assigned_machine_id"] == session_machine)
    api.json_of(api.patch(f"/v1/machines/{session_machine}", json={"reserved_session_id": None}))
    # Silence.
    silent = hooked.started()
    stack.sql("UPDATE runs SET reported_at = now() - interval '1 day' WHERE id = $1", UUID(silent))
    server = start_server(stack, RUN_SILENCE_SECONDS=3600, WEBHOOK_ALLOW="127.0.0.0/8")
    try:
        until(lambda: api.get_run(silent)["status"] == "error")
    finally:
        server.app.stop()

    expected = [reported, task_failed, waiting, *pinned, in_session["id"], silent]
    events = received(hooked, len(expected))
    assert sorted(event["run"]["id"] for event in events) == sorted(expected)
    for event in events:
        assert event["run"] == api.get_run(event["run"]["id"])
    # Said again: not an ending.
    api.report(reported, status="success")
    rows = stack.sql("SELECT run_id FROM webhook_events WHERE organization_id = $1", api.organization)
    assert len(rows) == len(expected)


def test_nothing_is_written_that_nobody_wants(hooked: Hooked, stack: Stack) -> None:
    """No endpoint, then an endpoint, but a workflow that does not want it."""
    hooked.ended()
    hooked.endpoint()
    hooked.api.finished()
    wanted = hooked.ended()["id"]
    [event] = received(hooked)
    assert event["run"]["id"] == wanted
    rows = stack.sql("SELECT run_id FROM webhook_events WHERE organization_id = $1", hooked.api.organization)
    assert [str(row["run_id"]) for row in rows] == [wanted]


def test_a_retry_right_after_changes_nothing_of_what_is_sent(hooked: Hooked) -> None:
    endpoint_id = hooked.endpoint(disabled=True)["id"]
    first = hooked.ended(output_data={"answer": 1})
    api = hooked.api
    assert api.retry(first["id"], input_values={"other": 1}).status_code == 200
    api.report(first["id"], status="running")
    second = api.report(first["id"], status="error", output_data={"answer": 2})
    api.json_of(api.patch(f"/v1/webhook-endpoints/{endpoint_id}", json={"disabled": False}))
    since = {"since": first["created_at"]}
    api.json_of(api.post(f"/v1/webhook-endpoints/{endpoint_id}/recover", json=since), 202)
    events = received(hooked, 2)
    by_attempt = {event["run"]["attempt"]: event["run"] for event in events}
    assert by_attempt == {1: first, 2: second}
    assert len({event["event_id"] for event in events}) == 2


def test_each_endpoint_gets_its_own_message_of_one_event(hooked: Hooked) -> None:
    for path in ("/one", "/two"):
        hooked.endpoint(path)
    hooked.ended()
    [one], [two] = received(hooked, path="/one"), received(hooked, path="/two")
    assert one == two
    messages = hooked.receiver.messages
    assert len({message.id for message in messages}) == 2
    assert all("." not in message.id for message in messages)


LIMIT = 256 * 1024


@pytest.mark.parametrize(
    ("history", "output", "left_out"),
    [
        (LIMIT // 2, 10, []),
        (LIMIT + 1, 10, ["run_message_history"]),
        (4 * LIMIT, 10, ["run_message_history"]),
        (10, LIMIT + 1, ["run_message_history", "output_data"]),
        (2 * LIMIT // 3, 2 * LIMIT // 3, ["run_message_history"]),
        (0, LIMIT + 1, ["output_data"]),
    ],
)
def test_what_is_too_large_is_left_out_and_named(
    hooked: Hooked, history: int, output: int, left_out: list[str]
) -> None:
    hooked.endpoint()
    run_id = hooked.started(input_values={"kept": True})
    # One that PostgreSQL can compress, and one that it cannot.
    content = "x" * history if history < LIMIT else secrets.token_hex(history // 2)
    messages = [{"content": content}] if history else None
    shown = hooked.api.report(
        run_id, status="success", run_message_history=messages, output_data={"text": "y" * output}
    )
    [event] = received(hooked)
    assert event.get("truncated", []) == left_out
    assert event["run"] == shown | dict.fromkeys(left_out)
    assert len(hooked.receiver.messages[0].body) <= LIMIT


def test_the_largest_body_is_kept_to_the_byte(hooked: Hooked) -> None:
    """What just fits is sent whole: not much of the limit is given away."""
    hooked.endpoint()
    hooked.ended()
    [event] = received(hooked)
    empty = len(json.dumps(event))
    run_id = hooked.started()
    hooked.api.report(run_id, status="success", output_data={"text": "y" * (LIMIT - empty - 700)})
    assert received(hooked, 2)[1]["run"]["output_data"] is not None


def test_inputs_and_errors_are_bounded_too(hooked: Hooked) -> None:
    hooked.endpoint()
    run_id = hooked.started(input_values={"text": "z" * LIMIT})
    hooked.api.report(run_id, status="error", error=["e" * 99_000, "e" * 99_000, "e" * 63_500])
    [event] = received(hooked)
    assert event["truncated"] == ["input_values", "error"]
    assert len(hooked.receiver.messages[0].body) <= LIMIT


def test_deleting_a_run_deletes_what_was_said_of_it(hooked: Hooked, stack: Stack) -> None:
    endpoint_id = hooked.endpoint()["id"]
    run = hooked.ended(output_data={"canary": "deleted with its run"})
    received(hooked)
    api = hooked.api
    [delivery] = until(lambda: [one for one in hooked.deliveries(endpoint_id) if one["status"] == "delivered"])
    assert api.delete(f"/v1/runs/{run['id']}").status_code == 204
    bodies = stack.sql("SELECT body FROM webhook_events WHERE organization_id = $1", api.organization)
    assert [row["body"] for row in bodies] == [None]
    refused = api.post(f"/v1/webhook-deliveries/{delivery['id']}/resend")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_body_deleted")
    assert hooked.deliveries(endpoint_id) == [delivery], "the log stays"
