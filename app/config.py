"""Settings, read once at start from the environment. Every name here is an environment variable in upper case.

This file checks each value by itself. operator/startup.py checks whether a store can be opened with the values.

One file: docs/settings.md is generated from it.
"""

import os
import ssl
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from app.database_url import DatabaseUrl

MIB = 1024 * 1024

# PostgreSQL counts runs one by one, so a quota on runs may not be larger.
MAX_RUNS_QUOTA = 10_000


class ConfigurationError(Exception):
    """The service cannot start. One line for the operator names the setting and the fix, never a value."""


def lines_of(error: ValidationError) -> list[str]:
    """Return one line for each wrong setting: its name, the problem, and its description. No line has a value."""
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # the problem is about several settings; its sentence names them
            lines.append(message)
            continue
        name = str(problem["loc"][0])
        if problem["type"] == "missing":
            message = "is not set"
        elif problem["type"] in {"too_short", "string_too_short"}:
            message = f"is too short; it needs at least {problem['ctx']['min_length']} characters"
        if problem["type"] != "value_error":  # the validators of this file already say what to do
            message += f". {Settings.model_fields[name].description}"
        lines.append(f"{name.upper()}: {message}")
    return lines


class MountedSecrets(PydanticBaseSettingsSource):
    """`NAME_FILE=/run/secrets/x` gives the setting `NAME` the file's content, for orchestrators that mount secrets."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        name = field_name.upper()
        path = os.environ.get(f"{name}_FILE")
        # vault_token_file is a setting of its own that ends in _file: its file is read elsewhere, and again after each change.
        if not path or f"{field_name}_file" in self.settings_cls.model_fields:
            return None, field_name, False
        if os.environ.get(name):
            raise ConfigurationError(f"{name}: it is set twice, also by {name}_FILE. Unset one of the two.")
        try:
            content = Path(path).read_text(encoding="utf-8").strip()
        except OSError as problem:
            raise ConfigurationError(
                f"{name}_FILE: the file cannot be read ({problem.strerror}). Name one that user {os.geteuid()} may read."
            ) from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"{name}_FILE: the file holds no UTF-8 text. Name one that does.") from None
        if not content:
            raise ConfigurationError(f"{name}_FILE: the file is empty. Write the value into it.")
        return content, field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def _url(value: str, *schemes: str) -> SplitResult | None:
    """Return the parts of a URL; None if it has another scheme or no host."""
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - raises if it is no number
    except ValueError:
        return None
    return parts if parts.scheme in schemes and parts.hostname else None


class DatabaseSettings(BaseSettings):
    """The settings that migrations and key management need."""

    model_config = SettingsConfigDict(
        extra="ignore",
        frozen=True,
        # Errors hide values: the lines of a failed start must not show a key or a password.
        hide_input_in_errors=True,
        env_ignore_empty=True,  # a compose file passes a setting that is not set as an empty value
    )

    database_url: SecretStr = Field(description="postgresql://user:password@host:port/database of the service's role.")
    database_owner_url: SecretStr | None = Field(
        None,
        description="The same database as the owner of the tables, for `migrate`, `keys` and `organizations`. "
        "Default: DATABASE_URL.",
    )
    database_timeout_seconds: float = Field(
        3,
        gt=0,
        le=5,
        description="Timeout for connecting to PostgreSQL and for each statement. `migrate` needs the same value.",
    )

    @property
    def owner(self) -> tuple[str, str]:
        """Return the name of the setting for the owner's role, and its value."""
        if self.database_owner_url is None:
            return "DATABASE_URL", self.database_url.get_secret_value()
        return "DATABASE_OWNER_URL", self.database_owner_url.get_secret_value()

    @property
    def database_urls(self) -> list[tuple[str, DatabaseUrl]]:
        """Return the name and the URL of each setting for a database that is set."""
        names = ("database_url", "database_owner_url", "database_direct_url")
        found = ((name.upper(), getattr(self, name, None)) for name in names)
        return [(name, DatabaseUrl.parse(url.get_secret_value())) for name, url in found if url is not None]

    @field_validator("database_url", "database_owner_url", "database_direct_url", check_fields=False)
    @classmethod
    def _is_postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            DatabaseUrl.parse(value.get_secret_value())
        return value

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
    """The settings of the service. Durations are seconds and sizes are bytes unless a name says otherwise."""

    # HTTP
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=64, description="Number of server processes.")
    public_url: str | None = Field(None, description="Base of signed download URLs. Default: the base of the request.")
    max_connections: int = Field(
        2000,
        ge=16,
        le=100_000,
        description="Maximum number of open connections of a process. Above it, the oldest idle connection is "
        "closed. Long polls of one organization may use half of them; more long polls get 429.",
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        default=[], description="Comma-separated origins that browsers may call from. Empty: CORS is off."
    )
    trusted_proxies: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="Comma-separated addresses and networks of proxies. X-Forwarded-For and X-Forwarded-Proto are"
        " believed only from them. Empty: from no proxy.",
    )
    metrics: bool = Field(default=True, description="`off`: /metrics is not served and nothing is counted.")
    metrics_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="Bearer token that a client must send to read /metrics. Empty: only a process"
        " of the same machine may read it, without a proxy (no Forwarded, no X-Forwarded-* header).",
    )
    console: bool = Field(default=True, description="`off`: the console for operators at /console/ is not served.")
    shutdown_seconds: int = Field(
        20, ge=1, description="Time that a stopping process gives to requests that have begun."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest severity of log lines that are written."
    )

    # Limits on what a caller sends
    max_body_bytes: int = Field(
        100 * MIB, ge=1024, description="Maximum size of a request body; larger bodies get 413."
    )
    max_small_body_bytes: int = Field(
        2 * MIB,
        ge=1024,
        description="Maximum size of the body of a request that takes neither files nor a message history; larger"
        " bodies get 413.",
    )
    max_json_values: int = Field(
        250_000, ge=1000, description="Maximum number of values in the JSON of a body; more get 422."
    )
    max_in_flight_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        description="Maximum number of bytes of request bodies and replies that a process holds at the same time."
        " One organization may use half of it. Above it, requests wait for a short time and then get "
        "503 `overloaded`. Expect the process to use up to 2.5 times this much memory.",
    )
    max_file_bytes: int = Field(
        50 * MIB, ge=1, description="Maximum size of one file after base64 decoding; a larger file gets 413."
    )
    max_files: int = Field(100, ge=1, le=1000, description="Maximum number of files in one request; more get 413.")
    max_bulk_files: int = Field(
        1000,
        ge=1,
        description="Maximum number of files that one bulk creation stores for all its runs together; more get 413.",
    )
    max_bulk_secret_bytes: int = Field(
        32 * MIB,
        ge=1,
        description="Maximum size of the secrets that one bulk creation writes for all its runs together; more "
        "get 413.",
    )
    max_reply_bytes: int = Field(
        32 * MIB,
        ge=MIB,
        description="Maximum size of a page of a list (a larger page of several items gets 422) and of the reply "
        "of a bulk creation (413).",
    )
    body_timeout_seconds: float = Field(
        10,
        gt=0,
        description="Time within which a request body must arrive, unless it keeps BODY_MIN_BYTES_PER_SECOND; a "
        "slower body gets 408.",
    )
    body_min_bytes_per_second: int = Field(
        32 * 1024, ge=1, description="Minimum transfer rate of a body that takes longer than BODY_TIMEOUT_SECONDS."
    )
    send_timeout_seconds: float = Field(
        30,
        gt=0,
        description="Close a connection if the client reads nothing for this many seconds. A client without a "
        "valid key must read the whole reply within this time.",
    )

    # Quotas; 0 means no quota. Quotas on runs are counted in the database, all others in each process.
    quota_key_requests_per_minute: int = Field(
        0,
        ge=0,
        description="Maximum number of requests per minute with one key, in each process; more get 429. 0: no "
        "quota; the same holds for all quotas.",
    )
    quota_organization_requests_per_minute: int = Field(
        0,
        ge=0,
        description="Maximum number of requests per minute with all keys of one organization, in each process; "
        "more get 429.",
    )
    quota_key_bytes_in_flight: int = Field(
        0,
        ge=0,
        description="Maximum number of bytes of bodies and replies that the requests of one key hold at the same "
        "time, in each process; more get 429. A single request is never refused by it.",
    )
    quota_organization_bytes_in_flight: int = Field(
        0, ge=0, description="The same for all keys of one organization. See MAX_IN_FLIGHT_BYTES."
    )
    quota_key_long_polls: int = Field(
        0,
        ge=0,
        description="Maximum number of requests of one key that wait (`wait=`) at the same time, in each process;"
        " more get 429.",
    )
    quota_organization_long_polls: int = Field(
        0,
        ge=0,
        description="The same for all keys of one organization. Allow at least one for each of its machines. See "
        "MAX_CONNECTIONS.",
    )
    quota_key_waiting_runs: int = Field(
        0,
        ge=0,
        le=MAX_RUNS_QUOTA,
        description="Maximum number of waiting runs that one key has created or retried; more get 429.",
    )
    quota_organization_waiting_runs: int = Field(
        0, ge=0, le=MAX_RUNS_QUOTA, description="Maximum number of waiting runs of one organization; more get 429."
    )
    quota_key_runs_per_minute: int = Field(
        0, ge=0, le=MAX_RUNS_QUOTA, description="Maximum number of runs that one key creates per minute; more get 429."
    )
    quota_organization_runs_per_minute: int = Field(
        0,
        ge=0,
        le=MAX_RUNS_QUOTA,
        description="Maximum number of runs that all keys of one organization create per minute; more get 429.",
    )
    quota_organization_bulk_retries: int = Field(
        2, ge=0, description="Bulk retries of one organization that are running or paused at once; more is 429."
    )
    quota_address_failures_per_minute: int = Field(
        0,
        ge=0,
        description="Maximum number of requests per minute without a valid key from one address (IPv6: from one "
        "/64 network), in each process. Above it, the address gets 429, except for keys that were "
        "valid before.",
    )

    # PostgreSQL
    database_direct_url: SecretStr | None = Field(
        None,
        description="The same database without a connection pooler in transaction mode. Each process opens one "
        "connection there, for LISTEN. Default: DATABASE_URL.",
    )
    database_pool_size: int = Field(
        16,
        ge=2,
        le=500,
        description="Number of connections of a process to PostgreSQL. Organizations take turns when all are in use.",
    )

    # Vault or OpenBao, KV version 2. One way to log in: token, token file (Vault Agent) or AppRole.
    vault_addr: str = Field(description="Address of Vault or OpenBao, like https://vault.example.com:8200.")
    vault_allow_http: bool = Field(
        default=False,
        description="Allow http:// to a Vault on another machine. Tokens and secrets then cross the network in "
        "clear text.",
    )
    vault_token: SecretStr | None = Field(None, description="Log in to Vault with this token.")
    vault_token_file: Path | None = Field(
        None, description="Log in to Vault with the token in this file. The file is read again at each login."
    )
    vault_role_id: str | None = Field(None, description="Log in to Vault by AppRole with this role id.")
    vault_secret_id: SecretStr | None = Field(None, description="Secret id of the AppRole.")
    vault_approle_mount: str = Field("approle", description="Mount path of the AppRole login.")
    vault_namespace: str | None = Field(None, description="Vault namespace.")
    vault_cacert: Path | None = Field(None, description="File with the CA certificates that sign Vault's certificate.")
    vault_mount: str = Field(
        "secret", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Mount path of the KV version 2 secrets engine."
    )
    vault_prefix: str = Field(
        "runs", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="First path segment of all secrets under the mount."
    )
    vault_timeout_seconds: float = Field(
        2.5, gt=0, le=5, description="Timeout for one call to Vault, and for the wait for a free call slot."
    )
    vault_concurrency: int = Field(
        16, ge=1, le=200, description="Maximum number of calls to Vault at the same time, in each process."
    )

    # Files
    storage_url: str = Field(
        description="Where files are stored: file:///path, s3://bucket/prefix, gs://bucket/prefix or "
        "az://container/prefix."
    )
    storage_timeout_seconds: float = Field(
        4, gt=0, description="Timeout for one call to the file store, plus 1 s for each 10 MiB."
    )
    storage_concurrency: int = Field(
        16, ge=1, le=200, description="Maximum number of calls to the file store at the same time, in each process."
    )

    # Retry, retention, background work
    stage_timeout_seconds: float = Field(
        60, gt=0, description="Deadline for writing all secrets and files of one request."
    )
    stage_grace_seconds: int = Field(
        900,
        ge=1,
        description="Time after which secrets and files that were written, but never used by a run, are deleted.",
    )
    secret_retention_seconds: int = Field(
        86_400,
        ge=0,
        description="Time for which the secrets of an ended run are kept for a retry. 0: they are destroyed when "
        "the run ends.",
    )
    retry_cooldown_seconds: int = Field(
        0,
        ge=0,
        le=86_400,
        description="Minimum time between the end of a run and its retry; an earlier retry gets 409 "
        "`retry_too_soon`. It protects accounts of the automated application: several failed logins "
        "in a row look like an attack.",
    )
    idempotency_ttl_seconds: int = Field(
        86_400, ge=1, description="Time for which a reply is kept under its Idempotency-Key."
    )
    idempotency_max_reply_bytes: int = Field(
        64 * 1024,
        ge=0,
        le=MIB,
        description="Maximum size of a reply that is kept under its Idempotency-Key. For a larger reply only the "
        "ids are kept, and a replay shows the objects as they are now.",
    )
    idempotency_max_stored_bytes: int = Field(
        256 * MIB,
        ge=0,
        description="Maximum size of all replies that are kept for one organization. Above it, only the ids are kept.",
    )
    run_silence_seconds: int = Field(
        0, ge=0, description="A running run ends with `error` if its executor sends no report for this long. 0: never."
    )
    machine_silence_seconds: int = Field(
        90,
        ge=0,
        description="A machine is marked `disconnected` if it was heard of before and then not for this long; its"
        " next request connects it again. A machine with a running run is left alone. 0: never.",
    )
    start_timeout_seconds: int = Field(
        120,
        ge=0,
        description="An assigned run that its machine does not start within this time is placed again, if the "
        "executor of that machine uses claims. 0: never.",
    )
    run_retention_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="Days for which ended runs are kept, with their outputs, files, secrets and attempts. 0: for ever.",
    )
    attempt_retention_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="Days for which archived attempts are kept, at most as long as their run. 0: as long as their run.",
    )
    attempt_outputs: Literal["none", "all"] = Field(
        "none",
        description="What a retry keeps of the attempt that it replaces. none: its outputs, message history and output files"
        " are removed. all: they stay with the archived attempt, as long as that is kept.",
    )
    event_retention_days: int = Field(
        90, ge=0, le=36_500, description="Days for which events of runs are kept. 0: for ever."
    )
    # --- webhooks ---
    webhook_allow: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="Comma-separated networks and host names that webhooks may go to, in addition to public "
        "addresses over https.",
    )
    webhook_cacert: Path | None = Field(
        None,
        description="File with the CA certificates that sign the certificates of webhook receivers. Default: "
        "those of the system.",
    )
    webhook_max_bytes: int = Field(
        256 * 1024,
        ge=4096,
        le=MIB,
        description="Maximum size of a webhook body. From a larger body the history is left out, then the outputs.",
    )
    webhook_retention_days: int = Field(
        7, ge=2, le=90, description="Days for which webhook events and their deliveries are kept."
    )
    # Temporal, and the timeouts of attempts that are handed over to Temporal
    temporal_address: str | None = Field(
        None,
        description="Address of Temporal's frontend, host:port. Set it on all replicas to hand attempts over to "
        "Temporal (docs/temporal.md). Empty: executors wait by long poll.",
    )
    temporal_namespace: str = Field(
        "default", min_length=1, description="Temporal namespace; use one for each installation."
    )
    temporal_api_key: SecretStr | None = Field(None, description="API key for Temporal. It turns TLS on.")
    temporal_tls: bool | None = Field(
        None, description="Connect to Temporal with TLS. Default: on if an API key or a TLS file is set."
    )
    temporal_tls_server_ca_cert_path: Path | None = Field(
        None,
        description="File with the CA certificates that sign Temporal's certificate. Default: those of the system.",
    )
    temporal_tls_server_name: str | None = Field(
        None, description="Host name in Temporal's certificate, if it differs from the address."
    )
    temporal_tls_client_cert_path: Path | None = Field(None, description="Client certificate for Temporal (mTLS).")
    temporal_tls_client_key_path: Path | None = Field(
        None, description="Private key of the client certificate for Temporal."
    )
    temporal_task_queue: str = Field(
        "machine-{machine_id}",
        pattern=r"^([A-Za-z0-9_.-]|\{machine_id\}|\{organization_id\}){1,200}$",
        description="Task queue that executors poll: one for each machine, or one name for a fleet. It may "
        "contain {organization_id}.",
    )
    run_heartbeat_seconds: float = Field(
        10,
        ge=0.5,
        le=3600,
        description="With Temporal: an executor that sends no heartbeat for this long counts as dead, and its run"
        " ends with `error`.",
    )
    run_timeout_seconds: int = Field(
        86_400, ge=1, description="With Temporal: an attempt that takes longer than this ends with `error`."
    )
    background: Literal["all", "none", "only"] = Field(
        "all",
        description="`none`: this replica only answers requests. `only`: it serves nothing but health, and places"
        " runs, deletes files and secrets, and sends webhooks. `all`: both.",
    )
    background_period_seconds: float = Field(
        1.0, gt=0, description="Interval at which the background loops look for work that no wake-up announced."
    )
    server_key: SecretStr = Field(
        min_length=32,
        description="Secret key for HMACs of requests and for download URLs, the same on all replicas: `openssl "
        "rand -hex 32`.",
    )
    server_key_previous: SecretStr | None = Field(
        None, min_length=32, description="The SERVER_KEY before or after a rotation; it is accepted, too."
    )

    @property
    def hands_over(self) -> bool:
        """Whether attempts are handed over to Temporal."""
        return self.temporal_address is not None

    @property
    def temporal_uses_tls(self) -> bool:
        """Whether connections to Temporal use TLS: as TEMPORAL_TLS says, else if another setting needs TLS."""
        if self.temporal_tls is not None:
            return self.temporal_tls
        needing = (self.temporal_api_key, self.temporal_tls_server_ca_cert_path, self.temporal_tls_client_cert_path)
        return any(one is not None for one in needing)

    @field_validator("cors_origins", "webhook_allow", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            parts = _url(origin, "http", "https")
            if origin != "*" and (parts is None or origin != f"{parts.scheme}://{parts.netloc}" or "@" in origin):
                raise ValueError("each must be like https://app.example.com, with nothing behind the host and port.")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for network in value:
            try:
                ip_network(network)
            except ValueError:
                raise ValueError("each must be an address or a network, like 10.0.0.0/8.") from None
        return value

    @field_validator("public_url")
    @classmethod
    def _is_a_base(cls, value: str | None) -> str | None:
        parts = None if value is None else _url(value, "http", "https")
        if value is not None and (parts is None or "@" in parts.netloc or parts.query or parts.fragment):
            raise ValueError("must be like https://runs.example.com.")
        return value

    @field_validator("vault_addr")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        parts = _url(value, "http", "https")
        if parts is None or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("must be like https://vault.example.com:8200, without a user or a query.")
        return value.rstrip("/")

    @field_validator("temporal_address")
    @classmethod
    def _is_host_and_port(cls, value: str | None) -> str | None:
        parts = None if value is None else _url(f"grpc://{value}", "grpc")
        if value is not None and (parts is None or parts.port is None or parts.netloc != value or "@" in value):
            raise ValueError("must be like temporal.example.com:7233, without https://.")
        return value

    @field_validator("vault_cacert", "webhook_cacert", "temporal_tls_server_ca_cert_path")
    @classmethod
    def _is_a_bundle(cls, value: Path | None) -> Path | None:
        try:
            if value is not None:
                ssl.create_default_context(cafile=value)
        except OSError:  # errors of ssl are OSErrors, too
            raise ValueError("the file cannot be read as certificates; name a readable file in PEM form.") from None
        return value

    @model_validator(mode="after")
    def _has_one_login(self) -> Self:
        ways = (self.vault_token, self.vault_token_file, self.vault_role_id)
        if sum(way is not None for way in ways) != 1:
            raise ValueError(
                "VAULT_TOKEN, VAULT_TOKEN_FILE or VAULT_ROLE_ID: set exactly one of them (the last with VAULT_SECRET_ID)."
            )
        return self

    @model_validator(mode="after")
    def _has_a_whole_client_certificate(self) -> Self:
        if (self.temporal_tls_client_cert_path is None) != (self.temporal_tls_client_key_path is None):
            raise ValueError("TEMPORAL_TLS_CLIENT_CERT_PATH, TEMPORAL_TLS_CLIENT_KEY_PATH: set both or none of them.")
        if self.temporal_tls_client_cert_path is not None and self.temporal_tls_client_key_path is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                    self.temporal_tls_client_cert_path, self.temporal_tls_client_key_path, password=""
                )
            except OSError:  # errors of ssl are OSErrors, too
                raise ValueError(
                    "TEMPORAL_TLS_CLIENT_CERT_PATH, TEMPORAL_TLS_CLIENT_KEY_PATH: the files cannot be read as a certificate "
                    "and its key; name readable files in PEM form, the key without a passphrase."
                ) from None
        if self.temporal_api_key is not None and not self.temporal_uses_tls:
            raise ValueError(
                "TEMPORAL_TLS: it is off, and TEMPORAL_API_KEY would be sent in clear text. Unset one of the two."
            )
        return self

    @model_validator(mode="after")
    def _keeps_secrets_from_the_network(self) -> Self:
        parts = urlsplit(self.vault_addr)
        if parts.scheme == "http" and not self.vault_allow_http and not _is_this_machine(parts.hostname or ""):
            raise ValueError(
                "VAULT_ADDR: http:// would send tokens and secrets to another machine in clear text. Use https://, or set "
                "VAULT_ALLOW_HTTP=true where you trust the network."
            )
        return self


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ComparisonSettings(Settings):
    """The settings of `stores compare`, which signs nothing and therefore needs no SERVER_KEY."""

    server_key: SecretStr = SecretStr("")
