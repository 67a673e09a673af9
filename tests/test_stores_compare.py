"""`stores compare`: what the database names against what Vault and the file store hold, on a real stack."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from dev.run import ROOT
from tests.support.client import Client, file_input, secret_path
from tests.support.fork_server import run_forked
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_stack
from tests.support.waiting import until


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Stores that nobody else uses: all that they hold is compared."""
    with own_stack(tmp_path_factory.mktemp("stack"), STAGE_GRACE_SECONDS="3600", WEBHOOK_ALLOW="localhost") as made:
        policy = (ROOT / "policies/compare.hcl").read_text(encoding="utf-8")
        assert made.bao.call("PUT", "sys/policies/acl/runs-compare", {"policy": policy})[0] == 204
        yield made


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Server]:
    started = start_server(stack)
    yield started
    started.app.stop()


def run(stack: Stack, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return run_with(stack.environment(**{"VAULT_TOKEN": stack.bao.token("runs-compare")} | settings), *arguments)


def run_with(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked(environment, "app", "stores", "compare", *arguments)


def differences(stack: Stack) -> set[tuple[str, str, str, str | None]]:
    """What it lists: kind, store, name, owner."""
    done = run(stack, "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == (1 if found else 0), done.stderr
    counts = [sum(one["kind"] == kind for one in found) for kind in ("missing", "orphaned")]
    assert done.stderr == f"{counts[0]} missing, {counts[1]} orphaned.\n"
    assert len({tuple(one.values()) for one in found}) == len(found)
    return {(one["kind"], one["store"], one["name"], one["owner"]) for one in found}


def active(api: Client) -> dict[str, Any]:
    """A run that waits, with a secret and a file."""
    return api.run(sensitive_input_values={"password": "s"}, file_inputs=[file_input()])


def blob(stack: Stack, attachment_id: object) -> str:
    [row] = stack.sql("SELECT storage_path FROM run_attachments WHERE id = $1", UUID(str(attachment_id)))
    return str(row["storage_path"])


def test_a_service_at_work_has_no_difference(server: Server, stack: Stack) -> None:
    with server.client() as api:
        active(api)
        kept = api.finished("error", sensitive_input_values={"password": "s"}, file_inputs=[file_input()])
        # The secret before is destroyed a day after a rotation, and its row stays until the next one.
        endpoint = api.webhook_endpoint()
        api.json_of(api.post(f"/v1/webhook-endpoints/{endpoint}/rotate-secret"))
        [old] = stack.sql(
            "UPDATE webhook_secrets SET expires_at = now() WHERE endpoint_id = $1 AND expires_at IS NOT NULL RETURNING path",
            UUID(endpoint),
        )
        stack.sql("UPDATE deletions SET due_at = now() WHERE name = $1", old["path"])
        until(lambda: stack.secret(str(old["path"])) is None)
        # A secret that has expired stays in the run's row and is not missed.
        stack.sql("UPDATE deletions SET due_at = now() WHERE name = $1", secret_path(kept))
        until(lambda: stack.secret(secret_path(kept)) is None)
        # What is staged is on the list, whether it is there or not.
        [staged] = [f"{api.organization}/{uuid4()}/{uuid4()}"]
        for store in ("vault", "storage"):
            stack.sql(
                "INSERT INTO deletions (store, name, due_at) VALUES ($1, $2, now() + interval '1 h')", store, staged
            )
        (stack.files / staged).parent.mkdir(parents=True)
        (stack.files / staged).write_bytes(b"half")
        assert differences(stack) == set()


def test_what_nobody_names_is_listed(server: Server, stack: Stack) -> None:
    with server.client() as api:
        run_id = active(api)["id"]
        own = f"{api.organization}/{run_id}/{uuid4()}"
        secrets = [
            f"runs/{own}",
            f"runs/{api.organization}/{uuid4()}/{uuid4()}",
            f"runs-webhooks/{own}",
            "runs/by-hand",
        ]
        files = [own, f"{api.organization}/{uuid4()}/{uuid4()}", "by hand.txt"]
        try:
            for path in secrets:
                assert stack.bao.call("POST", f"secret/data/{path}", {"data": {"a": "b"}})[0] == 200
            # Of another prefix: not the service's, and not looked at.
            assert stack.bao.call("POST", "secret/data/others/x", {"data": {"a": "b"}})[0] == 200
            for name in files:
                (stack.files / name).parent.mkdir(parents=True, exist_ok=True)
                (stack.files / name).write_bytes(b"x")
            plain = run(stack)
            assert plain.returncode == 1
            assert sorted(plain.stdout.splitlines()) == sorted(
                [*(f"orphaned  vault  {path}" for path in secrets), *(f"orphaned  files  {name}" for name in files)]
            )
        finally:
            for path in secrets:
                stack.bao.call("DELETE", f"secret/metadata/{path}")
            for name in files:
                (stack.files / name).unlink(missing_ok=True)


def test_what_is_needed_and_gone_is_listed_with_whose_it_is(server: Server, stack: Stack) -> None:
    with server.client() as api:
        first, second, third = active(api), active(api), active(api)
        kept = api.finished("error", sensitive_input_values={"password": "s"}, file_inputs=[file_input(b"kept")])
        endpoint = api.webhook_endpoint()
        [signing] = stack.sql("SELECT path FROM webhook_secrets WHERE endpoint_id = $1", UUID(endpoint))
        destroyed = [secret_path(first), secret_path(kept), str(signing["path"])]
        for path in destroyed:
            assert stack.bao.call("DELETE", f"secret/metadata/{path}")[0] == 204
        # Its metadata are there, and its value is not.
        assert stack.bao.call("DELETE", f"secret/data/{secret_path(second)}")[0] == 204
        [lost] = third["input_attachment_ids"]
        [cut] = kept["input_attachment_ids"]
        (stack.files / blob(stack, lost)).unlink()
        (stack.files / blob(stack, cut)).write_bytes(b"ke")
        assert differences(stack) == {
            ("missing", "vault", secret_path(first), f"run {first['id']}"),
            ("missing", "vault", secret_path(second), f"run {second['id']}"),
            ("missing", "vault", secret_path(kept), f"run {kept['id']}"),
            ("missing", "vault", destroyed[2], f"webhook endpoint {endpoint}"),
            ("missing", "files", blob(stack, lost), f"attachment {lost}"),
            ("missing", "files", blob(stack, cut), f"attachment {cut}"),
        }
        for run_id in (first["id"], second["id"], third["id"], kept["id"]):
            assert api.delete(f"/v1/runs/{run_id}").status_code == 204
        assert api.delete(f"/v1/webhook-endpoints/{endpoint}").status_code == 204
    assert differences(stack) == set()


def test_secrets_that_are_gone_are_marked_as_expired(server: Server, stack: Stack) -> None:
    """As after the loss of an asynchronous standby: the database names what Vault does not have."""
    with server.client() as api:
        lost, kept = (api.finished("error", sensitive_input_values={"password": "s"}) for _ in range(2))
        waiting = active(api)
        for one in (lost, waiting):
            assert stack.bao.call("DELETE", f"secret/metadata/{secret_path(one)}")[0] == 204
        assert run(stack).returncode == 1  # which changes nothing
        done = run(stack, "--mark")
        assert (done.returncode, done.stderr) == (1, "2 missing, 0 orphaned, 1 marked as expired.\n")
        refused = api.retry(lost["id"])
        assert (refused.status_code, refused.json()["code"]) == (409, "sensitive_inputs_expired")
        assert api.retry(lost["id"], sensitive_input_values={"password": "new"}).status_code == 200
        assert api.retry(kept["id"]).status_code == 200
        for one in (lost, kept, waiting):
            assert api.delete(f"/v1/runs/{one['id']}").status_code == 204
    assert differences(stack) == set()


def test_it_says_why_it_cannot_tell(server: Server, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> None:
    with server.client() as api:
        active(api)
    refused = run(stack, VAULT_TOKEN=stack.bao.token())
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("VAULT_TOKEN: ")
    assert "policies/compare.hcl" in refused.stderr
    away = tmp_path_factory.mktemp("away") / "not-mounted"
    unmounted = run(stack, STORAGE_URL=away.as_uri())
    assert (unmounted.returncode, unmounted.stdout) == (2, "")
    assert unmounted.stderr.startswith("STORAGE_URL: ")
    assert not away.exists(), "it changes nothing"
    environment = stack.environment(VAULT_TOKEN=stack.bao.token("runs-compare"), VAULT_TIMEOUT_SECONDS=0.5)
    stack.bao.freeze()
    try:
        silent = run_with(environment)
    finally:
        stack.bao.thaw()
    assert silent.returncode == 2
    assert "not complete (vault_unavailable)" in silent.stderr


def test_more_than_a_page_of_each_is_compared(server: Server, stack: Stack) -> None:
    """Most of what is compared here exists nowhere else: rows and files that were put there by hand."""
    count = 2300
    with server.client() as api:
        run_id = UUID(api.run()["id"])
        names = [f"{api.organization}/{run_id}/{uuid4()}" for _ in range(count)]
        stack.sql(
            "INSERT INTO run_attachments (id, organization_id, run_id, attachment_type, filename, content_type, size_bytes,"
            " storage_path) SELECT gen_random_uuid(), $1, $2, 'input', 'f', 'text/plain', 1, name"
            " FROM unnest($3::text[]) AS name",
            api.organization,
            run_id,
            names[300:],
        )
        folder = stack.files / api.organization / str(run_id)
        folder.mkdir(parents=True)
        for name in names[:2200]:
            (stack.files / name).write_bytes(b"x")
        found = differences(stack)
        assert {(kind, name) for kind, _, name, _ in found} == {
            *(("orphaned", name) for name in names[:300]),
            *(("missing", name) for name in names[2200:]),
        }
        assert api.delete(f"/v1/runs/{run_id}").status_code == 204
        for name in names[:300]:
            (stack.files / name).unlink(missing_ok=True)


def test_a_dump_is_restored_and_compared(stack: Stack, server: Server) -> None:
    """The drill of `make restore-drill`; it needs no SERVER_KEY, and leaves nothing behind."""
    with server.client() as api:
        kept = active(api)
        environment = stack.environment(VAULT_TOKEN=stack.bao.root_token, DATABASE_OWNER_URL=stack.url)
        environment["PATH"] = f"{stack.postgres.binaries}:{environment['PATH']}"
        del environment["SERVER_KEY"]

        def drill() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "dev.restore_drill"]
            return subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
            )

        done = drill()
        assert done.returncode == 0, done.stdout + done.stderr
        lost = blob(stack, kept["input_attachment_ids"][0])
        (stack.files / lost).unlink()
        done = drill()
        assert (done.returncode, f"missing  files  {lost}" in done.stderr) == (1, True), done.stdout + done.stderr
        assert not stack.sql("SELECT FROM pg_database WHERE datname LIKE 'restore_drill_%'")
        api.report(kept["id"], status="cancelled")
