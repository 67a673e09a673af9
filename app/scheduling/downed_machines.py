"""The webhook event `downed_machines`: a connected machine went down. One event for each machine, in the vendor's model.

It is written by the statement that changes the machine's status. Only for a machine with `alerts_enabled`, and only if the
organization has an endpoint that asks for this event.
"""

from app.stores.documents import rfc3339
from app.webhooks import outbox

EVENT_TYPE = "downed_machines"


def recorded(machines: str, reason: str) -> str:
    """SQL that writes an event for each of the `machines`, a name of rows with the columns of the table after the change.

    `reason` is SQL for a sentence that says why the machine is down.
    """
    return outbox.inserted(
        f"""
        SELECT event.id, down.organization_id, NULL, NULL, '{EVENT_TYPE}', event.at, convert_to(json_build_object(
                   'event_id', event.id, 'event_type', '{EVENT_TYPE}', 'occurred_at', {rfc3339("event.at")},
                   'organization_id', down.organization_id, 'machines', json_build_array(json_build_object(
                       'machine_id', down.id, 'organization_id', down.organization_id, 'name', down.name,
                       'status', down.status, 'last_seen', {rfc3339("down.last_seen")}, 'reason', {reason}
                   )))::text, 'UTF8')
        FROM {machines} AS down
        CROSS JOIN LATERAL (SELECT down.id AS machine_id, gen_random_uuid() AS id, clock_timestamp() AS at OFFSET 0) AS event
        CROSS JOIN LATERAL (
            SELECT FROM webhook_endpoints e
            WHERE e.organization_id = down.organization_id AND '{EVENT_TYPE}' = ANY (e.event_types) LIMIT 1
        ) AS asking
        WHERE down.alerts_enabled
        """
    )
