"""What a replay shows of itself: one state, as lines of a log or as a live table. Knows answers, no HTTP."""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

Prediction = dict[str, Any]  # as the service answers it
LINE_SECONDS = 10.0  # between two lines of a log


@dataclass
class Tally:
    """What was done so far; `latest` holds the newest prediction of each engine that still flies."""

    url: str
    classes: tuple[str, ...] = ()
    drifts: tuple[tuple[int, str], ...] = ()  # since which flight, and what
    flights: int = 0  # past ones among them
    live: int = 0  # flights of the replay itself
    known: int = 0  # of those the first ones, that the service knew before: the replay was begun anew
    ends: int = 0
    conflicts: int = 0
    first_conflict: str = ""
    repeated: int = 0
    trouble: str | None = None
    latest: dict[str, Prediction] = field(default_factory=dict)
    began: float | None = None  # when the first flight that is not past was sent

    @property
    def again(self) -> bool:
        """Whether all that was flown so far was told before."""
        return self.known == self.live > 0

    @property
    def speed(self) -> float:
        """Flights a second, past ones apart."""
        return 0.0 if self.began is None else (self.live - self.known) / max(time.monotonic() - self.began, 1.0)

    def worst_first(self) -> list[Prediction]:
        """The newest predictions, that most likely of the last class first."""
        return sorted(self.latest.values(), key=lambda found: -float(found["probabilities"][self.classes[-1]]))

    def drifting(self) -> list[str]:
        """Planted drifts that have set in."""
        return [text for since, text in self.drifts if since < self.live]

    def summary(self) -> str:
        """All of it in a line."""
        by_health = Counter(found["health"] for found in self.latest.values())
        parts = [f"{self.flights:,} flights", f"{len(self.latest)} engines"]
        if self.latest:
            parts[-1] += " (" + ", ".join(f"{by_health[name]} {name}" for name in self.classes) + ")"
        parts.append(f"{self.ends} ends told")
        parts += [f"{self.conflicts} conflicts"] if self.conflicts else []
        parts += [f"{self.repeated} calls repeated"] if self.repeated else []
        parts += [f"drift: {', '.join(self.drifting())}"] if self.drifting() else []
        return "; ".join(parts)


class Lines:
    """A log: a line when something happens, and one now and then."""

    def __init__(self, tally: Tally, to: TextIO = sys.stdout) -> None:
        self.tally, self._to, self._said = tally, to, time.monotonic()

    def start(self) -> None:
        """Begin to show."""

    def stop(self) -> None:
        """Show no more."""

    def say(self, text: str) -> None:
        """One line, now."""
        print(text, file=self._to, flush=True)

    def refresh(self) -> None:
        """Show what has changed, if it is time."""
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.say(self.tally.summary())

    def wait(self, seconds: float) -> None:
        """Sleep, and show meanwhile what is to be shown."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.25))
            self.refresh()

    def trouble(self, reason: str | None) -> None:
        """A call is repeated, for a reason, or was answered at last."""
        self.tally.trouble = reason
        self.say(f"goes on with {self.tally.url}" if reason is None else f"waiting for {self.tally.url}: {reason}")


def board(tally: Tally) -> Lines:
    """A live table on a terminal, if it can be drawn there; a log elsewhere."""
    if sys.stdout.isatty():
        try:
            from service.replay.rich_table import Table
        except ImportError:  # without rich
            return Lines(tally)
        return Table(tally)
    return Lines(tally)
