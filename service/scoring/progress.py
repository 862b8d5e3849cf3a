"""Progress of a job: a bar on a terminal, else a log line every `interval` seconds, or nothing."""

import sys
import time
from types import TracebackType
from typing import Any

import structlog

FIELDS = (("rows", "rows"), ("rate", "rows/s"), ("engines", "engines"), ("rejected", "rejected"))
log = structlog.get_logger()


class Progress:
    """Counts of a job. Rates cover only this run, without the rows of an earlier run."""

    def __init__(self, quiet: bool, interval: float) -> None:
        self.rows = self.engines = self.rejected = self.resumed = 0
        self._fraction, self._start_fraction, self._quiet, self._interval = 0.0, 0.0, quiet, interval
        self._started_at = self._logged_at = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if not self._quiet and sys.stderr.isatty():
            self._bar = _create_bar()
            self._bar.start()
            self._task = self._bar.add_task("scoring", total=1.0, rate="", engines=0, rejected=0, rows="0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip_rows(self, rows: int, engines: int, rejected: int, fraction: float) -> None:
        """Count the rows of a unit that an earlier run scored. Arguments as in `advance`."""
        self.resumed += rows
        self.engines, self.rejected = engines, rejected
        self._fraction = self._start_fraction = fraction
        self._started_at = time.monotonic()

    def advance(self, rows: int, engines: int, rejected: int, fraction: float) -> None:
        """Add scored rows, and set the total engines, rejected rows and fraction of the input."""
        self.rows += rows
        self.engines, self.rejected, self._fraction = engines, rejected, fraction
        if self._bar is not None:
            columns = {"rate": f"{self.rows_per_second:,.0f}", "engines": f"{engines:,}", "rejected": f"{rejected:,}"}
            self._bar.update(self._task, completed=fraction, rows=f"{self.resumed + self.rows:,}", **columns)
        elif not self._quiet and time.monotonic() - self._logged_at >= self._interval:
            self._logged_at = time.monotonic()
            log.info("scoring", **self.counts, seconds_left=self.seconds_left)

    def log_finished(self, output: str, rejected_file: str | None) -> None:
        """Log the totals, the output, and the file of rejected rows if there is one."""
        if not self._quiet:
            seconds = round(time.monotonic() - self._started_at, 1)
            log.info("scored", output=output, **_file_field(rejected_file), **self.counts, seconds=seconds)

    @property
    def rows_per_second(self) -> float:
        """Rows scored by this run per second."""
        return self.rows / max(time.monotonic() - self._started_at, 1e-9)

    @property
    def counts(self) -> dict[str, int]:
        """Fields of a log line."""
        counts = {"rows": self.resumed + self.rows, "rows_per_second": round(self.rows_per_second)}
        return counts | {"engines": self.engines, "rejected": self.rejected}

    @property
    def seconds_left(self) -> int | None:
        """Estimated remaining time at a constant rate; None before the first scored rows."""
        scored_fraction = self._fraction - self._start_fraction
        if scored_fraction <= 0:
            return None
        return round((time.monotonic() - self._started_at) * (1 - self._fraction) / scored_fraction)


def log_already_finished(output: str, rejected_file: str | None) -> None:
    """Log that a job has finished before, so that nothing is scored."""
    hint = "the output is complete, nothing was scored; use --restart to score again"
    log.info("already scored", output=output, **_file_field(rejected_file), hint=hint)


def _file_field(rejected_file: str | None) -> dict[str, str]:
    return {} if rejected_file is None else {"rejected_file": rejected_file}


def _create_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    text = ", ".join(f"{{task.fields[{field}]}} {label}" for field, label in FIELDS)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(text),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=Console(stderr=True))
