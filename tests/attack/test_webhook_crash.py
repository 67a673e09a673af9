"""Delivery is killed wherever it can be: no message is lost, and each comes under one id, however often."""

from uuid import UUID

from tests.support.faults import FaultyServer, Plan, deliver_as_process
from tests.support.stack import Stack
from tests.support.stored_state import gone
from tests.support.waiting import until
from tests.support.webhook_receiver import Receiver, receiving

MESSAGES = 3


def organization_with_endpoint(stack: Stack, receiver: Receiver) -> str:
    with FaultyServer(stack, WEBHOOK_ALLOW="127.0.0.0/8") as server, server.client() as client:
        client.webhook_endpoint(f"{receiver.url}/hook")
        organization = client.organization
    until(lambda: gone(stack))
    return organization


def test_killed_at_every_point_none_is_lost_and_each_has_one_id(attacked: Stack) -> None:
    with receiving() as receiver:
        organization = organization_with_endpoint(attacked, receiver)
        attacked.new_events(organization, MESSAGES)
        every = deliver_as_process(attacked, Plan())
        assert len(receiver.messages) == MESSAGES
        # What is done for each message is done alike: once is enough.
        points = [point for point in dict.fromkeys(every) if point.endswith("#1")]
        assert len(points) >= 12, points
        assert {"connect before#1", "send after#1", "webhooks.settle after#1", "vault read before#1"} <= set(points)
        for point in points:
            events = attacked.new_events(organization, MESSAGES)
            deliver_as_process(attacked, Plan(point))
            until(lambda: gone(attacked))
            deliver_as_process(attacked, Plan(), ahead=61)  # the lease has run out
            rows = attacked.sql(
                "SELECT id, event_id, status FROM webhook_deliveries WHERE event_id = ANY($1)", list(events)
            )
            assert [row["status"] for row in rows] == ["delivered"] * MESSAGES, point
            came = {(UUID(one.event["event_id"]), UUID(one.id)) for one in receiver.messages}
            expected = {(row["event_id"], row["id"]) for row in rows}
            assert {pair for pair in came if pair[0] in events} == expected, point
