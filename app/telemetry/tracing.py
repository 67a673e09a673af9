"""Spans for OpenTelemetry, at four places: the edge, statements, Vault and files. The only file that imports its packages.

Off (no OTEL_EXPORTER_OTLP_ENDPOINT) means that `tracer` is None, and nothing else is looked at. On, the edge decides once for a
request: if it is not sampled, no span is made below it. A span has names and numbers of ours, never a query, a header, a body,
a parameter, or the text of an error.

`traceparent` (W3C Trace Context) is honoured, on or off, and goes to whoever executes the run; `tracestate` and baggage, which
are a caller's text, are not.
"""

import importlib.util
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from app import __version__
from app.config import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
# For requests without a decision of the caller; OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG set another.
RATIO = 0.01

_LONGEST_PATH = 256
_STOP_SECONDS = 3.0

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")

# The name of the call, without its arguments.
_STORE_CALLS = {
    ("vault", "write"): ("POST", "/v1/{mount}/data/{path}"),
    ("vault", "read"): ("GET", "/v1/{mount}/data/{path}"),
    ("vault", "delete"): ("DELETE", "/v1/{mount}/metadata/{path}"),
    ("vault", "health"): ("GET", "/v1/sys/health"),
    ("files", "write"): ("PUT", "/{key}"),
    ("files", "read"): ("GET", "/{key}"),
    ("files", "delete"): ("DELETE", "/{key}"),
    ("files", "health"): ("HEAD", "/ready"),
    ("files", "sign"): ("GET", "/{key}"),
    ("files", "size"): ("HEAD", "/{key}"),
    ("files", "list"): ("GET", "/"),
    ("files", "marker"): ("GET", "/{marker}"),
}

tracer: "Tracer | None" = None
_provider: "TracerProvider | None" = None
_database = ""  # its name

# The span of the request that the current task answers, if it is recorded.
_request: ContextVar["Span | None"] = ContextVar("span", default=None)
# Those of other requests for which it works, too.
_others: ContextVar[Sequence["Span"]] = ContextVar("others", default=())


def is_on() -> bool:
    """Whether the environment asks for traces."""
    return bool(os.environ.get(ENDPOINT)) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def check() -> None:
    """Raises ConfigurationError for settings that cannot be used."""
    if not is_on():
        return
    try:
        missing = any(importlib.util.find_spec(name) is None for name in PACKAGES)
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise ConfigurationError(
            f"{ENDPOINT}: it needs the packages for traces. Install requirements-extras.lock, or unset it."
        )
    try:
        parts = urlsplit(os.environ[ENDPOINT])
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigurationError(f"{ENDPOINT}: must be like http://127.0.0.1:4318.")
    if "OTEL_TRACES_SAMPLER" not in os.environ:
        _ratio()


def _ratio() -> float:
    """Raises ConfigurationError."""
    try:
        ratio = float(os.environ.get("OTEL_TRACES_SAMPLER_ARG") or RATIO)
    except ValueError:
        ratio = -1
    if not 0 <= ratio <= 1:
        raise ConfigurationError("OTEL_TRACES_SAMPLER_ARG: must be a number from 0 to 1.")
    return ratio


def start(database_url: str) -> None:
    """In the process that serves, once. Raises ConfigurationError."""
    global tracer, _provider, _database
    check()
    if not is_on() or tracer is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    of_ours = {"service.version": __version__}
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        of_ours["service.name"] = "runs-api"
    # Without a sampler of ours the SDK reads OTEL_TRACES_SAMPLER.
    sampler = None if os.environ.get("OTEL_TRACES_SAMPLER") else ParentBased(TraceIdRatioBased(_ratio()))
    _provider = TracerProvider(sampler=sampler, resource=Resource.create(of_ours), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # it reads the endpoint and its headers
    _database = urlsplit(database_url).path.strip("/")
    tracer = _provider.get_tracer("runs-api", __version__)


def stop() -> None:
    """Send what is left, for a short while; a collector that does not answer delays nothing."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.shutdown, daemon=True)
        sending.start()
        sending.join(_STOP_SECONDS)


# --- the edge ---------------------------------------------------------------------------------------------------------


def given(header: bytes | None) -> str | None:
    """A caller's traceparent, if it is one, in version 00."""
    if header is None or len(header) > 55:
        return None
    found = _TRACEPARENT.fullmatch(header.decode("latin-1"))
    return None if found is None else f"00-{found[1]}-{found[2]}-{int(found[3], 16) & 1:02x}"


class Request:
    """The span of a request, from its head to its line in the log. Only while tracing is on."""

    __slots__ = ("_span", "_token", "traceparent")

    def __init__(self, on: "Tracer", method: str, path: str, scheme: str, version: str, parent: str | None) -> None:
        from opentelemetry.trace import SpanKind

        known = method in _METHODS
        attributes = {
            "http.request.method": method if known else "_OTHER",
            "url.path": path[:_LONGEST_PATH],
            "url.scheme": scheme,
            "network.protocol.version": version,
        }
        self._span = on.start_span(
            method if known else "HTTP", context=_remote(parent), kind=SpanKind.SERVER, attributes=attributes
        )
        own = self._span.get_span_context()
        self.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{int(own.trace_flags) & 1:02x}"
        self._token = _request.set(self._span if self._span.is_recording() else None)

    def end(self, route: str, status: int, code: str | None) -> None:
        """The reply is on its way."""
        _request.reset(self._token)
        span = self._span
        if span.is_recording():
            from opentelemetry.trace import StatusCode

            if route:
                name = getattr(span, "name", "HTTP")
                span.update_name(f"{name} {route}")
                span.set_attribute("http.route", route)
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_attribute("error.type", code or str(status))
                span.set_status(StatusCode.ERROR)
        span.end()


def _remote(traceparent: str | None) -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if traceparent is None:
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    parent = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(parent), Context())


# --- what a request does ----------------------------------------------------------------------------------------------


def statement(name: str) -> "Span | None":
    """A span for a statement, None if its request has none. Only while tracing is on; `fail` or `end` it."""
    return _child(name, {"db.system.name": "postgresql", "db.namespace": _database, "db.query.summary": name})


def current() -> "Span | None":
    """The span of the request that the current task answers."""
    return None if tracer is None else _request.get()


def speak_for(spans: Iterable["Span | None"]) -> None:
    """The current task works for the requests of these spans: what it does is a child of the first, linked with the others."""
    recorded = [span for span in spans if span is not None]
    _request.set(recorded[0] if recorded else None)
    _others.set(recorded[1:])


def _child(name: str, attributes: dict[str, str]) -> "Span | None":
    parent = _request.get()
    if parent is None or tracer is None:
        return None
    from opentelemetry.trace import Link, SpanKind, set_span_in_context

    links = [Link(other.get_span_context()) for other in _others.get()]
    context = set_span_in_context(parent)
    return tracer.start_span(name, context=context, kind=SpanKind.CLIENT, attributes=attributes, links=links)


def fail(span: "Span", error: BaseException) -> None:
    """It ends with an error: PostgreSQL's code of it, or its class; never its text."""
    from opentelemetry.trace import StatusCode

    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        span.set_attribute("db.response.status_code", str(sqlstate))
    span.set_attribute("error.type", str(sqlstate or getattr(error, "code", None) or type(error).__qualname__))
    span.set_status(StatusCode.ERROR)
    span.end()


@contextmanager
def store_call(store: str, operation: str) -> Iterator[None]:
    """A span around a call to Vault or the file store. Only while tracing is on."""
    method, template = _STORE_CALLS[store, operation]
    span = _child(f"{method} {template}", {"http.request.method": method, "url.template": template})
    try:
        yield
    except BaseException as error:
        if span is not None:
            fail(span, error)
        raise
    if span is not None:
        span.end()
