"""Two attempts of a run side by side."""

import json
from typing import Any

from playwright.async_api import Locator, expect

from tests.console.conftest import Console
from tests.console.sample_data import failed_login
from tests.support.client import Client
from tests.support.stack import Stack
from tests.support.waiting import until


def cells(console: Console, label: str) -> list[str]:
    """What both attempts have in this row."""
    found: list[str] = console.do(row(console, label).locator("td").all_inner_texts())
    return [text.strip() for text in found]


def row(console: Console, label: str) -> Locator:
    return console.page.locator(
        ".comparison tbody tr", has=console.page.get_by_role("rowheader", name=label, exact=True)
    )


def test_two_attempts_are_shown_side_by_side(console: Console, api: Client, stack: Stack) -> None:
    workflow, desk = api.workflow(), api.machine(name="desk-7")
    run_id = api.run(workflow_id=workflow, machine_id=desk)["id"]

    def attempt(number: int, **report: Any) -> None:
        until(lambda: api.get_run(run_id)["assigned_machine_id"])
        api.report(run_id, status="running", usage_metadata={"tokens": number})
        api.upload(run_id, filename=f"shot-{number}.txt")
        api.report(run_id, status="error", error=[f"Broken {number} <b>"], output_data={"n": number}, **report)

    attempt(1, error_code="login.failed")
    api.json_of(api.retry(run_id, input_values={"a": 1}, reason="A new password."))
    attempt(2, run_message_history=failed_login())
    api.json_of(api.retry(run_id))
    # As ATTEMPT_OUTPUTS=all leaves it.
    stack.sql(
        "WITH kept AS (UPDATE run_attempts SET outputs_are_kept = true WHERE run_id = $1 AND attempt = 2)"
        " INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history, usage_metadata)"
        " VALUES ($1, 2, '{\"n\": 2}', $2::text::json, '{\"tokens\": 2}')"
        " ON CONFLICT (run_id, attempt) DO UPDATE SET is_superseded = false, output_data = excluded.output_data,"
        " run_message_history = excluded.run_message_history",
        run_id,
        json.dumps(failed_login()),
    )
    console.sign_in(f"#/runs/{run_id}/attempts")
    form = console.page.get_by_role("form", name="Compare two attempts")
    assert console.do(form.get_by_label("First attempt").input_value()) == "2"
    assert console.do(form.get_by_label("Second attempt").input_value()) == "3"
    console.do(form.get_by_label("First attempt").select_option("1"))
    console.do(form.get_by_label("Second attempt").select_option("2"))
    console.do(form.get_by_role("button", name="Compare").click())
    console.sees(console.page.get_by_role("columnheader", name="Attempt 1"))
    assert cells(console, "Status") == ["error", "error"]
    assert cells(console, "What went wrong") == ["login.failed\n\nBroken 1 <b>", "Broken 2 <b>"]
    assert cells(console, "Machine") == ["desk-7", "desk-7"]
    begun = cells(console, "Begun by")
    assert begun == ["the run's creation", "a retry by you (this key): “A new password.”"]
    assert cells(console, "Changed fields") == ["\u2013", "values"]
    assert [text.strip("{} ") for text in cells(console, "Used")] == ['"tokens": 1', '"tokens": 2']
    assert all(text.endswith("s") for label in ("Waited", "Ran") for text in cells(console, label))
    cleared, result = cells(console, "Result")
    assert ("Cleared by the retry" in cleared, '"n": 2' in result) == (True, True)
    console.do(expect(row(console, "Last picture").get_by_role("img")).to_have_count(1))
    console.do(expect(row(console, "Status")).not_to_have_class("differs"))
    console.do(expect(row(console, "What went wrong")).to_have_class("differs"))
    # What is chosen stays while the run goes on.
    api.report(run_id, status="running")
    console.sees(console.page.locator(".runhead").get_by_text("running").first)
    assert console.do(form.get_by_label("First attempt").input_value()) == "1"
    console.sees(console.page.get_by_role("columnheader", name="Attempt 1"))


def test_one_attempt_is_compared_with_nothing(console: Console, api: Client) -> None:
    run_id = api.run()["id"]
    console.sign_in(f"#/runs/{run_id}/attempts")
    console.sees(console.page.locator(".attempts > li"))
    console.misses(console.page.get_by_role("form", name="Compare two attempts"))
