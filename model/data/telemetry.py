"""Histories of engines from one file: C-MAPSS text or CSV, plain or gzipped. Whatever is wrong is named with its line.

CSV has a header: a column for each channel, by name; `engine_id` where the file holds more than one engine, `cycle`
where flights are not in order from 1 without gaps, `rul` where the truth is known. Others are not looked at. Knows
files and numpy, nothing else.
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
MOST_CYCLE = 2**53  # beyond it a float tells no two cycles apart
NO_VALUE = ("", "na", "n/a", "nan", "null", "none")  # what a missing value is written as
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 40  # characters of a wrong value
_SUBSET = re.compile(r"(train|test)_(FD\d{3})\.txt")
_BARE = re.compile(r"[\s0-9.eE+-]*")


class Row(NamedTuple):
    """A line of a file, its fields by column, and what it is called in messages."""

    where: str
    fields: dict[str, str]


class Flight(NamedTuple):
    """What a row says."""

    where: str
    engine_id: str
    cycle: int
    readings: list[float]
    rul: float


def read(name: str, channels: Sequence[str], gaps: bool = False) -> list[History]:
    """The engines of a file, in order of first appearance, each sorted by cycle.

    Args:
        name: its path, or `-` for standard input.
        channels: columns that must be there, as the model reads them.
        gaps: whether a reading may be missing, and is NaN.

    Raises:
        DataError: it cannot be read, or a row is wrong; names the line and the column.
    """
    said = "standard input" if name == STDIN else name
    lines = _text(name, said).replace("\r\n", "\n").split("\n")
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{said}: is empty")
    subset = _SUBSET.search(Path(name).name)
    bare = _BARE.fullmatch(first) is not None
    if bare:
        _check(COLUMNS, f"{said}: C-MAPSS text", channels)
    rows = _bare(lines, said, subset[2] if subset else "") if bare else _csv(lines, said, channels)
    alone = "engine" if name == STDIN else Path(name).name.split(".")[0]
    found = _histories(list(_flights(rows, channels, alone, gaps)), said)
    return _with_truth(found, Path(name).parent, subset[1], subset[2]) if bare and subset else found


def _text(name: str, said: str) -> str:
    try:
        if name == STDIN and sys.stdin is None:
            raise DataError(f"{said}: is closed")
        content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{said}: is no text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{said}: {getattr(error, 'strerror', None) or error}") from None


def _bare(lines: list[str], said: str, subset: str) -> Iterator[Row]:
    """The rows of C-MAPSS: unit, cycle, settings and 21 sensors; units of different subsets are different engines."""
    for number, line in enumerate(lines, 1):
        values, where = line.split(), f"{said}, line {number}"
        if values and len(values) != len(COLUMNS):
            raise DataError(f"{where}: expected {len(COLUMNS)} numbers, got {len(values)}")
        if values:
            fields = dict(zip(COLUMNS, values, strict=True))
            unit = _whole(fields[UNIT], where, UNIT)
            yield Row(where, fields | {ENGINE: f"{subset}-{unit}" if subset else str(unit)})


def _csv(lines: list[str], said: str, channels: Sequence[str]) -> Iterator[Row]:
    head = next(line for line in lines if line.strip())
    table = csv.reader(lines, delimiter="\t" if head.count("\t") > head.count(",") else ",", strict=True)
    names: list[str] = []
    try:
        for values in table:
            where = f"{said}, line {table.line_num}"
            if not values or not any(values):
                continue
            if not names:
                names = [value.strip() for value in values]
                _check(names, said, channels)
            elif len(values) != len(names):
                raise DataError(f"{where}: expected {len(names)} fields, got {len(values)}")
            else:
                yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{said}, line {table.line_num}: {error}") from None


def _check(names: Sequence[str], said: str, channels: Sequence[str]) -> None:
    absent = [name for name in channels if name not in names]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise DataError(f"{said}: no column {absent[0]!r}{more}")
    twice = [name for name in (ENGINE, CYCLE, RUL, *channels) if names.count(name) > 1]
    if twice:
        raise DataError(f"{said}: more than one column {twice[0]!r}")


def _flights(rows: Iterator[Row], channels: Sequence[str], alone: str, gaps: bool) -> Iterator[Flight]:
    """What rows say; an engine without a name is called `alone`, and flights without a cycle are counted."""
    flown: Counter[str] = Counter()
    for where, fields in rows:
        engine, cycle = fields.get(ENGINE, alone).strip(), fields.get(CYCLE)
        if not engine or not engine.isprintable():
            raise DataError(f"{where}: {ENGINE}: expected a name, got {engine[:SHOWN]!r}")
        flown[engine] += 1
        at = flown[engine] if cycle is None else _whole(cycle, where, CYCLE)
        values = [_number(fields[name], where, name) for name in channels]
        missing = [] if gaps else [name for name, value in zip(channels, values, strict=True) if value != value]
        if missing:
            raise DataError(f"{where}: {missing[0]}: missing")
        rul = _number(fields.get(RUL, ""), where, RUL)
        if rul < 0:
            raise DataError(f"{where}: {RUL}: {rul:g} is no true RUL")
        yield Flight(where, engine, at, values, rul)


def _number(text: str, where: str, column: str) -> float:
    """A number that a 32-bit float holds, NaN for a missing one."""
    text = text.strip()
    if text.lower() in NO_VALUE:
        return math.nan
    try:
        value = float("_" if "_" in text else text)  # which Python reads in numbers, and nobody writes
    except ValueError:
        raise DataError(f"{where}: {column}: expected a number, got {text[:SHOWN]!r}") from None
    if not abs(value) <= LARGEST:
        raise DataError(f"{where}: {column}: {text[:SHOWN]} is too large for a 32-bit float")
    return value


def _whole(text: str, where: str, column: str) -> int:
    value = _number(text, where, column)
    if not (0 <= value <= MOST_CYCLE and value == math.floor(value)):
        raise DataError(f"{where}: {column}: expected a whole number from 0 on, got {text.strip()[:SHOWN]!r}")
    return int(value)


def _histories(flights: list[Flight], said: str) -> list[History]:
    if not flights:
        raise DataError(f"{said}: no rows")
    seen: dict[tuple[str, int], str] = {}
    for flight in flights:
        first = seen.setdefault((flight.engine_id, flight.cycle), flight.where)
        if first != flight.where:
            raise DataError(f"{flight.where}: engine {flight.engine_id!r} has cycle {flight.cycle} twice, see {first}")
    names, cycles = [flight.engine_id for flight in flights], [flight.cycle for flight in flights]
    rul = np.array([flight.rul for flight in flights])
    known = None if np.isnan(rul).all() else rul
    return cmapss.histories(names, cycles, [flight.readings for flight in flights], said, known)


def _with_truth(engines: list[History], folder: Path, kind: str, subset: str) -> list[History]:
    """With RUL, which is 0 at the end of a training engine, and in RUL_FD00x.txt beside the file for a test engine."""
    if kind == "train":
        return [cmapss.with_rul(history, 0.0) for history in engines]
    if not any(folder.glob(f"RUL_{subset}.txt*")):
        return engines
    return [cmapss.with_rul(*pair) for pair in zip(engines, cmapss.last_rul(folder, subset, len(engines)), strict=True)]
