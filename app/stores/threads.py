"""What the two outside systems (secrets, files) share: names never used before, and threads for calls that block."""

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from time import perf_counter
from typing import Literal, TypeVar
from uuid import UUID, uuid4

from app.errors import Unavailable
from app.telemetry import metrics, tracing

T = TypeVar("T")

_ORGANIZATION = re.compile(r"[A-Za-z0-9_-]{1,64}")


def fresh_name(organization_id: str, owner_id: UUID) -> str:
    """`<organization>/<run or other owner>/<uuid4>`: never used before, and limited to one organization by its first part.

    Raises ValueError for an id that is none of an organization.
    """
    if not _ORGANIZATION.fullmatch(organization_id):
        raise ValueError("an organization id is 1 to 64 of A-Z a-z 0-9 _ -")
    return f"{organization_id}/{owner_id}/{uuid4()}"


@contextmanager
def measured(store: Literal["vault", "files"], operation: str) -> Iterator[None]:
    """Around one call, with its wait for a slot."""
    began, outcome = perf_counter(), "ok"
    try:
        if tracing.tracer is None:
            yield
        else:
            with tracing.store_call(store, operation):
                yield
    except Unavailable:
        outcome = "unavailable"
        raise
    except BaseException:
        outcome = "failed"
        raise
    finally:
        metrics.store_calls.observe(perf_counter() - began, store, operation, outcome)


class Slots:
    """Threads of their own for one kind of call, so that a frozen system holds up these callers and no others."""

    def __init__(self, name: str, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, call: Callable[[], T], *, wait: float, patience: float) -> T:
        """Raises TimeoutError after `wait` seconds without a free slot, or after `patience` seconds without a result.

        A thread cannot be interrupted: a call that was given up keeps its slot until it really ends.
        """
        async with asyncio.timeout(wait):
            await self._free.acquire()
        try:
            # The context carries the request id into what the call logs.
            future = self._threads.submit(copy_context().run, call)
        except BaseException:
            self._free.release()
            raise
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.release))
        async with asyncio.timeout(patience):
            return await asyncio.wrap_future(future)

    async def close(self) -> None:
        """Wait for the calls under way; each of them is bounded by its own timeouts."""
        await asyncio.to_thread(self._threads.shutdown)
