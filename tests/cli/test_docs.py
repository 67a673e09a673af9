"""The commands of docs/cli.md, pasted into one shell in their order."""

import re
import subprocess
import sys

from tests.cli.conftest import ROOT, Terminal
from tests.support.client import Client


def test_the_commands_of_the_page_can_be_pasted(terminal: Terminal, api: Client) -> None:
    run_id = api.run(input_values={"amount": "1"})["id"]
    api.report(run_id, status="error", error=["down"])
    blocks = re.findall(
        r"^```sh\n(.*?)^```$", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 3
    # Between one retry and the retry of many the run has to end again.
    ended = (
        f'curl -sSf -o /dev/null -X PATCH -H "Authorization: Bearer $RUNS_API_KEY" -H "Content-Type: application/json"'
        f' -d \'{{"status": "error"}}\' $RUNS_API_URL/v1/runs/{run_id}\n'
    )
    pasted = f'runs() {{ {sys.executable} -m runs_cli.main "$@"; }}\n' + blocks[0] + blocks[1] + ended + blocks[2]
    done = subprocess.run(
        ["bash", "-e"],
        input=pasted,
        env=terminal.environment(),
        cwd=terminal.home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It can be retried, as attempt 2." in done.stdout
    assert "1 of 1 can be retried." in done.stdout
