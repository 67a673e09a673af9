"""How the console's files are served: what a browser is told about them, and what is not there."""

import gzip
import re
from collections.abc import Iterator

import httpx
import pytest

from app.api.console import FOLDER
from app.api.static_files import TYPES
from app.runs.projection import RUN_BASE_FIELDS
from app.schemas.runs import RunResponse
from tests.support.server import Server, start_server
from tests.support.stack import Stack

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def anyone(server: Server) -> Iterator[httpx.Client]:
    """Without a key."""
    with httpx.Client(base_url=server.url, trust_env=False, verify=False, timeout=10) as client:
        yield client


def test_every_file_is_served_to_anyone_and_may_do_nothing_it_should_not(anyone: httpx.Client) -> None:
    for name in ["", *FILES]:
        reply = anyone.get(f"/console/{name}")
        assert reply.status_code == 200, name
        assert reply.headers["content-security-policy"] == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cross-origin-opener-policy"] == "same-origin"
        suffix = "." + (name or "index.html").rsplit(".", 1)[1]
        assert reply.headers["content-type"] == TYPES[suffix]
    assert anyone.get("/console/").content == anyone.get("/console/index.html").content


def test_is_at_most_100_kb_in_all() -> None:
    assert sum(len(gzip.compress((FOLDER / name).read_bytes(), 9)) for name in FILES) <= 100_000


def test_comes_compressed_to_who_takes_it_and_not_at_all_to_who_has_it(anyone: httpx.Client) -> None:
    plain = anyone.get("/console/main.js", headers={"Accept-Encoding": "identity"})
    packed = anyone.get("/console/main.js", headers={"Accept-Encoding": "br, gzip;q=0.5"})
    refused = anyone.get("/console/main.js", headers={"Accept-Encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers
    assert "content-encoding" not in refused.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content == (FOLDER / "main.js").read_bytes()
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert packed.headers["etag"] != plain.headers["etag"]
    assert packed.headers["vary"] == "Accept-Encoding"
    for reply in (plain, packed):
        known = {
            "If-None-Match": f'W/"other", {reply.headers["etag"]}',
            "Accept-Encoding": reply.request.headers["accept-encoding"],
        }
        again = anyone.get("/console/main.js", headers=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == reply.headers["etag"]
        assert again.headers["content-security-policy"] == POLICY
    assert anyone.get("/console/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_answers_head_and_no_other_method(anyone: httpx.Client) -> None:
    got, asked = anyone.get("/console/style.css"), anyone.head("/console/style.css")
    assert (asked.status_code, asked.content) == (200, b"")
    assert {name: asked.headers[name] for name in ("etag", "content-length", "content-type")} == {
        name: got.headers[name] for name in ("etag", "content-length", "content-type")
    }
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        reply = anyone.request(method, "/console/style.css")
        assert (reply.status_code, reply.json()["code"]) == (405, "method_not_allowed")
        assert reply.headers["allow"] == "GET, HEAD, OPTIONS"


def test_an_address_without_the_slash_is_sent_to_the_one_with_it(anyone: httpx.Client) -> None:
    reply = anyone.get("/console")
    assert (reply.status_code, reply.headers["location"]) == (308, "/console/")


@pytest.mark.parametrize(
    "path",
    [
        "nothing.js",
        "../main.py",
        "..%2fmain.py",
        "%2e%2e/api/console.py",
        "/main.js",
        "main.js/",
        "Main.js",
        "main.js%00",
    ],
)
def test_serves_nothing_else(anyone: httpx.Client, path: str) -> None:
    reply = anyone.send(httpx.Request("GET", httpx.URL(anyone.base_url, raw_path=f"/console/{path}".encode())))
    assert (reply.status_code, reply.json()["code"]) == (404, "route_not_found")


def test_tells_the_page_the_limits_on_files(anyone: httpx.Client) -> None:
    page = anyone.get("/console/").text
    assert "{&quot;body&quot;: 104857600, &quot;file&quot;: 52428800, &quot;files&quot;: 100}" in page


def test_can_be_turned_off(stack: Stack) -> None:
    server = start_server(stack, CONSOLE="off")
    try:
        for path in ("/console", "/console/", "/console/main.js"):
            reply = httpx.get(server.url + path, trust_env=False, verify=False)
            assert (reply.status_code, reply.json()["code"]) == (404, "route_not_found")
    finally:
        server.app.stop()


def test_a_run_is_asked_for_with_all_its_keys_but_the_history() -> None:
    [asked] = re.findall(r'const FIELDS =\s*"([^"]+)"', (FOLDER / "run.js").read_text(encoding="utf-8"))
    shown = set(RunResponse.model_fields) - {"run_message_history", *RUN_BASE_FIELDS}
    assert set(asked.split(",")) - set(RUN_BASE_FIELDS) == shown
