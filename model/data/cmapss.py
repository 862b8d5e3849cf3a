"""Read NASA C-MAPSS and similar tables: histories, RUL and health labels, splits by engine. No torch.

Saxena, Goebel, Simon, Eklund: Damage Propagation Modeling for Aircraft Engine Run-to-Failure Simulation, PHM 2008.
Labels are computed from the true RUL. With RUL capped at 125, the class `normal` (RUL > 125) would be empty.
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
MIN_CUTOFF = 20  # cycles; the shortest expected history of a test engine


class DataError(ValueError):
    """Unreadable data. The message is one line with the file and the location."""


@dataclass(frozen=True)
class History:
    """One engine: `telemetry` (T, 17) in physical units, `cycle` (T,), and true `rul` (T,) in cycles if available."""

    engine_id: str
    cycle: npt.NDArray[np.int64]
    telemetry: Readings
    rul: npt.NDArray[np.float64] | None = None

    def require_rul(self) -> npt.NDArray[np.float64]:
        """Return the true RUL of every cycle (T,).

        Raises:
            DataError: the history has no RUL.
        """
        if self.rul is None:
            raise DataError(f"{self.engine_id}: no RUL for this engine")
        return self.rul


def data_folder() -> Path:
    """Return the folder of C-MAPSS: `CMAPSS_DIR`, or data/cmapss."""
    return Path(os.environ.get("CMAPSS_DIR") or "data/cmapss")


def read_train(folder: Path, subset: str) -> list[History]:
    """Read the run-to-failure histories of one subset. RUL is 0 at the last cycle."""
    return [with_rul(history, 0.0) for history in _read_text(folder, f"train_{subset}.txt", subset)]


def read_test(folder: Path, subset: str) -> list[History]:
    """Read the test histories of one subset, which end before failure, with RUL from the subset's RUL file."""
    histories = _read_text(folder, f"test_{subset}.txt", subset)
    last_ruls = read_last_rul(folder, subset, len(histories))
    return [with_rul(history, last_rul) for history, last_rul in zip(histories, last_ruls, strict=True)]


def read_last_rul(folder: Path, subset: str, engines: int) -> list[float]:
    """Read the true RUL of each test engine of a subset at its last cycle.

    Raises:
        DataError: the number of values differs from `engines`.
    """
    values = np.atleast_1d(_read_numbers(folder, f"RUL_{subset}.txt")).ravel()
    if len(values) != engines:
        raise DataError(f"RUL_{subset}.txt has {len(values)} values for {engines} engines")
    return [float(value) for value in values]


def with_rul(history: History, last_rul: float) -> History:
    """Return the history with RUL, given the RUL at its last cycle."""
    rul = last_rul + (history.cycle[-1] - history.cycle).astype(np.float64)
    return History(history.engine_id, history.cycle, history.telemetry, rul)


def _read_text(folder: Path, name: str, subset: str) -> list[History]:
    table = _read_numbers(folder, name)
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise DataError(f"{name}: expected rows of {len(COLUMNS)} numbers, got shape {table.shape}")
    keys = [f"{subset}-{int(unit)}" for unit in table[:, 0]]
    return build_histories(keys, table[:, 1], table[:, [COLUMNS.index(channel) for channel in CHANNELS]], name)


def _read_numbers(folder: Path, name: str) -> npt.NDArray[np.float64]:
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        text = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        return np.loadtxt(text.decode("ascii").splitlines(), ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{folder / name}: {str(error).splitlines()[0]}") from None


def build_histories(
    engines: Sequence[str],
    cycles: npt.ArrayLike,
    telemetry: npt.ArrayLike,
    source: str,
    rul: npt.ArrayLike | None = None,
) -> list[History]:
    """Group rows by engine in order of first appearance, and sort each engine by cycle.

    Raises:
        DataError: a cycle is not an integer, or an engine has the same cycle twice.
    """
    order = {engine: k for k, engine in enumerate(dict.fromkeys(engines))}
    group = np.array([order[engine] for engine in engines], dtype=np.int64)
    cycle = np.asarray(cycles, dtype=np.float64)
    if not np.array_equal(cycle, np.floor(cycle)):
        raise DataError(f"{source}: a cycle is not a whole number")
    rows = np.lexsort((cycle, group))
    duplicates = (np.diff(group[rows]) == 0) & (np.diff(cycle[rows]) == 0)
    if duplicates.any():
        row = int(rows[1:][duplicates][0])
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
    """Read histories from a table with one row per cycle, Parquet or CSV by extension.

    Columns have the channel names of docs/api.md. The RUL column is optional. Missing values become NaN.

    Raises:
        DataError: the file is unreadable, or a column is missing or not numeric.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = (pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv)(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    missing = [name for name in (engine_column, cycle_column, *CHANNELS) if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}")
    engines = [str(value) for value in table[engine_column].to_pylist()]
    telemetry = np.stack([_float_column(table, name, path) for name in CHANNELS], axis=1)
    rul = _float_column(table, rul_column, path) if rul_column in table.column_names else None
    return build_histories(engines, _float_column(table, cycle_column, path), telemetry, str(path), rul)


def _float_column(table: Any, name: str, path: Path) -> npt.NDArray[np.float64]:
    try:
        return np.array(table[name].to_pylist(), dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        raise DataError(f"{path}: column {name} is not numeric") from None


def health_classes(rul: npt.ArrayLike, thresholds: Iterable[float] = RUL_THRESHOLDS) -> npt.NDArray[np.int64]:
    """Return class indices of true RUL (N,): the number of thresholds that are not below it."""
    remaining = np.asarray(rul, dtype=np.float64)
    return np.asarray(np.sum([remaining <= threshold for threshold in thresholds], axis=0), dtype=np.int64)


def split_engines(engines: Sequence[History], shares: Sequence[float], seed: int) -> list[list[History]]:
    """Split engines, never windows, at random into parts of the given shares. The remainder goes to the first part.

    Raises:
        DataError: there are fewer engines than parts need.
    """
    order = np.random.default_rng(seed).permutation(len(engines))
    sizes = [round(share * len(engines)) for share in shares[1:]]
    if sum(sizes) > len(engines):
        raise DataError(f"{len(engines)} engines are too few for a split into {len(shares)} parts")
    cuts = np.cumsum([len(engines) - sum(sizes), *sizes])[:-1]
    return [[engines[i] for i in np.sort(part)] for part in np.split(order, cuts)]


def cutoff_weights(history: History) -> npt.NDArray[np.float64]:
    """Return row weights (T,): the probability that a history which ends at a random cycle contains the row.

    A live history ends at some cycle before failure. Run-to-failure histories contain too many critical rows, which
    biases the class prior. The last cycle is uniformly distributed from `MIN_CUTOFF` to failure.
    """
    last = len(history.cycle)
    after = last - np.maximum(np.arange(1, last + 1), min(MIN_CUTOFF, last)) + 1
    return np.asarray(after / after[0], dtype=np.float64)
