"""What the tests' fork server makes once for all processes that are forked from it: the imports, and the OpenAPI document,
which takes half a second and is the same in all of them."""

import gc
from typing import Any

import uvicorn.protocols.http.httptools_impl  # noqa: F401
import uvloop  # noqa: F401

import app.handoff.temporal  # noqa: F401 - imported here once
from app.api.client_document import for_clients
from tests.support import documents

DOCUMENT: dict[str, Any] = for_clients(documents.strict())
gc.collect()
gc.freeze()
