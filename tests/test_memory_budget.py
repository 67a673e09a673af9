"""The memory budget: large bodies and large replies take turns, and the memory of the process is watched meanwhile.

Each attack is scaled to a few seconds, and to many times what the limit lets through: without the limit the test fails.
"""

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from uuid import uuid4

import pytest

from tests.support.client import Client
from tests.support.connections import (
    at_once,
    connect,
    get,
    post,
    readable,
    send_while_taken,
    send_whole,
)
from tests.support.server import Server, start_server
from tests.support.server_watch import GROWTH_WITH_KEY, MB, PAUSE_WITH_KEY, watched
from tests.support.stack import Stack
from tests.support.stored_state import attempts
from tests.support.waiting import until


@pytest.fixture
def fresh(stack: Stack) -> Iterator[Server]:
    """A server that nobody has used yet, so that its memory is its own."""
    started = start_server(stack, LOG_LEVEL="warning")
    yield started
    started.app.stop()


class Fresh:
    """Clients of a server that only one test uses."""

    @pytest.fixture
    def api(self, fresh: Server) -> Iterator[Client]:
        with fresh.client() as client:
            yield client

    @pytest.fixture
    def innocent(self, fresh: Server) -> Iterator[Client]:
        with fresh.client() as client:
            yield client


@pytest.mark.alone
class TestBodies(Fresh):
    """With a key."""

    def test_too_many_values_are_refused_before_they_are_parsed(self, fresh: Server, api: Client) -> None:
        body = b'{"input_values":{"a":[' + b"[]," * 13 * MB + b"1]}}"
        head = post(api, f"/v1/runs/{uuid4()}/retry", len(body))
        with watched(fresh) as seen:
            assert set(at_once(2, lambda _: send_whole(fresh, head, body))) <= {422, 503}
        seen.within(growth=GROWTH_WITH_KEY, pause=PAUSE_WITH_KEY)

    def test_commas_in_texts_are_no_values(self, api: Client) -> None:
        text = ',[{\\"' * 100_000
        assert api.get_run(api.run(input_values={"x": text})["id"])["input_values"] == {"x": text}

    def test_what_takes_neither_files_nor_a_history_is_small(self, fresh: Server, api: Client) -> None:
        for path, status in (("/v1/workflows", 413), ("/v1/pools", 413), (f"/v1/runs/{uuid4()}/retry", 404)):
            body = json.dumps({"x": "y" * 3 * MB}).encode()
            assert send_whole(fresh, post(api, path, len(body)), body) == status

    def test_what_can_never_fit_is_not_to_be_sent_again(self, stack: Stack) -> None:
        """Neither its texts nor its values are too much for themselves."""
        server = start_server(stack, MAX_IN_FLIGHT_BYTES=10 * MB)
        try:
            with server.client() as api:
                body = json.dumps({"input_values": {"a": "x" * 3_800_000, "b": [0] * 20_000}}).encode()
                reply = api.patch(f"/v1/runs/{uuid4()}", content=body, headers={"Content-Type": "application/json"})
                assert reply.status_code == 413, reply.text
        finally:
            server.app.stop()

    def test_bodies_without_a_length_share_half_of_the_budget(
        self, fresh: Server, api: Client, innocent: Client
    ) -> None:
        """Two that grow on and on, and keep the pace."""
        head = post(api, "/v1/runs", None)
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        shown = innocent.run(input_values={"x": "x" * 100_000})["id"]
        with ExitStack() as stack:
            senders = [stack.enter_context(connect(fresh)) for _ in range(2)]
            at_once(2, lambda number: send_while_taken(senders[number], head, piece, 72 * MB))
            assert innocent.get_run(shown)["input_values"]

    def test_wide_characters_count_for_what_they_take(self, fresh: Server, api: Client) -> None:
        """One of them makes a text take four times as much."""
        values = {"a": "x" * 40 * MB + "\N{GRINNING FACE}"}
        body = json.dumps({"workflow_id": api.workflow(), "input_values": values}, ensure_ascii=False).encode()
        head = post(api, "/v1/runs", len(body))
        with watched(fresh) as seen:
            assert set(at_once(4, lambda _: send_whole(fresh, head, body))) <= {201, 503}
        seen.within(growth=GROWTH_WITH_KEY, pause=PAUSE_WITH_KEY)

    def test_large_ones_take_turns(self, fresh: Server, api: Client, innocent: Client) -> None:
        """16 at once of 89 MB each, as files."""
        content = base64.b64encode(bytes(45 * MB)).decode()
        files = [{"filename": "a", "content": content}, {"filename": "b", "content": content[: 29 * MB // 4 * 4]}]
        body = json.dumps({"file_inputs": files}).encode()
        run, head = innocent.finished(), post(api, f"/v1/runs/{uuid4()}/retry", len(body))
        with watched(fresh) as seen, ThreadPoolExecutor(1) as threads:
            attack = threads.submit(at_once, 16, lambda _: send_whole(fresh, head, body))
            slowest = 0.0
            while not attack.done():
                began = time.monotonic()
                innocent.json_of(innocent.retry(run["id"]))
                innocent.report(run["id"], status="cancelled")
                slowest = max(slowest, time.monotonic() - began)
            statuses = attack.result()
        assert 404 in statuses
        assert set(statuses) <= {404, 503}  # 503 only if a turn does not come within 5 s
        assert slowest < 10
        seen.within(growth=GROWTH_WITH_KEY, pause=PAUSE_WITH_KEY)


@pytest.mark.alone
class TestReplies(Fresh):
    """With a key: what a reply takes has room before it is read."""

    @staticmethod
    def a_page(api: Client, stack: Stack) -> str:
        runs = [api.run()["id"] for _ in range(10)]
        stack.sql("UPDATE runs SET main_prompt = repeat('x', $2) WHERE id = ANY($1::uuid[])", runs, 3 * MB)
        return "/v1/runs?limit=10"

    @staticmethod
    def a_run(api: Client, stack: Stack) -> str:
        run_id = api.run()["id"]
        stack.sql("UPDATE runs SET main_prompt = repeat('x', $2) WHERE id = $1", run_id, 30 * MB)
        return f"/v1/runs/{run_id}"

    @staticmethod
    def an_error(api: Client, stack: Stack) -> str:
        run_id = api.finished("error")["id"]
        lines = "ARRAY(SELECT repeat('x', 100000) FROM generate_series(1, 300))"
        stack.sql(f"UPDATE runs SET error = {lines} WHERE id = $1", run_id)
        return f"/v1/runs/{run_id}"

    @staticmethod
    def a_pool(api: Client, stack: Stack) -> str:
        machines = [api.machine() for _ in range(10)]
        stack.sql("UPDATE machines SET name = repeat('x', $2) WHERE id = ANY($1::uuid[])", machines, 3 * MB)
        return f"/v1/pools/{api.pool(*machines)}?include_machines=true"

    @pytest.mark.parametrize("scene", ["a_page", "a_run", "an_error", "a_pool"])
    def test_large_ones_take_turns(self, fresh: Server, api: Client, innocent: Client, scene: str) -> None:
        """24 at once of 30 MB each."""
        path = getattr(self, scene)(api, fresh.stack)
        head = get(api, path, "close")
        lengths = []

        def ask(_: int) -> int:
            with connect(fresh) as connection:
                connection.settimeout(60)
                connection.sendall(head)
                status, length = 0, 0
                while piece := connection.recv(2**20):
                    status = status or int(piece.split(b" ", 2)[1])
                    length += len(piece)
            lengths.append(length)
            return status

        run = innocent.finished()
        with watched(fresh) as seen, ThreadPoolExecutor(1) as threads:
            attack = threads.submit(at_once, 24, ask)
            slowest = 0.0
            while not attack.done():
                began = time.monotonic()
                innocent.json_of(innocent.retry(run["id"]))
                innocent.report(run["id"], status="cancelled")
                slowest = max(slowest, time.monotonic() - began)
            statuses = attack.result()
        assert 200 in statuses
        assert set(statuses) <= {200, 503}
        assert max(lengths) > 30 * MB
        assert slowest < 10
        seen.within(growth=375 * MB, pause=PAUSE_WITH_KEY)  # without turns 625

    def test_retries_that_show_long_inputs_take_turns(self, fresh: Server, api: Client) -> None:
        runs = [api.finished()["id"] for _ in range(24)]
        inputs = "json_build_object('x', repeat('x', $2::int))"
        fresh.stack.sql(f"UPDATE runs SET input_values = {inputs} WHERE id = ANY($1::uuid[])", runs, 30 * MB)

        def retry(number: int) -> tuple[int, int]:
            reply = api.retry(runs[number])
            return reply.status_code, attempts(api, runs[number])

        with watched(fresh) as seen:
            done = set(at_once(24, retry))
        assert (200, 1) in done
        assert done <= {(200, 1), (503, 0)}
        seen.within(growth=GROWTH_WITH_KEY, pause=PAUSE_WITH_KEY)

    def test_what_nobody_takes_is_half_of_the_budget(self, fresh: Server, api: Client, innocent: Client) -> None:
        """200 readers of 4.7 MB each that do not read; and the change that a refused reply was for has happened."""
        workflow, wide = api.workflow(), "\x01" * 256 * 1024
        for name in ("main_prompt", "input_schema", "output_schema"):
            api.json_of(api.patch(f"/v1/workflows/{workflow}", json={name: wide}))
        machine = api.machine()
        pool = {"name": "p", "description": "\x01" * 10_000}
        pools = [api.json_of(api.post("/v1/pools", json=pool), 201)["id"] for _ in range(100)]
        api.json_of(api.put(f"/v1/machines/{machine}/pools", json={"pool_ids": pools}))
        head = get(api, f"/v1/workflows/{workflow}")
        shown = innocent.run(input_values={"x": "x" * 100_000})["id"]
        with ExitStack() as stack, watched(fresh) as seen:
            readers = [stack.enter_context(connect(fresh, rcvbuf=4096)) for _ in range(200)]
            for reader in readers:
                reader.sendall(head)
            until(lambda: all(map(readable, readers)), seconds=60)
            assert innocent.get_run(shown)["input_values"]
            refused = api.patch(f"/v1/workflows/{workflow}", json={"name": "new"})
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "nothing was changed" in refused.json()["detail"]
            # Its reply is long because of its pools.
            refused = api.patch(f"/v1/machines/{machine}", json={"name": "new"})
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "The change was made" in refused.json()["detail"]
            until(lambda: len(seen.pauses) > 3)
        seen.within(growth=375 * MB, pause=PAUSE_WITH_KEY)
        until(lambda: api.get(f"/v1/machines/{machine}").json().get("name") == "new")
        assert api.json_of(api.get(f"/v1/workflows/{workflow}"))["name"] != "new"
