"""The strict OpenAPI document, of which /openapi.json is the form for clients. It is made once in a process."""

from functools import cache
from typing import Any

from app.api.openapi import strict_document
from app.config import Settings
from app.main import create_app

_SETTINGS = {
    "database_url": "postgresql://nobody@127.0.0.1/none",
    "vault_addr": "http://127.0.0.1",
    "vault_token": "none",
    "storage_url": "file:///none",
    "server_key": "a key of the tests, longer than 32 characters",
}


@cache
def strict() -> dict[str, Any]:
    return strict_document(create_app(Settings.model_validate(_SETTINGS)))
