import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from model.contract import CHANNELS
from model.data import cmapss
from model.data.cmapss import DataError, History

TRAIN_ENGINES = {"FD001": 100, "FD002": 260, "FD003": 100, "FD004": 249}
TEST_ENGINES = {"FD001": 100, "FD002": 259, "FD003": 100, "FD004": 248}


def line(unit: float, cycle: float, value: float) -> str:
    return " ".join(str(x) for x in (unit, cycle, *[value] * 24)) + "  \n"


def write_small_subset(folder: Path, text: str, rul: str = "7\n") -> Path:
    (folder / "train_FD001.txt").write_text(text)
    (folder / "test_FD001.txt").write_text(text)
    (folder / "RUL_FD001.txt").write_text(rul)
    return folder


@pytest.mark.parametrize("subset", cmapss.SUBSETS)
def test_every_official_engine_is_read(cmapss_dir: Path, subset: str) -> None:
    """All training and test engines are read, in physical units; RUL decreases by 1 per cycle."""
    train, test = cmapss.read_train(cmapss_dir, subset), cmapss.read_test(cmapss_dir, subset)
    assert TRAIN_ENGINES[subset] == len(train)
    assert TEST_ENGINES[subset] == len(test)
    for history in (*train, *test):
        assert (len(history.cycle), 17) == history.telemetry.shape
        assert (np.diff(history.require_rul()) == -1).all()
    assert all(history.require_rul()[-1] == 0 for history in train)
    assert all(history.require_rul()[-1] > 0 for history in test)


def test_first_row_of_fd001_is_in_contract_order(cmapss_dir: Path) -> None:
    """The 17 channels of the first row equal those in NASA's file, in the order of the contract."""
    first = cmapss.read_train(cmapss_dir, "FD001")[0]
    expected = [
        -0.0007,
        -0.0004,
        100,
        641.82,
        1589.7,
        1400.6,
        554.36,
        2388.06,
        9046.19,
        47.47,
        521.66,
        2388.02,
        8138.62,
    ]
    assert "FD001-1" == first.engine_id
    np.testing.assert_allclose([*expected, 8.4195, 392, 39.06, 23.419], first.telemetry[0], rtol=1e-6)


def test_plain_and_gzipped_files_are_equal(tmp_path: Path) -> None:
    """A file may be plain, as NASA ships it, or gzipped."""
    text = line(1, 1, 2.5) + line(1, 2, 3.5)
    plain = cmapss.read_train(write_small_subset(tmp_path, text), "FD001")[0]
    (tmp_path / "train_FD001.txt").unlink()
    (tmp_path / "train_FD001.txt.gz").write_bytes(gzip.compress(text.encode()))
    np.testing.assert_array_equal(plain.telemetry, cmapss.read_train(tmp_path, "FD001")[0].telemetry)


def test_test_engines_end_at_the_value_of_the_rul_file(tmp_path: Path) -> None:
    """RUL of a test engine ends at the value of the RUL file."""
    history = cmapss.read_test(write_small_subset(tmp_path, line(1, 1, 0) + line(1, 2, 0)), "FD001")[0]
    assert [8, 7] == history.require_rul().tolist()


@pytest.mark.parametrize(
    ("text", "rul", "message"),
    [
        ("1 1 2.0\n", "7\n", "26 numbers"),
        ("1 1 x\n", "7\n", "train_FD001"),
        ("", "7\n", "train_FD001"),
        (line(1, 1, 0) + line(1, 1, 0), "7\n", "cycle 1 twice"),
        (line(1, 1.5, 0), "7\n", "whole number"),
        (line(1, 1, 0), "7\n8\n", "2 values for 1 engines"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_malformed_file_error_names_the_file(tmp_path: Path, text: str, rul: str, message: str) -> None:
    """Too few columns, words, no rows, a duplicate cycle or another number of RUL values is an error."""
    write_small_subset(tmp_path, text, rul)
    with pytest.raises(DataError, match=message):
        (cmapss.read_test if "values" in message else cmapss.read_train)(tmp_path, "FD001")


def test_missing_or_truncated_file_error_names_the_file(tmp_path: Path) -> None:
    """A missing file and a truncated gzip file are errors of one line that names the file."""
    with pytest.raises(DataError, match="train_FD002"):
        cmapss.read_train(tmp_path, "FD002")
    (tmp_path / "train_FD002.txt.gz").write_bytes(gzip.compress(b"1 2 3" * 1000)[:20])
    with pytest.raises(DataError, match="train_FD002"):
        cmapss.read_train(tmp_path, "FD002")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_table_rows_are_grouped_and_sorted(tmp_path: Path, suffix: str) -> None:
    """Rows of a table may be in any order; they are grouped by engine and sorted by cycle."""
    columns = {"engine_id": ["b", "a", "b", "a"], "cycle": [2, 1, 1, 2], "rul": [0, 1, 1, 0]}
    table = pa.table(columns | {name: [2.0, 1.0, 1.0, 2.0] for name in CHANNELS})
    path = tmp_path / f"fleet{suffix}"
    (pyarrow.parquet.write_table if suffix == ".parquet" else pyarrow.csv.write_csv)(table, path)
    histories = cmapss.read_table(path)
    assert ["b", "a"] == [history.engine_id for history in histories]
    for history in histories:
        assert [1, 2] == history.cycle.tolist()
        assert [1, 2] == history.telemetry[:, 0].tolist()
        assert [1, 0] == history.require_rul().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensor_2": None}, "no column sensor_2"),
        ({"sensor_2": ["x"]}, "sensor_2 is not numeric"),
        ({"cycle": [None]}, "whole number"),
    ],
)
def test_malformed_table_error_names_the_column(
    tmp_path: Path, change: dict[str, list[object] | None], message: str
) -> None:
    """A missing column, a word among numbers and a missing cycle are errors that name the column."""
    columns: dict[str, list[object] | None] = {"engine_id": ["a"], "cycle": [1], **{name: [1.0] for name in CHANNELS}}
    table = {name: values for name, values in (columns | change).items() if values is not None}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        cmapss.read_table(tmp_path / "t.parquet")


def test_unreadable_table_error_names_the_file(tmp_path: Path) -> None:
    """An invalid Parquet file and a missing file are errors that name the file."""
    (tmp_path / "t.parquet").write_text("hello")
    for name in ("t.parquet", "none.csv"):
        with pytest.raises(DataError, match=name):
            cmapss.read_table(tmp_path / name)


def test_health_classes_begin_at_the_thresholds() -> None:
    """Classes begin exactly at the thresholds, and `normal` exists because RUL is not capped."""
    assert [0, 0, 1, 1, 2, 2] == cmapss.health_classes([300, 125.5, 125, 51, 50, 0]).tolist()
    assert [0, 1, 2] == cmapss.health_classes([81, 80, 30], (80, 30)).tolist()


def test_history_without_rul_raises() -> None:
    """Requesting the RUL of a history without RUL is an error that names the engine."""
    with pytest.raises(DataError, match="E7"):
        History("E7", np.array([1]), np.zeros((1, 17), np.float32)).require_rul()


def test_split_is_by_engine_and_repeatable() -> None:
    """No engine is in two parts, none is lost, and equal seeds give equal splits."""
    fleet = [History(str(i), np.array([1]), np.zeros((1, 17), np.float32)) for i in range(50)]
    names = [[history.engine_id for history in part] for part in cmapss.split_engines(fleet, (0.8, 0.1, 0.1), 0)]
    assert [40, 5, 5] == [len(part) for part in names]
    assert 50 == len({name for part in names for name in part})
    assert names == [
        [history.engine_id for history in part] for part in cmapss.split_engines(fleet, (0.8, 0.1, 0.1), 0)
    ]
    assert names != [
        [history.engine_id for history in part] for part in cmapss.split_engines(fleet, (0.8, 0.1, 0.1), 1)
    ]


def test_cutoff_weights_equal_simulated_frequencies() -> None:
    """The weight of a row equals the frequency with which random cut-offs keep it."""
    history = History("a", np.arange(1, 101), np.zeros((100, 17), np.float32))
    cuts = np.arange(cmapss.MIN_CUTOFF, 101)
    expected = [(cuts >= cycle).mean() for cycle in history.cycle]
    np.testing.assert_allclose(expected, cmapss.cutoff_weights(history))
    np.testing.assert_allclose([1.0], cmapss.cutoff_weights(History("b", np.array([1]), np.zeros((1, 17), np.float32))))
