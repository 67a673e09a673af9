"""`make containers`: build the images, start docker-compose.yml, retry a run, stop, start again, and look for the data.

Needs a Docker engine with Compose 2.26 or newer, and a registry or local copies of the base images. Where there is no engine it
says so and succeeds: nothing was proven then. Uses a Compose project of its own and removes it at the end.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dev.demo import PASSWORD
from dev.stack import free_port, http

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # for the end of an attempt
UP = ("up", "--detach", "--wait")


class Stack:
    """The composed stack under a project name of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = ["docker", "compose", "--project-name", "runs-api-proof", "--env-file", "development.env"]
        self._environment = {**os.environ, "PORT": str(self.port), "OPENBAO_PORT": str(free_port())}

    def compose(self, *arguments: str) -> str:
        """What the command prints. Exits with its last lines if it fails."""
        done = subprocess.run(
            [*self._command, *arguments], cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"docker compose {' '.join(arguments)} failed:\n" + (done.stdout + done.stderr)[-3000:])
        return done.stdout

    def api(self, method: str, path: str, body: object = None) -> Any:
        """The reply's JSON. Exits unless the status is 2xx."""
        status, reply = http(method, self.url + path, body, {"Authorization": f"Bearer {self.key}"}, seconds=30)
        if not 200 <= status < 300:
            sys.exit(f"{method} {path} answered {status}: {reply}")
        return reply

    def read_demo(self) -> None:
        """Take the key and the run that the demo has printed."""
        printed = self.compose("logs", "--no-log-prefix", "demo")
        self.key = re.findall(r"API key (\S+)", printed)[-1]
        self.run_id = re.findall(r"/v1/runs/([0-9a-f-]{36})/retry", printed)[-1]

    def retried(self, amount: str) -> dict[str, Any]:
        """The demo run at the end of its next attempt, with a new secret, a new input and a new file."""
        body = {
            "input_values": {"user": "ada", "amount": amount},
            "sensitive_input_values": {"password": PASSWORD},
            "file_inputs": [{"filename": "invoice.txt", "content": "aGVsbG8="}],
        }
        self.api("POST", f"/v1/runs/{self.run_id}/retry", body)
        deadline = time.monotonic() + SECONDS
        while True:
            run: dict[str, Any] = self.api("GET", f"/v1/runs/{self.run_id}")
            if run["status"] in {"success", "error"}:
                return run
            if time.monotonic() > deadline:
                sys.exit(f"The attempt did not end within {SECONDS} s: {json.dumps(run)}")
            time.sleep(0.2)


def main() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        print(
            "No Docker engine answers here, so the containers were not tried. Install Docker with Compose and start it."
        )
        return
    stack, began = Stack(), time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    def check(truth: bool, text: str) -> None:
        if not truth:
            sys.exit(f"FAILED: {text}")
        say(text)

    try:
        _prove(stack, say, check)
    finally:
        stack.compose("down", "--volumes")


def _prove(stack: Stack, say: Callable[[str], None], check: Callable[[bool, str], None]) -> None:
    stack.compose(*UP, "--build")
    say("built and up, all healthy")
    stack.read_demo()
    first = stack.retried("130.00")
    check(
        (first["status"], first["output_data"]["amount"]) == ("success", "130.00"),
        "a retry with a secret and a file succeeded",
    )
    [file] = first["input_attachment_ids"]
    shown = stack.compose("ps", "--all", "--format", "{{.Name}}")
    inspected = subprocess.run(["docker", "inspect", *shown.split()], capture_output=True, text=True, check=True).stdout
    secrets = [
        path.read_text(encoding="utf-8") for path in (ROOT / "deploy" / "development").iterdir() if path.suffix == ""
    ]
    check(
        not [one for one in secrets if len(one) > 12 and one in inspected],
        "no secret of the stack is in `docker inspect`",
    )
    others = [name for name in stack.compose("config", "--services").split() if name != "demo"]  # it prints the command
    check(PASSWORD not in stack.compose("logs", *others), "the run's secret is in no log")
    stack.compose("stop")
    say("stopped")
    stack.compose(*UP)
    kept = stack.api("GET", f"/v1/runs/{stack.run_id}")
    check(
        (kept["attempt"], kept["output_data"]) == (first["attempt"], first["output_data"]),
        "started again, the run is kept",
    )
    status, content = http(
        "GET", f"{stack.url}/v1/run-attachments/{file}/download", headers={"Authorization": f"Bearer {stack.key}"}
    )
    check((status, content) == (200, "hello"), "its file is kept")
    stack.read_demo()
    check(stack.retried("140.00")["status"] == "success", "it can be retried again")


if __name__ == "__main__":
    main()
