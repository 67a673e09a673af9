"""An organization is deleted from the command line, with all that it has and nothing else, whatever happens meanwhile."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import pytest

from app.cli import main
from dev.run import ROOT
from tests.support.client import Client, file_input, secret_path
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.stored_state import assert_nothing_lost, read_stored_state
from tests.support.waiting import until

SECRET = {"password": "canary-of-the-organization"}


@pytest.fixture(autouse=True)
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """As an operator has it: the owner's role, and nothing else that is needed."""
    given = {"DATABASE_URL": stack.postgres.as_app(stack.url), "DATABASE_OWNER_URL": stack.url}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


def left(stack: Stack, organization: str) -> dict[str, int]:
    """How many rows of an organization each table has; those of any table, also of one that is new."""
    tables = stack.sql(
        "SELECT DISTINCT table_name AS name FROM information_schema.columns JOIN information_schema.tables"
        " USING (table_schema, table_name)"
        " WHERE column_name = 'organization_id' AND table_schema = 'public' AND table_type = 'BASE TABLE'"
    )
    assert len(tables) >= 10
    counted = {
        table["name"]: stack.sql(
            f"SELECT count(*)::int AS n FROM {table['name']} WHERE organization_id = $1", organization
        )[0]["n"]
        for table in tables
    }
    return {name: count for name, count in counted.items() if count}


def furnish(stack: Stack, api: Client) -> list[str]:
    """One of everything, in several states; returns the runs."""
    api.webhook_endpoint()
    machine = api.machine()
    api.pool(machine)
    workflow = api.json_of(api.post("/v1/workflows", json={"main_prompt": "x", "is_webhooks_enabled": True}), 201)["id"]
    every = {"workflow_id": workflow, "sensitive_input_values": SECRET, "file_inputs": [file_input()]}
    waiting = api.run(**every, machine_id=api.machine(status="disconnected"))["id"]
    running = api.run(**every, start_session=True)["id"]
    api.report(running, status="running")
    finished = api.finished("error", **every)["id"]
    retried = api.finished(**every)["id"]
    headers = {"Idempotency-Key": uuid4().hex}
    assert api.post(f"/v1/runs/{retried}/retry", json={}, headers=headers).status_code == 200
    until(lambda: {"webhook_deliveries", "stored_replies"} <= left(stack, api.organization).keys())
    return [waiting, running, finished, retried]


def delete(organization: str, *more: str) -> int:
    return main(["organizations", "delete", organization, "--confirm", organization, "--grace-seconds", "0", *more])


@contextmanager
def deleting(
    organization: str, environment: dict[str, str], grace_seconds: float = 0
) -> Iterator[subprocess.Popen[str]]:
    """The same as a process of its own."""
    command = [sys.executable, "-m", "app", "organizations", "delete", organization, "--confirm", organization]
    with subprocess.Popen(
        [*command, "--grace-seconds", str(grace_seconds)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def is_gone(stack: Stack, path: str) -> bool:
    return stack.secret(path) is None


def assert_gone(stack: Stack, api: Client, secrets: set[str]) -> None:
    """Also what is outside the database, after the service's own collector."""
    assert left(stack, api.organization) == {}
    assert_nothing_lost(stack, api.organization)
    assert secrets
    for path in secrets:
        until(partial(is_gone, stack, path), what=f"the deletion of {path}")
    until(lambda: not stack.blobs(api.organization))
    for folder in (f"runs/{api.organization}/", f"runs-webhooks/{api.organization}/"):
        assert not stack.secret_paths(folder)


def test_nothing_of_it_is_left_and_others_have_all_of_theirs(
    server: Server, stack: Stack, api: Client, foreign: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, kept = furnish(stack, api), furnish(stack, foreign)
    secrets = {secret_path(api.get_run(run_id)) for run_id in runs}
    secrets |= {
        row["path"] for row in stack.sql("SELECT path FROM webhook_secrets WHERE path LIKE $1", f"%{api.organization}%")
    }
    assert len(secrets) == len(runs) + 1
    theirs = [read_stored_state(stack, foreign.organization), left(stack, foreign.organization)]
    assert delete(api.organization) == 0
    shown = capsys.readouterr().out
    assert "runs: 4" in shown
    assert "webhook endpoints: 1" in shown
    assert "canary" not in shown
    assert api.get("/v1/whoami").status_code == 401
    assert_gone(stack, api, secrets)
    assert [read_stored_state(stack, foreign.organization), left(stack, foreign.organization)] == theirs
    assert {foreign.get_run(run_id)["id"] for run_id in kept} == set(kept)
    assert delete(api.organization) == 1


def test_a_new_organization_of_the_same_name_sees_nothing_of_the_old_one(
    server: Server, stack: Stack, api: Client
) -> None:
    [run_id, *_] = furnish(stack, api)
    assert delete(api.organization) == 0
    with server.client(api.organization) as heir:
        assert heir.json_of(heir.get("/v1/events"))["items"] == []
        assert heir.json_of(heir.get("/v1/runs"))["total"] == 0
        assert heir.get(f"/v1/runs/{run_id}/events").status_code == 404


@pytest.mark.parametrize(("typed", "code"), [("another\n", 1), ("", 2), ("NAME\n", 0)])
def test_its_name_is_asked_for_again(
    stack: Stack, api: Client, environment: dict[str, str], typed: str, code: int
) -> None:
    api.workflow()
    command = [sys.executable, "-m", "app", "organizations", "delete", api.organization, "--grace-seconds", "0"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        input=typed.replace("NAME", api.organization),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert (left(stack, api.organization) == {}) == (code == 0)
    assert api.get("/v1/whoami").status_code == (401 if code == 0 else 200)


def test_an_unknown_organization_is_said_to_be_one(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    assert delete("nobody-has-this-name") == 1
    assert "no organization" in capsys.readouterr().out


def test_the_services_own_role_may_not_do_it(
    stack: Stack, api: Client, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    api.workflow()
    with deleting(api.organization, {"DATABASE_URL": environment["DATABASE_URL"]}) as process:
        assert process.wait(60) == 2
        assert process.stdout is not None
        assert "DATABASE_OWNER_URL" in process.stdout.read()
    assert api.get("/v1/whoami").status_code == 200


def crowd(stack: Stack, api: Client, count: int) -> None:
    """So many more runs, older than those that are there."""
    stack.sql(
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane, created_at, ended_at)"
        " SELECT gen_random_uuid(), $1, $2::text::uuid, 'success', 'any', now() - n * interval '1 h', now()"
        " FROM generate_series(1, $3::int) AS n",
        api.organization,
        api.workflow(),
        count,
    )


def test_it_goes_on_after_a_kill_in_the_middle(stack: Stack, api: Client, environment: dict[str, str]) -> None:
    runs = furnish(stack, api)
    secrets = {secret_path(api.get_run(run_id)) for run_id in runs}
    crowd(stack, api, 450)
    oldest = "SELECT id FROM runs WHERE organization_id = $1 ORDER BY created_at LIMIT 1"
    total = left(stack, api.organization)["runs"]
    with stack.held(f"{oldest} FOR UPDATE", api.organization), deleting(api.organization, environment) as process:
        until(lambda: left(stack, api.organization)["runs"] <= total - 400, 60)  # two batches are gone, and it waits
        assert api.get("/v1/whoami").status_code == 401
        process.kill()
        process.wait()
        remaining: dict[str, Any] = left(stack, api.organization)
        assert 0 < remaining["runs"] <= total - 400
        assert {"workflows", "api_keys"} <= remaining.keys()
        assert_nothing_lost(stack, api.organization)
    assert delete(api.organization) == 0
    assert_gone(stack, api, secrets)


def test_what_a_request_still_writes_that_was_under_way_is_deleted_too(
    stack: Stack, api: Client, environment: dict[str, str]
) -> None:
    workflow = api.workflow()
    late = (
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane)"
        " VALUES (gen_random_uuid(), $1, $2::text::uuid, 'scheduling', 'any')"
    )
    with deleting(api.organization, environment, grace_seconds=3) as process:
        assert process.stdout is not None
        with stack.held(late, api.organization, workflow, commit=True):
            until(lambda: api.get("/v1/whoami").status_code == 401)
        lines = list(process.stdout)
        assert process.wait(60) == 0, lines
    assert any(line.startswith("Waiting ") for line in lines), lines
    assert left(stack, api.organization) == {}


def test_what_appears_while_it_waits_is_deleted_too(stack: Stack, api: Client, environment: dict[str, str]) -> None:
    api.workflow()
    with deleting(api.organization, environment, grace_seconds=3) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Waiting "):
                stack.sql(
                    "INSERT INTO workflows (id, organization_id, main_prompt) VALUES (gen_random_uuid(), $1, 'late')",
                    api.organization,
                )
        assert process.wait(60) == 0
    assert left(stack, api.organization) == {}
