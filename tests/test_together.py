"""Calls that meet go together: each gets its own answer exactly once, whatever happens to the others."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.stores import together
from app.stores.together import Together
from tests.support.stored_state import SOAK


class Poison(Exception):
    """Spoils every set that it is in."""


class Lost(Exception):
    """Nobody knows what has become of the set."""


@dataclass
class Work:
    """What a set does: the answer to a number is its double. It stands still while a gate is closed."""

    sets: list[list[int]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    poison: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    ticks: int = 1

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.sets.append(list(items))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for _ in range(self.ticks):
                await asyncio.sleep(0)
            if not self.lost.isdisjoint(items):
                raise Lost
            if not self.poison.isdisjoint(items):
                raise Poison
            return [2 * item for item in items]
        finally:
            self.under_way -= 1


def gather() -> Together[int, int]:
    return Together("test", lambda error: isinstance(error, Poison))


@dataclass(frozen=True)
class Call:
    """One of many: when it comes, of which party, with which mark, and after how many turns of the loop its caller leaves."""

    wait: int
    party: int
    mark: int | None
    leaves: int | None
    is_poison: bool
    is_lost: bool


CALLS = st.lists(
    st.builds(
        Call,
        st.integers(0, 6),
        st.integers(0, 3),
        st.none() | st.integers(0, 3),
        st.none() | st.integers(0, 6),
        st.integers(0, 9).map(lambda chance: chance == 0),
        st.integers(0, 19).map(lambda chance: chance == 0),
    ),
    max_size=200,
)


@settings(max_examples=1000 if SOAK else 40, deadline=None)
@given(CALLS, st.integers(1, 4), st.booleans())
def test_each_call_gets_its_own_answer_exactly_once(calls: list[Call], ticks: int, closes: bool) -> None:
    async def scenario() -> None:
        joined = gather()
        work = Work(
            poison=frozenset(n for n, call in enumerate(calls) if call.is_poison),
            lost=frozenset(n for n, call in enumerate(calls) if call.is_lost),
            ticks=ticks,
        )

        async def one(number: int, call: Call) -> int:
            for _ in range(call.wait):
                await asyncio.sleep(0)
            marks = () if call.mark is None else (call.mark,)
            return await joined(work, number, call.party, marks)

        async def caller(number: int, call: Call) -> int | BaseException:
            task = asyncio.create_task(one(number, call))
            if call.leaves is not None:
                for _ in range(call.wait + call.leaves):
                    await asyncio.sleep(0)
                task.cancel()
            return (await asyncio.gather(task, return_exceptions=True))[0]

        answers = await asyncio.gather(*(caller(number, call) for number, call in enumerate(calls)))
        if closes:
            await asyncio.wait_for(joined.close(), 5)
        for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
            alone_only = [members for members in work.sets if number in members]
            if isinstance(answer, asyncio.CancelledError):
                assert call.leaves is not None
            elif isinstance(answer, Lost):
                assert any(not work.lost.isdisjoint(members) for members in alone_only)
            elif isinstance(answer, Poison):
                assert call.is_poison, "only the one to blame is told"
            else:
                assert answer == 2 * number
                assert not call.is_poison
                assert not call.is_lost
            # At most once with others, and once more alone if that set failed.
            assert len(alone_only) <= 2
            assert all(len(members) == 1 for members in alone_only[1:])
        for members in work.sets:
            assert len(members) <= together.MOST
            marks = [calls[number].mark for number in members if calls[number].mark is not None]
            assert max(Counter(marks).values(), default=0) <= 1, "two calls with one mark in one set"

    asyncio.run(scenario())


def run(scenario: Callable[[Together[int, int], Work], Awaitable[Any]]) -> Work:
    work = Work(ticks=3)

    async def main() -> None:
        await asyncio.wait_for(scenario(gather(), work), 10)

    asyncio.run(main())
    return work


def test_the_first_call_does_not_wait_for_company() -> None:
    async def scenario(joined: Together[int, int], work: Work) -> None:
        calls = [asyncio.create_task(joined(work, 0, "a"))]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert work.under_way == 1
        calls += [asyncio.create_task(joined(work, number, "a")) for number in range(1, 5)]
        assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8]

    assert run(scenario).sets == [[0], [1, 2, 3, 4]]


def test_a_set_has_a_bound_and_parties_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "SLOW_SECONDS", 10)

    async def scenario(joined: Together[int, int], work: Work) -> None:
        first = asyncio.create_task(joined(work, -1, "crowd"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        crowd = [asyncio.create_task(joined(work, number, "crowd")) for number in range(500)]
        quiet = [asyncio.create_task(joined(work, 1000 + number, f"quiet {number}")) for number in range(3)]
        await asyncio.gather(first, *crowd, *quiet)

    work = run(scenario)
    assert {1000, 1001, 1002} <= set(work.sets[1]), "nobody's crowd keeps another waiting for more than one set"
    assert max(map(len, work.sets)) == together.MOST
    assert work.most_under_way == 1


def test_what_takes_long_is_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "SLOW_SECONDS", 0.01)

    async def scenario(joined: Together[int, int], work: Work) -> None:
        gate = asyncio.Event()

        async def stuck(items: Sequence[int]) -> list[int]:
            await gate.wait()
            return [2 * item for item in items]

        held = asyncio.create_task(joined(stuck, 1, "a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await joined(work, 2, "b") == 4
        assert not held.done()
        gate.set()
        assert await held == 2

    run(scenario)


def test_it_works_in_no_callers_context() -> None:
    from app.stores.pool import party

    async def scenario(joined: Together[int, int], work: Work) -> None:
        seen = []

        async def look(items: Sequence[int]) -> list[int]:
            seen.append(party.get())
            return list(items)

        party.set("somebody")
        await joined(look, 1, "a")
        assert seen == [together.PARTY]
        assert party.get() == "somebody"

    run(scenario)


def test_calls_that_wait_end_with_their_loop() -> None:
    async def main() -> list[asyncio.Task[int]]:
        joined = gather()

        async def for_ever(items: Sequence[int]) -> list[int]:
            await asyncio.Event().wait()
            return list(items)

        calls = [asyncio.create_task(joined(for_ever, number, "a")) for number in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return calls

    calls = asyncio.run(main())
    assert all(call.cancelled() for call in calls)
