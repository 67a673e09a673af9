"""What schemathesis cannot know of this service. Loaded by the process that test_fuzz.py starts."""

from typing import Any
from uuid import uuid4

import schemathesis


@schemathesis.hook
def before_call(_: Any, case: Any, __: Any) -> None:
    """Nobody waits for half a minute here, and a key belongs to one request: the next one with it would be 422."""
    if isinstance(case.query.get("wait"), float | int):
        case.query["wait"] = min(case.query["wait"], 0.05)
    if case.headers.get("Idempotency-Key"):
        case.headers["Idempotency-Key"] = uuid4().hex
