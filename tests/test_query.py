"""The target of a request: how long it may be, how many parameters its query may have, and that each comes once."""

import re
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.client import Client
from tests.support.raw_http import raw_exchange
from tests.support.server import Server


def parameters(document: Any) -> Iterator[tuple[str, str, str]]:
    """Every parameter of a query that is no list: method, path, name."""
    for path, operations in document["paths"].items():
        for method, described in operations.items():
            for parameter in described.get("parameters", ()):
                schemas = parameter["schema"].get("anyOf", [parameter["schema"]])
                if parameter["in"] == "query" and all(schema.get("type") != "array" for schema in schemas):
                    yield method, re.sub(r"\{\w+\}", str(uuid4()), path), parameter["name"]


def test_every_parameter_of_every_route_comes_once(api: Client) -> None:
    found = list(parameters(api.get("/openapi.json").json()))
    assert len(found) > 50
    for method, path, name in found:
        for query in (
            f"{name}=true&{name}=true",
            f"{name}=&x=1&{name}=bogus",
            f"{name}=1&%{ord(name[0]):x}{name[1:]}=1",
        ):
            reply = api.request(method, f"{path}?{query}")
            errors = api.json_of(reply, 422)["detail"]
            assert ["query", name] in [error["loc"] for error in errors], (method, path, query)
            assert "once" in reply.text


def test_what_counts_is_never_the_last_of_two(api: Client) -> None:
    api.finished("success")
    for query in ("status=success&status=error", "status=bogus&status=success", "limit=1&limit=1", "status=&status="):
        [error] = api.json_of(api.get(f"/v1/runs?{query}"), 422)["detail"]
        assert (error["loc"], error["type"]) == (["query", query.partition("=")[0]], "repeated")
        assert "success" not in error["msg"]


def test_fields_stay_a_list_and_what_nobody_knows_stays_ignored(api: Client) -> None:
    api.run()
    listed = api.json_of(api.get("/v1/runs?fields=error&fields=session_id,attempt&x=1&x=2&X=1&X="))
    [run] = listed["items"]
    assert run.keys() == {"id", "workflow_id", "machine_id", "status", "created_at", "error", "session_id", "attempt"}


def test_a_query_has_a_hundred_parameters_at_most(api: Client, server: Server) -> None:
    fits = "&".join(f"a{n}=" for n in range(100))
    for path in ("/health/live", "/v1/health", "/openapi.json"):
        assert api.get(f"{path}?{fits}").status_code == 200
        for query in (f"{fits}&b", "&" * 100, "a&" * 3000):
            reply = httpx.get(f"{server.url}{path}?{query}", trust_env=False, verify=False)
            assert (reply.status_code, reply.json()["detail"][0]["type"]) == (422, "too_many_parameters")
    assert api.get(f"/v1/runs?{fits}").status_code == 200


LONGEST = 8192


@pytest.mark.parametrize(
    ("begin", "filling"),
    [
        ("/health/live?", "a"),
        ("/health/live?x=1&", "a&"),
        ("/", "%41"),
        ("/v1/runs?", "%41"),
        ("http://x/health/live?", "a"),
    ],
)
def test_a_target_has_at_most_8_kib(server: Server, api: Client, begin: str, filling: str) -> None:
    def ask(size: int) -> bytes:
        target = (begin + filling * size)[:size]
        began = time.monotonic()
        received = raw_exchange(server.url, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert time.monotonic() - began < 2
        return received

    assert b" 414 " not in ask(LONGEST).split(b"\r\n")[0]
    for size in (LONGEST + 1, 60_000):
        received = ask(size)
        assert received.startswith(b"HTTP/1.1 414 "), received[:200]
        assert b"application/problem+json" in received
        assert b'"code":"uri_too_long"' in received
        assert b"\r\nx-request-id: " in received
    assert api.get("/v1/runs").status_code == 200


def test_a_target_that_comes_in_pieces_is_measured_too(server: Server) -> None:
    """And nothing of it is parsed: it is refused before its line has ended."""
    received = raw_exchange(server.url, b"DELETE /v1/runs/" + b"x" * LONGEST)
    assert received.startswith(b"HTTP/1.1 414 ")
