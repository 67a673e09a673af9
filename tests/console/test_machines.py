"""Machines and pools: what each one runs, setting it aside, and freeing a reservation."""

from playwright.async_api import expect

from tests.console.conftest import Console
from tests.console.sample_data import night
from tests.support.client import Client
from tests.support.server import Server
from tests.support.waiting import until


def test_machines_and_pools_say_what_they_run_and_who_is_in_them(console: Console, api: Client, server: Server) -> None:
    scene = night(server.stack, api, past=1)
    console.sign_in("#/machines")
    machines = console.page.locator("section", has=console.page.get_by_role("heading", name="Machines")).locator("li")
    console.do(expect(machines).to_have_count(6))
    for number, texts in (
        (0, ("desk-1", "connected", "running", "Post invoices", "last seen")),
        (5, ("desk-6", "disconnected")),
    ):
        for text in texts:
            console.reads(machines.nth(number), text)
    pools = console.page.locator("section", has=console.page.get_by_role("heading", name="Pools")).locator("li")
    console.reads(pools.nth(0), "3 machines, 3 can be given runs")
    console.reads(pools.nth(1), "4 machines, 3 can be given runs")
    desk = machines.nth(1)
    console.do(desk.get_by_role("button", name="Set aside").click())
    console.reads(desk, "set aside")
    machine = f"/v1/machines/{scene.machines['desk-2']}"
    assert api.json_of(api.get(machine))["is_available"] is False
    console.do(desk.get_by_role("button", name="Give it runs again").click())
    until(lambda: api.json_of(api.get(machine))["is_available"])
    console.do(console.page.get_by_role("searchbox", name="Find machines").fill("desk-6"))
    console.do(console.page.keyboard.press("Enter"))
    console.do(expect(machines).to_have_count(1))
    console.sign_in_again(server.stack.new_key(api.organization, scopes=["runs:read"]))
    console.sees("it lacks the scope resources:write")
    console.misses(console.page.get_by_role("button", name="Set aside"))


def test_a_reservation_is_freed_after_a_question(console: Console, api: Client) -> None:
    desk = api.machine(name="desk-7")
    run = api.run(machine_id=desk, start_session=True)
    until(lambda: api.json_of(api.get(f"/v1/machines/{desk}"))["reserved_session_id"])
    console.sign_in("#/machines")
    console.do(console.page.get_by_role("button", name="Free the reservation").click())
    console.reads(console.dialog, "Its active runs are cancelled")
    console.do(console.dialog.get_by_role("button", name="Free it").click())
    console.misses(console.page.get_by_role("button", name="Free the reservation"))
    assert api.get_run(run["id"])["status"] == "cancelled"
    assert api.json_of(api.get(f"/v1/machines/{desk}"))["reserved_session_id"] is None
