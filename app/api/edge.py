"""The outermost layer of every request: its id, who calls, the headers of the reply, one log line, and no leak on failure.

Authentication happens here because a framework reads the body before it runs dependencies: a caller without a key must be
refused before a byte of the body is read.
"""

import asyncio
import logging
import re
import time
from typing import Any, TypeGuard
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.auth import Principal, bearer
from app.api.client_address import address, subscriber
from app.api.compression import LEAST_BYTES, NEVER, Compressor, is_asked_for
from app.api.request_quotas import Limits
from app.errors import (
    IncompleteRequest,
    InternalError,
    Invalid,
    Overloaded,
    QuotaExceeded,
    Refusal,
    ReplyTooMuch,
    RequestTimeout,
    RouteNotFound,
    Unauthorized,
    Unavailable,
)
from app.limits import memory_budget
from app.limits.quotas import Standing, fields
from app.services import Services, authenticate
from app.stores.pool import party
from app.telemetry import metrics, tracing
from app.telemetry.logs import describe

log = logging.getLogger("app.request")

_UUID = re.compile(r"[0-9A-Fa-f-]{32,36}")
_RETRY = re.compile(r"/v1/runs/[^/]+/retry")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

# How long the rest of a body is read and thrown away after the reply: closing at once would reset the connection before
# the reply is read. The server itself would read it for ever, however slowly it comes.
LINGER_SECONDS = 5.0
# The status in logs and metrics of a request if its client was gone before the reply.
GONE = 499
# In one query. The framework parses the query of every request, also of one without a key.
MAX_PARAMETERS = 100
# A reply that is longer is sent in pieces.
PIECE_BYTES = 256 * 1024


def is_public(path: str) -> bool:
    """Everything under /v1 but its health needs a key. The health of machines is their organization's alone."""
    if not path.startswith("/v1/"):
        return True
    return (path == "/v1/health" or path.startswith("/v1/health/")) and path != "/v1/health/machines"


def _refuse_many_parameters(query: bytes) -> None:
    """Raises Invalid before the query is parsed."""
    if query.count(b"&") >= MAX_PARAMETERS:
        raise Invalid((("query",), f"The query may have at most {MAX_PARAMETERS} parameters.", "too_many_parameters"))


class Edge:
    """ASGI middleware; expects `app.state.services` on the application in the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.active = 0
        self._compressor = Compressor()
        metrics.active_requests.read_from(lambda: {(): self.active})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Nothing here uses cookies, and the framework reads them for every route: until Python 3.12.6 in quadratic time.
        scope["headers"] = [header for header in scope["headers"] if header[0] != b"cookie"]
        method: str = scope["method"]
        if method == "HEAD":  # a GET of which only the head is sent
            scope = dict(scope, method="GET")
            scope["state"]["is_head"] = True
        services: Services = scope["app"].state.services
        memory = services.in_flight.reservation("")
        memory_budget.current.set(memory)
        exchange = _Exchange(scope, receive, send, memory, method, self._compressor)
        refusal: Refusal | None = None
        self.active += 1
        try:
            _refuse_many_parameters(scope["query_string"])
            if method == "OPTIONS":
                await exchange.options()
            else:
                if not is_public(scope["path"]):
                    await _admit(exchange, services, memory)
                await self.app(scope, exchange.receive, exchange.send)
        except Refusal as error:
            refusal = error
        except ClientDisconnect:
            exchange.status = GONE
            exchange.state["code"] = "client_gone"
        except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback and no detail may leave
            log.error({"event": "unhandled", "request_id": exchange.id, **describe(error)})
            refusal = InternalError()
        finally:
            memory.release()
            self.active -= 1
        if refusal is not None and not exchange.started:
            if isinstance(refusal, QuotaExceeded):
                await scope["app"].state.limits.hold_back(refusal)
            await exchange.refuse(refusal)
        await exchange.begin()  # a reply that broke off before its first byte: the server closes the connection
        exchange.report()


def note(state: dict[str, Any], refusal: Refusal) -> None:
    """What a request is refused for, for its line and its count."""
    state["code"] = refusal.code
    if isinstance(refusal, Unavailable) and refusal.kind is not None:
        state["cause"] = refusal.kind


async def _admit(exchange: "_Exchange", services: Services, memory: memory_budget.Reservation) -> None:
    """Find out who calls, and count the request for them. Raises Unauthorized and QuotaExceeded."""
    scope = exchange.scope
    limits: Limits = scope["app"].state.limits
    principal = await _authenticate(exchange, services, limits)
    party.set(principal.organization_id)
    memory.party = principal.organization_id
    exchange.principal = scope["state"]["principal"] = principal
    now = scope["state"]["known_at"] = time.monotonic()
    services.keys_used.note(principal.key_id, now)
    exchange.standings = limits.request(principal)
    limits.meter(memory, principal)
    if principal.machine_id is not None and exchange.method != "HEAD":
        services.signs_of_life.note(principal.organization_id, principal.machine_id)


async def _authenticate(exchange: "_Exchange", services: Services, limits: Limits) -> Principal:
    """Who calls. Raises Unauthorized, and QuotaExceeded for an address that has sent too many keys that are not good."""
    strangers, key = limits.strangers, None
    try:
        key = bearer(exchange.only_header(b"authorization"))
        if strangers is not None:
            strangers.check(exchange.scope, key)
        principal = await authenticate(services, key, subscriber(exchange.scope))
    except Unauthorized:
        if strangers is None:
            raise
        raise strangers.failed(exchange.scope, key) from None
    if strangers is not None:
        strangers.knows(key)
    return principal


class _Exchange:
    """One request and its reply."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        memory: memory_budget.Reservation,
        method: str,
        compressor: Compressor,
    ) -> None:
        self.scope = scope
        self._compressor = compressor
        self.method = method  # as it was sent
        self._memory = memory
        self._receive = receive
        self._send = send
        self._began = time.perf_counter()
        self.principal: Principal | None = None
        self.standings: list[Standing] = []  # quotas of which little is left
        self.started = False
        self.status = 0
        self._lingers = False
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._body_left = b"transfer-encoding" in self._headers or self._headers.get(b"content-length", b"0") != b"0"
        given = self._headers.get(b"x-request-id", b"")
        self.id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid4().hex
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.state["request_id"] = self.id
        traceparent = tracing.given(self._headers.get(b"traceparent"))
        self._span: tracing.Request | None = None
        if tracing.tracer is not None:
            self._span = tracing.Request(
                tracing.tracer,
                method,
                scope["path"],
                scope["scheme"],
                scope["http_version"],
                traceparent,
            )
            traceparent = self._span.traceparent
        self.state["traceparent"] = traceparent
        self._start: Message | None = None  # until the body is there
        self._sent: list[tuple[bytes, bytes]] = []
        self._bytes_in = self._bytes_out = 0

    def only_header(self, name: bytes) -> bytes:
        values = [value for key, value in self.scope["headers"] if key == name]
        if len(values) != 1:
            raise Unauthorized
        return bytes(values[0])

    async def receive(self) -> Message:
        """The next piece of the body. Raises IncompleteRequest if no more of it will come."""
        message = await self._receive()
        self._bytes_in += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._body_left = False
        elif "body_ended_early" in self.state and not self.started:
            raise IncompleteRequest
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._start = message
            return
        more = message.get("more_body", False)
        body = b"" if self.method == "HEAD" else message.get("body", b"")
        if self._start is not None and not more and not self._has_room(len(body)):
            is_question = self.scope["method"] == "GET" or self.state.get("dry_run", False)
            is_done = self._start["status"] < 300 and not is_question
            self._start = None
            await self.refuse(ReplyTooMuch() if is_done else Overloaded())
            return
        if self.scope["method"] == "GET" and not more and self._may_be_compressed(self._start):
            self._start["headers"] = [*self._start.get("headers", ()), (b"vary", b"accept-encoding")]
            whole = message.get("body", b"")
            if len(whole) > LEAST_BYTES and is_asked_for(self._headers.get(b"accept-encoding", b"")):
                await self._send_compressed(self._start, whole)
                return
        await self.begin()
        await self._send_body(body, more=more)

    def _may_be_compressed(self, start: Message | None) -> TypeGuard[Message]:
        """Whether this reply to a GET, which is sent whole, depends on Accept-Encoding."""
        if start is None or self.principal is None or start["status"] not in (200, 304) or self._body_left:
            return False
        if start["status"] == 200 and (b"content-type", b"application/json") not in start["headers"]:
            return False
        return getattr(self.scope.get("route"), "path", "") not in NEVER

    async def _send_compressed(self, start: Message, body: bytes) -> None:
        """Piece by piece, as the reader takes them. The reply counts as held in full until it is gone."""
        self._memory.charge(len(body))
        start["headers"] = [header for header in start["headers"] if header[0] != b"content-length"]
        start["headers"].append((b"content-encoding", b"gzip"))
        pieces = self._compressor.pieces(self._memory.party, body)
        if len(body) <= PIECE_BYTES:  # one piece, of a length that is known before it is sent
            whole = b"".join([piece async for piece in pieces])
            start["headers"].append((b"content-length", str(len(whole)).encode()))
            await self.begin()
            await self._send_body(b"" if self.method == "HEAD" else whole, more=False)
            return
        await self.begin()
        if self.method == "HEAD":
            await self._send_body(b"", more=False)
            return
        async for piece in pieces:
            self._bytes_out += len(piece)
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _has_room(self, count: int) -> bool:
        """Keep a reply that is sent at once in memory until the client has read it."""
        return self.principal is None or count <= memory_budget.FREE_BYTES or self._memory.charge_if_it_fits(count)

    async def begin(self) -> None:
        """Send the head of the reply, if it waits for the body."""
        message, self._start = self._start, None
        if message is None:
            return
        self.status = message["status"]
        headers = list(message.get("headers", ()))
        headers.append((b"x-request-id", self.id.encode()))
        if not any(name == b"cache-control" for name, _ in headers):
            headers.append((b"cache-control", b"no-store"))
        headers.append((b"x-content-type-options", b"nosniff"))
        if self.standings:
            headers += [(name.lower().encode(), value.encode()) for name, value in fields(self.standings).items()]
        if self._body_left:
            await self._drain(0)  # without waiting; if the body is complete, the connection stays open
        if self._body_left:
            self._lingers = self.status != RequestTimeout.status
            headers.append((b"connection", b"close"))
        message["headers"] = self._sent = headers
        await self._send(message)

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        self._bytes_out += len(body)
        if len(body) > PIECE_BYTES and self._memory.party:  # an authenticated party, for which it counts
            body = await self._send_all_but_the_end(body)
        if self._lingers and not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self._drain(LINGER_SECONDS)
            body = b""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send_all_but_the_end(self, body: bytes) -> bytes:
        """Piece by piece, as the reader takes them: so that the reply counts as held until it is gone."""
        self._memory.charge(len(body))
        last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
        for start in range(0, last, PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        return body[last:]

    async def _drain(self, seconds: float) -> None:
        """Read and forget the rest of the body for a while, unless the caller waits for a 100 before sending it."""
        if b"expect" in self._headers:
            return
        try:
            async with asyncio.timeout(seconds):
                while self._body_left and "body_ended_early" not in self.state:
                    if (await self.receive())["type"] == "http.disconnect":
                        return
        except TimeoutError:
            return  # slow or endless: the connection is closed on it

    async def options(self) -> None:
        """Answer OPTIONS. Raises RouteNotFound. No key is needed, and no id is looked up: Allow stands in the document, too."""
        allow = self.scope["app"].state.methods.allow(self.scope)
        if allow is None:
            raise RouteNotFound
        await self.send({"type": "http.response.start", "status": 204, "headers": [(b"allow", allow.encode())]})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refusal: Refusal) -> None:
        note(self.state, refusal)
        body = refusal.body(self.id)
        headers = [(b"content-type", refusal.media_type.encode()), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def report(self) -> None:
        """Count the request, and write its line: the route's template and its ids, never a query, a header or a body."""
        scope, status = self.scope, self.status
        seconds = time.perf_counter() - self._began
        method = self.method
        route: str = getattr(scope.get("route"), "path", "")
        metrics.request(method, route, status, seconds)
        if self._span is not None:
            self._span.end(route, status, self.state.get("code"))
        if method == "POST":
            self._count(scope["path"], route)
        level = logging.WARNING if status >= 500 else logging.INFO
        if not log.isEnabledFor(level):
            return
        line: dict[str, object] = {
            "event": "request",
            "request_id": self.id,
            "method": method if method.isalpha() else "-",
            "route": route or scope["app"].state.methods.template(scope["path"]),
            "status": status,
            "ms": round(seconds * 1000, 1),
            "address": address(scope),
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
        }
        if self.principal is not None:
            line["organization_id"] = self.principal.organization_id
            line["key_id"] = self.principal.key_id
        if self.state["traceparent"] is not None:
            _, line["trace_id"], line["span_id"], _ = self.state["traceparent"].split("-")
        line |= {name: self.state[name] for name in ("code", "cause", "down") if name in self.state}
        parameters = scope.get("path_params", {}).items()
        line |= {name: value for name, value in parameters if _UUID.fullmatch(str(value))}
        log.log(level, line)

    def _count(self, path: str, route: str) -> None:
        """A retry or a new run. A dry run is neither."""
        replayed = self.status < 300 and (b"idempotency-status", b"replayed") in self._sent
        if _RETRY.fullmatch(path):
            if "dry_run" in self.state:  # as the route has read it
                return
            accepted = self.status == 200
            outcome = "replayed" if replayed else "accepted" if accepted else "refused"
            code = "" if accepted else self.state.get("code", str(self.status))
            metrics.retries.add(outcome, code, "request")
        elif route != "/v1/runs" or self.status != 201:  # only the route of a bulk knows how many runs it made
            return
        if self.status < 300 and not replayed:
            metrics.transitions.add("scheduling", "caller")
