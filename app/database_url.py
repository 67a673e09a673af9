"""What the URL of a database may say: its servers, and the parameters in its query.

The list of parameters is libpq's, as of PostgreSQL 18, because URLs are copied from providers and from other programs. asyncpg
knows some of them and would send all others to the server as settings of the session, which the server refuses.
https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-PARAMKEYWORDS
"""

import re
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import certifi

# asyncpg knows them.
_KNOWN: Final = frozenset(
    {
        "dbname", "database", "user", "password", "sslmode", "sslnegotiation", "sslcert", "sslkey", "sslpassword",
        "sslrootcert", "sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs",
        "krbsrvname", "gsslib", "passfile", "application_name", "options",
    }
)  # fmt: skip

# Settings of a session that are sent to the server. All others can be set by `options`.
_SESSION: Final = frozenset(
    {
        "search_path", "role", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout",
        "idle_session_timeout", "transaction_timeout", "default_transaction_isolation", "default_transaction_read_only",
        "default_transaction_deferrable", "client_min_messages", "client_connection_check_interval", "datestyle",
        "intervalstyle", "timezone", "bytea_output", "extra_float_digits", "work_mem", "temp_buffers", "jit", "plan_cache_mode",
        "synchronous_commit", "row_security", "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count",
    }
)  # fmt: skip

# libpq knows them and asyncpg does not: they are left out, which changes nothing that the service needs.
_IGNORED: Final = frozenset(
    {
        "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout", "client_encoding",
        "sslcompression", "sslsni", "sslkeylogfile", "gssdelegation", "replication", "min_protocol_version",
        "max_protocol_version", "scram_client_key", "scram_server_key", "oauth_issuer", "oauth_client_id",
        "oauth_client_secret", "oauth_scope",
    }
)  # fmt: skip

# These, too, but with them something is not checked that the URL asks for.
_NOT_ENFORCED: Final = frozenset(
    {"channel_binding", "require_auth", "requirepeer", "sslcertmode", "sslcrldir", "gssencmode"}
)
_ASKS_FOR_NOTHING: Final = frozenset({"", "disable", "prefer", "allow"})

_WRITERS: Final = frozenset({"any", "primary", "read-write"})

# Parameters of servers and of the way to them, which are read here.
_OURS: Final = frozenset(
    {"host", "hostaddr", "port", "connect_timeout", "load_balance_hosts", "fallback_application_name"}
)
_UNDERSTOOD: Final = _KNOWN | _OURS | _IGNORED | _NOT_ENFORCED

# They would bring the whole of a URL from another place.
_ELSEWHERE: Final = frozenset({"service", "servicefile"})

# Parameters of other programs, and what does the same here.
_HINTS: Final = {
    "pgbouncer": "leave it out: PgBouncer needs no parameter here (docs/operations.md, PgBouncer)",
    "schema": "name the schema with search_path",
    "currentschema": "name the schema with search_path",
    "connection_limit": "set DATABASE_POOL_SIZE",
    "pool_timeout": "set DATABASE_TIMEOUT_SECONDS",
    "socket_timeout": "set DATABASE_TIMEOUT_SECONDS",
    "sslaccept": "use sslmode",
    "ssl": "use sslmode, as in sslmode=require",
    "sslidentity": "use sslcert and sslkey",
}

_UNREADABLE = "cannot be read; percent-encode special characters in user and password, and look at its parameters."

# A host name, an address, an IPv6 address in brackets or a folder with a socket; and perhaps a port.
_SERVER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\],]+))(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """A URL as asyncpg can use it. Its servers stand beside it; without any, asyncpg uses its defaults."""

    dsn: str
    servers: tuple[tuple[str, int | None], ...]
    is_balanced: bool  # the servers are tried in a random order
    connect_timeout: float | None  # seconds, for one server
    ignored: tuple[str, ...]  # parameters that were left out
    not_enforced: tuple[str, ...]  # ignored parameters that ask for a check, which is not made

    @classmethod
    def parse(cls, url: str) -> "DatabaseUrl":
        """Raises ValueError with a sentence that names the parameter, and never a value."""
        if not url.startswith(("postgresql://", "postgres://")):
            raise ValueError("must begin with postgresql://, as in postgresql://user:password@host:port/database.")
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)) if parts.query else {}
        except ValueError:
            raise ValueError(_UNREADABLE) from None
        login, at, places = parts.netloc.rpartition("@")
        if parts.fragment or "@" in login:
            raise ValueError(_UNREADABLE)
        if query.get("ssl") == "true":  # as libpq reads it
            query["sslmode"] = "require"
            del query["ssl"]
        _refuse_wrong(query)

        hosts, ports, addresses = query.pop("host", ""), query.pop("port", ""), query.pop("hostaddr", "")
        servers = _servers(unquote(places), "") or _servers(hosts, ports) or _servers(addresses, ports)
        if ports and not servers:
            query["port"] = ports  # for asyncpg's defaults
        ignored = {name for name in query if name in _IGNORED | _NOT_ENFORCED}
        if addresses and (places or hosts):
            ignored.add("hostaddr")
        connect_timeout = _seconds(query.pop("connect_timeout", ""))
        is_balanced = query.pop("load_balance_hosts", "disable") == "random"
        not_enforced = {
            name for name, value in query.items() if name in _NOT_ENFORCED and value not in _ASKS_FOR_NOTHING
        }
        if len(servers) > 1 and query.get("target_session_attrs", "any") == "any":
            query["target_session_attrs"] = "read-write"  # else the first one that answers, which may be a standby
        if "fallback_application_name" in query:
            query.setdefault("application_name", query.pop("fallback_application_name"))
        if query.get("sslrootcert") == "system":  # libpq's name for the authorities that the system trusts
            query["sslrootcert"] = ssl.get_default_verify_paths().cafile or certifi.where()
            query["sslmode"] = "verify-full"
        kept = {name: value for name, value in query.items() if name not in ignored}
        dsn = urlunsplit((parts.scheme, login + at, parts.path, urlencode(kept, quote_via=quote), ""))
        return cls(dsn, servers, is_balanced, connect_timeout, tuple(sorted(ignored)), tuple(sorted(not_enforced)))


def _servers(hosts: str, ports: str) -> tuple[tuple[str, int | None], ...]:
    """Hosts with their ports, as in `first:5432,second`; `ports` is one for all of them, or one for each."""
    if not hosts:
        return ()
    found = []
    for host in hosts.split(","):
        # A folder with a socket has neither brackets nor a port.
        parts = re.fullmatch("()(/.*)()", host) or _SERVER.fullmatch(host)
        if parts is None or int(parts[3] or 0) > 65535:
            raise ValueError(_UNREADABLE)
        found.append((parts[1] or parts[2], int(parts[3]) if parts[3] else None))
    if not ports:
        return tuple(found)
    given = ports.split(",")
    if len(given) not in (1, len(found)) or not all(re.fullmatch("[0-9]{1,5}", port) for port in given):
        raise ValueError("its parameter port must be one number for all hosts, or as many numbers as there are hosts.")
    numbers = [int(port) for port in given] * (len(found) if len(given) == 1 else 1)
    return tuple((host, port or number) for (host, port), number in zip(found, numbers, strict=True))


def _seconds(text: str) -> float | None:
    """libpq's connect_timeout: whole seconds; 0, less and nothing are no limit."""
    if not text:
        return None
    if not re.fullmatch("-?[0-9]{1,9}", text):
        raise ValueError("its parameter connect_timeout must be a whole number of seconds.")
    return float(text) if int(text) > 0 else None


def _refuse_wrong(query: dict[str, str]) -> None:
    """Raises ValueError for a parameter that cannot be used."""
    for name in query:
        if name in _ELSEWHERE:
            raise ValueError(
                f"its parameter {name} names values in another file. Write them into the URL, or the whole URL into a file "
                "that DATABASE_URL_FILE names."
            )
        if name in _UNDERSTOOD or name.lower() in _SESSION or "." in name:
            continue
        hint = _HINTS.get(name.lower(), "settings of the server go into options, as in options=-c%20jit%3Doff")
        raise ValueError(f"its parameter {_shown(name)} is not known to PostgreSQL's clients; {hint}.")
    if query.get("target_session_attrs", "any") not in _WRITERS:
        raise ValueError("its parameter target_session_attrs must be any, primary or read-write: the service writes.")
    if query.get("load_balance_hosts", "disable") not in ("disable", "random"):
        raise ValueError("its parameter load_balance_hosts must be disable or random.")
    if query.get("passfile"):
        _refuse_unusable_passfile(Path(query["passfile"]))


def _refuse_unusable_passfile(path: Path) -> None:
    """asyncpg passes over a file that it cannot use, and then has no password."""
    try:
        found = path.stat()
        with path.open("rb"):
            pass
    except OSError as problem:
        raise ValueError(f"its parameter passfile names a file that cannot be read ({problem.strerror}).") from None
    if not stat.S_ISREG(found.st_mode) or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError("its parameter passfile must name a file that only its owner may read (chmod 600).")


def _shown(name: str) -> str:
    """A parameter's name as it may be printed: a password with a raw `&` in it would look like one, too."""
    return name if re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,39}", name) else "(no usable name)"
