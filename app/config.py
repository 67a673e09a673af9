"""Settings, read once at start from the environment. Every name here is an environment variable in upper case."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

MIB = 1024 * 1024


class MountedSecrets(PydanticBaseSettingsSource):
    """`NAME_FILE=/run/secrets/x` gives the setting `NAME` the file's content, for orchestrators that mount secrets."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{field_name.upper()}_FILE")
        # A setting whose own name ends in _file (vault_token_file) is a path by itself and read elsewhere, again and again.
        if path is None or f"{field_name}_file" in self.settings_cls.model_fields:
            return None, field_name, False
        return Path(path).read_text(encoding="utf-8").strip(), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class DatabaseSettings(BaseSettings):
    """All that migrations and key management need."""

    # Values are hidden in errors: what is printed when a start fails must not show a key or a password.
    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    database_url: SecretStr = Field(description="postgresql://user:password@host:port/database")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, MountedSecrets(settings_cls)


class Settings(DatabaseSettings):
    """What an operator can set. Durations are seconds and sizes are bytes unless a name says otherwise."""

    # HTTP
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=64, description="Server processes.")
    public_url: str | None = Field(
        None, description="Base of the download URLs we sign; default: the request's own base."
    )
    max_connections: int = Field(
        2000, ge=16, le=100_000, description="Open connections per process; beyond it the oldest idle one is closed."
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        default=[], description="Comma-separated origins that browsers may call from; empty turns CORS off."
    )
    console: bool = Field(default=True, description="`off`: do not serve the operator's console at /console/.")
    shutdown_seconds: int = Field(20, ge=1, description="How long a stop waits for requests under way.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line written."
    )

    # Limits on what a caller sends
    max_body_bytes: int = Field(100 * MIB, ge=1024, description="Largest request body; more is 413.")
    max_file_bytes: int = Field(50 * MIB, ge=1, description="Largest single file, decoded; more is 413.")
    max_files: int = Field(100, ge=1, le=1000, description="Most files in one request; more is 413.")
    max_bulk_files: int = Field(1000, ge=1, description="Most files that one bulk makes, of all its runs; more is 413.")
    max_bulk_secret_bytes: int = Field(
        32 * MIB, ge=1, description="Most bytes of secrets that one bulk writes, of all its runs; more is 413."
    )
    max_reply_bytes: int = Field(
        32 * MIB,
        ge=MIB,
        description="Largest page of a list (more than one item of it; else 422) and reply of a bulk (else 413).",
    )
    body_timeout_seconds: float = Field(
        10, gt=0, description="A body must be complete in this time, or keep the pace within it; else 408."
    )
    body_min_bytes_per_second: int = Field(32 * 1024, ge=1, description="The pace that a long body must keep.")
    send_timeout_seconds: float = Field(
        30, gt=0, description="A reply of which the reader takes nothing for so long is cut off."
    )

    # PostgreSQL
    database_direct_url: SecretStr | None = Field(
        None,
        description="The same database without a pooler that shares connections between transactions: one connection per"
        " process, for LISTEN; default: DATABASE_URL.",
    )
    database_pool_size: int = Field(
        16, ge=2, le=500, description="Connections per process; organizations take turns when they are short."
    )
    database_timeout_seconds: float = Field(
        3, gt=0, le=5, description="Patience with a connection and with each statement."
    )

    # Vault or OpenBao, KV version 2. One way to log in: token, token file (Vault Agent) or AppRole.
    vault_addr: str = Field(description="Vault's or OpenBao's address, https in production.")
    vault_token: SecretStr | None = Field(None, description="Log in with this token.")
    vault_token_file: Path | None = Field(
        None, description="Log in with the token in this file, read again at each login."
    )
    vault_role_id: str | None = Field(None, description="Log in by AppRole with this role.")
    vault_secret_id: SecretStr | None = Field(None, description="AppRole's secret id.")
    vault_approle_mount: str = Field("approle", description="Where AppRole is mounted.")
    vault_namespace: str | None = Field(None, description="Vault namespace.")
    vault_cacert: Path | None = Field(None, description="CA bundle for Vault's certificate.")
    vault_mount: str = Field("secret", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="KV v2 mount.")
    vault_prefix: str = Field(
        "runs", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="First path segment under the mount."
    )
    vault_timeout_seconds: float = Field(
        2.5, gt=0, le=5, description="Patience with one call to Vault, and with a free slot."
    )
    vault_concurrency: int = Field(16, ge=1, le=200, description="Calls to Vault at once, per process.")

    # Files
    storage_url: str = Field(
        description="file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix."
    )
    storage_timeout_seconds: float = Field(
        4, gt=0, description="Patience with one call to the file store, plus 1 s per 10 MiB."
    )
    storage_concurrency: int = Field(16, ge=1, le=200, description="Calls to the file store at once, per process.")

    # Retry, retention, background work
    stage_timeout_seconds: float = Field(60, gt=0, description="Deadline for writing a request's secrets and files.")
    stage_grace_seconds: int = Field(900, ge=1, description="When names that were staged but never used are deleted.")
    secret_retention_seconds: int = Field(
        86_400, ge=0, description="How long a finished run's secrets stay retryable; 0 destroys them when it ends."
    )
    idempotency_ttl_seconds: int = Field(
        86_400, ge=1, description="How long a reply is kept under its Idempotency-Key."
    )
    run_silence_seconds: int = Field(
        0, ge=0, description="A running run without a PATCH for longer ends in error; 0 = never."
    )
    event_retention_days: int = Field(
        90, ge=0, le=36_500, description="How long events of runs are kept; 0 = for ever."
    )
    webhook_allow: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="Comma-separated networks and host names that webhooks may go to beside public addresses over https.",
    )
    webhook_cacert: Path | None = Field(
        None, description="CA bundle for certificates of webhook receivers; default: the system's."
    )
    webhook_max_bytes: int = Field(
        256 * 1024,
        ge=4096,
        le=MIB,
        description="Largest webhook body; history, then outputs are left out of a larger one.",
    )
    webhook_retention_days: int = Field(
        7, ge=2, le=90, description="How long webhook events and their deliveries are kept."
    )
    background: Literal["all", "none", "only"] = Field(
        "all",
        description="`none`: this replica only answers, `only`: it serves nothing but health; what follows a commit"
        " (machines, deletions, webhooks) is then done by those with `all` or `only`.",
    )
    background_period_seconds: float = Field(
        1.0, gt=0, description="How often deletions and assignments are looked for."
    )
    server_key: SecretStr = Field(
        min_length=32, description="Keys request fingerprints and download URLs; same on all replicas."
    )
    server_key_previous: SecretStr | None = Field(None, min_length=32, description="Accepted beside it while rotating.")

    @field_validator("cors_origins", "webhook_allow", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
