"""Watch a server's memory, and how long others wait for it, while a test sends it too much."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.connections import connect
from tests.support.server import Server

MB = 1_000_000

# How much a server's memory may grow, and how long others may wait: by what is sent without a key, and with one. A server that
# nobody has used yet takes 125 MB.
GROWTH_WITHOUT_KEY = 25 * MB
GROWTH_WITH_KEY = 675 * MB
PAUSE_WITHOUT_KEY = 0.5
PAUSE_WITH_KEY = 1.0


@dataclass
class Seen:
    """What was seen of a server while it was watched."""

    growth: int = 0
    slowest: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def within(self, *, growth: int, pause: float) -> None:
        mean = sum(self.pauses) / max(len(self.pauses), 1)
        print(f"{self.growth / MB:.0f} MB more; health {self.slowest:.3f} s at worst, {mean:.3f} s as a rule")
        assert self.growth < growth
        assert len(self.pauses) > 3
        assert self.slowest < pause


def waits_for_processor(pid: int, thread: int) -> float:
    """For how many seconds this thread was ready and had no processor, since it began; Linux tells."""
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def process_of(server: Server) -> psutil.Process:
    """The one that serves: what started it may still stand above it."""
    processes = [psutil.Process(server.app.pid), *psutil.Process(server.app.pid).children(recursive=True)]
    return max(processes, key=lambda process: process.memory_info().rss)


@contextmanager
def watched(server: Server) -> Iterator[Seen]:
    """How much its memory grows, and how long a probe of its own connection waits for an answer, every few milliseconds.

    What others do with the machine is no pause: the time for which the server's event loop or the probe had no processor is not
    counted.
    """
    seen, stop, process = Seen(), threading.Event(), process_of(server)
    before = process.memory_info().rss

    def memory() -> None:
        while not stop.wait(0.01):
            seen.growth = max(seen.growth, process.memory_info().rss - before)

    def without_processor() -> float:
        own = waits_for_processor(os.getpid(), threading.get_native_id())
        return waits_for_processor(process.pid, process.pid) + own

    def probe() -> None:
        while not stop.wait(0.02):
            began, waited = time.monotonic(), without_processor()
            try:
                with connect(server) as connection:
                    connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                    answered = connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            except OSError:
                answered = False
            took = time.monotonic() - began - (without_processor() - waited)
            seen.pauses.append(max(took, 0.0) if answered else 60.0)
            seen.slowest = max(seen.pauses)

    threads = [threading.Thread(target=memory), threading.Thread(target=probe)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # the attack runs in this process too, and must not hold up the probe
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()


def connected(server: Server, port: int | None) -> int:
    """How many connections the server has to this port, whoever opened them."""
    return sum(bool(one.raddr) and one.raddr.port == port for one in process_of(server).net_connections("tcp"))
