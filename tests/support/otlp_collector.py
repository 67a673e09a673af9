"""An OTLP collector that keeps what it is sent: real bytes over HTTP, decoded by OpenTelemetry's own definitions."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """On a free port of 127.0.0.1, for as long as the block."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector.raw.append(body)
                    collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self, trace_id: str) -> list[dict[str, Any]]:
        """The spans of a trace, with their attributes as a dictionary."""
        found = []
        for body in list(self.raw):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                of_resource = {one.key: one.value.string_value for one in resource.resource.attributes}
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    if span.trace_id.hex() == trace_id:
                        attributes = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
                        found.append(
                            {
                                "name": span.name,
                                "kind": span.kind,
                                "id": span.span_id.hex(),
                                "parent": span.parent_span_id.hex(),
                                "status": span.status.code,
                                "message": span.status.message,
                                "events": len(span.events),
                                "links": {link.trace_id.hex() for link in span.links},
                                "attributes": attributes,
                                "resource": of_resource,
                            }
                        )
        return found
