"""The memory budget of a process: bytes that requests have, between their first byte and the last one of their reply.

All requests have one budget. A party may use half of it, so that other parties find room. A request that finds no room waits
for TURN_SECONDS at most. This module knows names of parties and numbers, not what they stand for.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

from app.errors import Overloaded
from app.limits.fair_queue import FairQueue
from app.limits.quotas import AtOnce, exceeded

T = TypeVar("T")

# Smaller amounts are not counted: the number of connections limits them.
FREE_BYTES = 16 * 1024
# How long a request waits for its turn.
TURN_SECONDS = 5.0


# A reply is in memory as it came from the database, as rows, and as the bytes that are made of them.
COPIES = 3


class NoRoom(Overloaded):
    """There is no room now for `count` bytes. A caller that holds no connection to the database may wait for room."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class Budget:
    """`limit` for all parties, and half of it for what each of them begins."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._used_by: dict[str, int] = {}
        self._waiting: FairQueue[tuple[int, int]] = FairQueue()  # how much each wants, and how much it holds

    def reservation(self, party: str) -> "Reservation":
        """The reservation of a request of this party, empty at first."""
        return Reservation(self, party)

    def fits(self, party: str, count: int, held: int) -> bool:
        """Whether a request of this party, which holds `held`, may have so much more now.

        A party's only request may have all; several share half. A quarter is kept for requests that have begun: else all of
        them could wait for each other.
        """
        own = self._used_by.get(party, 0)
        if own > held and own + count > self.limit // 2:
            return False
        return self.used + count <= (self.limit if held or not self.used else self.limit * 3 // 4)

    def add(self, party: str, count: int) -> None:
        """A negative count gives back."""
        self.used += count
        own = self._used_by.get(party, 0) + count
        if own:
            self._used_by[party] = own
        else:
            self._used_by.pop(party, None)
        if count < 0:
            self._serve()

    async def reserve(self, party: str, count: int, held: int) -> None:
        """Add it, as soon as there is room. Raises Overloaded when there is none in time."""
        if self.fits(party, count, held):
            self.add(party, count)
            return
        try:
            await self._waiting.wait(party, (count, held), TURN_SECONDS, partial(self.add, party, -count))
        except TimeoutError:
            raise Overloaded from None

    def _serve(self) -> None:
        """Let waiting requests go on: the parties in turns, and of each party the first request that fits."""
        served = True
        while served:
            served = False
            for party in list(self._waiting):
                wishes = self._waiting.of(party)
                turn = next((one for one, wish in wishes.items() if self.fits(party, *wish)), None)
                if turn is None:
                    continue
                served = True
                count, _ = wishes[turn]
                if self._waiting.serve(party, turn):
                    self.add(party, count)


class Reservation:
    """The bytes of the budget that one request has.

    Four verbs: `reserve` waits for room, `try_reserve` does not wait, `charge` counts what is in memory already, and `release`
    gives everything back.
    """

    __slots__ = ("_budget", "held", "meters", "party")

    def __init__(self, budget: Budget, party: str) -> None:
        self._budget = budget
        self.party = party  # may be changed while the reservation is empty
        self.held = 0
        self.meters: Sequence[tuple[AtOnce, object]] = ()  # quotas for which it counts; changed while nothing is held

    async def reserve(self, count: int) -> None:
        """Have `count` bytes in all, at most the whole budget; wait up to TURN_SECONDS for room. Gives nothing back.

        Raises Overloaded and QuotaExceeded.
        """
        more = min(count, self._budget.limit) - self.held
        if more <= 0:
            return
        self._check_quotas(more)
        self._meter(more)  # while it waits, too
        try:
            await self._budget.reserve(self.party, more, self.held)
        except BaseException:
            self._meter(-more)
            raise
        self.held += more

    def try_reserve(self, count: int) -> None:
        """As `reserve`, without waiting. Raises NoRoom and QuotaExceeded."""
        more = min(count, self._budget.limit) - self.held
        if more <= 0:
            return
        self._check_quotas(more)
        if not self._budget.fits(self.party, more, self.held):
            raise NoRoom(count)
        self._budget.add(self.party, more)
        self._meter(more)
        self.held += more

    def _check_quotas(self, more: int) -> None:
        for meter, party in self.meters:
            if (standing := meter.refusal(party, more, self.held)) is not None:
                raise exceeded(standing)

    def _meter(self, count: int) -> None:
        for meter, party in self.meters:
            meter.add(party, count)

    def charge_if_it_fits(self, count: int) -> bool:
        """As `charge`, if there is room; whether there was. Quotas are not asked."""
        fits = count <= self.held or self._budget.fits(self.party, count - self.held, self.held)
        if fits:
            self.charge(count)
        return fits

    def has_room_for(self, count: int) -> bool:
        """Whether there is room for `count` bytes in all, of a body that has come. Its party's half does not count."""
        return self._budget.used + count - self.held <= self._budget.limit

    def charge(self, count: int) -> None:
        """Have `count` bytes in all, whether there is room for them or not."""
        more = count - self.held
        if more > 0:
            self._budget.add(self.party, more)
            self._meter(more)
            self.held += more

    def release(self) -> None:
        """Give everything back."""
        if self.held:
            self._budget.add(self.party, -self.held)
            self._meter(-self.held)
            self.held = 0


# The reservation of the request that the current task answers.
current: ContextVar[Reservation | None] = ContextVar("reservation", default=None)


def charge_or_refuse(count: int) -> None:
    """The current request has `count` bytes in all, which are in memory already. Raises Overloaded if there is no room."""
    own = current.get()
    if own is not None and count > own.held:
        if not own.has_room_for(count):
            raise Overloaded
        own.charge(count)


def held() -> int:
    """How many bytes the current request has reserved."""
    own = current.get()
    return 0 if own is None else own.held


def reserve_reply(octets: int, *, beside: int = 0) -> None:
    """Before a reply of `octets` bytes of JSON is read from the database. Raises NoRoom and QuotaExceeded.

    `beside`: bytes that the request has reserved already, for another part of its reply.
    """
    own = current.get()
    if own is not None and COPIES * octets > FREE_BYTES:
        own.try_reserve(beside + COPIES * octets)


async def with_room(read: Callable[[], Awaitable[T]]) -> T:
    """The result of `read`, which is called once more after a wait if it found no room. It holds no connection while it waits.

    Raises QuotaExceeded, and Overloaded when there is no room within TURN_SECONDS.
    """
    try:
        return await read()
    except NoRoom as missing:
        count = missing.count  # not the exception: with its frames it would keep the rows in memory
    await reserve(count)
    return await read()


async def reserve(count: int, *, party: str | None = None) -> None:
    """Wait until the current request has `count` bytes in all. Raises Overloaded if there is no room in time, QuotaExceeded.

    `party` is counted for a request without a key that has nothing yet.
    """
    own = current.get()
    if own is not None and count > FREE_BYTES:
        if party is not None and not own.held:
            own.party = party
        await own.reserve(count)
