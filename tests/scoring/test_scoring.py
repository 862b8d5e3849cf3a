import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model import contract, numerics
from model.contract import CHANNELS, Manifest
from model.data import cmapss
from model.evaluation import evaluate
from model.evaluation.evaluate import (
    ARTEFACT,
    COLUMNS,
    RowsBySubset,
    format_cells,
    onnx_runner,
    open_artefact,
    predict_test_engines,
)
from model.evaluation.evaluation_metrics import EvaluatedRows, class_metrics, concatenate_rows, rul_metrics
from model.windows import Readings, every_window
from tests.support.processes import Service
from tests.support.scoring import FORMS, flights, probabilities, read, score, write

pytestmark = pytest.mark.slow  # whole scoring jobs in this process

RUL_UNITS = 100  # cycles to logits


@pytest.fixture(scope="module")
def official_output(cmapss_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Score the four official test files."""
    output = tmp_path_factory.mktemp("nasa") / "out.parquet"
    assert 0 == score([str(cmapss_dir / "test_FD00*.txt*")], output)
    return read(output)


def test_official_files_give_one_row_per_cycle(official_output: pa.Table, cmapss_dir: Path) -> None:
    """The official files give 104,897 rows in their order, with the engine ids of this project."""
    histories = [history for subset in cmapss.SUBSETS for history in cmapss.read_test(cmapss_dir, subset)]
    assert 104_897 == official_output.num_rows
    assert [h.engine_id for h in histories for _ in h.cycle] == official_output["engine_id"].to_pylist()
    assert np.array_equal(np.concatenate([h.cycle for h in histories]), official_output["cycle"].to_numpy())


@pytest.fixture(scope="module")
def evaluated_rows(cmapss_dir: Path, manifest: Manifest) -> RowsBySubset:
    """Return the rows of `make evaluate`, which take ONNX Runtime some seconds."""
    return predict_test_engines(onnx_runner(open_artefact(ARTEFACT)[0]), manifest.window or 1, cmapss_dir)


def test_results_table_follows_from_the_output(
    official_output: pa.Table,
    evaluated_rows: RowsBySubset,
    cmapss_dir: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures of `make evaluate` for all cycles follow from the written output, to all their digits."""
    monkeypatch.setattr(evaluate, "predict_test_engines", lambda *_: evaluated_rows)  # it has run already
    printed = list(evaluate.results_table(cmapss_dir, *open_artefact(ARTEFACT)))
    logits = np.log(probabilities(official_output, manifest)) * manifest.temperature
    begin = 0
    for subset in cmapss.SUBSETS:
        true_rul = np.concatenate([h.require_rul() for h in cmapss.read_test(cmapss_dir, subset)])
        part = slice(begin, begin := begin + len(true_rul))
        rul = official_output["rul"].to_numpy()[part].astype(np.float64)
        result = EvaluatedRows(logits[part], cmapss.health_classes(true_rul), rul, true_rul)
        figures = format_cells(class_metrics(result, manifest.temperature) | rul_metrics(result), COLUMNS)
        line = f"| every cycle | {subset} | {manifest.temperature:.3f} | {figures} |"
        assert line in printed


def test_predictions_equal_those_of_the_evaluation(
    official_output: pa.Table, evaluated_rows: RowsBySubset, manifest: Manifest
) -> None:
    """Probabilities and RUL of all rows differ from ONNX Runtime on whole histories by at most the tolerance."""
    result = concatenate_rows(evaluated_rows["all"], False)
    expected = numerics.log_softmax(result.logits, manifest.temperature)
    assert (
        abs(expected - np.log(probabilities(official_output, manifest))).max()
        <= 2 * manifest.tolerance / manifest.temperature
    )
    assert abs(result.rul - official_output["rul"].to_numpy()).max() <= RUL_UNITS * manifest.tolerance


def test_random_rows_equal_the_service(
    official_output: pa.Table, cmapss_dir: Path, service: Service, manifest: Manifest
) -> None:
    """Health, set, RUL and probabilities of 500 rows equal those of the service.

    They are equal as float32 if predictions of the model do not depend on the batch, else within its tolerance.
    """
    histories = {h.engine_id: h for subset in cmapss.SUBSETS for h in cmapss.read_test(cmapss_dir, subset)}
    rows = official_output.take(
        np.sort(np.random.default_rng(6).choice(official_output.num_rows, 500, replace=False))
    ).to_pylist()
    readings_sent = [histories[row["engine_id"]].telemetry[: row["cycle"]][-100:].tolist() for row in rows]
    answers = [
        p
        for i in range(0, 500, 100)
        for p in service.predict([{"telemetry": t} for t in readings_sent[i : i + 100]])["predictions"]
    ]
    exact = service.client.get("/v1/model").json()["batch_max_difference"] == 0
    tolerance = 0.0 if exact else manifest.tolerance
    for row, served in zip(rows, answers, strict=True):
        assert (served["health"], served["prediction_set"]) == (row["health"], row["prediction_set"])
        assert is_near(served["rul"], row["rul"], RUL_UNITS * tolerance)
        assert is_near(served["expected_loss"], row["expected_loss"], 10 * tolerance)
        for name in manifest.classes:
            assert is_near(served["probabilities"][name], row[f"p_{name}"], 2 * tolerance)


def is_near(served: float, written: float, tolerance: float) -> bool:
    """Return whether two values are equal as float32, or differ by at most a tolerance."""
    return bool(abs(float(np.float32(served)) - float(np.float32(written))) <= tolerance)


def test_report_of_official_file_equals_results_table(
    evaluated_rows: RowsBySubset, cmapss_dir: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """`--rul --report` on an official file has the figures of its line of `make evaluate`."""
    histories = cmapss.read_test(cmapss_dir, "FD003")
    columns: dict[str, Any] = {"engine_id": [h.engine_id for h in histories for _ in h.cycle]}
    columns["cycle"] = np.concatenate([h.cycle for h in histories])
    readings = np.concatenate([h.telemetry for h in histories])
    columns |= {name: readings[:, k] for k, name in enumerate(CHANNELS)}
    columns["left"] = np.concatenate([h.require_rul() for h in histories])
    path, report = write(pa.table(columns), tmp_path / "a.parquet"), tmp_path / "r.json"
    assert 0 == score(path, tmp_path / "out.parquet", rul="left", report=report)
    result, expected = (
        json.loads(report.read_text()),
        class_metrics(concatenate_rows(evaluated_rows["FD003"], False), manifest.temperature),
    )
    assert (16_596, 100) == (result["n"], result["engines"])
    assert expected["accuracy"] == result["accuracy"]
    for name, figure in (
        ("cross-entropy", result["cross_entropy"]["realised"]),
        ("Brier", result["brier"]),
        ("ECE", result["ece"]["value"]),
    ):
        assert expected[name] == pytest.approx(figure, abs=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_input_formats_give_the_same_bits(name: str, windows: Readings, tmp_path: Path) -> None:
    """CSV, TSV and JSON lines, compressed or not, give the same bits as Parquet."""
    table = flights(windows)
    assert 0 == score(write(table, tmp_path / "first.parquet"), tmp_path / "expected.parquet")
    assert 0 == score(write(table, tmp_path / name), tmp_path / "out.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_format_is_detected_without_a_suffix(windows: Readings, tmp_path: Path) -> None:
    """Parquet, CSV, TSV and JSON lines are detected by content under a name without a suffix."""
    table = flights(windows)
    score(write(table, tmp_path / "first.parquet"), tmp_path / "expected.parquet")
    for name in FORMS:
        write(table, tmp_path / name).rename(tmp_path / "data")
        assert 0 == score(tmp_path / "data", tmp_path / "out.parquet", restart=True)
        assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_files_of_several_inputs_are_one_history(windows: Readings, tmp_path: Path) -> None:
    """Rows of an engine in several files of a folder, a glob or several arguments are one history."""
    table = flights(windows)
    score(write(table, tmp_path / "whole.parquet"), tmp_path / "expected.parquet")
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in range(0, table.num_rows, 37):  # part-2 comes before part-10
        write(table.slice(k, 37), folder / f"part-{k // 37}.parquet")
    for inputs in ([folder], [str(folder / "*.parquet")], [folder / f"part-{k}.parquet" for k in range(11)]):
        assert 0 == score(inputs, tmp_path / "out.parquet", restart=True)
        assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_hive_folders_are_columns(windows: Readings, tmp_path: Path) -> None:
    """Folders such as `engine_id=a` give the values of a column."""
    table = flights(windows)
    score(write(table, tmp_path / "whole.parquet"), tmp_path / "expected.parquet")
    for name in ("a", "b", "c", "d"):
        (tmp_path / "set" / f"engine_id={name}").mkdir(parents=True)
        mine = table.filter(pa.compute.equal(table["engine_id"], name)).drop_columns("engine_id")
        write(mine, tmp_path / "set" / f"engine_id={name}" / "part-0.parquet")
    assert 0 == score(tmp_path / "set", tmp_path / "out.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_shuffled_rows_keep_their_order(windows: Readings, tmp_path: Path) -> None:
    """Rows in any order within the horizon have the predictions of the ordered file, in their own order."""
    table = flights(windows)
    order = np.random.default_rng(0).permutation(table.num_rows)
    score(write(table, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    assert 0 == score(write(table.take(order), tmp_path / "b.parquet"), tmp_path / "out.parquet")
    expected, result = read(tmp_path / "expected.parquet").take(order), read(tmp_path / "out.parquet")
    assert expected["cycle"].equals(result["cycle"])
    assert expected["health"].equals(result["health"])
    assert np.allclose(expected["p_normal"], result["p_normal"], rtol=0, atol=1e-5)  # the batches have other rows


def test_output_keeps_the_column_names_of_the_input(windows: Readings, tmp_path: Path) -> None:
    """Engine and cycle keep their names, integer ids their type, and channels are mapped."""
    table = flights(windows)
    score(write(table, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    renamed = table.rename_columns(
        [{"engine_id": "unit", "cycle": "t", "sensor_2": "T24"}.get(n, n) for n in table.column_names]
    )
    numbered = renamed.set_column(
        0, "unit", pa.array([ord(item) for item in table["engine_id"].to_pylist()], pa.int32())
    )
    flags = {"engine_column": "unit", "cycle_column": "t", "columns": {"sensor_2": "T24"}}
    assert 0 == score(write(numbered, tmp_path / "b.parquet"), tmp_path / "out.parquet", **flags)
    result = read(tmp_path / "out.parquet")
    assert ["unit", "t", "health"] == result.column_names[:3]
    assert (pa.int64(), 97) == (result["unit"].type, result["unit"][0].as_py())
    assert read(tmp_path / "expected.parquet")["p_normal"].equals(result["p_normal"])


def test_latest_writes_the_newest_row_per_engine(windows: Readings, tmp_path: Path) -> None:
    """`--latest` writes the prediction of the newest cycle of each engine, by first appearance."""
    table = flights(windows)
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    score(write(table, tmp_path / "a.parquet"), tmp_path / "every.parquet")
    assert 0 == score(write(shuffled, tmp_path / "b.parquet"), tmp_path / "out.parquet", latest=True)
    every = {(r["engine_id"], r["cycle"]): r for r in read(tmp_path / "every.parquet").to_pylist()}
    result = read(tmp_path / "out.parquet").to_pylist()
    assert list(dict.fromkeys(shuffled["engine_id"].to_pylist())) == [row["engine_id"] for row in result]
    for row in result:
        assert 100 == row["cycle"]
        assert every[row["engine_id"], 100]["p_critical"] == pytest.approx(row["p_critical"], abs=1e-5)


def test_names_indices_and_rul_give_the_same_losses(windows: Readings, tmp_path: Path, manifest: Manifest) -> None:
    """The loss is -ln of the probability of the true class, from names, indices or RUL. It is null without a label."""
    table, losses = flights(windows), []
    rul = np.random.default_rng(2).uniform(0, 200, table.num_rows)
    index = cmapss.health_classes(rul)
    names = [None if k % 7 == 0 else manifest.classes[i] for k, i in enumerate(index)]
    for flag, column in (("labels", pa.array(names)), ("labels", pa.array(index)), ("rul", pa.array(rul))):
        path = write(table.append_column("truth", column), tmp_path / "a.parquet")
        assert 0 == score(path, tmp_path / "out.parquet", **{flag: "truth"})
        losses.append(read(tmp_path / "out.parquet")["loss"].to_pylist())
    p = probabilities(read(tmp_path / "out.parquet"), manifest)[np.arange(len(index)), index]
    assert np.allclose(-np.log(p), losses[2], rtol=1e-9)
    assert losses[1] == losses[2]
    assert [None if k % 7 == 0 else item for k, item in enumerate(losses[1])] == losses[0]


def test_csv_output_equals_parquet_output(windows: Readings, tmp_path: Path) -> None:
    """CSV has the rows of Parquet, prediction sets as names separated by bars, and a metadata file with the model."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet")
    score(path, tmp_path / "out.csv")
    expected, result = read(tmp_path / "out.parquet"), read(tmp_path / "out.csv")
    assert ["|".join(item) for item in expected["prediction_set"].to_pylist()] == result["prediction_set"].to_pylist()
    for name in ("engine_id", "cycle", "health", "p_normal", "expected_loss"):
        assert expected[name].to_pylist() == result[name].to_pylist()
    assert contract.digest(ARTEFACT.read_bytes()) in (tmp_path / "out.csv-metadata.json").read_text()


def test_output_metadata_names_model_and_command(windows: Readings, tmp_path: Path) -> None:
    """The metadata of a file, and of each part of a folder, has model digest, temperature and command."""
    path = write(flights(windows), tmp_path / "a.parquet")
    for output in (tmp_path / "out.parquet", tmp_path / "folder"):
        assert 0 == score(path, output, temperature=2.0, missing="hold")
        part = output if output.suffix else output / "part-00000.parquet"
        about = read(part).schema.metadata
        assert contract.digest(ARTEFACT.read_bytes()).encode() == about[b"model_digest"]
        assert b"2.0" == about[b"temperature"]
        command = f"engine-health score {path} OUTPUT{output.suffix} --missing hold --temperature 2.0"
        assert command.encode() == about[b"command"]


def test_temperature_divides_the_same_logits(windows: Readings, tmp_path: Path, manifest: Manifest) -> None:
    """Probabilities at another temperature are the softmax of the same logits. Prediction sets do not change."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "own.parquet")
    score(path, tmp_path / "out.parquet", temperature=3.0)
    own, result = read(tmp_path / "own.parquet"), read(tmp_path / "out.parquet")
    expected = numerics.softmax(np.log(probabilities(own, manifest)) * manifest.temperature, 3.0)
    assert np.allclose(expected, probabilities(result, manifest), rtol=0, atol=1e-12)
    assert own["prediction_set"].equals(result["prediction_set"])


def test_windows_equal_those_of_training(windows: Readings, tmp_path: Path, manifest: Manifest) -> None:
    """The prediction of each row is that of the network for the window of training, padded on the left."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet")
    run = onnx_runner(open_artefact(ARTEFACT)[0])
    logits = np.concatenate([run(np.ascontiguousarray(every_window(item, 100)))[0] for item in windows])
    expected = numerics.log_softmax(logits, manifest.temperature)
    result = np.log(probabilities(read(tmp_path / "out.parquet"), manifest))
    assert abs(expected - result).max() <= 2 * manifest.tolerance / manifest.temperature
