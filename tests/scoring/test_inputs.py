import gzip
import io
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.contract import CHANNELS
from model.windows import Readings
from service.codecs.requests import MAX_CYCLE
from service.errors import InvalidInput
from service.scoring import readers
from service.scoring.sources import input_contains
from tests.support.scoring import flights, read, rejected, score, write

pytestmark = pytest.mark.slow  # whole scoring jobs in this process


def write_csv_with(table: pa.Table, path: Path, replaced: dict[int, str]) -> Path:
    """Write a CSV in which some lines, counted from 0 below the header, are replaced."""
    lines = write(table, path).read_text().splitlines()
    for row, line in replaced.items():
        lines[row + 1] = line
    path.write_text("\n".join(lines) + "\n")
    return path


def csv_line(table: pa.Table, column: str, row: int, value: str) -> str:
    """Return a row of a table as a line of CSV, with one value replaced."""
    values = {name: str(table[name][row].as_py()) for name in table.column_names} | {column: value}
    return ",".join(values.values())


CYCLE = f"cycle: expected a whole number from 0 to {MAX_CYCLE}, got "
INVALID = [
    ("engine_id", "", "engine_id: expected 1 to 200 characters, got nothing"),
    ("engine_id", "a\x01b", "engine_id: a name may not have control characters"),
    ("engine_id", "x" * 201, "engine_id: expected 1 to 200 characters"),
    ("cycle", "", f"{CYCLE}nothing"),
    ("cycle", "3.5", f"{CYCLE}'3.5'"),
    ("cycle", "-1", f"{CYCLE}'-1'"),
    ("cycle", "1e300", f"{CYCLE}'1e300'"),
    ("cycle", "9007199254740993", f"{CYCLE}'9007199254740993'"),
    ("cycle", "soon", f"{CYCLE}'soon'"),
    ("sensor_4", "", "sensor_4: missing; --missing hold would repeat"),
    ("sensor_4", "NaN", "sensor_4: missing; --missing hold would repeat"),
    ("sensor_4", "n/a", "sensor_4: missing; --missing hold would repeat"),
    ("sensor_4", "hot", "sensor_4: expected a number, got 'hot'"),
    ("sensor_4", "1_0", "sensor_4: expected a number, got '1_0'"),
    ("sensor_4", "inf", "sensor_4: too large for a 32-bit float"),
    ("sensor_4", "1e39", "sensor_4: too large for a 32-bit float"),
    ("sensor_4", "1e999", "sensor_4: too large for a 32-bit float"),
]


def test_invalid_values_are_rejected_with_reasons(windows: Readings, tmp_path: Path) -> None:
    """A row with an invalid id, cycle or reading is rejected with its reason. Others are scored; the exit code is 3."""
    table = flights(windows)
    lines = {10 * k: csv_line(table, column, 10 * k, value) for k, (column, value, _) in enumerate(INVALID)}
    path = write_csv_with(table, tmp_path / "a.csv", lines)
    assert 3 == score(path, tmp_path / "out.parquet")
    rejects = rejected(tmp_path / "out.parquet")
    assert [10 * k for k in range(len(INVALID))] == [item["row"] for item in rejects]
    assert {str(path)} == {item["file"] for item in rejects}
    for item, (_, _, reason) in zip(rejects, INVALID, strict=True):
        assert item["reason"].startswith(reason)
    assert table.num_rows - len(INVALID) == read(tmp_path / "out.parquet").num_rows


def test_malformed_csv_lines_are_rejected_alone(windows: Readings, tmp_path: Path) -> None:
    """Lines with a wrong number of fields, an open quote or no UTF-8 are rejected. Other lines are unaffected."""
    table = flights(windows)
    path = write_csv_with(table, tmp_path / "a.csv", {3: "a,1", 50: "a," * 30, 70: 'a,"1', 90: "@@"})
    path.write_bytes(
        path.read_bytes().replace(b"@@", csv_line(table, "engine_id", 90, "@@").encode().replace(b"@@", b"\xff"))
    )
    assert 3 == score(path, tmp_path / "out.parquet")
    rejects = {item["row"]: item["reason"] for item in rejected(tmp_path / "out.parquet")}
    assert {3, 50, 70, 90} == set(rejects)
    assert "expected 19 fields, got 2" == rejects[3]
    assert "not UTF-8" == rejects[90]
    rest = table.filter(pa.array([k not in rejects for k in range(table.num_rows)]))
    assert 0 == score(write(rest, tmp_path / "rest.parquet"), tmp_path / "expected.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_malformed_json_lines_are_rejected_alone(windows: Readings, tmp_path: Path) -> None:
    """Lines that are no JSON object, or have a list for a number, are rejected. Blank lines are not rows."""
    table = flights(windows)
    lines = write(table, tmp_path / "a.jsonl").read_text().splitlines()
    lines[3], lines[50] = lines[3][:-5], "[1, 2]"
    lines[70] = lines[70].replace('"sensor_2":', '"sensor_2":[1],"other":')
    lines[90] = lines[90].replace('"cycle":', '"cycle":null,"other":')
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert 3 == score(tmp_path / "a.jsonl", tmp_path / "out.parquet")
    rejects = {item["row"]: item["reason"] for item in rejected(tmp_path / "out.parquet")}
    assert {3, 50, 70, 90} == set(rejects)
    assert rejects[3].startswith("not JSON")
    assert "not a JSON object" == rejects[50]
    assert "sensor_2: expected a number or a text, got [1]" == rejects[70]
    rest = table.filter(pa.array([k not in rejects for k in range(table.num_rows)]))
    score(write(rest, tmp_path / "rest.parquet"), tmp_path / "expected.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_malformed_cmapss_lines_are_rejected_alone(cmapss_dir: Path, tmp_path: Path) -> None:
    """A line of C-MAPSS text with a word, or with a number missing, is rejected by its row number."""
    lines = gzip.decompress((cmapss_dir / "test_FD001.txt.gz").read_bytes()).decode().splitlines()[:60]
    lines[7], lines[9] = lines[7].replace("100.0", "full", 1), " ".join(lines[9].split()[:20])
    (tmp_path / "test_FD001.txt").write_text("\n".join(lines))
    assert 3 == score(tmp_path / "test_FD001.txt", tmp_path / "out.parquet")
    rejects = rejected(tmp_path / "out.parquet")
    assert [7, 9] == [item["row"] for item in rejects]
    assert "op_setting_3: expected a number, got 'full'" == rejects[0]["reason"]
    assert "FD001-1" == read(tmp_path / "out.parquet")["engine_id"][0].as_py()


def test_chunk_size_does_not_change_the_result(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CSV and JSON lines that are read in small chunks give the same predictions and the same rejected rows."""
    table = flights(windows)
    for name in ("a.csv", "a.jsonl"):
        path = write(table, tmp_path / name)
        path.write_text(path.read_text().replace("\n", "\n?\n", 120))
        score(path, tmp_path / "expected.parquet", restart=True)
        expected, rows = read(tmp_path / "expected.parquet"), rejected(tmp_path / "expected.parquet")
        monkeypatch.setattr(readers, "read_whole_lines", partial(readers.read_whole_lines, size=777))
        score(path, tmp_path / "out.parquet", restart=True)
        monkeypatch.undo()
        assert expected.equals(read(tmp_path / "out.parquet"))
        assert rows == rejected(tmp_path / "out.parquet")
        assert len(rows) in (119, 120)


def test_missing_hold_repeats_the_last_value(windows: Readings, tmp_path: Path) -> None:
    """With `--missing hold` the predictions equal those of a file with the held values written out."""
    table = flights(windows)
    column = table["sensor_4"].to_pylist()
    gaps = [k for k in range(table.num_rows) if k % 100 > 3 and k % 5 == 0]
    held = [column[k - 1] if k in gaps else item for k, item in enumerate(column)]
    place = table.column_names.index("sensor_4")
    missing = pa.array([None if k in gaps else item for k, item in enumerate(column)])
    score(
        write(table.set_column(place, "sensor_4", pa.array(held)), tmp_path / "a.parquet"),
        tmp_path / "expected.parquet",
    )
    assert 0 == score(
        write(table.set_column(place, "sensor_4", missing), tmp_path / "b.parquet"),
        tmp_path / "out.parquet",
        missing="hold",
    )
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_invalid_labels_are_rejected(windows: Readings, tmp_path: Path) -> None:
    """A row with an unknown class, an index out of range or a negative RUL is rejected."""
    table = flights(windows).slice(0, 6)
    for flag, values, rejected_numbers in (
        ("labels", ["normal", "2", "", "broken", "3", None], [3, 4]),
        ("labels", ["1.0", "nan", "NA", "1.5", "3.0", "none"], [3, 4]),
        ("labels", [0, 1, 2, 3, -1, None], [3, 4]),
        ("rul", [0.0, 51.5, None, -1.0, np.inf, 300.0], [3, 4]),
    ):
        path = write(table.append_column("truth", pa.array(values)), tmp_path / "a.parquet")
        assert 3 == score(path, tmp_path / "out.parquet", **{flag: "truth"})
        assert rejected_numbers == [item["row"] for item in rejected(tmp_path / "out.parquet")]


def test_parquet_types_are_converted_to_numbers(windows: Readings, tmp_path: Path) -> None:
    """Integers, decimals, texts and dictionaries of Parquet are read as numbers and names."""
    table = flights(windows)
    score(write(table, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    kinds: dict[str, Any] = {"sensor_2": pa.string(), "cycle": pa.float32(), "sensor_3": pa.large_string()}
    other = table.set_column(0, "engine_id", table["engine_id"].dictionary_encode())
    for name, kind in kinds.items():
        other = other.set_column(other.column_names.index(name), name, other[name].cast(kind))
    assert 0 == score(write(other, tmp_path / "b.parquet"), tmp_path / "out.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_binary_and_float16_ids_are_read(windows: Readings, tmp_path: Path) -> None:
    """Engine ids that are not UTF-8 are rejected rows. Ids of type float16 are read as numbers."""
    table = flights(windows).slice(0, 3)
    for values, rejected_numbers in (
        (pa.array([b"a", b"\xff\xfe", b"a"], pa.binary()), [1]),
        (pa.array(np.array([1, np.nan, 1], np.float16)), [1]),
        (pa.array([b"a", b"a", b"a"], pa.binary(1)), []),
    ):
        path = write(table.set_column(0, "engine_id", values), tmp_path / "a.parquet")
        assert (3 if rejected_numbers else 0) == score(path, tmp_path / "out.parquet")
        assert rejected_numbers == (
            [item["row"] for item in rejected(tmp_path / "out.parquet")] if rejected_numbers else []
        )


def test_malformed_line_does_not_change_engine_ids(windows: Readings, tmp_path: Path) -> None:
    """The engine 7.0 of JSON lines has the id 7, with or without a malformed line in the chunk."""
    lines = write(flights(windows).slice(0, 3), tmp_path / "a.jsonl").read_text().replace('"a"', "7.0").splitlines()
    for first_line, code in (("", 0), ("broken", 3)):
        (tmp_path / "b.jsonl").write_text("\n".join([first_line, *lines, ""]))
        assert code == score(tmp_path / "b.jsonl", tmp_path / "out.parquet")
        assert ["7"] * 3 == read(tmp_path / "out.parquet")["engine_id"].to_pylist()


def test_column_without_numbers_rejects_its_rows(windows: Readings, tmp_path: Path) -> None:
    """Every row is rejected if a channel has times, lists or booleans in place of readings."""
    table = flights(windows).slice(0, 3)
    place = table.column_names.index("sensor_2")
    for values in (
        pa.array([1, 2, 3], pa.timestamp("s")),
        pa.array([[1.0], [2.0], [3.0]]),
        pa.array([True, False, True]),
    ):
        path = write(table.set_column(place, "sensor_2", values), tmp_path / "a.parquet")
        assert 3 == score(path, tmp_path / "out.parquet")
        assert 3 == len(rejected(tmp_path / "out.parquet"))
        assert 0 == read(tmp_path / "out.parquet").num_rows


def test_standard_input_equals_a_file(windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` reads CSV, compressed CSV, JSON lines and Parquet from standard input, with the predictions of the file."""
    table = flights(windows)
    score(write(table, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    for name in ("a.csv", "a.csv.gz", "a.jsonl", "a.parquet"):
        with write(table, tmp_path / name).open("rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            assert 0 == score(["-"], tmp_path / "out.parquet", restart=True)
            assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_folder_reads_only_telemetry(cmapss_dir: Path, tmp_path: Path) -> None:
    """Notes, checksums and RUL files of a folder are ignored. Subsets with equal engine ids are an error."""
    with pytest.raises(InvalidInput, match="its engines differ from those of"):
        score(cmapss_dir, tmp_path / "out.parquet")
    for name in ("readme.txt", "RUL_FD001.txt.gz", "SHA256SUMS", "test_FD001.txt.gz"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes((cmapss_dir / name).read_bytes())
    assert 0 == score(tmp_path / "folder", tmp_path / "out.parquet")
    assert 13_096 == read(tmp_path / "out.parquet").num_rows


def parquet_without(column: str) -> Any:
    """Return a function that writes a Parquet file without one column."""

    def make(table: pa.Table, folder: Path) -> Path:
        return write(table.drop_columns(column), folder / "in.parquet")

    return make


def file_with(name: str, content: bytes) -> Any:
    """Return a function that writes a file with this name and content."""

    def make(_: pa.Table, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def truncated(name: str) -> Any:
    """Return a function that writes the first half of a file."""

    def make(table: pa.Table, folder: Path) -> Path:
        path = write(table, folder / name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return make


def with_trailing_bytes(name: str) -> Any:
    """Return a function that writes a file with bytes after its compressed content."""

    def make(table: pa.Table, folder: Path) -> Path:
        path = write(table, folder / name)
        path.write_bytes(path.read_bytes() + b"not compressed")
        return path

    return make


def with_duplicate_column(table: pa.Table, folder: Path) -> Path:
    """Write a CSV in which one column occurs twice."""
    path = write(table, folder / "in.csv")
    path.write_text(path.read_text().replace("sensor_3", "sensor_2", 1))
    return path


def named_pipe(_: pa.Table, folder: Path) -> Path:
    """Create a named pipe."""
    os.mkfifo(folder / "in.csv")
    return folder / "in.csv"


UNUSABLE = [
    (parquet_without("sensor_4"), "no column 'sensor_4'"),
    (parquet_without("engine_id"), "no column 'engine_id'"),
    (file_with("in.parquet", b"PAR1 or not"), "in.parquet: "),
    (file_with("in.csv", b"a,b\n1,2\n"), "no column 'engine_id' (and 18 more)"),
    (file_with("in.jsonl", b"nothing\nat all\n"), "expected one JSON object per line"),
    (file_with("in.csv", b""), "is empty"),
    (file_with("in", b"\x1f\x8b\x00\x00broken"), "in: "),
    (file_with("in.csv.gz", b"\x1f\x8b\x08\x00"), "in.csv.gz: "),
    (file_with("in.csv", b"\xff\xfe\x00,\n"), "in.csv: not UTF-8"),
    (with_trailing_bytes("in.csv.gz"), "in.csv.gz: zlib"),
    (file_with("\udcff.csv", b"a,b\n1,2\n"), "the name is not UTF-8"),
    (truncated("in.csv.gz"), "in.csv.gz: "),
    (truncated("in.parquet"), "in.parquet: "),
    (truncated("in.jsonl.zst"), "in.jsonl.zst: "),
    (with_duplicate_column, "sensor_"),
    (lambda _table, folder: folder / "none.csv", "none.csv: No such file"),
    (lambda _table, folder: folder / "no*.csv", "no file to score"),
    (lambda _table, folder: folder, "is part of the input"),
    (lambda _table, folder: folder / "*.parquet", "is part of the input"),
    (lambda _table, folder: folder / "**", "is part of the input"),
    (file_with("in.csv.gz", gzip.compress(b"")), "in.csv.gz: is empty"),
    (file_with("in", gzip.compress(b"")), "in: is empty"),
    (named_pipe, "is not a regular file; use - to read from a pipe"),
]


@pytest.mark.parametrize(("make", "message"), UNUSABLE)
def test_unreadable_input_is_one_error_line(make: Any, message: str, windows: Readings, tmp_path: Path) -> None:
    """Absent, empty, malformed or truncated files and absent columns fail with one line: the file and the reason."""
    with pytest.raises(InvalidInput) as error:
        score(make(flights(windows), tmp_path), tmp_path / "out.parquet")
    assert message in error.value.detail
    assert "\n" not in error.value.detail
    assert [] == list(tmp_path.glob("out*"))


def test_large_row_group_is_read_in_chunks(tmp_path: Path) -> None:
    """A Parquet file with one row group is read in chunks with a bounded number of rows."""
    n = 3 * readers.CHUNK_ROWS + 5
    table = pa.table({name: np.arange(n) for name in ("engine_id", "cycle", *CHANNELS)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=n)
    from service.scoring.sources import find_sources

    source = find_sources((str(tmp_path / "a.parquet"),), tmp_path)[0]
    sizes = [chunk.rows for chunk in readers.read_chunks(source, ["engine_id", "cycle", *CHANNELS])]
    assert [readers.CHUNK_ROWS] * 3 + [5] == sizes


def test_recursive_glob_contains_its_own_folder(tmp_path: Path) -> None:
    """`**` matches zero folders too, so an output in the folder of the inputs is part of the input."""
    for pattern, name, expected in (
        ("**/*.parquet", "o.parquet", True),
        ("**/*.parquet", "a/b/o.parquet", True),
        ("**", "o.csv", True),
        ("a/**/o.*", "o.csv", False),
        ("*.parquet", "a/o.parquet", False),
    ):
        assert expected == input_contains(str(tmp_path / pattern), tmp_path / name)
