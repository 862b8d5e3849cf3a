"""The live table of a replay, drawn by rich: the fleet, worst first. The only rich of the service."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from service.replay.display import Lines, Prediction, Tally

BAR = 12  # characters of a probability of one
AROUND = 6  # lines of a screen that hold no engine
REDRAW_SECONDS = 0.2
RISING = ("green", "yellow", "red")  # of the first classes, those between, the last


class Table(Lines):
    """As `Lines`, with the fleet below what was said."""

    def __init__(self, tally: Tally, console: Console | None = None) -> None:
        super().__init__(tally)
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self.drawn)
        self._drawn = 0.0

    def start(self) -> None:
        """Take the terminal."""
        self._live.start()

    def stop(self) -> None:
        """Give the terminal back, with the last picture on it."""
        self._live.stop()

    def say(self, text: str) -> None:
        """One line above the table."""
        self._console.print(Text(text))

    def refresh(self) -> None:
        """Draw again, if it is time."""
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._live.refresh()

    def drawn(self) -> Group:
        """The table and the line below it."""
        tally = self.tally
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        for name, justify in (("engine", "left"), ("cycle", "right"), ("health", "left")):
            grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # two of its literals
        if tally.classes:
            grid.add_column(f"P({tally.classes[-1]})", no_wrap=True)
        grid.add_column("RUL", justify="right", no_wrap=True)
        grid.add_column("prediction set", no_wrap=True)
        room = max(1, self._console.height - AROUND)
        engines = tally.worst_first()
        for found in engines[:room]:
            grid.add_row(*self._row(found))
        more = f"and {len(engines) - room} engines more; " if len(engines) > room else ""
        last = Text(f"{more}{tally.speed:.1f} flights/s; {tally.summary()}", style="dim")
        waits = [Text(f"waiting for {tally.url}: {tally.trouble}", style="red")] if tally.trouble else []
        return Group(grid, last, *waits)

    def _row(self, found: Prediction) -> list[Text]:
        classes, health = self.tally.classes, found["health"]
        style = RISING[0] if health == classes[0] else RISING[2] if health == classes[-1] else RISING[1]
        p = float(found["probabilities"][classes[-1]])
        bar = "█" * round(BAR * p)
        return [
            Text(found["engine_id"]),
            Text(str(found["cycle"])),
            Text(health, style),
            Text(f"{p:5.3f} ") + Text(f"{bar:<{BAR}}", RISING[2]),
            Text("" if found.get("rul") is None else f"{found['rul']:.0f}"),
            Text(", ".join(found.get("prediction_set") or [])),
        ]
