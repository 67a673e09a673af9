"""A client that a generator makes of /openapi.json is complete, passes a strict type check, and works."""

import json
import subprocess
import sys
from pathlib import Path

from tests.sdk import environment
from tests.support.client import Client
from tests.support.server import Server

HERE = Path(__file__).parent / "clients"


def run(command: list[str], folder: Path, given: str = "") -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        input=given,
        env=environment.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_openapi_python_client(server: Server, api: Client, tmp_path: Path) -> None:
    python = environment.installed(HERE / "python.txt", "openapi-python-client")
    (tmp_path / "openapi.json").write_bytes(api.get("/openapi.json").content)
    (tmp_path / "config.yml").write_text("post_hooks: []\n")
    generate = [str(python), "-I", "-m", "openapi_python_client", "generate", "--meta", "none"]
    said = run(
        [*generate, "--path", "openapi.json", "--config", "config.yml", "--output-path", "runs_client"], tmp_path
    )
    assert "WARNING" not in said.upper(), "it has left something out: " + said
    (tmp_path / "use.py").write_bytes((HERE / "use_python.py").read_bytes())
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "--config-file", ""]
    run([*check, "--cache-dir", str(environment.CACHE / "mypy"), "use.py", "runs_client"], tmp_path)
    run_of = {"url": server.url, "key": api.headers["authorization"].split()[1], "workflow_id": api.workflow()}
    seen = json.loads(run([str(python), "use.py"], tmp_path, json.dumps(run_of)))
    assert seen["attempt"] == 2
    assert seen["inputs"] == {"customer": "Ada", "lines": [{"sum": 1.5}, None]}
    found = api.get_run(seen["run_id"])
    assert found["sensitive_input_aliases"].keys() == {"password"}
    assert len(found["input_attachment_ids"]) == 1
