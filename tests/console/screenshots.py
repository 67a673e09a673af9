"""`make screenshots`: every screen of the console as docs/console/*.png, from the real stack and a night that was made up.

`python -m tests.console.screenshots FOLDER [WIDTH]` writes them to another folder, of a window that is so wide.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect

from dev.stack import Bao, Postgres
from tests.console.sample_data import Scene, night
from tests.support.browser import FLAGS, chromium
from tests.support.server import start_server
from tests.support.stack import Stack, migrate

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "docs" / "console"
WIDTH = int(sys.argv[2]) if len(sys.argv) > 2 else 1280


async def take(url: str, key: str, scene: Scene) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        for scheme in ("light", "dark"):
            context = await browser.new_context(
                viewport={"width": WIDTH, "height": 800},
                color_scheme="dark" if scheme == "dark" else "light",
                locale="en-GB",
                timezone_id="UTC",
                reduced_motion="reduce",
            )
            await _walk(await context.new_page(), url, key, scene, scheme)
            await context.close()
        await browser.close()


async def _walk(page: Page, url: str, key: str, scene: Scene, scheme: str) -> None:
    async def keep(name: str) -> None:
        await page.wait_for_timeout(700)  # names and counts come after the first paint
        await page.screenshot(path=FOLDER / f"{name}-{scheme}.png")

    await page.goto(f"{url}/console/")
    await keep("sign-in")
    await page.get_by_label("API key").fill(key)
    await page.keyboard.press("Enter")
    await expect(page.locator("table.runs")).to_contain_text("Post invoices")
    await keep("runs")
    run = f"{url}/console/#/runs/{scene.runs['failed']}"
    for tab in ("now", "inputs", "attempts", "events", "webhooks"):
        await page.goto(f"{run}/{tab}")
        await expect(page.locator(".panel .skeleton")).to_have_count(0)
        await keep(f"run-{tab}")
    for name in ("held", "planned"):
        await page.goto(f"{url}/console/#/runs/{scene.runs[name]}")
        await keep(f"run-{name}")
    await page.goto(f"{url}/console/#/workflows")
    await expect(page.locator(".days")).to_have_count(1)
    await keep("workflows")
    await page.get_by_role("link", name="Check deliveries").click()
    await expect(page.locator(".days")).to_have_count(1)
    await keep("workflow")
    await page.get_by_role("button", name="Change …").click()
    await keep("policy")
    await page.goto(f"{url}/console/#/queue")
    await expect(page.locator(".lanes > li")).not_to_have_count(0)
    await keep("queue")
    await page.goto(f"{url}/console/#/webhooks")
    await expect(page.locator(".machines > li")).to_have_count(2)
    await keep("webhooks")
    await page.get_by_role("link", name="chat.acme").click()
    await page.get_by_text("Answers").first.click()
    await expect(page.locator(".events > li")).to_have_count(3)
    await keep("webhook-endpoint")
    await page.goto(f"{run}/now")
    await page.get_by_role("button", name="Retry …").click()
    for legend in ("Secrets", "Machine"):
        field = page.locator("fieldset", has=page.locator("legend", has_text=legend))
        await field.locator(".segments").first.locator("label", has_text="Change").click()
    await page.get_by_label("password", exact=True).fill("correct horse")
    await page.locator("[data-secret]").nth(1).fill('{"number": 4711}')
    await page.get_by_role("dialog").get_by_label("desk-3").check()
    await page.get_by_role("dialog").get_by_label("Reason").fill("The password was changed on Monday.")
    await page.locator(".fields").evaluate("(fields) => fields.scrollTo(0, 0)")
    await expect(page.locator("aside")).to_contain_text("only desk-3")
    await keep("retry")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL runs as another user when we are root
        with Postgres(folder, fsync=False) as postgres, Bao(folder) as bao:
            migrate(postgres)
            stack = Stack(folder, postgres, bao)
            server = start_server(stack)
            try:
                key = stack.new_key("acme")
                stack.sql("UPDATE api_keys SET name = 'night shift' WHERE organization_id = 'acme'")
                with server.client("acme", key=key) as api:
                    scene = night(stack, api)
                asyncio.run(take(server.url, key, scene))
            finally:
                server.app.stop()


if __name__ == "__main__":
    main()
