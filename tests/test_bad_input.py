"""Input nobody should send: it is refused in the documented form, nothing changes, and other callers do not notice.

What to send where is derived from the OpenAPI document, so a new route or field is attacked without being named here.
"""

import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import httpx
import pytest

from app.api.validation import SENTENCES
from app.resources import included
from app.runs.listing import FIELDS
from tests.support import documents
from tests.support.client import Client, file_input
from tests.support.server import Server, start_server
from tests.support.stack import Stack

Document = dict[str, Any]
Schema = dict[str, Any]

# In what is sent, to find it again in what comes back.
MARK = "zqxjk"

# All rows of an organization, each as text.
OWN = ("workflows", "machines", "pools", "runs", "run_attachments", "idempotency_keys")
ROWS = " UNION ALL ".join(
    [
        *(f"SELECT t::text AS row FROM {table} t WHERE organization_id = $1" for table in OWN),
        "SELECT t::text FROM pool_machines t JOIN pools ON pools.id = pool_id WHERE organization_id = $1",
        "SELECT t::text FROM run_attempts t JOIN runs ON runs.id = run_id WHERE organization_id = $1",
    ]
)


# What is filled in is a number, a pattern of ours, or names that the document allows.
FILLED_IN = r"([0-9.]+|\^\S+\$|'[a-z_]+'(, '[a-z_]+')*( or '[a-z_]+')?)"
KNOWN = {
    *SENTENCES.values(),
    "Must be 1 to 255 visible ASCII characters, sent once.",
    "Send this parameter only once.",
    "The query may have at most 100 parameters.",
    "Must be `next` of an earlier reply, or absent for the beginning.",
    "Must be `next` of an earlier page of this list, or absent for the first.",
    "Must be an https URL of at most 2048 ASCII characters, with a host, and without user, password and fragment.",
    "May have at most 250000 JSON values in all.",
    "Must be a public address.",
    "Must begin with https://.",
    "Must use the scheme's own port or one from 1024 to 65535.",
    "The port must be from 1 to 65535.",
    "The host is neither a name nor an address in its usual form.",
    f"Must be names of fields of a run: {', '.join(sorted(FIELDS))}.",
    *(
        f"Must be names from this list, with commas: {', '.join(names)}."
        for names in (included.OF_RUNS, included.OF_MACHINES, included.OF_POOLS)
    ),
    "Send run_id, too: an attempt is one of a run.",
}
SENTENCE = re.compile("|".join(re.sub(r"\\{[a-z_]+\\}", lambda _: FILLED_IN, re.escape(known)) for known in KNOWN))


class Scene:
    """An organization with one of everything, at rest, and the document that tells what can be sent."""

    def __init__(self, server: Server, client: Client) -> None:
        self.server = server
        self.client = client
        self.document: Document = documents.strict()
        finished = client.finished("error", file_inputs=[file_input()])
        running = client.run()["id"]
        client.report(running, status="running")
        machine = client.machine(status="disconnected")
        self.ids: dict[str, Any] = {
            "run_id": finished["id"],
            "attachment_id": finished["input_attachment_ids"][0],
            "workflow_id": client.workflow(),
            "machine_id": machine,
            "pool_id": client.pool(machine),
            "webhook_endpoint_id": client.webhook_endpoint(),
        }
        sent = client.post(f"/v1/webhook-endpoints/{self.ids['webhook_endpoint_id']}/test")
        self.ids["webhook_delivery_id"] = client.json_of(sent, 201)["id"]
        nobodys = {"run_ids": [str(uuid4())]}  # a bulk retry that has nothing to do
        self.ids["bulk_retry_id"] = client.json_of(client.post("/v1/bulk-retries", json=nobodys), 202)["id"]
        self.places = self.ids | {"attempt": 1}  # what stands in paths
        # In bodies; an output is handed in for a running run.
        self.values = self.ids | {"run_id": running, "machine_ids": [machine], "pool_ids": [self.ids["pool_id"]]}
        self.names = {name for schema in self.schemas.values() for name in schema.get("properties", {})}
        self.names |= {one["name"] for _, _, operation in self.operations() for one in operation.get("parameters", ())}

    @property
    def schemas(self) -> dict[str, Schema]:
        schemas: dict[str, Schema] = self.document["components"]["schemas"]
        return schemas

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for path, operations in self.document["paths"].items():
            for method, operation in operations.items():
                yield method.upper(), path, operation

    def writes(self) -> Iterator[tuple[str, str, Schema]]:
        """Method, path to things that exist, and the body's schema, of every operation that takes a body."""
        for method, path, operation in self.operations():
            if "requestBody" in operation:
                yield method, path.format(**self.ids), operation["requestBody"]["content"]["application/json"]["schema"]

    def resolve(self, schema: Schema) -> Schema:
        return self.schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def example(self, schema: Schema) -> dict[str, Any]:
        """A body that would be accepted."""
        if "examples" in schema:
            values = schema["examples"][0]
        else:
            values = {name: schema["properties"][name]["examples"][0] for name in schema["required"]}
        return {name: self.values.get(name, value) for name, value in values.items()}

    def rows(self) -> list[str]:
        return sorted(row["row"] for row in self.server.stack.sql(ROWS, self.client.organization))

    def send(self, method: str, path: str, content: bytes | str) -> httpx.Response:
        return self.client.request(method, path, content=content, headers={"Content-Type": "application/json"})

    def assert_refused(self, reply: httpx.Response, *statuses: int) -> None:
        """In the form that is documented, with nothing of what was sent."""
        assert reply.status_code in statuses, reply.text[:300]
        assert MARK not in reply.text
        if reply.status_code != 422:
            assert reply.headers["Content-Type"] == "application/problem+json"
            assert reply.json().keys() - {"retry_after"} == {"type", "title", "status", "detail", "instance", "code"}
            return
        [errors] = reply.json().values()
        assert errors
        for error in errors:
            assert error.keys() == {"loc", "msg", "type"}
            assert error["loc"][0] in ("body", "path", "query", "header")
            assert all(isinstance(part, int) or part in self.names for part in error["loc"][1:]), error
            assert SENTENCE.fullmatch(error["msg"]), error


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Server]:
    """A server of small limits that has seen nothing else; it must not have been surprised by anything."""
    started = start_server(stack, MAX_BODY_BYTES=3_000_000, BODY_TIMEOUT_SECONDS=2)
    yield started
    log = started.app.log.read_text()
    started.app.stop()
    assert '"level":"error"' not in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def made(server: Server) -> Iterator[Scene]:
    with server.client() as client:
        yield Scene(server, client)


@pytest.fixture
def scene(made: Scene) -> Iterator[Scene]:
    """Nothing that a test sends changes anything."""
    before = made.rows()
    assert len(before) > 6
    yield made
    assert made.rows() == before


# --- bodies -----------------------------------------------------------------------------------------------------------

DEEP_ARRAY = "[" * 10_000 + "]" * 10_000
DEEP_OBJECT = '{"a":' * 10_000 + "1" + "}" * 10_000
LONG = f'"{MARK}{"x" * 1_000_000}"'

# JSON as it is sent.
STRINGS = [
    f'"{MARK}\\u0000"',
    '"\\u0000"',
    f'"{MARK}\\ud800"',
    f'"\\udc00{MARK}"',
    f'"\\ud800\\u0041{MARK}"',
    DEEP_ARRAY,
]
NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9223372036854775809", "-9223372036854775809"]
NUMBERS = [*NO_NUMBERS, "1" + "0" * 5000, "0.5", "1e308", "-0.0", '"1"', "true", DEEP_OBJECT]
ANYTHING = [*STRINGS, *NO_NUMBERS, DEEP_OBJECT]
FREE = [
    *(f'{{"{MARK}": [{value}]}}' for value in ANYTHING),
    *(f'{{"{MARK}": {{"{MARK}": {value}}}}}' for value in ANYTHING),
    *(f"{{{name}: 1}}" for name in STRINGS[:-1]),
    LONG,
]


class Field(NamedTuple):
    """A place in a body where the caller puts a value."""

    place: tuple[str | int, ...]
    schema: Schema
    body: Callable[[Any], Any]  # the whole body, with this value in the place

    @property
    def hostile(self) -> list[str]:
        """What this field must refuse."""
        if "additionalProperties" in self.schema:
            return FREE
        kinds = self.schema.get("type")
        if kinds == "string":
            return [*STRINGS, LONG] if "maxLength" in self.schema else STRINGS
        if kinds in ("integer", "number"):
            # JSON Schema takes -0.0 for the integer 0.
            taken = {"-0.0"} if self.schema.get("minimum", 1) <= 0 else set()
            return [value for value in NUMBERS if value not in taken | ({"0.5"} if kinds == "number" else set())]
        return [*STRINGS, *NO_NUMBERS]


def fields(scene: Scene, schema: Schema) -> Iterator[Field]:
    schema = scene.resolve(schema)
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            if option.get("type") != "null":
                yield from fields(scene, option)
    elif schema.get("type") == "array":
        for field in fields(scene, schema["items"]):
            yield Field((0, *field.place), field.schema, lambda value, field=field: [field.body(value)])  # type: ignore[misc]
    elif "properties" in schema:
        whole = scene.example(schema)
        for name, described in schema["properties"].items():
            for field in fields(scene, described):
                yield Field(
                    (name, *field.place),
                    field.schema,
                    lambda value, field=field, name=name: whole | {name: field.body(value)},  # type: ignore[misc]
                )
    else:
        yield Field((), schema, lambda value: value)


def test_values_that_no_field_takes(scene: Scene) -> None:
    sent, places = 0, set()
    for method, path, schema in scene.writes():
        for field in fields(scene, schema):
            places.add((method, path, field.place))
            for value in field.hostile:
                body = json.dumps(field.body("@")).replace('"@"', value)
                reply = scene.send(method, path, body)
                try:
                    scene.assert_refused(reply, 422)
                    # Either it is no JSON at all, or this very field is named.
                    named = [tuple(error["loc"][1:]) for error in reply.json()["detail"]]
                    assert any(loc == field.place[: len(loc)] for loc in named), named
                except AssertionError as failure:
                    failure.add_note(f"{method} {path} {field.place} {value[:60]}")
                    raise
                sent += 1
    print(f"{sent} values in {len(places)} fields")  # noqa: T201 - for the record
    assert len(places) > 60
    assert {place[:2] for _, _, place in places} >= {("input_values",), ("file_inputs", 0), ("run_message_history", 0)}


NO_BODIES = [
    b"\x00",
    b"\x00" * 1000,
    b'{"name": "\xff"}',
    b'{"name": "\xed\xa0\x80"}',  # a surrogate, encoded as if it were a character
    b'{"name": "\xc0\x80"}',  # NUL, encoded too long
    b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    "{}".encode("utf-16-le"),
    "{}".encode("utf-32"),
    DEEP_ARRAY.encode(),
    DEEP_OBJECT.encode(),
    f'{{"{MARK}": {DEEP_OBJECT}}}'.encode(),
    b'{"a":' * 100_000,
    b"[" * 1_000_000,
    b"1" * 1_000_000,
    b'"' + b"x" * 1_000_000,
    b"{" + b" " * 1_000_000,
    b'{"a": 1}}',
    b'{"a": 1,}',
    b"{'a': 1}",
    b'{"a": 1} // x',
    b'{"a": .5}',
    b'{"a": 01}',
    b'{"a": undefined}',
    b'{"a": "\n"}',
    b"a=1&b=2",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    b"null",
    b"true",
    b"[]",
    b'"{}"',
]


def test_bodies_that_are_no_objects(scene: Scene) -> None:
    for method, path, _ in scene.writes():
        for content in NO_BODIES:
            reply = scene.send(method, path, content)
            try:
                scene.assert_refused(reply, 422)
                assert [error["loc"] for error in reply.json()["detail"]] == [["body"]]
            except AssertionError as failure:
                failure.add_note(f"{method} {path} {content[:40]!r}")
                raise


def test_the_last_of_equal_keys_is_the_one_that_is_checked(scene: Scene) -> None:
    for method, path, schema in scene.writes():
        for field in fields(scene, schema):
            name = str(field.place[0])
            good = json.dumps(field.body("@"))
            bad = f'{good[:-1]}, "{name}": "{MARK}\\u0000"}}'.replace('"@"', "null")
            scene.assert_refused(scene.send(method, path, bad), 422)


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/json",
        "application/jsonp",
        "application/json, text/plain",
        "application/json text/plain",
        "application/x-www-form-urlencoded",
        f"multipart/form-data; boundary={MARK}",
        "application/octet-stream",
        "application/" + "+" * 50_000,
        "a" * 50_000,
        "application/json\xff",
    ],
)
def test_content_types(scene: Scene, content_type: str) -> None:
    for method, path, schema in scene.writes():
        content = json.dumps(scene.example(scene.resolve(schema)))
        headers = {b"Content-Type": content_type.encode("latin-1")}
        reply = scene.client.request(method, path, content=content, headers=headers)
        scene.assert_refused(reply, 415)


def test_keys_of_a_megabyte(scene: Scene) -> None:
    key = MARK + "k" * 1_000_000
    for method, path, schema in scene.writes():
        for field in fields(scene, schema):
            if "additionalProperties" in field.schema:
                body = json.dumps(field.body({key: {key: "@"}})).replace('"@"', "NaN")
                scene.assert_refused(scene.send(method, path, body), 422)
        scene.assert_refused(scene.send(method, path, json.dumps({key: 1})[:-1]), 422)
    # It is no name of a variable; anywhere else it is allowed, and kept.
    unknown = f"/v1/runs/{uuid4()}/retry"
    scene.assert_refused(scene.send("POST", unknown, json.dumps({key: 1, "input_values": {"a": {key: 1}}})), 404)
    for name in ("input_values", "sensitive_input_values"):
        scene.assert_refused(scene.send("POST", unknown, json.dumps({name: {key: "x"}})), 422)


def test_a_key_of_a_megabyte_is_kept(server: Server) -> None:
    values = {"a": {"k" * 1_000_000: 1}}
    with server.client() as client:
        assert client.get_run(client.run(input_values=values)["id"])["input_values"] == values


@pytest.mark.parametrize("key", ["", "a b", "a\tb", "é", "x" * 256, "x" * 60_000, "\xff"])
def test_idempotency_keys(scene: Scene, key: str) -> None:
    for method, path, schema in scene.writes():
        if path.endswith("/dry-run"):
            continue  # it changes nothing, and looks at no key
        content = json.dumps(scene.example(scene.resolve(schema)))
        headers = {b"Content-Type": b"application/json", b"Idempotency-Key": key.encode("latin-1")}
        reply = scene.client.request(method, path, content=content, headers=headers)
        scene.assert_refused(reply, 422)


def test_two_idempotency_keys(scene: Scene) -> None:
    for method, path, schema in scene.writes():
        if path.endswith("/dry-run"):
            continue  # it changes nothing, and looks at no key
        content = json.dumps(scene.example(scene.resolve(schema)))
        headers = [("Content-Type", "application/json"), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
        scene.assert_refused(scene.client.request(method, path, content=content, headers=headers), 422)


# --- queries and paths ------------------------------------------------------------------------------------------------

JUNK = [
    *("", " ", MARK, "null", "[]", "{}", "' OR 1=1 --", "../..", "🙂", "a,b", "x" * 50_000),
    *("-1", "-0", "+1", "1.5", "0x10", "1_0", "1e400", "-1e400", "NaN", "inf", "1" + "0" * 5000),
    *("2147483648", "9223372036854775808", "\N{ARABIC-INDIC DIGIT THREE}"),
]
# Escapes of NUL, of bytes that are no text, of a surrogate, of half an escape and of an escape.
ESCAPED_JUNK = [
    "%00",
    f"{MARK}%00",
    "%ff%fe",
    "%ed%a0%80",
    "%25",
    "%25zz",
    "%u0000",
    "%2500",
    "%0d%0a",
    "%20",
    "%c0%80",
]


def test_queries(scene: Scene) -> None:
    refused = 0
    for method, path, operation in scene.operations():
        url = path.format(**scene.places)
        for parameter in operation.get("parameters", ()):
            if method != "GET" or parameter["in"] != "query":
                continue
            queries = [str(httpx.QueryParams({parameter["name"]: value})) for value in JUNK]
            queries += [f"{parameter['name']}={value}" for value in ESCAPED_JUNK]
            queries += [f"{parameter['name']}={MARK}&" * 1000, f"{parameter['name']}[]=1", f"{parameter['name']}"]
            for query in queries:
                reply = scene.client.get(f"{url}?{query}")
                try:
                    if reply.status_code != 200:
                        scene.assert_refused(reply, 404, 414, 422)
                        refused += 1
                except AssertionError as failure:
                    failure.add_note(f"{url}?{query[:60]}")
                    raise
    assert refused > 500


BIG = str(2**31)
TIMES = {
    "0001-01-01T00:00:00Z": 200,
    "9999-12-31T23:59:59.999999Z": 200,
    "2026-01-31t12:00:00z": 200,
    "2026-01-31 12:00:00": 200,
    "2024-02-29T00:00:00-12:00": 200,
    "0000-01-01T00:00:00Z": 422,
    "10000-01-01T00:00:00Z": 422,
    "-001-01-01T00:00:00Z": 422,
    "+2026-01-01T00:00:00Z": 422,
    "0001-01-01T00:00:00+23:59": 422,
    "9999-12-31T23:59:59-23:59": 422,
    "2026-01-01T00:00:00+24:00": 422,
    "2026-01-01T00:00:00+99:99": 422,
    "2026-02-29T00:00:00Z": 422,
    "2026-01-01T24:00:00Z": 422,
    "2026-01-01T23:60:00Z": 422,
    "2026-01-01T23:59:60Z": 422,
    "2026-01-01": 422,
    "1767225600": 422,
    "now": 422,
    "infinity": 422,
    "2026-W01-1T00:00:00Z": 422,
    "\N{FULLWIDTH DIGIT TWO}026-01-01T00:00:00Z": 422,
    "2026-01-01T00:00:00Z\n": 422,
    "2026-01-01T00:00:00.Z": 422,
    "2026-01-01T00:00:00." + "1" * 5000 + "Z": 200,
}


def is_time(schema: Schema) -> bool:
    return "date-time" in (option.get("format") for option in schema.get("anyOf", [schema]))


@pytest.mark.parametrize("value", TIMES, ids=[value[:30] for value in TIMES])
def test_times(scene: Scene, value: str) -> None:
    for method, path, operation in scene.operations():
        for parameter in operation.get("parameters", ()):
            if method == "GET" and is_time(parameter["schema"]):
                reply = scene.client.get(path.format(**scene.places), params={parameter["name"]: value})
                assert reply.status_code == TIMES[value], (path, parameter["name"])
                if reply.status_code == 422:
                    scene.assert_refused(reply, 422)
    for method, path, schema in scene.writes():
        for field in fields(scene, schema):
            if is_time(field.schema) and TIMES[value] == 422:
                scene.assert_refused(scene.send(method, path, json.dumps(field.body(value))), 422)


def test_the_ends_of_time_are_kept(server: Server) -> None:
    with server.client() as client:
        run_id = client.run()["id"]
        first, last = "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"
        client.report(run_id, status="running", started_at=first)
        attachment = client.upload(run_id)["id"]
        kept = client.json_of(client.put(f"/v1/run-attachments/{attachment}", json={"expires_at": last}))["expires_at"]
        run = client.report(run_id, status="success", ended_at=last)
        assert (run["started_at"], run["ended_at"], kept) == (first, last, last)
        assert client.get_run(run_id) == run


LISTS = [
    ("skip=-1", 422),
    (f"skip={BIG}", 422),
    (f"skip={2**31 - 1}", 200),
    ("limit=0", 422),
    ("limit=1001", 422),
    (f"limit={BIG}", 422),
    ("limit=1&limit=1001", 422),
    ("status=RUNNING", 422),
    ("status=", 422),
    ("status=running&status=x", 422),
    ("workflow_id=x", 422),
    ("machine_id=", 422),
    ("session_id=%00", 422),
    ("wait=-1", 422),
    ("wait=31", 422),
    ("wait=NaN", 422),
    ("wait=inf", 422),
    ("wait=-0.0", 200),
    ("fields=", 200),
    ("fields=,,,", 200),
    ("fields=id,,id&fields=id", 200),
    ("fields=%20id%20", 200),
    ("fields=ID", 422),
    ("fields=*", 422),
    ("fields=%00", 422),
    ("fields=id%00", 422),
    ("fields=id%C2%A0", 422),
    ("fields=id%0A", 422),
    ("fields=secret_path", 422),
    ("fields=id;status", 422),
    ("fields=" + "id," * 2500, 200),
    ("fields=id&" * 99, 200),
    ("fields=id&" * 101, 422),
    ("fields=" + "x" * 8000, 422),
    ("unknown=1", 200),
]


@pytest.mark.parametrize(("query", "status"), LISTS, ids=[query[:40] for query, _ in LISTS])
def test_lists(scene: Scene, query: str, status: int) -> None:
    reply = scene.client.get(f"/v1/runs?{query}")
    assert reply.status_code == status
    if status == 422:
        scene.assert_refused(reply, 422)
    else:
        assert reply.json()["total"] == 2


def test_paths(scene: Scene) -> None:
    """Whatever stands in the place of an id, it names nothing."""
    refused = 0
    for method, path, _ in scene.operations():
        for name in re.findall("{([a-z_]+)}", path):
            known = str(scene.places[name])
            near = [f"{known}%00", f"%00{known}", f"{known}%0a", f"%20{known}", f"{known}%20", f"{known}0", known[:-1]]
            near += [f"{known};x=1", f"{known},{known}", f"{{{known}", f"{known}.", f"urn:uuid:{{{known}}}"]
            junk = [httpx.URL(path="/" + value).raw_path[1:].decode() for value in JUNK if value]
            for value in (
                *near,
                *ESCAPED_JUNK,
                *junk,
                "%2e%2e%2f%2e%2e",
                f"%2F{known}",
                f"{known}%2f",
                f"{known}%2f..",
            ):
                url = path.replace(f"{{{name}}}", value)  # no path has two of them
                reply = scene.client.request(method, scene.server.url + url, json={})
                if (method, reply.request.url.path.rstrip("/")) in {("GET", ""), ("GET", "/v1/runs")}:
                    continue  # the client itself has followed "../..", and there is something
                try:
                    scene.assert_refused(reply, 404, 405, 414, 422)
                except AssertionError as failure:
                    failure.add_note(f"{method} {url[:100]}")
                    raise
                refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/runs", "/v1//runs", "/v1/runs/", "/v1/runs//", "/V1/runs", "/v1/runs;x", "/v1/runs%00", "/v1/runs%20"),
        *("/%00", "/%ff", "/%2e%2e/%2e%2e/etc/passwd", "/" + "x" * 60_000, "/" + "a/" * 30_000, "/v1%5cruns", "/*"),
        *("/docs-assets", "/docs-assets/", "/docs-assets/%00", "/docs-assets/..%2f..%2fmain.py", "/docs-assets/%ff"),
        *("/docs-assets/" + "x" * 5000, "/docs-assets//etc/passwd", "/docs-assets/%2fetc%2fpasswd", "/downloads/"),
        f"/downloads/{'0' * 36}?expires={'9' * 5000}&signature=x",
        f"/downloads/{UUID(int=7)}?expires=1&signature=%00",
        f"/downloads/{UUID(int=7)}?expires=%D9%A3&signature={'0' * 64}",
    ],
)
def test_paths_to_nowhere(scene: Scene, path: str) -> None:
    scene.assert_refused(scene.client.get(scene.server.url + path), 404, 414, 422)


@pytest.mark.parametrize(
    "path", ["/v1/runs", "/%76%31/runs", "/v1%2fruns", "/v1/%72uns", "/v1/health/../runs", "/v1/health%2f..%2fruns"]
)
def test_no_spelling_of_a_path_needs_no_key(scene: Scene, path: str) -> None:
    reply = raw(scene.server.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.1 40[14] ", reply)
    assert scene.ids["run_id"].encode() not in reply


def test_methods_that_no_path_has(scene: Scene) -> None:
    paths = [*scene.document["paths"], "/", "/docs", "/openapi.json", "/nothing"]
    for path in paths:
        url = path.format(**scene.places)
        for method in ("TRACE", "PROPFIND", "SEARCH", "PURGE", "LINK", "M-SEARCH"):
            reply = scene.client.request(method, url)
            scene.assert_refused(reply, 404 if path == "/nothing" else 405)
            assert method not in reply.headers.get("Allow", "").split(", ")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "braces": lambda one: f"{{{one}}}",
    "urn": lambda one: f"urn:uuid:{one}",
    "no dashes": lambda one: one.replace("-", ""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_ids_mean_the_same_thing(scene: Scene, spelling: str) -> None:
    spell = SPELLINGS[spelling]
    for method, path, operation in scene.operations():
        if method != "GET" or path.startswith("/downloads/"):
            continue
        spelled = path.format(**scene.places | {name: spell(str(value)) for name, value in scene.ids.items()})
        if spelled != path and not path.endswith("download-url"):  # its URL is new each time
            assert scene.client.get(spelled).content == scene.client.get(path.format(**scene.places)).content, path
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "query" and parameter["name"] in scene.ids:
                one = {parameter["name"]: scene.ids[parameter["name"]]}
                other = {name: spell(value) for name, value in one.items()}
                assert scene.client.get(path, params=other).content == scene.client.get(path, params=one).content


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_ids_in_bodies(server: Server, spelling: str) -> None:
    with server.client() as client:
        workflow, machine = client.workflow(), client.machine()
        spelled = {"workflow_id": SPELLINGS[spelling](workflow), "machine_id": SPELLINGS[spelling](machine)}
        run = client.json_of(client.post("/v1/runs", json=spelled), 201)
        assert (run["workflow_id"], run["machine_id"]) == (workflow, machine)


# --- what is hardly HTTP ----------------------------------------------------------------------------------------------


def raw(url: str, request: bytes, *, seconds: float = 20) -> bytes:
    """Send bytes and read until the server closes the connection; a test fails if it does not."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        try:
            connection.sendall(request)
            while chunk := connection.recv(65536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass  # closed while we were still sending
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


# Lengths that contradict each other or say nothing: what follows could be taken for a request of its own.
LENGTHS = [
    "Content-Length: 2\r\nContent-Length: 2",
    "Content-Length: 2\r\nContent-Length: 200",
    "Content-Length: 0\r\nContent-Length: 2",
    "Content-Length: 2, 2",
    "Content-Length: 2 2",
    "Content-Length: -2",
    "Content-Length: +2",
    "Content-Length: 0x2",
    "Content-Length: ",
    "Content-Length: two",
    "Content-Length: 2\x00",
    "Content-Length: 99999999999999999999999999",
    "Content-Length : 2",
    "Content-Length: 2\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 2",
    "Content-Length: 5\r\nTransfer-Encoding: identity",
    "Content-Length: 5\r\nTransfer-Encoding: xchunked",
    "Content-Length: 5\r\nTransfer-Encoding: chunked, identity",
    "Content-Length: 5\r\nTransfer-Encoding:\x0bchunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: gzip",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding\r\n : chunked",
]
CHUNKS = [
    b"G\r\n{}\r\n0\r\n\r\n",
    b"-2\r\n{}\r\n0\r\n\r\n",
    b"0x2\r\n{}\r\n0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFFF\r\n{}",
    b"7FFFFFFFFFFFFFFF\r\n{}",
    b"2\r\n{}0\r\n\r\n",
    b"2\r\n{}\r\n",
    b"2\n{}\n0\n\n",
    b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\n" + b"X-Trailer: x\r\n" * 10_000 + b"\r\n",
    b"\r\n\r\n",
    b"",
]


def smuggling(scene: Scene, lengths: str, body: bytes) -> bytes:
    """A retry of an unknown run with these lengths, and right behind it a request that must not be taken for one."""
    key = scene.client.headers["Authorization"]
    return (
        f"POST /v1/runs/{uuid4()}/retry HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        f"Content-Type: application/json\r\n{lengths}\r\n\r\n"
    ).encode() + body


@pytest.mark.parametrize("lengths", LENGTHS)
def test_conflicting_lengths(scene: Scene, lengths: str) -> None:
    key = scene.client.headers["Authorization"]
    smuggled = f"DELETE /v1/runs/{scene.ids['run_id']} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n".encode()
    for body in (b"{}" + smuggled, b"0\r\n\r\n" + smuggled, b"2\r\n{}\r\n0\r\n\r\n" + smuggled, smuggled):
        received = raw(scene.server.url, smuggling(scene, lengths, body))
        assert len(statuses(received)) == 1
        assert statuses(received)[0] in (400, 404, 408, 413, 415, 422), received[:200]


@pytest.mark.parametrize("chunks", CHUNKS, ids=[repr(chunks[:20]) for chunks in CHUNKS])
def test_broken_chunks(scene: Scene, chunks: bytes) -> None:
    received = raw(scene.server.url, smuggling(scene, "Transfer-Encoding: chunked\r\nConnection: close", chunks))
    assert len(statuses(received)) <= 1
    assert set(statuses(received)) <= {400, 404, 408, 413, 422}


def head(line: str = "GET /v1/runs HTTP/1.1", *headers: str) -> bytes:
    return "\r\n".join([line, "Host: x", "Connection: close", *headers, "", ""]).encode("latin-1")


HEADS = {
    "many headers": head(*(["GET /v1/runs HTTP/1.1"] + [f"X-{number}: x" for number in range(20_000)])),
    "one header many times": head(*(["GET /v1/runs HTTP/1.1"] + ["Authorization: Bearer x"] * 20_000)),
    "a long header": head("GET /v1/runs HTTP/1.1", f"X: {'x' * 1_000_000}"),
    "a long key": head("GET /v1/runs HTTP/1.1", f"Authorization: Bearer {'x' * 1_000_000}"),
    "a long name": head("GET /v1/runs HTTP/1.1", f"{'x' * 1_000_000}: x"),
    "a long path": head(f"GET /{'x' * 1_000_000} HTTP/1.1"),
    "a long path below": head(f"GET /v1/runs/{'x' * 1_000_000} HTTP/1.1"),
    "a long query": head(f"GET /v1/runs?{'x=1&' * 250_000} HTTP/1.1"),
    "a long method": head(f"{'G' * 1_000_000} / HTTP/1.1"),
    "no method": head("/ HTTP/1.1"),
    "a method of its own": head("RETRY /v1/runs HTTP/1.1"),
    "a method in lower case": head("get /v1/runs HTTP/1.1"),
    "CONNECT": head("CONNECT 127.0.0.1:80 HTTP/1.1"),
    "an absolute path": head("GET http://elsewhere.example/v1/runs HTTP/1.1"),
    "an asterisk": head("OPTIONS * HTTP/1.1"),
    "half an escape in the path": head("GET /v1/runs/%zz% HTTP/1.1"),
    "half an escape in the query": head("GET /v1/runs?skip=%zz&limit=% HTTP/1.1"),
    "no path": head("GET HTTP/1.1"),
    "bytes in the path": head("GET /v1/runs/\xff\xfe HTTP/1.1"),
    "NUL in the path": head("GET /v1/runs/\x00 HTTP/1.1"),
    "NUL in a header": head("GET /v1/runs HTTP/1.1", "X: a\x00b"),
    "a bare CR in a header": head("GET /v1/runs HTTP/1.1", "X: a\rb"),
    "a folded header": head("GET /v1/runs HTTP/1.1", "X: a\r\n b"),
    "a header without a name": head("GET /v1/runs HTTP/1.1", ": x"),
    "a header without a colon": head("GET /v1/runs HTTP/1.1", "x"),
    "two hosts": head("GET /v1/runs HTTP/1.1", "Host: y"),
    "an unknown version": head("GET /v1/runs HTTP/9.9"),
    "version 0.9": b"GET /v1/runs\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an upgrade": head("GET /v1/runs HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket"),
    "an upgrade to HTTP/2": head("GET /v1/runs HTTP/1.1", "Connection: Upgrade, close", "Upgrade: h2c"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    "NULs": b"\x00" * 1000,
    "a request id that would break a log line": head("GET /v1/runs HTTP/1.1", 'X-Request-ID: "}\x01'),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(scene: Scene, name: str) -> None:
    received = raw(scene.server.url, HEADS[name])
    assert statuses(received), received[:200]
    allowed = {400, 401, 404, 405, 414, 431} | ({204} if name == "an asterisk" else set())
    assert set(statuses(received)) <= allowed, received[:200]
    if len(HEADS[name]) > 900_000 and name != "a long method":  # which no parser reads to its end
        assert statuses(received) in ([414], [431]), received[:200]
        assert b"application/problem+json" in received
        assert b"\r\nx-request-id: " in received
    assert scene.client.get("/v1/runs").status_code == 200


# --- slow -------------------------------------------------------------------------------------------------------------

# Who sends slowly, and what the answer is: one whose body is read, and those who are answered without it.
SLOW = {
    "POST /v1/runs, length 60000": 408,
    "POST /v1/runs, chunked": 408,
    "DELETE /v1/runs/{run_id}, length 1000": 408,
    "GET /v1/runs, length 1000": 200,
    "GET /v1/runs, chunked": 200,
    "POST /nothing, length 1000": 404,
    "POST /v1/runs, length 1000, no key": 401,
    "POST /v1/runs, length 99999999, no key": 401,
    "POST /v1/runs, chunked, no key": 401,
    "POST /v1/runs, length 99999999": 413,
}
EACH = 20


def slow_head(scene: Scene, kind: str) -> bytes:
    line, length, *rest = kind.format(**scene.ids).split(", ")
    headers = ["Content-Type: application/json"]
    headers += ["Transfer-Encoding: chunked"] if length == "chunked" else [f"Content-Length: {length.split()[1]}"]
    headers += [] if rest else [f"Authorization: {scene.client.headers['Authorization']}"]
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def drip(sockets: dict[socket.socket, str], received: dict[socket.socket, bytes], stop: threading.Event) -> None:
    """Send a byte a second on each until the server has closed it."""
    while sockets and not stop.wait(1):
        for one, kind in list(sockets.items()):
            with suppress(ConnectionResetError, BrokenPipeError):  # what came before can still be read
                one.send(b"1\r\n \r\n" if "chunked" in kind else b" ")
            try:
                while chunk := one.recv(65536):
                    received[one] += chunk
            except BlockingIOError:
                continue
            except ConnectionResetError:
                pass
            del sockets[one]
            one.close()


def test_slow_heads_end(scene: Scene) -> None:
    """Also of the second request on a connection, and of who never says anything."""
    whole = head("GET /v1/runs HTTP/1.1", f"Authorization: {scene.client.headers['Authorization']}")
    whole = whole.replace(b"Connection: close\r\n", b"")
    begun = {"nothing": b"", "half": whole[:-2], "second": whole + whole[:-2]}
    expected: dict[str, list[int]] = {"nothing": [], "half": [408], "second": [200, 408]}
    host, port = scene.server.url.removeprefix("http://").split(":")
    kinds = {socket.create_connection((host, int(port))): kind for kind in begun}
    for one, kind in kinds.items():
        one.sendall(begun[kind])
        one.setblocking(False)
    received = dict.fromkeys(kinds, b"")
    open_, end = dict(kinds), time.monotonic() + 40
    while open_ and time.monotonic() < end:
        readable, _, _ = select.select([*open_], [], [], 1)
        for one in readable:
            try:
                chunk = one.recv(65536)
            except ConnectionResetError:
                chunk = b""
            received[one] += chunk
            if not chunk:
                del open_[one]
        for one, kind in open_.items():
            if kind != "nothing":
                with suppress(ConnectionResetError, BrokenPipeError):
                    one.send(b"X: y\r\n")
    for one, kind in kinds.items():
        one.close()
        assert statuses(received[one]) == expected[kind], (kind, received[one][:300])
    assert not open_


def test_slow_bodies_hold_nobody_up_and_end(scene: Scene) -> None:
    host, port = scene.server.url.removeprefix("http://").split(":")
    kinds = {socket.create_connection((host, int(port))): kind for kind in SLOW for _ in range(EACH)}
    for one, kind in kinds.items():
        one.sendall(slow_head(scene, kind))
        one.setblocking(False)
    still_open, received, stop = dict(kinds), dict.fromkeys(kinds, b""), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        dripping = threads.submit(drip, still_open, received, stop)
        answered, end = 0, time.monotonic() + 60
        while not dripping.done() and time.monotonic() < end:
            assert scene.client.get(f"/v1/runs/{scene.ids['run_id']}").status_code == 200
            answered += len(still_open) > len(SLOW) * EACH // 2
        stop.set()
        dripping.result()
    left = sorted(still_open.values())
    for one in still_open:
        one.close()
    assert not left, f"still open: {left}"
    assert answered > 5, "others were held up"
    for one, kind in kinds.items():
        assert statuses(received[one]) == [SLOW[kind]], (kind, received[one][:200])
