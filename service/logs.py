"""Structured logs: one JSON object per line for programs, or one readable line for people."""

import asyncio
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson
import structlog

from service.settings import Settings


def configure(settings: Settings) -> None:
    """Write all log lines, also those of libraries, to standard error in the format of the settings."""
    level = getattr(logging, settings.log_level.upper())
    for_people = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared_processors: list[Any] = [structlog.stdlib.add_log_level, structlog.processors.TimeStamper("iso")]
    renderer: Any = structlog.processors.JSONRenderer(_json_bytes)
    if for_people:  # plain tracebacks, because `format_exc_info` has formatted the exception already
        plain = structlog.dev.plain_traceback
        renderer = structlog.dev.ConsoleRenderer(colors=has_colours(sys.stderr), exception_formatter=plain)
    stderr = sys.stderr
    factory: Any = structlog.PrintLoggerFactory(stderr) if for_people else structlog.BytesLoggerFactory(stderr.buffer)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[*shared_processors, structlog.processors.format_exc_info, renderer],
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    if not for_people:
        renderer = structlog.processors.JSONRenderer(_json_text)  # standard handlers write text, not bytes
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared_processors, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # otherwise the warnings of libraries have another format


def has_colours(stream: TextIO) -> bool:
    """Return whether colours may be written to a stream: a terminal, and `NO_COLOR` is not set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class RequestLog:
    """The access log: one line per request. The lines of one event-loop iteration are written together.

    JSON lines are formatted here, equal to those of structlog at a sixth of the cost.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger().bind()  # bound once, because binding costs time; requires `configure`
        processors = structlog.get_config()["processors"]
        self._plain = isinstance(processors[-1], structlog.processors.JSONRenderer) and self._log.is_enabled_for(
            logging.INFO
        )
        self._waiting: list[bytes] = []
        self._second, self._stamp = 0, ""

    def add(self, fields: dict[str, Any]) -> None:
        """Add the line of one request. Must be called in the event loop."""
        if not self._plain:
            self._log.info("request", **fields)
            return
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._write)
        second, micro = divmod(time.time_ns() // 1000, 1_000_000)
        if second != self._second:
            self._second, self._stamp = second, datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        fields |= {"event": "request", "level": "info", "timestamp": f"{self._stamp}.{micro:06d}Z"}
        self._waiting.append(orjson.dumps(fields))

    def _write(self) -> None:
        lines, self._waiting = self._waiting, []
        out = sys.stderr.buffer
        out.write(b"\n".join((*lines, b"")))
        out.flush()


def _json_bytes(event: Any, **_: Any) -> bytes:
    return orjson.dumps(event, default=str)


def _json_text(event: Any, **_: Any) -> str:
    return _json_bytes(event).decode()
