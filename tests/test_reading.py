"""GET of one run: some of its keys, its history in pages, and 304 for what the caller has already."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from tests.support.client import Client
from tests.support.scheduling import assigned
from tests.support.stack import Stack

BASE = {"id", "workflow_id", "machine_id", "status", "created_at"}


def with_history(api: Client, *messages: dict[str, Any]) -> str:
    run: str = api.run()["id"]
    api.report(run, status="running")
    api.report(run, run_message_history=list(messages))
    return run


def page(api: Client, run: str, expected: int = 200, /, **query: Any) -> dict[str, Any]:
    found: dict[str, Any] = api.json_of(api.get(f"/v1/runs/{run}/history", params=query), expected)
    return found


# --- fields -----------------------------------------------------------------------------------------------------------


def test_only_the_keys_that_are_asked_for(api: Client) -> None:
    run = with_history(api, {"role": "user", "content": "Hello."})
    whole = api.get_run(run)
    for names in (
        "attempt",
        "error,output_attachment_ids",
        "run_message_history",
        "scheduling_reason, input_values",
        "",
    ):
        shown = api.json_of(api.get(f"/v1/runs/{run}", params={"fields": names}))
        wanted = BASE | ({name.strip() for name in names.split(",")} - {""})
        assert shown == {name: whole[name] for name in wanted}, names
    repeated = api.json_of(api.get(f"/v1/runs/{run}?fields=attempt&fields=error"))
    assert repeated.keys() == BASE | {"attempt", "error"}
    assert api.get(f"/v1/runs/{run}", params={"fields": "secret_path"}).status_code == 422


def test_fields_of_a_foreign_run(api: Client, foreign: Client) -> None:
    run = with_history(api, {"role": "user"})
    for path in (f"/v1/runs/{run}?fields=attempt", f"/v1/runs/{run}/history"):
        for caller, other in ((foreign, path), (api, path.replace(run, str(uuid4())))):
            assert caller.get(other).json()["code"] == "run_not_found"


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_in_pages(api: Client) -> None:
    messages = [{"n": n, "content": "x" * 10} for n in range(7)]
    run = with_history(api, *messages)
    first = page(api, run, limit=3)
    assert first == {"items": messages[:3], "attempt": 1, "total": 7, "limit": 3, "next": 3}
    assert page(api, run, limit=3, after=3)["items"] == messages[3:6]
    assert page(api, run, limit=3, after=6) == {
        "items": messages[6:],
        "attempt": 1,
        "total": 7,
        "limit": 3,
        "next": None,
    }
    assert page(api, run, after=7)["items"] == page(api, run, after=2**31 - 1)["items"] == []
    for wrong in ({"after": -1}, {"limit": 0}, {"limit": 1001}, {"after": 2**31}):
        page(api, run, 422, **wrong)


def test_a_page_is_bounded_by_bytes_and_has_a_message_however_long(api: Client) -> None:
    long, longer = {"image": "a" * 600_000}, {"image": "b" * 2_000_000}
    run = with_history(api, long, long, longer, long)
    sizes, after = [], 0
    while True:
        found = page(api, run, after=after)
        sizes.append(len(found["items"]))
        if found["next"] is None:
            break
        after = found["next"]
    assert sizes == [1, 1, 1, 1]
    assert page(api, run, after=2)["items"] == [longer]


def test_numbers_of_a_history_are_as_they_were_sent(api: Client) -> None:
    run = with_history(api, {"n": 12345678901234567})
    assert b'{"n":12345678901234567}' in api.get(f"/v1/runs/{run}/history").content.replace(b" ", b"")


def test_a_page_says_which_attempt_it_is_of(api: Client) -> None:
    run = with_history(api, {"n": 1}, {"n": 2})
    assert page(api, run, limit=1)["attempt"] == 1
    api.report(run, status="error")
    api.json_of(api.retry(run))
    assert page(api, run) == {"items": [], "attempt": 2, "total": 0, "limit": 100, "next": None}


def test_a_bound_key_reads_only_the_history_of_its_machine(api: Client, stack: Stack) -> None:
    machine = api.machine()
    run = api.run()["id"]
    assigned(api, run)
    api.report(run, status="running", run_message_history=[{"n": 1}])
    for own, status in ((machine, 200), (api.machine(), 404)):
        key = stack.new_key(api.organization, scopes=["runs:read", "runs:execute"], machine_id=own)
        assert api.get(f"/v1/runs/{run}/history", headers={"Authorization": f"Bearer {key}"}).status_code == status


# --- ETag -------------------------------------------------------------------------------------------------------------


def tag(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    assert reply.headers["etag"].startswith('W/"')
    assert reply.headers["cache-control"] == "no-store"
    return str(reply.headers["etag"])


def test_what_has_not_changed_is_not_sent_again(api: Client) -> None:
    run = with_history(api, {"image": "a" * 100_000})
    for query in ("", "?fields=attempt", "?fields=run_message_history"):
        path = f"/v1/runs/{run}{query}"
        known = tag(api.get(path))
        for given in (known, f'"other", {known}', known.removeprefix("W/")):
            again = api.get(path, headers={"If-None-Match": given})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", known)
            assert again.headers["cache-control"] == "no-store"
        for given in ('"other"', "*", "nothing", ""):
            assert tag(api.get(path, headers={"If-None-Match": given})) == known
    tags = {tag(api.get(f"/v1/runs/{run}{query}")) for query in ("", "?fields=attempt", "?fields=error", "?fields=")}
    assert len(tags) == 4


CHANGES: dict[str, Callable[[Client, Stack, str], object]] = {
    "history": lambda api, _, run: api.report(run, run_message_history=[{"n": 2}]),
    "output": lambda api, _, run: api.report(run, output_data={"n": 2}),
    "end": lambda api, _, run: api.report(run, status="error", error=["Broken."]),
    "upload": lambda api, _, run: api.json_of(
        api.post(
            "/v1/run-attachments",
            json={"run_id": run, "filename": "a", "content": "", "content_type": "a/b", "attachment_type": "output"},
        ),
        201,
    ),
    "values": lambda api, _, run: api.report(run, input_values={"user": "Bob"}),
    "usage": lambda api, _, run: api.report(run, usage_metadata={"tokens": 2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_changes_the_tag(api: Client, stack: Stack, change: str) -> None:
    run = with_history(api, {"n": 1})
    before = api.get(f"/v1/runs/{run}")
    CHANGES[change](api, stack, run)
    after = api.get(f"/v1/runs/{run}", headers={"If-None-Match": tag(before)})
    assert tag(after) != tag(before)
    assert after.json() != before.json()


def test_what_is_computed_on_reading_is_in_the_tag(api: Client, stack: Stack) -> None:
    """A machine joins a pool, an output expires: neither changes the run's row."""
    machine = api.machine()
    assert api.patch(f"/v1/machines/{machine}", json={"is_available": False}).is_success
    pool = api.json_of(api.post("/v1/pools", json={"name": "desks"}), 201)["id"]
    other = api.run(pool_ids=[pool])["id"]
    none = api.get(f"/v1/runs/{other}")
    assert none.json()["scheduling_reason"] == "no_machine_in_pools"
    api.json_of(api.post(f"/v1/pools/{pool}/machines", json={"machine_ids": [machine]}))
    some = api.get(f"/v1/runs/{other}", headers={"If-None-Match": tag(none)})
    assert some.json()["scheduling_reason"] == "waiting_for_machine"

    running = with_history(api, {"n": 1})
    CHANGES["upload"](api, stack, running)
    before = api.get(f"/v1/runs/{running}")
    [output] = before.json()["output_attachment_ids"]
    later = datetime.now(UTC) - timedelta(minutes=1)
    stack.sql("UPDATE run_attachments SET expires_at = $1 WHERE id = $2", later, UUID(output))
    after = api.get(f"/v1/runs/{running}", headers={"If-None-Match": tag(before)})
    assert after.json()["output_attachment_ids"] == []
