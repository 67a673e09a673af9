"""`python -m dev.settings_page` writes docs/settings.md from app/config.py; a test fails while the two differ."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.config import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

# The settings that nearly every installation sets, in the order in which one meets them.
MAIN = (
    "database_url",
    "database_owner_url",
    "vault_addr",
    "vault_role_id",
    "vault_secret_id",
    "storage_url",
    "server_key",
    "public_url",
    "trusted_proxies",
    "metrics_token",
    "run_silence_seconds",
    "run_retention_days",
)

# Each group begins with the named setting and ends before the next one; the order is that of app/config.py.
GROUPS = (
    ("database_url", "PostgreSQL"),
    ("host", "HTTP"),
    ("max_body_bytes", "Limits for requests and replies"),
    ("quota_key_requests_per_minute", "Quotas"),
    ("database_direct_url", "Connections to PostgreSQL"),
    ("vault_addr", "Vault or OpenBao"),
    ("storage_url", "Files"),
    ("stage_timeout_seconds", "Retries, retention and timeouts"),
    ("webhook_allow", "Webhooks"),
    ("temporal_address", "Temporal"),
    ("background", "Background work and keys"),
)

HEAD = """# Settings

Every setting is an environment variable. A setting `NAME` can also be given as `NAME_FILE`, the path of a file that contains
the value: use this for secrets. A wrong or missing setting stops the start with one line that names the setting and the fix.
`s3://`, `gs://` and `az://` stores read their credentials and endpoints from the usual `AWS_*`, `GOOGLE_*` and `AZURE_*`
variables. This page is generated from `app/config.py`.
"""


def table(names: Iterable[str]) -> str:
    """A Markdown table of these settings with default and meaning."""
    rows = ["| Variable | Default | Meaning |", "|---|---|---|"]
    for name in names:
        field = Settings.model_fields[name]
        rows.append(f"| `{name.upper()}` | {_default(field)} | {field.description} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "**required**"
    if default is None or default == [] or isinstance(default, SecretStr):
        return ""
    if isinstance(default, bool):
        return "`on`" if default else "`off`"
    return f"`{default}`"


def page() -> str:
    """The whole page."""
    parts = [HEAD, f"## The ones that nearly every installation sets\n\n{table(MAIN)}\n"]
    starts = dict(GROUPS)
    groups: list[tuple[str, list[str]]] = []
    for name in Settings.model_fields:
        if name in starts:
            groups.append((starts[name], []))
        groups[-1][1].append(name)
    parts += [f"## {title}\n\n{table(names)}\n" for title, names in groups]
    return "\n".join(parts)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
