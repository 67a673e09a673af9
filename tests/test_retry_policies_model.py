"""Retry policies against a model: a pure function says of a history what must have been retried, and the service agrees.

Many runs live through histories of their own at once. What is planned becomes due by moving its time, as if the database's
clock had stepped; other replicas of the same database may take it, and it happens once.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.stored_state import SOAK, chance
from tests.support.waiting import until

HISTORIES = 10_000 if SOAK else 100
TOGETHER = 100
STEPS = 6

POLICY = {
    "max_retries": 2,
    "delays_seconds": [3600],
    "on": [{"status": "error", "error_code": "again"}],
}
# What may happen to a run in a step. `due` moves time on for all plans of the run, `back` sets the clock back.
STEP = ("fails", "fails", "fails", "breaks", "cancels", "retries", "retries once", "drops", "due", "due", "back")


@dataclass
class Expected:
    """What a run must be like."""

    status: str = "scheduling"
    attempt: int = 1
    left: int | None = 2  # None: no automatic retry is wanted for this attempt
    is_planned: bool = False
    archive: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # retry_planned, retry_dropped


def after(history: Sequence[str]) -> Expected:
    """The model."""
    run = Expected()
    for step in history:
        is_active = run.status == "scheduling"
        ends = {"fails": "error", "breaks": "error", "cancels": "cancelled"}.get(step)
        if is_active and ends is not None:
            run.status = ends
            run.is_planned = step == "fails" and bool(run.left)
            run.told += ["retry_planned"] * run.is_planned
        elif not is_active and step in ("retries", "retries once"):
            _begin(run, "request")
            run.left = 2 if step == "retries" else None
        elif run.is_planned and step == "drops":
            run.is_planned = False
            run.told.append("retry_dropped")
        elif run.is_planned and step == "due":
            _begin(run, "policy")
            assert run.left is not None
            run.left -= 1
    return run


def _begin(run: Expected, by: str) -> None:
    run.status, run.attempt, run.is_planned = "scheduling", run.attempt + 1, False
    run.archive.append(by)


def act(api: Client, stack: Stack, run_id: str, step: str) -> None:
    path = f"/v1/runs/{run_id}"
    reports = {
        "fails": {"status": "error", "error_code": "again"},
        "breaks": {"status": "error", "error_code": "never"},
        "cancels": {"status": "cancelled"},
        "drops": {"next_retry_at": None},
    }
    if step in reports:
        assert api.patch(path, json=reports[step]).status_code in (200, 409)
    elif step in ("retries", "retries once"):
        assert api.retry(run_id, automatic_retries=step == "retries").status_code in (200, 409)


def move(stack: Stack, run_ids: Sequence[str], how: str) -> None:
    stack.sql(f"UPDATE planned_retries SET look_at = look_at {how} WHERE run_id = ANY($1)", run_ids)


def nothing_planned(stack: Stack, run_ids: Sequence[str]) -> bool:
    return not stack.sql("SELECT 1 FROM planned_retries WHERE run_id = ANY($1) LIMIT 1", run_ids)


def live(server: Server, stack: Stack, histories: Sequence[Sequence[str]]) -> None:
    """Runs that live through these histories side by side, each checked at its end."""
    with server.client() as api, ThreadPoolExecutor(4) as pool:
        body = {"main_prompt": "Do it.", "retry_policy": POLICY}
        workflow_id = api.json_of(api.post("/v1/workflows", json=body), 201)["id"]
        runs: list[str] = []
        while len(runs) < len(histories):
            made = api.json_of(
                api.post("/v1/runs/bulk", json={"workflow_id": workflow_id, "count": len(histories) - len(runs)}), 201
            )
            runs += [run["id"] for run in made["created_runs"]]
        for number in range(STEPS):
            steps = [history[number] for history in histories]
            list(pool.map(lambda pair: act(api, stack, *pair), zip(runs, steps, strict=True)))
            due = [run_id for run_id, step in zip(runs, steps, strict=True) if step == "due"]
            move(
                stack, [run_id for run_id, step in zip(runs, steps, strict=True) if step == "back"], "+ interval '1 h'"
            )
            move(stack, due, "- interval '1 day'")
            until(partial(nothing_planned, stack, due), what="what was due has happened or is void")
        shown = api.json_of(api.get("/v1/runs", params={"workflow_id": workflow_id, "limit": TOGETHER}))["items"]
        found = {run["id"]: run for run in shown}
        archives = archived(stack, runs)
        for run_id, history in zip(runs, histories, strict=True):
            check(found[run_id], archives.get(run_id, []), history)
        told: dict[str, list[str]] = {}
        for row in stack.sql(
            "SELECT run_id, event FROM run_events WHERE run_id = ANY($1) AND event LIKE 'retry\\_%' ORDER BY id", runs
        ):
            told.setdefault(str(row["run_id"]), []).append(row["event"])
        assert [told.get(run_id, []) for run_id in runs] == [after(history).told for history in histories]


def archived(stack: Stack, run_ids: Sequence[str]) -> dict[str, list[str]]:
    """Who retried each attempt of these runs, oldest first."""
    found: dict[str, list[str]] = {}
    for row in stack.sql(
        "SELECT run_id, retried_by FROM run_attempts WHERE run_id = ANY($1) ORDER BY attempt", run_ids
    ):
        found.setdefault(str(row["run_id"]), []).append(row["retried_by"])
    return found


def check(run: dict[str, Any], archive: Sequence[str], history: Sequence[str]) -> None:
    expected = after(history)
    found = (run["status"], run["attempt"], run["retries_left"], run["next_retry_at"] is not None)
    assert found == (expected.status, expected.attempt, expected.left or 0, expected.is_planned), history
    assert archive == expected.archive, history


def test_the_service_does_what_the_model_says(server: Server, quiet_server: Server, stack: Stack) -> None:
    """`quiet_server` is a second replica that does the same work."""
    assert quiet_server.stack is stack
    of = chance("histories of retry policies")
    histories = [of.choices(STEP, k=STEPS) for _ in range(HISTORIES)]
    for first in range(0, HISTORIES, TOGETHER):
        live(server, stack, histories[first : first + TOGETHER])
