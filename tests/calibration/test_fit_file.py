import json
from pathlib import Path

import numpy as np
import pytest

from model import numerics
from service import cli
from service.calibration.fit_file import read
from service.errors import InvalidInput

CLASSES = ("normal", "degrading", "critical")


def sharpened(times: float, engines: int = 60, each: int = 20) -> list[dict[str, object]]:
    """Predictions of a model whose logits are that many times what they should be."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 2, (engines * each, 3))
    labels = [random.choice(3, p=p) for p in numerics.softmax(logits)]
    return [
        {"engine_id": f"e{k // each}", "label": CLASSES[label], "logits": (times * z).tolist()}
        for k, (z, label) in enumerate(zip(logits, labels, strict=True))
    ]


def as_csv(rows: list[dict[str, object]], path: Path) -> Path:
    head = "engine_id,label," + ",".join(f"logit_{name}" for name in CLASSES)
    text = [f"{r['engine_id']},{r['label']}," + ",".join(map(str, r["logits"])) for r in rows]  # type: ignore[call-overload]  # a list of floats
    path.write_text("\n".join([head, *text]) + "\n")
    return path


def as_lines(rows: list[dict[str, object]], path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_fit_of_a_file_finds_the_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits twice too large need a temperature of two, from CSV and JSON lines alike, and held-out loss falls."""
    rows = sharpened(2)
    found = []
    for path in (as_csv(rows, tmp_path / "rows.csv"), as_lines(rows, tmp_path / "rows.jsonl")):
        assert 0 == cli.main(["calibrate", str(path), "--temperature", "1", "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert pytest.approx(2, rel=0.15) == found[0]["temperature"]
    assert found[0]["cross_entropy"]["after"] < found[0]["cross_entropy"]["before"]
    assert 0 == cli.main(["calibrate", str(path), "--temperature", "1"])
    assert "1200 labelled predictions of 60 engines" in capsys.readouterr().out


def test_file_without_a_better_temperature_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits that are right already, or too few engines: exit code 1 and one line that says why."""
    for rows, why in ((sharpened(1), "raises cross-entropy"), (sharpened(2, engines=5), "engines are too few")):
        path = as_lines(rows, tmp_path / "rows.jsonl")
        assert 1 == cli.main(["calibrate", str(path), "--temperature", "1"])
        said = capsys.readouterr()
        assert (1, "") == (len(said.err.splitlines()), said.out)
        assert why in said.err


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "", "no column 'engine_id'"),
        ("a.csv", "engine_id,label,logit_normal,logit_degrading\n", "no column 'logit_critical'"),
        ("a.csv", "engine_id,label,logit_normal,logit_degrading,logit_critical\n", "no rows"),
        ("a.csv", "engine_id,label,logit_normal,logit_degrading,logit_critical\na,1,1,2\n", "line 2"),
        ("a.csv", "engine_id,label,logit_normal,logit_degrading,logit_critical\na,1,1,2,x\n", "line 2"),
        ("a.csv", "engine_id,label,logit_normal,logit_degrading,logit_critical\na,9,1,2,3\n", "index 9"),
        ("a.csv", "engine_id,label,logit_normal,logit_degrading,logit_critical\n,1,1,2,3\n", "engine_id"),
        ("a.jsonl", "{", "line 1"),
        ("a.jsonl", "\n[]\n", "line 2"),
        ("a.jsonl", '{"engine_id": "a", "label": 0, "logits": [1, 2]}', "3 logits"),
        ("a.jsonl", '{"engine_id": "a", "label": 0, "logits": [1, 2, null]}', "3 logits"),
        ("a.jsonl", '{"engine_id": "a", "label": "worn", "logits": [1, 2, 3]}', "unknown class"),
        ("a.jsonl", '{"engine_id": "a", "logits": [1, 2, 3]}', "label"),
        ("a.csv", "\0", "a.csv"),
        ("missing.csv", None, "No such file"),
    ],
)
def test_wrong_file_is_refused_by_its_line(tmp_path: Path, name: str, text: str | None, why: str) -> None:
    """What is wrong in a file is named with its line."""
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match=why):
        read(path, CLASSES)
