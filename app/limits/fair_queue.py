"""A queue of tasks that wait for something scarce. Parties take turns: the crowd of one keeps no other party waiting.

The queue knows names of parties and numbers. Its owner decides who may be served, and serves.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

Wish = TypeVar("Wish")
Turn = asyncio.Future[None]


class FairQueue(Generic[Wish]):
    """Waiting tasks, by party, each with its wish. The party that was served longest ago comes first."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[Turn, Wish]] = {}

    def __contains__(self, party: str) -> bool:
        return party in self._waiting

    def __iter__(self) -> Iterator[str]:
        """The parties that wait, in the order of their turns."""
        return iter(self._waiting)

    def of(self, party: str) -> Mapping[Turn, Wish]:
        """The turns of a waiting party and their wishes, in the order in which they came."""
        return self._waiting[party]

    async def wait(self, party: str, wish: Wish, seconds: float, give_back: Callable[[], None]) -> None:
        """Wait until the owner serves this turn. Raises TimeoutError after `seconds`.

        `give_back` is called if the turn is served in the very moment when its task gives up.
        """
        turn: Turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(party, {})[turn] = wish
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException:
            if turn.cancelled():
                self._forget(party, turn)
            else:
                give_back()
            raise

    def serve(self, party: str, turn: Turn) -> bool:
        """Let a turn go on, and put its party behind the others; False: its task has given up meanwhile."""
        self._forget(party, turn)
        if party in self._waiting:
            self._waiting[party] = self._waiting.pop(party)
        if turn.cancelled():
            return False
        turn.set_result(None)
        return True

    def _forget(self, party: str, turn: Turn) -> None:
        turns = self._waiting.get(party)
        if turns is not None:
            turns.pop(turn, None)
            if not turns:
                del self._waiting[party]
