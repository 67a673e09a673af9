"""What the tests' fork server makes once for all processes that are forked from it: the imports, and the OpenAPI document,
which takes half a second and is the same in all of them."""

import gc
from typing import Any

import uvicorn.protocols.http.httptools_impl  # noqa: F401
import uvloop  # noqa: F401

import app.handoff.temporal  # noqa: F401 - imported here once
from app.config import Settings
from app.main import create_app

DOCUMENT: dict[str, Any] = create_app(
    Settings.model_validate(
        {
            "database_url": "postgresql://nobody@127.0.0.1/none",
            "vault_addr": "http://127.0.0.1",
            "vault_token": "none",
            "storage_url": "file:///none",
            "server_key": "a key of the tests, longer than 32 characters",
        }
    )
).openapi()
gc.collect()
gc.freeze()
