"""Plans: no statement reads more than it needs, whatever PostgreSQL knew of the tables when it planned it.

Connections keep plans. One that was made while the tables were short is still used when they are long, until somebody analyzes
them; and until then a new plan is made for the tables as they were. Every statement is run both ways, with samples, on tables
of some 20,000 rows, and the blocks are counted that it reads of tables and indexes; those that triggers read for it too. A full
scan of an index, which `enable_seqscan` does not forbid, takes some hundred and more.

At last the tables are analyzed and every statement is called as the service calls it: none may be planned at each call.
"""

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import md5, sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from orjson import dumps
from pydantic import SecretStr

import app
from app.access.auth import Principal
from app.config import Settings
from app.errors import Refusal
from app.models import RunStatus
from app.resources.webhook_deliveries import list_deliveries
from app.resources.workflows import get_seen
from app.runs import queue
from app.runs.attachments import list_attachments
from app.runs.listing import FIELDS, Order, RunFilter, Search, bits, list_runs
from app.runs.retry_statements import COLUMNS
from app.scheduling.placement import Pass, place
from app.stores.database import Database
from app.stores.paging import Slice
from app.stores.setup import role_settings
from app.stores.statements import REGISTRY, Statement
from tests.support.stack import Stack, own_database

for module in pkgutil.walk_packages(app.__path__, "app."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

# --- tables -----------------------------------------------------------------------------------------------------------

ROWS = 20_000  # of a table; of runs twice as many
SHORT = 30  # while plans are made

# One organization has nearly all: what looks for one of its things must not look at all of them. All that has ended was of
# a few workflows, machines and sessions. A row's id is made of its number. {kind} is n % 10 when tables are full; it says
# what a run is: 0 to 4 have ended, 5 to 7 wait (in the lane of all, of pools, of a session or a machine), 8 is assigned, 9
# runs.
FILL = (
    "INSERT INTO api_keys (id, organization_id, key_hash, revoked_at)"
    " SELECT md5('key' || n)::uuid, 'k' || n % 5000, sha256(n::text::bytea), CASE WHEN n % 2 = 0 THEN now() END FROM {rows}",
    "INSERT INTO workflows (id, organization_id, main_prompt, is_webhooks_enabled, retry_policy, version, created_at)"
    " SELECT md5('workflow' || n)::uuid, 'big', 'Do it.', true, '{{\"max_retries\": 3}}', 4, now() - n * interval '1 s'"
    " FROM {rows}",
    "INSERT INTO workflow_versions (workflow_id, version, main_prompt)"
    " SELECT md5('workflow' || n)::uuid, version, 'Do it.' FROM {rows}, generate_series(1, 3) AS version",
    "INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id, reserved_session_id, look_at, last_seen, created_at)"
    " SELECT md5('machine' || n)::uuid, 'big', n::text, 'x', CASE WHEN n % 5 = 0 THEN md5('session' || n)::uuid END,"
    " now() + (n % 100 - 1) * interval '1 min' - n * interval '1 ms', now() - interval '1 h', now() - n * interval '1 s'"
    " FROM {rows}",
    "INSERT INTO pools (id, organization_id, name, created_at)"
    " SELECT md5('pool' || n)::uuid, 'big', 'pool', now() - n * interval '1 s' FROM {rows}",
    "INSERT INTO pool_machines SELECT md5('pool' || n)::uuid, md5('machine' || n)::uuid FROM {rows}",
    """
    INSERT INTO runs (id, organization_id, workflow_id, status, attempt, assigned_machine_id, pinned_machine_id, pool_ids,
        sensitive_input_aliases, secret_path, session_id, release_session_after, lane, created_at, queued_at, queued_by_key_id,
        started_at, ended_at, reported_at, awaited_since, changed_at)
    SELECT md5('run' || n)::uuid, 'big', md5('workflow' || 1 + n % 30)::uuid,
        CASE WHEN kind < 5 THEN (ARRAY['success', 'error', 'cancelled'])[1 + n % 3] WHEN kind < 9 THEN 'scheduling'
             ELSE 'running' END,
        CASE WHEN kind < 5 THEN 2 ELSE 1 END,
        CASE WHEN kind < 5 THEN md5('machine' || 1 + n % 30)::uuid
             WHEN kind > 7 THEN md5('machine' || n / 10 * 2 + kind - 7)::uuid END,
        CASE WHEN kind < 5 AND n % 2 = 0 THEN md5('machine' || 1 + n % 30)::uuid
             WHEN kind = 7 AND n / 10 % 2 = 0 THEN md5('machine' || 10000 + n / 10 % 500)::uuid END,
        CASE WHEN kind = 6 THEN ARRAY[md5('pool' || 1 + n / 10 % 300)::uuid] END,
        CASE WHEN kind = 0 THEN '{{"password": "vault://secret/x#password"}}'::json END,
        CASE WHEN kind = 0 THEN 'runs/big/' || n END,
        CASE WHEN kind = 0 THEN md5('session' || 5 * (1 + n % 4000))::uuid WHEN kind < 5 THEN md5('old' || n % 30)::uuid
             WHEN kind = 7 AND n / 10 % 2 = 1 THEN md5('waiting' || n / 10 % 1000)::uuid
             WHEN kind = 9 THEN md5('session' || 5 * (n / 10))::uuid END,
        kind IN (0, 9),
        CASE WHEN kind = 6 THEN 'pools:' || n / 10 % 300
             WHEN kind = 7 AND n / 10 % 2 = 1 THEN 'session:' || md5('waiting' || n / 10 % 1000)::uuid
             WHEN kind = 7 THEN 'machine:' || md5('machine' || 10000 + n / 10 % 500)::uuid
             WHEN kind = 5 AND n % 100 = 95 THEN '~any' ELSE 'any' END,
        now() - n * interval '1 s',
        CASE WHEN kind = 5 AND n % 100 = 95 THEN now() + (n - 10400) * interval '1 s' ELSE now() - n * interval '1 s' END,
        md5('key1')::uuid,
        CASE WHEN kind < 5 OR kind = 9 THEN now() - n * interval '1 s' END,
        CASE WHEN kind < 5 THEN now() - n * interval '1 min' END,
        CASE WHEN kind < 5 OR kind = 9 THEN now() - n * interval '1 s' END,
        CASE WHEN kind = 8 THEN now() - n * interval '1 s' END, now() - n * interval '1 min'
    FROM (SELECT n, {kind} AS kind FROM {runs}) AS numbered
    """,
    "INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history, is_superseded)"
    " SELECT md5('run' || n)::uuid, attempt, '{{\"answer\": 42}}', '[{{\"role\": \"assistant\"}}]', attempt = 1"
    " FROM {runs}, generate_series(1, 2) AS attempt WHERE {kind} < 5",
    "INSERT INTO run_attempts (run_id, attempt, status, retried_at, overridden)"
    " SELECT md5('run' || n)::uuid, 1, 'error', now() - n * interval '1 min', '{{}}' FROM {runs} WHERE {kind} < 5",
    "INSERT INTO planned_retries"
    " (run_id, attempt, organization_id, due_at, look_at, rule, avoids_last_machine, owes_event)"
    " SELECT md5('run' || n)::uuid, 2, 'big', due, due, 1, false, true"
    " FROM {runs}, LATERAL (SELECT now() + (n - 300) * interval '1 min' AS due) AS planned WHERE {kind} < 5",
    "INSERT INTO run_events (organization_id, xact, at, run_id, attempt, event, changed)"
    " SELECT 'big', 3 + n % 300, now() - n * interval '1 min', md5('run' || n)::uuid, 1, event, '{{}}'"
    " FROM {runs}, unnest('{{created,ended}}'::text[]) AS event",
    "INSERT INTO run_attachments (id, organization_id, run_id, attachment_type, filename, content_type, size_bytes,"
    " storage_path, created_at, expires_at) SELECT md5(type || n)::uuid, 'big', md5('run' || n)::uuid, type, 'a.txt',"
    " 'text/plain', 5, 'big/' || type || n, now() - n * interval '1 s',"
    " CASE WHEN type = 'output' THEN now() + (n % 100 - 1) * interval '1 h' END"
    " FROM {runs}, unnest('{{input,output}}'::text[]) AS type WHERE {kind} < 5",
    "INSERT INTO deletions (store, name, due_at) SELECT 'vault', 'runs/big/' || n, now() + (10 + n) * interval '1 min'"
    " FROM {runs} WHERE n <> 10060 UNION ALL SELECT 'storage', 'gone/' || n, now() + (n - 300) * interval '1 s' FROM {rows}",
    "INSERT INTO idempotency_keys (organization_id, key, fingerprint, status, body, ids, expires_at)"
    " SELECT 'big', 'key' || n, 'x', 200, '', ARRAY[md5('run' || n)::uuid], now() + (n - 300) * interval '1 min' FROM {rows}",
    "INSERT INTO stored_replies (organization_id, until, bytes)"
    " SELECT CASE WHEN n % 2 = 0 THEN 'big' ELSE 'o' || n END, now() + (n - 300) * interval '1 min', 5 FROM {rows}",
    "INSERT INTO webhook_endpoints (id, organization_id, url, event_types)"
    " SELECT md5('endpoint' || n)::uuid, CASE WHEN n < 6 THEN 'big' ELSE 'w' || n END, 'https://localhost/',"
    " '{{run_complete,downed_machines}}'"
    " FROM {rows}",
    "INSERT INTO webhook_secrets (path, endpoint_id, expires_at)"
    " SELECT 'hooks/' || n || '/' || k, md5('endpoint' || n)::uuid, "
    " CASE WHEN k = 1 THEN now() + (n % 2 - 0.5) * interval '1 h' END FROM {rows}, generate_series(1, 2) AS k WHERE n <> 3",
    "INSERT INTO webhook_events (id, organization_id, run_id, attempt, event_type, occurred_at, body, is_fanned_out)"
    " SELECT md5('event' || n)::uuid, 'big', md5('run' || n)::uuid, 1, 'run_complete', now() - n * interval '1 min', 'x',"
    " n % 10 > 0 FROM {rows}",
    "INSERT INTO webhook_deliveries (id, event_id, endpoint_id, organization_id, status, due_at, lease, created_at)"
    " SELECT md5('delivery' || n)::uuid, md5('event' || n)::uuid,"
    " md5('endpoint' || CASE WHEN n % 2 = 0 THEN 1 ELSE n END)::uuid, 'big',"
    " CASE WHEN n % 10 < 8 THEN 'delivered' ELSE 'pending' END, now() - n * interval '1 s', md5('lease' || n)::uuid,"
    " now() - n * interval '1 s' FROM {rows}",
    "INSERT INTO webhook_recoveries (endpoint_id, organization_id, after_at, after_id, until, moved_at)"
    " SELECT md5('endpoint' || n)::uuid, 'big', now() - interval '1 day', md5('event')::uuid, now(), now() - n * interval '1 s'"
    " FROM {rows}",
    # A few of those that run are due. One has half of all items.
    "INSERT INTO bulk_retries (id, organization_id, key_id, state, overrides, total, created_at, due_at, ended_at)"
    " SELECT md5('bulk' || n)::uuid, CASE WHEN n % 10 < 8 AND n <> 101 THEN 'big' ELSE 'b' || n END, md5('key' || n)::uuid,"
    " CASE WHEN n % 10 < 8 AND n <> 101 THEN 'completed' ELSE 'running' END, '{{}}', 10000, now() - n * interval '1 s',"
    " now() + (n - 300) * interval '1 min',"
    " CASE WHEN n % 10 < 8 AND n <> 101 THEN now() - n * interval '1 min' END FROM {rows}",
    "INSERT INTO bulk_retry_items (bulk_retry_id, place, run_id, attempt, outcome)"
    " SELECT md5('bulk' || CASE WHEN n % 2 = 0 AND n > 101 THEN 101 ELSE n END)::uuid, n, md5('run' || n)::uuid, 1,"
    " CASE WHEN n < 15000 THEN 'retried' ELSE 'pending' END FROM {rows}",
    "INSERT INTO shared_rounds (name) SELECT 'placement' FROM {rows} LIMIT 1 ON CONFLICT DO NOTHING",
    "INSERT INTO dispatches (run_id, assignment, kind, attempt, machine_id, organization_id, due_at)"
    " SELECT md5('run' || n)::uuid, 1, CASE WHEN n % 2 = 0 THEN 'start' ELSE 'cancel' END, 1, md5('machine' || n)::uuid, 'big',"
    " now() + (n - 300) * interval '1 s' FROM {rows}",
)


def an_id(kind: str, number: int) -> UUID:
    """As the tables have it."""
    return UUID(md5(f"{kind}{number}".encode(), usedforsecurity=False).hexdigest())


def fill(stack: Stack, first: int, *, ended: bool = False) -> None:
    """Rows from `first` on: the few that are there while plans are made (of runs only such as have ended), or all others.

    Foreign keys are not checked: that takes two fifths of the time.
    """
    last, kind = (SHORT, "n % 5") if ended else (ROWS, "n % 10")
    rows, runs = (f"generate_series({first}, {end}) AS n" for end in (last, last if ended else 2 * last))
    with stack.held("SET LOCAL session_replication_role = replica", commit=True) as run:
        for insert in FILL:
            run(insert.format(rows=rows, runs=runs, kind=kind))


# --- samples ----------------------------------------------------------------------------------------------------------

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)
A_WHILE_AGO = datetime.now(UTC) - timedelta(hours=2)
NO_TIME = timedelta(0)
ENDED, WAITING, POOLED, IN_SESSION, PINNED, ASSIGNED, RUNNING = (
    an_id("run", number) for number in (10_010, 10_015, 10_016, 10_017, 10_027, 10_018, 10_019)
)
SOME_RUNS = [an_id("run", number) for number in (10_030, 10_040)]
WAITING_RUNS = [an_id("run", number) for number in (10_035, 10_045)]
ASSIGNED_RUNS = [an_id("run", number) for number in (10_038, 10_048)]
IDLE_MACHINES = [an_id("machine", number) for number in (15_001, 15_002)]


def some(kind: str, *numbers: int) -> list[UUID]:
    return [an_id(kind, number) for number in numbers or (101, 109)]


# By the name of a parameter.
SAMPLES: dict[str, Any] = {
    "after_id": UUID(int=0),
    "after_seconds": 60.0,
    "ahead": NO_TIME,
    "attachment_id": an_id("output", 10_010),
    "attempt": 2,
    "attempts": [1],
    "batch": 2,
    "before": "scheduling",
    "body": b"{}",
    "bound_to": None,
    "bulk_retry_id": an_id("bulk", 101),
    "by": "request",
    "changed": ["status"],
    "claim": None,
    "cleanup": False,
    "content_type": "text/plain",
    "created_at": FAR_AHEAD,
    "created_seen": 100,
    "days": 1,
    "delay": 5.0,
    "delivery_id": an_id("delivery", 101),
    "description": "x",
    "disabled": False,
    "endpoint_id": an_id("endpoint", 101),
    "ended_at": None,
    "ends": False,
    "error": None,
    "event_id": uuid4(),
    "event_types": ["run_complete"],
    "every": 10.0,
    "every_seconds": 60.0,
    "error_code": None,
    "expires_at": None,
    "filename": "a.txt",
    "fingerprint": b"x",
    "grace_seconds": 900.0,
    "hostname": "x",
    "id": uuid4(),
    "ids": SOME_RUNS,
    "includes_file_exports": False,
    "input_ids": None,
    "input_schema": None,
    "input_values": None,
    "is_priority": False,
    "is_webhooks_enabled": False,
    "key": "another key",
    "key_free_after": 50,
    "key_hash": b"x" * 32,
    "key_id": an_id("key", 1),
    "key_ids": some("key"),
    "key_room": 10**6,
    "keeps_outputs": False,
    "lane": "any",
    "lease": an_id("lease", 101),
    "lease_seconds": 60.0,
    "limit": 10,
    "longest": 8.0,
    "machine_id": an_id("machine", 101),
    "machine_ids": IDLE_MACHINES,
    "main_prompt": "x",
    "max_bytes": 32 * 2**20,
    "milliseconds": "2000",
    "model_metadata": None,
    "most": 2,
    "most_bytes": 2**16,
    "name": "x",
    "named": ["name"],
    "names": ["runs/big/101", "runs/big/102"],
    "not_before": None,
    "occurred_at": LONG_AGO,
    "organization_free_after": 50,
    "organization_id": "big",
    "organization_ids": ["o101", "o103"],
    "organization_room": 10**6,
    "os_info": "x",
    "output_data": b'{"answer": 43}',
    "output_schema": None,
    "overridden": [],
    "overlap": timedelta(hours=1),
    "overlap_seconds": 60.0,
    "owner_id": an_id("workflow", 1),
    "path": "hooks/another",
    "period": 1.0,
    "pinned_machine_id": None,
    "pool_id": an_id("pool", 101),
    "pool_ids": some("pool"),
    "queue_rank": 1,
    "reason": None,
    "release_session_after": False,
    "replaces_inputs": True,
    "request_id": "r",
    "rest_for_slice": 0.35,
    "retry_policy": None,
    "run_id": ENDED,
    "run_ids": SOME_RUNS,
    "run_message_history": b"[]",
    "scopes": ["*"],
    "secret_path": None,
    "seconds": 60.0,
    "sensitive_input_aliases": None,
    "session_alias": None,
    "session_id": None,
    "silence": 90.0,
    "size_bytes": 5,
    "salt": "all",
    "shown": bits(FIELDS),
    "silent_seconds": 180.0,
    "store_id": UUID(int=1),
    "skip": 0,
    "started_at": None,
    "starts": False,
    "storage_path": "big/another",
    "stores": ["vault"] * 2,
    "target_path": None,
    "traceparent": None,
    "ttl_seconds": 86_400,
    "unkey_key_id": "x",
    "until": LONG_AGO,
    "url": "https://localhost/",
    "usage_metadata": None,
    "user_id": None,
    "value": "x",
    "version": "x",
    "waiting_seen": 100,
    "workflow_id": an_id("workflow", 1),
}

_FILES = {"ids": some("output", 10_010, 10_020)}
# Two of one set, far from each other in the tables.
_RETRIED: dict[str, Any] = {
    **{f"{name}s": [None, None] for name in COLUMNS},
    "run_ids": [ENDED, an_id("run", 30_011)],
    "organization_ids": ["big"] * 2,
    "key_ids": [an_id("key", 1)] * 2,
    "bys": ["request"] * 2,
    "overriddens": ["{}"] * 2,
    "lanes": ["any"] * 2,
    "queue_ranks": [1] * 2,
    "avoids_last_machines": [True, False],
    "is_prioritys": [False] * 2,
    "keys": ["a key", "another key"],
    "fingerprints": [b"x"] * 2,
    "most_bytess": [2**16] * 2,
    "waiting_seens": [100] * 2,
    "organization_rooms": [10**6] * 2,
    "key_rooms": [10**6] * 2,
}
_NEW_FILE: dict[str, Any] = {
    "file_ids": [uuid4()],
    "filenames": ["a"],
    "content_types": ["text/plain"],
    "sizes": [5],
    "storage_paths": ["big/new"],
    "target_paths": [None],
    "cleanups": [False],
}
_NEW_RUN = {"run_ids": [uuid4()], "aliases": [None], "secret_paths": [None]}
_DISPATCHES = {"run_ids": some("run"), "assignments": [1, 1], "kinds": ["cancel", "cancel"]}
_BEFORE_ALL = {"created_at": LONG_AGO, "id": UUID(int=0)}

_CHOICE = {"not_found": "x", "not_terminal": "{status}", "status_here": "{status}"}
_JOB: dict[str, Any] = {
    "filter": None,
    "overrides": b"{}",
    "pace_per_second": None,
    "first": 0,
    "stop_after_failures": 0,
}

# Of a statement, where those by the parameter's name do not do.
OWN: dict[str, dict[str, Any]] = {
    **{f"attempts.{name}": {"attempt": 1} for name in ("archived", "weigh")},
    "attachments.delete": {"attachment_id": an_id("output", 10_020)},
    "attachments.forget_bytes": {"ids": some("input", 10_010, 10_020)},
    "attachments.forget_outputs": _FILES,
    "attachments.insert": {"run_id": RUNNING},
    "attachments.rows": _FILES,
    "attachments.still_expired": {"ids": some("output", 10_000, 10_100)},
    "bulk.decide": {
        "places": [9_000, 9_002],
        "outcomes": ["retried", "skipped"],
        "codes": [None, "x"],
        "details": [None, "x"],
    },
    "bulk.end": {
        "bulk_retry_id": an_id("bulk", 109),
        "state": "aborted",
        "failure": None,
        "code": "aborted",
        "detail": "x",
    },
    **{f"bulk.{name}": {"organization_id": "b101"} for name in ("get", "known", "lock", "under_way")},
    "bulk.item_rows": {"places": [9_000, 9_002]},
    "bulk.move": {
        "retried": 1,
        "skipped": 1,
        "waiting_for": None,
        "is_first_over": True,
        "pace_seconds": 0.1,
        "wait_seconds": None,
    },
    "bulk.pause_by_itself": {"pause_reason": "first_failed"},
    "bulk.placement": {"lanes": dumps([{"lane": "pools:1", "queue_rank": 1, "pool_ids": [an_id("pool", 2)]}])},
    "bulk.postpone": {"wait_seconds": 1.0},
    "bulk.resume": {"failed": 1},
    "bulk.results": {"ids": some("bulk", 109, 111)},
    "bulk.rows": {"ids": some("bulk")},
    "bulk.read_listed": _CHOICE,
    "bulk.store_listed": {**_CHOICE, **_JOB},
    "auth.authenticate": {"key_hashes": [sha256(b"101").digest(), sha256(b"103").digest()]},
    "channels.tell": {"channels": ["placement"], "messages": ["big"]},
    "comparison.endpoints": {"after": UUID(int=0)},
    "comparison.endpoints_again": {"ids": some("endpoint")},
    "comparison.expire": {"name": "runs/big/101"},
    "comparison.files": {"after": UUID(int=0)},
    "comparison.files_again": _FILES,
    "comparison.runs": {"after": UUID(int=0)},
    "comparison.unnamed_files": {"names": ["big/nobody's"]},
    "comparison.unnamed_secrets": {"names": ["runs/big/nobody's"], "run_ids": [ENDED]},
    "deletions.due": {"names": ["runs/big/101", "new"]},
    "deletions.stage": {"names": ["new 1", "new 2"]},
    "events.after": {"xact": 200, "id": 0},
    "events.of_run": {"xact": 0, "id": 0},
    "handoff.postpone": _DISPATCHES,
    "handoff.cancel": {"run_ids": ASSIGNED_RUNS},
    "handoff.settle": _DISPATCHES,
    "handoff.sweep": {"after": UUID(int=0)},
    "idempotency.find": {"key": "key10101"},
    "idempotency.free": {"key": "key101"},
    "idempotency.store": {"ids": [ENDED], "status": 200},
    "api_keys.rows": {"ids": some("key")},
    "included.members": {"most": 1000},
    **{
        f"included.{name}": {"workflow_ids": some("workflow", 101, 103), "machine_ids": some("machine", 101, 103)}
        for name in ("weigh_of_runs", "workflows", "machines")
    },
    "keys.insert": {"machine_id": None},
    "keys.list": {"organization_id": "k101"},
    "keys.revoke": {"id": an_id("key", 101)},
    "keys.rotate": {"old_id": an_id("key", 101)},
    "machines.change": {
        **dict.fromkeys(("version", "status", "is_available", "alerts_enabled", "last_seen", "reserved_session_id")),
        "id": an_id("machine", 101),
    },
    "machines.delete": {"machine_id": an_id("machine", 15_001)},
    "machines.delete.detach": {"machine_id": an_id("machine", 1), "run_ids": SOME_RUNS},
    "machines.insert": {"fingerprint": "x", "version": "x"},
    "machines.rows": {"ids": IDLE_MACHINES},
    **{
        f"machines.session.{name}": {"machine_id": an_id("machine", 10_005)}
        for name in ("count_runs", "free_runs", "lock_machine", "lock_runs")
    },
    "organizations.count": {"organization_id": "w101"},
    "organizations.remove.idempotency_keys": {"key": ""},
    **{f"organizations.remove.{name}": _BEFORE_ALL for name in ("bulk_retries", "machines", "pools", "workflows")},
    "organizations.remove.run_events": {"xact": 0, "id": 0},
    "organizations.remove.webhook_events": {"occurred_at": LONG_AGO, "id": UUID(int=0)},
    "organizations.remove_keys": {"organization_id": "k100"},
    "organizations.revoke_keys": {"organization_id": "k101"},
    "organizations.revoked_for": {"organization_id": "k100"},
    "organizations.lock_runs": {"id": UUID(int=0)},
    "placement.assign": {"run_ids": WAITING_RUNS},
    "placement.assign_and_hand_over": {"run_ids": WAITING_RUNS},
    "placement.heads": {"after": "", "slice": 5, "pinned": [f"machine:{an_id('machine', 10_002)}"], "most": 5},
    "placement.idle_machines": {"created_at": None, "id": None, "slice": 5},
    "placement.lock_runs": {"run_ids": WAITING_RUNS},
    "placement.read_on": {"queue_rank": 1, "queued_at": LONG_AGO, "id": UUID(int=0)},
    "placement.reserve": {"session_ids": [uuid4(), uuid4()]},
    "pools.change": {"id": an_id("pool", 101)},
    "pools.join": {"pool_ids": some("pool", 101), "machine_ids": some("machine", 103)},
    "pools.leave": {"machine_ids": some("machine")},
    "pools.in_too_many": {"machine_ids": some("machine"), "most": 0},
    "pools.leave_others": {"pool_ids": []},
    "pools.rows": {"ids": some("pool")},
    "replies.add": {"bytes": [5, 5]},
    "runs.assigned": {"machine_ids": some("machine", 2007, 2009)},
    "runs.conclude.lock": {"run_id": RUNNING},
    "runs.create.created": {"run_ids": WAITING_RUNS},
    "runs.create.insert": _NEW_RUN,
    "runs.dry_run.placement": {"lane": "pools:1", "pool_ids": [an_id("pool", 2)]},
    **{f"retry_policies.{name}": {"attempts": [2, 2]} for name in ("lock_ended", "remove")},
    "retry_policies.drop": {"attempts": [2, 2], "codes": ["policy_removed", "pool_deleted"]},
    "retry_policies.plan": {
        "attempts": [3, 3],
        "organization_ids": ["big"] * 2,
        "statuses": ["error"] * 2,
        "codes": [None, "input_attachments_expired"],
        "reasons": ["x"] * 2,
        "due_ats": [LONG_AGO, None],
        "rules": [1, 1],
        "avoids": [False] * 2,
        "owed": [True] * 2,
    },
    "retry_policies.postpone": {"attempts": [2, 2], "wait_seconds": 1.0},
    "runs.ending.end": {"run_ids": ASSIGNED_RUNS, "status": "cancelled"},
    "runs.ending.delete": {"run_ids": [WAITING]},
    "runs.ending.release": {"run_ids": [ENDED]},
    "runs.ending.release_active": {"run_ids": [RUNNING]},
    "runs.record_ended": {"run_ids": [an_id("run", 30_019)]},
    "runs.ending.retain": {"run_ids": [an_id("run", 10_060)]},
    "runs.ending.retain_for_plan": {"run_ids": [an_id("run", 10_060)], "due_ats": [LONG_AGO]},
    "runs.ending.secrets_expired": {"paths": ["runs/big/10030", "runs/big/10040"]},
    "runs.get": {"most": 10**6},
    "runs.history.page": {"run_id": RUNNING, "after": 0, "limit": 100, "most": 10**6},
    "runs.read": {"most": 10**6},
    "runs.lane_reasons": {"run_ids": [POOLED, IN_SESSION, PINNED]},
    "runs.lock_by.assigned_machine_id": {"owner_id": an_id("machine", 2007), "run_id": ENDED},
    "runs.lock_by.pinned_machine_id": {"owner_id": an_id("machine", 10_002), "run_id": ENDED},
    "runs.lock_by.workflow_id": {"owner_id": an_id("workflow", 1)},
    "runs.moving.input_expires": {"not_before": FAR_AHEAD},
    "runs.moving.move": {"run_id": WAITING},
    "runs.moving.retarget": {"run_id": WAITING, "machine_id": None},
    "runs.outputs.save": dict.fromkeys(
        ("names_output_data", "names_run_message_history", "names_usage_metadata"), True
    ),
    "runs.report.lock": {"run_id": RUNNING},
    "runs.report.outputs_of": _FILES,
    "runs.report.update": {
        **dict.fromkeys(
            ("names_input_values", "names_release_session_after", "names_error", "names_error_code"), False
        ),
        "run_id": ASSIGNED,
        "status": "running",
        "starts": True,
        "started_at": datetime.now(UTC),
    },
    "runs.staging.attach": {**_NEW_FILE, "file_run_ids": [WAITING]},
    "runs.retry.read": {
        "run_ids": [ENDED, *SOME_RUNS],
        "organization_ids": ["big"] * 3,
        "session_ids": [None] * 3,
        "not_befores": [None] * 3,
    },
    "runs.retry.switch": _RETRIED,
    "runs.retry.switch_staged": _RETRIED
    | _NEW_FILE
    | {
        "keeps_outputs": True,
        "file_run_ids": [ENDED],
        "machine_ids": [an_id("machine", 101), None],
        "name_counts": [2, 0],
        "name_places": [1, 1],
        "names_are_kept": [False, False],
        "sensitive_input_aliasess": [b"{}", None],
        "secret_paths": ["runs/big/new", None],
        "replaces_inputss": [True, False],
        "input_idss": ["{}", None],
    },
    "setup.fits": {"names": ["jit"]},
    "signs_of_life.write": {"organization_ids": ["big"] * 2, "ages": [0.0] * 2},
    "silence.disconnect": {"reservations": [], "reason": "x"},
    "silence.stay": {"run_ids": ASSIGNED_RUNS},
    "silence.unassign": {"run_ids": ASSIGNED_RUNS},
    "targets.session": {"session_id": an_id("waiting", 101)},
    "webhooks.claim": {
        "endpoint_ids": some("endpoint", 109),
        "places": [2],
        "places_failing": [1],
    },
    "webhooks.fan_out": {"after": ""},
    "webhooks.deliveries.rows": {"ids": some("delivery")},
    "webhooks.drop": {"ids": some("delivery"), "leases": some("lease"), "errors": ["x", "x"]},
    "webhooks.endpoint.change": {"names_description": True, "endpoint_id": an_id("endpoint", 2)},
    "webhooks.endpoint.delete": {"endpoint_id": an_id("endpoint", 3)},
    "webhooks.endpoint.get": {"endpoint_id": an_id("endpoint", 2)},
    "webhooks.endpoint.insert": {"endpoint_id": uuid4()},
    "webhooks.endpoint.lock": {"endpoint_id": an_id("endpoint", 2)},
    "webhooks.endpoints.rows": {"ids": some("endpoint")},
    "webhooks.forget_bodies": {"run_ids": some("run")},
    "webhooks.insert_test": {"delivery_id": uuid4()},
    "webhooks.lanes": {"after": UUID(int=0)},
    "webhooks.postpone": {"id": an_id("delivery", 101)},
    "webhooks.settle": {
        "id": an_id("delivery", 101),
        "status": "failed",
        "duration_ms": 5,
        "response_status": 500,
        "response_body": "",
        "error": "x",
        "most_tries": 8,
        "is_success": False,
        "is_gone": False,
        "after": timedelta(days=1),
    },
    "webhooks.secret.add": {"endpoint_id": an_id("endpoint", 3)},
    "webhooks.secret.forget_expired": {"endpoint_id": an_id("endpoint", 102)},
    "webhooks.start_recovery": {"since": LONG_AGO},
    "workflows.change": {"id": an_id("workflow", 101), "version": 5},
    "workflows.rows": {"ids": some("workflow")},
    "workflows.delete": {"workflow_id": an_id("workflow", 101)},
    "workflows.used": {"machine_id": an_id("machine", 1), "workflow_id": an_id("workflow", 101)},
}

# What goes before it in its transaction.
FIRST = dict.fromkeys(("runs.queue.lanes", "runs.queue.count_held"), queue.BY_THE_QUEUES_INDEX)

# Run by the operator's commands, as the owner of the tables.
OWNERS = ("comparison.", "keys.", "organizations.")

# --- bounds -----------------------------------------------------------------------------------------------------------

MOST_BLOCKS = 80

# More, and why.
MORE: dict[str, tuple[int, str]] = {
    "attachments.expired": (1_500, "a batch of 200: the file and its run"),
    "bulk.claim": (600, "all jobs that are due, and the last turn of the organization of each"),
    "comparison.endpoints": (6_000, "an operator's command, a page of 1,000"),
    "comparison.files": (5_000, "an operator's command, a page of 1,000"),
    "comparison.runs": (2_000, "an operator's command, a page of 1,000"),
    "events.prune": (16_000, "a batch of 5,000"),
    "gauges.read": (
        110_000,
        "a replica's look at all there is once in a while: 20,000 machines, 500 lanes, 100,000 waiting",
    ),
    "idempotency.forget": (1_000, "a batch of 1,000"),
    "keys.list": (400, "an operator's command, all keys"),
    "organizations.count": (500, "an operator's command; keys are few, and have no index by organization"),
    "organizations.lock_runs": (1_500, "an operator's command, a batch of 200, at worst after all runs are sorted"),
    "organizations.remove.idempotency_keys": (2_000, "an operator's command, a batch of 500"),
    "organizations.remove.machines": (2_100, "an operator's command, a batch of 100, and what belongs to each"),
    "organizations.remove.pools": (1_300, "an operator's command, a batch of 100, and what belongs to each"),
    "organizations.remove.run_events": (21_000, "an operator's command, a batch of 5,000"),
    "organizations.remove.stored_replies": (1_800, "an operator's command, a batch of 500"),
    "organizations.remove.webhook_events": (5_200, "an operator's command, a batch of 500, and what belongs to each"),
    "organizations.remove.workflows": (70_000, "an operator's command, a batch of 500, and whether each has a run"),
    "organizations.remove_keys": (400, "as organizations.count"),
    "organizations.revoke_keys": (400, "as organizations.count"),
    "organizations.revoked_for": (400, "as organizations.count"),
    "placement.look_around": (6_000, "a slice of 500 lanes"),
    "placement.assign": (100, "two runs, each in nine indexes"),
    "placement.assign_and_hand_over": (120, "two runs, each in nine indexes, and a dispatch of each"),
    "replies.forget": (1_000, "a batch of 1,000"),
    "retention.prune_attempts": (25_000, "a batch of 2,000, and the outputs and files of each"),
    "runs.ending.end": (90, "two runs, each in six indexes, one more since 0021, and an event of each"),
    "runs.ending.silent": (1_200, "a batch of 100; of all that run, if statistics know of none that runs"),
    "runs.lock_by.workflow_id": (1_600, "a batch of 200; all 1,300 runs of the workflow, if statistics expect few"),
    "runs.outputs.prune": (1_500, "a batch of 200"),
    "runs.queue.count_held": (600, "what is held is counted to 1,000; a fresh row is looked at in its page"),
    "runs.queue.lanes": (15_000, "2,000 lanes, and 200 of them closely"),
    "runs.retry.switch": (300, "two runs, each in nine indexes, its attempt, outputs, files and events"),
    "runs.retry.switch_staged": (380, "as runs.retry.switch, with new files and names"),
    "webhooks.prune": (700, "a batch of 64, and what belongs to each"),
    "workflows.used": (5_500, "the runs of one machine or of one workflow"),
}

# Run with `plans_see_values`, and why; and what of ACTIONS runs them.
SEES_VALUES = {"workflows.used": "either the machine or the workflow may have nearly all runs"}
ACTIONS_THAT_SEE_VALUES = ["a workflow of a machine's key"]

# As ADOPT once was: a plan of an empty table reads all of a full one.
CONTROL = Statement(
    "tests.adopt_by_a_join",
    "DELETE FROM deletions d USING unnest($1::text[], $2::text[]) AS staged (store, name)"
    " WHERE d.store = staged.store AND d.name = staged.name",
    ("stores", "names"),
)

# --- what composes statements, or many of them ------------------------------------------------------------------------

NOBODY_BOUND = Principal(an_id("key", 1), "big", None)
BOUND = Principal(an_id("key", 1), "big", None, machine_id=an_id("machine", 1))
PART = Slice(0, 20, 32 * 2**20)
SOME_FIELDS = ["id", "status", "scheduling_reason"]


def _runs(
    order: Order = "created", searched: Search | None = None, **wanted: Any
) -> Callable[[Database], Awaitable[object]]:
    return lambda database: list_runs(database, RunFilter("big", **wanted), SOME_FIELDS, PART, order, searched)


# With how many blocks they may read. Lists are of what is narrow: of a whole organization they count all that there is. Some
# read all of the organization's index while nothing is known of the table, but no rows.
ACTIONS: dict[str, tuple[int, Callable[[Database], Awaitable[object]]]] = {
    "runs of a session": (400, _runs(session_id=an_id("waiting", 101))),
    "runs for a machine": (1_100, _runs(machine_id=an_id("machine", 10_002))),
    "running runs for a machine": (600, _runs(machine_id=an_id("machine", 2_008), status=RunStatus.RUNNING)),
    "waiting runs for a machine": (600, _runs(machine_id=an_id("machine", 2_007), status=RunStatus.SCHEDULING)),
    "runs by change, in a window of time": (1_000, _runs("changed", changed_from=A_WHILE_AGO)),
    "failed runs by change, in a window of time": (
        1_000,
        _runs("changed", status=RunStatus.ERROR, changed_from=A_WHILE_AGO),
    ),
    "runs by change, of a workflow": (60_000, _runs("changed", workflow_id=an_id("workflow", 1))),
    "runs by creation, changed in a window of time": (1_000, _runs(changed_from=A_WHILE_AGO)),
    "a search in runs": (66_000, _runs(searched=Search("nobody has this"))),  # 10,001 runs, and the outputs of each
    # None that runs has ended: beside what begins with it, no run is looked at.
    "a search for the beginning of an id": (
        100,
        _runs(searched=Search(str(ENDED)[:8]), status=RunStatus.RUNNING, ended_from=LONG_AGO),
    ),
    "runs of a workflow": (100, _runs(workflow_id=an_id("workflow", 101))),
    "runs of another machine's key": (500, _runs(bound_to=an_id("machine", 15_001))),
    "files of a run": (400, lambda database: list_attachments(database, NOBODY_BOUND, ENDED, None, PART)),
    "a workflow of a machine's key": (5_500, lambda database: get_seen(database, BOUND, an_id("workflow", 1))),
    "deliveries": (400, lambda database: list_deliveries(database, "big", an_id("endpoint", 3), None, PART)),
    "a pass over few machines": (1_000, lambda database: place(database, "few")),
}


class Actions:
    """They are done with a connection of their own, once before its tables are filled and once after."""

    def __init__(self, stack: Stack, database: Database, how: str) -> None:
        self._stack = stack
        self._database = database
        self._how = how

    @classmethod
    async def begin(cls, stack: Stack, mode: str, how: str) -> "Actions":
        database = database_of(stack)
        async with database.connection() as connection:
            await connection.driver.execute(f"SET plan_cache_mode = {mode}")
        actions = cls(stack, database, how)
        await asyncio.to_thread(actions.wait_for_machines)
        for _, act in ACTIONS.values():
            with suppress(Refusal):  # there is no such endpoint yet
                await act(database)
        return actions

    def wait_for_machines(self) -> None:
        """Three runs of an organization that has two machines."""
        for insert in (
            "INSERT INTO workflows (id, organization_id, main_prompt)"
            " VALUES (md5('few')::uuid, 'few', 'x') ON CONFLICT DO NOTHING",
            "INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id)"
            " SELECT gen_random_uuid(), 'few', 'x', 'x' FROM generate_series(1, 2)",
            "INSERT INTO runs (id, organization_id, workflow_id, status, lane)"
            " SELECT gen_random_uuid(), 'few', md5('few')::uuid, 'scheduling', 'any' FROM generate_series(1, 3)",
        ):
            self._stack.sql(insert)

    async def end(self) -> list[str]:
        """Which of them read too much; the last look."""
        wrong = await self.measure()
        self._database.close()
        return wrong

    async def measure(self, names: Collection[str] = ACTIONS.keys()) -> list[str]:
        """Which of them read too much."""
        await asyncio.to_thread(self.wait_for_machines)
        wrong = []
        for name in names:
            most, act = ACTIONS[name]
            before = await self._read()
            done = await act(self._database)
            after = await self._read()
            blocks = {where: count - before[where] for where, count in after.items() if count > before[where]}
            if sum(blocks.values()) > most:
                wrong.append(told(name, self._how, blocks, ""))
            if isinstance(done, Pass) and len(done.placed) != 2:
                wrong.append(f"{name}: {done}")
        return wrong

    async def _read(self) -> dict[str, int]:
        """How many blocks have been read of each table and index."""
        async with self._database.connection() as connection:
            await connection.driver.fetch("SELECT pg_stat_force_next_flush()")
            return {row["name"]: row["blocks"] for row in await connection.driver.fetch(_READ)}


_READ = """
SELECT relname AS name, pg_stat_get_blocks_fetched(oid) AS blocks FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')
"""

_PLANNED_FOR_VALUES = """
SELECT DISTINCT split_part(statement, ' ', 2) AS name FROM pg_prepared_statements WHERE custom_plans > 0
"""
CALLS = 8  # of what sees values: after five of them PostgreSQL decides whether it goes on planning for them

# How a plan was made.
BEFORE, OLD, FRESH = "made before", "made from old statistics", "made from fresh statistics"

# --- measuring --------------------------------------------------------------------------------------------------------


class Planner:
    """A connection as the service makes it, or its owner, with the plans that it keeps."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.prepared: dict[str, Any] = {}

    async def prepare(self, statement: Statement) -> str:
        """Prepare it as asyncpg does, and have a plan made that is kept; that plan."""
        self.prepared[statement.name] = prepared = await self.driver.prepare(statement.sql)
        return await self.plan(statement, prepared.get_name())

    async def plan(self, statement: Statement, name: str | None = None) -> str:
        """The plan as it is now."""
        name = name or self.prepared[statement.name].get_name()
        values = f"({', '.join(['NULL'] * len(statement.parameters))})" if statement.parameters else ""
        async with self.rolled_back(statement.name):
            rows = await self.driver.fetch(f"EXPLAIN EXECUTE {name}{values}")
        return "\n".join(row["QUERY PLAN"] for row in rows)

    async def samples_of(self, statement: Statement) -> dict[str, Any]:
        """A value for each parameter. Raises KeyError for one without."""
        given = SAMPLES | OWN.get(statement.name, {})
        if statement.name in ("runs.retry.switch", "runs.retry.switch_staged"):
            version = "SELECT xmin::text FROM runs WHERE id = $1"
            given["versions"] = [await self.driver.fetchval(version, run_id) for run_id in given["run_ids"]]
        return {name: given[name] for name in statement.parameters}

    async def blocks(self, statement: Statement, values: dict[str, Any]) -> tuple[dict[str, int], str]:
        """What it reads of each table and index, and what the server says that it did."""
        prepared = self.prepared[statement.name]
        async with self.rolled_back(statement.name):
            before = await self._counted()
            await prepared.fetch(*statement.arguments(values))
            await self.driver.execute("SET CONSTRAINTS ALL IMMEDIATE")
            after = await self._counted()
        return {
            name: count - before[name] for name, count in after.items() if count > before[name]
        }, prepared.get_statusmsg()

    @asynccontextmanager
    async def rolled_back(self, name: str) -> AsyncIterator[None]:
        transaction = self.driver.transaction()
        await transaction.start()
        try:
            if name in FIRST:
                await self.driver.execute(FIRST[name].sql)
            yield
        finally:
            await transaction.rollback()

    async def _counted(self) -> dict[str, int]:
        return {row["name"]: row["blocks"] for row in await self.driver.fetch(_COUNTED)}


_COUNTED = """
SELECT relname AS name, pg_stat_get_xact_blocks_fetched(oid) AS blocks FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')
"""


@asynccontextmanager
async def planner(stack: Stack, *, owner: bool, mode: str) -> AsyncIterator[Planner]:
    if owner:
        settings = role_settings(3.0) | {"plan_cache_mode": mode}
        driver = await asyncpg.connect(stack.url, timeout=10, server_settings=settings)
        try:
            yield Planner(driver)
        finally:
            driver.terminate()
        return
    database = database_of(stack)
    try:
        async with database.connection() as connection:
            await connection.driver.execute(f"SET plan_cache_mode = {mode}")
            yield Planner(connection.driver)
    finally:
        database.close()


def database_of(stack: Stack) -> Database:
    url = SecretStr(stack.postgres.as_app(stack.url))
    return Database(Settings.model_construct(database_url=url, database_pool_size=1))


def told(name: str, how: str, blocks: dict[str, int], plan: str) -> str:
    ordered = ", ".join(f"{count} of {where}" for where, count in sorted(blocks.items(), key=lambda one: -one[1])[:6])
    return f"{name}, with a plan {how}, reads {sum(blocks.values())} blocks: {ordered}\n{plan}\n"


async def attack(stack: Stack, first: int) -> list[str]:
    """What reads too much, finds nothing with its sample, or has none; each with its plan."""
    wrong: list[str] = []
    kept_actions = await Actions.begin(stack, "force_generic_plan", BEFORE)
    async with (
        planner(stack, owner=False, mode="force_generic_plan") as app_kept,
        planner(stack, owner=True, mode="force_generic_plan") as owner_kept,
        planner(stack, owner=False, mode="force_custom_plan") as app_new,
        planner(stack, owner=True, mode="force_custom_plan") as owner_new,
    ):
        await app_kept.prepare(CONTROL)
        plans: dict[str, str] = {}
        for name, statement in REGISTRY.items():
            plans[name] = await (owner_kept if name.startswith(OWNERS) else app_kept).prepare(statement)
        await asyncio.to_thread(fill, stack, first)
        blocks, _ = await app_kept.blocks(CONTROL, await app_kept.samples_of(CONTROL))
        assert first > 1 or sum(blocks.values()) > MOST_BLOCKS, "what must be found is not"
        for name, statement in REGISTRY.items():
            is_owners = name.startswith(OWNERS)
            kept, new = (owner_kept, owner_new) if is_owners else (app_kept, app_new)
            try:
                values = await kept.samples_of(statement)
            except KeyError as missing:
                wrong.append(f"{name} needs a sample for {missing}")
                continue
            await new.prepare(statement)
            for planned, how in ((kept, BEFORE), (new, OLD)):
                try:
                    blocks, did = await planned.blocks(statement, values)
                except asyncpg.PostgresError as error:
                    wrong.append(f"{name} fails with its sample: {error!r}")
                    continue
                if sum(blocks.values()) > MORE.get(name, (MOST_BLOCKS,))[0]:
                    wrong.append(told(name, how, blocks, await planned.plan(statement)))
                if did.endswith(" 0"):
                    wrong.append(f"{name} finds nothing with its sample: {did}")
            if await kept.plan(statement) != plans[name]:
                wrong.append(f"{name}: its plan was not kept")
    new_actions = await Actions.begin(stack, "force_custom_plan", OLD)
    return wrong + await kept_actions.end() + await new_actions.end()


async def call_often(stack: Stack) -> list[str]:
    """What reads too much with a plan from fresh statistics, or is planned for the values of each call."""
    wrong: list[str] = []
    database = database_of(stack)
    actions = Actions(stack, database, FRESH)
    async with database.connection() as connection:
        planner = Planner(connection.driver)
        for name, statement in REGISTRY.items():
            if name.startswith(OWNERS):
                continue
            values = await planner.samples_of(statement)
            await planner.prepare(statement)
            for _ in range(2):  # the first also reads the visibility map, of whose pages it takes back what VACUUM said
                blocks, _ = await planner.blocks(statement, values)
            if sum(blocks.values()) > MORE.get(name, (MOST_BLOCKS,))[0]:
                wrong.append(told(name, FRESH, blocks, await planner.plan(statement)))
    wrong += await actions.measure()
    for _ in range(CALLS):
        slow = await actions.measure(ACTIONS_THAT_SEE_VALUES)
    async with database.connection() as connection:
        planned = {row["name"] for row in await connection.driver.fetch(_PLANNED_FOR_VALUES)}
    database.close()
    if planned != SEES_VALUES.keys():
        wrong.append(f"planned for the values of a call: {sorted(planned)}, and must be: {sorted(SEES_VALUES)}")
    return wrong + slow


@pytest.fixture
def own(stack: Stack) -> Iterator[Stack]:
    """A migrated database that nobody analyzes."""
    with own_database(stack, "plans") as own:
        for row in own.sql(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        ):
            own.sql(f"ALTER TABLE {row['relname']} SET (autovacuum_enabled = false)")
        yield own


@pytest.mark.parametrize("known", ["empty", "short"])
def test_no_statement_reads_more_than_it_needs(own: Stack, known: str) -> None:
    first = 1
    if known == "short":
        fill(own, 1, ended=True)
        first = SHORT + 1
    own.sql("VACUUM ANALYZE" if known == "empty" else "ANALYZE")
    wrong = asyncio.run(attack(own, first))
    if known == "short":
        own.sql("VACUUM ANALYZE")
        wrong += asyncio.run(call_often(own))
    assert not wrong, "\n".join(wrong)
