"""Killed at every step: the run is wholly before or wholly after, nothing is lost, a resend makes it right."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.support.client import Client, file_input
from tests.support.faults import FaultyServer, Plan, collect_as_process, die_while_writing
from tests.support.stack import Stack
from tests.support.stored_state import (
    DAY,
    SOAK,
    StoredState,
    assert_exactly_named,
    assert_nothing_lost,
    chance,
    gone,
    read_stored_state,
)
from tests.support.waiting import until

OLD, NEW = {"password": "old", "nested": {"a": 1}}, {"password": "new", "pin": 7}
STORED = {"password": "new", "pin": "7"}
OLD_FILES, NEW_FILES = [b"old one", b"old two"], [b"new one" * 40_000, b"new two" * 40_000]
INPUTS = [file_input(content, f"{index}.txt") for index, content in enumerate(NEW_FILES)]


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """A request, and how the organization looks when it has happened."""

    method: str
    path: str
    body: dict[str, Any] | None
    status: int
    happened: Callable[[StoredState], bool]

    def send(self, client: Client) -> httpx.Response:
        return client.request(self.method, self.path, json=self.body, headers={"Idempotency-Key": "the-key"})


def retry(client: Client, **options: object) -> WriteRequest:
    """With new secrets and files: one statement lists them, and one is the whole switch."""
    run_id = client.finished("error", sensitive_input_values=OLD, file_inputs=_files(OLD_FILES))["id"]

    def happened(now: StoredState) -> bool:
        run = now.run
        cleared = ("error", "output_data", "run_message_history", "started_at", "ended_at")
        return (
            (run["status"], run["attempt"], run["secrets"]) == ("scheduling", 2, STORED)
            and all(run[name] is None for name in cleared)
            and now.files("input") == sorted(NEW_FILES)
            and now.files("output") == []
            and [(row["attempt"], row["status"]) for row in now.attempts] == [(1, "error")]
        )

    body = {"sensitive_input_values": NEW, "file_inputs": INPUTS, **options}
    return WriteRequest("POST", f"/v1/runs/{run_id}/retry", body, 200, happened)


def pinned_retry(client: Client) -> WriteRequest:
    """The same with a target, which must still be there."""
    return retry(client, machine_id=client.machine(status="disconnected"))


def plain_retry(client: Client) -> WriteRequest:
    """Without secrets and input files: one statement is the whole switch, and commits by itself."""
    run_id = client.finished("error")["id"]

    def happened(now: StoredState) -> bool:
        run = now.run
        return (
            (run["status"], run["attempt"], run["error"], run["output_data"]) == ("scheduling", 2, None, None)
            and now.attachments == []
            and [(row["attempt"], row["status"]) for row in now.attempts] == [(1, "error")]
        )

    return WriteRequest("POST", f"/v1/runs/{run_id}/retry", {"input_values": {"a": 1}}, 200, happened)


def create(client: Client) -> WriteRequest:
    def happened(now: StoredState) -> bool:
        return (now.run["secrets"], now.files("input")) == (STORED, sorted(NEW_FILES))

    body = {"workflow_id": client.workflow(), "sensitive_input_values": NEW, "file_inputs": INPUTS}
    return WriteRequest("POST", "/v1/runs", body, 201, happened)


def upload(client: Client) -> WriteRequest:
    run_id = client.run(sensitive_input_values=OLD)["id"]
    client.report(run_id, status="running")

    def happened(now: StoredState) -> bool:
        return now.files("output") == [NEW_FILES[0]] and now.run["status"] == "running"

    body = INPUTS[0] | {"run_id": run_id, "content_type": "text/plain", "attachment_type": "output"}
    return WriteRequest("POST", "/v1/run-attachments", body, 201, happened)


def finish(client: Client) -> WriteRequest:
    run_id = client.run(sensitive_input_values=OLD, file_inputs=_files(OLD_FILES))["id"]
    client.report(run_id, status="running")

    def happened(now: StoredState) -> bool:
        return (now.run["status"], now.run["output_data"]) == ("success", '{"answer":42}')

    return WriteRequest(
        "PATCH", f"/v1/runs/{run_id}", {"status": "success", "output_data": {"answer": 42}}, 200, happened
    )


def delete(client: Client) -> WriteRequest:
    run_id = client.finished(sensitive_input_values=OLD, file_inputs=_files(OLD_FILES))["id"]

    def happened(now: StoredState) -> bool:
        return not (now.runs or now.attachments or now.attempts)

    return WriteRequest("DELETE", f"/v1/runs/{run_id}", None, 204, happened)


def _files(contents: list[bytes]) -> list[dict[str, object]]:
    return [file_input(content, f"{index}.txt") for index, content in enumerate(contents)]


def points_of(stack: Stack, scene: Callable[[Client], WriteRequest]) -> list[str]:
    """Every point that the request passes, in one order for all; parallel writes take turns as they like."""
    with FaultyServer(stack) as server, server.client() as client:
        write = scene(client)
        server.arm()
        assert write.send(client).status_code == write.status
        return sorted(server.points())


def crash(stack: Stack, scene: Callable[[Client], WriteRequest], plan: Plan, commit: str) -> StoredState:
    """Kill at the point, look, start again, resend, look again. Returns how it looked after the kill.

    `commit` is the statement that makes it happen: "COMMIT {}#2" is "COMMIT after#2" once it has been answered.
    """
    with FaultyServer(stack, plan) as server, server.client() as client:
        write = scene(client)
        before = read_stored_state(stack, client.organization)
        server.arm()
        answered = False
        with suppress(httpx.TransportError):
            answered = write.send(client).status_code == write.status
        until(lambda: server.died, what=f"the kill at {plan.point}")
        organization, authorization = client.organization, client.headers["Authorization"]
    until(lambda: gone(stack), what="the end of the dead service's transactions")

    after_kill = read_stored_state(stack, organization)
    happened = after_kill != before
    assert not happened or write.happened(after_kill), f"half done: {before} -> {after_kill}"
    committed = plan.point == commit.format("after")
    if answered or committed or (plan.point or "").startswith("http.response"):
        assert happened, "it was answered, or committed, and is not there"
    elif plan.point != commit.format("sent"):
        assert not happened, "it happened before its commit"
    assert_nothing_lost(stack, organization)

    with FaultyServer(stack) as server, server.client(organization, key=authorization.split()[1]) as client:
        reply = write.send(client)
        assert reply.status_code == write.status, reply.text
        assert ("Idempotency-Status" in reply.headers) == happened, "replayed only what had happened"
    now = read_stored_state(stack, organization)
    assert write.happened(now), f"the resend did not make it right: {now}"
    assert len(now.keys) == 1
    assert_exactly_named(stack, organization)
    collected = read_stored_state(stack, organization)
    for run in collected.runs:
        if run["status"] == "success":  # only the secrets of a finished run go with time
            run["secrets"] = now.run["secrets"]
    assert collected == now, "the collector took something of the run"
    return after_kill


def last_commit(every: list[str]) -> str:
    """The statement after which it has happened."""
    if commits := sum(point.startswith("COMMIT before") for point in every):
        return f"COMMIT {{}}#{commits}"
    [switch] = {"runs.retry.switch", "runs.retry.switch_staged"} & {point.partition(" ")[0] for point in every}
    return f"{switch} {{}}#1"


def crash_at(stack: Stack, scene: Callable[[Client], WriteRequest], points: list[str], every: list[str]) -> None:
    commit = last_commit(every)
    for point in points:
        try:
            crash(stack, scene, Plan(point), commit)
        except BaseException as failure:
            failure.add_note(f"killed at {point}")
            raise
    print(f"{scene.__name__}: {len(points)} of {len(every)} points")


SHARDS = 6


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_retry_killed_at_every_point(attacked: Stack, shard: int) -> None:
    every = points_of(attacked, retry)
    assert len(every) > 30
    assert not any(point.startswith("BEGIN") for point in every), "two statements commit by themselves"
    crash_at(attacked, retry, every[shard::SHARDS], every)


def test_a_plain_retry_killed_at_every_point(attacked: Stack) -> None:
    every = points_of(attacked, plain_retry)
    assert last_commit(every).format("sent") in every, "it takes one statement, without BEGIN and COMMIT"
    crash_at(attacked, plain_retry, every, every)


@pytest.mark.parametrize("scene", [pinned_retry, create, upload, finish, delete])
def test_other_writes_killed(attacked: Stack, scene: Callable[[Client], WriteRequest]) -> None:
    every = points_of(attacked, scene)
    # Those around the last commit always: there "before" becomes "after".
    around = {last_commit(every).format(when) for when in ("before", "sent", "after")}
    others = sorted(set(every) - around)
    chosen = others if SOAK else chance(scene.__name__).sample(others, 2)
    crash_at(attacked, scene, [*sorted(around), *chosen], every)


@pytest.mark.parametrize("scene", [retry, create, upload])
def test_killed_while_a_file_is_written(attacked: Stack, scene: Callable[[Client], WriteRequest]) -> None:
    half = len(NEW_FILES[0]) // 2
    folders = set(attacked.files.iterdir())
    crash(attacked, scene, Plan("put before#1", partial(die_while_writing, half)), "COMMIT {}#1")
    assert set(attacked.files.iterdir()) - folders, "the resend stored nothing"


def test_what_a_killed_put_leaves_is_collected(attacked: Stack) -> None:
    """The assumption behind the test above: a killed put does leave part of a file."""
    plan = Plan("put before#1", partial(die_while_writing, len(NEW_FILES[0]) // 2))
    with FaultyServer(attacked, plan) as server, server.client() as client:
        write = retry(client)
        server.arm()
        with pytest.raises(httpx.TransportError):
            write.send(client)
        organization = client.organization
    sizes = {(attacked.files / blob).stat().st_size for blob in attacked.blobs(organization)}
    assert len(NEW_FILES[0]) // 2 in sizes
    until(lambda: gone(attacked))
    assert_exactly_named(attacked, organization)


def collector_scene(stack: Stack) -> str:
    """An organization with all that a collector meets: what a retry replaced, what a killed one staged, half a file."""
    half = partial(die_while_writing, len(NEW_FILES[0]) // 2)
    with FaultyServer(stack) as server, server.client() as client:
        key = client.headers["Authorization"].split()[1]
        organization = client.organization
        # Nobody wakes this server's collector: its list is as the commits left it.
        run = retry(client)
        other = retry(client)
        client.finished(sensitive_input_values=OLD)
        assert client.delete(delete(client).path).status_code == 204
    for plan in (Plan("runs.retry.switch_staged before#1"), Plan("put before#2", half)):
        with FaultyServer(stack, plan) as server, server.client(organization, key=key) as client:
            server.arm()
            with pytest.raises(httpx.TransportError):
                run.send(client)
            until(lambda: server.died)
    # The last one retries for good and dies before its own collector can begin.
    with (
        FaultyServer(stack, Plan("runs.retry.switch_staged after#1")) as server,
        server.client(organization, key=key) as client,
    ):
        server.arm()
        with pytest.raises(httpx.TransportError):
            other.send(client)
    until(lambda: gone(stack))
    return organization


def test_a_collector_killed_at_its_points(attacked: Stack) -> None:
    collector_scene(attacked)
    every = collect_as_process(attacked, Plan(), ahead=3 * DAY)
    assert {"vault delete after#1", "delete after#1", "deletions.finish after#1"} <= set(every)
    assert any(point.startswith("rmdir") for point in every), "which delete empties the folder is a race"
    chosen = every if SOAK else chance("collector").sample(every, 4)
    for point in chosen:
        organization = collector_scene(attacked)
        before = read_stored_state(attacked, organization)
        active = [run for run in before.runs if run["status"] == "scheduling"]
        assert active
        collect_as_process(attacked, Plan(point), ahead=3 * DAY)
        until(lambda: gone(attacked))
        assert_nothing_lost(attacked, organization)
        assert_exactly_named(attacked, organization)
        now = read_stored_state(attacked, organization)
        assert [run for run in now.runs if run["status"] == "scheduling"] == active
        assert [row for row in now.attachments if row["run_id"] in _ids(active)] == [
            row for row in before.attachments if row["run_id"] in _ids(active)
        ]
    print(f"collector: {len(chosen)} of {len(every)} points")


def _ids(runs: list[dict[str, Any]]) -> set[UUID]:
    return {run["id"] for run in runs}
