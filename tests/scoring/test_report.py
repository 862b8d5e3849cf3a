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

OF_TIME = ("window", "labels", "model", "temperature_source")  # what a file has no word on, or says in other ones


@pytest.fixture(scope="module")
def labelled(windows: Readings) -> pa.Table:
    """Twenty-four engines of forty cycles, a class for four rows in five."""
    random = np.random.default_rng(4)
    some = np.concatenate(
        [windows[:, k : k + 40] + random.normal(0, 0.01, (4, 40, 17)).astype(np.float32) for k in range(0, 60, 10)]
    )
    table = flights(some)
    truth = random.integers(0, 3, table.num_rows)
    return table.append_column(
        "truth", pa.array([None if k % 5 == 0 else int(one) for k, one in enumerate(truth)], pa.int64())
    )


def same(expected: Any, found: Any, place: str = "") -> None:
    """Two reports say the same: every figure to nine digits."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found), place
        for key in expected:
            same(expected[key], found[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(found), place
        for k, (one, other) in enumerate(zip(expected, found, strict=True)):
            same(one, other, f"{place}[{k}]")
    elif isinstance(expected, float):
        assert expected == pytest.approx(found, rel=1e-5, abs=1e-5), place
    else:
        assert expected == found, place


def test_a_report_says_what_the_service_says(labelled: pa.Table, tmp_path: Path) -> None:
    """The same rows sent to `/v1/cycles` and `/v1/labels`: `/v1/calibration` has every figure of the report."""
    rows = labelled.to_pylist()
    path = write(labelled, tmp_path / "a.parquet")
    assert 0 == score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    names = {"engine_id", "cycle"}
    with running(ENGINE_HEALTH_MAX_INSTANCES="4096") as service:
        cycles = [{k: row[k] for k in names} | {"telemetry": [row[c] for c in CHANNELS]} for row in rows]
        labels = [{k: row[k] for k in names} | {"label": row["truth"]} for row in rows if row["truth"] is not None]
        for call, field, sent in (("/v1/cycles", "cycles", cycles), ("/v1/labels", "labels", labels)):
            answer = service.client.post(call, json={field: sent})
            assert 200 == answer.status_code, answer.text
        expected = service.client.get("/v1/calibration").json()
    assert expected["model"] == found["model"]
    assert expected["labels"]["share"] == found["labels"]["share"]
    assert 24 == found["engines"]
    same({key: one for key, one in expected.items() if key not in OF_TIME}, found)


def test_confusion_and_risk_are_counted_from_the_rows(labelled: pa.Table, manifest: Manifest, tmp_path: Path) -> None:
    """The matrix is that of the written healths; the curve goes from the surest row to the error of all."""
    path, output = write(labelled, tmp_path / "a.parquet"), tmp_path / "out.parquet"
    score(path, output, labels="truth", report=tmp_path / "r.json")
    found, table = json.loads((tmp_path / "r.json").read_text()), read(output)
    truth = labelled["truth"].to_numpy(zero_copy_only=False)
    known = ~np.isnan(truth)
    said = probabilities(table, manifest).argmax(axis=1)
    matrix = [[int(((truth == i) & (said == j)).sum()) for j in range(3)] for i in range(3)]
    assert matrix == found["confusion"]
    curve = found["risk_coverage"]
    assert 1.0 == curve[-1]["coverage"]
    assert curve[-1]["risk"] == pytest.approx(1 - found["accuracy"])
    assert curve[0]["confidence"] == pytest.approx(probabilities(table, manifest)[known].max())
    loss = table["loss"].to_numpy(zero_copy_only=False)
    assert found["cross_entropy"]["realised"] == pytest.approx(np.nanmean(loss))


def test_a_page_needs_nothing_beside_itself(labelled: pa.Table, tmp_path: Path) -> None:
    """The HTML report holds its pictures, its script and its figures, and asks no other host for anything."""
    path = write(labelled, tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.html")
    score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.json")
    page = (tmp_path / "r.html").read_text()
    within = re.search(r"<script type='application/json' id='report'>(.*?)</script>", page)
    assert within is not None
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(within[1])
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    for word in ("Reliability", "Confusion, rows", "Risk against coverage"):
        assert word in page


def test_a_report_without_any_label_says_so(labelled: pa.Table, tmp_path: Path) -> None:
    """A column of nothing but nulls: no labelled row, no figure, no failure; the page is written too."""
    place = labelled.column_names.index("truth")
    nothing = labelled.set_column(place, "truth", pa.nulls(labelled.num_rows, pa.string()))
    path = write(nothing, tmp_path / "a.parquet")
    for name in ("r.json", "r.html"):
        assert 0 == score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / name)
    found = json.loads((tmp_path / "r.json").read_text())
    assert (0, "insufficient_data", None) == (found["n"], found["state"], found["accuracy"])


def test_a_report_of_another_job_is_written_again(labelled: pa.Table, tmp_path: Path) -> None:
    """A job that is done is done again if the report under its name is that of another one."""
    found = []
    for part in (labelled, labelled.slice(100), labelled):
        path = write(part, tmp_path / f"{part.num_rows}.parquet")
        report = tmp_path / "r.json"
        assert 0 == score(path, tmp_path / f"out-{part.num_rows}.parquet", labels="truth", report=report)
        found.append(report.read_bytes())
    assert found[0] == found[2]
    assert found[0] != found[1]


def test_a_report_of_the_newest_rows_counts_one_row_an_engine(labelled: pa.Table, tmp_path: Path) -> None:
    """With `--latest` the evaluation is of the rows that are written."""
    path = write(labelled, tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet", labels="truth", report=tmp_path / "r.json", latest=True)
    found, table = json.loads((tmp_path / "r.json").read_text()), read(tmp_path / "out.parquet")
    losses = table["loss"].drop_null()
    assert len(losses) == found["n"]
    assert found["cross_entropy"]["realised"] == pytest.approx(np.mean(losses.to_numpy()))
