"""Run with the newest SDK and FastAPI: the receiver that the vendor documents, taken from the SDK's own description, gets a
message as it came and one that was altered. Prints its replies."""

import asyncio
import importlib.metadata
import json
import os
import re
import sys
from typing import Any

import httpx

job = json.load(sys.stdin)
described = str(importlib.metadata.metadata("cyberdesk").json["description"])
[code] = [block for block in re.findall(r"```python\n(.*?)```", described, re.DOTALL) if "svix.webhooks" in block]
os.environ["SVIX_WEBHOOK_SECRET"] = job["secret"]
names: dict[str, Any] = {}
out, sys.stdout = sys.stdout, sys.stderr  # it prints what it gets
exec(code, names)


async def post(body: str) -> list[Any]:
    transport = httpx.ASGITransport(names["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
        answer = await client.post("/webhooks/cyberdesk", content=body, headers=job["headers"])
        return [answer.status_code, answer.json()]


json.dump([asyncio.run(post(body)) for body in (job["body"], "{}")], out)
