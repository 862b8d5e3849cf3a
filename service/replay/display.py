"""Output of a replay: its state, and a log of it."""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

PredictionJson = dict[str, Any]  # one prediction of the service's response
LOG_SECONDS = 10.0  # time between two summaries in a log


@dataclass
class ReplayState:
    """Counts of a replay, and the newest prediction of each engine that has not failed."""

    url: str
    classes: tuple[str, ...] = ()
    drifts: tuple[tuple[int, str], ...] = ()  # first flight and description of each injected drift
    flights: int = 0  # all flights sent, past ones included
    live_flights: int = 0  # flights sent that are not past
    stored_flights: int = 0  # first live flights that the service had stored already, in a restarted replay
    failures: int = 0
    conflicts: int = 0
    first_conflict: str = ""
    retries: int = 0
    outage: str | None = None  # reason of the current outage
    latest: dict[str, PredictionJson] = field(default_factory=dict)  # newest prediction by engine id
    started_at: float | None = None  # monotonic time of the first live flight

    @property
    def catching_up(self) -> bool:
        """Whether the service had stored every live flight sent so far."""
        return self.stored_flights == self.live_flights > 0

    @property
    def flights_per_second(self) -> float:
        """Rate of new live flights."""
        if self.started_at is None:
            return 0.0
        return (self.live_flights - self.stored_flights) / max(time.monotonic() - self.started_at, 1.0)

    def rank_predictions(self) -> list[PredictionJson]:
        """Return the newest predictions by falling probability of the last class."""
        return sorted(self.latest.values(), key=lambda row: -float(row["probabilities"][self.classes[-1]]))

    def active_drifts(self) -> list[str]:
        """Return the descriptions of the injected drifts that have started."""
        return [description for first_flight, description in self.drifts if first_flight < self.live_flights]

    def format_summary(self) -> str:
        """Return all counts in one line."""
        by_health = Counter(prediction["health"] for prediction in self.latest.values())
        parts = [f"{self.flights:,} flights", f"{len(self.latest)} engines"]
        if self.latest:
            parts[-1] += " (" + ", ".join(f"{by_health[name]} {name}" for name in self.classes) + ")"
        parts.append(f"{self.failures} failures sent")
        parts += [f"{self.conflicts} conflicts"] if self.conflicts else []
        parts += [f"{self.retries} calls retried"] if self.retries else []
        parts += [f"drift: {', '.join(self.active_drifts())}"] if self.active_drifts() else []
        return "; ".join(parts)


class LogDisplay:
    """Log with a line for each event and a periodic summary."""

    def __init__(self, state: ReplayState, stream: TextIO = sys.stdout) -> None:
        self.state, self._stream, self._logged_at = state, stream, time.monotonic()

    def start(self) -> None:
        """Start the output."""

    def stop(self) -> None:
        """Stop the output."""

    def print_line(self, text: str) -> None:
        """Print one line immediately."""
        print(text, file=self._stream, flush=True)

    def refresh(self) -> None:
        """Print a summary if the last one is older than `LOG_SECONDS`."""
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = time.monotonic()
            self.print_line(self.state.format_summary())

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds` and refresh the output meanwhile."""
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            time.sleep(min(remaining, 0.25))
            self.refresh()

    def show_outage(self, reason: str | None) -> None:
        """Print that a call is retried for `reason`, or with None that the service responds again."""
        self.state.outage = reason
        url = self.state.url
        self.print_line(f"connected to {url} again" if reason is None else f"waiting for {url}: {reason}")
