"""Secrets in Vault or OpenBao, KV version 2: the only file that imports hvac.

It knows paths and values, not when they are written or deleted (stores/deletions.py).

One file: every call shares the token, the slots and the translation of failures, none of which may leave it.
"""

import json
import logging
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from uuid import UUID

import certifi
import hvac
import urllib3
from hvac.adapters import Adapter
from hvac.exceptions import (
    BadGateway,
    Forbidden,
    InternalServerError,
    InvalidPath,
    RateLimitExceeded,
    UnexpectedError,
    VaultDown,
    VaultError,
    VaultNotInitialized,
)
from pydantic import JsonValue
from urllib3.exceptions import HTTPError

from app.config import Settings
from app.errors import PayloadTooLarge, VaultUnavailable
from app.stores.outages import Outage
from app.stores.secrets import SHOWN_AT_ONCE
from app.stores.threads import Slots, fresh_name, measured
from app.stores.vault_connections import open_pool

log = logging.getLogger(__name__)

T = TypeVar("T")

# Vault and OpenBao with integrated storage refuse an entry over 1 MiB, and OpenBao a request with over 1,000 strings.
# Held here too, so that the answer does not depend on the storage behind them.
MAX_SECRET_BYTES = 1_000_000
MAX_SECRET_NAMES = 400

# What hvac and urllib3 raise when a call fails. The last four: an answer that is not Vault's (a proxy's error page),
# or a token that cannot be sent as a header. They carry URL, body or token and never leave this file.
_FAILURES = (VaultError, HTTPError, OSError, AttributeError, LookupError, TypeError, ValueError)

# Those of them that say nothing about the login: Vault cannot answer now.
_OUTAGE = (
    VaultDown,
    VaultNotInitialized,
    InternalServerError,
    BadGateway,
    RateLimitExceeded,
    UnexpectedError,
    HTTPError,
)

# The collector, webhooks, callers who want to see a signing secret and the health check never take a slot of a request, nor
# the other way round.
_COLLECTOR_SLOTS = 4
_WEBHOOK_SLOTS = 4
_HEALTH_SLOTS = 1

# How long the answer to "does our login work?" holds for the health check, which anybody may poll.
LOGIN_CHECK_SECONDS = 5.0


def aliases(mount: str, values: Mapping[str, JsonValue]) -> Callable[[str], dict[str, str]]:
    """What a reply shows instead of the values, by path: where each one is, and whether it is stored as JSON text.

    Names are encoded once, for a bulk has many paths.
    """
    around = {
        name: (f"{'vault' if isinstance(value, str) else 'vault+json'}://{mount}/", f"#{quote(name, safe='')}")
        for name, value in values.items()
    }
    return lambda path: {name: f"{before}{path}{after}" for name, (before, after) in around.items()}


def stored(values: Mapping[str, JsonValue]) -> dict[str, str]:
    """A string as it is, anything else as its JSON text: Vault would change large integers and floats.

    Raises PayloadTooLarge.
    """
    return _stored(values)[0]


def stored_bytes(values: Mapping[str, JsonValue]) -> int:
    """What one copy of these values takes. Raises PayloadTooLarge. Cheap enough to be called before anything is staged."""
    return _stored(values)[1]


def _stored(values: Mapping[str, JsonValue]) -> tuple[dict[str, str], int]:
    texts = {name: value if isinstance(value, str) else _json(value) for name, value in values.items()}
    whole = _json(texts)
    # Vault stores "<", ">" and "&" as six characters.
    size = len(whole.encode("utf-8", "surrogatepass")) + 5 * sum(whole.count(char) for char in "<>&")
    if size > MAX_SECRET_BYTES or len(texts) > MAX_SECRET_NAMES:
        raise _too_large()
    return texts, size


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(
        f"sensitive_input_values is limited to {MAX_SECRET_NAMES} names and, as JSON, {MAX_SECRET_BYTES} bytes."
    )


class NotGrantedError(Exception):
    """The token may not do this."""


# Names in one answer.
LIST_PAGE = 1000


class _Adapter(Adapter):  # type: ignore[misc] # hvac is untyped
    """How hvac sends a request and hands the answer on, as its JSONAdapter does, but by urllib3 itself.

    requests, which hvac would take, does nothing for us that urllib3 does not, at twice the processor time.
    """

    def __init__(
        self, *, token: str, namespace: str | None, session: urllib3.HTTPConnectionPool, **others: Any
    ) -> None:
        # Not the base's: it opens a session of requests.
        self.base_uri = others["base_uri"]
        self.token = token
        self.namespace = namespace
        self.session = session
        self._path = urlsplit(self.base_uri).path  # Vault may be behind one

    def get_login_token(self, response: Any) -> str:
        return str(response["auth"]["client_token"])

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        raise_exception: bool = True,
        json: object = None,
        params: Mapping[str, object] | None = None,
    ) -> Any:
        """The answer's JSON if it is a 200 that has some, else the answer. Raises VaultError for a refusal, HTTPError."""
        sent = {**(headers or {}), "X-Vault-Request": "true"}
        if self.token:
            sent["X-Vault-Token"] = self.token
        if self.namespace:
            sent["X-Vault-Namespace"] = self.namespace
        body = None
        if json is not None:
            body = _json(json).encode()
            sent["Content-Type"] = "application/json"
        target = self._path + url + (f"?{urlencode(params)}" if params else "")
        # Never a redirect, which would carry the token to any host, and never a second time: a path is written once.
        reply = self.session.urlopen(method.upper(), target, body, sent, retries=False, redirect=False)
        if reply.status == 200:
            with suppress(ValueError):
                return reply.json()
        elif reply.status >= 400 and raise_exception:
            errors = None
            if reply.headers.get("Content-Type") == "application/json":
                with suppress(ValueError):
                    errors = reply.json().get("errors")
            raise VaultError.from_status(reply.status, errors=errors)
        return reply


class VaultSecrets:
    """One secret per staged set of values, each under a path of its own that is written once.

    Secrets of runs are never read here, and the policy does not allow it; those that webhooks are signed with are.

    hvac is synchronous and its clients are not thread-safe: each thread has one, and all share one token and a pool of
    connections. A call takes at most three times `vault_timeout_seconds`: for a free slot, for a login, for the request itself.
    No exception of hvac or urllib3 leaves this class: they carry URL and body.
    """

    def __init__(self, settings: Settings) -> None:
        self.mount = settings.vault_mount
        self.prefix = settings.vault_prefix
        # Beside the prefix of runs: below it, an organization could bear the name.
        self.webhook_prefix = f"{settings.vault_prefix}-webhooks"
        self.outage = Outage("vault")
        self._settings = settings
        self._timeout = settings.vault_timeout_seconds
        self._token: str | None = None
        self._login = threading.Lock()
        self._own = threading.local()
        self._connections = _connections(settings)
        self._requests = Slots("vault", settings.vault_concurrency)
        self._collector = Slots("vault-collector", _COLLECTOR_SLOTS)
        self._webhooks = Slots("vault-webhooks", _WEBHOOK_SLOTS)
        self._showing = Slots("vault-showing", SHOWN_AT_ONCE)
        self._health = Slots("vault-health", _HEALTH_SLOTS)
        self._login_works: bool | None = None  # None: not known
        self._may_sign = True  # until the contrary is known
        self._look_at_login = 0.0  # in time.monotonic()

    @property
    def writes_at_once(self) -> int:
        """How many secrets one request may write at the same time: as many as there are slots."""
        return self._settings.vault_concurrency

    def size(self, values: Mapping[str, JsonValue]) -> int:
        """The bytes that one copy of these values takes. Raises PayloadTooLarge."""
        return stored_bytes(values)

    def aliases(self, values: Mapping[str, JsonValue]) -> Callable[[str], dict[str, str]]:
        """What replies show instead of the values, by path."""
        return aliases(self.mount, values)

    def new_path(self, organization_id: str, run_id: UUID) -> str:
        """A path under the mount that no secret ever had; an executor's policy can be limited to its organization."""
        return f"{self.prefix}/{fresh_name(organization_id, run_id)}"

    def new_webhook_path(self, organization_id: str, endpoint_id: UUID) -> str:
        """A path that no secret ever had, for a signing secret."""
        return f"{self.webhook_prefix}/{fresh_name(organization_id, endpoint_id)}"

    async def write(self, path: str, values: Mapping[str, JsonValue], *, deadline: float) -> None:
        """Write all values as one secret at a fresh path.

        Not begun after `deadline` (of time.monotonic()). Raises VaultUnavailable: the secret may or may not exist then.
        Raises PayloadTooLarge.
        """
        secret = stored(values)

        def write(client: hvac.Client) -> bool:
            reply = client.secrets.kv.v2.create_or_update_secret(
                path=path, secret=secret, cas=0, mount_point=self.mount
            )
            return isinstance(reply, dict)  # hvac hands anything but 200 back as a response, a redirect too

        await self._run(self._requests, "write", write, deadline)

    async def read(self, path: str, *, is_shown: bool = False) -> dict[str, str] | None:
        """The values of a signing secret, None if there is none. Raises VaultUnavailable, also where the policy forbids it.

        `is_shown`: to a caller, who must not keep deliveries waiting.
        """
        found: dict[str, str] | None = None

        def read(client: hvac.Client) -> bool:
            nonlocal found
            try:
                reply = client.secrets.kv.v2.read_secret_version(
                    path=path, mount_point=self.mount, raise_on_deleted_version=True
                )
            except InvalidPath:
                return True
            if isinstance(reply, dict):
                found = reply["data"]["data"]
            return isinstance(reply, dict)

        await self._run(self._showing if is_shown else self._webhooks, "read", read, float("inf"))
        return found

    async def destroy(self, path: str) -> None:
        """Delete all versions and the metadata; a missing secret counts as deleted. Raises VaultUnavailable."""

        def destroy(client: hvac.Client) -> bool:
            reply = client.secrets.kv.v2.delete_metadata_and_all_versions(path=path, mount_point=self.mount)
            # A missing secret is a 204 too. A 404 means that the mount is missing, which proves nothing.
            return isinstance(reply, urllib3.BaseHTTPResponse) and reply.status == 204

        await self._run(self._collector, "delete", destroy, float("inf"))

    # --- for the command line, with a token that may list and read metadata (policies/compare.hcl); values are not read ---

    async def list_names(self, prefix: str) -> AsyncIterator[list[str]]:
        """The paths of all secrets below a prefix, in pages. Raises VaultUnavailable and NotGrantedError.

        OpenBao lists a folder in pages; Vault lists the whole of it at once.
        """
        folders = [f"{prefix}/"]
        while folders:
            folder = folders.pop()
            after = ""
            while True:
                names = await self._list(folder, after)
                if names and names[-1] == after:
                    break  # Vault again: that was the whole folder already
                folders += [folder + name for name in names if name.endswith("/")]
                if found := [folder + name for name in names if not name.endswith("/")]:
                    yield found
                if len(names) != LIST_PAGE:
                    break
                after = names[-1]

    async def _list(self, folder: str, after: str) -> list[str]:
        url = f"/v1/{self.mount}/metadata/{quote(folder)}"
        reply = await self._ask(
            "list", lambda client: client.adapter.list(url, params={"limit": LIST_PAGE, "after": after})
        )
        return [] if reply is None else [str(name) for name in reply["data"]["keys"]]

    async def exists(self, path: str) -> bool:
        """Whether there is anything at this path, be it metadata alone. Raises VaultUnavailable and NotGrantedError."""
        return await self._metadata(path) is not None

    async def holds(self, path: str) -> bool:
        """Whether the secret at this path can be read. Raises VaultUnavailable and NotGrantedError."""
        metadata = await self._metadata(path)
        if metadata is None:
            return False
        version = metadata["versions"].get(str(metadata["current_version"]))
        return version is not None and not version["destroyed"] and not version["deletion_time"]

    async def _metadata(self, path: str) -> dict[str, Any] | None:
        reply = await self._ask(
            "metadata",
            lambda client: client.secrets.kv.v2.read_secret_metadata(path=path, mount_point=self.mount),
        )
        return None if reply is None else reply["data"]

    async def _ask(self, operation: str, call: Callable[[hvac.Client], Any]) -> dict[str, Any] | None:
        """The reply; None for what is not there."""
        reply: dict[str, Any] | None = None
        is_granted = True

        def ask(client: hvac.Client) -> bool:
            nonlocal reply, is_granted
            try:
                reply = call(client)
            except InvalidPath:
                reply = None
                return True
            except Forbidden:
                is_granted = False
                raise
            return isinstance(reply, dict)

        try:
            await self._run(self._requests, operation, ask, float("inf"))
        except VaultUnavailable:
            if not is_granted:
                raise NotGrantedError from None
            raise
        return reply

    async def problem(self) -> str | None:
        """Why secrets cannot be written: `unreachable` (no answer, sealed, not set up), `login_refused`, or None.

        Writes nothing. Whether Vault answers is asked each time, without a token; whether the login works and may do what
        policies/service.hcl grants, at most once in LOGIN_CHECK_SECONDS, and again after a call that failed.
        Bounded by three times the timeout.
        """
        try:
            with measured("vault", "health"):
                return await self._ask_health()
        except VaultUnavailable:
            return "unreachable"

    async def _ask_health(self) -> str | None:
        try:
            found = await self._health.run(self._find_problem, wait=self._timeout, patience=2 * self._timeout)
        except TimeoutError:
            raise VaultUnavailable from None
        if found == "unreachable":
            raise VaultUnavailable
        return found

    @property
    def webhooks_problem(self) -> str | None:
        """Why webhooks cannot be signed though secrets of runs can be written, as `problem` last saw it: `not_granted`, or
        None."""
        return "not_granted" if self._login_works and not self._may_sign else None

    def _find_problem(self) -> str | None:
        client = self._client()
        try:
            client.token = ""
            if not isinstance(client.sys.read_health_status(standby_ok=True, method="GET"), dict):
                return "unreachable"
            if self._login_works is None or time.monotonic() >= self._look_at_login:
                works = self._try_login(client)
                self._look_at_login = time.monotonic() + LOGIN_CHECK_SECONDS
                if works != (self._login_works is not False):
                    if works:
                        log.info("Vault accepts the service's login again")
                    else:
                        log.warning(
                            "Vault refuses the service's login, or it may not create and delete secrets under "
                            "VAULT_MOUNT and VAULT_PREFIX: check the login, the mount (KV version 2) and the policy "
                            "(policies/service.hcl)"
                        )
                self._login_works = works
        except (*_FAILURES, VaultUnavailable):
            return "unreachable"
        return None if self._login_works else "login_refused"

    def _try_login(self, client: hvac.Client) -> bool:
        """Whether the login works, the mount is there, and the policy grants what we do. Raises _FAILURES for an outage."""
        of_runs, of_webhooks = (
            {f"{self.mount}/data/{prefix}/-/-/-": data, f"{self.mount}/metadata/{prefix}/-/-/-": {"delete"}}
            for prefix, data in ((self.prefix, {"create"}), (self.webhook_prefix, {"create", "read"}))
        )  # as deep as a secret
        try:
            # What the vault command asks before it touches a KV mount. No policy can withhold it, unlike lookup-self, which
            # tokens without the default policy may not ask; it is refused when the token may do nothing in the mount.
            mount = self._with_login(client, lambda: client.adapter.get(f"/v1/sys/internal/ui/mounts/{self.mount}"))
            if not isinstance(mount, dict):
                raise VaultDown("a redirect, which is not followed")
            if mount["data"]["options"]["version"] != "2":
                return False
        except _OUTAGE:
            raise
        except _FAILURES:
            return False
        try:
            granted = client.sys.get_capabilities(paths=[*of_runs, *of_webhooks])["data"]
        except Forbidden:
            return True  # withheld together with the default policy: this much cannot be known

        def grants(needed: Mapping[str, set[str]]) -> bool:
            return all("root" in granted[path] or rights <= {*granted[path]} for path, rights in needed.items())

        may_sign = grants(of_webhooks)
        if self._may_sign and not may_sign:
            log.warning(
                "Vault's policy does not let the service create, read and delete signing secrets under VAULT_PREFIX-webhooks: "
                "no webhook is sent until it does (policies/service.hcl)"
            )
        elif may_sign and not self._may_sign:
            log.info("Vault's policy lets the service sign webhooks again")
        self._may_sign = may_sign
        return grants(of_runs)

    async def close(self) -> None:
        """Wait for the calls under way and close the connections."""
        for slots in (self._requests, self._collector, self._webhooks, self._showing, self._health):
            await slots.close()
        self._connections.close()

    async def _run(self, slots: Slots, operation: str, call: Callable[[hvac.Client], bool], deadline: float) -> None:
        patience = 2 * self._timeout
        # No call begins after its caller has given up.
        begin_by = min(deadline, time.monotonic() + self._timeout + patience)
        with measured("vault", operation):
            try:
                await slots.run(lambda: self._send(call, begin_by), wait=self._timeout, patience=patience)
            except TimeoutError:
                log.log(self.outage.level, "Vault did not answer in time")
                self.outage.suspected.set()
                raise VaultUnavailable from None
            except VaultUnavailable:
                self.outage.suspected.set()
                raise

    def _send(self, call: Callable[[hvac.Client], bool], begin_by: float) -> None:
        """Run one request in this thread; after a 403 log in again and run it once more, after anything else never.

        A 403 says that nothing was done; after a lost reply the request may have been, and a path is written once.
        """

        def begin() -> bool:
            if time.monotonic() >= begin_by:
                log.log(self.outage.level, "Vault was reached too late; the call was not begun")
                raise VaultUnavailable
            return call(client)

        try:
            client = self._client()
            done = self._with_login(client, begin)
        except _FAILURES as error:
            self._look_at_login = 0.0
            # A store set up with a lower limit; sending it again would never help.
            reasons = getattr(error, "errors", None) or ()
            if any("too large" in reason or "complexity" in reason for reason in reasons):
                raise _too_large() from None
            # The kind alone, see above.
            log.log(self.outage.level, "Vault call failed: %s", type(error).__name__)
            raise VaultUnavailable from None
        if not done:
            log.log(self.outage.level, "Vault gave an answer that does not confirm the call (a redirect?)")
            raise VaultUnavailable

    def _with_login(self, client: hvac.Client, call: Callable[[], T]) -> T:
        """Run one request with the shared token; after a 403 log in again and run it once more."""
        refused: str | None = None
        while True:
            client.token = self._current_token(client, refused)
            try:
                return call()
            except Forbidden:
                if refused is not None:
                    raise
                refused = client.token

    def _current_token(self, client: hvac.Client, refused: str | None) -> str:
        """The token all threads share; one thread logs in for all when it is missing or was `refused`."""
        token = self._token
        if token is not None and token != refused:
            return token
        if not self._login.acquire(timeout=self._timeout):
            raise VaultUnavailable
        try:
            if self._token is None or self._token == refused:
                self._token = self._log_in(client)
            if self._token == refused:
                raise Forbidden  # the configured token itself, or a policy that lacks the path
            return self._token
        finally:
            self._login.release()

    def _log_in(self, client: hvac.Client) -> str:
        settings = self._settings
        if settings.vault_token is not None:
            return settings.vault_token.get_secret_value()
        if settings.vault_token_file is not None:
            # Vault Agent replaces the file when it renews.
            return settings.vault_token_file.read_text(encoding="utf-8").strip()
        client.token = ""
        secret_id = settings.vault_secret_id
        reply = client.auth.approle.login(
            role_id=settings.vault_role_id,
            secret_id=secret_id.get_secret_value() if secret_id else None,  # a role may do without
            use_token=False,
            mount_point=settings.vault_approle_mount,
        )
        if not isinstance(reply, dict):
            raise VaultError("login was not answered with a token")
        return str(reply["auth"]["client_token"])

    def _client(self) -> hvac.Client:
        """This thread's client."""
        client = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = hvac.Client(
                url=self._settings.vault_addr,
                token="",  # None would make hvac read VAULT_TOKEN or ~/.vault-token by itself
                namespace=self._settings.vault_namespace,
                session=self._connections,
                adapter=_Adapter,
            )
        return client


def _connections(settings: Settings) -> urllib3.HTTPConnectionPool:
    """As many connections as there are slots. No variable of the environment changes where they go."""
    slots = settings.vault_concurrency + _COLLECTOR_SLOTS + _WEBHOOK_SLOTS + SHOWN_AT_ONCE + _HEALTH_SLOTS
    # To connect, and between bytes.
    timeout = urllib3.Timeout(connect=settings.vault_timeout_seconds, read=settings.vault_timeout_seconds)
    tls = {}
    if urlsplit(settings.vault_addr).scheme == "https":
        tls["ssl_context"] = ssl.create_default_context(cafile=settings.vault_cacert or certifi.where())
    return open_pool(settings.vault_addr, maxsize=slots, timeout=timeout, **tls)
