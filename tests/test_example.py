"""The example as a newcomer runs it, against this worker's stack."""

import subprocess
import sys

import hvac
import pytest

from examples.executor import KEY_REFUSED, Executor, work
from tests.sdk.environment import HERE
from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack

ROOT = HERE.parent.parent


def test_fails_is_retried_and_succeeds(api: Client, server: Server, stack: Stack) -> None:
    environment = {
        "PATH": stack.environment()["PATH"],
        "API_URL": server.url,
        "API_KEY": api.headers["authorization"].split()[1],
        "DATABASE_OWNER_URL": stack.url,
        "VAULT_ADDR": stack.bao.address,
        "VAULT_TOKEN": stack.bao.root_token,
    }
    done = subprocess.run(
        [sys.executable, "-m", "examples.lifecycle"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "horse" not in done.stdout  # both passwords have one: no secret is ever printed

    page = api.json_of(api.get("/v1/runs"))
    assert page["total"] == 1
    run = api.get_run(page["items"][0]["id"])
    assert (run["attempt"], run["status"], run["error"]) == (2, "success", None)
    assert run["output_data"] == {"posted": 1, "booked_on": 4711}
    [output] = run["output_attachment_ids"]
    assert api.get(f"/v1/run-attachments/{output}/download").text == "invoice.txt: 21 bytes, posted by ada\n"
    [first] = api.json_of(api.get(f"/v1/runs/{run['id']}/attempts"))["items"]
    assert (first["attempt"], first["status"]) == (1, "error")
    assert first["error"] == ["The application refused the password of user 'ada'."]
    assert first["overridden"] == ["sensitive_input_values"]
    assert api.json_of(api.get("/v1/machines"))["total"] == 0
    [key] = stack.sql("SELECT * FROM api_keys WHERE organization_id = $1 AND machine_id IS NOT NULL", api.organization)
    assert set(key["scopes"]) == {"runs:read", "runs:execute"}
    assert key["revoked_at"] is not None
    events = api.json_of(api.get(f"/v1/runs/{run['id']}/events"))["items"]
    assert {event["key_id"] for event in events if event["event"] in ("started", "ended")} == {str(key["id"])}


def test_the_executors_token_reads_only_its_organization(api: Client, foreign: Client, stack: Stack) -> None:
    token = stack.bao.executor_token(api.organization)
    for owner, status in ((api, 200), (foreign, 403)):
        run = owner.run(sensitive_input_values={"password": "canary"})
        [row] = stack.sql("SELECT secret_path FROM runs WHERE id = $1", run["id"])
        assert stack.bao.call("GET", f"secret/data/{row['secret_path']}", token=token)[0] == status
    assert stack.bao.call("DELETE", f"secret/metadata/{row['secret_path']}", token=token)[0] == 403


def test_says_what_is_missing(tmp_path: object) -> None:
    environment = {"PATH": "", "DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "examples.lifecycle"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.endswith(f"Start it in another terminal: make run DATA_DIR={tmp_path}\n")


def test_an_executor_whose_key_was_revoked_says_so_and_stops(api: Client, server: Server, stack: Stack) -> None:
    key = stack.new_key(api.organization, scopes=["runs:read", "runs:execute"], machine_id=(machine := api.machine()))
    with server.client(key=key) as client:
        own = client.json_of(client.get("/v1/whoami"))["key_id"]
        executor = Executor(client, hvac.Client(url=stack.bao.address), machine, work)
        stack.sql("UPDATE api_keys SET revoked_at = now() WHERE id = $1", own)
        with pytest.raises(SystemExit) as stopped:
            executor.serve()
    assert stopped.value.code == KEY_REFUSED
