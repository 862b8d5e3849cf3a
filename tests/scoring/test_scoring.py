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
def nasa(cmapss_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The four official test files, scored."""
    output = tmp_path_factory.mktemp("nasa") / "out.parquet"
    assert 0 == score([str(cmapss_dir / "test_FD00*.txt*")], output)
    return read(output)


def test_the_official_test_files_give_a_row_for_each_of_theirs(nasa: pa.Table, cmapss_dir: Path) -> None:
    """104,897 rows in the order of the files, engines called as in the rest of this project."""
    histories = [history for subset in cmapss.SUBSETS for history in cmapss.read_test(cmapss_dir, subset)]
    assert 104_897 == nasa.num_rows
    assert [h.engine_id for h in histories for _ in h.cycle] == nasa["engine_id"].to_pylist()
    assert np.array_equal(np.concatenate([h.cycle for h in histories]), nasa["cycle"].to_numpy())


@pytest.fixture(scope="module")
def evaluated(cmapss_dir: Path, manifest: Manifest) -> RowsBySubset:
    """What `make evaluate` tabulates; it takes ONNX Runtime some seconds."""
    return predict_test_engines(onnx_runner(open_artefact(ARTEFACT)[0]), manifest.window or 1, cmapss_dir)


def test_the_results_table_follows_from_the_output(
    nasa: pa.Table, evaluated: RowsBySubset, cmapss_dir: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure of `make evaluate` on every cycle follows, to all its digits, from the written answers."""
    monkeypatch.setattr(evaluate, "predict_test_engines", lambda *_: evaluated)  # which has run already
    printed = list(evaluate.results_table(cmapss_dir, *open_artefact(ARTEFACT)))
    logits = np.log(probabilities(nasa, manifest)) * manifest.temperature
    begin = 0
    for subset in cmapss.SUBSETS:
        true_rul = np.concatenate([h.require_rul() for h in cmapss.read_test(cmapss_dir, subset)])
        part = slice(begin, begin := begin + len(true_rul))
        rul = nasa["rul"].to_numpy()[part].astype(np.float64)
        found = EvaluatedRows(logits[part], cmapss.health_classes(true_rul), rul, true_rul)
        figures = format_cells(class_metrics(found, manifest.temperature) | rul_metrics(found), COLUMNS)
        line = f"| every cycle | {subset} | {manifest.temperature:.3f} | {figures} |"
        assert line in printed


def test_every_answer_is_that_of_the_evaluation(nasa: pa.Table, evaluated: RowsBySubset, manifest: Manifest) -> None:
    """Probabilities and RUL of all rows differ from ONNX Runtime on whole histories by the stated tolerance at most."""
    found = concatenate_rows(evaluated["all"], False)
    expected = numerics.log_softmax(found.logits, manifest.temperature)
    assert abs(expected - np.log(probabilities(nasa, manifest))).max() <= 2 * manifest.tolerance / manifest.temperature
    assert abs(found.rul - nasa["rul"].to_numpy()).max() <= RUL_UNITS * manifest.tolerance


def test_random_rows_are_answered_as_the_service_does(
    nasa: pa.Table, cmapss_dir: Path, service: Service, manifest: Manifest
) -> None:
    """Five hundred rows sent to the service as windows have the same health, set, RUL and probabilities.

    The same to the bit, in the 32 bits of its answers, wherever the model saw no difference between windows in company
    and alone; elsewhere within its tolerance.
    """
    histories = {h.engine_id: h for subset in cmapss.SUBSETS for h in cmapss.read_test(cmapss_dir, subset)}
    rows = nasa.take(np.sort(np.random.default_rng(6).choice(nasa.num_rows, 500, replace=False))).to_pylist()
    seen = [histories[row["engine_id"]].telemetry[: row["cycle"]][-100:].tolist() for row in rows]
    answers = [
        p
        for i in range(0, 500, 100)
        for p in service.predict([{"telemetry": t} for t in seen[i : i + 100]])["predictions"]
    ]
    exact = service.client.get("/v1/model").json()["batch_max_difference"] == 0
    tolerance = 0.0 if exact else manifest.tolerance
    for row, told in zip(rows, answers, strict=True):
        assert (told["health"], told["prediction_set"]) == (row["health"], row["prediction_set"])
        assert near(told["rul"], row["rul"], RUL_UNITS * tolerance)
        assert near(told["expected_loss"], row["expected_loss"], 10 * tolerance)
        for name in manifest.classes:
            assert near(told["probabilities"][name], row[f"p_{name}"], 2 * tolerance)


def near(told: float, written: float, tolerance: float) -> bool:
    """Whether two answers are the same 32 bits, or no further apart than a tolerance."""
    return bool(abs(float(np.float32(told)) - float(np.float32(written))) <= tolerance)


def test_the_report_of_a_test_file_is_its_line_of_the_results_table(
    evaluated: RowsBySubset, cmapss_dir: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """`--rul --report` on an official file says what its line of `make evaluate` says."""
    histories = cmapss.read_test(cmapss_dir, "FD003")
    columns: dict[str, Any] = {"engine_id": [h.engine_id for h in histories for _ in h.cycle]}
    columns["cycle"] = np.concatenate([h.cycle for h in histories])
    readings = np.concatenate([h.telemetry for h in histories])
    columns |= {name: readings[:, k] for k, name in enumerate(CHANNELS)}
    columns["left"] = np.concatenate([h.require_rul() for h in histories])
    path, report = write(pa.table(columns), tmp_path / "a.parquet"), tmp_path / "r.json"
    assert 0 == score(path, tmp_path / "out.parquet", rul="left", report=report)
    found, expected = (
        json.loads(report.read_text()),
        class_metrics(concatenate_rows(evaluated["FD003"], False), manifest.temperature),
    )
    assert (16_596, 100) == (found["n"], found["engines"])
    assert expected["accuracy"] == found["accuracy"]
    for name, figure in (
        ("cross-entropy", found["cross_entropy"]["realised"]),
        ("Brier", found["brier"]),
        ("ECE", found["ece"]["value"]),
    ):
        assert expected[name] == pytest.approx(figure, abs=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_input_gives_the_same_answers(name: str, windows: Readings, tmp_path: Path) -> None:
    """CSV, TSV, JSON lines, packed or not, are scored to the very bits of Parquet."""
    some = flights(windows)
    assert 0 == score(write(some, tmp_path / "first.parquet"), tmp_path / "expected.parquet")
    assert 0 == score(write(some, tmp_path / name), tmp_path / "out.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_a_file_of_no_telling_name_is_known_by_its_bytes(windows: Readings, tmp_path: Path) -> None:
    """Parquet, CSV, TSV and JSON lines under a name that says nothing are read for what they are."""
    some = flights(windows)
    score(write(some, tmp_path / "first.parquet"), tmp_path / "expected.parquet")
    for name in FORMS:
        write(some, tmp_path / name).rename(tmp_path / "data")
        assert 0 == score(tmp_path / "data", tmp_path / "out.parquet", restart=True)
        assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_files_row_groups_and_folders_are_one_history(windows: Readings, tmp_path: Path) -> None:
    """Rows of an engine spread over the files of a folder, of a glob and of several arguments are one history."""
    some = flights(windows)
    score(write(some, tmp_path / "whole.parquet"), tmp_path / "expected.parquet")
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in range(0, some.num_rows, 37):  # part-2 comes before part-10
        write(some.slice(k, 37), folder / f"part-{k // 37}.parquet")
    for inputs in ([folder], [str(folder / "*.parquet")], [folder / f"part-{k}.parquet" for k in range(11)]):
        assert 0 == score(inputs, tmp_path / "out.parquet", restart=True)
        assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_a_partitioned_data_set_has_columns_in_its_folders(windows: Readings, tmp_path: Path) -> None:
    """With `engine_id=a/...` the engines are those that the folders name."""
    some = flights(windows)
    score(write(some, tmp_path / "whole.parquet"), tmp_path / "expected.parquet")
    for name in ("a", "b", "c", "d"):
        (tmp_path / "set" / f"engine_id={name}").mkdir(parents=True)
        mine = some.filter(pa.compute.equal(some["engine_id"], name)).drop_columns("engine_id")
        write(mine, tmp_path / "set" / f"engine_id={name}" / "part-0.parquet")
    assert 0 == score(tmp_path / "set", tmp_path / "out.parquet")
    assert read(tmp_path / "expected.parquet").equals(read(tmp_path / "out.parquet"))


def test_shuffled_rows_are_put_in_order_and_answered_in_theirs(windows: Readings, tmp_path: Path) -> None:
    """Rows in any order within the horizon have the answers of the ordered file, each at its own row's place."""
    some = flights(windows)
    order = np.random.default_rng(0).permutation(some.num_rows)
    score(write(some, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    assert 0 == score(write(some.take(order), tmp_path / "b.parquet"), tmp_path / "out.parquet")
    expected, found = read(tmp_path / "expected.parquet").take(order), read(tmp_path / "out.parquet")
    assert expected["cycle"].equals(found["cycle"])
    assert expected["health"].equals(found["health"])
    assert np.allclose(expected["p_normal"], found["p_normal"], rtol=0, atol=1e-5)  # other company in the batches


def test_other_names_of_columns_stay_in_the_output(windows: Readings, tmp_path: Path) -> None:
    """Engine and cycle keep their names, ids their being whole numbers, and channels are mapped."""
    some = flights(windows)
    score(write(some, tmp_path / "a.parquet"), tmp_path / "expected.parquet")
    renamed = some.rename_columns(
        [{"engine_id": "unit", "cycle": "t", "sensor_2": "T24"}.get(n, n) for n in some.column_names]
    )
    numbered = renamed.set_column(0, "unit", pa.array([ord(one) for one in some["engine_id"].to_pylist()], pa.int32()))
    flags = {"engine_column": "unit", "cycle_column": "t", "columns": {"sensor_2": "T24"}}
    assert 0 == score(write(numbered, tmp_path / "b.parquet"), tmp_path / "out.parquet", **flags)
    found = read(tmp_path / "out.parquet")
    assert ["unit", "t", "health"] == found.column_names[:3]
    assert (pa.int64(), 97) == (found["unit"].type, found["unit"][0].as_py())
    assert read(tmp_path / "expected.parquet")["p_normal"].equals(found["p_normal"])


def test_latest_is_the_last_row_of_each_engine(windows: Readings, tmp_path: Path) -> None:
    """`--latest` writes one row an engine, by first appearance: the answer of its newest cycle."""
    some = flights(windows)
    shuffled = some.take(np.random.default_rng(1).permutation(some.num_rows))
    score(write(some, tmp_path / "a.parquet"), tmp_path / "every.parquet")
    assert 0 == score(write(shuffled, tmp_path / "b.parquet"), tmp_path / "out.parquet", latest=True)
    every = {(r["engine_id"], r["cycle"]): r for r in read(tmp_path / "every.parquet").to_pylist()}
    found = read(tmp_path / "out.parquet").to_pylist()
    assert list(dict.fromkeys(shuffled["engine_id"].to_pylist())) == [row["engine_id"] for row in found]
    for row in found:
        assert 100 == row["cycle"]
        assert every[row["engine_id"], 100]["p_critical"] == pytest.approx(row["p_critical"], abs=1e-5)


def test_labels_and_rul_give_the_same_losses(windows: Readings, tmp_path: Path, manifest: Manifest) -> None:
    """The loss is -ln of the true class's probability, from names, indices or true RUL; null where none is known."""
    some, losses = flights(windows), []
    rul = np.random.default_rng(2).uniform(0, 200, some.num_rows)
    index = cmapss.health_classes(rul)
    names = [None if k % 7 == 0 else manifest.classes[i] for k, i in enumerate(index)]
    for flag, column in (("labels", pa.array(names)), ("labels", pa.array(index)), ("rul", pa.array(rul))):
        path = write(some.append_column("truth", column), tmp_path / "a.parquet")
        assert 0 == score(path, tmp_path / "out.parquet", **{flag: "truth"})
        losses.append(read(tmp_path / "out.parquet")["loss"].to_pylist())
    p = probabilities(read(tmp_path / "out.parquet"), manifest)[np.arange(len(index)), index]
    assert np.allclose(-np.log(p), losses[2], rtol=1e-9)
    assert losses[1] == losses[2]
    assert [None if k % 7 == 0 else one for k, one in enumerate(losses[1])] == losses[0]


def test_csv_holds_what_parquet_holds(windows: Readings, tmp_path: Path) -> None:
    """The same rows as CSV, sets as names with a bar between, and a file beside it that says which model answered."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet")
    score(path, tmp_path / "out.csv")
    expected, found = read(tmp_path / "out.parquet"), read(tmp_path / "out.csv")
    assert ["|".join(one) for one in expected["prediction_set"].to_pylist()] == found["prediction_set"].to_pylist()
    for name in ("engine_id", "cycle", "health", "p_normal", "expected_loss"):
        assert expected[name].to_pylist() == found[name].to_pylist()
    assert contract.digest(ARTEFACT.read_bytes()) in (tmp_path / "out.csv-metadata.json").read_text()


def test_the_file_says_where_it_comes_from(windows: Readings, tmp_path: Path) -> None:
    """Digest of the model, temperature and command stand in the metadata of a file, and of every part of a folder."""
    path = write(flights(windows), tmp_path / "a.parquet")
    for output in (tmp_path / "out.parquet", tmp_path / "folder"):
        assert 0 == score(path, output, temperature=2.0, missing="hold")
        part = output if output.suffix else output / "part-00000.parquet"
        about = read(part).schema.metadata
        assert contract.digest(ARTEFACT.read_bytes()).encode() == about[b"model_digest"]
        assert b"2.0" == about[b"temperature"]
        command = f"engine-health score {path} OUTPUT{output.suffix} --missing hold --temperature 2.0"
        assert command.encode() == about[b"command"]


def test_a_temperature_is_that_of_the_arithmetic(windows: Readings, tmp_path: Path, manifest: Manifest) -> None:
    """Probabilities at another temperature are the softmax of the same logits; sets stay the artefact's own."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "own.parquet")
    score(path, tmp_path / "out.parquet", temperature=3.0)
    own, found = read(tmp_path / "own.parquet"), read(tmp_path / "out.parquet")
    expected = numerics.softmax(np.log(probabilities(own, manifest)) * manifest.temperature, 3.0)
    assert np.allclose(expected, probabilities(found, manifest), rtol=0, atol=1e-12)
    assert own["prediction_set"].equals(found["prediction_set"])


def test_the_windows_are_those_of_training(windows: Readings, tmp_path: Path, manifest: Manifest) -> None:
    """Each row's answer is the network's of the window that training would lay out, padded on the left."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet")
    run = onnx_runner(open_artefact(ARTEFACT)[0])
    logits = np.concatenate([run(np.ascontiguousarray(every_window(one, 100)))[0] for one in windows])
    expected = numerics.log_softmax(logits, manifest.temperature)
    found = np.log(probabilities(read(tmp_path / "out.parquet"), manifest))
    assert abs(expected - found).max() <= 2 * manifest.tolerance / manifest.temperature
