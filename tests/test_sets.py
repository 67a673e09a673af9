"""Retries that meet go together, and nobody suffers from a neighbour.

`retry_runs` is called here as a bulk retry calls it: what is given at once meets, whatever else the machine does.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import orjson
import pytest

from app.access.auth import Actor, Principal
from app.errors import Invalid, OutcomeUnknown, Refusal, RunNotFound
from app.idempotency import Reply, WriteRequest, store
from app.limits.quotas import Policy, RunQuotas
from app.runs.retry import Outcome, Retry, retry_runs
from app.schemas.runs import RunRetry
from app.services import Services
from app.telemetry import metrics
from tests.support.client import Client, file_input
from tests.support.stack import Stack, settings_of
from tests.support.waiting import until

MANY = 10

# Another request's reply under the key `taken`.
TAKEN = (
    "INSERT INTO idempotency_keys (organization_id, key, fingerprint, status, body, ids, expires_at)"
    " VALUES ($1, 'taken', 'another', 200, '', '{}', now() + interval '1 h')"
)


class Desk:
    """What an organization has here: a client, and services of its own that call as its key does."""

    def __init__(self, stack: Stack, client: Client) -> None:
        self.stack, self.client = stack, client
        [row] = stack.sql("SELECT id FROM api_keys WHERE organization_id = $1", client.organization)
        self.principal = Principal(row["id"], client.organization, None, ["*"])

    def runs(self, count: int = MANY, **options: object) -> list[UUID]:
        return [UUID(self.client.finished("error", **options)["id"]) for _ in range(count)]

    def retry(self, run_id: UUID, key: str | None = None, **options: Any) -> Retry:
        write = WriteRequest(self.principal, key, (b"the same",), 60, 2**16)
        return Retry.of(write, run_id, RunRetry(**options))

    def attempts(self, run_ids: Sequence[UUID]) -> list[int]:
        return [self.client.get_run(str(run_id))["attempt"] for run_id in run_ids]


@pytest.fixture
def desk(stack: Stack, api: Client) -> Desk:
    return Desk(stack, api)


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What went together in this process: what for, and how many."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(metrics.set_size, "observe", lambda count, name: seen.append((name, count)))
    return seen


def done(stack: Stack, scenario: Callable[[Services], Awaitable[Any]], **changes: Any) -> Any:
    """What the scenario returns, with services of this process."""

    async def main() -> Any:
        services = replace(Services.open(settings_of(stack)), **changes)
        try:
            return await asyncio.wait_for(scenario(services), 30)
        finally:
            await services.close()

    return asyncio.run(main())


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return ["200" if isinstance(one, Reply) else one.code if isinstance(one, Refusal) else "busy" for one in outcomes]


def test_many_go_in_one_statement_each(desk: Desk, sets: list[tuple[str, int]]) -> None:
    plain, kept = desk.runs(), desk.runs(3, sensitive_input_values={"password": "old"}, file_inputs=[file_input()])
    unknown = uuid4()
    retries = [desk.retry(run_id, uuid4().hex) for run_id in [*plain, *kept, unknown]]
    outcomes = done(desk.stack, lambda services: retry_runs(services, retries))
    assert codes(outcomes) == ["200"] * 13 + ["run_not_found"]
    assert sorted(sets) == [("read", 14), ("switch", 10), ("switch_staged", 3)]
    for run_id, outcome in zip([*plain, *kept], outcomes, strict=False):
        shown = orjson.loads(outcome.body)
        assert shown == desk.client.get_run(str(run_id))
        assert (shown["id"], shown["attempt"], shown["status"]) == (str(run_id), 2, "scheduling")


def test_a_run_that_is_held_keeps_nobody_waiting(desk: Desk, sets: list[tuple[str, int]]) -> None:
    runs = desk.runs()

    async def scenario(services: Services) -> list[Outcome]:
        late, *others = [asyncio.create_task(retry_runs(services, [desk.retry(run_id)])) for run_id in runs]
        first = await asyncio.wait_for(asyncio.gather(*others), 1.5)
        assert codes([outcome for [outcome] in first]) == ["200"] * (MANY - 1)
        assert not late.done()
        return await late

    with desk.stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", runs[0]):
        [held] = done(desk.stack, scenario)
    assert held.code == "idempotency_in_progress"
    assert ("switch", MANY) in sets
    assert desk.attempts(runs) == [1] + [2] * (MANY - 1)


def test_a_key_that_a_twin_has_taken_is_its_own_affair(desk: Desk, sets: list[tuple[str, int]]) -> None:
    runs = desk.runs()
    desk.stack.sql(TAKEN, desk.client.organization)
    retries = [desk.retry(run_id, "taken" if place == 4 else uuid4().hex) for place, run_id in enumerate(runs)]
    outcomes = done(desk.stack, lambda services: retry_runs(services, retries))
    assert isinstance(outcomes[4], Invalid)
    assert codes(outcomes[:4] + outcomes[5:]) == ["200"] * (MANY - 1)
    assert ("switch", MANY) in sets
    assert desk.attempts(runs) == [2] * 4 + [1] + [2] * 5


@asynccontextmanager
async def twin_under_way(services: Services, desk: Desk, kind: str) -> AsyncIterator[None]:
    """Another write under the key `taken` that has done all but its COMMIT."""
    async with services.database.transaction() as connection:
        if kind == "retry":
            [other] = await asyncio.to_thread(desk.runs, 1)
            [outcome] = await retry_runs(services, [desk.retry(other, "taken")], connection=connection)
            assert codes([outcome]) == ["200"]
        else:
            write = desk.retry(uuid4(), "taken").write
            assert write is not None
            await store(connection, write, Reply(201, b"{}"))
        yield


@pytest.mark.parametrize("kind", ["retry", "another write"])
def test_a_twin_that_is_under_way_keeps_nobody_waiting(desk: Desk, sets: list[tuple[str, int]], kind: str) -> None:
    runs = desk.runs()

    async def scenario(services: Services) -> list[Outcome]:
        async with twin_under_way(services, desk, kind):
            tasks = [
                asyncio.create_task(retry_runs(services, [desk.retry(run_id, uuid4().hex if place else "taken")]))
                for place, run_id in enumerate(runs)
            ]
            first = await asyncio.wait_for(asyncio.gather(*tasks[1:]), 1.5)
            assert codes([outcome for [outcome] in first]) == ["200"] * (MANY - 1)
            await asyncio.to_thread(until, lambda: desk.stack.waiting() == 1, what="the twin waits")
            assert not tasks[0].done()
        return await tasks[0]

    [late] = done(desk.stack, scenario)
    assert isinstance(late, Reply)
    assert late.replayed
    assert ("switch", MANY) in sets
    assert desk.attempts(runs) == [1] + [2] * (MANY - 1)


def test_a_twin_of_the_version_before_is_waited_for(desk: Desk) -> None:
    """It takes its key without saying so first: those that met its twin are late, and right."""
    runs = desk.runs(4)
    retries = [desk.retry(run_id, uuid4().hex if place else "taken") for place, run_id in enumerate(runs)]
    with ThreadPoolExecutor(1) as threads:
        with desk.stack.held(TAKEN, desk.client.organization):
            waiting = threads.submit(done, desk.stack, lambda services: retry_runs(services, retries))
            until(lambda: desk.stack.waiting() == 1, what="a set that waits")
        assert codes(waiting.result()) == ["200"] * 4
    assert desk.attempts(runs) == [2] * 4


def test_a_deadlock_with_another_transaction_is_survived_by_all(desk: Desk, sets: list[tuple[str, int]]) -> None:
    """The set holds a run and waits for a key; the other one holds the key and then waits for the run."""
    runs = desk.runs(4)
    retries = [desk.retry(run_id, uuid4().hex if place else "taken") for place, run_id in enumerate(runs)]

    async def scenario(services: Services) -> list[Outcome]:
        other = await asyncpg.connect(desk.stack.url)
        transaction = other.transaction()
        await transaction.start()
        await other.execute(TAKEN, desk.client.organization)
        waiting = asyncio.create_task(retry_runs(services, retries))
        await asyncio.to_thread(until, lambda: desk.stack.waiting() == 1, what="a set that waits")
        # PostgreSQL ends the set: its second of waiting, after which it looks for a deadlock, ends first.
        await other.execute("UPDATE runs SET is_priority = is_priority WHERE id = $1", runs[1])
        await transaction.rollback()
        await other.close()
        return await waiting

    assert codes(done(desk.stack, scenario)) == ["200"] * 4
    assert ("switch", 4) in sets
    assert desk.attempts(runs) == [2] * 4
    [row] = desk.stack.sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert row["deadlocks"] > 0


def test_one_key_twice_at_once_is_one_retry(desk: Desk, sets: list[tuple[str, int]]) -> None:
    [run_id] = desk.runs(1)
    outcomes = done(desk.stack, lambda services: retry_runs(services, [desk.retry(run_id, "once")] * 5))
    assert codes(outcomes) == ["200"] * 5
    assert len({outcome.body for outcome in outcomes}) == 1
    assert sum(outcome.replayed for outcome in outcomes) == 4
    assert max(count for name, count in sets if name == "switch") == 1
    assert desk.attempts([run_id]) == [2]


@pytest.mark.parametrize("table", ["run_attachments", "run_attempts"])
def test_a_connection_that_breaks_under_a_set(desk: Desk, table: str) -> None:
    """Under the read each goes again alone; under the statement that commits, nobody can know."""
    runs = desk.runs(4)
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'runs-api'"
        " AND wait_event_type = 'Lock' AND query LIKE '/* runs.retry.%'"
    )

    retries = [desk.retry(run_id) for run_id in runs]
    with ThreadPoolExecutor(1) as threads:
        with desk.stack.held(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"):
            waiting = threads.submit(done, desk.stack, lambda services: retry_runs(services, retries))
            until(lambda: desk.stack.sql(kill), what="a set that waits")
        outcomes = waiting.result()
    if table == "run_attachments":
        assert codes(outcomes) == ["200"] * 4
    else:
        assert all(isinstance(one, OutcomeUnknown) for one in outcomes)
    assert desk.attempts(runs) == [2 if table == "run_attachments" else 1] * 4


def test_a_caller_that_leaves_takes_nobody_along(desk: Desk) -> None:
    runs = desk.runs()

    async def scenario(services: Services) -> list[Outcome]:
        tasks = [asyncio.create_task(retry_runs(services, [desk.retry(run_id)])) for run_id in runs]
        for turns, task in enumerate(tasks[:3]):
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        return [outcome for [outcome] in await asyncio.gather(*tasks[3:])]

    assert codes(done(desk.stack, scenario)) == ["200"] * (MANY - 3)
    assert desk.attempts(runs[3:]) == [2] * (MANY - 3)


def test_what_is_long_goes_alone(desk: Desk, sets: list[tuple[str, int]]) -> None:
    runs = desk.runs(4)
    long = {"text": "x" * 100_000}
    retries = [desk.retry(runs[0], input_values=long), *(desk.retry(run_id) for run_id in runs[1:])]
    outcomes = done(desk.stack, lambda services: retry_runs(services, retries))
    assert codes(outcomes) == ["200"] * 4
    assert desk.client.get_run(str(runs[0]))["input_values"] == long
    assert [count for name, count in sets if name == "switch"] == [3]


@pytest.mark.parametrize("is_keys", [True, False])
def test_the_last_of_a_quota_is_given_once(desk: Desk, is_keys: bool) -> None:
    runs = desk.runs()
    policy = Policy("waiting", 3, "waiting runs")
    run_quotas = RunQuotas(policy if is_keys else None, None if is_keys else policy, None, None)
    retries = [desk.retry(run_id) for run_id in runs]
    outcomes = done(desk.stack, lambda services: retry_runs(services, retries), run_quotas=run_quotas)
    assert Counter(codes(outcomes)) == {"200": 3, "quota_exceeded": MANY - 3}
    assert sorted(desk.attempts(runs)) == [1] * (MANY - 3) + [2] * 3


def test_a_set_counts_those_before_it_against_the_quota(desk: Desk, sets: list[tuple[str, int]]) -> None:
    """Each of them would have room; together only three have, before requests take turns at the quota."""
    runs, most = desk.runs(), 100
    workflow_id = desk.client.workflow()
    desk.client.json_of(desk.client.post("/v1/runs/bulk", json={"workflow_id": workflow_id, "count": 33}), 201)
    run_quotas = RunQuotas(None, Policy("waiting", most, "waiting runs"), None, None)
    retries = [desk.retry(run_id) for run_id in runs]
    outcomes = done(desk.stack, lambda services: retry_runs(services, retries), run_quotas=run_quotas)
    assert codes(outcomes) == ["200"] * MANY
    # Those without room in their set go alone. How many these are depends on how the calls met.
    assert MANY < sum(count for name, count in sets if name == "read") <= 2 * MANY - 1


# --- in the caller's transaction --------------------------------------------------------------------------------------


def test_the_same_in_a_transaction_of_the_callers(desk: Desk) -> None:
    plain, kept = desk.runs(3), desk.runs(1, sensitive_input_values={"password": "old"})
    active = UUID(desk.client.run()["id"])
    late = Retry(plain[2], desk.client.organization, Actor(by="policy"), RunRetry(), expected_attempt=7)
    retries = [*map(desk.retry, [*plain[:2], *kept, active, uuid4(), plain[0]]), late]

    async def scenario(services: Services, *, fails: bool) -> list[Outcome]:
        async with services.database.transaction() as connection:
            outcomes = await retry_runs(services, retries, connection=connection)
            if fails:
                raise RunNotFound
        return outcomes

    with pytest.raises(RunNotFound):
        done(desk.stack, lambda services: scenario(services, fails=True))
    assert desk.attempts([*plain, *kept]) == [1] * 4
    outcomes = done(desk.stack, lambda services: scenario(services, fails=False))
    assert codes(outcomes) == ["200"] * 3 + ["run_not_terminal", "run_not_found", "busy", "attempt_changed"]
    assert desk.attempts([*plain, *kept]) == [2, 2, 1, 2]


def test_what_others_hold_is_busy_in_a_transaction_of_the_callers(desk: Desk) -> None:
    runs = desk.runs(3)

    async def scenario(services: Services) -> list[Outcome]:
        async with services.database.transaction() as connection:
            retries = [replace(desk.retry(run_id), write=None) for run_id in runs]
            return await asyncio.wait_for(retry_runs(services, retries, connection=connection), 1.5)

    with desk.stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", runs[1]):
        outcomes = done(desk.stack, scenario)
    assert codes(outcomes) == ["200", "busy", "200"]
    assert desk.attempts(runs) == [2, 1, 2]


def test_a_quota_refuses_the_last_in_a_transaction_of_the_callers(desk: Desk) -> None:
    runs = desk.runs(5)

    async def scenario(services: Services) -> list[Outcome]:
        async with services.database.transaction() as connection:
            return await retry_runs(services, [desk.retry(run_id) for run_id in runs], connection=connection)

    run_quotas = RunQuotas(None, Policy("waiting", 2, "waiting runs"), None, None)
    outcomes = done(desk.stack, scenario, run_quotas=run_quotas)
    assert codes(outcomes) == ["200"] * 2 + ["quota_exceeded"] * 3
    assert desk.attempts(runs) == [2, 2, 1, 1, 1]


def test_who_asked_is_kept(desk: Desk) -> None:
    bulk, policy = desk.runs(2)
    bulk_retry_id = uuid4()
    organization = desk.client.organization
    by_bulk = Actor(desk.principal.key_id, None, "r", "again", "bulk", bulk_retry_id)
    retries = [
        Retry(bulk, organization, by_bulk, RunRetry(), 1, desk.principal),
        Retry(policy, organization, Actor(by="policy"), RunRetry(), 1),
    ]
    assert codes(done(desk.stack, lambda services: retry_runs(services, retries))) == ["200"] * 2
    for run_id, by, of_bulk in ((bulk, "bulk", bulk_retry_id), (policy, "policy", None)):
        [attempt] = desk.stack.sql("SELECT retried_by AS by, bulk_retry_id FROM run_attempts WHERE run_id = $1", run_id)
        event = desk.stack.sql(
            "SELECT by, bulk_retry_id FROM run_events WHERE run_id = $1 AND event = 'retried'", run_id
        )
        assert [attempt] == event == [{"by": by, "bulk_retry_id": of_bulk}]
