"""Retries without HTTP, as a bulk retry does them.

`python -m benchmarks.direct` takes a plan on standard input, as load.py does.
"""

import json
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import uvloop

from app.access.auth import Actor
from app.config import Settings
from app.idempotency import Reply
from app.runs.retry import Retry, retry_runs
from app.schemas.runs import RunRetry
from app.services import Services
from benchmarks.load import Outcome, apart


@dataclass(frozen=True)
class Plan:
    """Runs to retry, all in one call, and the settings of the service."""

    settings: Mapping[str, str]
    organization: str
    ids: Sequence[str]
    body: bytes


def run(plan: Plan) -> Outcome:
    """Do it in a process of its own. Raises LoadError."""
    return apart("benchmarks.direct", plan)


async def _retried(plan: Plan) -> dict[str, Any]:
    services = Services.open(Settings.model_validate({name.lower(): value for name, value in plan.settings.items()}))
    options = RunRetry.model_validate_json(plan.body)
    warm, *retries = (Retry(UUID(one), plan.organization, Actor(by="bulk"), options) for one in plan.ids)
    await retry_runs(services, [warm])  # connects
    used, began = time.process_time(), time.perf_counter()
    outcomes = await retry_runs(services, retries)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    await services.close()
    if not all(isinstance(one, Reply) for one in outcomes):
        raise RuntimeError(f"not retried: {next(one for one in outcomes if not isinstance(one, Reply))!r}")
    count = len(outcomes)
    each = seconds / count * 1000
    return {
        "sent": len(plan.ids),
        "requests": count,
        "seconds": seconds,
        "p50": each,
        "p99": each,
        "client_busy": used / seconds,
        "reply_bytes": 0,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(_retried(pickle.load(sys.stdin.buffer)))))
