"""Private parts of three libraries that the app uses: an upgrade that changes one fails here, with the file to read again."""

import hashlib
import inspect
from collections.abc import Callable
from importlib.metadata import version

import prometheus_client
import pytest
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# The library, the file of ours that uses it, and the digest of the source that the file was written against.
PARTS: list[tuple[str, str, type | Callable[..., object], str]] = [
    ("uvicorn", "app/api/server.py", HttpToolsProtocol, "18fdf324b11bf160"),
    ("uvicorn", "app/api/server.py", RequestResponseCycle, "e67d470d435dcc1c"),
    ("uvicorn", "app/api/server.py", FlowControl, "126debcdaa894c83"),
    ("prometheus-client", "app/telemetry/metrics.py", prometheus_client.Histogram, "652bd566f605bb42"),
    ("urllib3", "app/webhooks/sending.py", HTTPConnection._new_conn, "83e6a5dd7db98a0a"),
    ("urllib3", "app/webhooks/sending.py", HTTPConnection.connect, "b70c63e7308857b1"),
    ("urllib3", "app/webhooks/sending.py", HTTPSConnection.connect, "2a2e1795406d7f38"),
    ("urllib3", "app/stores/vault_connections.py", vars(HTTPConnection)["is_connected"].fget, "2a727e90f341c6eb"),
    ("urllib3", "app/stores/vault_connections.py", HTTPConnectionPool._get_conn, "78fb22fdf2f90a26"),
]


@pytest.mark.parametrize(("library", "file", "part", "digest"), PARTS, ids=lambda one: getattr(one, "__qualname__", ""))
def test_private_parts_are_those_that_the_file_was_written_against(
    library: str, file: str, part: type | Callable[..., object], digest: str
) -> None:
    now = hashlib.sha256(inspect.getsource(part).encode()).hexdigest()[:16]
    assert now == digest, (
        f"{library} {version(library)} has another {part.__qualname__}. Read {file} again beside it, then write {now} here."
    )
