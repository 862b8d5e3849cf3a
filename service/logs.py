"""Structured logs: one object a line for machines, one readable line for people. Knows settings, no HTTP."""

import logging
import sys
from typing import Any

import orjson
import structlog

from service.settings import Settings

Shared = list[Any]


def configure(settings: Settings) -> None:
    """Send every log line, ours and the libraries', to standard error in one form."""
    level = getattr(logging, settings.log_level.upper())
    people = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: Shared = [structlog.stdlib.add_log_level, structlog.processors.TimeStamper("iso")]
    last: Any = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(_one_line)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[*shared, structlog.processors.format_exc_info, last],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr) if people else structlog.BytesLoggerFactory(_stderr()),
        cache_logger_on_first_use=True,
    )
    text: Any = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer(_as_text)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                text,
            ],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # of libraries: else lines of no form


def _stderr() -> Any:
    return sys.stderr.buffer


def _one_line(event: Any, **_: Any) -> bytes:
    return orjson.dumps(event, default=str)


def _as_text(event: Any, **_: Any) -> str:
    return _one_line(event).decode()
