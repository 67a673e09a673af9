"""The programs of docs/quickstart.md, as they stand there: each creates a run, waits, retries it and downloads its output."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dev.run import ROOT
from tests.sdk import environment
from tests.support.client import Client
from tests.support.server import Server
from tests.support.waiting import until

PAGE = ROOT / "docs" / "quickstart.md"
PROGRAMS = dict(
    re.findall(
        r"^## (.+?)\n(?:(?!^## |^```)[^\n]*\n)*```\w+\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
)
# The pause of each program, and a shorter one.
PAUSE = re.compile(r"(?<=sleep )1\b|(?<=sleep\()1\b|(?<=resolve, )1000\b")
SHORT = {"1": "0.1", "1000": "100"}


def node() -> str:
    found = os.environ.get("NODE") or shutil.which("node")
    if found is None:
        pytest.skip("Node.js is not installed")
    return found


INTERPRETERS: dict[str, Callable[[], list[str]]] = {
    "curl": lambda: ["bash", "-e", "-o", "pipefail"],
    "Python, with the official SDK": lambda: [str(environment.python(environment.NEWEST))],
    "Python, with httpx": lambda: [sys.executable],
    "JavaScript": lambda: [node()],
}


def test_every_program_is_run_here() -> None:
    assert PROGRAMS.keys() == INTERPRETERS.keys()


@pytest.mark.parametrize("name", INTERPRETERS)
def test_the_program_does_what_the_page_says(name: str, api: Client, server: Server, tmp_path: Path) -> None:
    command, workflow_id = INTERPRETERS[name](), api.workflow()
    program, pauses = PAUSE.subn(lambda found: SHORT[found[0]], PROGRAMS[name])
    assert pauses == 1
    script = tmp_path / "quickstart.mjs"
    script.write_text(program)
    facts = {"API_URL": server.url, "API_KEY": api.headers["authorization"].split()[1], "WORKFLOW_ID": workflow_id}
    process = subprocess.Popen(
        [*command, script.name],
        cwd=tmp_path,
        env=environment.environment() | facts,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for attempt in (1, 2):
            _execute(api, workflow_id, attempt, process)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert (tmp_path / "receipt.txt").read_bytes() == b"R-2\n"
    [run] = api.json_of(api.get(f"/v1/runs?workflow_id={workflow_id}"))["items"]
    assert (run["attempt"], run["status"], run["input_values"]["amount"]) == (2, "success", "99.00")
    [first] = api.json_of(api.get(f"/v1/runs/{run['id']}/attempts"))["items"]
    assert first["status"] == "error"


def _execute(api: Client, workflow_id: str, attempt: int, process: subprocess.Popen[str]) -> None:
    """What the demo's machine does: fail at first, then hand in a receipt."""

    def waiting() -> list[dict[str, str]]:
        assert process.poll() is None, process.communicate()[0]
        found = api.json_of(api.get(f"/v1/runs?workflow_id={workflow_id}&status=scheduling&fields=attempt"))["items"]
        return [run for run in found if run["attempt"] == attempt]

    [run] = until(waiting, 30, what=f"attempt {attempt}")
    api.report(run["id"], status="running")
    if attempt == 1:
        api.report(run["id"], status="error", error=["The application refused the password."])
    else:
        api.upload(run["id"], b"R-2\n", "receipt.txt")
        api.report(run["id"], status="success")
