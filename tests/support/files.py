"""Fleet files in the formats that the commands read."""

import math
from collections.abc import Sequence

from model.contract import CHANNELS
from model.data.cmapss import COLUMNS, History


def as_csv(engines: Sequence[History], delimiter: str = ",", named: bool = True) -> str:
    columns = (["engine_id", "cycle"] if named else []) + list(CHANNELS)
    lines = [columns]
    for engine in engines:
        for cycle, row in zip(engine.cycle, engine.telemetry, strict=True):
            values = ["" if math.isnan(value) else str(value) for value in row]
            lines.append(([engine.engine_id, str(cycle)] if named else []) + values)
    return "\n".join(map(delimiter.join, lines)) + "\n"


def as_text(engines: Sequence[History]) -> str:
    """Return engines in the format of C-MAPSS, with 0 for channels that no model reads."""
    lines = []
    for unit, engine in enumerate(engines, 1):
        for cycle, row in zip(engine.cycle, engine.telemetry, strict=True):
            values = dict(zip(CHANNELS, row, strict=True))
            lines.append(" ".join([str(unit), str(cycle), *(str(values.get(name, 0.0)) for name in COLUMNS[2:])]))
    return "  \n".join(lines) + "  \n"
