"""The load generator: HTTP/1.1 over raw sockets, in a process of its own, one request at a time on each connection.

A plan comes in on standard input (pickled by `run` below), the outcome goes out as JSON. One request costs this process
20 to 30 us, which is why a framework's client is not used; `client_busy` says how much of a core it needed.
"""

import asyncio
import json
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop

PATIENCE = 30.0  # seconds for the last replies


@dataclass(frozen=True)
class Pressure:
    """How hard and how long. Ends after `warmup` + `seconds`, or after `limit` requests if that is sooner.

    What ends in the warm-up is not counted.
    """

    connections: int = 16
    seconds: float = 2.0
    warmup: float = 0.5
    limit: int | None = None
    several: tuple[int, ...] = (1, 4, 16, 64)  # numbers of connections, where a group varies them


@dataclass(frozen=True)
class Plan:
    """What to send. `{id}` in the head is replaced by the next id, until there are no more; without ids the request is
    repeated as it is."""

    port: int
    pressure: Pressure
    head: str
    expect: int = 200
    body: bytes = b""
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Times in milliseconds. `sent` includes the warm-up; `requests` is what was counted, in `seconds`."""

    sent: int
    requests: int
    seconds: float
    p50: float
    p99: float
    client_busy: float
    reply_bytes: int


class LoadError(Exception):
    """The load could not be applied as planned: another status than expected, or a lost connection."""


def run(plan: Plan) -> Outcome:
    """Apply it from a process of its own. Raises LoadError."""
    return apart("benchmarks.load", plan)


def apart(module: str, plan: object) -> Outcome:
    """What a module of ours makes of a plan, which it is given on standard input. Raises LoadError."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=pickle.dumps(plan),
        capture_output=True,
        cwd=Path(__file__).resolve().parent.parent,
        check=False,
    )
    if done.returncode != 0:
        raise LoadError(done.stderr.decode().strip().rpartition("\n")[2])
    return Outcome(**json.loads(done.stdout))


class _Load:
    """The requests of a plan and what became of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sent = 0
        self.reply_bytes = 0
        self.ended: list[tuple[float, float]] = []  # when, and how long it took
        self.problem: str | None = None
        self.open = plan.pressure.connections
        self.over = asyncio.Event()
        self.stop_at = float("inf")
        self._parts = plan.head.encode().split(b"{id}")
        self._ids = [one.encode() for one in plan.ids]
        self._most = min(plan.pressure.limit or sys.maxsize, len(self._ids) or sys.maxsize)

    def next(self) -> bytes | None:
        """The head of the next request, or None when there is no more to send."""
        if self.problem or self.sent >= self._most or time.perf_counter() >= self.stop_at:
            return None
        position, self.sent = self.sent, self.sent + 1
        return self._ids[position].join(self._parts) if self._ids else self._parts[0]

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem
        self.over.set()

    def closed(self) -> None:
        self.open -= 1
        if self.open == 0:
            self.over.set()


class _Connection(asyncio.Protocol):
    """Sends, waits for the whole reply, sends the next."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._began = 0.0
        self._head = b""
        self._missing = -1  # bytes of the reply that are still to come; -1: its head is not complete
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._send()

    def _send(self) -> None:
        head = self._load.next()
        if head is None:
            self._closing = True
            self._transport.close()
            self._load.closed()
            return
        self._head, self._missing = b"", -1
        self._began = time.perf_counter()
        body = self._load.plan.body
        if len(body) < 65536:
            self._transport.write(head + body)
        else:
            self._transport.writelines([head, body])

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            lowered = self._head[:end].lower()
            at = lowered.find(b"\r\ncontent-length:")
            if at < 0:
                self._load.fail("a reply without content-length")
                return
            length = int(lowered[at + 17 :].split(b"\r\n", 1)[0])
            self._closing = b"\r\nconnection: close" in lowered
            self._load.reply_bytes = end + 4 + length
            self._missing = self._load.reply_bytes - len(self._head)
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._finished()

    def _finished(self) -> None:
        now = time.perf_counter()
        self._load.ended.append((now, now - self._began))
        if int(self._head[9:12]) != self._load.plan.expect:
            self._load.fail(f"expected {self._load.plan.expect}, got {self._head!r}")
        elif self._closing:  # the server ends this connection: the next request opens another, as a client would
            self._transport.close()
            self._task = asyncio.get_running_loop().create_task(_connect(self._load))
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._load.fail(f"the server closed a connection: {exc}")


async def _connect(load: _Load) -> None:
    try:
        await asyncio.get_running_loop().create_connection(lambda: _Connection(load), "127.0.0.1", load.plan.port)
    except OSError as problem:
        load.fail(str(problem))


async def _apply(plan: Plan) -> dict[str, Any]:
    load = _Load(plan)
    began = time.perf_counter()
    counted_from = began + plan.pressure.warmup
    load.stop_at = counted_from + plan.pressure.seconds
    used = time.process_time()
    for _ in range(plan.pressure.connections):
        await _connect(load)
    try:
        async with asyncio.timeout(plan.pressure.warmup + plan.pressure.seconds + PATIENCE):
            await load.over.wait()
    except TimeoutError:
        load.fail(f"{load.open} connections got no answer for {PATIENCE:.0f} s")
    if load.problem:
        raise LoadError(load.problem)
    used, ran = time.process_time() - used, time.perf_counter() - began
    counted_to = min(load.stop_at, load.ended[-1][0])
    took = sorted(took for ended, took in load.ended if counted_from < ended <= counted_to)
    if not took:
        raise LoadError("nothing ended after the warm-up: more time or more ids are needed")
    return {
        "sent": load.sent,
        "requests": len(took),
        "seconds": counted_to - counted_from,
        "p50": took[len(took) // 2] * 1000,
        "p99": took[min(len(took) - 1, len(took) * 99 // 100)] * 1000,
        "client_busy": used / ran,
        "reply_bytes": load.reply_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(_apply(pickle.load(sys.stdin.buffer)))))
