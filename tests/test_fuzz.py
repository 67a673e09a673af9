"""The whole interface fuzzed from its own document: what it promises holds, whatever is sent.

schemathesis runs as a process of its own, with all its checks and phases (fuzz.toml, fuzz_hooks.py).
"""

import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import documents
from tests.support.client import Client, file_input, file_inputs
from tests.support.server import Server

HERE = Path(__file__).parent
SOAK = "FUZZ_SECONDS" in os.environ
SECONDS = int(os.environ.get("FUZZ_SECONDS", "120"))
SEED = os.environ.get("FUZZ_SEED") or str(secrets.randbelow(2**32))

# Which share of the time each part gets, and what it is. One run of everything would starve the later phases on a busy
# machine, and gives all operations equal turns, while the retry has as much to try as all the others together.
PARTS = {
    "every operation": (0.45, ["--phases", "examples,coverage,fuzzing"]),
    "sequences": (0.3, ["--phases", "stateful"]),
    "the retry": (0.25, ["--include-path", "/v1/runs/{run_id}/retry"]),
}
# For each operation, in `make test`.
MOST_EXAMPLES = {"every operation": "3", "sequences": "2", "the retry": "25"}


def things(api: Client) -> dict[str, list[Any]]:
    """Ids of things in each state, so that what is sent reaches the rules behind the look-up."""
    machines = [api.machine() for _ in range(6)]
    pools = [api.pool(*machines[:3]), api.pool(*machines[2:]), api.pool()]
    workflows = [api.workflow() for _ in range(4)]
    runs, attachments, sessions = [], [], []
    for index in range(30):
        options = {"file_inputs": [file_input()], "sensitive_input_values": {"password": "x"}, "start_session": True}
        run = api.run(workflow_id=workflows[0], **(options if index % 3 else {}))
        runs.append(run["id"])
        attachments += run["input_attachment_ids"]
        sessions += [run["session_id"]] if run["session_id"] else []
        if index % 10 < 5 or index > 25:
            api.report(run["id"], status="running")
            attachments.append(api.upload(run["id"])["id"])
        if index % 10 < 5:
            api.report(run["id"], status=("success", "error", "cancelled")[index % 3])
    endpoints = [api.webhook_endpoint() for _ in range(5)]
    doomed = [api.run(workflow_id=workflows[1], file_inputs=file_inputs(2)) for _ in range(3)]
    return {
        "counts": [1, 2, 3],
        "machines": machines,
        "pools": pools,
        "workflows": workflows[:2],
        "runs": runs,
        "attachments": attachments,
        "sessions": sessions,
        "endpoints": endpoints[:3],
        "deliveries": [
            api.json_of(api.post(f"/v1/webhook-endpoints/{endpoints[0]}/test"), 201)["id"] for _ in range(3)
        ],
        # For DELETE alone, so that the others live until the end.
        "doomed_machines": [api.machine(), api.machine()],
        "doomed_pools": [api.pool(), api.pool()],
        "doomed_workflows": workflows[2:],
        "doomed_endpoints": endpoints[3:],
        "doomed_runs": [api.run(workflow_id=workflows[1])["id"] for _ in range(3)],
        "doomed_attachments": [one for run in doomed for one in run["input_attachment_ids"]],
    }


def answered(server: Server, organization: str) -> Counter[str]:
    """How often each route has answered this organization with success."""
    lines = [json.loads(line) for line in server.app.log.read_text().splitlines() if organization in line]
    return Counter(f"{line['method']} {line['route']}" for line in lines if line.get("status", 500) < 300)


@pytest.mark.parametrize("part", PARTS)
def test_the_interface_keeps_what_its_document_promises(server: Server, api: Client, tmp_path: Path, part: str) -> None:
    made = things(api)
    config, report, document = tmp_path / "fuzz.toml", tmp_path / "report.json", tmp_path / "openapi.json"
    document.write_text(json.dumps(documents.strict()))  # it says more than the one for clients
    dictionaries = [f"{name}.values = {json.dumps(ids)}" for name, ids in made.items()]
    config.write_text("\n".join([(HERE / "fuzz.toml").read_text(), "[dictionaries]", *dictionaries]))
    in_examples = {
        "workflow_id": made["workflows"][0],
        "run_id": made["runs"][-1],  # running
        "machine_ids": made["machines"][:1],
        "pool_ids": made["pools"][:1],
    }
    environment = {
        "FUZZ_KEY": api.headers["Authorization"].split()[1],
        "FUZZ_URL": server.url,
        "FUZZ_THINGS": json.dumps(in_examples),
        "NO_PROXY": "127.0.0.1",
    }
    before = answered(server, api.organization)
    share, chosen = PARTS[part]
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", *chosen]
    # With a time, turns are repeated until it is over; without one there is a single turn, which ends by itself.
    command += ["--max-time", str(max(round(SECONDS * share), 1))] if SOAK else ["--max-examples", MOST_EXAMPLES[part]]
    command += ["--seed", SEED, "--no-color"]
    outcome = subprocess.run(
        [*command, "--report-json-path", str(report), "--url", server.url, str(document)],
        cwd=HERE.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS * 2 + 240,  # it ends by itself; this is for one that hangs
        check=False,
    )
    print(f"FUZZ_SEED={SEED}\n{outcome.stdout}\n{outcome.stderr}")  # noqa: T201 - shown when the test fails
    assert outcome.returncode == 0
    # It was not for nothing. A busy machine gets less far: these are a small part of what is usual.
    generated = json.loads(report.read_text())["test_cases"]["generated"]
    succeeded = answered(server, api.organization) - before
    if part == "every operation":
        assert generated > 50
        assert len(succeeded) > 20, succeeded
    elif part == "sequences":
        assert generated > 3
    else:
        assert succeeded["POST /v1/runs/{run_id}/retry"] > 5, succeeded
