"""The life of a run: created with a wrong password, failed, retried in place with the right one, done. Prints a timeline.

    make run        in one terminal
    make example    in another

Reads API_URL, API_KEY, DATABASE_OWNER_URL, VAULT_ADDR and VAULT_TOKEN from the environment, or else from what `make run` wrote.
The database and VAULT_TOKEN are used once, as an operator does for each machine: the executor gets an API key that is bound to
its machine, and a token that reads the secrets of one organization and nothing else.
"""

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import hvac

from dev import running

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 60
TERMINAL = {"success", "error", "cancelled", "task_failed"}


def main() -> None:
    facts = settings()
    headers = {"Authorization": f"Bearer {facts['API_KEY']}"}
    with httpx.Client(base_url=facts["API_URL"], headers=headers, timeout=30) as api:
        machine = call(api, "POST", "/v1/machines", {"fingerprint": uuid4().hex, "unkey_key_id": "example"})
        say(f"machine {machine['id']} registered")
        token = executor_token(facts, machine["organization_id"])
        key, key_id = executor_key(facts, machine)
        try:
            with executor(facts, key, token, machine["id"]):
                lifecycle(api, machine["id"])
        finally:
            # Nobody works on it any more: gone, no run can be given to it.
            call(api, "DELETE", f"/v1/machines/{machine['id']}")
            keys(facts, "revoke", key_id)


def lifecycle(api: httpx.Client, machine_id: str) -> None:
    prompt = "Log in as {user} and post every invoice to the account."
    workflow = call(api, "POST", "/v1/workflows", {"name": "Example: post invoices", "main_prompt": prompt})
    body = {
        "workflow_id": workflow["id"],
        "machine_id": machine_id,
        "input_values": {"user": "ada"},
        "sensitive_input_values": {"password": "wrong horse", "account": {"number": 4711}},
        "file_inputs": [{"filename": "invoice.txt", "content": base64.b64encode(b"Invoice 1001: 120.00\n").decode()}],
    }
    run = call(api, "POST", "/v1/runs", body)
    say(f"run {run['id']} created, attempt {run['attempt']}: {run['status']}, {run['scheduling_reason']}")
    say(f"its secrets are aliases: {run['sensitive_input_aliases']}")

    run = wait_for_end(api, run["id"])
    say(f"attempt {run['attempt']} ended: {run['status']}, {run['error']}")
    if run["status"] != "error":
        sys.exit("The first attempt was expected to fail.")

    # Everything is kept but what the body replaces. All secrets are sent: the old ones are destroyed.
    body = {"sensitive_input_values": {"password": "correct horse", "account": {"number": 4711}}}
    run = call(api, "POST", f"/v1/runs/{run['id']}/retry", body)
    say(f"retried in place, attempt {run['attempt']}: {run['status']}, error {run['error']}")

    run = wait_for_end(api, run["id"])
    say(f"attempt {run['attempt']} ended: {run['status']}, {run['output_data']}")
    if run["status"] != "success":
        sys.exit(f"The retried attempt was expected to succeed: {run['error']}")
    [output] = run["output_attachment_ids"]
    receipt = api.get(f"/v1/run-attachments/{output}/download").raise_for_status().text
    say(f"its output: {receipt.strip()}")

    say("timeline of the run:")
    past = call(api, "GET", f"/v1/runs/{run['id']}/attempts")["items"]
    for attempt in [*reversed(past), run]:
        began, ended = (datetime.fromisoformat(attempt[name]) for name in ("started_at", "ended_at"))
        took = f"{(ended - began).total_seconds() * 1000:.0f} ms"
        replaced = f"; the retry after it replaced {attempt['overridden']}" if "overridden" in attempt else ""
        say(f"  attempt {attempt['attempt']}  {began:%H:%M:%S}  {took}  {attempt['status']}{replaced}")


def wait_for_end(api: httpx.Client, run_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        run: dict[str, Any] = call(api, "GET", f"/v1/runs/{run_id}")
        if run["status"] in TERMINAL:
            return run
        if time.monotonic() > deadline:
            sys.exit(f"Run {run_id} is still {run['status']} ({run['scheduling_reason']}) after {TIMEOUT_SECONDS} s.")
        time.sleep(0.2)


@contextmanager
def executor(facts: dict[str, str], key: str, token: str, machine_id: str) -> Iterator[None]:
    """The executor as a process of its own, with its own API key and its own Vault token."""
    own = {"API_URL": facts["API_URL"], "API_KEY": key, "VAULT_ADDR": facts["VAULT_ADDR"], "VAULT_TOKEN": token}
    environment = {**os.environ, **own, "MACHINE_ID": machine_id}
    # In a session of its own: Ctrl-C reaches only us, and we end it.
    command = [sys.executable, "-m", "examples.executor"]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def executor_key(facts: dict[str, str], machine: dict[str, Any]) -> tuple[str, str]:
    """A key that sees and reports this machine's runs and no others, and its id."""
    organization, name = machine["organization_id"], "the example's executor"
    said = keys(facts, "create", "--organization", organization, "--name", name, "--machine", machine["id"])
    found = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", said)
    return said.splitlines()[-1], found[0] if found else ""


def keys(facts: dict[str, str], *arguments: str) -> str:
    """What `python -m app keys ...` prints."""
    url = facts["DATABASE_OWNER_URL"]
    environment = {**os.environ, "DATABASE_URL": url, "DATABASE_OWNER_URL": url}
    command = [sys.executable, "-m", "app", "keys", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"`python -m app keys {arguments[0]}` failed: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def executor_token(facts: dict[str, str], organization: str) -> str:
    """A token with policies/executor.hcl for this organization; what an operator does once for each executor."""
    vault = hvac.Client(url=facts["VAULT_ADDR"], token=facts["VAULT_TOKEN"], timeout=10)
    policy = (ROOT / "policies" / "executor.hcl").read_text(encoding="utf-8").replace("ORGANIZATION", organization)
    vault.sys.create_or_update_policy(f"executor-{organization}", policy)
    made = vault.auth.token.create(policies=[f"executor-{organization}"], ttl="1h")
    return str(made["auth"]["client_token"])


def settings() -> dict[str, str]:
    names = ("API_URL", "API_KEY", "DATABASE_OWNER_URL", "VAULT_ADDR", "VAULT_TOKEN")
    if all(name in os.environ for name in names):
        return {name: os.environ[name] for name in names}
    try:
        written = running.facts(running.find())
    except running.NoStackError as problem:
        sys.exit(str(problem))
    # An organization of its own: the machine registered here must not be given the demo's runs.
    return {name: written[name] for name in names} | {"API_KEY": written["EXAMPLE_API_KEY"]}


def call(api: httpx.Client, method: str, path: str, body: object = None) -> Any:
    try:
        reply = api.request(method, path, json=body)
    except httpx.ConnectError:
        sys.exit(f"Nothing answers at {api.base_url}. Start `make run` first, in another terminal.")
    if reply.is_error:
        sys.exit(f"{method} {path} answered {reply.status_code}: {reply.text}")
    return reply.json() if reply.content else None


def say(text: str) -> None:
    print(f"{datetime.now().astimezone():%H:%M:%S.%f}"[:-3], " caller   ", text, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # make passes this on: tidy up as after Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
