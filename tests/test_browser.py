"""The browser of the tests sees what it must: a tab that hears nothing would let every page pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tests.conftest import Stack
from tests.support.browser import Tab

POLICY = "default-src 'self'"


@contextmanager
def page_of(html: str, policy: str = POLICY) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = html.encode() if self.path == "/" else b""
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Security-Policy", policy)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize(
    ("html", "policy", "heard"),
    [
        ("<script>console.error('lost')</script>", "", "console error: lost"),
        ("<script>console.warn('lost')</script>", "", "console warning: lost"),
        ("<script>nothing.there</script>", "", "uncaught: nothing is not defined"),
        ("<script>1</script>", POLICY, "policy: script-src-elem refuses inline"),
        ("<p style='color: red'>", POLICY, "policy: style-src-attr refuses inline"),
        ("<img src='http://elsewhere.example/x.png'>", "", "foreign request: http://elsewhere.example/x.png"),
        ("<img src='http://elsewhere.example/x.png'>", POLICY, "policy: img-src refuses http://elsewhere.example"),
    ],
)
def test_what_is_wrong_with_a_page_is_heard(html: str, policy: str, heard: str, tab: Tab) -> None:
    with page_of(html, policy) as url:
        assert tab.open(url) == 200
        assert any(problem.startswith(heard) for problem in tab.problems()), tab.heard
    tab.expect("")
    assert tab.problems() == []


def test_a_page_that_is_well_has_no_problems(tab: Tab, stack: Stack) -> None:
    with page_of("<title>well</title>") as url:
        tab.open(url)
        assert stack.sql("SELECT 1 AS one") == [{"one": 1}]  # no event loop runs between two calls
        assert tab.do(tab.page.title()) == "well"
