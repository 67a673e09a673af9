"""When a key was last used: written outside of requests, seldom, and by every process that answers."""

import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from app.access.auth import digest
from app.write_behind.key_usage import MOST_KEYS, KeysUsed
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import until


@pytest.fixture(scope="module")
def answering(stack: Stack) -> Iterator[Server]:
    """A replica that leaves what follows a commit to others."""
    started = start_server(stack, BACKGROUND="none")
    yield started
    started.app.stop()


def row(stack: Stack, key: str) -> dict[str, Any]:
    [found] = stack.sql("SELECT id, last_used_at, xmin::text FROM api_keys WHERE key_hash = $1", digest(key.encode()))
    return found


def last_used(stack: Stack, key: str) -> Any:
    return row(stack, key)["last_used_at"]


def use(server: Server, key: str) -> None:
    with server.client("last-used", key=key) as api:
        assert api.get("/v1/whoami").status_code == 200


def test_a_key_that_is_used_says_when(server: Server, stack: Stack) -> None:
    used, unused = stack.new_key("last-used"), stack.new_key("last-used")
    use(server, used)
    when = until(lambda: last_used(stack, used))
    assert abs(datetime.now(UTC) - when) < timedelta(seconds=20)
    assert last_used(stack, unused) is None


def test_it_is_written_once_a_minute_by_all_replicas_together(server: Server, answering: Server, stack: Stack) -> None:
    key, other = stack.new_key("last-used"), stack.new_key("last-used")
    use(server, key)
    until(lambda: last_used(stack, key))
    before = row(stack, key)
    for _ in range(10):
        use(server, key)
        use(answering, key)
    use(answering, other)
    until(lambda: last_used(stack, other))  # so that replica has had its round
    assert row(stack, key) == before


def test_it_is_written_again_after_a_minute(answering: Server, stack: Stack) -> None:
    key = stack.new_key("last-used")
    stack.sql("UPDATE api_keys SET last_used_at = now() - interval '61 s' WHERE id = $1", row(stack, key)["id"])
    before = last_used(stack, key)
    use(answering, key)
    assert until(lambda: last_used(stack, key) > before)


def test_a_row_that_is_held_makes_nobody_wait(server: Server, stack: Stack) -> None:
    held, free = stack.new_key("last-used"), stack.new_key("last-used")
    with stack.held("SELECT FROM api_keys WHERE id = $1 FOR UPDATE", row(stack, held)["id"]):
        use(server, held)
        use(server, free)
        until(lambda: last_used(stack, free))
    assert last_used(stack, held) is None


def test_very_many_keys_take_little_memory() -> None:
    tracemalloc.start()
    used = KeysUsed()
    for _ in range(10 * MOST_KEYS):
        used.note(uuid4(), time.monotonic())
    assert tracemalloc.get_traced_memory()[0] < 600 * MOST_KEYS
    tracemalloc.stop()
