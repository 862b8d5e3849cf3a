"""OpenTelemetry spans, one per request, if the environment configures them and the packages are installed.

The variables are those of OpenTelemetry. Its SDK is imported only with them, and its own middleware creates the spans.
It gets a request without its query and with few of its headers: no key can reach a span, and no malformed byte can
make it fail. Independent of the settings and routes of this service.
"""

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "engine-health"  # service.name, unless the environment sets another
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
UNTRACED = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
SHOWN = frozenset({b"host", b"user-agent", b"content-length"})  # and the headers that carry a trace
CLOSE_SECONDS = 5  # OpenTelemetry's default is 30 s
ORIGINAL = "engine_health.scope"  # the key of the original scope in the reduced one
log = logging.getLogger("engine_health")


def open_tracing(environment: Mapping[str, str] = os.environ) -> "Tracing | None":
    """Return the tracing; None if it is not configured, or with a warning if it cannot be started."""
    if not _configured(environment):
        return None
    try:
        protocol = next(filter(None, map(environment.get, PROTOCOLS)), PROTOCOL)
        if protocol != PROTOCOL:
            raise ValueError(f"the protocol is {PROTOCOL}, not {protocol[:40]}")
        return Tracing()
    except ImportError as error:
        log.warning("no spans: %s is not installed: install the extra `tracing`", error.name)
    except Exception as error:  # an error of tracing does not stop the service
        log.warning("no spans: %s", error)
    return None


def _configured(environment: Mapping[str, str]) -> bool:
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporters = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    return any(map(environment.get, ENDPOINTS)) and not disabled and "otlp" in exporters.lower()


class Tracing:
    """A tracer with its exporter, used by this service only: FastAPI's own tracing stays off."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: NAME}))
        self._middleware = OpenTelemetryMiddleware
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return the application with a span for every request except probes."""
        from opentelemetry import propagate

        headers_shown = SHOWN | {name.lower().encode() for name in propagate.get_global_textmap().fields}
        traced = self._middleware(
            _inside_span(app),
            default_span_details=lambda scope: (scope["method"], {}),
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )

        async def with_span(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in UNTRACED:
                await app(scope, receive, send)
                return
            headers = [(name, value) for name, value in scope["headers"] if name in headers_shown and value.isascii()]
            reduced: dict[str, Any] = {**scope, "headers": headers, "query_string": b"", ORIGINAL: scope}
            await traced(reduced, receive, send)

        return with_span

    def close(self) -> None:
        """Send pending spans, and stop; a collector that does not respond in time is abandoned."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


def _inside_span(app: ASGIApp) -> ASGIApp:
    """Return the application to run inside a span: the original request with the span's `traceparent`."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    async def inside(reduced: Scope, receive: Receive, send: Send) -> None:
        scope, span, carrier = reduced[ORIGINAL], trace.get_current_span(), dict[str, str]()
        TraceContextTextMapPropagator().inject(carrier)
        scope["headers"] = [*scope["headers"], *((name.encode(), value.encode()) for name, value in carrier.items())]

        async def name_span(message: Message) -> None:
            route = getattr(scope.get("route"), "path", None)
            if message["type"] == "http.response.start" and route:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            await send(message)

        await app(scope, receive, name_span)

    return inside
