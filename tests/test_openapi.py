"""The OpenAPI document at /openapi.json is valid, complete and true; generators can read it; its examples are accepted."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
import schemathesis

from tests.support import documents
from tests.support.client import Client
from tests.support.server import Server

Document = dict[str, Any]
METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def document(server: Server) -> Document:
    found: Document = httpx.get(f"{server.url}/openapi.json", trust_env=False, verify=False).json()
    return found


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, described in document["paths"].items():
        for method in METHODS & described.keys():
            yield method, path, described[method]


def codes(operation: Document, status: int) -> set[str]:
    """The codes of the refusals that an operation documents with this status."""
    description = operation["responses"].get(str(status), {}).get("description", "")
    return set(description.split("`")[1::2])


def schema_of(document: Document, schema: Document) -> Document:
    """The schema itself, where it is a reference."""
    found = document
    for part in schema["$ref"].removeprefix("#/").split("/") if "$ref" in schema else ():
        found = found[part]
    return found if "$ref" in schema else schema


def test_it_is_valid_and_so_is_the_strict_one(document: Document) -> None:
    assert document["openapi"] == "3.0.3"
    schemathesis.openapi.from_dict(document).validate()
    strict = documents.strict()
    assert strict["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(strict).validate()
    assert document["paths"].keys() == strict["paths"].keys()
    assert document["components"]["schemas"].keys() | {"JsonValue"} == strict["components"]["schemas"].keys()


def schemas_in(part: object) -> Iterator[Document]:
    """Every schema within a part of a document. Examples hold none."""
    if isinstance(part, list):
        for one in part:
            yield from schemas_in(one)
    if not isinstance(part, dict):
        return
    for name, value in part.items():
        if name in ("schema", "items", "additionalProperties") and isinstance(value, dict):
            yield value
        if name in ("properties", "schemas"):
            yield from value.values()
        if name not in ("example", "examples"):
            yield from schemas_in(value)


def test_it_has_nothing_that_generators_of_clients_fail_at(document: Document) -> None:
    seen = 0
    for schema in schemas_in(document):
        seen += 1
        assert not schema.keys() & {"anyOf", "oneOf", "not", "const", "propertyNames", "title", "examples"}, schema
        assert isinstance(schema.get("type", ""), str), schema
        assert schema.get("type") != "null", schema
        assert "$ref" not in schema or len(schema) == 1, schema
        assert "nullable" not in schema or schema.keys() & {"type", "allOf"}, schema
    assert seen > 500
    assert all(name.isalnum() for name in document["components"]["schemas"])
    references = {name: json.dumps(schema) for name, schema in document["components"]["schemas"].items()}
    assert not [name for name, text in references.items() if f'schemas/{name}"' in text], "they refer to themselves"
    for method, path, operation in operations(document):
        where = f"{method} {path}"
        assert len([status for status in operation["responses"] if status.startswith("2")]) == 1 or (
            path.endswith("/download") or path.startswith("/downloads/")
        ), where
        for response in operation["responses"].values():
            for media_type, content in response.get("content", {}).items():
                assert media_type != "application/json" or content["schema"].keys() & {"$ref", "type"}, where
        contents = [content for response in operation["responses"].values() for content in response.get("content", ())]
        assert {*contents} <= {"application/json", "application/problem+json", "application/octet-stream"}, where


def test_a_client_sends_only_what_its_caller_names(document: Document) -> None:
    """A default would be sent as a value, and replace what is kept without it."""
    assert document["servers"] == [{"url": "."}]
    seen = 0
    for method, path, operation in operations(document):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            schema = schema_of(document, content["schema"])
            for field, described in schema["properties"].items():
                seen += 1
                where = f"{method} {path}: {field}"
                assert "default" not in described, where
                assert method in ("patch", "put") or "nullable" not in described, where
    assert seen > 100
    retry = document["components"]["schemas"]["RunRetry"]
    assert "required" not in retry
    assert retry["properties"]["reuse_session"]["description"].endswith("Default: `true`.")


def test_the_first_example_of_a_retry_replaces_nothing(document: Document) -> None:
    content = document["paths"]["/v1/runs/{run_id}/retry"]["post"]["requestBody"]["content"]["application/json"]
    first, *others = content["examples"].items()
    assert first == ("reason only", {"value": {"reason": "The application was down."}})
    assert len(others) == 2


def test_every_reference_leads_somewhere_and_nothing_is_left_over(document: Document) -> None:
    text = json.dumps(document)
    used = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used == document["components"]["schemas"].keys()


def test_every_operation_names_the_refusals_that_it_can_give(document: Document) -> None:
    for method, path, operation in operations(document):
        where, write = f"{method} {path}", method != "get"
        statuses = operation["responses"].keys()
        if not path.startswith("/v1/") or path in ("/v1/health", "/v1/health/db"):
            assert "security" not in operation, where
            continue
        assert operation["security"] == [{"bearer": []}], where
        assert "\n\nScope: `" in operation["description"], where
        assert codes(operation, 403) == {"insufficient_scope"}, where
        assert codes(operation, 401) == {"unauthorized"}, where
        assert codes(operation, 429) == {"quota_exceeded"}, where
        assert codes(operation, 500) == {"internal_error"}, where
        assert "database_unavailable" in codes(operation, 503), where
        assert "422" in statuses, where
        assert {"408", "413", "415"} <= statuses if write else not {"408", "413", "415", "409"} & statuses, where
        keeps_replies = write and not path.endswith("/dry-run")
        assert ("idempotency_in_progress" in codes(operation, 409)) == keeps_replies, where
        for name in _parameters(path):
            assert f"{name.removesuffix('_id')}_not_found" in codes(operation, 404), where
        # The forecast of a retry has these refusals in its reply, and asks neither Vault nor the file store.
        if "requestBody" in operation and not path.endswith("/retry/dry-run"):
            [body] = operation["requestBody"]["content"].values()
            fields = schema_of(document, body["schema"])["properties"]
            for field, code in BODY_REFUSALS.items():
                if field in fields:
                    assert code in codes(operation, 404) | codes(operation, 503), f"{where}: {field}"


BODY_REFUSALS = {
    "workflow_id": "workflow_not_found",
    "machine_id": "machine_not_found",
    "machine_ids": "machine_not_found",
    "pool_ids": "pool_not_found",
    "session_id": "session_not_found",
    "run_id": "run_not_found",
    "sensitive_input_values": "vault_unavailable",
    "file_inputs": "storage_unavailable",
    "content": "storage_unavailable",
}


def _parameters(path: str) -> list[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]


def test_every_operation_has_a_name_of_its_own_and_a_sentence(document: Document) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    assert all(name.isalnum() and name[0].islower() for name in names), names
    for method, path, operation in operations(document):
        assert operation["description"].startswith(operation["summary"]), f"{method} {path}"
        assert not operation["summary"].endswith("."), f"{method} {path}"


def test_the_retry_names_all_of_its_refusals(document: Document) -> None:
    retry = document["paths"]["/v1/runs/{run_id}/retry"]["post"]
    assert codes(retry, 404) == {"run_not_found", "machine_not_found", "pool_not_found", "session_not_found"}
    assert codes(retry, 409) == {
        "run_not_terminal",
        "attempt_changed",
        "sensitive_inputs_expired",
        "input_attachments_expired",
        "machine_deleted",
        "pool_deleted",
        "retry_too_soon",
        "idempotency_in_progress",
    }
    assert codes(retry, 503) == {"vault_unavailable", "storage_unavailable", "database_unavailable", "overloaded"}
    assert retry["requestBody"]["required"] is False


def test_refusals_have_the_form_that_is_sent(document: Document) -> None:
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) < 400 or "health" in path:
                continue
            form, model = (
                ("application/json", "ValidationProblem")
                if status == "422"
                else ("application/problem+json", "Problem")
            )
            [(media_type, content)] = response["content"].items()
            assert media_type == form, f"{method} {path} {status}"
            assert content.pop("schema") == {"$ref": f"#/components/schemas/{model}"}, f"{method} {path} {status}"
            examples = content.pop("examples", {})
            assert examples.keys() == codes(operation, int(status)), f"{method} {path} {status}"
            assert all(example["value"]["code"] == code for code, example in examples.items())
            assert not content
            assert ("Retry-After" in response["headers"]) >= (status == "503"), f"{method} {path} {status}"
    item = document["components"]["schemas"]["ValidationItem"]
    assert item["properties"].keys() == {"loc", "msg", "type"}, "never the input"


def test_every_parameter_and_field_is_explained(document: Document) -> None:
    bare = set()
    for method, path, operation in operations(document):
        assert operation.get("summary"), f"{method} {path}"
        assert operation.get("description"), f"{method} {path}"
        for parameter in operation.get("parameters", ()):
            if not parameter.get("description"):
                bare.add(f"{method} {path}: {parameter['name']}")
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            if not described.get("description"):
                bare.add(f"{name}.{field}")
    assert not bare, sorted(bare)


BODIES = {
    *("RunRetry", "RunCreate", "RunBulkCreate", "RunUpdate", "RunAttachmentCreate", "RunAttachmentUpdate", "FileInput"),
    *("WorkflowCreate", "WorkflowUpdate", "MachineCreate", "MachineUpdate", "MachinePoolUpdate"),
    *("PoolCreate", "PoolUpdate", "MachinePoolAssignment"),
}


def test_the_key_is_declared(document: Document) -> None:
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}


def test_the_examples_are_accepted(document: Document, api: Client) -> None:
    """With ids of things that exist in place of those in the examples."""
    sent, endpoint = [], api.webhook_endpoint()
    for method, path, operation in operations(document):
        if "requestBody" not in operation:
            continue
        machine, run = api.machine(), api.run()
        # An executor reports on a run that it runs, and a retry is for one that has ended.
        api.report(run["id"], status="running")
        attachment = api.upload(run["id"])
        real = {
            "{run_id}": run["id"],
            "{attachment_id}": attachment["id"],
            "{workflow_id}": run["workflow_id"],
            "{machine_id}": machine,
            "{pool_id}": api.pool(),
            "{webhook_endpoint_id}": endpoint,
            "run_id": run["id"],
            "workflow_id": run["workflow_id"],
            "machine_ids": [machine],
            "pool_ids": [api.pool()],
        }
        [body] = operation["requestBody"]["content"].values()
        examples = [example["value"] for example in body["examples"].values()]
        assert examples, f"{method} {path}"
        for name in _parameters(path):
            path = path.replace(f"{{{name}}}", str(real[f"{{{name}}}"]))
        for example in examples:
            if "/retry" in path:
                api.patch(f"/v1/runs/{run['id']}", json={"status": "error"})
            filled = {name: real.get(name, value) for name, value in example.items()}
            reply = api.request(method.upper(), path, json=filled, headers={"Idempotency-Key": uuid4().hex})
            assert str(reply.status_code) in operation["responses"], f"{method} {path}"
            assert reply.is_success, f"{method} {path}: {reply.text}"
            sent.append(filled)
    assert len(sent) >= len(BODIES) - 1  # FileInput is a part of others


def test_the_allow_header_names_every_method_of_the_path(document: Document, api: Client) -> None:
    for path, described in document["paths"].items():
        methods = {method.upper() for method in METHODS & described.keys()} | {"OPTIONS"}
        allow = api.request("TRACE", path.replace("{", "").replace("}", "")).headers["allow"].split(", ")
        assert methods | ({"HEAD"} if "GET" in methods else set()) == set(allow), path


def test_a_replayed_reply_and_a_refused_one_carry_the_headers_they_announce(document: Document, api: Client) -> None:
    created = document["paths"]["/v1/pools"]["post"]["responses"]["201"]["headers"]
    for _ in range(2):
        reply = api.post("/v1/pools", json={"name": "x"}, headers={"Idempotency-Key": "twice"})
    assert created.keys() <= {name.title().replace("-Id", "-ID") for name in reply.headers}
