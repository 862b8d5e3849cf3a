"""OpenTelemetry spans, one a request, where the environment asks for them and the packages are there.

The variables are OpenTelemetry's own, and nothing of its SDK is imported without them. Its stock middleware makes the
spans. It is shown a request without its query and with few of its headers, so that no key can end in a span, whatever
it is told to capture, and no odd byte can make it fail. Knows no setting of this service, and no route.
"""

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAME = "engine-health"  # service.name, unless the environment has another
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
UNTRACED = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
SHOWN = frozenset({b"host", b"user-agent", b"content-length"})  # and the headers that carry a trace
CLOSE_SECONDS = 5  # OpenTelemetry itself would try for thirty
WHOLE = "engine_health.scope"  # in what the middleware sees of a request: the request itself
log = logging.getLogger("engine_health")


def open_tracing(environment: Mapping[str, str] = os.environ) -> "Tracing | None":
    """What makes spans, or None if none are asked for; None and a warning if they are, and cannot be had."""
    if not _asked_for(environment):
        return None
    try:
        protocol = next(filter(None, map(environment.get, PROTOCOLS)), PROTOCOL)
        if protocol != PROTOCOL:
            raise ValueError(f"the protocol is {PROTOCOL}, not {protocol[:40]}")
        return Tracing()
    except ImportError as error:
        log.warning("no spans: %s is not installed (engine-health[tracing])", error.name)
    except Exception as error:  # whatever is wrong with tracing, the service is served
        log.warning("no spans: %s", error)
    return None


def _asked_for(environment: Mapping[str, str]) -> bool:
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporters = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    return any(map(environment.get, ENDPOINTS)) and not disabled and "otlp" in exporters.lower()


class Tracing:
    """A tracer with its exporter. It is nobody else's: FastAPI's own tracing stays off."""

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
        """An application of which every request but a probe's is a span."""
        from opentelemetry import propagate

        shown = SHOWN | {name.lower().encode() for name in propagate.get_global_textmap().fields}
        traced = self._middleware(
            _within(app),
            default_span_details=lambda scope: (scope["method"], {}),
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )

        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in UNTRACED:
                await app(scope, receive, send)
                return
            headers = [(name, value) for name, value in scope["headers"] if name in shown and value.isascii()]
            seen: dict[str, Any] = {**scope, "headers": headers, "query_string": b"", WHOLE: scope}
            await traced(seen, receive, send)

        return served

    def close(self) -> None:
        """Send what is not sent yet, and end; a collector that does not hear in time keeps nobody from ending."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


def _within(app: ASGIApp) -> ASGIApp:
    """What runs within a span: the request itself, which now has that span's `traceparent`, so that logs name it."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    async def within(seen: Scope, receive: Receive, send: Send) -> None:
        scope, span, carrier = seen[WHOLE], trace.get_current_span(), dict[str, str]()
        TraceContextTextMapPropagator().inject(carrier)
        scope["headers"] = [*scope["headers"], *((name.encode(), value.encode()) for name, value in carrier.items())]

        async def named(message: Message) -> None:
            route = getattr(scope.get("route"), "path", None)
            if message["type"] == "http.response.start" and route:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            await send(message)

        await app(scope, receive, named)

    return within
