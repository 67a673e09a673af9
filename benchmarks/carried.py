"""What retries carry: secrets and files."""

import base64
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from app.config import MIB
from benchmarks import load
from benchmarks.load import Plan, Pressure
from benchmarks.measure import Case, Group, Round, Sample, Target, figure, rate
from benchmarks.memory import PeakMemory
from benchmarks.world import ORGANIZATION, World, sample

SECRET_BODY = b'{"sensitive_input_values": {"password": "correct horse battery staple"}}'


def file_body(size: int) -> bytes:
    """One new file of so many random bytes."""
    content = base64.b64encode(os.urandom(size)).decode()
    return json.dumps({"file_inputs": [{"filename": "scan.bin", "content": content}]}).encode()


def secret(world: World, pressure: Pressure) -> Group:
    server = world.server
    value = b'{"options": {"cas": 0}, "data": {"password": "correct horse battery staple"}}'
    port = urlsplit(world.bao.address).port
    assert port is not None
    head = "\r\n".join(
        [
            f"POST /v1/secret/data/runs/{ORGANIZATION}/bare/{{id}} HTTP/1.1",
            "Host: 127.0.0.1",
            f"X-Vault-Token: {world.vault_token}",
            "Content-Type: application/json",
            f"Content-Length: {len(value)}\r\n\r\n",
        ]
    )
    have_one: dict[int, list[str]] = {}  # runs whose secret is in Vault, by the connections that they were made with

    def write(pressure: Pressure) -> Sample:
        ids = [str(uuid4()) for _ in range(8000 * int(pressure.seconds + pressure.warmup + 1))]
        return sample(load.run(Plan(port, pressure, head, body=value, ids=ids)), {})

    def first(pressure: Pressure) -> Sample:
        seen = server.retries(pressure, body=SECRET_BODY)
        have_one[pressure.connections] = list(server.sent)
        server.data.finish(server.sent)
        return seen

    def again(pressure: Pressure) -> Sample:
        """The runs that the case before has given one; without a warm-up, since there are no more of them."""
        ids = have_one.pop(pressure.connections)
        return server.retries(replace(pressure, warmup=0, limit=len(ids)), body=SECRET_BODY, ids=ids)

    one = replace(pressure, connections=1)
    return Group(
        "secret",
        "retry with one secret",
        [
            Case("secret", partial(first, pressure), "the run has none yet"),
            Case("replaced", partial(again, pressure), "it has one: the old one is destroyed, which is counted"),
            Case("write", partial(write, pressure), "bare KV v2 write over HTTP"),
            Case("retry", partial(server.retries, pressure), "without a secret"),
            Case("secret 1c", partial(first, one), "one connection"),
            Case("replaced 1c", partial(again, one), "one connection"),
            Case("write 1c", partial(write, one), "one connection"),
            Case("retry 1c", partial(server.retries, one), "one connection"),
        ],
        [
            Target("secret / write", rate("secret", "write"), at_least=0.38),
            Target("replaced / write", rate("replaced", "write")),
            Target("replaced / secret", rate("replaced", "secret")),
            Target("secret / retry", rate("secret", "retry"), beside="PostgreSQL, OpenBao, load; retry: no OpenBao"),
            Target("p50, secret / (write + retry), one connection", _secret_over_parts),
        ],
        beside="PostgreSQL, OpenBao, load; write: OpenBao, load",
    )


def _secret_over_parts(one: Round) -> float:
    return one["secret 1c"].p50 / (one["write 1c"].p50 + one["retry 1c"].p50)


def files(world: World, pressure: Pressure) -> Group:
    server = world.server
    server.retries(replace(pressure, seconds=0.2))  # its usual size, before the first file
    memory = PeakMemory(server.app)
    folder = world.folder / "plain"
    folder.mkdir(exist_ok=True)
    many = pressure.connections

    def upload(body: bytes, count: int, connections: int = 1) -> Sample:
        memory.reset()
        seen = server.retries(Pressure(connections, seconds=60, warmup=0, limit=count), body=body)
        seen.figures["MB/s"] = len(body) * seen.rate / 1e6
        seen.figures["peak growth / body"] = memory.growth() / len(body)
        return seen

    def plain(body: bytes, count: int) -> Sample:
        """What has to be done in any case, in this process."""
        took = []
        for _ in range(count):
            began = time.perf_counter()
            content = base64.b64decode(json.loads(body)["file_inputs"][0]["content"])
            took.append(_write(folder, content, began))
        return _plain_sample(took, body)

    def decode(body: bytes, count: int, threads: int = 1) -> Sample:
        text = json.loads(body)["file_inputs"][0]["content"].encode()

        def one(_: int) -> float:
            began = time.perf_counter()
            return _write(folder, base64.b64decode(text), began)

        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            took = list(pool.map(one, range(count)))
            return _plain_sample(took, body, count / (time.perf_counter() - began))

    kilo, one, large = file_body(1024), file_body(MIB), file_body(25 * MIB)
    return Group(
        "files",
        f"retry with one file, by connections (c); MB/s of the body; plain: {many} threads for {many} connections",
        [
            Case("25 MB", partial(upload, large, 3)),
            Case("25 MB plain", partial(decode, large, 3), "b64decode + write + fsync"),
            Case("25 MB parsed", partial(plain, large, 3), "json.loads + b64decode + write + fsync"),
            Case("1 MB", partial(upload, one, 30)),
            Case("1 MB plain", partial(decode, one, 30), "b64decode + write + fsync"),
            Case(f"1 MB {many}c", partial(upload, one, 150, many)),
            Case(f"1 MB {many}c plain", partial(decode, one, 150, many)),
            Case("1 KB", partial(upload, kilo, 150)),
            Case("1 KB plain", partial(decode, kilo, 150)),
            Case(f"1 KB {many}c", partial(upload, kilo, 500, many)),
            Case(f"1 KB {many}c plain", partial(decode, kilo, 500, many)),
            Case("retry", partial(server.retries, pressure), f"without a file, {many} connections"),
        ],
        [
            Target("25 MB: speed / plain", lambda one: one["25 MB plain"].p50 / one["25 MB"].p50, at_least=0.4),
            Target("25 MB: speed / parsed", lambda one: one["25 MB parsed"].p50 / one["25 MB"].p50),
            Target("25 MB: peak memory growth / body", figure("25 MB", "peak growth / body"), at_most=3.5),
            Target("1 MB: speed / plain", lambda one: one["1 MB plain"].p50 / one["1 MB"].p50),
            Target(f"1 MB: rate / plain, {many} connections", rate(f"1 MB {many}c", f"1 MB {many}c plain")),
            Target(f"1 KB: rate / plain, {many} connections", rate(f"1 KB {many}c", f"1 KB {many}c plain")),
            Target(f"1 KB / retry, {many} connections", rate(f"1 KB {many}c", "retry")),
        ],
        beside="PostgreSQL, load, the disk; plain: the disk",
    )


def _write(folder: Path, content: bytes, began: float) -> float:
    """The file is kept, like the service's: memory that a deleted one gave back is several times cheaper than new."""
    with (folder / uuid4().hex).open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def _plain_sample(took: list[float], body: bytes, rate: float | None = None) -> Sample:
    took = sorted(took)
    middle = took[len(took) // 2]
    rate = rate or 1 / middle
    return Sample(rate, middle * 1000, took[-1] * 1000, {"MB/s": len(body) * rate / 1e6})
