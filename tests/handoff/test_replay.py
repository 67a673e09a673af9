"""A workflow that is open while `python -m app worker` is upgraded goes on: the new code replays what the old one has written.

`histories/` holds what released versions have written. Before a release that changes app/handoff/flow.py, add its own:
`RECORD=VERSION python -m pytest tests/handoff/test_replay.py`.
"""

import asyncio
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from temporalio import workflow
from temporalio.client import Client as Temporal
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner
from temporalio.workflow import NondeterminismError

from app.handoff import flow
from tests.support.client import Client
from tests.support.handoff import HandOff
from tests.support.server import Server
from tests.support.waiting import until

HISTORIES = Path(__file__).parent / "histories"
VERSION = os.environ.get("RECORD")
RECORDED = sorted(HISTORIES.glob("*.json"))


def replay(history: WorkflowHistory, code: type = flow.RunAttempt) -> None:
    async def look() -> None:
        await Replayer(workflows=[code], workflow_runner=UnsandboxedWorkflowRunner()).replay_workflow(history)

    asyncio.run(look())


def recorded(file: Path) -> WorkflowHistory:
    return WorkflowHistory.from_json(file.stem, file.read_text())


def test_there_are_histories_of_each_kind_of_end() -> None:
    assert {file.stem.partition("-")[2] for file in RECORDED} >= ENDS.keys()


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_what_a_version_wrote_is_replayed(file: Path) -> None:
    replay(recorded(file))


@workflow.defn(name=flow.WORKFLOW)
class Changed:
    """As somebody might write it who does not know that workflows are open."""

    @workflow.run
    async def run(self, order: flow.Order) -> str:
        await workflow.sleep(1)
        return await flow.RunAttempt().run(order)


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_a_careless_change_would_be_found(file: Path) -> None:
    with pytest.raises(NondeterminismError):
        replay(recorded(file), Changed)


def succeeds(handoff: HandOff, server: Server, client: Client) -> str:
    handoff.executor(server, client)
    return str(handoff.numbered(client)["id"])


def called_off(handoff: HandOff, server: Server, client: Client) -> str:
    handoff.executor(server, client)
    run = handoff.numbered(client, input_values={"seconds": 60})
    until(lambda: client.get_run(run["id"])["status"] == "running", 30)
    client.report(run["id"], status="cancelled")
    return str(run["id"])


def given_up(handoff: HandOff, server: Server, client: Client) -> str:
    handoff.executor(server, client, GIVES_UP="yes")
    return str(handoff.numbered(client)["id"])


def dies(handoff: HandOff, server: Server, client: Client) -> str:
    executor = handoff.executor(server, client)
    run = handoff.numbered(client, input_values={"seconds": 60})
    until(lambda: client.get_run(run["id"])["status"] == "running", 30)
    executor.kill()
    return str(run["id"])


ENDS: dict[str, Callable[[HandOff, Server, Client], str]] = {
    "success": succeeds,
    "called_off": called_off,
    "given_up": given_up,
    "executor_dies": dies,
}


@pytest.mark.parametrize("end", ENDS if VERSION else ["success"])
def test_what_this_version_writes_is_replayed(
    handoff: HandOff, handing_server: Server, client: Client, end: str
) -> None:
    client.machine()
    run_id = ENDS[end](handoff, handing_server, client)
    name = f"run-{run_id}-1-1"
    assert until(lambda: handoff.temporal.command("workflow", "result", "--workflow-id", name) == 0, 30)

    async def fetch() -> WorkflowHistory:
        temporal = await Temporal.connect(handoff.temporal.address)
        return await temporal.get_workflow_handle(name).fetch_history()

    history = asyncio.run(fetch())
    replay(history)
    if VERSION:
        # Not of whom and where: hosts, processes and paths are of no use to the one who replays.
        text = re.sub(r'"(identity|stackTrace)": "(\\.|[^"\\])*"', r'"\1": "-"', history.to_json())
        text = re.sub(rf"\d+@{re.escape(socket.gethostname())}", "-", text)
        (HISTORIES / f"{VERSION}-{end}.json").write_text(text + "\n")
