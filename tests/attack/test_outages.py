"""Services frozen, killed and unusable: 503 in bounded time, nothing changed, and back to work without a restart."""

import asyncio
import statistics
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.support.client import Client, file_input
from tests.support.concurrent_requests import Answer, Call, finished_runs, send_at_once, tally, worst
from tests.support.faults import FaultyServer, Plan, collect_until_empty, fail_with_everything, lose_answer, wait_for
from tests.support.outages import FILES, OUTAGES, PLAIN, SECRETS, is_ready, ready
from tests.support.server import Server, start_server
from tests.support.stack import Stack, settings_of
from tests.support.stored_state import assert_exactly_named, assert_nothing_lost, attempts, read_stored_state
from tests.support.waiting import until

AT_ONCE = 64


@pytest.fixture(scope="module")
def server(broken: Stack) -> Iterator[Server]:
    """One server goes through all of it: it is never restarted."""
    started = start_server(broken)
    yield started
    started.app.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


def retries(run_ids: list[str], body: dict[str, object]) -> list[Call]:
    return [Call("POST", f"/v1/runs/{run_id}/retry", body, f"key-{run_id}") for run_id in run_ids]


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_under_load(broken: Stack, server: Server, client: Client, name: str) -> None:
    outage = OUTAGES[name]
    run_ids = finished_runs(client, AT_ONCE, sensitive_input_values={"password": "old"}, file_inputs=[file_input()])
    before = read_stored_state(broken, client.organization)
    outage.begin(broken)
    try:
        answers = send_at_once(client, retries(run_ids, outage.body))
        # An answer of a store is shared for a second.
        health = until(lambda: (found := ready(server))[0] == 503 and found, what="the readiness that says so")
        assert httpx.get(f"{server.url}/health/live", timeout=2, trust_env=False, verify=False).status_code == 200
    finally:
        outage.end(broken)
    print(f"{name}: {tally(answers)}, worst {worst(answers):.1f} s")
    assert tally(answers) == {f"503 {outage.part}_unavailable": AT_ONCE}
    assert all(answer.headers["Retry-After"].isdigit() for answer in answers)
    assert worst(answers) < 10
    assert health == (503, [outage.part])
    assert read_stored_state(broken, client.organization) == before

    until(lambda: is_ready(server), what="recovery without a restart")
    assert_nothing_lost(broken, client.organization)
    answers = send_at_once(client, retries(run_ids, outage.body))
    assert tally(answers) == {"200": AT_ONCE}, tally(answers)
    assert_exactly_named(broken, client.organization)


@pytest.mark.parametrize("name", ["vault killed", "database frozen", "database killed", "storage missing"])
def test_an_outage_in_the_middle_of_load(broken: Stack, server: Server, client: Client, name: str) -> None:
    """Answered 200: it has happened. Refused: it has not. Unknown: a resend with the same key tells."""
    outage = OUTAGES[name]
    run_ids = finished_runs(client, AT_ONCE, sensitive_input_values={"password": "old"}, file_inputs=[file_input()])
    begin = threading.Timer(0.15, outage.begin, [broken])
    begin.start()
    try:
        answers = send_at_once(client, retries(run_ids, SECRETS | FILES))
        begin.join()
    finally:
        outage.end(broken)
    print(f"{name}: {tally(answers)}, worst {worst(answers):.1f} s")
    assert set(tally(answers)) <= {"200", f"503 {outage.part}_unavailable"}
    assert worst(answers) < 10
    until(lambda: is_ready(server), what="recovery without a restart")
    for run_id, answer in zip(run_ids, answers, strict=True):
        if answer.status == 200 or "may have taken effect" not in answer.detail:
            assert attempts(client, run_id) == (answer.status == 200), answer
    assert_nothing_lost(broken, client.organization)

    resent = send_at_once(client, retries(run_ids, SECRETS | FILES))
    assert tally(resent) == {"200": AT_ONCE}
    for first, second in zip(answers, resent, strict=True):
        assert first.status != 200 or first.content == second.content, "not the first reply"
    assert {attempts(client, run_id) for run_id in run_ids} == {1}
    assert_exactly_named(broken, client.organization)


def test_a_frozen_vault_does_not_slow_what_needs_no_vault(broken: Stack, client: Client) -> None:
    secret = finished_runs(client, AT_ONCE, sensitive_input_values={"password": "old"})
    plain = finished_runs(client, 80)

    def latency(run_ids: list[str]) -> list[float]:
        answers = [send_at_once(client, retries([run_id], PLAIN))[0] for run_id in run_ids]
        assert tally(answers) == {"200": len(run_ids)}
        return [answer.seconds for answer in answers]

    calm = latency(plain[:40])
    broken.bao.freeze()
    try:
        answers: list[Answer] = []
        load = threading.Thread(target=lambda: answers.extend(send_at_once(client, retries(secret, SECRETS))))
        load.start()
        frozen = latency(plain[40:])
        load.join()
    finally:
        broken.bao.thaw()
    assert tally(answers) == {"503 vault_unavailable": AT_ONCE}
    print(f"p50 {statistics.median(calm) * 1000:.0f} ms, with Vault frozen {statistics.median(frozen) * 1000:.0f} ms")
    assert max(frozen) < 1.5, "it waited for Vault"
    assert statistics.median(frozen) < 5 * statistics.median(calm) + 0.05


def _send(client: Client, call: Call) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.extend(send_at_once(client, [call])))
    thread.start()
    return thread, answers


# The point at which PostgreSQL dies under a retry with a secret and a file, and what the caller is told. The last three are
# passed by one that has waited for its run, in a transaction.
DEATHS = {
    "deletions.stage before#1": "nothing was changed",  # it only lists names
    "deletions.stage after#1": "nothing was changed",
    "runs.retry.switch_staged before#1": "may have taken effect",
    "runs.retry.switch_staged sent#1": "may have taken effect",  # if the answer did not come first
    "deletions.hold after#1": "nothing was changed",
    "COMMIT before#1": "may have taken effect",
    "COMMIT sent#1": "may have taken effect",
}
COMMITS = {"runs.retry.switch_staged sent#1", "COMMIT sent#1"}


@pytest.mark.parametrize("point", DEATHS)
def test_postgresql_killed_in_a_transaction(broken: Stack, tmp_path: Path, point: str) -> None:
    gate = tmp_path / "gate"
    with FaultyServer(broken, Plan(point, partial(wait_for, gate))) as server, server.client() as client:
        run_id = client.finished("error", sensitive_input_values={"password": "old"}, file_inputs=[file_input()])["id"]
        before = read_stored_state(broken, client.organization)
        [call] = retries([run_id], SECRETS | FILES)
        server.arm()
        with ExitStack() as held:
            if point in list(DEATHS)[-3:]:
                held.enter_context(broken.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run_id))
            thread, answers = _send(client, call)
            if point in list(DEATHS)[-3:]:
                until(broken.waiting, what="the wait for the run")
        until((tmp_path / "gate.reached").exists, what=point)
        broken.postgres.kill()
        gate.touch()
        thread.join()
        broken.postgres.start()
        [answer] = answers
        now = read_stored_state(broken, client.organization)
        happened = (now.run["attempt"], now.run["secrets"]) == (2, {"password": "new"})
        if answer.status == 200:
            assert point in COMMITS
            assert happened
        else:
            assert (answer.status, answer.code) == (503, "database_unavailable")
            assert DEATHS[point] in answer.detail
            assert now == before or (happened and point in COMMITS)
        assert_nothing_lost(broken, client.organization)
        until(lambda: is_ready(server), what="recovery without a restart")
        [answer] = send_at_once(client, [call])
        assert answer.status == 200, answer
        assert attempts(client, run_id) == 1
        assert_exactly_named(broken, client.organization)


def test_the_answer_to_commit_is_lost(broken: Stack) -> None:
    with (
        FaultyServer(broken, Plan("runs.retry.switch_staged after#1", lose_answer)) as server,
        server.client() as client,
    ):
        run_id = client.finished("error", sensitive_input_values={"password": "old"}, file_inputs=[file_input()])["id"]
        [call] = retries([run_id], SECRETS | FILES)
        server.arm()
        [answer] = send_at_once(client, [call])
        assert (answer.status, answer.code) == (503, "database_unavailable")
        assert "may have taken effect" in answer.detail
        assert answer.headers["Retry-After"]
        [resent] = send_at_once(client, [call])
        assert (resent.status, resent.headers["Idempotency-Status"]) == (200, "replayed")
        assert attempts(client, run_id) == 1
        assert_exactly_named(broken, client.organization)


def test_a_defect_in_the_middle_of_a_statement(broken: Stack) -> None:
    """It is told as what it is, and nobody else gets the connection on which the statement is still under way."""
    plan = Plan("runs.retry.switch sent#1", fail_with_everything)
    with FaultyServer(broken, plan) as server, server.client() as client:
        run_id = client.finished("error")["id"]
        [call] = retries([run_id], PLAIN)
        server.arm()
        with broken.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run_id):
            [failed] = send_at_once(client, [call])
            assert (failed.status, failed.code) == (500, "internal_error")
            assert [client.get(f"/v1/runs/{run_id}").status_code for _ in range(3)] == [200] * 3
            assert "unavailable" not in server.log()  # nor the background
        [answer] = send_at_once(client, [call])
        assert answer.status == 200
        assert attempts(client, run_id) == 1


def _condemned(stack: Stack, organization: str) -> int:
    """How many names of the organization a collector has begun with."""
    query = "SELECT 1 FROM deletions WHERE condemned_at IS NOT NULL AND name LIKE $1"
    return len(stack.sql(query, f"%{organization}/%"))


def _collected(stack: Stack, organization: str) -> bool:
    """Whether the collector, given the chance, has begun with a name of the organization."""
    asyncio.run(collect_until_empty(settings_of(stack), 0))
    return _condemned(stack, organization) > 0


# "before": the write comes after the delete. That is why a staged name is deleted twice.
@pytest.mark.parametrize(
    "point",
    ["vault write before#1", "vault write after#1", "put before#1", "put after#1", "runs.retry.switch_staged before#1"],
)
def test_a_stage_stalled_beyond_the_grace_time(broken: Stack, tmp_path: Path, point: str) -> None:
    gate = tmp_path / "gate"
    plan = Plan(point, partial(wait_for, gate))
    with FaultyServer(broken, plan, STAGE_GRACE_SECONDS=1) as server, server.client() as client:
        run_id = client.finished("error", sensitive_input_values={"password": "old"}, file_inputs=[file_input()])["id"]
        assert not _collected(broken, client.organization)
        before = read_stored_state(broken, client.organization)
        [call] = retries([run_id], SECRETS | FILES)
        server.arm()
        thread, answers = _send(client, call)
        until((tmp_path / "gate.reached").exists, what=point)
        until(lambda: _collected(broken, client.organization), what="condemning")
        gate.touch()
        thread.join()
        [answer] = answers
        # A put that finds its folder collected is refused by the file store, all others by the list.
        assert (answer.status, answer.code) in ((503, "vault_unavailable"), (503, "storage_unavailable")), answer
        assert read_stored_state(broken, client.organization) == before
        assert_nothing_lost(broken, client.organization)
        [answer] = send_at_once(client, [call])
        assert answer.status == 200
        assert_nothing_lost(broken, client.organization)
        assert_exactly_named(broken, client.organization)


def test_a_vault_frozen_beyond_the_grace_time(broken: Stack) -> None:
    """The write waits in Vault's own queue, and so does the delete: whichever comes first, nothing is lost or left."""
    started = start_server(broken, STAGE_GRACE_SECONDS=1)
    try:
        with started.client() as client:
            run_ids = finished_runs(client, 8, sensitive_input_values={"password": "old"})
            before = read_stored_state(broken, client.organization)
            broken.bao.freeze()
            try:
                answers: list[Answer] = []
                thread = threading.Thread(
                    target=lambda: answers.extend(send_at_once(client, retries(run_ids, SECRETS)))
                )
                thread.start()
                until(lambda: _condemned(broken, client.organization) == len(run_ids))
            finally:
                broken.bao.thaw()
            thread.join()
            assert tally(answers) == {"503 vault_unavailable": len(run_ids)}
            assert read_stored_state(broken, client.organization) == before
            assert_nothing_lost(broken, client.organization)
            assert tally(send_at_once(client, retries(run_ids, SECRETS))) == {"200": len(run_ids)}
            assert_exactly_named(broken, client.organization)
    finally:
        started.app.stop()
