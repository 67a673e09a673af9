"""The queue in which requests wait for memory and for connections: turns of parties, whatever comes and goes."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from app.limits.fair_queue import FairQueue

PARTIES = "abc"

# A task comes, the queue serves the party whose turn it is, or the oldest task gives up.
STEPS = st.lists(st.sampled_from([*PARTIES, "serve", "give up", "serve and give up"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_each_party_is_served_in_turn_and_nothing_is_lost(steps: list[str]) -> None:
    asyncio.run(asyncio.wait_for(_follow(steps), 10))


async def _follow(steps: list[str]) -> None:
    queue: FairQueue[int] = FairQueue()
    served: list[int] = []
    returned: list[int] = []
    tasks: dict[int, asyncio.Task[None]] = {}
    waiting: dict[str, list[int]] = {}  # a plain model: the parties in the order of their turns

    def serve() -> int | None:
        party = next(iter(queue), None)
        assert party == next(iter(waiting), None)
        if party is None:
            return None
        turn, number = next(iter(queue.of(party).items()))
        assert queue.serve(party, turn)
        assert number == waiting[party].pop(0)
        rest = waiting.pop(party)
        if rest:
            waiting[party] = rest
        served.append(number)
        return number

    for number, step in enumerate(steps):
        if step in PARTIES:
            tasks[number] = asyncio.create_task(
                queue.wait(step, number, 60, lambda number=number: returned.append(number))  # type: ignore[misc]
            )
            waiting.setdefault(step, []).append(number)
        elif step == "give up" and waiting:
            party = next(reversed(waiting))
            gone = waiting[party].pop(0)
            tasks[gone].cancel()
            if not waiting[party]:
                del waiting[party]
        elif step.startswith("serve"):
            number_served = serve()
            if number_served is not None and step != "serve":
                tasks[number_served].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert list(queue) == list(waiting)
        assert [[*queue.of(party).values()] for party in queue] == list(waiting.values())
    while serve() is not None:
        pass
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    done = [number for number, task in tasks.items() if not task.cancelled()]
    assert sorted(served) == sorted([*done, *returned])


def test_a_task_waits_no_longer_than_it_was_told() -> None:
    async def main() -> list[str]:
        queue: FairQueue[None] = FairQueue()
        try:
            await queue.wait("a", None, 0.01, lambda: None)
        except TimeoutError:
            return list(queue)
        raise AssertionError("it was served")

    assert asyncio.run(main()) == []
