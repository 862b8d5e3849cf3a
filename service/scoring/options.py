"""Options of a scoring job, the subset that determines its result, and the command stored with the output."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

STDIN = "-"
HORIZON_ROWS = 2**18  # rows by which a row may come after a later cycle of its engine; 32 MB of pending rows
PART_ROWS = 2**17  # rows of a part and of a Parquet row group; a killed job loses at most one part
LOG_INTERVAL_SECONDS = 10.0  # time between two log lines without a terminal


@dataclass(frozen=True)
class Options:
    """Options of a job. Equal `result_options`, model and input give output with the same bytes."""

    inputs: tuple[str, ...]
    output: Path
    engine_column: str = "engine_id"
    cycle_column: str = "cycle"
    columns: dict[str, str] = field(default_factory=dict)  # column of each channel that has another name
    missing: Literal["reject", "hold"] = "reject"
    latest: bool = False
    labels: str | None = None
    rul: str | None = None
    temperature: float | None = None
    horizon: int = HORIZON_ROWS
    part_rows: int = PART_ROWS
    report: Path | None = None
    strict: bool = False
    quiet: bool = False
    restart: bool = False
    interval: float = LOG_INTERVAL_SECONDS
    backend: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int | None = None

    @property
    def truth_column(self) -> str | None:
        """Column of labels or true RUL, if there is one."""
        return self.labels or self.rul

    @property
    def result_options(self) -> dict[str, Any]:
        """Flags that determine the result, together with the model and the input."""
        return {
            "--engine-column": self.engine_column,
            "--cycle-column": self.cycle_column,
            "--map": sorted(f"{channel}={column}" for channel, column in self.columns.items()),
            "--missing": self.missing,
            "--latest": self.latest,
            "--labels": self.labels,
            "--rul": self.rul,
            "--temperature": self.temperature,
            "--horizon": self.horizon,
            "--part-rows": self.part_rows,
            "--report": self.report is not None,
            "OUTPUT": self.output_format,
        }

    @property
    def output_format(self) -> str:
        """Suffix of the output: `.parquet`, `.csv`, or empty for a folder."""
        return self.output.suffix.lower()

    @property
    def command(self) -> str:
        """Command that gives this result, without flags and names that do not affect it."""
        defaults = Options(self.inputs, self.output).result_options
        words = ["engine-health", "score", *self.inputs, "OUTPUT" + self.output_format]
        for flag, value in self.result_options.items():
            if flag.startswith("--") and value != defaults[flag] and flag != "--report":
                for item in value if isinstance(value, list) else [value]:
                    words += [flag] if item is True else [flag, str(item)]
        return shlex.join(words)
