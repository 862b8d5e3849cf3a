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
from service.errors import InvalidInput
from service.scoring import readers
from service.scoring.sources import input_contains
from tests.support.scoring import flights, read, rejected, score, write

pytestmark = pytest.mark.slow  # whole scoring jobs in this process

ROW = 5  # where something is wrong


def csv_with(table: pa.Table, path: Path, replaced: dict[int, str]) -> Path:
    """A CSV in which some lines, counted from 0 below the header, are others."""
    lines = write(table, path).read_text().splitlines()
    for row, line in replaced.items():
        lines[row + 1] = line
    path.write_text("\n".join(lines) + "\n")
    return path


def changed(table: pa.Table, column: str, row: int, value: str) -> str:
    """A row of a table as a line of CSV, one value replaced."""
    values = {name: str(table[name][row].as_py()) for name in table.column_names} | {column: value}
    return ",".join(values.values())


WRONG = [
    ("engine_id", "", "engine_id: expected 1 to 200 characters, got nothing"),
    ("engine_id", "a\x01b", "engine_id: a name may not have control characters"),
    ("engine_id", "x" * 201, "engine_id: expected 1 to 200 characters"),
    ("cycle", "", "cycle: nothing is not a whole number"),
    ("cycle", "3.5", "cycle: '3.5' is not a whole number from 0"),
    ("cycle", "-1", "cycle: '-1' is not a whole number from 0"),
    ("cycle", "1e300", "cycle: '1e300' is not a whole number from 0"),
    ("cycle", "9007199254740993", "cycle: '9007199254740993' is not a whole number from 0"),
    ("cycle", "soon", "cycle: 'soon' is not a whole number from 0"),
    ("sensor_4", "", "sensor_4: missing; --missing hold would repeat"),
    ("sensor_4", "NaN", "sensor_4: missing; --missing hold would repeat"),
    ("sensor_4", "n/a", "sensor_4: missing; --missing hold would repeat"),
    ("sensor_4", "hot", "sensor_4: expected a number, got 'hot'"),
    ("sensor_4", "1_0", "sensor_4: expected a number, got '1_0'"),
    ("sensor_4", "inf", "sensor_4: too large for a 32-bit float"),
    ("sensor_4", "1e39", "sensor_4: too large for a 32-bit float"),
    ("sensor_4", "1e999", "sensor_4: too large for a 32-bit float"),
]


def test_every_wrong_value_is_a_rejected_row(windows: Readings, tmp_path: Path) -> None:
    """A row with a wrong id, cycle or reading is named with its reason; all others are scored, exit code 3."""
    some = flights(windows)
    lines = {10 * k: changed(some, column, 10 * k, value) for k, (column, value, _) in enumerate(WRONG)}
    path = csv_with(some, tmp_path / "a.csv", lines)
    assert 3 == score(path, tmp_path / "out.parquet")
    found = rejected(tmp_path / "out.parquet")
    assert [10 * k for k in range(len(WRONG))] == [one["row"] for one in found]
    assert {str(path)} == {one["file"] for one in found}
    for one, (_, _, reason) in zip(found, WRONG, strict=True):
        assert one["reason"].startswith(reason)
    assert some.num_rows - len(WRONG) == read(tmp_path / "out.parquet").num_rows


def test_broken_lines_of_csv_cost_nothing_but_themselves(windows: Readings, tmp_path: Path) -> None:
    """Lines with too few or many fields, an open quote or no UTF-8 are rejected; the rest is as without them."""
    some = flights(windows)
    path = csv_with(some, tmp_path / "a.csv", {3: "a,1", 50: "a," * 30, 70: 'a,"1', 90: "@@"})
    path.write_bytes(
        path.read_bytes().replace(b"@@", changed(some, "engine_id", 90, "@@").encode().replace(b"@@", b"\xff"))
    )
    assert 3 == score(path, tmp_path / "out.parquet")
    found = {one["row"]: one["reason"] for one in rejected(tmp_path / "out.parquet")}
    assert {3, 50, 70, 90} == set(found)
    assert "expected 19 fields, found 2" == found[3]
    assert "not UTF-8" == found[90]
    rest = some.filter(pa.array([k not in found for k in range(some.num_rows)]))
    assert 0 == score(write(rest, tmp_path / "rest.parquet"), tmp_path / "expected.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_broken_lines_of_json_cost_nothing_but_themselves(windows: Readings, tmp_path: Path) -> None:
    """Lines that are no JSON, no object, or hold a list for a number are rejected; blank lines are no rows."""
    some = flights(windows)
    lines = write(some, tmp_path / "a.jsonl").read_text().splitlines()
    lines[3], lines[50] = lines[3][:-5], "[1, 2]"
    lines[70] = lines[70].replace('"sensor_2":', '"sensor_2":[1],"other":')
    lines[90] = lines[90].replace('"cycle":', '"cycle":null,"other":')
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert 3 == score(tmp_path / "a.jsonl", tmp_path / "out.parquet")
    found = {one["row"]: one["reason"] for one in rejected(tmp_path / "out.parquet")}
    assert {3, 50, 70, 90} == set(found)
    assert found[3].startswith("not JSON")
    assert "not a JSON object" == found[50]
    assert "sensor_2: expected a number or a text, got [1]" == found[70]
    rest = some.filter(pa.array([k not in found for k in range(some.num_rows)]))
    score(write(rest, tmp_path / "rest.parquet"), tmp_path / "expected.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_broken_lines_of_cmapss_text_cost_nothing_but_themselves(cmapss_dir: Path, tmp_path: Path) -> None:
    """A line of NASA's text with a word or without a number is rejected by its row."""
    lines = gzip.decompress((cmapss_dir / "test_FD001.txt.gz").read_bytes()).decode().splitlines()[:60]
    lines[7], lines[9] = lines[7].replace("100.0", "full", 1), " ".join(lines[9].split()[:20])
    (tmp_path / "test_FD001.txt").write_text("\n".join(lines))
    assert 3 == score(tmp_path / "test_FD001.txt", tmp_path / "out.parquet")
    found = rejected(tmp_path / "out.parquet")
    assert [7, 9] == [one["row"] for one in found]
    assert "op_setting_3: expected a number, got 'full'" == found[0]["reason"]
    assert "FD001-1" == read(tmp_path / "out.parquet")["engine_id"][0].as_py()


def test_pieces_of_any_size_are_the_same_file(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CSV and JSON lines read a few lines at a time give the same answers and the same numbers of rejected rows."""
    some = flights(windows)
    for name in ("a.csv", "a.jsonl"):
        path = write(some, tmp_path / name)
        path.write_text(path.read_text().replace("\n", "\n?\n", 120))
        score(path, tmp_path / "expected.parquet", restart=True)
        expected, rows = read(tmp_path / "expected.parquet"), rejected(tmp_path / "expected.parquet")
        monkeypatch.setattr(readers, "read_whole_lines", partial(readers.read_whole_lines, size=777))
        score(path, tmp_path / "out.parquet", restart=True)
        monkeypatch.undo()
        assert expected.equals(read(tmp_path / "out.parquet"))
        assert rows == rejected(tmp_path / "out.parquet")
        assert len(rows) in (119, 120)


def test_held_values_are_those_of_the_service(windows: Readings, tmp_path: Path) -> None:
    """`--missing hold` repeats the last seen value: the answers are those of the file with the values written out."""
    some = flights(windows)
    column = some["sensor_4"].to_pylist()
    gaps = [k for k in range(some.num_rows) if k % 100 > 3 and k % 5 == 0]
    held = [column[k - 1] if k in gaps else one for k, one in enumerate(column)]
    place = some.column_names.index("sensor_4")
    missing = pa.array([None if k in gaps else one for k, one in enumerate(column)])
    score(
        write(some.set_column(place, "sensor_4", pa.array(held)), tmp_path / "a.parquet"), tmp_path / "expected.parquet"
    )
    assert 0 == score(
        write(some.set_column(place, "sensor_4", missing), tmp_path / "b.parquet"),
        tmp_path / "out.parquet",
        missing="hold",
    )
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_labels_that_are_none_are_rejected(windows: Readings, tmp_path: Path) -> None:
    """An unknown class, an index out of range, a negative RUL: each is a rejected row."""
    some = flights(windows).slice(0, 6)
    for flag, values, wrong in (
        ("labels", ["normal", "2", "", "broken", "3", None], [3, 4]),
        ("labels", ["1.0", "nan", "NA", "1.5", "3.0", "none"], [3, 4]),
        ("labels", [0, 1, 2, 3, -1, None], [3, 4]),
        ("rul", [0.0, 51.5, None, -1.0, np.inf, 300.0], [3, 4]),
    ):
        path = write(some.append_column("truth", pa.array(values)), tmp_path / "a.parquet")
        assert 3 == score(path, tmp_path / "out.parquet", **{flag: "truth"})
        assert wrong == [one["row"] for one in rejected(tmp_path / "out.parquet")]


def test_types_of_parquet_are_taken_as_numbers(windows: Readings, tmp_path: Path) -> None:
    """Whole numbers, decimals, texts and dictionaries are read as the numbers and names that they hold."""
    some = flights(windows)
    score(write(some, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    kinds: dict[str, Any] = {"sensor_2": pa.string(), "cycle": pa.float32(), "sensor_3": pa.large_string()}
    other = some.set_column(0, "engine_id", some["engine_id"].dictionary_encode())
    for name, kind in kinds.items():
        other = other.set_column(other.column_names.index(name), name, other[name].cast(kind))
    assert 0 == score(write(other, tmp_path / "b.parquet"), tmp_path / "out.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_bytes_and_half_floats_stop_no_job(windows: Readings, tmp_path: Path) -> None:
    """Ids that are no UTF-8 are rejected rows, ids in sixteen bits are the numbers they are."""
    some = flights(windows).slice(0, 3)
    for values, wrong in (
        (pa.array([b"a", b"\xff\xfe", b"a"], pa.binary()), [1]),
        (pa.array(np.array([1, np.nan, 1], np.float16)), [1]),
        (pa.array([b"a", b"a", b"a"], pa.binary(1)), []),
    ):
        path = write(some.set_column(0, "engine_id", values), tmp_path / "a.parquet")
        assert (3 if wrong else 0) == score(path, tmp_path / "out.parquet")
        assert wrong == ([one["row"] for one in rejected(tmp_path / "out.parquet")] if wrong else [])


def test_a_broken_line_gives_no_engine_another_name(windows: Readings, tmp_path: Path) -> None:
    """An engine 7.0 of JSON lines is called 7 whether or not a line beside it is broken."""
    lines = write(flights(windows).slice(0, 3), tmp_path / "a.jsonl").read_text().replace('"a"', "7.0").splitlines()
    for more, code in (("", 0), ("broken", 3)):
        (tmp_path / "b.jsonl").write_text("\n".join([more, *lines, ""]))
        assert code == score(tmp_path / "b.jsonl", tmp_path / "out.parquet")
        assert ["7"] * 3 == read(tmp_path / "out.parquet")["engine_id"].to_pylist()


def test_a_column_of_no_numbers_rejects_its_rows(windows: Readings, tmp_path: Path) -> None:
    """Times or lists where readings should be are no numbers: every row says so."""
    some = flights(windows).slice(0, 3)
    place = some.column_names.index("sensor_2")
    for values in (
        pa.array([1, 2, 3], pa.timestamp("s")),
        pa.array([[1.0], [2.0], [3.0]]),
        pa.array([True, False, True]),
    ):
        path = write(some.set_column(place, "sensor_2", values), tmp_path / "a.parquet")
        assert 3 == score(path, tmp_path / "out.parquet")
        assert 3 == len(rejected(tmp_path / "out.parquet"))
        assert 0 == read(tmp_path / "out.parquet").num_rows


def test_standard_input_is_a_file_like_any_other(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-` reads CSV, packed CSV and even Parquet from standard input, with the answers of the file."""
    some = flights(windows)
    score(write(some, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    for name in ("a.csv", "a.csv.gz", "a.jsonl", "a.parquet"):
        with write(some, tmp_path / name).open("rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            assert 0 == score(["-"], tmp_path / "out.parquet", restart=True)
            assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_a_folder_is_its_data_and_not_its_notes(cmapss_dir: Path, tmp_path: Path) -> None:
    """Notes, sums and truths are passed over; NASA's own folder has two kinds of engines of one name: refused."""
    with pytest.raises(InvalidInput, match="its engines differ from those of"):
        score(cmapss_dir, tmp_path / "out.parquet")
    for name in ("readme.txt", "RUL_FD001.txt.gz", "SHA256SUMS", "test_FD001.txt.gz"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes((cmapss_dir / name).read_bytes())
    assert 0 == score(tmp_path / "folder", tmp_path / "out.parquet")
    assert 13_096 == read(tmp_path / "out.parquet").num_rows


def parquet_without(column: str) -> Any:
    def make(table: pa.Table, folder: Path) -> Path:
        return write(table.drop_columns(column), folder / "in.parquet")

    return make


def named(name: str, content: bytes) -> Any:
    def make(_: pa.Table, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def cut(name: str) -> Any:
    def make(table: pa.Table, folder: Path) -> Path:
        path = write(table, folder / name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return make


def followed(name: str) -> Any:
    def make(table: pa.Table, folder: Path) -> Path:
        path = write(table, folder / name)
        path.write_bytes(path.read_bytes() + b"what nobody packed")
        return path

    return make


def twice(table: pa.Table, folder: Path) -> Path:
    path = write(table, folder / "in.csv")
    path.write_text(path.read_text().replace("sensor_3", "sensor_2", 1))
    return path


def pipe(_: pa.Table, folder: Path) -> Path:
    os.mkfifo(folder / "in.csv")
    return folder / "in.csv"


UNUSABLE = [
    (parquet_without("sensor_4"), "no column 'sensor_4'"),
    (parquet_without("engine_id"), "no column 'engine_id'"),
    (named("in.parquet", b"PAR1 or not"), "in.parquet: "),
    (named("in.csv", b"a,b\n1,2\n"), "no column 'engine_id' (and 18 more)"),
    (named("in.jsonl", b"nothing\nat all\n"), "no JSON object a line"),
    (named("in.csv", b""), "is empty"),
    (named("in", b"\x1f\x8b\x00\x00broken"), "in: "),
    (named("in.csv.gz", b"\x1f\x8b\x08\x00"), "in.csv.gz: "),
    (named("in.csv", b"\xff\xfe\x00,\n"), "in.csv: not UTF-8"),
    (followed("in.csv.gz"), "in.csv.gz: zlib"),
    (named("\udcff.csv", b"a,b\n1,2\n"), "the name is not UTF-8"),
    (cut("in.csv.gz"), "in.csv.gz: "),
    (cut("in.parquet"), "in.parquet: "),
    (cut("in.jsonl.zst"), "in.jsonl.zst: "),
    (twice, "sensor_"),
    (lambda _table, folder: folder / "none.csv", "none.csv: No such file"),
    (lambda _table, folder: folder / "no*.csv", "no file that can be scored"),
    (lambda _table, folder: folder, "is part of the input"),
    (lambda _table, folder: folder / "*.parquet", "is part of the input"),
    (lambda _table, folder: folder / "**", "is part of the input"),
    (named("in.csv.gz", gzip.compress(b"")), "in.csv.gz: is empty"),
    (named("in", gzip.compress(b"")), "in: is empty"),
    (pipe, "is not a regular file; use - to read from a pipe"),
]


@pytest.mark.parametrize(("make", "said"), UNUSABLE)
def test_a_file_that_cannot_be_read_is_one_line(make: Any, said: str, windows: Readings, tmp_path: Path) -> None:
    """Absent, empty, broken, cut files and absent columns fail with one line: the file and what is wrong."""
    with pytest.raises(InvalidInput) as refused:
        score(make(flights(windows), tmp_path), tmp_path / "out.parquet")
    assert said in refused.value.detail
    assert "\n" not in refused.value.detail
    assert [] == list(tmp_path.glob("out*"))


def test_one_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    """A Parquet file of one row group is never in memory as a whole: its chunks are of a bounded number of rows."""
    n = 3 * readers.CHUNK_ROWS + 5
    table = pa.table({name: np.arange(n) for name in ("engine_id", "cycle", *CHANNELS)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=n)
    from service.scoring.sources import find_sources

    source = find_sources((str(tmp_path / "a.parquet"),), tmp_path)[0]
    sizes = [chunk.rows for chunk in readers.read_chunks(source, ["engine_id", "cycle", *CHANNELS])]
    assert [readers.CHUNK_ROWS] * 3 + [5] == sizes


def test_a_glob_of_any_depth_holds_its_own_folder(tmp_path: Path) -> None:
    """`**` is no folder too: an output beside the inputs would be read the next time, and is refused."""
    for pattern, name, expected in (
        ("**/*.parquet", "o.parquet", True),
        ("**/*.parquet", "a/b/o.parquet", True),
        ("**", "o.csv", True),
        ("a/**/o.*", "o.csv", False),
        ("*.parquet", "a/o.parquet", False),
    ):
        assert expected == input_contains(str(tmp_path / pattern), tmp_path / name)
