"""Webhooks: endpoints, what became of each message, and sending again, as far as the key allows."""

from uuid import UUID, uuid4

from playwright.async_api import Locator, expect

from tests.console.conftest import Console, body
from tests.console.sample_data import night
from tests.support.client import Client
from tests.support.stack import Stack
from tests.support.waiting import until


def items(console: Console) -> Locator:
    return console.page.locator(".attempts > li")


def button(console: Console, name: str) -> Locator:
    return console.page.get_by_role("button", name=name)


def test_what_was_sent_of_a_run_stands_with_the_run(console: Console, api: Client, stack: Stack) -> None:
    scene = night(stack, api, past=0)
    console.sign_in(f"#/runs/{scene.runs['failed']}/webhooks")
    console.do(expect(items(console)).to_have_count(4))
    for position, texts in enumerate(
        (
            ("https://", "attempt 2"),
            ("https://", "attempt 2"),
            ("https://", "attempt 1"),
            ("https://", "attempt 1"),
        )
    ):
        for text in texts:
            console.reads(items(console).nth(position), text)
    pending = items(console).filter(has_text="pending")
    for text in ("chat.acme.example", "No answer within 15 s", "3 tries", "next try in 16 min"):
        console.reads(pending, text)
    console.reads(items(console).filter(has_text="ledger.acme.example").first, "204 after 41 ms")
    console.do(pending.get_by_text("Answers").click())
    tries = pending.locator(".events > li")
    console.do(expect(tries).to_have_count(3))
    console.reads(tries.nth(0), "No answer within 15 s")
    console.reads(tries.nth(1), "503 after 41 ms")
    console.reads(tries.nth(1), "queue is full")
    # What is open stays open while it is updated.
    stack.sql(
        "UPDATE webhook_deliveries SET tries = 4 WHERE organization_id = $1 AND status = 'pending'", api.organization
    )
    console.reads(pending, "4 tries")
    console.do(expect(tries).to_have_count(3))
    console.do(pending.get_by_role("link", name="chat.acme.example").click())
    console.sees(console.page.get_by_role("heading", name="chat.acme.example"))
    console.do(expect(items(console)).to_have_count(2))


def test_nothing_was_sent_and_why(console: Console, api: Client, stack: Stack) -> None:
    run = api.finished()
    console.sign_in(f"#/runs/{run['id']}/webhooks")
    console.sees("is_webhooks_enabled is off")
    stack.sql("UPDATE workflows SET is_webhooks_enabled = true WHERE id = $1", UUID(run["workflow_id"]))
    console.do(console.page.reload())
    console.sees("There is no endpoint.")
    api.webhook_endpoint()
    console.sees("It ended before there was an endpoint")
    console.go("#/webhooks")
    console.sees("https://localhost/")


def test_an_endpoint_shows_its_messages_by_state_and_sends_again(console: Console, api: Client, stack: Stack) -> None:
    """localhost may be registered and not connected to, so what is sent fails at once."""
    endpoint = api.webhook_endpoint()
    console.sign_in("#/webhooks")
    console.do(console.page.get_by_role("link", name="https://localhost/").click())
    console.sees("No message yet")
    console.do(button(console, "Send a test").click())
    console.reads(items(console), "Its address may not be used")
    console.reads(items(console), "Test")
    console.reads(console.page.locator(".runhead"), "failing for")
    state = "UPDATE webhook_deliveries SET status = 'failed' WHERE endpoint_id = $1"
    stack.sql(state, UUID(endpoint))
    console.reads(items(console), "failed")
    console.go(f"#/webhooks/{endpoint}?status=delivered")
    console.sees("No message is delivered")
    console.go(f"#/webhooks/{endpoint}?status=failed")
    console.do(expect(items(console)).to_have_count(1))
    [row] = stack.sql("SELECT id FROM webhook_deliveries WHERE endpoint_id = $1", UUID(endpoint))
    console.do(button(console, "Send again").click())
    console.sees("It is sent again")
    [sent] = console.sent("POST", f"/webhook-deliveries/{row['id']}/resend")
    assert "idempotency-key" in sent.headers
    # A receiver's log has the message's id.
    console.go("#/runs")
    console.do(console.page.get_by_label("Go to the run").fill(str(row["id"])))
    console.tab.expect("status of 404")
    console.do(console.page.keyboard.press("Enter"))
    console.sees(console.page.get_by_role("heading", name="https://localhost/"))
    assert "whsec_" not in console.do(console.page.content())
    assert not console.sent("GET", "/secret")


def test_recovering_since_a_time(console: Console, api: Client, stack: Stack) -> None:
    endpoint = api.webhook_endpoint()
    api.json_of(api.patch(f"/v1/webhook-endpoints/{endpoint}", json={"disabled": True}))
    stack.new_events(api.organization, 2)
    until(lambda: not stack.sql("SELECT FROM webhook_events WHERE NOT is_fanned_out"), what="the fanning out")
    console.sign_in(f"#/webhooks/{endpoint}")
    console.sees("Nothing is sent to it.")
    console.misses(button(console, "Recover …"))
    console.do(button(console, "Enable").click())
    console.do(button(console, "Recover …").click())
    since = console.dialog.get_by_label("Everything since")
    console.do(since.fill(""))
    console.do(console.dialog.get_by_role("button", name="Recover", exact=True).click())
    console.sees("Choose a time.")
    console.do(since.fill("2026-01-31T12:00"))
    console.do(console.dialog.get_by_role("button", name="Recover", exact=True).click())
    console.misses(console.dialog)
    console.do(expect(items(console)).to_have_count(2))
    [sent] = console.sent("POST", "/recover")
    assert body(sent) == {"since": "2026-01-31T12:00:00.000Z"}


def test_a_key_that_may_not_send_is_offered_nothing(console: Console, api: Client, stack: Stack) -> None:
    endpoint = api.webhook_endpoint()
    api.json_of(api.post(f"/v1/webhook-endpoints/{endpoint}/test"), 201)
    console.sign_in(f"#/webhooks/{endpoint}", stack.new_key(api.organization, scopes=["runs:read"]))
    console.do(expect(items(console)).to_have_count(1))
    console.sees("it lacks the scope webhooks:write")
    for name in ("Send again", "Send a test", "Recover …"):
        console.misses(button(console, name))
    console.go(f"#/webhooks/{uuid4()}")
    console.tab.expect("status of 404")
    console.sees("No endpoint with this id")
    assert console.sent("POST", "/v1/") == []


def test_an_executors_key_sees_no_webhooks(console: Console, api: Client, stack: Stack) -> None:
    desk = api.machine()
    run = api.run(machine_id=desk)
    console.sign_in("#/webhooks", stack.new_key(api.organization, scopes=["runs:execute"], machine_id=desk))
    console.do(expect(console.page.get_by_role("link", name="Webhooks")).to_be_hidden())
    until(lambda: api.get_run(run["id"])["assigned_machine_id"], what="the assignment")
    console.do(expect(console.rows).to_have_count(1))
    console.open_run(run["id"])
    console.do(expect(console.page.locator(".tabs a", has_text="Webhooks")).to_be_hidden())


def test_an_endpoint_is_made_and_changed_in_a_form(console: Console, api: Client) -> None:
    console.tab.expect("status of 422")
    console.sign_in("#/webhooks")
    console.do(console.page.get_by_role("button", name="New endpoint …").click())
    url = console.dialog.get_by_label("URL")
    console.do(url.fill("http://localhost/hooks"))
    console.do(console.dialog.get_by_role("button", name="Make the endpoint").click())
    console.do(expect(url).to_have_attribute("aria-invalid", "true"))
    console.do(url.fill("https://localhost/hooks"))
    console.do(console.dialog.get_by_label("Description").fill("the ledger"))
    console.do(console.dialog.get_by_role("button", name="Make the endpoint").dblclick())
    console.reads(console.page.locator(".runhead"), "https://localhost/hooks")
    console.do(console.page.get_by_text("The secret for its signatures").click())
    console.sees(console.page.get_by_text("/secret -H"))
    console.do(console.page.get_by_role("button", name="Change …").click())
    console.do(console.dialog.get_by_label("Description").fill("the new ledger"))
    console.do(console.dialog.get_by_role("button", name="Save").click())
    console.reads(console.page.locator(".runhead"), "the new ledger")
    [made] = api.json_of(api.get("/v1/webhook-endpoints"))["items"]
    assert (made["url"], made["description"]) == ("https://localhost/hooks", "the new ledger")
