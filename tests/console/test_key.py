"""The key: accepted, refused, kept in this tab alone, and gone when it should be."""

import re

from playwright.async_api import expect

from tests.console.conftest import Console
from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.waiting import until


def test_a_key_is_pasted_and_the_runs_are_there(console: Console, api: Client) -> None:
    run = api.finished("error")
    console.sign_in()
    console.reads(console.rows, run["id"][:8])
    assert console.do(console.page.title()) == "Runs · Runs console"


def test_what_surrounds_a_pasted_key_does_no_harm(console: Console) -> None:
    console.sign_in(key=f"  Bearer {console.key}\n")
    console.sees("No runs yet")


def test_a_wrong_key_is_refused_and_kept_nowhere(console: Console) -> None:
    console.tab.expect("status of 401")
    console.tab.open(console.url)
    field = console.page.get_by_label("API key")
    for wrong, sentence in (
        ("", "Paste a key first"),
        ("two words", "A key has no spaces"),
        ("wrong", "does not know this key"),
    ):
        console.do(field.fill(wrong))
        console.do(console.page.get_by_role("button", name="Sign in").click())
        console.sees(sentence)
        console.do(expect(field).to_have_attribute("aria-invalid", "true"))
        console.do(expect(field).to_be_focused())
    assert console.storage() == {}


def test_the_key_lives_in_the_tabs_storage_and_survives_a_reload_there(console: Console, api: Client) -> None:
    run = api.finished()
    console.sign_in(f"#/runs/{run['id']}/inputs")
    console.do(console.page.reload())
    console.sees(console.page.get_by_role("heading", name="Secrets"))
    assert console.storage()["api-key"] == console.key
    assert console.do(console.page.evaluate("({...localStorage})")) == {}
    assert console.do(console.page.context.cookies()) == []
    assert all(console.key not in request.url for request in console.asked)
    assert console.key not in console.do(console.page.content())
    assert console.do(console.page.evaluate("indexedDB.databases()")) == []


def test_signing_out_leaves_nothing_behind(console: Console, api: Client) -> None:
    run = api.finished("error")
    console.sign_in()
    console.sees(run["id"][:8])
    console.do(console.page.get_by_role("button", name="Your key").click())
    console.do(console.dialog.get_by_role("button", name="Sign out").click())
    console.sees("The key is no longer in this tab")
    assert console.storage() == {}
    assert run["id"][:8] not in console.do(console.page.content())
    console.do(console.page.reload())
    console.sees(console.page.get_by_label("API key"))


def test_a_revoked_key_signs_out_at_the_next_request(console: Console, api: Client, stack: Stack) -> None:
    console.tab.expect("status of 401")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    stack.sql("UPDATE api_keys SET revoked_at = now() WHERE organization_id = $1", api.organization)
    console.sees("does not accept the key any more")
    assert console.storage() == {}
    assert run["id"] not in re.sub(r"#\S*", "", console.do(console.page.content()))
    console.misses(console.page.locator("dialog"))


def test_what_was_typed_is_there_again_after_a_revoked_key_but_no_secret(
    console: Console, api: Client, stack: Stack, server: Server
) -> None:
    console.tab.expect("status of 401")
    run = api.finished("error", input_values={"user": "ada"}, sensitive_input_values={"password": "old"})
    console.sign_in()
    console.open_retry(run["id"])
    console.do(console.choose("Values", "Change").get_by_label("Value of user").fill("grace"))
    console.do(console.choose("Secrets", "Change").locator("[data-secret]").fill("canary-2"))
    console.do(console.dialog.get_by_label("Reason").fill("the password was changed"))
    stack.sql("UPDATE api_keys SET revoked_at = now() WHERE organization_id = $1", api.organization)
    console.sees("What you typed into a dialog is there again")
    assert "grace" not in console.do(console.page.content())
    console.enter_key(stack.new_key(api.organization))
    console.do(expect(console.dialog.get_by_label("Value of user")).to_have_value("grace"))
    console.do(expect(console.dialog.get_by_label("Reason")).to_have_value("the password was changed"))
    console.do(expect(console.dialog.locator("[data-secret]")).to_have_value(""))
    console.do(console.dialog.locator("[data-secret]").fill("new"))
    console.reads(console.dialog.locator("aside"), "will be queued")
    console.do(console.send.click())
    console.reads(console.page.locator(".runhead"), "attempt 2")
    with server.client(api.organization, key=stack.new_key(api.organization)) as again:
        assert again.get_run(run["id"])["input_values"] == {"user": "grace"}


def test_another_organization_sees_nothing_of_what_was_typed(
    console: Console, api: Client, foreign: Client, stack: Stack
) -> None:
    console.tab.expect("status of 401|status of 404")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    console.do(console.dialog.get_by_label("Reason").fill("canary-3"))
    stack.sql("UPDATE api_keys SET revoked_at = now() WHERE organization_id = $1", api.organization)
    console.sees("does not accept the key any more")
    console.enter_key(stack.new_key(foreign.organization))
    console.sees("No run with this id")
    console.misses(console.page.locator("dialog"))
    assert "canary-3" not in console.do(console.page.content())


def test_what_the_key_may_not_is_not_offered_and_it_says_why(console: Console, api: Client, stack: Stack) -> None:
    finished, running = api.finished("error"), api.run()
    api.report(running["id"], status="running")
    console.sign_in(f"#/runs/{finished['id']}", stack.new_key(api.organization, scopes=["runs:read"]))
    button = console.page.get_by_role("button", name="Retry …")
    console.do(expect(button).to_have_attribute("aria-disabled", "true"))
    console.do(
        expect(button).to_have_accessible_description(
            "This key may look, and not retry: it lacks the scope runs:write."
        )
    )
    console.do(button.click(force=True))
    console.do(console.page.keyboard.press("r"))
    console.misses(console.dialog)
    console.open_run(running["id"])
    console.do(expect(console.page.get_by_role("button", name="Cancel run …")).to_be_hidden())
    assert console.sent("POST", "/v1/") == []
    console.do(console.page.get_by_role("button", name="Your key").click())
    console.sees("May see runs, workflows, machines and the queue runs:read")
    console.sees("May not create, retry, cancel and delete runs runs:write")
    console.reads(console.dialog, api.organization)


def test_a_key_that_may_not_read_is_told_so(console: Console, api: Client, stack: Stack) -> None:
    console.tab.expect("status of 403")
    console.tab.open(console.url)
    console.enter_key(stack.new_key(api.organization, scopes=["runs:write"]))
    console.sees("it needs the scope runs:read")
    assert console.storage() == {}


def test_an_executors_key_sees_its_machines_runs_and_presses_nothing(
    console: Console, api: Client, stack: Stack
) -> None:
    desk = api.machine(name="desk-7")
    own = api.run(machine_id=desk)
    until(lambda: api.get_run(own["id"])["assigned_machine_id"])
    api.report(own["id"], status="running")
    api.report(own["id"], status="error", error=["it broke"])
    api.run(machine_id=api.machine(status="disconnected"))
    console.sign_in(key=stack.new_key(api.organization, scopes=["runs:execute"], machine_id=desk))
    console.do(expect(console.rows).to_have_count(1))
    console.do(expect(console.page.get_by_role("link", name="Queue")).to_be_hidden())
    console.open_run(own["id"])
    button = console.page.get_by_role("button", name="Retry …")
    console.do(
        expect(button).to_have_accessible_description(
            "This key belongs to a machine: it looks at that machine's runs, and retries none."
        )
    )


def test_half_an_hour_without_input_signs_out_and_wipes_the_page(console: Console, api: Client) -> None:
    run = api.finished("error", sensitive_input_values={"password": "old"})
    console.do(console.page.clock.install())
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Secrets", "Change")
    console.do(field.locator("[data-secret]").fill("typed"))
    console.do(console.page.clock.fast_forward("29:00"))
    console.do(console.page.mouse.move(300, 300))
    console.do(console.page.clock.fast_forward("29:00"))
    console.sees(console.dialog)
    console.do(console.page.clock.fast_forward("01:01"))
    console.sees("Signed out after 30 minutes without input")
    assert console.storage() == {}
    console.misses(console.page.locator("dialog"))
    assert run["id"][:8] not in console.text()
    # What was about to ask asks nothing any more.
    asked = len(console.asked)
    late = "import('/console/api.js').then(({ call }) => call('GET', 'runs')).catch((error) => error.name)"
    assert console.do(console.page.evaluate(late)) == "AbortError"
    assert [request.url for request in console.asked[asked:] if "/v1/" in request.url] == []


def test_a_tab_that_is_restored_later_shows_nothing(console: Console, api: Client) -> None:
    """A laptop that slept, a tab that a browser brings back: its storage is still there, its time is over."""
    api.finished("error")
    console.sign_in()
    console.sees(console.rows)
    for when in ("Date.now() - 31 * 60000", "Date.now() + 3600000", "'nonsense'"):
        console.do(
            console.page.evaluate(
                f"sessionStorage.setItem('api-key', '{console.key}'), sessionStorage.setItem('last-input', String({when}))"
            )
        )
        before = len(console.sent("GET", "whoami"))
        console.do(console.page.reload())
        console.sees("Signed out after 30 minutes without input")
        assert console.storage() == {}
        assert len(console.sent("GET", "whoami")) == before  # the key was not even tried
        console.do(console.page.get_by_label("API key").fill(console.key))
        console.do(console.page.keyboard.press("Enter"))
        console.sees(console.rows)


def test_keys_are_listed_by_name_and_never_shown(console: Console, api: Client, stack: Stack) -> None:
    stack.sql("UPDATE api_keys SET name = 'night shift' WHERE organization_id = $1", api.organization)
    reader = stack.new_key(api.organization, scopes=["runs:read"])
    run = api.finished("error")
    api.json_of(api.retry(run["id"]))
    console.sign_in("#/keys")
    own = console.page.locator(".machines > li", has_text="night shift")
    for text in ("this key", "* (everything)", "last used"):
        console.reads(own, text)
    console.sees("keys revoke ID")
    assert console.key not in console.do(console.page.content())
    console.sign_in_again(reader)
    console.do(expect(console.rows).to_have_count(1))
    console.do(expect(console.page.get_by_role("link", name="Keys")).to_be_hidden())
    console.go(f"#/runs/{run['id']}/attempts")
    console.reads(console.page.locator(".attempts"), "key night shift")
