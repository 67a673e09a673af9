"""What a run is given: numbers that would change, aliases for secrets, references, and files that Windows cannot store."""

import json
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest

from app.schemas import numbers
from tests.support.client import Client, file_input, secret_path
from tests.support.stack import Stack

Ask = Callable[[str, str], httpx.Response]


class Ways:
    """Every way in which inputs come in, and what is there before and after."""

    def __init__(self, api: Client, stack: Stack) -> None:
        self.api = api
        self.stack = stack
        self.run = api.finished(sensitive_input_values={"pw": "old"}, file_inputs=[file_input()])
        workflow = api.workflow()
        retry = f"/v1/runs/{self.run['id']}/retry"
        self.writes: dict[str, tuple[str, dict[str, Any]]] = {
            "create": ("/v1/runs", {"workflow_id": workflow}),
            "bulk": ("/v1/runs/bulk", {"workflow_id": workflow, "count": 2}),
            "dry run": (f"{retry}?dry_run=true", {}),
            "retry": (retry, {}),
        }

    def send(self, name: str, text: str) -> httpx.Response:
        """`text` is JSON of the fields."""
        path, body = self.writes[name]
        content = json.dumps(body)[:-1] + (", " if body else "") + text[1:]
        return self.api.post(path, content=content.encode(), headers={"Content-Type": "application/json"})

    def assert_refused(self, text: str, loc: list[object], kind: str) -> str:
        """By all of them, before anything is staged or changed. Returns the sentence."""
        sentence = ""
        before = self.kept()
        for name in self.writes:
            [error] = self.api.json_of(self.send(name, text), 422)["detail"]
            assert (error["loc"], error["type"]) == (["body", *loc], kind), (name, text)
            sentence = error["msg"]
        assert self.kept() == before
        return sentence

    def kept(self) -> object:
        organization = self.api.organization
        runs = self.api.json_of(self.api.get("/v1/runs"))["items"]
        return runs, self.stack.secret_paths(f"runs/{organization}/"), self.stack.blobs(organization)


@pytest.fixture
def ways(api: Client, stack: Stack) -> Ways:
    return Ways(api, stack)


# --- numbers ----------------------------------------------------------------------------------------------------------

CHANGED = [
    *("0.1234567890123456789", "-0.30000000000000000001", "1e-400", "-1E-400", "4.9e-324", "0." + "0" * 400 + "1"),
    *("9007199254740993.0", "123456789012345678e-3", "1.00000000000000000000000001e0", "18446744073709551617.0"),
    *("9223372036854775809", "-9223372036854775809", "12345678901234567890", "18446744073709551615", "1" + "0" * 400),
]
KEPT = [
    *(
        "1.10",
        "-0.0",
        "0",
        "0e-400",
        "1E5",
        "5e-324",
        "1.7976931348623157e308",
        "0.30000000000000004",
        "1.5000000000000000",
    ),
    *(
        "9223372036854775807",
        "-9223372036854775808",
        "9223372036854775808",
        "100000000000000000000",
        "18446744073709551616",
    ),
    *("18446744073709552000", "1e+20", "100000000000000000000.0", "9007199254740993", "123456789012345.6", "1e22"),
]


def test_a_number_that_a_double_does_not_give_back_is_refused_where_it_stands(ways: Ways) -> None:
    for number in CHANGED:
        text = f'{{"input_values": {{"a": "x", "b": [{{"c": [1.5, {number} ]}}]}}}}'
        sentence = ways.assert_refused(text, ["input_values"], "number_changed")
        assert "send it as a string" in sentence
        assert number not in sentence
    ways.assert_refused(
        f'{{"sensitive_input_values": {{"a": {{"b": {CHANGED[0]}}}}}}}', ["sensitive_input_values"], "number_changed"
    )
    # Both at once, and behind a long text.
    text = f'{{"input_values": {{"t": "{"o" * 200_000}", "a": 0.1}}, "sensitive_input_values": {{"a": {CHANGED[0]}}}}}'
    ways.assert_refused(text, ["sensitive_input_values"], "number_changed")
    ways.assert_refused('{"input_values": {"a": 1e400}}', ["input_values"], "finite_number")


@pytest.mark.parametrize("field", ["input_values", "output_data", "usage_metadata", "run_message_history"])
def test_a_report_is_refused_for_them_too(api: Client, field: str) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    for number in ("0.1234567890123456789", "1e-400", "12345678901234567890"):
        value = f'{{"a": [{number}, "0.1234567890123456789"]}}'
        content = f'{{"{field}": {f"[{value}]" if field == "run_message_history" else value}, "attempt": 1.0}}'
        reply = api.patch(f"/v1/runs/{run['id']}", content=content, headers={"Content-Type": "application/json"})
        assert [(error["loc"], error["type"]) for error in api.json_of(reply, 422)["detail"]] == [
            (["body", field], "number_changed")
        ]
    reply = api.patch(
        f"/v1/runs/{run['id']}",
        content='{"attempt": 1.00000000000000000001}',
        headers={"Content-Type": "application/json"},
    )
    assert api.json_of(reply, 422)["detail"][0]["loc"] == ["body", "attempt"]


def test_a_number_that_a_double_gives_back_is_kept(ways: Ways) -> None:
    for name in ("create", "retry"):
        text = ", ".join(KEPT)
        reply = ways.send(name, f'{{"input_values": {{"a": [{text}]}}, "sensitive_input_values": {{"a": [{text}]}}}}')
        run = ways.api.json_of(reply, 201 if name == "create" else 200)
        shown = json.loads(reply.text, parse_float=Decimal, parse_int=Decimal)["input_values"]["a"]
        assert [float(number) for number in shown] == [float(number) for number in KEPT]
        assert json.loads(reply.text)["input_values"]["a"][9:11] == [2**63 - 1, -(2**63)]
        secret = ways.stack.secret(secret_path(run)) or {}
        assert [float(number) for number in json.loads(secret["a"])] == [float(number) for number in KEPT]


def test_numbers_in_texts_names_and_fields_that_nobody_knows_do_not_count(ways: Ways) -> None:
    number = CHANGED[0]
    values = {
        "a": number,
        "b": f'x, {number}, "{number}" [{number}] \\" , {number} , ',
        number: {f":{number},": 1.5},
        "\\": [0.0, "1e-400", ",1e-400,"],
    }
    text = json.dumps({"input_values": values, "x": {"y": "z"}})[:-2] + f', "{number}": {number}, "t": [1e-400]}}}}'
    assert ways.api.json_of(ways.send("create", text), 201)["input_values"] == values
    assert ways.api.json_of(ways.send("retry", text))["input_values"] == values
    schema = f'{{"maximum": {number}}}'
    workflow = ways.api.post("/v1/workflows", json={"main_prompt": "x", "input_schema": schema})
    assert ways.api.json_of(workflow, 201)["input_schema"] == schema


def test_any_decimal_is_judged_as_arithmetic_judges_it() -> None:
    random.seed(5)
    for _ in range(20_000):
        digits = str(random.randrange(10 ** random.randrange(1, 22)))
        point = random.randrange(len(digits) + 1)
        text = f"{digits[:point].lstrip('0') or '0'}.{digits[point:] or '0'}"
        if random.random() < 0.5:
            text += (
                f"{random.choice('eE')}{random.choice(['', '+', '-'])}{random.randrange(random.choice([5, 30, 330]))}"
            )
        double = float(text)
        if double == float("inf"):
            continue
        exactly = Decimal(text)
        is_kept = exactly == Decimal(repr(double)) or (
            exactly == exactly.to_integral_value() and exactly == Decimal(double)
        )
        raw = f'{{"x": [1, -{text}, "{text}"]}}'.encode()
        assert numbers.changed(raw, has_tiny=abs(double) < 2.3e-308) == (set() if is_kept else {("x",)}), text


def test_the_search_goes_through_pieces_and_long_texts() -> None:
    """Wherever a number lies over the boundary of two pieces, and whatever stands around it."""
    number = b"0.1234567890123456789"
    for size in range(65536 - 30, 65536 + 5):
        for filling in (b" ", b"o", b"7", b"\\\\"):
            text = b'"' + filling * (size // len(filling)) + b'"' if filling != b" " else filling * size
            separator = b"" if filling == b" " else b","
            assert numbers.changed(b"[[" + text + separator + number + b"]]", has_tiny=False) == {()}
            assert (
                numbers.changed(b'["' + filling * (size // len(filling)) + b"," + number + b',"]', has_tiny=False)
                == set()
            )
    many = b'{"a": ["' + (number + b",") * 20_000 + b'"], "b": [' + b"0.5," * 20_000 + number + b"]}"
    assert numbers.changed(many, has_tiny=False) == {("b",)}
    assert numbers.changed(b'{"a": [0.' + b"1" * 2000 + b"]}", has_tiny=False) == {("a",)}


# --- aliases ----------------------------------------------------------------------------------------------------------


def test_an_alias_is_no_secret(ways: Ways) -> None:
    """Whoever takes a run, changes one thing and sends it back would lose the secrets."""
    [alias] = ways.run["sensitive_input_aliases"].values()
    foreign = f"{uuid4()}/{uuid4()}"
    values: list[Any] = [
        alias,
        alias.replace("vault://", "vault+json://"),
        f"vault://secret/runs/another-organization/{foreign}#pw",
        f"vault+json://secret/runs/x/{foreign}#{quote('a#b/é ', safe='')}",
        f"vault://secret/runs/x/{foreign}#%70%77",
        f"vault://secret/runs%2Fx%2f{quote(foreign, safe='')}%23pw",
        f" {alias}\n",
        {"a": [1, {"b": alias}]},
        [[alias]],
    ]
    for value in values:
        text = json.dumps({"sensitive_input_values": {"fine": "x", "the-variable": value}})
        sentence = ways.assert_refused(text, ["sensitive_input_values"], "secret_alias")
        assert "the-variable" in sentence
        assert "fine" not in sentence
        assert "vault" not in sentence
    assert ways.stack.secret(secret_path(ways.run)) == {"pw": "old"}


def test_what_only_looks_like_an_alias_is_a_secret(ways: Ways) -> None:
    [alias] = ways.run["sensitive_input_aliases"].values()
    path = f"x/{uuid4()}/{uuid4()}#pw"
    values = {
        "in a text": f"see {alias}",
        "with more": f"{alias} and more",
        "elsewhere": f"vault://other/runs/{path}",
        "another prefix": f"vault://secret/runs-webhooks/{path}",
        "another scheme": alias.replace("vault://", "https://"),
        "no name": alias.partition("#")[0],
        alias: "as a name",
    }
    run = ways.api.json_of(
        ways.send("retry", json.dumps({"sensitive_input_values": values, "input_values": {"a": alias}}))
    )
    assert ways.stack.secret(secret_path(run)) == values


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["input_values", "sensitive_input_values"])
def test_a_reference_is_refused_by_name(ways: Ways, field: str) -> None:
    for value in ({"$ref": "a"}, {"a": {"$ref": "b"}}, {"a": [1, {"b": [{"$ref": {}}]}]}, {"a": {"$ref": None}}):
        sentence = ways.assert_refused(json.dumps({field: value}), [field], "not_supported")
        assert "$ref" in sentence
    fine = {"a": {"$ref": "x", "b": 1}, "b": "$ref", "c": ["$ref"], "d": {"ref": 1}}
    ways.api.json_of(ways.send("retry", json.dumps({field: fine})))


def test_a_reference_in_a_report_and_in_what_a_run_keeps_is_taken(api: Client, stack: Stack) -> None:
    run = api.run()
    values = {"a": {"$ref": "x"}}
    api.report(run["id"], status="running", output_data=values)
    ended = api.report(run["id"], status="error", input_values=values)
    assert (ended["input_values"], ended["output_data"]) == (values, values)
    assert api.json_of(api.retry(run["id"]))["input_values"] == values


# --- files ------------------------------------------------------------------------------------------------------------

DEVICES = [
    "CON",
    "con",
    "Prn",
    "AUX",
    "NUL",
    *(f"{port}{n}" for port in ("COM", "lpt") for n in "123456789¹²³"),
    "CONIN$",
]
BAD_NAMES = [
    *(
        "report:final.md",
        "a.txt:stream",
        "a::$DATA",
        "a<b>.txt",
        "what?.pdf",
        "a*b",
        "a|b",
        'a"b',
        "invoice.pdf.",
        "invoice.pdf ",
    ),
    *("a . .", *DEVICES, *(f"{device}.tar.gz" for device in DEVICES), "aux .txt"),
]
GOOD_NAMES = [
    *(
        "report final.md",
        " leading",
        ".hidden",
        "CONSOLE.txt",
        "COM10",
        "null.txt",
        "my.con",
        "é☃🙂.txt",
        "a%b",
        "x" * 255,
    ),
    *("(1) [2] {3} 'x' ~$&+,;=@^`!#.docx", "a..b"),
]
BAD_PATHS = [
    *(r"C:\in\AUX\b.txt", r"C:\in\b.txt:stream", r"C:\in:x\b", "/tmp/what?.pdf", r"C:\in.\b", r"C:\in \b", "in/con"),
    *(r"C:\a|b\c", r"\\server\share\LPT1.log", r"D:\x\com3.log\y", "1:\\a", "x" * 256, r"\\?\C:\nul", "a/b.", "a/b "),
]
GOOD_PATHS = [
    *(
        r"C:\in\a.txt",
        "C:/in/b.txt",
        "/home/me/x",
        r"\\server\share\x",
        r"\\?\C:\in\c.txt",
        r"%USERPROFILE%\a",
        "~/x",
        "C:a",
    ),
    *("C:\\in\\", "a", r"C:\a//b"),
]


def files(*named: tuple[str, str | None]) -> str:
    return json.dumps({"file_inputs": [file_input(filename=name, target_path=path) for name, path in named]})


def test_a_file_that_windows_cannot_store_is_refused_by_its_name(ways: Ways) -> None:
    for name in BAD_NAMES:
        for way in ("create", "dry run") if name not in BAD_NAMES[:3] else ways.writes:
            [error] = ways.api.json_of(ways.send(way, files(("fine.txt", None), (name, None))), 422)["detail"]
            assert error["loc"] == ["body", "file_inputs", 1, "filename"], name
            assert error["type"] in ("windows_filename", "filename")
    for path in BAD_PATHS:
        for way in ("create", "dry run") if path not in BAD_PATHS[:3] else ways.writes:
            [error] = ways.api.json_of(ways.send(way, files(("a.txt", path))), 422)["detail"]
            assert (error["loc"], error["type"]) == (["body", "file_inputs", 0, "target_path"], "windows_path"), path


def test_other_names_and_paths_are_taken(ways: Ways) -> None:
    ways.api.json_of(ways.send("create", files(*((name, None) for name in GOOD_NAMES))), 201)
    ways.api.json_of(ways.send("retry", files(*((f"{n}.txt", path) for n, path in enumerate(GOOD_PATHS)))))


def test_the_document_says_the_same_of_names_and_paths(api: Client) -> None:
    import re

    fields = api.get("/openapi.json").json()["components"]["schemas"]["FileInput"]["properties"]
    name = re.compile(fields["filename"]["pattern"])
    path = re.compile(fields["target_path"]["pattern"])
    assert [one for one in BAD_NAMES if name.search(one)] == []
    assert [one for one in GOOD_NAMES if not name.search(one)] == []
    assert [one for one in BAD_PATHS if path.search(one)] == []
    assert [one for one in GOOD_PATHS if not path.search(one)] == []


SAME = [
    (("a.txt", None), ("a.txt", None)),
    (("a.txt", None), ("A.TXT", None)),
    (("a.txt", None), ("b.txt", "a.txt")),
    (("a", "C:\\in\\x"), ("b", "c:/IN//X")),
    (("a", "C:\\in\\"), ("b", "C:\\in\\a")),
    (("a", "\\\\?\\C:\\in\\x"), ("b", "C:\\in\\x")),
    (("é.txt", None), ("e\u0301.TXT", None)),
    (("straße", None), ("STRASSE", None)),
]
DIFFERENT = [
    (("a.txt", None), ("b.txt", None)),
    (("a.txt", "C:\\in\\a.txt"), ("a.txt", "C:\\in\\b.txt")),
    (("a", "C:\\in\\x"), ("b", "D:\\in\\x")),
    (("a", "/in/x"), ("b", "in/x")),
    (("a", "\\\\s\\x"), ("b", "\\s\\x")),
]


def test_two_files_on_one_path_are_refused(ways: Ways) -> None:
    for first, second in SAME:
        field = "filename" if second[1] is None else "target_path"
        text = files(("other", None), first, second)
        ways.assert_refused(text, ["file_inputs", 2, field], "same_path")
    for first, second in DIFFERENT:
        ways.api.json_of(ways.send("create", files(first, second)), 201)


def test_what_an_executor_hands_in_and_what_a_run_keeps_is_never_refused(api: Client, stack: Stack) -> None:
    run = api.run(file_inputs=[file_input(filename="a.txt"), file_input(filename="b.txt")])
    stack.sql("UPDATE run_attachments SET filename = 'CON', target_path = 'C:\\AUX' WHERE run_id = $1", run["id"])
    api.report(run["id"], status="running")
    for name in ("report:final.md", "CON", "what?.pdf", "what?.pdf", "invoice.pdf."):
        assert api.upload(run["id"], filename=name, target_path=r"C:\in\AUX\b.txt")["filename"] == name
    api.report(run["id"], status="success")
    assert len(api.json_of(api.retry(run["id"]))["input_attachment_ids"]) == 2
