"""Official SDK versions, unmodified, drive the served app: every method with a route, sync and async, and their resends.

`make test` runs the versions that matter most, `make test-sdk` all of them (SDK_VERSIONS=all).
"""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest

from tests.sdk import environment, table
from tests.sdk.environment import NEEDS_UNKNOWN_KEY, NEWEST, RENEWING, VERSIONS
from tests.sdk.proxy import PATIENCE, Proxy
from tests.support.client import Client, file_input
from tests.support.server import Server, start_server
from tests.support.stack import Stack

STYLES = ("sync", "async")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_method(version: str, stack: Stack, server: Server) -> None:
    clients = {style: server.client() for style in STYLES}
    job = {
        "url": server.url,
        "keys": {style: client.headers["authorization"].split()[1] for style, client in clients.items()},
        "foreign_key": stack.new_key("foreign"),
    }
    report = environment.run(version, "every_method.py", job)
    assert report["version"] == version
    table.keep(report)

    outcomes = [outcome for styles in report["results"].values() for outcome in styles.values()]
    assert ("run_kind" in report["run_keys"]) == (version == NEEDS_UNKNOWN_KEY)
    if version == NEEDS_UNKNOWN_KEY:
        assert "ok" in outcomes
        refused = [outcome for outcome in outcomes if outcome != "ok"]
        assert refused
        assert all(outcome.endswith("KeyError: 'run_kind'") for outcome in refused), refused
    else:
        assert set(outcomes) == {"ok"}, json.dumps(report["results"], indent=1)
        assert report["not_called"] == {style: [] for style in STYLES}
        for style, client in clients.items():
            _each_write_under_its_own_key(stack, client, report["writes"][style])
    if not RENEWING:
        rows = table.PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
        assert table.row(report) in rows, (
            "the table in docs/coming-from-the-vendor.md is not what is seen: make test-sdk renews it"
        )


def _each_write_under_its_own_key(stack: Stack, client: Client, writes: dict[str, Any]) -> None:
    rows = stack.sql("SELECT key FROM idempotency_keys WHERE organization_id = $1", client.organization)
    stored = {row["key"] for row in rows}
    assert stored <= set(writes["keys"])
    assert len(writes["keys"]) == len(set(writes["keys"]))
    assert len(stored) == (writes["succeeded"] if writes["sends_keys"] else 0)


class Resending:
    """The newest SDK retrying one run in a process of its own, while the test makes things fail."""

    def __init__(self, api: Client, run_id: str, url: str, style: str, body: dict[str, Any], timeout: float) -> None:
        self._process = subprocess.Popen(
            environment.command(NEWEST, "resend.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment.environment(),
        )
        assert self._process.stdin is not None
        key = api.headers["authorization"].split()[1]
        job = {"url": url, "key": key, "style": style, "run_id": run_id, "body": body, "timeout": timeout}
        self._process.stdin.write(json.dumps(job))
        self._process.stdin.close()
        self.reasons: list[str] = []

    def run(self, on_resend: Callable[[], object] = lambda: None) -> Any:
        """The run that the SDK hands its caller; `on_resend` is called when it sends again."""
        assert self._process.stdout is not None
        with self._process:
            for line in self._process.stdout:
                fact = json.loads(line)
                if "resend" not in fact:
                    return fact["run"]
                self.reasons.append(str(fact["resend"].get("status_code", fact["resend"]["reason"])))
                on_resend()
        raise AssertionError(f"the SDK's process ended with {self._process.returncode}")


BODY = {
    "input_values": {"user": "grace"},
    "sensitive_input_values": {"password": "second-secret"},
    "file_inputs": [file_input(b"second file", "second.txt")],
}


def _retried_once(api: Client, stack: Stack, before: dict[str, Any], handed: dict[str, Any]) -> None:
    """The caller has the reply of the one retry that happened, and nothing else happened."""
    assert handed["attempt"] == before["attempt"] + 1
    assert handed["status"] == "scheduling"
    assert handed["input_values"] == BODY["input_values"]
    run = api.get_run(before["id"])
    same = handed.keys() - {"created_at", "scheduling_reason"}  # the SDK writes times in another way
    assert {name: run[name] for name in same} == {name: handed[name] for name in same}
    attempts = api.json_of(api.get(f"/v1/runs/{before['id']}/attempts"))
    assert [attempt["attempt"] for attempt in attempts["items"]] == [before["attempt"]]

    # Of all that the resends staged, only the adopted is named by the run; the rest is on the deletion list.
    [row] = stack.sql("SELECT secret_path FROM runs WHERE id = $1", before["id"])
    secret = stack.secret(row["secret_path"])
    assert secret == {"password": "second-secret"}
    secrets_named, blobs_named = stack.named()
    assert stack.secret_paths(f"runs/{api.organization}/") <= secrets_named
    assert stack.blobs(api.organization) <= blobs_named
    assert len(run["input_attachment_ids"]) == 1
    assert api.get(f"/v1/run-attachments/{run['input_attachment_ids'][0]}/download").content == b"second file"


def _finished(api: Client) -> dict[str, Any]:
    return api.finished("error", sensitive_input_values={"password": "first-secret"}, file_inputs=[file_input()])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop_reply", "network_error"),
        ("delay_reply", "timeout"),
        ("reset", "network_error"),
        ("abandon", "network_error"),
    ],
)
def test_lost_replies_are_resent(
    fault: str, reason: str, style: str, api: Client, server: Server, stack: Stack
) -> None:
    before = _finished(api)
    with Proxy(server.url, fault) as proxy:
        sdk = Resending(api, before["id"], proxy.url, style, BODY, timeout=2 if fault == "delay_reply" else PATIENCE)
        handed = sdk.run()
        assert sdk.reasons[0] == reason
        assert proxy.connections == 1 + len(sdk.reasons)
    _retried_once(api, stack, before, handed)


@pytest.fixture(scope="module")
def impatient(stack: Stack) -> Iterator[Server]:
    """A server that soon loses patience with a slow body."""
    started = start_server(stack, BODY_TIMEOUT_SECONDS=0.5)
    yield started
    started.app.stop()


@pytest.mark.parametrize("style", STYLES)
def test_408_is_resent(style: str, impatient: Server, stack: Stack) -> None:
    with impatient.client() as api:
        before = _finished(api)
        with Proxy(impatient.url, "stall") as proxy:
            sdk = Resending(api, before["id"], proxy.url, style, BODY, PATIENCE)
            handed = sdk.run()
            assert sdk.reasons == ["408"]
        _retried_once(api, stack, before, handed)


@pytest.mark.parametrize("style", STYLES)
def test_503_is_resent(style: str, api: Client, server: Server, stack: Stack) -> None:
    before = _finished(api)
    stack.bao.freeze()
    try:
        sdk = Resending(api, before["id"], server.url, style, BODY, PATIENCE)
        handed = sdk.run(on_resend=stack.bao.thaw)
    finally:
        stack.bao.thaw()
    assert set(sdk.reasons) == {"503"}
    _retried_once(api, stack, before, handed)


@contextmanager
def _held(stack: Stack, run_id: str) -> Iterator[Callable[[], None]]:
    """The run's row is locked until the function is called."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(stack.postgres.url))

        def release() -> None:
            if not connection.is_closed():
                runner.run(connection.close())

        try:
            runner.run(connection.execute("BEGIN"))
            runner.run(connection.fetch("SELECT FROM runs WHERE id = $1 FOR UPDATE", run_id))
            yield release
        finally:
            release()


@pytest.mark.parametrize("style", STYLES)
def test_409_in_progress_is_resent(style: str, api: Client, server: Server, stack: Stack) -> None:
    """Somebody else holds the run for longer than a twin may wait."""
    before = _finished(api)
    with _held(stack, before["id"]) as release:
        sdk = Resending(api, before["id"], server.url, style, BODY, PATIENCE)
        handed = sdk.run(on_resend=release)
    assert set(sdk.reasons) == {"409"}
    _retried_once(api, stack, before, handed)


@pytest.fixture(scope="module")
def narrow(stack: Stack) -> Iterator[Server]:
    """A server on which one run of an organization may wait."""
    started = start_server(stack, QUOTA_ORGANIZATION_WAITING_RUNS=1)
    yield started
    started.app.stop()


@pytest.mark.parametrize("style", STYLES)
def test_429_is_resent_after_the_time_that_it_names(style: str, narrow: Server, stack: Stack) -> None:
    with narrow.client() as api:
        before = _finished(api)
        waits = api.run()["id"]
        sdk = Resending(api, before["id"], narrow.url, style, BODY, PATIENCE)
        began = time.monotonic()
        handed = sdk.run(on_resend=lambda: api.report(waits, status="cancelled"))
        assert sdk.reasons == ["429"]
        assert time.monotonic() - began >= 2
        _retried_once(api, stack, before, handed)
