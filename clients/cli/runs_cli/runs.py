"""What the commands do with runs: find, describe, watch, retry. It prints nothing, so that `runs mcp` can use it, too."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from runs_cli.api import Api, Json
from runs_cli.inputs import UsageError

TERMINAL = frozenset({"success", "error", "cancelled", "task_failed"})
FAILED = frozenset({"error", "cancelled", "task_failed"})
POLL_SECONDS = 1.0
SHORT = "attempt,error,changed_at,created_at,started_at,ended_at,scheduling_reason,assigned_machine_id,session_alias"


class TimedOutError(Exception):
    """What was waited for did not happen in time."""


def is_id(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def run_path(run_id: str, tail: str = "") -> str:
    """Raises UsageError for something that is no id: it must not become another path."""
    if not is_id(run_id):
        raise UsageError(f"A run is named by its id, and {run_id!r} is none. `runs list` shows ids.")
    return f"/v1/runs/{UUID(run_id)}{tail}"


def workflow_id(api: Api, name: str | None) -> str | None:
    """The id of a workflow that is given by its id or its name. Raises UsageError if there is not exactly one."""
    if name is None or is_id(name):
        return name
    found = [one for one in api.pages("/v1/workflows", 10_000) if (one["name"] or "").casefold() == name.casefold()]
    if len(found) != 1:
        raise UsageError(f"{len(found)} workflows are called {name!r}. Give an id.")
    return str(found[0]["id"])


def workflow_names(api: Api) -> dict[str, str]:
    """Names by id, of the newest 1,000 workflows."""
    return {one["id"]: one["name"] or "" for one in api.pages("/v1/workflows", 1000)}


def get(api: Api, run_id: str) -> Json:
    return api.get(run_path(run_id))


def wait(api: Api, run_id: str, seconds: float, changed: Callable[[Json], None] = lambda _: None) -> Json:
    """The run once it has ended; `changed` is called with each new state. Raises TimedOutError."""
    for run in states(api, run_id, seconds):
        changed(run)
        if run["status"] in TERMINAL:
            return run
    raise TimedOutError(f"The run did not end within {seconds:.0f} s. It goes on.")


def states(api: Api, run_id: str, seconds: float) -> Iterator[Json]:
    """The run each time that its state is another one, until the time is over."""
    deadline = time.monotonic() + seconds
    seen: tuple[object, ...] | None = None
    while True:
        run = get(api, run_id)
        state = (run["status"], run["attempt"], run["scheduling_reason"], run["assigned_machine_id"])
        if state != seen:
            seen = state
            yield run
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


def lost_secrets(run: Json, given: dict[str, Any]) -> list[str]:
    """Names of secrets that the run has and a retry with these would remove: a retry replaces all of them."""
    return sorted(set(run["sensitive_input_aliases"] or {}) - set(given)) if given else []


def explain(api: Api, run_id: str) -> Json:
    """A run with its attempts, its newest events and what a retry would do."""
    run = get(api, run_id)
    attempts = api.get(run_path(run_id, "/attempts"), limit=20)["items"]
    events = api.get(run_path(run_id, "/events"), limit=1000)["items"][-30:]
    forecast = api.send("POST", run_path(run_id, "/retry"), {}, dry_run="true")
    return {"run": run, "attempts": attempts, "events": events, "retry": forecast}


def bulk_wait(api: Api, job: Json, changed: Callable[[Json], None], *, outcomes: bool, seconds: float) -> Json:
    """The bulk retry once it has ended or is paused; with `outcomes` once its runs have ended, too. Raises TimedOutError."""
    deadline = time.monotonic() + seconds
    while True:
        changed(job)
        over = job["state"] != "running"
        ended = job["succeeded"] + job["failed"] + job["cancelled"]
        if over and (not outcomes or job["state"] == "paused" or ended >= job["retried"]):
            return job
        if time.monotonic() > deadline:
            raise TimedOutError("The bulk retry is not over yet. It goes on; `runs bulk show` shows it.")
        time.sleep(POLL_SECONDS)
        job = api.get(f"/v1/bulk-retries/{job['id']}")


def seconds_of(run: Json) -> float | None:
    """How long the attempt has run."""
    if run["started_at"] is None:
        return None
    end = datetime.fromisoformat(run["ended_at"]) if run["ended_at"] else datetime.now(UTC)
    return (end - datetime.fromisoformat(run["started_at"])).total_seconds()
