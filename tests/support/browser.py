"""A real browser for the tests of our pages: one Chromium for each test worker, one fresh tab for each test.

    def test_the_page(tab: Tab, server: Server) -> None:
        tab.open(f"{server.url}/docs")
        tab.do(tab.page.get_by_role("button", name="Authorize").click())

`tab.page` is Playwright's asynchronous page, and `tab.do` runs what its methods return, one call or a whole coroutine function.
Between two calls no event loop runs, so everything else that tests do (SQL, HTTP) works beside it; with Playwright's own
synchronous interface it would not. When the test is over, the tab fails it for every error in the console, breach of the
Content-Security-Policy and request to another origin, unless the test said with `tab.expect` that it wants to see it.
"""

import asyncio
import os
import re
import shutil
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, ConsoleMessage, Error, Page, Request, async_playwright, expect

T = TypeVar("T")

WAIT_MS = 15_000
expect.set_options(timeout=WAIT_MS)

FLAGS = (
    "--headless",
    "--no-sandbox",  # the kernel refuses it to root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Whatever a page asks for, no test reaches a host that is not this one.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# Listens before the first script of the page. The console shows these too, but not for every kind of document.
REPORT_BREACHES = """
document.addEventListener("securitypolicyviolation", (breach) =>
  reportBreach(`${breach.effectiveDirective} refuses ${breach.blockedURI} (${breach.sourceFile}:${breach.lineNumber})`));
"""


def chromium() -> str:
    """The path of the browser. Without one the test is skipped, or fails if CHROMIUM says that there must be one.

    The one without windows comes first: a new page takes it a quarter of the processor time.
    """
    if named := os.environ.get("CHROMIUM"):
        if not Path(named).is_file():
            pytest.fail(
                f"CHROMIUM={named} is not there: install Chromium, or unset CHROMIUM to skip the tests with a browser."
            )
        return named
    for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip(
        "no Chromium on this machine (Debian: apt install chromium-headless-shell); CHROMIUM names one elsewhere"
    )


@dataclass
class Tab:
    """One page, in a profile of its own, and everything about it that must not be."""

    page: Page
    _runner: asyncio.Runner
    origin: str = ""
    heard: list[str] = field(default_factory=list)
    _expected: list[str] = field(default_factory=list)

    def do(self, steps: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(steps)

    def open(self, url: str) -> int:
        """Go there and wait until it is loaded; its origin is the only one that may be asked. Returns the status."""
        parts = urlsplit(url)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        reply = self.do(self.page.goto(url))
        assert reply is not None
        return reply.status

    def expect(self, pattern: str) -> None:
        """What matches this regular expression is wanted: a refused request, for example, is an error in the console."""
        self._expected.append(pattern)

    def problems(self) -> list[str]:
        """What was heard until now and not expected."""
        self.do(self.page.wait_for_timeout(0))
        return [problem for problem in self.heard if not any(re.search(pattern, problem) for pattern in self._expected)]

    def _message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.heard.append(f"console {message.type}: {message.text} ({message.location.get('url', '')})")

    def _uncaught(self, error: Error) -> None:
        self.heard.append(f"uncaught: {error}")

    def _breach(self, text: str) -> None:
        self.heard.append(f"policy: {text}")

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        # data: and blob: stay within the page.
        if parts.scheme not in ("data", "blob", "about") and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.heard.append(f"foreign request: {request.url}")


async def _new_tab(browser: Browser, runner: asyncio.Runner) -> Tab:
    # Wide enough that no page folds its columns. Times and words are those of nobody's machine.
    context = await browser.new_context(
        viewport={"width": 1280, "height": 900}, locale="en-GB", timezone_id="UTC", reduced_motion="reduce"
    )
    page = await context.new_page()
    page.set_default_timeout(WAIT_MS)
    tab = Tab(page, runner)
    page.on("console", tab._message)
    page.on("pageerror", tab._uncaught)
    page.on("request", tab._request)
    await page.expose_function("reportBreach", tab._breach)
    await page.add_init_script(REPORT_BREACHES)
    return tab


@pytest.fixture(scope="session")
def _browser() -> Iterator[tuple[Browser, asyncio.Runner]]:
    path = chromium()
    with asyncio.Runner() as runner:
        playwright = runner.run(async_playwright().start())
        browser = runner.run(playwright.chromium.launch(executable_path=path, args=list(FLAGS)))
        yield browser, runner
        runner.run(browser.close())
        runner.run(playwright.stop())


@pytest.fixture
def tab(_browser: tuple[Browser, asyncio.Runner]) -> Iterator[Tab]:
    browser, runner = _browser
    opened = runner.run(_new_tab(browser, runner))
    yield opened
    problems = opened.problems()
    opened.do(opened.page.context.close())
    assert not problems, "\n".join(problems)


@contextmanager
def page_of(html: str, policy: str) -> Iterator[str]:
    """A server of one page with this Content-Security-Policy, as long as the block; yields its address."""

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
