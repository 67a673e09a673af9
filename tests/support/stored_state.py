"""What the attacks look at: everything an organization has, in all three stores, as root sees it."""

import asyncio
import json
import os
import random
import secrets
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests.support.client import Client
from tests.support.faults import collect_until_empty
from tests.support.stack import Stack, settings_of

# `make test` takes samples and few rounds; `make soak` sets how much more.
SOAK = int(os.environ.get("SOAK", "0"))
SEED = int(os.environ.get("SEED", secrets.randbelow(2**32)))

Row = dict[str, Any]


def chance(name: str) -> random.Random:
    """Randomness that the printed seed brings back."""
    print(f"{name}: SEED={SEED}")
    return random.Random(f"{SEED} {name}")


class StoredState(NamedTuple):
    """All rows of an organization, with the secrets and the bytes that they name. Equal pictures: nothing has changed."""

    runs: list[Row]
    attachments: list[Row]
    attempts: list[Row]
    keys: list[Row]

    @property
    def run(self) -> Row:
        """The only run."""
        [run] = self.runs
        return run

    def files(self, kind: str) -> list[bytes | None]:
        return sorted(row["bytes"] for row in self.attachments if row["attachment_type"] == kind)


def read_stored_state(stack: Stack, organization: str) -> StoredState:
    tables = {
        "runs": "SELECT r.*, output_data, run_message_history, sensitive_input_aliases::text AS aliases FROM runs r"
        " LEFT JOIN run_outputs o ON o.run_id = r.id AND o.attempt = r.attempt WHERE organization_id = $1 ORDER BY r.id",
        "attachments": "SELECT * FROM run_attachments WHERE organization_id = $1 ORDER BY id",
        "attempts": "SELECT t.* FROM run_attempts t JOIN runs r ON r.id = run_id WHERE r.organization_id = $1"
        " ORDER BY t.run_id, t.attempt",
        "keys": "SELECT * FROM idempotency_keys WHERE organization_id = $1 ORDER BY key",
    }
    seen = StoredState(**{name: stack.sql(query, organization) for name, query in tables.items()})
    for run in seen.runs:
        run["secrets"] = resolved(stack, run)
    for attachment in seen.attachments:
        key = attachment["storage_path"]
        path = stack.files / (key or "none")
        attachment["bytes"] = path.read_bytes() if path.exists() else None
    return seen


def resolved(stack: Stack, run: Row) -> dict[str, str | None]:
    """The secrets of a run, found as an executor finds them: by the aliases alone."""
    values: dict[str, str | None] = {}
    for name, alias in json.loads(run["aliases"] or "{}").items():
        location, _, key = alias.partition("://")[2].partition("#")
        mount, _, path = location.partition("/")
        assert mount == "secret"
        assert path == run["secret_path"]
        secret = stack.secret(path)
        values[name] = None if secret is None else secret[unquote(key)]
    return values


def named(stack: Stack, organization: str) -> tuple[set[str], set[str]]:
    """What runs and the deletion list name, of this organization."""
    vault, storage = stack.named()
    return (
        {name for name in vault if name.startswith(f"runs/{organization}/")},
        {name for name in storage if name.startswith(f"{organization}/")},
    )


def assert_nothing_lost(stack: Stack, organization: str) -> StoredState:
    """The invariant: what exists is named by a run or on the list, and what an active run names exists."""
    # A collector or a stage may be at work: what exists in between is named before or after.
    earlier = named(stack, organization)
    paths, blobs = stack.secret_paths(f"runs/{organization}/"), stack.blobs(organization)
    later = named(stack, organization)
    vault, storage = earlier[0] | later[0], earlier[1] | later[1]
    assert paths <= vault, f"secrets that nothing names: {paths - vault}"
    assert blobs <= storage, f"blobs that nothing names: {blobs - storage}"
    seen = read_stored_state(stack, organization)
    active = {run["id"] for run in seen.runs if run["status"] in ("scheduling", "running")}
    for run in seen.runs:
        if run["id"] in active:
            assert None not in run["secrets"].values(), "an active run names a secret that is gone"
    for attachment in seen.attachments:
        if attachment["run_id"] in active and attachment["storage_path"]:
            assert attachment["bytes"] is not None, "an active run names bytes that are gone"
            assert len(attachment["bytes"]) == attachment["size_bytes"]
    return seen


DAY = 86_400.0


def collect_all(stack: Stack) -> None:
    """Run the collector, on a clock that goes on by days, until the list is empty."""
    for days in (0.1, 3, 6, 9):
        asyncio.run(collect_until_empty(settings_of(stack), days * DAY))
        if not stack.sql("SELECT 1 FROM deletions"):
            return
    raise AssertionError(f"the list does not get empty: {stack.sql('SELECT * FROM deletions')}")


def assert_exactly_named(stack: Stack, organization: str) -> None:
    """After all times have passed: what exists is what runs name, to the last folder."""
    collect_all(stack)
    _, storage = named(stack, organization)
    kept = stack.sql(
        "SELECT secret_path FROM runs WHERE organization_id = $1 AND secret_path IS NOT NULL"
        " AND status IN ('scheduling', 'running')",  # a finished run's retention time has passed
        organization,
    )
    assert stack.secret_paths(f"runs/{organization}/") == {row["secret_path"] for row in kept}
    assert stack.blobs(organization) == storage
    folders = [path for path in (stack.files / organization).rglob("*") if path.is_dir()]
    assert all(any(folder.iterdir()) for folder in folders), "an empty folder is left"
    assert storage or not (stack.files / organization).exists()
    assert_nothing_lost(stack, organization)


def attempts(client: Client, run_id: str) -> int:
    """Retries so far."""
    return int(client.json_of(client.get(f"/v1/runs/{run_id}/attempts"))["total"])


def gone(stack: Stack) -> bool:
    """PostgreSQL has noticed that the service died: its transactions are over."""
    return not stack.sql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'runs-api'")
