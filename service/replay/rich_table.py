"""Live table of a replay on a terminal, worst engine first. The only module of the replay that imports `rich`."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from service.replay.display import LogDisplay, PredictionJson, ReplayState

BAR_WIDTH = 12  # length of the bar for probability 1
NON_ENGINE_LINES = 6  # lines of the screen that show no engine
REDRAW_SECONDS = 0.2
SEVERITY_COLOURS = ("green", "yellow", "red")  # first class, classes in between, last class


class TableDisplay(LogDisplay):
    """Events as in the log, above a table of the fleet."""

    def __init__(self, state: ReplayState, console: Console | None = None) -> None:
        super().__init__(state)
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self.render)
        self._drawn_at = 0.0

    def start(self) -> None:
        """Take over the terminal."""
        self._live.start()

    def stop(self) -> None:
        """Release the terminal. The last table stays on it."""
        self._live.stop()

    def print_line(self, text: str) -> None:
        """Print one line above the table."""
        self._console.print(Text(text))

    def refresh(self) -> None:
        """Redraw the table if the last drawing is older than `REDRAW_SECONDS`."""
        if time.monotonic() - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = time.monotonic()
            self._live.refresh()

    def render(self) -> Group:
        """Return the table and the summary below it."""
        state = self.state
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, justify in (("engine", "left"), ("cycle", "right"), ("health", "left")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # both are literals of rich
        if state.classes:
            table.add_column(f"P({state.classes[-1]})", no_wrap=True)
        table.add_column("RUL", justify="right", no_wrap=True)
        table.add_column("prediction set", no_wrap=True)
        max_rows = max(1, self._console.height - NON_ENGINE_LINES)
        predictions = state.rank_predictions()
        for prediction in predictions[:max_rows]:
            table.add_row(*self._format_row(prediction))
        hidden = f"and {len(predictions) - max_rows} engines more; " if len(predictions) > max_rows else ""
        summary = Text(f"{hidden}{state.flights_per_second:.1f} flights/s; {state.format_summary()}", style="dim")
        outage = [Text(f"waiting for {state.url}: {state.outage}", style="red")] if state.outage else []
        return Group(table, summary, *outage)

    def _format_row(self, prediction: PredictionJson) -> list[Text]:
        classes, health = self.state.classes, prediction["health"]
        healthy, medium, severe = SEVERITY_COLOURS
        style = healthy if health == classes[0] else severe if health == classes[-1] else medium
        probability = float(prediction["probabilities"][classes[-1]])
        bar = "█" * round(BAR_WIDTH * probability)
        return [
            Text(prediction["engine_id"]),
            Text(str(prediction["cycle"])),
            Text(health, style),
            Text(f"{probability:5.3f} ") + Text(f"{bar:<{BAR_WIDTH}}", severe),
            Text("" if prediction.get("rul") is None else f"{prediction['rul']:.0f}"),
            Text(", ".join(prediction.get("prediction_set") or [])),
        ]
