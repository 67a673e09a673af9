"""Retry one run with the SDK's own resends. Run by the SDK's own Python.

Reads {"url", "key", "style", "run_id", "body", "timeout"}; prints {"resend": why} for each resend as it happens, and at the
end {"run": ...} or {"error": ...}.
"""

import asyncio
import importlib
import json
import sys
from typing import Any

# By name: these are packages of another environment.
cyberdesk: Any = importlib.import_module("cyberdesk.client")
httpx: Any = importlib.import_module("httpx")


def say(**fact: Any) -> None:
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


def main() -> None:
    job = json.load(sys.stdin)
    client = cyberdesk.CyberdeskClient(
        job["key"],
        base_url=job["url"],
        timeout=httpx.Timeout(job["timeout"]),
        retry=cyberdesk.RetryConfig(max_retries=5, on_retry=lambda why: say(resend=why)),
    )
    body = cyberdesk.RunRetry.from_dict(job["body"])
    if job["style"] == "sync":
        response = client.runs.retry_sync(job["run_id"], body)
    else:
        response = asyncio.run(client.runs.retry(job["run_id"], body))
    if isinstance(response.data, cyberdesk.RunResponse):
        say(run=response.data.to_dict())
    else:
        say(error=repr(response))


if __name__ == "__main__":
    main()
