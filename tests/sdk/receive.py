"""Run with an SDK version: is a message what that SDK's type for it reads, and what is in it afterwards?"""

import json
import sys

from openapi_client.cyberdesk_cloud_client.models.run_completed_event import RunCompletedEvent  # type: ignore[import-not-found] # the SDK's venv

job = json.load(sys.stdin)
body = json.loads(job["body"])
if body["event_type"] == "downed_machines":
    from openapi_client.cyberdesk_cloud_client.models.downed_machines_event import (  # type: ignore[import-not-found]
        DownedMachinesEvent,
    )

    json.dump(DownedMachinesEvent.from_dict(body).to_dict(), sys.stdout)
    sys.exit()
event = RunCompletedEvent.from_dict(body)
json.dump(
    {
        "event_id": str(event.event_id),
        "event_type": event.event_type,
        "run_id": str(event.run.id),
        "status": event.run.status.value,
        "run": event.run.to_dict(),
    },
    sys.stdout,
)
