"""docs/after-an-outage.md, as somebody pastes it into a shell."""

import re
import subprocess

from dev.run import ROOT
from tests.support.bulk_retries import failed_runs
from tests.support.client import Client
from tests.support.server import Server

PAGE = ROOT / "docs" / "after-an-outage.md"


def test_its_commands_can_be_pasted_in_order(api: Client, server: Server) -> None:
    workflow_id = api.workflow()
    failed_runs(api, 7, workflow_id=workflow_id)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    key = api.headers["Authorization"].split()[1]
    pasted = "\necho ---\n".join(["set -e", *blocks])
    for placeholder, value in (
        ("API=http://127.0.0.1:8000", f"API={server.url}"),
        ("KEY=runs_...", f"KEY={key}"),
        ("WORKFLOW=...", f"WORKFLOW={workflow_id}"),
    ):
        assert placeholder in pasted
        pasted = pasted.replace(placeholder, value)
    done = subprocess.run(["bash"], input=pasted, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, find, dry_run, _, watch, stop = done.stdout.split("---\n")
    assert find.splitlines()[0] == "7"
    assert '"would_retry": 7' in dry_run
    assert '"state": "running"' in watch
    assert stop.split() == ["paused", "running", "aborted"]
    [job] = api.json_of(api.get("/v1/bulk-retries"))["items"]
    assert (job["total"], job["first"], job["reason"]) == (7, 5, "The application was down.")
