"""Statistics of C-MAPSS engines, from which simulated engines are drawn. numpy only, no torch.

`fleet.json` contains statistics of the training engines of FD004, with six operating conditions and two modes of wear.
It also contains the share of engines of all subsets that fly in the first condition only, but no rows of the data set.
`model.data.simulator.fit` writes it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import SENSORS, SETTINGS

STATISTICS_FILE = Path(__file__).with_name("fleet.json")
SENSOR_COUNT, SETTING_COUNT = len(SENSORS), len(SETTINGS)
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WearMode:
    """One mode of wear. An engine is a vector of P = 2 + 2 x 14 traits: mean plus F factors times normal draws.

    Traits are the logarithms of the time constant of wear and of the length of life in cycles. They are followed by the
    offset of each sensor of a new engine and by its response to full wear, in response units of the condition.
    """

    name: str
    share: float  # of the engines
    mean: Floats  # (P,)
    factors: Floats  # (F, P)


@dataclass(frozen=True)
class FleetStatistics:
    """Statistics of a fleet with K operating conditions and S = 14 sensors, in physical units."""

    shares: Floats  # (K,) of the flights
    settings_low: Floats  # (K, 3), lower end of uniformly distributed settings
    settings_high: Floats  # (K, 3), upper end
    grounded: float  # share of the engines of all subsets that fly in the first condition only, at sea level
    grounded_low: Floats  # (3,), lower end of their settings
    grounded_high: Floats  # (3,), upper end
    baseline: Floats  # (K, S) of a new engine
    response: Floats  # (K, S) physical units of one unit of response
    noise: Floats  # (K, S) standard deviation within one engine, without wear
    mixing: Floats  # (S, S) lower triangle: noise is its product with independent draws
    deviation: Floats  # (K, S) standard deviation over all flights of the condition, the unit of `2sd` in a drift
    decimals: Integers  # (3 + S,) decimals of each channel in the data
    shortest: int  # cycles of the shortest life
    longest: int
    modes: tuple[WearMode, ...]

    def nearest_conditions(self, settings: npt.ArrayLike) -> Integers:
        """Return the nearest operating condition (N,) of each row of settings (N, 3)."""
        middle = (self.settings_low + self.settings_high) / 2
        scale = np.maximum(np.ptp(middle, axis=0), np.finfo(np.float64).tiny)
        gap = (np.asarray(settings, dtype=np.float64)[:, None] - middle) / scale
        return np.asarray((gap**2).sum(axis=-1).argmin(axis=-1))

    def round_rows(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Round rows (N, 3 + S) to the decimals of the data."""
        scale = 10.0**self.decimals
        rounded = np.round(np.asarray(rows, dtype=np.float64) * scale) / scale + 0.0  # -0.0 becomes 0.0
        return np.asarray(rounded, dtype=np.float32)


def read_statistics(path: Path = STATISTICS_FILE) -> FleetStatistics:
    """Read fleet statistics from JSON; the committed file is the default."""
    document: dict[str, Any] = json.loads(path.read_text())
    modes = tuple(
        WearMode(mode["name"], mode["share"], np.array(mode["mean"]), np.array(mode["factors"]))
        for mode in document["modes"]
    )
    arrays = {name: np.array(value) for name, value in document.items() if isinstance(value, list)}
    scalars = {name: document[name] for name in ("grounded", "shortest", "longest")}
    return FleetStatistics(**{**arrays, **scalars, "modes": modes})


def write_statistics(fleet: FleetStatistics, source: str, path: Path = STATISTICS_FILE) -> None:
    """Write statistics as JSON with six significant digits. `source` describes the data."""
    modes = [
        {
            "name": mode.name,
            "share": _round_values(mode.share),
            "mean": _round_values(mode.mean),
            "factors": _round_values(mode.factors),
        }
        for mode in fleet.modes
    ]
    values = {field.name: _round_values(getattr(fleet, field.name)) for field in fields(fleet) if field.name != "modes"}
    path.write_text(_format_json({"source": source} | values | {"modes": modes}) + "\n")


def _round_values(value: Any) -> Any:
    if isinstance(value, np.ndarray | Sequence):
        return [_round_values(item) for item in value]
    return int(value) if isinstance(value, int | np.integer) else float(f"{value:.6g}")


def _format_json(value: Any, depth: int = 0) -> str:
    """Return JSON with one line per innermost list."""
    inner, margin = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_format_json(item, depth + 1)}" for key, item in value.items()]
        return "{" + inner + f",{inner}".join(lines) + margin + "}"
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        return "[" + inner + f",{inner}".join(_format_json(item, depth + 1) for item in value) + margin + "]"
    return json.dumps(value)
