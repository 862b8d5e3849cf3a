"""How far a job is: a bar on a terminal, a line of the log now and then elsewhere, or nothing. Knows no files."""

import sys
import time
from types import TracebackType
from typing import Any

import structlog

FIELDS = (("rows", "rows"), ("rate", "rows/s"), ("engines", "engines"), ("rejected", "rejected"))
log = structlog.get_logger()


class Progress:
    """Counts what is done. Rows a second are those of this run: what an earlier one did took no time."""

    def __init__(self, quiet: bool, interval: float) -> None:
        self.rows = self.engines = self.rejected = self.resumed = 0
        self._fraction, self._begun_at, self._quiet, self._interval = 0.0, 0.0, quiet, interval
        self._begun = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if not self._quiet and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task("scoring", total=1.0, rate="", engines=0, rejected=0, rows="0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, rows: int, engines: int, rejected: int, fraction: float) -> None:
        """Rows that an earlier run scored; the rest as in `tell`."""
        self.resumed += rows
        self.engines, self.rejected = engines, rejected
        self._fraction = self._begun_at = fraction
        self._begun = time.monotonic()

    def tell(self, rows: int, engines: int, rejected: int, fraction: float) -> None:
        """So many rows more; engines, rejected rows and the fraction of the input so far."""
        self.rows += rows
        self.engines, self.rejected, self._fraction = engines, rejected, fraction
        if self._bar is not None:
            about = {"rate": f"{self.rate:,.0f}", "engines": f"{engines:,}", "rejected": f"{rejected:,}"}
            self._bar.update(self._task, completed=fraction, rows=f"{self.resumed + self.rows:,}", **about)
        elif not self._quiet and time.monotonic() - self._told >= self._interval:
            self._told = time.monotonic()
            log.info("scoring", **self.about, seconds_left=self.seconds_left)

    def done(self, output: str) -> None:
        """The last word."""
        if not self._quiet:
            log.info("scored", output=output, **self.about, seconds=round(time.monotonic() - self._begun, 1))

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / max(time.monotonic() - self._begun, 1e-9)

    @property
    def about(self) -> dict[str, int]:
        """What is told of a job."""
        counts = {"rows": self.resumed + self.rows, "rows_per_second": round(self.rate)}
        return counts | {"engines": self.engines, "rejected": self.rejected}

    @property
    def seconds_left(self) -> int | None:
        """If the rest is as fast; None while nothing can be said."""
        done = self._fraction - self._begun_at
        return round((time.monotonic() - self._begun) * (1 - self._fraction) / done) if done > 0 else None


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    text = ", ".join(f"{{task.fields[{field}]}} {what}" for field, what in FIELDS)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(text),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=Console(stderr=True))
