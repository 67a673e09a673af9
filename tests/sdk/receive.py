"""Run with an SDK version: is a message what that SDK's RunCompletedEvent reads, and what is in it afterwards?"""

import json
import sys

from openapi_client.cyberdesk_cloud_client.models.run_completed_event import RunCompletedEvent  # type: ignore[import-not-found] # the SDK's venv

job = json.load(sys.stdin)
event = RunCompletedEvent.from_dict(json.loads(job["body"]))
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
