"""The pool of connections to PostgreSQL: who gets the next one when there are not enough."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import asyncpg
import pytest

from app.stores.pool import CHEAP_SECONDS, Cost, Pool, party
from tests.support.client import Client
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import until

CONNECTIONS = 4


# --- through the service ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Server]:
    """Few connections, so that a few requests use them all."""
    started = start_server(stack, DATABASE_POOL_SIZE=CONNECTIONS)
    yield started
    started.app.stop()


def test_organizations_take_turns_and_one_that_is_alone_may_use_all(stack: Stack, api: Client, foreign: Client) -> None:
    """Each of the 8 requests holds its connection until `lock_timeout`, 2 s: in order of arrival, the other
    organization's would come after the last of them, later than DATABASE_TIMEOUT_SECONDS."""
    run_id, other_id = api.run()["id"], foreign.run()["id"]
    with (
        stack.held("SELECT FROM runs WHERE id = $1 FOR UPDATE", run_id),
        ThreadPoolExecutor(2 * CONNECTIONS) as many,
    ):
        for _ in range(2 * CONNECTIONS):
            many.submit(api.patch, f"/v1/runs/{run_id}", json={})
        until(lambda: stack.waiting() == CONNECTIONS, what="the use of all connections by one organization")
        foreign.get_run(other_id)
        assert stack.waiting() > 0, "it came after all that the first organization had asked before"


# --- the pool alone ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def pool_of(stack: Stack, size: int, seconds: float = 10) -> AsyncIterator[Pool]:
    pool = Pool(lambda: asyncpg.connect(stack.postgres.url), size, seconds)
    try:
        yield pool
    finally:
        pool.close()
        await asyncio.sleep(0)


def test_the_party_with_the_fewest_connections_is_next(stack: Stack) -> None:
    async def scenario() -> list[str]:
        got: list[str] = []
        using: dict[str, list[object]] = {name: [] for name in "abc"}

        async def ask(name: str) -> None:
            party.set(name)
            using[name].append(await pool.acquire())
            got.append(name)

        async def release(name: str) -> None:
            pool.release(using[name].pop())
            await asyncio.sleep(0)  # until whoever is next has it

        async with pool_of(stack, 2) as pool:
            await asyncio.gather(ask("a"), ask("a"))
            waits = []
            for name in "aaabbc":
                waits.append(asyncio.create_task(ask(name)))
                await asyncio.sleep(0)
            for name in "abcaba":
                await release(name)
            await asyncio.gather(*waits)
        return got

    # b and c have none while a has one; then b, which was served before c; then a has none, and b one.
    assert "".join(asyncio.run(scenario())) == "aa" + "bcbaaa"


def most_at_once(stack: Stack, *, others_ask: bool, seconds: float = 0.1, others_seconds: float = 0.001) -> int:
    """How many of 8 connections a crowd uses at once after a while, each time for so many seconds."""

    async def scenario() -> int:
        using = most = 0
        async with pool_of(stack, 8) as pool:

            async def use(name: str, held: float, end: float) -> None:
                nonlocal using, most
                party.set(name)
                while (now := time.monotonic()) < end:
                    connection = await pool.acquire()
                    if name == "crowd":
                        using += 1
                        if now > end - 0.5:
                            most = max(most, using)
                    await asyncio.sleep(held)
                    using -= name == "crowd"
                    pool.release(connection)
                    await asyncio.sleep(0.01 if name != "crowd" else 0)

            end = time.monotonic() + 1.2
            await asyncio.gather(
                *(use("crowd", seconds, end) for _ in range(6)),
                *(use("other", others_seconds, end) for _ in range(others_ask)),
                use("loop of ours", 0.001, end),
            )
            assert pool.used == 0
        return most

    return asyncio.run(scenario())


def test_costly_statements_of_one_party_take_turns_while_others_ask(stack: Stack) -> None:
    assert most_at_once(stack, others_ask=True) == 1


def test_a_party_that_is_alone_may_use_all_connections(stack: Stack) -> None:
    """Our own loops are no others."""
    assert most_at_once(stack, others_ask=False) == 6


def test_nobody_is_limited_when_the_database_is_slow_for_all(stack: Stack) -> None:
    assert most_at_once(stack, others_ask=True, others_seconds=0.1) == 6


def test_short_statements_are_not_limited_and_hide_no_long_ones() -> None:
    cost = Cost()
    for number in range(1000):
        cost.add(0.001, number / 1000)
    assert cost.seconds < CHEAP_SECONDS
    for number in range(10):
        cost.add(0.5, 1 + number)
        for part in range(100):
            cost.add(0.001, 1 + number + part / 100)
    assert cost.seconds > 0.3
    cost.add(0.001, 60)
    assert cost.seconds < CHEAP_SECONDS, "what it did long ago says nothing of what it does now"


def test_whoever_gives_up_leaves_the_turn_to_the_next(stack: Stack) -> None:
    async def scenario() -> None:
        async with pool_of(stack, 1, seconds=0.1) as pool:
            held = await pool.acquire()
            with pytest.raises(TimeoutError):
                await pool.acquire()
            waits = [asyncio.create_task(pool.acquire()) for _ in range(3)]
            await asyncio.sleep(0)
            waits[0].cancel()  # before its turn
            pool.release(held)
            waits[1].cancel()  # it has just been given the turn
            assert await waits[2] is held
            pool.release(held)
            assert await pool.acquire() is held  # and nobody's turn is lost
            pool.release(held)

    asyncio.run(scenario())


def test_a_connection_that_cannot_be_made_costs_no_turn(stack: Stack) -> None:
    async def scenario() -> None:
        failures = 3

        async def fails_at_first() -> object:
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError
            return await asyncpg.connect(stack.url)

        pool = Pool(fails_at_first, 1, 1)
        for _ in range(3):
            with pytest.raises(OSError):  # noqa: PT011 - it has no message
                await pool.acquire()
        pool.release(await pool.acquire())
        pool.close()

    asyncio.run(scenario())
