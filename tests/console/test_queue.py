"""The queue: lanes with who waits and why, machines with what they run."""

from playwright.async_api import expect

from tests.console.conftest import Console
from tests.console.sample_data import night
from tests.support.client import Client
from tests.support.stack import Stack
from tests.support.waiting import until


def test_lanes_say_what_they_want_who_waits_and_why_the_oldest_first(
    console: Console, api: Client, stack: Stack
) -> None:
    scene = night(stack, api, past=1)
    console.sign_in("#/queue")
    lanes = console.page.locator(".lanes > li")
    console.do(expect(lanes).to_have_count(3))
    for position, texts in enumerate(
        (
            ("Machine desk-6", "1 run", "11 min", "Its machine is offline", scene.runs["waiting-0"][:8]),
            ("Machine desk-1", "2 runs", "9 min", "Its machine is busy", scene.runs["waiting-1"][:8]),
            ("Machine desk-4", "1 run", "3 min", "Its machine is busy", scene.runs["waiting-3"][:8]),
        )
    ):
        for text in texts:
            console.reads(lanes.nth(position), text)
    widths = "(bars) => bars.map((bar) => bar.getBoundingClientRect().width)"
    oldest, *others = console.do(lanes.locator(".bar").evaluate_all(widths))
    assert oldest > others[0] > others[1] > 0

    machines = console.page.locator(".machines > li")
    console.do(expect(machines).to_have_count(6))
    console.reads(console.page.get_by_role("heading", name="Machines"), "6, 3 free")
    # What runs longest comes first, what is away last.
    for position, text in (
        (0, "desk-4"),
        (0, "Check deliveries"),
        (1, "desk-1"),
        (1, "Post invoices"),
        (5, "desk-6"),
        (5, "offline"),
    ):
        console.reads(machines.nth(position), text)
    console.do(machines.nth(0).get_by_role("link", name="Check deliveries").click())
    console.sees(console.page.locator(".runhead .id", has_text=scene.runs["running-4"]))


def test_it_follows_what_happens(console: Console, api: Client) -> None:
    console.sign_in("#/queue")
    console.sees("No run waits for a machine")
    console.sees("No machine is registered")
    run = api.run(start_session=True)
    console.sees("Waits for a free machine")
    console.reads(console.page.locator(".lanes"), f"Session {run['session_id'][:8]}")
    desk = api.machine(name="desk-7")
    until(lambda: api.get_run(run["id"])["assigned_machine_id"] == desk)
    console.sees("No run waits for a machine")
    console.sees("assigned, not started yet")
    console.sees("reserved for session")
    api.report(run["id"], status="running")
    console.reads(console.page.locator(".machines"), "running")
