"""/docs in a real browser, and /. The tab itself fails a test for console errors, breaches of policy and foreign requests."""

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Locator, expect

from app import __version__
from tests.support.browser import Tab, page_of
from tests.support.client import Client
from tests.support.server import Server

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"get", "post", "put", "patch", "delete"}


def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", trust_env=False, verify=False).json()
    return found


def operations(server: Server) -> list[tuple[str, str]]:
    paths = document(server)["paths"]
    return sorted((method, path) for path in paths for method in METHODS & paths[path].keys())


async def shown(tab: Tab) -> list[tuple[str, str]]:
    """Method and path of each operation on the page, once they are there."""
    blocks = tab.page.locator(".opblock")
    await blocks.first.wait_for()
    found = await blocks.evaluate_all(
        """blocks => blocks.map(block => [
            block.querySelector(".opblock-summary-method").textContent.toLowerCase(),
            block.querySelector(".opblock-summary-path").dataset.path])"""
    )
    return sorted((method, path) for method, path in found)


async def unfold(tab: Tab, method: str, path: str) -> Locator:
    block = tab.page.locator(f".opblock-{method}", has=tab.page.locator(f'[data-path="{path}"]'))
    await block.locator(".opblock-summary-control").click()
    return block


async def authorize(tab: Tab, key: str) -> None:
    await tab.page.get_by_role("button", name="Authorize").first.click()
    form = tab.page.locator(".auth-container")
    await form.get_by_role("textbox").fill(key)
    await form.get_by_role("button", name="Apply credentials").click()
    await tab.page.get_by_role("button", name="Close").click()


async def answer(block: Locator) -> tuple[int, str]:
    """Press Execute; the status and body of the reply, as the page shows them."""
    await block.get_by_role("button", name="Execute").click()
    live = block.locator(".live-responses-table .response")
    status = await live.locator(".response-col_status").inner_text()
    return int(status.split()[0]), await live.locator(".response-col_description").inner_text()


def test_every_operation_is_shown_and_unfolds(tab: Tab, server: Server) -> None:
    """Unfolding costs about half a second each: without SOAK, one of each method with and without body and parameters."""
    described = document(server)["paths"]
    groups: dict[object, tuple[str, str]] = {}
    for method, path in operations(server):
        operation = described[path][method]
        every = (method, path) if os.environ.get("SOAK") else None
        kind = (method, "requestBody" in operation, bool(operation.get("parameters")))
        groups.setdefault((every, kind), (method, path))

    async def look() -> None:
        assert await shown(tab) == operations(server)
        for method, path in groups.values():
            operation = described[path][method]
            block = await unfold(tab, method, path)
            await expect(block.locator(".responses-inner .response")).to_have_count(len(operation["responses"]))
            await expect(block.locator(".parameters tbody tr")).to_have_count(len(operation.get("parameters", ())))
            if "requestBody" in operation:
                body = await block.locator(".opblock-section-request-body pre").inner_text()
                assert json.loads(body), (method, path)
            text = await block.inner_text()
            assert operation["summary"] in text
            for complaint in ("Could not render", "Unable to render", "Could not resolve", "Unknown Type"):
                assert complaint not in text, (method, path)
            await block.locator(".opblock-summary-control").click()
        assert await tab.page.locator(".errors-wrapper").count() == 0
        assert await tab.page.title() == "Runs API"

    assert tab.open(f"{server.url}/docs") == 200
    tab.do(look())


def test_a_retry_is_tried_out_with_a_key(tab: Tab, server: Server, api: Client) -> None:
    run = api.finished(input_values={"user": "ada"})
    key = api.headers["authorization"].split()[1]

    async def try_out() -> tuple[int, str]:
        await authorize(tab, key)
        block = await unfold(tab, "post", "/v1/runs/{run_id}/retry")
        await block.get_by_role("button", name="Try it out").click()
        await block.get_by_placeholder("run_id").fill(run["id"])
        body = block.locator("textarea.body-param__text")
        # What is sent if nobody changes it: a retry that keeps everything.
        assert json.loads(await body.input_value()).keys() == {"reason"}
        await body.fill(json.dumps({"input_values": {"user": "grace"}}))
        return await answer(block)

    tab.open(f"{server.url}/docs")
    status, body = tab.do(try_out())
    assert status == 200, body
    assert f'"id": "{run["id"]}"' in body
    assert '"status": "scheduling"' in body
    retried = api.get_run(run["id"])
    assert (retried["attempt"], retried["input_values"]) == (2, {"user": "grace"})
    kept = "[...Object.entries(localStorage), ...Object.entries(sessionStorage), document.cookie].join()"
    assert key not in tab.do(tab.page.evaluate(kept))


def test_without_a_key_the_page_shows_the_refusal(tab: Tab, server: Server) -> None:
    async def try_out() -> tuple[int, str]:
        block = await unfold(tab, "get", "/v1/runs")
        await block.get_by_role("button", name="Try it out").click()
        return await answer(block)

    tab.open(f"{server.url}/docs")
    tab.expect(r"status of 401")  # the browser itself reports it
    status, body = tab.do(try_out())
    assert status == 401
    assert '"code": "unauthorized"' in body


def test_an_image_among_the_replies_is_shown(tab: Tab, server: Server, api: Client) -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    run = api.run()
    api.report(run["id"], status="running")
    body = {"run_id": run["id"], "filename": "screen.png", "content": pixel, "content_type": "image/png"}
    image = api.json_of(api.post("/v1/run-attachments", json=body | {"attachment_type": "output"}), 201)

    async def try_out() -> None:
        await authorize(tab, api.headers["authorization"].split()[1])
        block = await unfold(tab, "get", "/v1/run-attachments/{attachment_id}/download")
        await block.get_by_role("button", name="Try it out").click()
        await block.get_by_placeholder("attachment_id").fill(image["id"])
        status, _ = await answer(block)
        assert status == 200

    tab.open(f"{server.url}/docs")
    tab.do(try_out())


def test_the_address_cannot_make_the_page_show_another_document(tab: Tab, server: Server) -> None:
    elsewhere = "http://elsewhere.example/openapi.json"
    tab.open(f"{server.url}/docs?url={elsewhere}&configUrl={elsewhere}&urls.primaryName=x&validatorUrl={elsewhere}")
    assert tab.do(shown(tab)) == operations(server)


def test_no_other_page_can_frame_it(tab: Tab, server: Server) -> None:
    with page_of(f"<iframe src='{server.url}/docs'></iframe>", policy="") as url:
        tab.expect(f"foreign request: {server.url}/docs|frame-ancestors|favicon.ico")
        tab.open(url)
        assert any("frame-ancestors" in problem for problem in tab.heard), tab.heard


def test_a_link_to_an_operation_unfolds_it(tab: Tab, server: Server) -> None:
    retry = document(server)["paths"]["/v1/runs/{run_id}/retry"]["post"]
    tab.open(f"{server.url}/docs#/{retry['tags'][0]}/{retry['operationId']}")
    tab.do(expect(tab.page.locator(".opblock.is-open")).to_have_count(1))


def test_the_root_leads_people_to_the_page(tab: Tab, server: Server) -> None:
    assert tab.open(server.url) == 200
    assert tab.page.url == f"{server.url}/docs"
    tab.do(shown(tab))


def test_the_root_tells_programs_where_to_look(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, verify=False) as client:
        reply = client.get("/")
        assert reply.status_code == 200
        assert reply.headers["vary"] == "Accept"
        found = reply.json()
        assert (found.pop("title"), found.pop("version")) == ("Runs API", __version__)
        assert found.keys() == {"docs", "openapi", "health", "console"}
        for path in found.values():
            assert client.get(path).status_code == 200
        assert client.post("/").headers["allow"] == "GET, HEAD, OPTIONS"


def test_the_manual_is_served_as_markdown_and_listed_for_language_models(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, verify=False) as client:
        overview = client.get("/llms.txt")
        assert overview.headers["content-type"] == "text/plain; charset=utf-8"
        listed = dict(re.findall(r"^- \[[^\]]+\]\((\S+)\): (.+)$", overview.text, re.MULTILINE))
        files = {f"/docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
        assert listed.keys() == files.keys() | {"/openapi.json"}
        for path, text in files.items():
            page = client.get(path)
            assert (page.status_code, page.text) == (200, text)
            assert page.headers["content-type"] == "text/markdown; charset=utf-8"
        for path in ("/docs/nothing.md", "/docs/..%2FREADME.md", "/docs/console%2Fretry-light.png"):
            assert client.get(path).status_code == 404
        icon = client.get("/favicon.ico")
        assert (icon.status_code, icon.headers["content-type"]) == (200, "image/png")


@pytest.mark.parametrize("path", ["/docs", "/docs-assets/swagger-ui-bundle.js", "/docs-assets/start.js"])
def test_the_page_and_its_files_allow_no_other_origin_and_no_framing(path: str, server: Server) -> None:
    reply = httpx.get(server.url + path, trust_env=False, verify=False)
    assert reply.status_code == 200
    policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    assert policy.pop("img-src") == "'self' data: blob:"
    assert {policy.pop(name) for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert policy.keys() == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["referrer-policy"] == "no-referrer"
    again = httpx.get(
        server.url + path, headers={"If-None-Match": reply.headers["etag"]}, trust_env=False, verify=False
    )
    assert (again.status_code, again.content) == (304, b"")


def test_nothing_else_of_the_package_is_served(server: Server) -> None:
    for path in ("main.py", "__init__.py", "../main.py", "%2e%2e/main.py", "..%2fmain.py", "index.html", ""):
        assert httpx.get(f"{server.url}/docs-assets/{path}", trust_env=False, verify=False).status_code == 404
