"""Many runs at once: choosing rows, the forecast in sum, the job's page; with a mouse, and by keyboard alone."""

import re
import time

from playwright.async_api import expect

from tests.console.conftest import Console, body
from tests.support.bulk_retries import ended, failed_runs, items, start
from tests.support.client import Client
from tests.support.server import Server


def chosen(console: Console) -> str:
    return str(console.do(console.page.get_by_role("group", name="Chosen runs").inner_text()))


def test_rows_are_chosen_one_by_one_by_range_and_all_that_match(console: Console, api: Client) -> None:
    workflow = api.workflow()
    failed_runs(api, 5, workflow_id=workflow)
    console.sign_in(f"#/runs?status=error&workflow={workflow}")
    console.do(expect(console.rows).to_have_count(5))
    boxes = console.page.get_by_role("checkbox", name=re.compile("^Choose run "))
    console.do(boxes.nth(1).click())
    assert "1 run chosen" in chosen(console)
    console.do(boxes.nth(3).click(modifiers=["Shift"]))
    assert "3 runs chosen" in chosen(console)
    console.do(boxes.nth(2).click())
    assert "2 runs chosen" in chosen(console)
    console.do(console.page.get_by_role("checkbox", name="Choose all runs of this page").click())
    assert "5 runs chosen" in chosen(console)
    console.do(console.page.get_by_role("button", name="Leave all out").click())
    console.do(expect(console.page.get_by_role("group", name="Chosen runs")).to_be_hidden())


def test_forty_failed_runs_are_retried_by_keyboard_alone_in_less_than_a_minute(console: Console, api: Client) -> None:
    workflow, offline = api.workflow(), api.machine(status="disconnected")
    runs = [
        *failed_runs(api, 26, workflow_id=workflow),
        *failed_runs(api, 12, workflow_id=workflow, machine_id=offline),
        *failed_runs(api, 2, workflow_id=workflow),
    ]
    console.sign_in(f"#/runs?status=error&workflow={workflow}")
    console.do(expect(console.rows).to_have_count(40))
    began = time.monotonic()
    keyboard = console.page.keyboard
    console.do(console.page.get_by_role("checkbox", name="Choose all runs of this page").focus())
    console.do(keyboard.press("Space"))
    assert "40 runs chosen" in chosen(console)
    console.do(keyboard.press("Shift+R"))
    console.sees(console.dialog.get_by_text("40 of 40 runs can be retried"))
    console.sees(console.dialog.get_by_text("12 will wait: its machine is offline"))
    console.do(console.dialog.get_by_label("Reason").focus())
    console.do(keyboard.type("The application was down."))
    console.sees(console.dialog.get_by_role("button", name="Retry 40 runs"))
    for key in ("Tab", "Enter"):
        console.do(keyboard.press(key))
    console.sees(console.page.get_by_role("heading", name="Bulk retry"))
    console.sees(console.page.get_by_text("40 of 40 runs retried"))
    assert time.monotonic() - began < 60
    [job] = api.json_of(api.get("/v1/bulk-retries"))["items"]
    assert (job["state"], job["retried"], job["reason"]) == ("completed", 40, "The application was down.")
    assert {item["run_id"] for item in items(api, job)} == set(runs)


def test_what_cannot_be_retried_is_told_before_and_after(console: Console, api: Client) -> None:
    first = failed_runs(api, 2)[0]
    active = api.run()["id"]
    console.sign_in()
    console.do(expect(console.rows).to_have_count(3))
    console.do(console.page.get_by_role("checkbox", name="Choose all runs of this page").click())
    console.do(console.page.get_by_role("button", name="Retry chosen").click())
    console.sees(console.dialog.get_by_text("2 of 3 runs can be retried"))
    console.sees(console.dialog.get_by_text("1 is still active"))
    console.do(console.dialog.get_by_role("button", name="Retry 2 runs").click())
    console.sees(console.page.get_by_text("2 of 3 runs retried"))
    console.do(console.page.get_by_role("navigation", name="Outcome").get_by_role("link", name="skipped").click())
    console.sees(console.page.get_by_role("link", name=f"Run {active[:8]}"))
    console.misses(console.page.get_by_role("link", name=f"Run {first[:8]}"))
    console.open_run(first, "events")
    console.do(console.page.get_by_role("link", name="bulk retry").first.click())
    console.sees(console.page.get_by_role("heading", name="Bulk retry"))


def test_all_that_match_are_a_filter_and_the_job_can_be_paused_and_aborted(console: Console, api: Client) -> None:
    workflow = api.workflow()
    failed_runs(api, 102, workflow_id=workflow)
    console.sign_in(f"#/runs?status=error&workflow={workflow}")
    console.do(expect(console.rows).to_have_count(100))
    console.do(console.page.get_by_role("checkbox", name="Choose all runs of this page").click())
    console.do(console.page.get_by_role("button", name="Choose all 102 that match").click())
    assert "102 runs chosen" in chosen(console)
    console.do(console.page.get_by_role("button", name="Retry chosen").click())
    console.do(console.dialog.get_by_label("Retries a second at most").fill("0.1"))
    console.sees(console.dialog.get_by_role("button", name="Retry 102 runs"))
    console.do(console.dialog.get_by_role("button", name="Retry 102 runs").click())
    console.sees(console.page.get_by_text("1 of 102 runs retried"))
    [request] = [one for one in console.sent("POST", "/bulk-retries") if "dry_run" not in one.url]
    assert body(request)["filter"]["workflow_id"] == workflow
    for button, state in (("Pause", "paused"), ("Resume", "running"), ("Abort", "aborted")):
        console.do(console.page.get_by_role("button", name=button, exact=True).click())
        console.sees(console.page.locator(".runhead").get_by_text(state, exact=True))
    console.go("#/bulk")
    console.sees(console.page.get_by_role("link", name="102 runs"))


def test_a_filter_that_cannot_be_applied_says_so(console: Console, api: Client) -> None:
    api.run()
    console.sign_in()
    console.do(expect(console.rows).to_have_count(1))
    session = console.page.get_by_role("searchbox", name="Session id")
    console.do(session.fill("desk"))
    console.do(session.press("Enter"))
    console.sees("A session is named by its whole id")


def test_a_reader_sees_jobs_and_chooses_nothing(console: Console, api: Client, server: Server) -> None:
    job = ended(api, start(api, run_ids=failed_runs(api, 2)))
    console.sign_in(f"#/bulk/{job['id']}", server.stack.new_key(api.organization, scopes=["runs:read"]))
    console.sees(console.page.get_by_text("2 of 2 runs retried"))
    console.sees(console.page.get_by_text("it lacks the scope runs:write"))
    console.go("#/runs")
    console.do(expect(console.rows).to_have_count(2))
    console.misses(console.page.get_by_role("checkbox", name=re.compile("^Choose ")))
