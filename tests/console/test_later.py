"""Runs that start later: held until a time, or retried by their workflow's policy; and the policy in words."""

from datetime import UTC, datetime, timedelta

from playwright.async_api import expect

from tests.console.conftest import Console, body
from tests.support.bulk_retries import failed_runs
from tests.support.client import Client
from tests.support.server import Server
from tests.support.waiting import until

POLICY = {"max_retries": 2, "delays_seconds": [3600], "on": [{"status": "error", "error_contains": "timed out"}]}


def in_two_hours() -> datetime:
    return datetime.now(UTC) + timedelta(hours=2, seconds=30)


def failed_by_policy(api: Client) -> str:
    """A run that its workflow's policy retries in an hour."""
    workflow = api.workflow()
    api.json_of(api.patch(f"/v1/workflows/{workflow}", json={"name": "Post invoices", "retry_policy": POLICY}))
    run = str(api.run(workflow_id=workflow)["id"])
    api.report(run, status="error", error=["The ledger timed out."])
    return run


def test_a_held_run_says_when_it_starts_and_is_moved_and_started(console: Console, api: Client) -> None:
    at = in_two_hours()
    run = api.run(not_before=at.isoformat())
    console.sign_in()
    console.reads(console.rows.first, "in 2 h")
    console.open_run(run["id"])
    panel = console.page.locator(".panel")
    console.reads(panel, "Starts at ")
    console.reads(panel, "in 2 h")
    title = console.do(panel.locator("time").first.get_attribute("title"))
    assert title == f"{at:%Y-%m-%d %H:%M:%S} UTC"
    console.do(console.page.get_by_role("button", name="Move …").click())
    field = console.dialog.get_by_label("Start not before")
    console.do(field.fill(""))
    console.do(console.dialog.get_by_role("button", name="Move", exact=True).click())
    console.sees(console.dialog.get_by_text("Choose a time."))
    later = (datetime.now(UTC) + timedelta(hours=5, minutes=2)).strftime("%Y-%m-%dT%H:%M")
    console.do(field.fill(later))
    console.do(console.dialog.get_by_label("Reason").fill("The bank opens later."))
    console.do(console.dialog.get_by_role("button", name="Move", exact=True).click())
    console.reads(panel, "in 5 h")
    console.do(console.page.get_by_role("button", name="Start now").click())
    console.misses(console.page.get_by_role("button", name="Start now"))
    assert api.get_run(run["id"])["not_before"] is None
    events = api.json_of(api.get(f"/v1/runs/{run['id']}/events"))["items"]
    assert next(event["reason"] for event in events if event["event"] == "rescheduled") == "The bank opens later."


def test_a_waiting_run_can_be_held_and_a_reader_only_looks(console: Console, api: Client, server: Server) -> None:
    run = api.run(machine_id=api.machine(status="disconnected"))
    console.sign_in(f"#/runs/{run['id']}")
    console.do(console.page.get_by_role("button", name="Start later …").click())
    console.do(console.dialog.get_by_role("button", name="Start later", exact=True).click())
    console.sees(console.page.get_by_role("button", name="Start now"))
    assert api.get_run(run["id"])["not_before"]
    console.go("#/queue")
    console.sees("1 run is held until a start time.")
    console.sign_in_again(server.stack.new_key(api.organization, scopes=["runs:read"]))
    console.open_run(run["id"])
    console.reads(console.page.locator(".panel"), "Starts at ")
    console.misses(console.page.get_by_role("button", name="Start now"))


def test_a_retry_and_a_bulk_retry_can_start_later(console: Console, api: Client) -> None:
    one, *many = failed_runs(api, 3)
    at = in_two_hours()
    wanted = at.strftime("%Y-%m-%dT%H:%M")
    console.sign_in()
    console.open_retry(one)
    field = console.choose("Start", "Later")
    console.do(field.get_by_label("Start not before").fill(wanted))
    console.reads(console.dialog.locator("aside"), "Is held until its start time")
    console.do(console.send.click())
    console.reads(console.page.locator(".panel"), "Starts at ")
    [sent] = console.retries()
    assert datetime.fromisoformat(body(sent)["not_before"]) == at.replace(second=0, microsecond=0)
    console.go("#/runs?status=error")
    console.do(expect(console.rows).to_have_count(2))
    console.do(console.page.get_by_role("checkbox", name="Choose all runs of this page").click())
    console.do(console.page.get_by_role("button", name="Retry chosen").click())
    console.do(console.choose("Start", "Later").get_by_label("Start not before").fill(wanted))
    console.sees(console.dialog.get_by_text("2 will wait: is held until its start time"))
    console.do(console.dialog.get_by_role("button", name="Retry 2 runs").click())
    console.sees(console.page.get_by_text("2 of 2 runs retried"))
    assert all(api.get_run(run)["not_before"] for run in [one, *many])


def test_a_run_that_the_policy_retries_says_when_and_why_and_can_be_dropped(console: Console, api: Client) -> None:
    run = failed_by_policy(api)
    console.sign_in()
    console.reads(console.rows.first, "Retried at ")
    console.open_run(run)
    panel = console.page.locator(".panel")
    for text in ("Will be retried at ", "attempt 2 of 3", "Because rule 1 of its workflow's retry policy matched."):
        console.reads(panel, text)
    console.do(console.page.get_by_role("button", name="Drop it").click())
    console.misses(console.page.get_by_role("button", name="Drop it"))
    assert api.get_run(run)["next_retry_at"] is None
    console.go(f"#/runs/{run}/events")
    console.reads(console.page.locator(".events"), "because of requested")


def test_a_planned_retry_is_made_now_and_once(console: Console, api: Client) -> None:
    run = failed_by_policy(api)
    console.sign_in(f"#/runs/{run}")
    console.do(console.page.get_by_role("button", name="Retry now").dblclick())
    console.reads(console.page.locator(".runhead"), "attempt 2")
    assert api.get_run(run)["attempt"] == 2
    assert [body(request) for request in console.retries()] == [{"expected_attempt": 1}]


def test_the_policy_of_a_workflow_is_read_and_changed_with_a_preview(
    console: Console, api: Client, server: Server
) -> None:
    console.tab.expect("status of 422")
    run = failed_by_policy(api)
    workflow = api.get_run(run)["workflow_id"]
    console.sign_in("#/workflows")
    console.do(console.page.get_by_role("link", name="Post invoices").click())
    console.reads(console.page.locator(".attempts"), "Version 1")  # it had no name
    policy = console.page.locator(".policytext")
    console.reads(policy, "Retries after 1 h, 1 h; then stays in error.")
    console.reads(policy, "Rule 1: ended in error with “timed out” in a line of its error.")
    console.do(console.page.get_by_role("button", name="Change …").click())
    preview = console.dialog.locator(".preview")
    console.do(console.dialog.get_by_label("Retries in a row").fill("3"))
    console.do(console.dialog.get_by_label("Waits").fill("10, 60 s, soon"))
    console.reads(preview, "Waits look like")
    console.do(console.dialog.get_by_role("button", name="Save the policy").click())
    console.do(expect(console.dialog.get_by_label("Waits")).to_be_focused())
    console.do(console.dialog.get_by_label("Waits").fill("10, 60 s, 5 min"))
    console.reads(preview, "Retries after 10 s, 60 s, 5 min; then stays in error.")
    console.do(console.dialog.get_by_label("Code of the error").fill("executor lost"))
    console.do(console.dialog.get_by_role("button", name="Save the policy").click())
    console.do(expect(console.dialog.get_by_label("Code of the error")).to_have_attribute("aria-invalid", "true"))
    console.do(console.dialog.get_by_label("Code of the error").fill("executor_lost"))
    console.do(console.dialog.get_by_role("button", name="Save the policy").click())
    console.reads(policy, "Retries after 10 s, 60 s, 5 min; then stays in error.")
    stored = api.json_of(api.get(f"/v1/workflows/{workflow}"))["retry_policy"]
    assert (stored["max_retries"], stored["delays_seconds"]) == (3, [10, 60, 300])
    assert stored["on"] == [{"status": "error", "error_contains": "timed out", "error_code": "executor_lost"}]
    console.do(console.page.get_by_role("button", name="Change …").click())
    console.do(console.dialog.get_by_role("button", name="Remove the policy").click())
    console.reads(policy, "Is never retried by itself.")
    until(lambda: api.json_of(api.get(f"/v1/workflows/{workflow}"))["retry_policy"] is None)
    console.sign_in_again(server.stack.new_key(api.organization, scopes=["runs:read"]))
    console.reads(policy, "Is never retried by itself.")
    console.sees("it lacks the scope resources:write")
