import gzip
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.contract import CHANNELS
from model.data import cmapss, telemetry
from model.data.cmapss import History
from model.data.simulator import fleet as simulate
from service import cli
from tests.support.files import as_csv, as_text
from tests.support.processes import Service, start

HEAD = "engine_id,cycle," + ",".join(CHANNELS)
ROW = "a,1," + ",".join(["1"] * len(CHANNELS))


@pytest.fixture(scope="module")
def fleet() -> list[History]:
    """Simulated engines of several ages. Some have fewer cycles than a window."""
    result = []
    for number, age in enumerate((1, 30, 99, 100, 101, 160, 170)):
        rows = simulate.SimulatedEngine(number).fly(age)
        result.append(History(f"e{number}", np.arange(1, age + 1), rows))
    return result


def predict_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """Run `predict --json`. Return the printed objects."""
    assert 0 == cli.main(["predict", *arguments, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_equals_the_service(
    service: Service, fleet: list[History], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All numbers of all engines have the bits of `/v1/predict`, at two temperatures."""
    path = tmp_path / "fleet.csv"
    path.write_text(as_csv(fleet))
    instances = [
        {"telemetry": e.telemetry.tolist(), "engine_id": e.engine_id, "cycle": int(e.cycle[-1])} for e in fleet
    ]
    for flags, rest in (((), {}), (("--temperature", "2"), {"temperature": 2})):
        expected = service.predict(instances, **rest)["predictions"]
        result = predict_json(capsys, str(path), *flags)
        assert [row | {"prediction_id": None} for row in expected] == result


def test_missing_hold_equals_the_service(
    service: Service, fleet: list[History], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--missing hold` gives the predictions of the service for null. Without an earlier value the file is rejected."""
    rows = fleet[4].telemetry.copy()
    rows[50:60, 5] = np.nan
    holed = [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]
    expected = service.predict([{"telemetry": holed}], missing="hold")["predictions"][0]
    path = tmp_path / "holed.csv"
    path.write_text(as_csv([History("e", fleet[4].cycle, rows)]))
    result = predict_json(capsys, str(path), "--missing", "hold")[0]
    assert (expected["logits"], expected["rul"]) == (result["logits"], result["rul"])
    assert 1 == cli.main(["predict", str(path)])
    assert f"engine-health: {path}, line 52: sensor_4: missing\n" == capsys.readouterr().err
    rows[:60, 5] = np.nan
    path.write_text(as_csv([History("e", fleet[4].cycle[:60], rows[:60])]))
    assert 1 == cli.main(["predict", str(path), "--missing", "hold"])
    assert "engine 'e', cycle 1: sensor_4: missing, and no earlier value" in capsys.readouterr().err


def test_all_formats_give_the_same_predictions(
    fleet: list[History], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CSV, TSV, C-MAPSS text, gzip and standard input give equal predictions, whatever the order of the rows."""
    csv = as_csv(fleet)
    head, *lines = csv.splitlines()
    shuffled = [head, *(line for start in range(7) for line in lines[start::7])]
    forms = {
        "a.csv": csv.encode(),
        "b.tsv": as_csv(fleet, "\t").encode(),
        "c.csv.gz": gzip.compress(csv.encode()),
        "d.txt": as_text(fleet).encode(),
        "e.csv": ("\ufeff" + "\r\n".join(shuffled)).encode(),
    }
    result = []
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        result.append(sorted(row["logits"] for row in predict_json(capsys, str(tmp_path / name))))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(csv.encode())))
    result.append(sorted(row["logits"] for row in predict_json(capsys, "-")))
    assert [result[0]] * len(result) == result


def test_table_of_channels_only_is_one_engine(
    fleet: list[History], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table with only channels is one engine. It has the name of the file, and its cycles start at 1."""
    path = tmp_path / "left-engine.csv"
    path.write_text(as_csv(fleet[5:6], named=False))
    result = predict_json(capsys, str(path))
    assert [("left-engine", 160)] == [(row["engine_id"], row["cycle"]) for row in result]


def test_table_lists_the_worst_engine_first(
    fleet: list[History], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has one line per engine, the most critical first, then the model and the temperature."""
    path = tmp_path / "fleet.csv"
    path.write_text(as_csv(fleet))
    assert 0 == cli.main(["predict", str(path)])
    head, *lines, empty, model = capsys.readouterr().out.splitlines()
    columns = ["engine", "cycle", "health", "P(normal)", "P(degrading)", "P(critical)", "RUL", "prediction", "set"]
    assert columns == head.split()
    critical = [float(line.split()[5]) for line in lines]
    assert sorted(critical, reverse=True) == critical
    assert len(fleet) == len(lines)
    assert "" == empty
    assert model.startswith("engine-health ")


def test_table_aligns_wide_and_combining_letters(
    fleet: list[History], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Japanese letter counts as two terminal cells and an accent as none, so that columns are aligned."""
    path = tmp_path / "fleet.csv"
    names = ("日本エンジン", "e\u0301ngine", "plain")
    path.write_text(as_csv([History(n, e.cycle, e.telemetry) for n, e in zip(names, fleet[:3], strict=True)]))
    assert 0 == cli.main(["predict", str(path)])
    head, *lines = capsys.readouterr().out.splitlines()[:4]
    result = {line.split()[0]: line.index("normal" if "normal" in line else "d") for line in lines}
    assert head.index("health") - 6 == result["日本エンジン"]
    assert head.index("health") + 1 == result["e\u0301ngine"]
    assert head.index("health") == result["plain"]


def test_closed_pipe_is_no_failure(tmp_path: Path, fleet: list[History]) -> None:
    """Output piped into a program that closes the pipe, such as `head`, ends without a traceback."""
    path = tmp_path / "fleet.csv"
    path.write_text(as_csv(fleet))
    command = start("predict", str(path))
    assert command.stdout is not None
    command.stdout.close()
    assert command.stderr is not None
    assert ("", 0) == (command.stderr.read(), command.wait())
    command.stderr.close()


def test_official_files_equal_those_of_training(cmapss_dir: Path) -> None:
    """C-MAPSS files give the histories, ids and RUL of `model.data.cmapss`, compressed or not."""
    for name, read in (("train_FD001.txt", cmapss.read_train), ("test_FD003.txt", cmapss.read_test)):
        path = next(cmapss_dir.glob(f"{name}*"))
        result, expected = telemetry.read_histories(str(path), CHANNELS), read(cmapss_dir, name[-9:-4])
        assert [engine.engine_id for engine in expected] == [engine.engine_id for engine in result]
        for item, other in zip(expected, result, strict=True):
            np.testing.assert_array_equal(item.telemetry, other.telemetry)
            np.testing.assert_array_equal(item.cycle, other.cycle)
            np.testing.assert_array_equal(item.require_rul(), other.require_rul())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty"),
        (b"\n\n", ": is empty"),
        (b"\xff\xfe\x00PAR1", ": is not UTF-8 text"),
        (b"\x1f\x8b\x08broken", ": "),
        (f"{HEAD}\n".encode(), ": no rows"),
        (b"engine_id,cycle,sensor_2\na,1,2\n", ": no column 'op_setting_1' (and 15 more)"),
        (f"{HEAD},sensor_2\n".encode(), ": more than one column 'sensor_2'"),
        (f"{HEAD}\n{ROW}\n{ROW},9\n".encode(), ", line 3: expected 19 fields, got 20"),
        (f"{HEAD}\n{ROW}\n{ROW[:-1]}x\n".encode(), ", line 3: sensor_21: expected a number, got 'x'"),
        (f"{HEAD}\n{ROW[:-1]}1e39\n".encode(), ", line 2: sensor_21: 1e39 is too large for a 32-bit float"),
        (f"{HEAD}\n{ROW[:-1]}inf\n".encode(), ", line 2: sensor_21: inf is too large"),
        (f"{HEAD}\n{ROW[:-1]}1_0\n".encode(), ", line 2: sensor_21: expected a number, got '1_0'"),
        (f"{HEAD}\n{ROW[:-1]}\n".encode(), ", line 2: sensor_21: missing"),
        (f"{HEAD}\n{ROW}\n\n{ROW}\n".encode(), ", line 4: engine 'a' has cycle 1 twice, see"),
        (f"{HEAD}\n{ROW.replace('a,1', ',1')}\n".encode(), ", line 2: engine_id: expected a name"),
        (f"{HEAD}\n{ROW.replace('a,1', 'a,1.5')}\n".encode(), ", line 2: cycle: expected a whole number"),
        (f"{HEAD}\n{ROW.replace('a,1', 'a,-1')}\n".encode(), ", line 2: cycle: expected a whole number"),
        (b"1 1 2 3\n", ", line 1: expected 26 numbers, got 4"),
        (b"x 1 " + b"1 " * 24, ": no column"),
        (b"1 1 " + b"1 " * 24 + b"\n1 2 " + b"1 " * 23 + b"y", ", line 2: sensor_21: expected a number, got 'y'"),
    ],
)
def test_invalid_file_is_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    """An invalid file fails with one line that names line and column, exit code 1, and no standard output."""
    path = tmp_path / "wrong.csv"
    path.write_bytes(content)
    assert 1 == cli.main(["predict", str(path)])
    output = capsys.readouterr()
    assert ("", 1) == (output.out, len(output.err.splitlines()))
    assert output.err.startswith(f"engine-health: {path}{message}")


def test_absent_file_or_folder_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An absent file or a folder gives one line and exit code 1."""
    for path, message in ((tmp_path / "none.csv", "No such file"), (tmp_path, "Is a directory")):
        assert 1 == cli.main(["predict", str(path)])
        assert message in capsys.readouterr().err
