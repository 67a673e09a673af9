"""`downed_machines`: sent when a connected machine goes down, to the endpoints that name it."""

from typing import Any
from uuid import UUID

import pytest

from app.scheduling.silence import NO_SIGN, NOT_BEGUN
from tests.sdk import environment
from tests.sdk.environment import NEWEST
from tests.support.stack import Stack
from tests.support.waiting import until
from tests.webhooks.conftest import Hooked

BOTH = ["run_complete", "downed_machines"]


def events(hooked: Hooked, path: str = "/hook") -> list[dict[str, Any]]:
    return [message.event for message in hooked.receiver.of(path)]


def written(stack: Stack, hooked: Hooked) -> list[str]:
    """The types of the organization's events."""
    rows = stack.sql(
        "SELECT event_type FROM webhook_events WHERE organization_id = $1 ORDER BY occurred_at", hooked.api.organization
    )
    return [row["event_type"] for row in rows]


def patch(hooked: Hooked, machine: str, **fields: object) -> None:
    hooked.api.json_of(hooked.api.patch(f"/v1/machines/{machine}", json=fields))


def test_a_machine_that_goes_down_is_told_in_the_vendors_model(hooked: Hooked) -> None:
    asked = hooked.endpoint(event_types=BOTH)
    assert hooked.endpoint("/other")["event_types"] == ["run_complete"]
    machine = hooked.api.machine(name="desk-7")
    patch(hooked, machine, status="error")
    until(lambda: events(hooked))
    [event] = events(hooked)
    UUID(event["event_id"])
    assert (event["event_type"], event["organization_id"]) == ("downed_machines", hooked.api.organization)
    assert event.keys() == {"event_id", "event_type", "occurred_at", "organization_id", "machines"}
    [told] = event["machines"]
    shown = hooked.api.json_of(hooked.api.get(f"/v1/machines/{machine}"))
    assert told == {
        "machine_id": machine,
        "organization_id": hooked.api.organization,
        "name": "desk-7",
        "status": "error",
        "last_seen": shown["last_seen"],
        "reason": "A request set the machine to error.",
    }
    [delivery] = hooked.deliveries(asked["id"])
    assert (delivery["event_type"], delivery["run_id"], delivery["attempt"]) == ("downed_machines", None, None)
    # The vendor's own type reads it.
    message = hooked.receiver.of("/hook")[0].body.decode()
    read: dict[str, Any] = environment.run(NEWEST, "receive.py", {"body": message})
    machines = [told | {"last_seen": read["machines"][0]["last_seen"]}]  # it writes times in another way
    assert read == event | {"occurred_at": read["occurred_at"], "machines": machines}
    # The other endpoint gets what it asked for, and nothing else.
    hooked.ended()
    until(lambda: len(events(hooked)) == 2 and events(hooked, "/other"))
    assert [one["event_type"] for one in events(hooked, "/other")] == ["run_complete"]


def test_only_going_down_is_told_and_only_if_alerts_are_wanted(hooked: Hooked, stack: Stack) -> None:
    hooked.endpoint()
    machine = hooked.api.machine()
    patch(hooked, machine, status="disconnected")
    assert written(stack, hooked) == [], "no endpoint asks for it"
    endpoint = hooked.endpoint("/asks", event_types=["downed_machines"])["id"]
    for change in ({"status": "error"}, {"status": "connected"}, {"status": "connected"}, {"name": "desk"}):
        patch(hooked, machine, **change)  # down already, up, or about something else
    patch(hooked, machine, status="disconnected", alerts_enabled=False)
    patch(hooked, machine, status="connected")
    assert written(stack, hooked) == []
    patch(hooked, machine, status="disconnected", alerts_enabled=True)
    assert written(stack, hooked) == ["downed_machines"]
    until(lambda: len(events(hooked, "/asks")) == 1)
    # A recovery sends it again only where it failed, and to no endpoint that does not name it.
    ids = [str(one["id"]) for one in hooked.api.json_of(hooked.api.get("/v1/webhook-endpoints"))["items"]]
    for one in ids:
        body = {"since": "2026-01-01T00:00:00Z"}
        hooked.api.json_of(hooked.api.post(f"/v1/webhook-endpoints/{one}/recover", json=body), 202)
    until(lambda: not any(hooked.get(one)["is_recovering"] for one in ids))
    assert {one: len(hooked.deliveries(one)) for one in ids} == {one: int(one == endpoint) for one in ids}


def test_an_endpoint_that_was_disabled_recovers_it(hooked: Hooked) -> None:
    endpoint = hooked.endpoint(event_types=["downed_machines"], disabled=True)["id"]
    patch(hooked, hooked.api.machine(), status="disconnected")
    change = hooked.api.patch(f"/v1/webhook-endpoints/{endpoint}", json={"disabled": False})
    hooked.api.json_of(change)
    body = {"since": "2026-01-01T00:00:00Z"}
    hooked.api.json_of(hooked.api.post(f"/v1/webhook-endpoints/{endpoint}/recover", json=body), 202)
    until(lambda: [one["event_type"] for one in events(hooked)] == ["downed_machines"])


@pytest.mark.parametrize("begins", [True, False], ids=["silence", "a run that is not begun"])
def test_what_the_service_notices_itself_is_told(hooked: Hooked, stack: Stack, begins: bool) -> None:
    hooked.endpoint(event_types=["downed_machines"])
    machine = hooked.api.machine()
    if begins:
        stack.sql("UPDATE machines SET look_at = now(), last_seen = now() - interval '1 hour' WHERE id = $1", machine)
        reason = NO_SIGN.format(90)
    else:
        stack.sql("UPDATE machines SET starts_with_claim = true WHERE id = $1", machine)
        run = hooked.api.run(machine_id=machine)["id"]
        until(lambda: hooked.api.get_run(run)["assigned_machine_id"])
        stack.sql("UPDATE runs SET awaited_since = now() - interval '1 hour' WHERE id = $1", run)
        reason = NOT_BEGUN.format(120)
    until(lambda: events(hooked))
    [told] = events(hooked)[0]["machines"]
    assert (told["machine_id"], told["status"], told["reason"]) == (machine, "disconnected", reason)
    assert len(events(hooked)) == 1
