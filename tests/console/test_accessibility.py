"""For everybody: axe finds nothing on any screen in light and dark, everything fits into 320 px, and nothing moves unasked."""

import re
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import expect

from tests.console.conftest import Console
from tests.console.sample_data import Scene, night
from tests.support.client import Client
from tests.support.stack import Stack

# The rules of WCAG 2.0 to 2.2, levels A and AA, and axe's own best practices.
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture
def scene(stack: Stack, api: Client) -> Scene:
    return night(stack, api, past=4)


# What depends on colours; the other rules see the same in light and dark.
OF_COLOURS = ["color-contrast", "link-in-text-block"]


def problems(console: Console, run_only: dict[str, Any]) -> list[str]:
    """What axe finds: the rule, and the element."""
    found = console.do(Axe().run(console.page, options={"runOnly": run_only}))
    violations: list[dict[str, Any]] = found.response["violations"]
    return [f"{one['id']}: {one['help']}: {node['html'][:200]}" for one in violations for node in one["nodes"]]


def walk(console: Console, scene: Scene) -> Any:
    """Every screen, one after the other, by name."""
    failed = scene.runs["failed"]
    console.tab.open(console.url)
    console.sees(console.page.get_by_label("API key"))
    yield "sign in"
    console.enter_key(console.key)
    console.do(expect(console.rows).not_to_have_count(0))
    yield "runs"
    console.go("#/runs?status=cancelled&from=2020-01-01T00:00:00.000Z&to=2020-01-02T00:00:00.000Z")
    console.sees("No run matches these filters")
    yield "no runs"
    for tab in ("now", "inputs", "attempts", "events", "webhooks", "json"):
        console.open_run(failed, tab)
        console.misses(console.page.locator(".skeleton"))
        yield f"run, {tab}"
    console.open_run(scene.runs["waiting-0"])
    console.sees("Its machine is offline")
    yield "waiting run"
    for name, text in (("held", "Starts at"), ("planned", "Will be retried at")):
        console.open_run(scene.runs[name])
        console.sees(text)
        yield f"{name} run"
    console.go("#/machines")
    console.sees(console.page.get_by_role("button", name="Set aside"))
    yield "machines"
    console.go("#/workflows")
    console.sees(console.page.get_by_text("% succeeded"))
    yield "workflows"
    console.do(console.page.get_by_role("link", name="Check deliveries").click())
    console.sees(console.page.locator(".days"))
    yield "workflow"
    console.do(console.page.get_by_role("button", name="Change …").click())
    yield "retry policy"
    console.do(console.page.keyboard.press("Escape"))
    console.go("#/queue")
    console.sees(console.page.get_by_text("desk-6"))
    yield "queue"
    console.go("#/webhooks")
    console.do(console.page.get_by_role("link", name="chat.acme").click())
    console.do(console.page.get_by_text("Answers").first.click())
    console.sees("queue is full")
    yield "webhook endpoint"
    console.do(console.page.get_by_role("button", name="Recover …").click())
    yield "recover"
    console.do(console.page.keyboard.press("Escape"))
    console.go("#/webhooks")
    console.sees(console.page.get_by_role("heading", name="Endpoints"))
    yield "webhooks"
    console.do(console.page.get_by_role("button", name="New endpoint …").click())
    yield "new endpoint"
    console.do(console.page.keyboard.press("Escape"))
    console.go("#/runs")
    console.do(console.page.get_by_role("combobox", name="Workflow").click())
    console.sees(console.page.locator(".popup:visible"))
    yield "runs, finding a workflow"
    console.open_retry(failed)
    for legend in ("Values", "Secrets", "Files", "Machine", "Session"):
        console.choose(legend, "Change")
    console.do(console.send.click())  # nothing is filled in: errors stand at their fields
    yield "retry"
    console.do(console.page.keyboard.press("Escape"))
    console.sees("Discard what you have chosen")
    yield "retry, leaving"
    console.do(console.page.get_by_role("button", name="Discard").click())
    console.do(console.page.get_by_role("button", name="Your key").click())
    yield "key"
    console.do(console.page.keyboard.press("Escape"))
    console.do(console.page.keyboard.press("?"))
    yield "keyboard"
    console.do(console.page.keyboard.press("Escape"))
    console.go("#/runs")
    console.do(expect(console.rows).not_to_have_count(0))
    console.do(console.page.get_by_role("checkbox", name="Choose all runs of this page").click())
    console.do(console.page.get_by_role("button", name="Retry chosen").click())
    console.sees(console.dialog.get_by_text("can be retried"))
    yield "bulk retry, choosing"
    console.do(console.dialog.get_by_role("button", name=re.compile("^Retry [0-9]+ runs?$")).click())
    console.sees(console.page.get_by_text("skipped").first)
    console.misses(console.page.locator(".skeleton"))
    yield "bulk retry"
    console.go("#/bulk")
    console.misses(console.page.locator(".skeleton"))
    yield "bulk retries"


@pytest.mark.parametrize(
    ("scheme", "kind", "rules"), [("light", "tag", RULES), ("dark", "rule", OF_COLOURS)], ids=["light", "dark"]
)
def test_axe_finds_nothing(console: Console, scene: Scene, scheme: Any, kind: str, rules: list[str]) -> None:
    console.do(console.page.emulate_media(color_scheme=scheme, reduced_motion="reduce"))
    found = {screen: problems(console, {"type": kind, "values": rules}) for screen in walk(console, scene)}
    assert {screen: listed for screen, listed in found.items() if listed} == {}
    assert len(found) > 12


CONTROLS = """() => {
    const kinds = ["", "primary", "danger", "quiet", "news", "button"];
    const main = document.querySelector("main");
    main.replaceChildren(...kinds.flatMap((kind) => [{}, {disabled: ""}, {"aria-disabled": "true"}].map((state) => {
        const control = document.createElement("button");
        control.className = kind;
        control.textContent = "Sending …";
        for (const [name, value] of Object.entries(state)) control.setAttribute(name, value);
        return control;
    })), ...["input", "textarea", "select"].map((name) => {
        const control = document.createElement(name);
        if (name === "select") control.append(new Option("Sending …"));
        else control.value = "Sending …";
        return control;
    }));
    return main.children.length;
}"""
CONTRAST = """(control) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const painted = (...colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const linear = [...canvas.getImageData(0, 0, 1, 1).data].map((part) => part / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const style = getComputedStyle(control);
    const behind = [getComputedStyle(document.body).backgroundColor, style.backgroundColor];
    const [one, other] = [painted(...behind), painted(...behind, style.color)].sort((one, other) => other - one);
    const name = `${control.tagName} ${control.className} ${control.disabled} ${control.getAttribute("aria-disabled")}`;
    return [name, (one + 0.05) / (other + 0.05)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_control_can_be_read_in_every_state(console: Console, scheme: Any) -> None:
    console.do(console.page.emulate_media(color_scheme=scheme, reduced_motion="reduce"))
    console.tab.open(console.url)
    console.sees(console.page.get_by_label("API key"))
    number = console.do(console.page.evaluate(CONTROLS))
    unreadable = []
    for index in range(number):
        control = console.page.locator("main > *").nth(index)
        for state in ("resting", "under the pointer", "focused"):
            if state == "under the pointer":
                console.do(control.hover(force=True))
            if state == "focused":
                console.do(control.focus())
            name, contrast = console.do(control.evaluate(CONTRAST))
            if contrast < 4.5:
                unreadable.append(f"{name}, {state}: {contrast:.2f}")
    assert unreadable == []


def test_everything_fits_into_320_pixels_and_can_be_hit(console: Console, scene: Scene) -> None:
    console.do(console.page.set_viewport_size({"width": 320, "height": 640}))
    wide = "document.scrollingElement.scrollWidth"
    # WCAG 2.2, 2.5.8: 24 by 24 pixels, but for links within text.
    small = """() => [...document.querySelectorAll("button, select, input:not(.unseen), .chip, .tabs a, .button")]
        .filter((node) => node.checkVisibility({visibilityProperty: true}) && !node.closest("[inert]"))
        .map((node) => [node.outerHTML.slice(0, 90), (node.closest("label") ?? node).getBoundingClientRect()])
        .filter(([, box]) => box.width && (box.width < 24 || box.height < 24))
        .map(([html, box]) => `${html} ${box.width}x${box.height}`)"""
    for screen in walk(console, scene):
        assert console.do(console.page.evaluate(wide)) <= 320, screen
        assert console.do(console.page.evaluate(small)) == [], screen


def test_text_twice_as_large_still_fits(console: Console, scene: Scene) -> None:
    console.do(console.page.set_viewport_size({"width": 640, "height": 800}))
    double = "addEventListener('DOMContentLoaded', () => { document.documentElement.style.fontSize = '200%' })"
    console.do(console.page.add_init_script(double))
    for screen in walk(console, scene):
        assert console.do(console.page.evaluate("document.scrollingElement.scrollWidth")) <= 640, screen


def test_nothing_moves_for_those_who_asked_for_that(console: Console, api: Client) -> None:
    api.run()
    console.sign_in()
    console.sees(console.rows)
    assert console.do(console.page.evaluate("document.getAnimations().length")) == 0


def test_focus_goes_where_the_page_goes_and_is_never_hidden(console: Console, api: Client) -> None:
    for _ in range(60):
        run = api.run()
    console.sign_in()
    console.do(expect(console.rows).to_have_count(60))
    console.go(f"#/runs/{run['id']}")
    console.do(expect(console.page.get_by_role("heading", level=1)).to_be_focused())
    console.do(console.page.go_back())
    console.do(expect(console.rows).to_have_count(60))
    covered = """() => { const box = document.activeElement.getBoundingClientRect();
        const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
        return document.activeElement.contains(top) || top?.contains(document.activeElement) }"""
    for key, times in (("j", 60), ("k", 60)):
        for _ in range(times):
            console.do(console.page.keyboard.press(key))
            assert console.do(console.page.evaluate(covered))
    console.do(console.page.keyboard.press("Shift+Tab"))


def test_a_dialog_keeps_the_focus_and_gives_it_back(console: Console, api: Client) -> None:
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    inside = "document.activeElement === document.body || Boolean(document.activeElement.closest('dialog'))"
    for _ in range(30):
        console.do(console.page.keyboard.press("Tab"))
        assert console.do(console.page.evaluate(inside))
    console.do(console.page.keyboard.press("Escape"))
    console.do(expect(console.page.get_by_role("button", name="Retry …")).to_be_focused())
