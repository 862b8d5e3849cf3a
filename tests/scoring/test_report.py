import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.contract import CHANNELS, Manifest
from model.windows import Readings
from tests.support.processes import running
from tests.support.scoring import flights, probabilities, read, score, write

pytestmark = pytest.mark.slow  # whole scoring jobs in this process

OF_TIME = (
    "window",
    "labels",
    "model",
    "temperature_source",
)  # fields that a file does not have, or has in another form


@pytest.fixture(scope="module")
def labelled_table(windows: Readings) -> pa.Table:
    """Return 24 engines of 40 cycles. Four rows in five have a class."""
    random = np.random.default_rng(4)
    readings = np.concatenate(
        [windows[:, k : k + 40] + random.normal(0, 0.01, (4, 40, 17)).astype(np.float32) for k in range(0, 60, 10)]
    )
    table = flights(readings)
    label = random.integers(0, 3, table.num_rows)
    return table.append_column(
        "truth", pa.array([None if k % 5 == 0 else int(item) for k, item in enumerate(label)], pa.int64())
    )


def assert_equal_reports(expected: Any, report: Any, place: str = "") -> None:
    """Assert that two reports have equal figures, up to a tolerance of 1e-5."""
    if isinstance(expected, dict):
        assert set(expected) <= set(report), place
        for key in expected:
            assert_equal_reports(expected[key], report[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(report), place
        for k, (item, other) in enumerate(zip(expected, report, strict=True)):
            assert_equal_reports(item, other, f"{place}[{k}]")
    elif isinstance(expected, float):
        assert expected == pytest.approx(report, rel=1e-5, abs=1e-5), place
    else:
        assert expected == report, place


def test_report_equals_the_calibration_endpoint(labelled_table: pa.Table, tmp_path: Path) -> None:
    """The report has all figures of `/v1/calibration` for the same rows and labels."""
    rows = labelled_table.to_pylist()
    path = write(labelled_table, tmp_path / "a.parquet")
    assert 0 == score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    names = {"engine_id", "cycle"}
    with running(ENGINE_HEALTH_MAX_INSTANCES="4096") as service:
        cycles = [{k: row[k] for k in names} | {"telemetry": [row[c] for c in CHANNELS]} for row in rows]
        labels = [{k: row[k] for k in names} | {"label": row["truth"]} for row in rows if row["truth"] is not None]
        for call, field, sent in (("/v1/cycles", "cycles", cycles), ("/v1/labels", "labels", labels)):
            answer = service.client.post(call, json={field: sent})
            assert 200 == answer.status_code, answer.text
        expected = service.client.get("/v1/calibration").json()
    assert expected["model"] == report["model"]
    assert expected["labels"]["share"] == report["labels"]["share"]
    assert 24 == report["engines"]
    assert_equal_reports({key: item for key, item in expected.items() if key not in OF_TIME}, report)


def test_confusion_and_risk_follow_from_the_rows(labelled_table: pa.Table, manifest: Manifest, tmp_path: Path) -> None:
    """The confusion matrix counts the written classes. The risk curve ends at the error of all rows."""
    path, output = write(labelled_table, tmp_path / "a.parquet"), tmp_path / "out.parquet"
    score(path, output, labels="truth", report=tmp_path / "r.json")
    report, table = json.loads((tmp_path / "r.json").read_text()), read(output)
    label = labelled_table["truth"].to_numpy(zero_copy_only=False)
    known = ~np.isnan(label)
    predicted = probabilities(table, manifest).argmax(axis=1)
    matrix = [[int(((label == i) & (predicted == j)).sum()) for j in range(3)] for i in range(3)]
    assert matrix == report["confusion"]
    curve = report["risk_coverage"]
    assert 1.0 == curve[-1]["coverage"]
    assert curve[-1]["risk"] == pytest.approx(1 - report["accuracy"])
    assert curve[0]["confidence"] == pytest.approx(probabilities(table, manifest)[known].max())
    loss = table["loss"].to_numpy(zero_copy_only=False)
    assert report["cross_entropy"]["realised"] == pytest.approx(np.nanmean(loss))


def test_html_report_loads_no_other_file(labelled_table: pa.Table, tmp_path: Path) -> None:
    """The HTML report contains its charts, script and figures, and loads nothing from a host."""
    path = write(labelled_table, tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.html")
    score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.json")
    page = (tmp_path / "r.html").read_text()
    within = re.search(r"<script type='application/json' id='report'>(.*?)</script>", page)
    assert within is not None
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(within[1])
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    for word in ("Reliability", "Confusion, rows", "Risk against coverage"):
        assert word in page


def test_report_without_labels_has_no_figures(labelled_table: pa.Table, tmp_path: Path) -> None:
    """A column of nulls gives a report without labelled rows and figures. The page is written too."""
    place = labelled_table.column_names.index("truth")
    nothing = labelled_table.set_column(place, "truth", pa.nulls(labelled_table.num_rows, pa.string()))
    path = write(nothing, tmp_path / "a.parquet")
    for name in ("r.json", "r.html"):
        assert 0 == score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / name)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (0, "insufficient_data", None) == (report["n"], report["state"], report["accuracy"])


def test_report_of_other_job_is_replaced(labelled_table: pa.Table, tmp_path: Path) -> None:
    """A finished job is scored again if the report with its name belongs to another job."""
    contents = []
    for part in (labelled_table, labelled_table.slice(100), labelled_table):
        path = write(part, tmp_path / f"{part.num_rows}.parquet")
        report = tmp_path / "r.json"
        assert 0 == score(path, tmp_path / f"out-{part.num_rows}.parquet", labels="truth", report=report)
        contents.append(report.read_bytes())
    assert contents[0] == contents[2]
    assert contents[0] != contents[1]


def test_report_of_latest_has_one_row_per_engine(labelled_table: pa.Table, tmp_path: Path) -> None:
    """With `--latest` the report covers the rows that are written."""
    path = write(labelled_table, tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.json", latest=True)
    report, table = json.loads((tmp_path / "r.json").read_text()), read(tmp_path / "out.parquet")
    losses = table["loss"].drop_null()
    assert len(losses) == report["n"]
    assert report["cross_entropy"]["realised"] == pytest.approx(np.mean(losses.to_numpy()))
