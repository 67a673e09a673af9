"""One call for all that ask at the same time: counts of lists, checks of the stores and the numbers of /metrics use it."""

import asyncio

import pytest

from app.stores.single_flight import SingleFlight


def test_all_who_ask_at_once_share_a_call_and_one_that_gives_up_does_not_end_it() -> None:
    async def main() -> None:
        flight: SingleFlight[int] = SingleFlight()
        calls, gate = [0], asyncio.Event()

        async def call() -> int:
            calls[0] += 1
            await gate.wait()
            return calls[0]

        first, second, third = (asyncio.create_task(flight.join(call)) for _ in range(3))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        assert (flight.is_under_way, flight.last) == (True, None)
        gate.set()
        assert [await second, await third] == [1, 1]
        assert [flight.last, await flight.again(), flight.is_under_way] == [1, 1, False]
        assert await flight.join(call) == 2

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_call_that_fails_fails_for_all_and_is_tried_again() -> None:
    async def main() -> None:
        flight: SingleFlight[int] = SingleFlight()

        async def fail() -> int:
            raise ValueError

        async def succeed() -> int:
            return 1

        failed = await asyncio.gather(*(flight.join(fail) for _ in range(2)), return_exceptions=True)
        assert [type(one) for one in failed] == [ValueError, ValueError]
        assert flight.last is None
        with pytest.raises(ValueError):  # noqa: PT011 - there is no text
            await flight.again()
        assert await flight.join(succeed) == 1

    asyncio.run(asyncio.wait_for(main(), 10))
