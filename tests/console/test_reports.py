"""Executors report what they like: the console shows it all, in pieces, and none of it hides, moves or runs anything."""

import json
import shlex
from typing import Any

import pytest
from playwright.async_api import expect

from tests.console.conftest import Console
from tests.support.client import Client
from tests.support.stack import Stack

# Where the forms of models' vendors have text, and JSON has something else. `toString` makes a text of nothing.
STRANGE: list[Any] = [
    {"toString": None, "valueOf": 1},
    {"text": {"toString": None}},
    [],
    None,
    7,
    {"__proto__": {"toString": 1}, "constructor": 1, "length": -1},
]


def forms(value: Any) -> list[Any]:
    """Messages in the forms of models' vendors, with this value in each place."""
    blocks = [
        {"type": value, "text": value},
        {"type": "tool_use", "name": value, "input": value},
        {"type": "tool_result", "content": value, "is_error": value},
        {"type": "image", "source": value, "image_url": value},
        {"source": {"media_type": value, "data": "AA==", "url": value}},
        {"type": "thinking", "thinking": value},
        value,
    ]
    calls = [value, {"function": value}, {"function": {"name": value, "arguments": value}}]
    return [
        {"role": "user", "content": value},
        {"role": value, "type": value, "content": blocks},
        *({"role": "user", "content": [block]} for block in blocks),
        {"role": "tool", "tool_calls": calls},
    ]


FORMS = [message for value in STRANGE for message in forms(value)]


def reported(api: Client, **report: object) -> str:
    run_id = str(api.run()["id"])
    api.report(run_id, status="running")
    api.report(run_id, status="error", **report)
    return run_id


def test_any_history_is_shown(console: Console, api: Client) -> None:
    assert len(FORMS) == 60, "so many are on the page at once"
    run_id = reported(api, error=["it broke"], output_data={"total": 7}, run_message_history=FORMS)
    console.sign_in(f"#/runs/{run_id}")
    console.do(expect(console.page.locator(".history > li")).to_have_count(60))
    console.sees("it broke")
    console.reads(console.page.locator(".panel"), '"total": 7')


def test_a_message_of_many_parts_comes_in_pieces(console: Console, api: Client) -> None:
    content = [{"type": "text", "text": f"part {number}"} for number in range(80_000)]
    run_id = reported(api, run_message_history=[{"role": "user", "content": content}], error=["line"] * 500)
    console.sign_in(f"#/runs/{run_id}")
    parts = console.page.locator(".history .said p")
    console.do(expect(parts).to_have_count(60))
    console.do(expect(console.page.locator(".failure")).to_have_count(60))
    console.do(console.page.get_by_role("button", name="Show 500 more of 80,000").click())
    console.do(expect(parts).to_have_count(560))
    console.do(expect(parts.last).to_have_text("part 559"))


def test_long_errors_leave_the_list_readable(console: Console, api: Client, stack: Stack) -> None:
    """Two runs, from before errors had a bound, are too large for one page."""
    runs = [reported(api, error=["it broke"]) for _ in range(2)]
    lines = "ARRAY(SELECT repeat('x', 100000) FROM generate_series(1, 170))"
    stack.sql(f"UPDATE runs SET error = {lines} WHERE id = ANY($1::uuid[])", runs)
    other = api.run()["id"]
    console.tab.expect("status of 422")  # the answer that tells the console to ask for less
    console.sign_in()
    console.do(expect(console.rows).to_have_count(3))
    console.reads(console.rows.last, "Too long for this list: open the run")
    console.reads(console.rows.first, other[:8])
    console.do(expect(console.page.locator(".banner")).to_have_text(""))


def test_json_reads_from_left_to_right(console: Console, api: Client) -> None:
    data = {"total\u202e": "\u2067100", "\u05d0\u05d1": 1234, "\u05d2\u05d3": 5678, "e\u200f\ufeff": 1}
    run_id = reported(api, output_data=data, error=["pay \u202e001 EUR"])
    console.sign_in(f"#/runs/{run_id}")
    shown = console.page.locator("section", has_text="Result").locator("pre.code")
    console.reads(shown, '"total\\u202e": "\\u2067100"')
    console.reads(shown, '"e\\u200f\\ufeff": 1')
    console.reads(console.page.locator(".failure"), "pay \\u202e001 EUR")
    # A name from right to left stands before its amount, and the amount does not move into it.
    left = "(all) => Object.fromEntries(all.map((one) => [one.textContent, one.getBoundingClientRect().left]))"
    at = console.do(shown.locator("span").evaluate_all(left))
    assert at['"\u05d0\u05d1"'] < at["1234"]
    assert at['"\u05d2\u05d3"'] < at["5678"]
    assert json.loads(console.do(shown.text_content()) or "") == data, "it means the same"


@pytest.mark.parametrize("word", ["__proto__", "constructor", "toString"])
def test_words_that_every_object_has_are_no_addresses(console: Console, api: Client, word: str) -> None:
    run_id = reported(api, error=["it broke"])
    console.sign_in(f"#/runs/{run_id}/{word}")
    console.sees("it broke")
    console.go(f"#/runs?status={word}&since={word}")
    console.do(expect(console.rows).to_have_count(1))
    console.go(f"#/webhooks/{api.webhook_endpoint()}?status={word}")
    console.sees("No message yet")
    console.go(f"#/{word}")
    console.do(expect(console.rows).to_have_count(1))


def test_what_is_copied_holds_no_character_that_a_terminal_acts_on(console: Console, api: Client) -> None:
    evil = "a\x7f\x9b31m\u202e\x1b]0;x\x07 id\u2028 'quoted' \u00e9 \U0001f600"
    run = api.finished("error", input_values={evil: evil})
    console.do(console.page.context.grant_permissions(["clipboard-read", "clipboard-write"]))
    console.sign_in()
    console.open_retry(run["id"])
    console.choose("Values", "Change")
    for language in ("curl", "Python"):
        console.do(console.dialog.get_by_role("button", name=language, exact=True).click())
        text = str(console.do(console.page.evaluate("navigator.clipboard.readText()")))
        assert not [one for one in text if not ("\x20" <= one <= "\x7e" or one == "\n")], repr(text)
        assert text.count("\n") < 20
        if language == "curl":
            arguments = shlex.split(text)
            sent = json.loads(arguments[arguments.index("-d") + 1])
        else:
            body = next(line for line in text.splitlines() if line.startswith("    json="))
            sent = eval(body.removeprefix("    json=").removesuffix(","))
        assert sent["input_values"] == {evil: evil}
