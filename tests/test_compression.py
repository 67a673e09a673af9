"""gzip: for JSON that a caller reads and that is long, where it is asked for; never for secrets, URLs and files."""

import gzip
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.client import Client

ASKED = {"Accept-Encoding": "gzip"}


def long_run(api: Client, size: int) -> str:
    run: str = api.run()["id"]
    api.report(run, status="running")
    api.report(run, run_message_history=[{"image": "abcdefgh" * (size // 8)}])
    return run


@pytest.mark.parametrize("size", [10_000, 3_000_000])
def test_a_long_reply_is_compressed_where_it_is_asked_for(api: Client, size: int) -> None:
    path = f"/v1/runs/{long_run(api, size)}"
    plain = api.get(path, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert int(plain.headers["content-length"]) == len(plain.content) > size
    with api.stream("GET", path, headers=ASKED) as reply:
        raw = b"".join(reply.iter_raw())
    assert (reply.headers["content-encoding"], reply.headers["cache-control"]) == ("gzip", "no-store")
    assert len(raw) < size / 5
    assert gzip.decompress(raw) == plain.content
    assert reply.headers["etag"] == plain.headers["etag"]
    for found in (plain, reply):
        assert found.headers["vary"].lower() == "accept-encoding"
    again = api.get(path, headers=ASKED | {"If-None-Match": reply.headers["etag"]})
    assert (again.status_code, again.headers["vary"].lower()) == (304, "accept-encoding")
    head = api.head(path, headers=ASKED)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("accepted", "is_asked"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5, br", True),
        ("gzip;q=1.0", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("x-gzip", False),
        ("gzipped", False),
        ("br", False),
        ("*", False),
        ("", False),
    ],
)
def test_who_asks_for_it(api: Client, accepted: str, is_asked: bool) -> None:
    api.run()
    reply = api.get("/v1/runs", headers={"Accept-Encoding": accepted})
    assert (reply.headers.get("content-encoding") == "gzip") == is_asked
    assert reply.json()["total"] == 1


def test_what_is_never_compressed(api: Client) -> None:
    run = long_run(api, 10_000)
    attachment = api.upload(run, content=b"a" * 10_000)["id"]
    endpoint = api.json_of(
        api.post("/v1/webhook-endpoints", json={"url": "https://8.8.8.8/hook", "event_types": ["run_complete"]}), 201
    )
    for path in (
        f"/v1/run-attachments/{attachment}/download",
        f"/v1/run-attachments/{attachment}/download-url",
        f"/v1/webhook-endpoints/{endpoint['id']}/secret",
    ):
        reply = api.get(path, headers=ASKED)
        assert reply.status_code == 200, reply.text
        assert not {"content-encoding", "vary"} & reply.headers.keys(), path
    short = api.get("/v1/pools", headers=ASKED)
    assert "content-encoding" not in short.headers
    api.report(run, status="error")
    retried = api.post(f"/v1/runs/{run}/retry", json={"reason": "x" * 400}, headers=ASKED)
    assert (retried.status_code, "content-encoding" in retried.headers) == (200, False)


def test_organizations_take_turns(api: Client, foreign: Client) -> None:
    """One that reads much at once delays another by one piece at a time."""
    mine, other = long_run(api, 3_000_000), long_run(foreign, 10_000)
    with ThreadPoolExecutor(6) as threads:
        reading = [threads.submit(api.get, f"/v1/runs/{mine}", headers=ASKED) for _ in range(5)]
        assert foreign.get(f"/v1/runs/{other}", headers=ASKED).status_code == 200
        assert {one.result().status_code for one in reading} <= {200, 503}
