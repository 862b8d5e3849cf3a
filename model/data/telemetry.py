"""Read histories of engines from one file: C-MAPSS text or CSV, plain or gzipped. Errors name the line.

CSV has a header with one column per channel. Optional columns are `engine_id` (default: one engine), `cycle` (default:
rows are numbered from 1) and `rul`, the true RUL. Other columns are ignored. Depends on numpy and `model.data.cmapss`.
"""

import csv
import gzip
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.data import cmapss
from model.data.cmapss import COLUMNS, DataError, History

STDIN = "-"
ENGINE, CYCLE, RUL = "engine_id", "cycle", "rul"
UNIT = COLUMNS[0]
MAX_CYCLE = 2**53  # larger integers are not exact in float64
MISSING_VALUES = ("", "na", "n/a", "nan", "null", "none")  # spellings of a missing value
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_SHOWN_CHARACTERS = 40  # of an invalid value in a message
_SUBSET = re.compile(r"(train|test)_(FD\d{3})\.txt")
_NUMBERS_ONLY = re.compile(r"[\s0-9.eE+-]*")


class TextRow(NamedTuple):
    """One line of a file: its location for messages, and its fields by column."""

    location: str
    fields: dict[str, str]


class FlightRow(NamedTuple):
    """One parsed flight."""

    location: str
    engine_id: str
    cycle: int
    readings: list[float]
    rul: float


def read_histories(name: str, channels: Sequence[str], gaps: bool = False) -> list[History]:
    """Read the engines of a file in order of first appearance, each sorted by cycle.

    Args:
        name: path of the file, or `-` for standard input.
        channels: required columns.
        gaps: whether readings may be missing; they become NaN.

    Raises:
        DataError: the file is unreadable or a row is invalid. The message names line and column.
    """
    source = "standard input" if name == STDIN else name
    lines = _read_text(name, source).replace("\r\n", "\n").split("\n")
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{source}: is empty; expected C-MAPSS text or CSV")
    subset = _SUBSET.search(Path(name).name)
    numbers_only = _NUMBERS_ONLY.fullmatch(first) is not None
    if numbers_only:
        _check_columns(COLUMNS, f"{source}: C-MAPSS text", channels)
    rows = (
        _parse_cmapss_text(lines, source, subset[2] if subset else "")
        if numbers_only
        else _parse_csv(lines, source, channels)
    )
    default_engine = "engine" if name == STDIN else Path(name).name.split(".")[0]
    engines = _build_histories(list(_parse_flights(rows, channels, default_engine, gaps)), source)
    return _add_rul(engines, Path(name).parent, subset[1], subset[2]) if numbers_only and subset else engines


def _read_text(name: str, source: str) -> str:
    try:
        if name == STDIN and sys.stdin is None:
            raise DataError(f"{source}: is closed")
        content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{source}: is not UTF-8 text; expected C-MAPSS text or CSV, plain or gzipped") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: {getattr(error, 'strerror', None) or error}") from None


def _parse_cmapss_text(lines: list[str], source: str, subset: str) -> Iterator[TextRow]:
    """Yield the rows of C-MAPSS text: unit, cycle, settings and 21 sensors. The engine id includes the subset."""
    for number, line in enumerate(lines, 1):
        values, location = line.split(), f"{source}, line {number}"
        if values and len(values) != len(COLUMNS):
            raise DataError(f"{location}: expected {len(COLUMNS)} numbers, got {len(values)}")
        if values:
            fields = dict(zip(COLUMNS, values, strict=True))
            unit = _parse_whole_number(fields[UNIT], location, UNIT)
            yield TextRow(location, fields | {ENGINE: f"{subset}-{unit}" if subset else str(unit)})


def _parse_csv(lines: list[str], source: str, channels: Sequence[str]) -> Iterator[TextRow]:
    head = next(line for line in lines if line.strip())
    table = csv.reader(lines, delimiter="\t" if head.count("\t") > head.count(",") else ",", strict=True)
    names: list[str] = []
    try:
        for values in table:
            location = f"{source}, line {table.line_num}"
            if not values or not any(values):
                continue
            if not names:
                names = [value.strip() for value in values]
                _check_columns(names, source, channels)
            elif len(values) != len(names):
                raise DataError(f"{location}: expected {len(names)} fields, got {len(values)}")
            else:
                yield TextRow(location, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{source}, line {table.line_num}: {error}") from None


def _check_columns(names: Sequence[str], source: str, channels: Sequence[str]) -> None:
    missing = [name for name in channels if name not in names]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{source}: no column {missing[0]!r}{others}")
    duplicates = [name for name in (ENGINE, CYCLE, RUL, *channels) if names.count(name) > 1]
    if duplicates:
        raise DataError(f"{source}: more than one column {duplicates[0]!r}")


def _parse_flights(
    rows: Iterator[TextRow], channels: Sequence[str], default_engine: str, gaps: bool
) -> Iterator[FlightRow]:
    """Parse rows. `default_engine` replaces a missing engine column; without a cycle column, rows are numbered."""
    row_counts: Counter[str] = Counter()
    for location, fields in rows:
        engine, cycle = fields.get(ENGINE, default_engine).strip(), fields.get(CYCLE)
        if not engine or not engine.isprintable():
            raise DataError(f"{location}: {ENGINE}: expected a name, got {engine[:MAX_SHOWN_CHARACTERS]!r}")
        row_counts[engine] += 1
        number = row_counts[engine] if cycle is None else _parse_whole_number(cycle, location, CYCLE)
        values = [_parse_float(fields[name], location, name) for name in channels]
        missing = [] if gaps else [name for name, value in zip(channels, values, strict=True) if value != value]
        if missing:
            raise DataError(f"{location}: {missing[0]}: missing")
        rul = _parse_float(fields.get(RUL, ""), location, RUL)
        if rul < 0:
            raise DataError(f"{location}: {RUL}: expected at least 0, got {rul:g}")
        yield FlightRow(location, engine, number, values, rul)


def _parse_float(text: str, location: str, column: str) -> float:
    """Parse a number within the range of float32. A missing value is NaN."""
    text = text.strip()
    if text.lower() in MISSING_VALUES:
        return math.nan
    try:
        value = float("_" if "_" in text else text)  # Python accepts 1_000, which is invalid in these files
    except ValueError:
        raise DataError(f"{location}: {column}: expected a number, got {text[:MAX_SHOWN_CHARACTERS]!r}") from None
    if not abs(value) <= MAX_FLOAT32:
        raise DataError(f"{location}: {column}: {text[:MAX_SHOWN_CHARACTERS]} is too large for a 32-bit float")
    return value


def _parse_whole_number(text: str, location: str, column: str) -> int:
    value = _parse_float(text, location, column)
    if not (0 <= value <= MAX_CYCLE and value == math.floor(value)):
        raise DataError(
            f"{location}: {column}: expected a whole number >= 0, got {text.strip()[:MAX_SHOWN_CHARACTERS]!r}"
        )
    return int(value)


def _build_histories(flights: list[FlightRow], source: str) -> list[History]:
    if not flights:
        raise DataError(f"{source}: no rows after the header")
    locations: dict[tuple[str, int], str] = {}
    for flight in flights:
        first = locations.setdefault((flight.engine_id, flight.cycle), flight.location)
        if first != flight.location:
            raise DataError(
                f"{flight.location}: engine {flight.engine_id!r} has cycle {flight.cycle} twice, see {first}"
            )
    names, cycles = [flight.engine_id for flight in flights], [flight.cycle for flight in flights]
    rul = np.array([flight.rul for flight in flights])
    rul_or_none = None if np.isnan(rul).all() else rul
    return cmapss.build_histories(names, cycles, [flight.readings for flight in flights], source, rul_or_none)


def _add_rul(engines: list[History], folder: Path, kind: str, subset: str) -> list[History]:
    """Add RUL: 0 at the last cycle of training engines, from RUL_FD00x.txt in the same folder for test engines."""
    if kind == "train":
        return [cmapss.with_rul(history, 0.0) for history in engines]
    if not any(folder.glob(f"RUL_{subset}.txt*")):
        return engines
    return [
        cmapss.with_rul(*pair) for pair in zip(engines, cmapss.read_last_rul(folder, subset, len(engines)), strict=True)
    ]
