"""Requests, replicas and collectors that meet on the same rows, on connections that commit.

Some orders are forced: a request stands still at a point of its way, holding its locks, while another comes. The rest is
thrown together at random. Whatever the order: no failure of ours, nothing lost, nothing half-done.
"""

import asyncio
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.scheduling.placement import place
from app.stores import deletions
from app.stores.database import Database
from app.stores.vault import VaultSecrets
from tests.support.client import Client, file_input
from tests.support.concurrent_requests import Answer, Call, finished_runs, send_at_once, tally
from tests.support.faults import FaultyServer, Plan, collect_until_empty, wait_for
from tests.support.scheduling import FORBIDDEN, Interrupted
from tests.support.server import Server, start_server
from tests.support.stack import Stack, settings_of
from tests.support.stored_state import (
    DAY,
    SOAK,
    assert_exactly_named,
    assert_nothing_lost,
    attempts,
    chance,
    collect_all,
    read_stored_state,
)
from tests.support.waiting import until

AT_ONCE = 50
ROUNDS = 2 + SOAK


@pytest.fixture(scope="module")
def replicas(attacked: Stack) -> Iterator[list[Server]]:
    """Two servers with all that they do by themselves: place, collect, tidy."""
    started = [start_server(attacked) for _ in range(2)]
    yield started
    for server in started:
        server.app.stop()


@pytest.fixture
def client(replicas: list[Server], attacked: Stack) -> Iterator[Client]:
    """After each test: the invariant, the states that placement must never make, and the end of all that is not named."""
    with replicas[0].client() as client:
        yield client
        assert_nothing_lost(attacked, client.organization)
        assert attacked.sql(FORBIDDEN) == []
        assert_exactly_named(attacked, client.organization)


@pytest.fixture
def at_once(replicas: list[Server], client: Client) -> Callable[[Sequence[Call]], list[Answer]]:
    """Send all at the same moment, to both servers in turn; none may fail."""

    def send(calls: Sequence[Call]) -> list[Answer]:
        answers = send_at_once(client, calls, urls=[server.url for server in replicas])
        assert max(answer.status for answer in answers) < 500, tally(answers)
        return answers

    return send


# --- orders that are forced -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stopped:
    """A request that stands still."""

    gate: Path
    answer: Future[Answer]

    def go(self) -> Answer:
        self.gate.touch()
        return self.answer.result()


@contextmanager
def stopped(
    stack: Stack, client: Client, call: Call, point: str, *, holding: str | None = None, **settings: object
) -> Iterator[Stopped]:
    """Send a request to a server of its own and let it stand still at the point until `go`.

    A retry of a run that is held waits for it in a transaction: `holding` is such a run, which is held until it waits.
    """
    gate = Path(tempfile.mkdtemp(prefix="gate-", dir=stack.folder)) / "gate"
    key = client.headers["Authorization"].split()[1]
    with (
        FaultyServer(stack, Plan(point, partial(wait_for, gate)), **settings) as server,
        server.client(client.organization, key=key) as own,
        ThreadPoolExecutor(1) as threads,
    ):
        server.arm()
        with ExitStack() as held:
            if holding is not None:
                held.enter_context(stack.held("SELECT 1 FROM runs WHERE id = $1 FOR NO KEY UPDATE", holding))
            answer = threads.submit(lambda: send_at_once(own, [call])[0])
            if holding is not None:
                waits(stack, answer)
        try:
            until(lambda: gate.with_name("gate.reached").exists() or answer.done(), what=point)
            assert not answer.done(), f"{point} was not passed: {answer.result()}"
            yield Stopped(gate, answer)
        finally:
            gate.touch()
        answer.result()


def send(client: Client, call: Call) -> Future[Answer]:
    future: Future[Answer] = Future()
    threading.Thread(target=lambda: future.set_result(send_at_once(client, [call])[0])).start()
    return future


def waits(stack: Stack, answer: Future[Answer]) -> None:
    """The request has come to a lock that somebody holds."""
    until(lambda: stack.waiting() or answer.done(), what="the wait for a lock")
    assert not answer.done(), f"it did not wait: {answer.result()}"


def in_order(stack: Stack, client: Client, first: Call, second: Call, point: str = "COMMIT before#1") -> list[str]:
    """`first` holds its locks and `second` waits for them, then both go on; returns what they were answered."""
    holding = first.path.split("/")[3] if first.path.endswith("/retry") else None
    with stopped(stack, client, first, point, holding=holding) as holder:
        late = send(client, second)
        waits(stack, late)
        answers = [holder.go(), late.result()]
    return [" ".join(tally([answer])) for answer in answers]


def retry(run_id: str, key: str | None = None, **options: object) -> Call:
    return Call("POST", f"/v1/runs/{run_id}/retry", options, key)


def report(run_id: str, **fields: object) -> Call:
    return Call("PATCH", f"/v1/runs/{run_id}", fields)


# --- N retries at once ------------------------------------------------------------------------------------------------

OLD: dict[str, Any] = {"sensitive_input_values": {"password": "old"}, "file_inputs": [file_input(b"old")]}
STAGES: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda _: {},
    "secrets": lambda number: {"sensitive_input_values": {"password": f"new {number}"}},
    "files": lambda number: {"file_inputs": [file_input(f"new {number}".encode())]},
    "both": lambda number: STAGES["secrets"](number) | STAGES["files"](number),
}


BARE: dict[str, Any] = {}  # its plain retry is one statement, decided on a plain read


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(("old", "stage"), [(BARE, "plain"), *((OLD, stage) for stage in STAGES)])
def test_of_many_retries_one_wins(
    attacked: Stack,
    client: Client,
    at_once: Callable[[Sequence[Call]], list[Answer]],
    old: dict[str, Any],
    stage: str,
    *,
    keyed: bool,
) -> None:
    run_id = client.finished(**old)["id"]
    for number in range(1, ROUNDS + 1):
        calls = [retry(run_id, uuid4().hex if keyed else None, **STAGES[stage](one)) for one in range(AT_ONCE)]
        answers = at_once(calls)
        assert tally(answers) == {"200": 1, "409 run_not_terminal": AT_ONCE - 1}
        assert not any("Idempotency-Status" in answer.headers for answer in answers)
        assert attempts(client, run_id) == number
        [winner] = [one for one, answer in enumerate(answers) if answer.status == 200]
        now = read_stored_state(attacked, client.organization)
        sent = STAGES[stage](winner)
        if "sensitive_input_values" in sent:
            assert now.run["secrets"] == sent["sensitive_input_values"]
        if "file_inputs" in sent:
            assert now.files("input") == [f"new {winner}".encode()]
        assert (now.run["status"], now.files("output")) == ("scheduling", [])
        assert_nothing_lost(attacked, client.organization)
        client.report(run_id, status="cancelled")


@pytest.mark.parametrize(("old", "stage"), [(BARE, "plain"), *((OLD, stage) for stage in STAGES)])
def test_of_many_resends_all_get_the_one_reply(
    attacked: Stack,
    client: Client,
    at_once: Callable[[Sequence[Call]], list[Answer]],
    old: dict[str, Any],
    stage: str,
) -> None:
    run_id = client.finished(**old)["id"]
    for number in range(1, ROUNDS + 1):
        answers = at_once([retry(run_id, f"key-{number}", **STAGES[stage](0))] * AT_ONCE)
        assert set(tally(answers)) <= {"200", "409 idempotency_in_progress"}
        done = [answer for answer in answers if answer.status == 200]
        assert len({answer.content for answer in done}) == 1
        assert [answer.headers.get("Idempotency-Status") for answer in done].count(None) == 1
        for answer in answers:
            if answer.status == 409:
                assert (answer.headers["Idempotency-Status"], answer.headers["Retry-After"]) == ("in_progress", "1")
            elif "Idempotency-Status" in answer.headers:
                assert answer.headers["Idempotency-Status"] == "replayed"
        assert attempts(client, run_id) == number
        assert_nothing_lost(attacked, client.organization)
        client.report(run_id, status="cancelled")


# It has looked at the run and not yet for the key; it has looked for both; it has staged.
@pytest.mark.parametrize(
    ("what", "point"),
    [
        *product(("retry", "upload"), ("idempotency.find before#1", "idempotency.find after#1")),
        ("retry", "runs.retry.switch_staged before#1"),
        ("upload", "BEGIN before#1"),
    ],
)
def test_a_resend_overtaken_by_the_first_request(attacked: Stack, client: Client, what: str, point: str) -> None:
    """Whatever it had seen before, it is answered what the first one was."""
    if what == "retry":
        call = retry(client.finished(**OLD)["id"], "the-key", **STAGES["both"](1))
    else:
        run_id = client.run()["id"]
        client.report(run_id, status="running")
        call = upload(run_id)._replace(key="the-key")
    with stopped(attacked, client, call, point) as resend:
        [first] = send_at_once(client, [call])
        assert first.status < 300
        if what == "upload":
            client.report(run_id, status="success")
        second = resend.go()
    assert (second.status, second.headers.get("Idempotency-Status")) == (first.status, "replayed")
    assert second.content == first.content


def test_of_many_different_requests_with_one_key_one_wins(
    client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    run_ids = finished_runs(client, AT_ONCE)
    calls = [retry(run_id, "the-key", sensitive_input_values={"password": run_id}) for run_id in run_ids]
    answers = at_once(calls)
    kinds = tally(answers)
    assert kinds["200"] == 1
    assert set(kinds) <= {"200", "422", "409 idempotency_in_progress"}
    assert Counter(attempts(client, run_id) for run_id in run_ids) == {0: AT_ONCE - 1, 1: 1}


# --- retry against an executor's report -------------------------------------------------------------------------------

LATE: dict[str, tuple[dict[str, Any], str, str]] = {  # what a report is answered before the retry, and after it
    "same status, attempt": ({"status": "success", "attempt": 1}, "200", "409 attempt_superseded"),
    "same status": ({"status": "success", "output_data": {"a": 1}}, "200", "409 invalid_transition"),
    "outputs, attempt": ({"output_data": {"a": 1}, "attempt": 1}, "200", "409 attempt_superseded"),
    "outputs": ({"run_message_history": [{"a": 1}]}, "200", "409 invalid_transition"),
    "running, attempt": ({"status": "running", "attempt": 1}, "409 invalid_transition", "409 attempt_superseded"),
    # Nothing tells these from a report about the new attempt. That is what `attempt` is for.
    "running": ({"status": "running"}, "409 invalid_transition", "200"),
    "error": ({"status": "error", "error": ["late"]}, "409 invalid_transition", "200"),
}


def cleared(client: Client, run_id: str, late: str, outcome: str) -> None:
    """The retry stands, and the report has left nothing of the old attempt."""
    run = client.get_run(run_id)
    reported = outcome == "200" and "attempt" not in LATE[late][0]
    status = {"running": "running", "error": "error"}.get(late, "scheduling") if reported else "scheduling"
    assert (run["status"], run["attempt"]) == (status, 2)
    assert run["error"] == (["late"] if status == "error" else None)
    assert run["output_data"] is run["run_message_history"] is None
    assert run["output_attachment_ids"] == []


@pytest.mark.parametrize("late", LATE)
def test_a_report_and_a_retry_in_both_orders(attacked: Stack, client: Client, late: str) -> None:
    fields, before, after = LATE[late]
    if before == "200":
        run_id = client.finished(**OLD)["id"]
        assert in_order(attacked, client, report(run_id, **fields), retry(run_id)) == ["200", "200"]
        cleared(client, run_id, late, before)
    run_id = client.finished(**OLD)["id"]
    assert in_order(attacked, client, retry(run_id), report(run_id, **fields)) == ["200", after]
    cleared(client, run_id, late, after)


def test_the_report_that_ends_a_run_and_its_retry(attacked: Stack, client: Client) -> None:
    """The retry is refused at once, on the run as it is committed, and then accepted."""
    run_id = client.run(**OLD)["id"]
    client.report(run_id, status="running")
    machine_id = client.machine()
    with stopped(attacked, client, report(run_id, status="error"), "COMMIT before#1") as ending:
        assert client.retry(run_id, machine_id=machine_id).json()["code"] == "run_not_terminal"
        assert ending.go().status == 200
    assert client.json_of(client.retry(run_id, machine_id=machine_id))["attempt"] == 2
    assert read_stored_state(attacked, client.organization).run["secrets"] == {"password": "old"}


@pytest.mark.parametrize(
    "change", ["UPDATE runs SET is_priority = true WHERE id = $1", "SELECT FROM runs WHERE id = $1"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_retry_whose_run_changes_between_reading_and_writing(
    attacked: Stack, client: Client, change: str, stage: str
) -> None:
    """It decides again, on what is there then."""
    old, switch = (BARE, "runs.retry.switch") if stage == "plain" else (OLD, "runs.retry.switch_staged")
    options = STAGES[stage](1)
    old = {name: value for name, value in old.items() if name in options}
    run_id = client.finished(**old)["id"]
    with stopped(attacked, client, retry(run_id, **options), f"{switch} before#1") as late:
        attacked.sql(change, run_id)
        answer = late.go()
    assert answer.status == 200
    now = client.get_run(run_id)
    assert (now["attempt"], now["is_priority"]) == (2, change.startswith("UPDATE"))
    assert json.loads(answer.content) == now
    seen = read_stored_state(attacked, client.organization)
    assert seen.run["secrets"] == options.get("sensitive_input_values", {})
    assert seen.files("input") == ([b"new 1"] if "file_inputs" in options else [])


def test_a_staged_retry_of_a_run_that_becomes_active_meanwhile(attacked: Stack, client: Client) -> None:
    run_id = client.finished(**OLD)["id"]
    with stopped(attacked, client, retry(run_id, **STAGES["both"](1)), "runs.retry.switch_staged before#1") as late:
        client.json_of(client.retry(run_id, **STAGES["both"](2)))
        assert late.go().code == "run_not_terminal"
    now = read_stored_state(attacked, client.organization)
    assert (now.run["attempt"], now.run["secrets"], now.files("input")) == (2, {"password": "new 2"}, [b"new 2"])


def test_reports_and_retries_at_random(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    random = chance("reports and retries")
    for _ in range(5 * ROUNDS):
        [late] = random.sample(list(LATE), 1)
        run_ids = [client.finished(**OLD)["id"] for _ in range(4)]
        calls = [call for run_id in run_ids for call in (retry(run_id), report(run_id, **LATE[late][0]))]
        random.shuffle(calls)
        answers = dict(zip(calls_by_name(calls), at_once(calls), strict=True))
        for run_id in run_ids:
            assert answers["POST", run_id].status == 200
            [outcome] = tally([answers["PATCH", run_id]])
            assert outcome in LATE[late][1:]
            cleared(client, run_id, late, outcome)
        assert_nothing_lost(attacked, client.organization)


def calls_by_name(calls: Sequence[Call]) -> list[tuple[str, str]]:
    return [(call.method, call.path.split("/")[3]) for call in calls]


def test_a_retry_that_waits_for_a_change_of_an_inputs_expiry(attacked: Stack, client: Client) -> None:
    """What counts is when the file expires once the wait is over, not how it was when the wait began."""
    run_id, machine_id = client.finished(**OLD)["id"], client.machine()
    lock = "UPDATE runs SET attempt = attempt WHERE id = $1"  # as PUT does
    past = "UPDATE run_attachments SET expires_at = '2020-01-01' WHERE run_id = $1"
    with attacked.held(lock, run_id, commit=True) as change:
        late = send(client, retry(run_id, machine_id=machine_id))
        waits(attacked, late)
        change(past, run_id)
    assert tally([late.result()]) == {"409 input_attachments_expired": 1}
    assert client.get_run(run_id)["attempt"] == 1


# --- retry against deletion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["run", "workflow"])
@pytest.mark.parametrize("stage", ["plain", "both"])
def test_a_retry_and_a_deletion_in_both_orders(attacked: Stack, client: Client, what: str, stage: str) -> None:
    def scene() -> tuple[str, Call]:
        run = client.finished(**OLD)
        path = f"/v1/runs/{run['id']}" if what == "run" else f"/v1/workflows/{run['workflow_id']}"
        return run["id"], Call("DELETE", path)

    run_id, delete = scene()
    assert in_order(attacked, client, retry(run_id, **STAGES[stage](1)), delete) == ["200", "204"]
    # A retry with secrets looks twice: what it finds before it stages is not what counts.
    run_id, delete = scene()
    assert in_order(attacked, client, delete, retry(run_id, **STAGES[stage](1))) == ["204", "404 run_not_found"]
    assert client.json_of(client.get("/v1/runs"))["total"] == 0


def test_a_retry_that_staged_for_a_run_that_is_gone(attacked: Stack, client: Client) -> None:
    run_id = client.finished(**OLD)["id"]
    with stopped(attacked, client, retry(run_id, **STAGES["both"](1)), "runs.retry.switch_staged before#1") as late:
        assert client.delete(f"/v1/runs/{run_id}").status_code == 204
        assert late.go().code == "run_not_found"
    staged = (
        "SELECT store, sweeps FROM deletions WHERE '/' || name LIKE '%/' || $1 || '/%' AND sweeps = 2 ORDER BY store"
    )
    assert attacked.sql(staged, client.organization) == [
        {"store": "storage", "sweeps": 2},
        {"store": "vault", "sweeps": 2},
    ]


def test_a_retry_and_the_deletion_of_its_machine(attacked: Stack, client: Client) -> None:
    def scene() -> tuple[str, str, Call]:
        machine_id = client.machine(status="disconnected")
        run_id = client.run(machine_id=machine_id, **OLD)["id"]
        client.report(run_id, status="error")
        return run_id, machine_id, Call("DELETE", f"/v1/machines/{machine_id}")

    run_id, _, delete = scene()
    assert in_order(attacked, client, retry(run_id), delete) == ["200", "204"]
    run = client.get_run(run_id)
    assert (run["status"], run["machine_id"], run["attempt"]) == ("error", None, 2)
    assert "machine was deleted" in run["error"][0]

    run_id, _, delete = scene()
    assert in_order(attacked, client, delete, retry(run_id)) == ["204", "409 machine_deleted"]
    run = client.get_run(run_id)
    assert (run["status"], run["machine_id"], run["attempt"]) == ("error", None, 1)

    run_id, machine_id, delete = scene()
    outcome = in_order(attacked, client, delete, retry(run_id, machine_id=machine_id))
    assert outcome == ["204", "404 machine_not_found"]
    assert client.get_run(run_id)["attempt"] == 1


def test_retries_and_deletions_at_random(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    random = chance("retries and deletions")
    for _ in range(2 * ROUNDS):
        machine_id, workflow_id = client.machine(status="disconnected"), client.workflow()
        shared = {"workflow_id": workflow_id, "machine_id": machine_id}
        runs = finished_runs(client, 6, **OLD, **shared)
        calls = [retry(run_id, **STAGES[random.choice(list(STAGES))](1)) for run_id in runs]
        calls += [Call("DELETE", f"/v1/runs/{run_id}") for run_id in random.sample(runs, 3)]
        calls += [Call("DELETE", f"/v1/machines/{machine_id}")]
        calls += [Call("DELETE", f"/v1/workflows/{workflow_id}")] * random.randrange(3)
        random.shuffle(calls)
        kinds = {"200", "204", "404 run_not_found", "404 workflow_not_found", "409 machine_deleted"}
        assert set(tally(at_once(calls))) <= kinds
        assert_nothing_lost(attacked, client.organization)
        pinned = "SELECT 1 FROM runs WHERE lane = 'machine:' || $1 AND status IN ('scheduling', 'running')"
        assert attacked.sql(pinned, machine_id) == [], "a run waits for a machine that is gone"


# --- collectors -------------------------------------------------------------------------------------------------------


class SlowVault(VaultSecrets):
    """A store whose deletes wait until they are let go: a collector that is slow between condemning and deleting."""

    go: threading.Event

    async def destroy(self, path: str) -> None:
        await asyncio.to_thread(self.go.wait, 30)
        await super().destroy(path)


@contextmanager
def slow_collector(
    stack: Stack, ahead: float, batch: int = deletions.BATCH
) -> Iterator[tuple[threading.Event, Future[int]]]:
    """Rounds of a collector on a clock that is `ahead`; it has condemned, and deletes when the event is set."""
    settings, go = settings_of(stack), threading.Event()

    async def collect() -> int:
        vault = SlowVault(settings)
        vault.go = go
        return await collect_until_empty(settings, ahead, vault=vault, batch=batch)

    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(lambda: asyncio.run(collect()))
        try:
            yield go, taken
        finally:
            go.set()
        taken.result()


def condemned(stack: Stack, organization: str) -> int:
    query = "SELECT 1 FROM deletions WHERE condemned_at IS NOT NULL AND '/' || name LIKE '%/' || $1 || '/%'"
    return len(stack.sql(query, organization))


def collect(stack: Stack, ahead: float) -> int:
    return asyncio.run(collect_until_empty(settings_of(stack), ahead))


def test_collectors_of_many_replicas_share_one_list(attacked: Stack, client: Client) -> None:
    collect_all(attacked)
    runs = finished_runs(client, 300, sensitive_input_values={"password": "old"})
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(lambda _: collect(attacked, 2 * DAY), range(4)))
    assert sum(taken) == len(runs), "each name is taken once"
    assert attacked.secret_paths(f"runs/{client.organization}/") == set()
    assert attacked.sql("SELECT * FROM deletions") == []
    assert tally(send_at_once(client, [retry(run_id) for run_id in runs[:20]])) == {"409 sensitive_inputs_expired": 20}


@pytest.mark.parametrize("point", ["deletions.hold after#1", "COMMIT before#1"])
def test_a_collector_passes_over_what_is_being_adopted(attacked: Stack, client: Client, point: str) -> None:
    """All staged names are due, and none has been condemned: they are adopted, and live."""
    run_id = client.finished(**OLD)["id"]
    with stopped(attacked, client, retry(run_id, **STAGES["both"](1)), point, holding=run_id) as adopting:
        collect(attacked, 3600)
        assert condemned(attacked, client.organization) == 0
        assert adopting.go().status == 200
    collect(attacked, 3600)
    now = read_stored_state(attacked, client.organization)
    assert (now.run["secrets"], now.files("input")) == ({"password": "new 1"}, [b"new 1"])


CONDEMN = "UPDATE deletions SET condemned_at = now() WHERE '/' || name LIKE '%/' || $1 || '/%'"


@pytest.mark.parametrize("which", ["", " AND store = 'vault'", " AND store = 'storage'"])
def test_a_switch_that_waits_for_the_collector_adopts_nothing(attacked: Stack, client: Client, which: str) -> None:
    """The collector came first and has not committed yet: whoever waits for it finds names condemned, and takes none."""
    run_id = client.finished("error", file_inputs=[file_input(b"old")])["id"]
    before = read_stored_state(attacked, client.organization)
    with stopped(attacked, client, retry(run_id, **STAGES["both"](1)), "runs.retry.switch_staged before#1") as late:
        with attacked.held(CONDEMN + which, client.organization, commit=True):
            late.gate.touch()
            waits(attacked, late.answer)
        assert tally([late.answer.result()]) == {"503 vault_unavailable": 1}
    assert read_stored_state(attacked, client.organization) == before


# --- a retention row against a retry that keeps the secret ------------------------------------------------------------


def test_a_condemned_secret_is_never_kept(attacked: Stack, client: Client) -> None:
    run = client.finished(**OLD)
    with slow_collector(attacked, 2 * DAY) as (go, taken):
        until(lambda: condemned(attacked, client.organization), what="condemning")
        for options in ({}, STAGES["files"](1)):
            assert tally(send_at_once(client, [retry(run["id"], **options)])) == {"409 sensitive_inputs_expired": 1}
        assert client.get_run(run["id"]) == run
        assert read_stored_state(attacked, client.organization).run["secrets"] == {"password": "old"}
        # One that replaces it goes on meanwhile, and the late delete takes only the old one.
        client.json_of(client.retry(run["id"], **STAGES["secrets"](1)))
        go.set()
        assert taken.result() >= 1
    assert read_stored_state(attacked, client.organization).run["secrets"] == {"password": "new 1"}


def test_a_retry_that_waits_for_the_collector_does_not_keep_the_secret(attacked: Stack, client: Client) -> None:
    run = client.finished(**OLD)
    with attacked.held(CONDEMN, client.organization, commit=True):
        late = send(client, retry(run["id"]))
        waits(attacked, late)
    assert late.result().code == "sensitive_inputs_expired"
    assert client.get_run(run["id"]) == run
    assert attempts(client, run["id"]) == 0


def test_a_collector_passes_over_a_secret_that_is_being_kept(attacked: Stack, client: Client) -> None:
    run_id = client.finished(**OLD)["id"]
    with stopped(attacked, client, retry(run_id), "COMMIT before#1", holding=run_id) as keeping:
        collect(attacked, 2 * DAY)
        assert condemned(attacked, client.organization) == 0
        assert keeping.go().status == 200
    collect(attacked, 2 * DAY)
    assert read_stored_state(attacked, client.organization).run["secrets"] == {"password": "old"}


def test_retries_and_collectors_at_random(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    """Kept and alive, or refused and destroyed: nothing between."""
    outcomes: Counter[str] = Counter()
    for _ in range(2 * ROUNDS):
        runs = finished_runs(client, 40, sensitive_input_values={"password": "old"})
        go_on: list[threading.Event] = []
        with ExitStack() as collectors:
            for _ in range(2):  # each begins with a few, and goes on when the retries are sent
                go, _ = collectors.enter_context(slow_collector(attacked, 2 * DAY, batch=3))
                go_on.append(go)
            until(lambda: condemned(attacked, client.organization) >= 6, what="condemning")
            for go in go_on:
                go.set()
            answers = at_once([retry(run_id) for run_id in runs])
        assert set(tally(answers)) <= {"200", "409 sensitive_inputs_expired"}
        outcomes += tally(answers)
        collect(attacked, 2 * DAY)
        rows = {str(row["id"]): row["secrets"] for row in read_stored_state(attacked, client.organization).runs}
        for run_id, answer in zip(runs, answers, strict=True):
            assert rows[run_id] == {"password": "old" if answer.status == 200 else None}
    print(f"retries against collectors: {outcomes}")


def test_a_collector_that_finishes_against_the_deletion_of_a_workflow(attacked: Stack, client: Client) -> None:
    """Both change many rows of the list, which lie there in the opposite order of the one in which they are named."""
    collect_all(attacked)
    workflow_id = client.workflow()
    client.json_of(
        client.post("/v1/runs/bulk", json={"workflow_id": workflow_id, "count": 120} | STAGES["secrets"](1)), 201
    )
    rows = attacked.sql(
        "SELECT id, secret_path FROM runs WHERE organization_id = $1 ORDER BY secret_path DESC", client.organization
    )
    for row in rows:
        client.report(str(row["id"]), status="cancelled")
    with slow_collector(attacked, 2 * DAY) as (go, taken):
        until(lambda: condemned(attacked, client.organization) == len(rows), what="condemning")
        middle = rows[len(rows) // 2]["secret_path"]
        with attacked.held("SELECT 1 FROM deletions WHERE name = $1 FOR UPDATE", middle):
            go.set()
            until(lambda: attacked.waiting() == 1, what="the collector's wait")
            deletion = send(client, Call("DELETE", f"/v1/workflows/{workflow_id}"))
            until(lambda: attacked.waiting() == 2, what="the deletion's wait")
        assert deletion.result().status == 204
        assert taken.result() == len(rows)


# --- uploads ----------------------------------------------------------------------------------------------------------


def upload(run_id: str, number: int = 0) -> Call:
    body = file_input(f"output {number}".encode()) | {"run_id": run_id, "attachment_type": "output"}
    return Call("POST", "/v1/run-attachments", body | {"content_type": "text/plain"})


def test_an_upload_and_the_end_of_its_attempt_in_both_orders(attacked: Stack, client: Client) -> None:
    run_id = client.run()["id"]
    client.report(run_id, status="running")
    ended = report(run_id, status="success", attempt=1)
    assert in_order(attacked, client, upload(run_id), ended, "COMMIT before#1") == ["201", "200"]
    assert len(client.get_run(run_id)["output_attachment_ids"]) == 1
    assert client.json_of(client.retry(run_id))["output_attachment_ids"] == []
    client.report(run_id, status="running")
    ended = report(run_id, status="success", attempt=2)
    assert in_order(attacked, client, ended, upload(run_id)) == ["200", "409 invalid_transition"]
    assert client.get_run(run_id)["output_attachment_ids"] == []


def test_an_upload_overtaken_by_end_retry_and_start(attacked: Stack, client: Client) -> None:
    """It was accepted for the first attempt, and comes to the switch when the second one is running."""
    run_id = client.run()["id"]
    client.report(run_id, status="running")
    with stopped(attacked, client, upload(run_id), "BEGIN before#1") as late:
        client.report(run_id, status="error")
        client.json_of(client.retry(run_id))
        client.report(run_id, status="running")
        assert late.go().code == "attempt_superseded"
    assert client.get_run(run_id)["output_attachment_ids"] == []


def test_uploads_ends_and_retries_at_random(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    random = chance("uploads")
    for _ in range(2 * ROUNDS):
        runs = [client.run()["id"] for _ in range(5)]
        for run_id in runs:
            client.report(run_id, status="running")
        calls = [upload(run_id, number) for run_id in runs for number in range(4)]
        calls += [report(run_id, status="success", attempt=1) for run_id in runs]
        calls += [retry(run_id) for run_id in runs for _ in range(3)]
        random.shuffle(calls)
        kinds = set(tally(at_once(calls)))
        assert kinds <= {"200", "201", "409 run_not_terminal", "409 invalid_transition", "409 attempt_superseded"}
        for run_id in runs:
            run = client.get_run(run_id)
            assert run["status"] == {1: "success", 2: "scheduling"}[run["attempt"]]
            assert run["attempt"] == 1 or run["output_attachment_ids"] == []
        assert_nothing_lost(attacked, client.organization)


# --- assignment -------------------------------------------------------------------------------------------------------


def test_a_run_that_was_cancelled_and_retried_since_it_was_read(attacked: Stack, client: Client) -> None:
    """It stands at the end of the queue now: it is not given what was chosen for its old place."""
    overtaken = False

    async def scenario(first: str, machine_id: str) -> list[str]:
        def overtake() -> None:
            nonlocal overtaken
            overtaken = True
            client.report(first, status="cancelled")
            client.json_of(client.retry(first))

        database = Database(settings_of(attacked))
        try:
            # By hand, so that no server is woken.
            await asyncio.to_thread(attacked.sql, "UPDATE machines SET is_available = true WHERE id = $1", machine_id)
            interrupted: Any = Interrupted(database, lambda: asyncio.to_thread(overtake))
            done = await place(interrupted, client.organization)
            return [str(one.run_id) for one in done.placed]
        finally:
            database.close()

    # A server that looks around may come first. Then nothing is left for the test's own pass, and it is tried again.
    for _ in range(10):
        machine_id = client.machine(is_available=False)
        first, second = (client.run(machine_id=machine_id)["id"] for _ in range(2))
        assert asyncio.run(scenario(first, machine_id)) == []
        if overtaken:
            break
    assert overtaken
    # The cancellation and the retry have woken the servers, which waited for the pass to end.
    until(lambda: client.get_run(second)["assigned_machine_id"] == machine_id, what="the assignment of the next")
    assert client.get_run(first)["assigned_machine_id"] is None


ASSIGN = "UPDATE runs SET assigned_machine_id = $2 WHERE id = $1"


@pytest.mark.parametrize("end", ["cancel", "delete", "cancel and retry"])
def test_a_request_waits_for_an_assignment_and_frees_the_machine(attacked: Stack, client: Client, end: str) -> None:
    machine_id = client.machine(is_available=False)
    run_id, next_id = client.run()["id"], client.run()["id"]
    call = Call("DELETE", f"/v1/runs/{run_id}") if end == "delete" else report(run_id, status="cancelled")
    with attacked.held(ASSIGN, run_id, machine_id, commit=True):
        answer = send(client, call)
        waits(attacked, answer)
    assert answer.result().status in (200, 204)
    if end == "cancel and retry":
        assert client.json_of(client.retry(run_id))["assigned_machine_id"] is None
    client.json_of(client.patch(f"/v1/machines/{machine_id}", json={"is_available": True}))
    until(lambda: client.get_run(next_id)["assigned_machine_id"] == machine_id, what="the next run's assignment")


def assigned(client: Client, runs: list[dict[str, Any]]) -> list[str]:
    return [run["id"] for run in runs if client.get_run(run["id"])["assigned_machine_id"]]


def test_assignments_retries_cancels_and_deletes_at_random(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    random = chance("assignments")
    machines = [client.machine() for _ in range(3)]
    for _ in range(2 * ROUNDS):
        runs = finished_runs(client, 12)
        calls = [retry(run_id) for run_id in runs]
        calls += [report(run_id, status="cancelled") for run_id in random.choices(runs, k=12)]
        calls += [report(run_id, status="running") for run_id in random.choices(runs, k=6)]
        calls += [Call("DELETE", f"/v1/runs/{run_id}") for run_id in random.sample(runs, 2)]
        random.shuffle(calls)
        kinds = set(tally(at_once(calls)))
        assert kinds <= {"200", "204", "404 run_not_found", "409 run_not_terminal", "409 invalid_transition"}
        assert attacked.sql(FORBIDDEN) == []
        # Whatever is left waiting gets its turn: no machine is lost to a run that is gone.
        while waiting := client.json_of(client.get("/v1/runs?status=scheduling"))["items"]:
            ready = until(partial(assigned, client, waiting), what="an assignment")
            assert client.get_run(ready[0])["assigned_machine_id"] in machines
            client.report(ready[0], status="cancelled")
        for run in client.json_of(client.get("/v1/runs?status=running"))["items"]:
            client.report(run["id"], status="success")


def test_one_machine_and_many_waiting_runs(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    """Retried all at once and pinned to it: it does one after the other, in the order of the queue, each once."""
    machine_id = client.machine()
    runs = finished_runs(client, 25, machine_id=machine_id)
    assert tally(at_once([retry(run_id) for run_id in runs])) == {"200": len(runs)}
    queue = "SELECT id FROM runs WHERE organization_id = $1 ORDER BY queued_at, id"
    wanted = [str(row["id"]) for row in attacked.sql(queue, client.organization)]
    active = (
        "SELECT id FROM runs WHERE organization_id = $1 AND assigned_machine_id IS NOT NULL"
        " AND status IN ('scheduling', 'running')"
    )
    done = []
    for _ in runs:
        [row] = until(lambda: attacked.sql(active, client.organization), what="the next assignment")
        run_id = str(row["id"])
        assert client.report(run_id, status="running", attempt=2)["assigned_machine_id"] == machine_id
        client.report(run_id, status="success")
        done.append(run_id)
    # The first of them may have found the machine before an older one was committed.
    assert done[1:] == [run_id for run_id in wanted if run_id != done[0]]


# --- the end of a session against a retry -----------------------------------------------------------------------------


def session(client: Client, **options: object) -> tuple[str, str]:
    """A run that ended, and the machine that stays reserved for its session; it is offline, so nothing is placed."""
    machine_id = client.machine()
    run_id = client.run(start_session=True, machine_id=machine_id, **options)["id"]
    until(lambda: client.get_run(run_id)["assigned_machine_id"], what="the assignment")
    client.report(run_id, status="running")
    client.report(run_id, status="success")
    machine = client.json_of(client.patch(f"/v1/machines/{machine_id}", json={"status": "disconnected"}))
    assert machine["reserved_session_id"] == run_id
    return run_id, machine_id


def release(machine_id: str) -> Call:
    return Call("PATCH", f"/v1/machines/{machine_id}", {"reserved_session_id": None})


def reservation(client: Client, machine_id: str) -> str | None:
    reserved: str | None = client.json_of(client.get(f"/v1/machines/{machine_id}"))["reserved_session_id"]
    return reserved


def test_a_retry_in_a_session_that_is_ended_meanwhile(attacked: Stack, client: Client) -> None:
    # The retry committed between the two looks for active runs: the second one finds it.
    run_id, machine_id = session(client, **OLD)
    with stopped(attacked, client, release(machine_id), "machines.session.lock_machine before#1") as ending:
        assert client.json_of(client.retry(run_id))["session_id"] == run_id
        assert ending.go().status == 200
    run = client.get_run(run_id)
    assert (run["status"], run["attempt"]) == ("cancelled", 2)
    assert "session was ended" in run["error"][0]
    assert reservation(client, machine_id) is None

    # The retry comes after the last look: it waits, and its session starts again on the next machine.
    run_id, machine_id = session(client, **OLD)
    with stopped(attacked, client, release(machine_id), "COMMIT before#1") as ending:
        client.json_of(client.retry(run_id))
        assert ending.go().status == 200
    run = client.get_run(run_id)
    assert (run["status"], run["session_id"], reservation(client, machine_id)) == ("scheduling", run_id, None)


@pytest.mark.parametrize("end", ["session", "machine"])
def test_what_ends_a_session_and_a_run_that_releases_it(attacked: Stack, client: Client, end: str) -> None:
    """Each would hold what the other wants: the run came into the session between two looks. Neither is told of it."""
    session_id, machine_id = session(client)
    call, point = {
        "session": (release(machine_id), "machines.session.lock_machine before#1"),
        "machine": (Call("DELETE", f"/v1/machines/{machine_id}"), "machines.delete.lock before#1"),
    }[end]
    with ExitStack() as gates:
        ending = gates.enter_context(stopped(attacked, client, call, point))
        run_id = client.run(session_id=session_id, machine_id=machine_id, release_session_after=True)["id"]
        cancel = report(run_id, status="cancelled")
        cancelling = gates.enter_context(stopped(attacked, client, cancel, "runs.report.update after#1"))
        ending.gate.touch()
        until(lambda: attacked.waiting() == 1, what="the wait for the run")
        answers = [cancelling.go(), ending.go()]
    assert [answer.status for answer in answers] == [200, 200 if end == "session" else 204]
    assert client.get_run(run_id)["status"] == "cancelled"
    if end == "session":
        assert reservation(client, machine_id) is None


def test_ends_of_sessions_and_retries_at_random(
    attacked: Stack, client: Client, at_once: Callable[[Sequence[Call]], list[Answer]]
) -> None:
    random = chance("sessions")
    for _ in range(3 * ROUNDS):
        run_id, machine_id = session(client, **OLD)
        calls = [release(machine_id), retry(run_id, release_session_after=True), report(run_id, status="cancelled")] * 3
        calls += [Call("PATCH", f"/v1/machines/{machine_id}", {"status": "connected"}), retry(run_id)]
        random.shuffle(calls)
        kinds = set(tally(at_once(calls)))
        assert kinds <= {"200", "409 run_not_terminal", "409 invalid_transition"}
        assert attacked.sql(FORBIDDEN) == []
        assert_nothing_lost(attacked, client.organization)
        client.patch(f"/v1/runs/{run_id}", json={"status": "cancelled"})
        client.json_of(client.patch(f"/v1/machines/{machine_id}", json={"status": "disconnected"}))
