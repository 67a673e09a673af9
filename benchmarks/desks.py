"""Executors that do nothing but their part of the protocol, in a process of their own, one for each machine.

The next run by long poll, `running` with a claim, an upload, `success` with outputs; and again. A plan comes in on standard
input (pickled by `work` below), the outcome goes out as JSON. What an HTTP library costs would be measured with the service.
"""

import asyncio
import base64
import json
import pickle
import sys
import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import orjson
import uvloop

from benchmarks.load import LoadError, Outcome, Pressure, apart

FIELDS = "fields=attempt,assignment,assigned_machine_id"
CONTENT = base64.b64encode(b"receipt " * 128).decode()
HISTORY = [{"role": "assistant", "content": "done " * 800}]


@dataclass(frozen=True)
class Desks:
    """Where they work, and how long: one of them for each machine, for `warmup` + `seconds` of the pressure."""

    port: int
    key: str
    machines: list[str]
    pressure: Pressure


def work(plan: Desks) -> Outcome:
    """Let them work. Raises LoadError for a reply that is not as it should be."""
    return apart("benchmarks.desks", plan)


class _Desk:
    """One machine's executor and its connection."""

    def __init__(self, plan: Desks, machine_id: str, ended: list[tuple[float, float]]) -> None:
        self._plan = plan
        self._machine_id = machine_id
        self._ended = ended  # of all desks: when each cycle ended, and how long it took
        self._claim = str(uuid4())

    async def work(self, until: float) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._plan.port, limit=2**20)
        began = time.perf_counter()
        while time.perf_counter() < until:
            run = await self._next()
            about = {"attempt": run["attempt"], "assignment": run["assignment"], "claim": self._claim}
            path = f"/v1/runs/{run['id']}"
            await self._call("PATCH", path, {"status": "running"} | about)
            file = {"filename": "receipt.txt", "content": CONTENT, "content_type": "text/plain"}
            upload = file | {"run_id": run["id"], "attachment_type": "output"} | about
            await self._call("POST", "/v1/run-attachments", upload, 201)
            output = {"output_data": {"receipt": "R-1"}, "run_message_history": HISTORY}
            await self._call("PATCH", path, {"status": "success"} | output | about)
            now = time.perf_counter()
            self._ended.append((now, now - began))
            began = now
        self._writer.close()

    async def _next(self) -> dict[str, Any]:
        query = f"machine_id={self._machine_id}&status=scheduling&wait=30&limit=10&{FIELDS}"
        while True:
            for run in (await self._call("GET", f"/v1/runs?{query}"))["items"]:
                if run["assigned_machine_id"] == self._machine_id:
                    found: dict[str, Any] = run
                    return found

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None, expect: int = 200) -> Any:
        content = b"" if body is None else orjson.dumps(body)
        head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {self._plan.key}"]
        if content:
            head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        self._writer.write("\r\n".join([*head, "", ""]).encode() + content)
        answered = await self._reader.readuntil(b"\r\n\r\n")
        lowered = answered.lower()
        length = int(lowered.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0])
        reply = await self._reader.readexactly(length)
        if int(answered[9:12]) != expect:
            raise LoadError(f"expected {expect} for {method} {path}, got {answered!r} {reply!r}")
        if b"\r\nconnection: close" in lowered:
            self._writer.close()
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._plan.port, limit=2**20)
        return orjson.loads(reply)


async def _work(plan: Desks) -> dict[str, Any]:
    began, used = time.perf_counter(), time.process_time()
    counted_from = began + plan.pressure.warmup
    until = counted_from + plan.pressure.seconds
    ended: list[tuple[float, float]] = []
    async with asyncio.timeout(until - began + 30), asyncio.TaskGroup() as desks:
        for machine_id in plan.machines:
            desks.create_task(_Desk(plan, machine_id, ended).work(until))
    busy = (time.process_time() - used) / (time.perf_counter() - began)
    took = sorted(took for at, took in ended if counted_from < at <= until)
    if not took:
        raise LoadError("no cycle ended after the warm-up: more time is needed")
    return {
        "sent": len(ended),
        "requests": len(took),
        "seconds": plan.pressure.seconds,
        "p50": took[len(took) // 2] * 1000,
        "p99": took[min(len(took) - 1, len(took) * 99 // 100)] * 1000,
        "client_busy": busy,
        "reply_bytes": 0,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(_work(pickle.load(sys.stdin.buffer)))))
