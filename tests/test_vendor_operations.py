"""The table of operations in docs/coming-from-the-vendor.md names all that the newest SDK has, and says what they do here."""

import re
from collections import Counter
from uuid import uuid4

from tests.sdk import environment
from tests.sdk.table import PAGE
from tests.support.client import Client

TABLE = re.search(r"<!-- operations:begin -->\n(.*?)<!-- operations:end -->", PAGE.read_text("utf-8"), re.DOTALL)
OPERATION = re.compile(r"`((?:GET|POST|PUT|PATCH|DELETE) [^`]+)`")


def listed() -> list[tuple[str, str]]:
    """Each operation of the table, and what the table says of it."""
    assert TABLE is not None
    rows = [line.strip("|\n").split("|") for line in TABLE[1].splitlines()[2:]]
    return [(operation, here.strip()) for _, operations, here in rows for operation in OPERATION.findall(operations)]


def test_the_table_has_the_operations_of_the_sdk() -> None:
    [library] = (environment.python(environment.NEWEST).parent.parent / "lib").glob("python*/site-packages")
    modules = (library / "openapi_client" / "cyberdesk_cloud_client" / "api").glob("*/[!_]*.py")
    in_sdk = []
    for module in modules:
        found = re.search(r'"method": "(\w+)",\s+"url": "([^"]+)"', module.read_text("utf-8"))
        assert found is not None, module
        in_sdk.append(f"{found[1].upper()} {found[2]}")
    assert len(in_sdk) == 142
    assert Counter(operation for operation, _ in listed()) == Counter(in_sdk)


def test_the_service_does_what_the_table_says(api: Client) -> None:
    document = api.json_of(api.get("/openapi.json"))
    here = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    described = {re.sub(r"{\w+}", "{}", operation) for operation in here} | {"GET /"}
    refused = 0
    for operation, what in listed():
        if what.startswith("works"):
            assert re.sub(r"{\w+}", "{}", operation) in described, operation
            continue
        code = re.match(r"404 `(\w+)`", what)
        assert code is not None, what
        method, path = operation.split()
        reply = api.request(method, re.sub(r"{\w+}", str(uuid4()), path))
        assert api.json_of(reply, 404)["code"] == code[1], operation
        refused += 1
    assert refused > 80
