"""Signatures of webhooks: Standard Webhooks 1.0.0, with the same three headers again under the names of the vendor's provider.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hmac
import secrets
from collections.abc import Sequence

PREFIX = "whsec_"


def new_secret() -> str:
    """A signing secret: 256 random bits."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def headers(message_id: str, timestamp: int, body: bytes, signing_secrets: Sequence[str]) -> dict[str, str]:
    """What proves that the body is ours and fresh: one signature for each secret, separated by spaces."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    signatures = [
        "v1," + base64.b64encode(hmac.digest(base64.b64decode(secret.removeprefix(PREFIX)), signed, "sha256")).decode()
        for secret in signing_secrets
    ]
    values = {"id": message_id, "timestamp": str(timestamp), "signature": " ".join(signatures)}
    return {f"{kind}-{name}": value for kind in ("webhook", "svix") for name, value in values.items()}
