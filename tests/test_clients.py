"""Clients that generators make of /openapi.json are complete, pass a strict type check, and work.

`make test` generates one in Python, `make test-sdk` (SDK_VERSIONS=all) two more in TypeScript, which need node and npm.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sdk import environment
from tests.support.client import Client
from tests.support.server import Server

HERE = Path(__file__).parent / "clients"


def run(command: list[str], folder: Path, given: str = "") -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        input=given,
        env=environment.environment() | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(folder: Path) -> list[str]:
    """Generate and check the client of openapi-python-client. Returns the command that uses it."""
    interpreter = environment.installed(HERE / "python.txt", "openapi-python-client")
    (folder / "config.yml").write_text("post_hooks: []\n")
    generate = [str(interpreter), "-I", "-m", "openapi_python_client", "generate", "--meta", "none"]
    said = run([*generate, "--path", "openapi.json", "--config", "config.yml", "--output-path", "runs_client"], folder)
    assert "WARNING" not in said.upper(), "it has left something out: " + said
    shutil.copy(HERE / "use_python.py", folder / "use.py")
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(interpreter), "--config-file", ""]
    run([*check, "--cache-dir", str(environment.CACHE / "mypy"), "use.py", "runs_client"], folder)
    return [str(interpreter), "use.py"]


def packages() -> Path:
    """The folder node_modules with the packages of the lock. The first caller installs it, others wait."""
    home = (
        environment.CACHE / f"javascript-{hashlib.sha256((HERE / 'package-lock.json').read_bytes()).hexdigest()[:16]}"
    )
    home.mkdir(parents=True, exist_ok=True)
    with (environment.CACHE / "javascript.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not (home / "installed").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name, home / name)
            install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(install, cwd=home, env=os.environ, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            (home / "installed").touch()
    return home / "node_modules"


def in_typescript(folder: Path, script: str, *generate: str) -> list[str]:
    """Generate and check a client in TypeScript. Returns the command that uses it."""
    (folder / "node_modules").symlink_to(packages())
    for name in ("package.json", "tsconfig.json", "openapi-ts.config.mjs", script):
        shutil.copy(HERE / name, folder / name)
    run([f"node_modules/.bin/{generate[0]}", *generate[1:]], folder)
    run(["node_modules/.bin/tsc", "--project", "."], folder)
    return ["node", f"out/{script.removesuffix('.ts')}.js"]


def openapi_fetch(folder: Path) -> list[str]:
    return in_typescript(folder, "use_fetch.ts", "openapi-typescript", "openapi.json", "--output", "schema.ts")


def hey_api(folder: Path) -> list[str]:
    return in_typescript(folder, "use_hey_api.ts", "openapi-ts")


GENERATORS = [python, openapi_fetch, hey_api] if environment.RENEWING else [python]


@pytest.mark.parametrize("generate", GENERATORS)
def test_a_generated_client_works(
    generate: Callable[[Path], list[str]], server: Server, api: Client, tmp_path: Path
) -> None:
    (tmp_path / "openapi.json").write_bytes(api.get("/openapi.json").content)
    use = generate(tmp_path)
    job = {"url": server.url, "key": api.headers["authorization"].split()[1], "workflow_id": api.workflow()}
    seen = json.loads(run(use, tmp_path, json.dumps(job)))
    assert seen["attempt"] == 2
    assert seen["inputs"] == {"customer": "Ada", "lines": [{"sum": 1.5}, None]}
    found = api.get_run(seen["run_id"])
    assert found["sensitive_input_aliases"].keys() == {"password"}
    assert len(found["input_attachment_ids"]) == 1
    [endpoint] = api.json_of(api.get("/v1/webhook-endpoints"))["items"]
    assert (endpoint["url"], endpoint["description"]) == ("https://example.com/hooks", None)
