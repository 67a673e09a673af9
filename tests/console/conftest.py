"""The console in a real browser, signed in, and what tests do in it again and again."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from playwright.async_api import Locator, Page, Request, Route, expect

from tests.support.browser import Tab
from tests.support.client import Client
from tests.support.server import Server

T = TypeVar("T")


class Console:
    """One tab with the console of one server."""

    def __init__(self, tab: Tab, url: str, key: str) -> None:
        self.tab = tab
        self.page: Page = tab.page
        self.url = f"{url}/console/"
        self.key = key
        self.asked: list[Request] = []
        self.page.on("request", self._hear)

    def _hear(self, request: Request) -> None:
        self.asked.append(request)

    def do(self, steps: Coroutine[Any, Any, T]) -> T:
        return self.tab.do(steps)

    # --- going somewhere ----------------------------------------------------------------------------------------------

    def sign_in(self, route: str = "#/runs", key: str | None = None) -> None:
        self.tab.open(self.url + route)
        self.enter_key(key or self.key)
        self.sees(self.page.get_by_role("navigation", name="Screens"))

    def sign_in_again(self, key: str) -> None:
        """With another key, at the same address."""
        self.do(self.page.evaluate("sessionStorage.clear()"))
        self.do(self.page.reload())
        self.enter_key(key)

    def enter_key(self, key: str) -> None:
        self.do(self.page.get_by_label("API key").fill(key))
        self.do(self.page.keyboard.press("Enter"))

    def go(self, route: str) -> None:
        self.do(self.page.evaluate("(route) => { location.hash = route }", route))

    def open_run(self, run_id: str, tab: str = "now") -> None:
        self.go(f"#/runs/{run_id}/{tab}")
        self.sees(self.page.locator(".runhead .id", has_text=run_id))

    def open_retry(self, run_id: str) -> None:
        self.open_run(run_id)
        self.do(self.page.get_by_role("button", name="Retry …").click())
        self.sees(self.dialog)

    @property
    def dialog(self) -> Locator:
        return self.page.get_by_role("dialog")

    @property
    def rows(self) -> Locator:
        return self.page.locator("table.runs tbody tr")

    @property
    def send(self) -> Locator:
        return self.dialog.get_by_role("button", name="Retry as attempt")

    def field(self, legend: str) -> Locator:
        return self.dialog.locator("fieldset", has=self.page.locator("legend", has_text=legend))

    def choose(self, legend: str, mode: str) -> Locator:
        """Keep, Change or Empty, as a person does it: on the word."""
        field = self.field(legend)
        self.do(field.locator(".segments").first.locator("label").get_by_text(mode, exact=True).locator("..").click())
        return field

    # --- looking ------------------------------------------------------------------------------------------------------

    def sees(self, locator: Locator | str) -> None:
        if isinstance(locator, str):
            locator = self.page.get_by_text(locator)
        self.do(expect(locator.first).to_be_visible())

    def misses(self, locator: Locator | str) -> None:
        if isinstance(locator, str):
            locator = self.page.get_by_text(locator)
        self.do(expect(locator).to_have_count(0))

    def reads(self, locator: Locator, text: str) -> None:
        self.do(expect(locator).to_contain_text(text))

    def until(self, condition: str, argument: object = None) -> None:
        """A JavaScript function that becomes true."""
        self.do(self.page.wait_for_function(condition, arg=argument))

    def text(self) -> str:
        return str(self.do(self.page.evaluate("document.body.innerText")))

    def storage(self) -> dict[str, str]:
        stored: dict[str, str] = self.do(self.page.evaluate("({...sessionStorage})"))
        return stored

    # --- between the page and the service -----------------------------------------------------------------------------

    def sent(self, method: str, path: str) -> list[Request]:
        """Requests so far whose URL contains this."""
        return [request for request in self.asked if request.method == method and path in request.url]

    def retries(self) -> list[Request]:
        return [request for request in self.sent("POST", "/retry") if "dry_run" not in request.url]

    def intercept(self, pattern: str, act: Callable[[Route], Coroutine[Any, Any, None]]) -> None:
        self.do(self.page.route(pattern, act))

    def release(self, pattern: str) -> None:
        self.do(self.page.unroute(pattern))


def body(request: Request) -> dict[str, Any]:
    assert request.post_data is not None
    found: dict[str, Any] = json.loads(request.post_data)
    return found


@pytest.fixture
def console(tab: Tab, server: Server, api: Client) -> Console:
    """Not signed in yet; with the key of `api`, a client of the same organization."""
    return Console(tab, server.url, str(api.headers["authorization"].split()[1]))
