"""NASA C-MAPSS and tables like it: read histories, RUL and health labels, split by engine. No torch.

Saxena, Goebel, Simon, Eklund: Damage Propagation Modeling for Aircraft Engine Run-to-Failure Simulation, PHM 2008.
Labels always come from the true RUL: in the RUL capped at 125 the class `normal` (RUL > 125) would be empty.
"""

import gzip
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import CHANNELS, RUL_THRESHOLDS, SETTINGS
from model.windows import Readings

SUBSETS = ("FD001", "FD002", "FD003", "FD004")
COLUMNS = ("unit", "cycle", *SETTINGS, *(f"sensor_{n}" for n in range(1, 22)))
MIN_CUTOFF = 20  # cycles; the shortest history that the fleet's test engines are expected to have


class DataError(ValueError):
    """Data that cannot be read; the message is one line and names the file and the place."""


@dataclass(frozen=True)
class History:
    """One engine: `telemetry` (T, 17) in physical units, `cycle` (T,), and true `rul` (T,) in cycles where known."""

    engine_id: str
    cycle: npt.NDArray[np.int64]
    telemetry: Readings
    rul: npt.NDArray[np.float64] | None = None

    def known_rul(self) -> npt.NDArray[np.float64]:
        """The true RUL of every cycle.

        Raises:
            DataError: this engine's failure is not known.
        """
        if self.rul is None:
            raise DataError(f"{self.engine_id}: no RUL is known for this engine")
        return self.rul


def data_folder() -> Path:
    """Where C-MAPSS lies: `CMAPSS_DIR`, or data/cmapss."""
    return Path(os.environ.get("CMAPSS_DIR") or "data/cmapss")


def read_train(folder: Path, subset: str) -> list[History]:
    """Run-to-failure histories of one subset: RUL is 0 at the last cycle."""
    return [with_rul(history, 0.0) for history in _read_text(folder, f"train_{subset}.txt", subset)]


def read_test(folder: Path, subset: str) -> list[History]:
    """Histories cut off before failure, with RUL from the subset's truth file."""
    histories = _read_text(folder, f"test_{subset}.txt", subset)
    truth = last_rul(folder, subset, len(histories))
    return [with_rul(history, last) for history, last in zip(histories, truth, strict=True)]


def last_rul(folder: Path, subset: str, engines: int) -> list[float]:
    """The true RUL of each of a subset's test engines at the last cycle that is shown."""
    truth = np.atleast_1d(_numbers(folder, f"RUL_{subset}.txt")).ravel()
    if len(truth) != engines:
        raise DataError(f"RUL_{subset}.txt has {len(truth)} values for {engines} engines")
    return [float(last) for last in truth]


def with_rul(history: History, at_last: float) -> History:
    """A history whose RUL at the last cycle is known."""
    rul = at_last + (history.cycle[-1] - history.cycle).astype(np.float64)
    return History(history.engine_id, history.cycle, history.telemetry, rul)


def _read_text(folder: Path, name: str, subset: str) -> list[History]:
    table = _numbers(folder, name)
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise DataError(f"{name}: expected rows of {len(COLUMNS)} numbers, got shape {table.shape}")
    keys = [f"{subset}-{int(unit)}" for unit in table[:, 0]]
    return histories(keys, table[:, 1], table[:, [COLUMNS.index(channel) for channel in CHANNELS]], name)


def _numbers(folder: Path, name: str) -> npt.NDArray[np.float64]:
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        text = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        return np.loadtxt(text.decode("ascii").splitlines(), ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder / name}: {str(error).splitlines()[0]}") from None


def histories(
    engines: Sequence[str],
    cycles: npt.ArrayLike,
    telemetry: npt.ArrayLike,
    source: str,
    rul: npt.ArrayLike | None = None,
) -> list[History]:
    """Group rows by engine, in order of first appearance, each engine sorted by cycle.

    Raises:
        DataError: a cycle that is no whole number, or twice the same cycle of one engine.
    """
    order = {engine: place for place, engine in enumerate(dict.fromkeys(engines))}
    group = np.array([order[engine] for engine in engines], dtype=np.int64)
    cycle = np.asarray(cycles, dtype=np.float64)
    if not np.array_equal(cycle, np.floor(cycle)):
        raise DataError(f"{source}: a cycle is not a whole number")
    rows = np.lexsort((cycle, group))
    same = (np.diff(group[rows]) == 0) & (np.diff(cycle[rows]) == 0)
    if same.any():
        row = int(rows[1:][same][0])
        raise DataError(f"{source}: row {row}: engine {engines[row]} has cycle {cycle[row]:g} twice")
    values = np.asarray(telemetry, dtype=np.float32)
    remaining = None if rul is None else np.asarray(rul, dtype=np.float64)
    return [
        History(engine, cycle[part].astype(np.int64), values[part], None if remaining is None else remaining[part])
        for engine, part in zip(order, np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1), strict=True)
    ]


def read_table(
    path: Path, engine_column: str = "engine_id", cycle_column: str = "cycle", rul_column: str = "rul"
) -> list[History]:
    """Histories from a long table, Parquet or CSV by extension, with the channel names of docs/api.md as columns.

    The RUL column is optional. Missing values stay NaN.

    Raises:
        DataError: an unreadable file, or a column that is absent or not numeric.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = (pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv)(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    absent = [name for name in (engine_column, cycle_column, *CHANNELS) if name not in table.column_names]
    if absent:
        raise DataError(f"{path}: no column {', '.join(absent)}")
    engines = [str(value) for value in table[engine_column].to_pylist()]
    telemetry = np.stack([_column(table, name, path) for name in CHANNELS], axis=1)
    rul = _column(table, rul_column, path) if rul_column in table.column_names else None
    return histories(engines, _column(table, cycle_column, path), telemetry, str(path), rul)


def _column(table: Any, name: str, path: Path) -> npt.NDArray[np.float64]:
    try:
        return np.array(table[name].to_pylist(), dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        raise DataError(f"{path}: column {name} is not numeric") from None


def health(rul: npt.ArrayLike, thresholds: Iterable[float] = RUL_THRESHOLDS) -> npt.NDArray[np.int64]:
    """Class index from true RUL: 0 above the first threshold, then one more for each threshold reached from above."""
    remaining = np.asarray(rul, dtype=np.float64)
    return np.asarray(np.sum([remaining <= threshold for threshold in thresholds], axis=0), dtype=np.int64)


def split(engines: Sequence[History], shares: Sequence[float], seed: int) -> list[list[History]]:
    """Engines, never windows, dealt at random into parts of the given shares; the first takes what is left over.

    Raises:
        DataError: too few engines for that many parts.
    """
    order = np.random.default_rng(seed).permutation(len(engines))
    sizes = [round(share * len(engines)) for share in shares[1:]]
    if sum(sizes) > len(engines):
        raise DataError(f"{len(engines)} engines are too few for {len(shares)} parts")
    cuts = np.cumsum([len(engines) - sum(sizes), *sizes])[:-1]
    return [[engines[i] for i in np.sort(part)] for part in np.split(order, cuts)]


def cutoff_weights(history: History) -> npt.NDArray[np.float64]:
    """P(a cut-off at a random cycle leaves the row visible), (T,): weighs rows as a live fleet shows them.

    A live history ends at some cycle before failure, and a row is seen only if the cut comes at or after it. Whole
    run-to-failure histories hold too many critical rows and would teach the wrong prior. The cut is uniform over the
    cycles from `MIN_CUTOFF` to the last.
    """
    last = len(history.cycle)
    after = last - np.maximum(np.arange(1, last + 1), min(MIN_CUTOFF, last)) + 1
    return np.asarray(after / after[0], dtype=np.float64)
