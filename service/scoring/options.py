"""What a scoring job is asked for: its options, those that the result depends on, and the command as it is kept."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

STDIN = "-"
HORIZON = 2**18  # rows by which a row may come after a later cycle of its engine; 32 MB of pending rows
PART_ROWS = 2**17  # of a part, and of a row group of Parquet: what a killed job loses at most
INTERVAL = 10.0  # seconds between two log lines where there is no terminal


@dataclass(frozen=True)
class Options:
    """A job. Of two jobs with the same `deciding` options, model and input the results are the same bytes."""

    inputs: tuple[str, ...]
    output: Path
    engine_column: str = "engine_id"
    cycle_column: str = "cycle"
    columns: dict[str, str] = field(default_factory=dict)  # of channels that stand under another name
    missing: Literal["reject", "hold"] = "reject"
    latest: bool = False
    labels: str | None = None
    rul: str | None = None
    temperature: float | None = None
    horizon: int = HORIZON
    part_rows: int = PART_ROWS
    report: Path | None = None
    strict: bool = False
    quiet: bool = False
    restart: bool = False
    interval: float = INTERVAL
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int | None = None

    @property
    def truth_column(self) -> str | None:
        """The column that holds what is true, if one does."""
        return self.labels or self.rul

    @property
    def deciding(self) -> dict[str, Any]:
        """What the result depends on, beside model and input."""
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
            "OUTPUT": self.form,
        }

    @property
    def form(self) -> str:
        """What is written: `.parquet`, `.csv`, or nothing for a folder."""
        return self.output.suffix.lower()

    @property
    def command(self) -> str:
        """The command that gives this result, without what changes no answer: the output's own name, for one."""
        usual = Options(self.inputs, self.output).deciding
        words = ["engine-health", "score", *self.inputs, "OUTPUT" + self.form]
        for flag, value in self.deciding.items():
            if flag.startswith("--") and value != usual[flag] and flag != "--report":
                for one in value if isinstance(value, list) else [value]:
                    words += [flag] if one is True else [flag, str(one)]
        return shlex.join(words)
