"""The whole interface fuzzed from its own document: what it promises holds, whatever is sent.

schemathesis runs as a process of its own, with all its checks and phases (fuzz.toml, fuzz_hooks.py).
"""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Client, Server, Stack, file_input

HERE = Path(__file__).parent
SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))
SEED = os.environ.get("FUZZ_SEED") or str(secrets.randbelow(2**32))


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
    return {
        "counts": [1, 2, 3],
        "machines": machines,
        "pools": pools,
        "workflows": workflows[:2],
        "empty_workflows": workflows[2:],
        "runs": runs,
        "attachments": attachments,
        "sessions": sessions,
    }


def test_the_interface_keeps_what_its_document_promises(
    server: Server, stack: Stack, api: Client, tmp_path: Path
) -> None:
    made = things(api)
    config, report = tmp_path / "fuzz.toml", tmp_path / "report.json"
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
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = ["--max-time", str(SECONDS), "--seed", SEED, "--no-color", "--report-json-path", str(report)]
    outcome = subprocess.run(
        [*command, f"{server.url}/openapi.json", *options],
        cwd=HERE.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS * 2 + 60,
        check=False,
    )
    print(f"FUZZ_SEED={SEED}\n{outcome.stdout}\n{outcome.stderr}")  # noqa: T201 - shown when the test fails
    assert outcome.returncode == 0
    found = json.loads(report.read_text())
    assert found["operations"]["tested"] == found["operations"]["total"] > 35
    assert found["test_cases"]["generated"] > 500
    retries = stack.sql(
        "SELECT count(*) FROM run_attempts JOIN runs ON runs.id = run_id WHERE organization_id = $1", api.organization
    )
    assert retries[0]["count"] > 20, "retries that succeed must have been among them"
