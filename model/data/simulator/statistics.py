"""What a simulated engine is drawn from: statistics of C-MAPSS's engines, in a small file. numpy only, no torch.

`fleet.json` holds figures of the training engines of FD004, which fly in six operating conditions and wear in two ways,
and how many engines of all subsets never leave the first of them; nothing of the data set itself. `model.data.simulator.fit`
writes it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import SENSORS, SETTINGS

TABLE = Path(__file__).with_name("fleet.json")
SENSOR_COUNT, SETTING_COUNT = len(SENSORS), len(SETTINGS)
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mode:
    """One way of wearing. An engine of it is a row of P = 2 + 2 x 14 traits: the mean and F factors times normal draws.

    Traits: logarithm of the time constant of wear and of the length of life, both in cycles; then of each sensor the
    offset of a new engine and the response to wear that is complete, both in the condition's units of response.
    """

    name: str
    share: float  # of the engines
    mean: Floats  # (P,)
    factors: Floats  # (F, P)


@dataclass(frozen=True)
class Fleet:
    """Statistics of a fleet in K operating conditions, S = 14 sensors, in physical units."""

    shares: Floats  # (K,) of the flights
    settings_low: Floats  # (K, 3), between which settings lie evenly
    settings_high: Floats  # (K, 3)
    grounded: float  # share of the engines of all subsets that fly in the first condition only, at sea level
    grounded_low: Floats  # (3,), between which their settings lie
    grounded_high: Floats  # (3,)
    baseline: Floats  # (K, S) of a new engine
    response: Floats  # (K, S) physical units of one unit of response
    noise: Floats  # (K, S) standard deviation within one engine, wear taken away
    mixing: Floats  # (S, S) lower triangle: noise is its product with independent draws
    deviation: Floats  # (K, S) standard deviation over all flights of the condition: what `2sd` of a drift counts in
    decimals: Integers  # (3 + S,) with which each channel is written
    shortest: int  # cycles of the shortest life
    longest: int
    modes: tuple[Mode, ...]

    def conditions(self, settings: npt.ArrayLike) -> Integers:
        """The operating condition (N,) of each row of settings (N, 3): the nearest one."""
        middle = (self.settings_low + self.settings_high) / 2
        scale = np.maximum(np.ptp(middle, axis=0), np.finfo(np.float64).tiny)
        gap = (np.asarray(settings, dtype=np.float64)[:, None] - middle) / scale
        return np.asarray((gap**2).sum(axis=-1).argmin(axis=-1))

    def rounded(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Rows (N, 3 + S) with the decimals that the data have."""
        scale = 10.0**self.decimals
        exact = np.round(np.asarray(rows, dtype=np.float64) * scale) / scale + 0.0  # -0.0 becomes 0.0
        return np.asarray(exact, dtype=np.float32)


def read(path: Path = TABLE) -> Fleet:
    """The committed statistics, or others."""
    found: dict[str, Any] = json.loads(path.read_text())
    modes = tuple(
        Mode(mode["name"], mode["share"], np.array(mode["mean"]), np.array(mode["factors"])) for mode in found["modes"]
    )
    arrays = {name: np.array(value) for name, value in found.items() if isinstance(value, list)}
    single = {name: found[name] for name in ("grounded", "shortest", "longest")}
    return Fleet(**{**arrays, **single, "modes": modes})


def write(fleet: Fleet, source: str, path: Path = TABLE) -> None:
    """Keep statistics as JSON, one row a line, six digits a number; `source` says what they are of."""
    modes = [
        {"name": mode.name, "share": _short(mode.share), "mean": _short(mode.mean), "factors": _short(mode.factors)}
        for mode in fleet.modes
    ]
    values = {field.name: _short(getattr(fleet, field.name)) for field in fields(fleet) if field.name != "modes"}
    path.write_text(_laid_out({"source": source} | values | {"modes": modes}) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, np.ndarray | Sequence):
        return [_short(one) for one in value]
    return int(value) if isinstance(value, int | np.integer) else float(f"{value:.6g}")


def _laid_out(value: Any, depth: int = 0) -> str:
    """JSON whose innermost lists stand on one line each."""
    inner, margin = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_laid_out(one, depth + 1)}" for key, one in value.items()]
        return "{" + inner + f",{inner}".join(lines) + margin + "}"
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        return "[" + inner + f",{inner}".join(_laid_out(one, depth + 1) for one in value) + margin + "]"
    return json.dumps(value)
