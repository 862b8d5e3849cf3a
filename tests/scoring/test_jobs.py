import argparse
import fcntl
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from model.contract import CHANNELS
from model.windows import Readings
from service import cli
from service.errors import InvalidInput, ServiceError
from service.scoring import job as run
from service.scoring import outputs
from service.scoring.progress import Progress
from tests.support.processes import absent, start
from tests.support.scoring import flights, read, rejected, score, write
from tests.support.terminal import COLOUR, read_terminal

pytestmark = pytest.mark.slow  # whole scoring jobs in this process

PART = "1500"  # rows of a part: many of them in a file that is scored in seconds
OUTPUTS = ("out.parquet", "out.csv", "out")
KILLS = {"out.parquet": 2, "out.csv": 1, "out": 1}  # `make kills-score` kills twenty times


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 15,000 flights. In every thousandth a reading is missing."""
    random, n, length = np.random.default_rng(0), 150, 100
    columns: dict[str, Any] = {"engine_id": [f"e{i}" for i in range(n) for _ in range(length)]}
    columns["cycle"] = list(range(length)) * n
    columns |= {name: random.normal(500, 5, n * length) for name in CHANNELS}
    columns["sensor_2"] = [None if k % 1000 == 999 else item for k, item in enumerate(columns["sensor_2"])]
    columns["truth"] = random.integers(0, 3, n * length)
    return write(pa.table(columns), tmp_path_factory.mktemp("fleet") / "fleet.parquet")


def files_of(output: Path) -> dict[str, bytes]:
    """Return the bytes of all files that a job wrote, by their path relative to the folder of the output."""
    paths = [path for path in output.parent.rglob("*") if path.is_file() and path.name != "fleet.parquet"]
    return {str(path.relative_to(output.parent)): path.read_bytes() for path in sorted(paths)}


@contextmanager
def score_process(*arguments: object, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `engine-health score` in a separate process. Kill it at the end of the block."""
    process = start("score", *map(str, arguments), **environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run_score(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run `engine-health score`. Return the exit code and all output."""
    with score_process(*arguments, **environment) as process:
        message, errors = process.communicate(timeout=300)
        return process.returncode, message + errors


def journalled_parts(output: Path) -> dict[str, tuple[int, int]]:
    """Return the parts in the journal of an unfinished job, with the time and inode of each file."""
    folder = output.with_name(output.name + ".partial")
    journal = folder / "journal"
    whole = journal.read_bytes().count(b"\n") if journal.exists() else 0
    paths = sorted(folder.rglob("part-*"))[:whole]
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


@pytest.mark.parametrize(("name", "max_kills"), KILLS.items())
def test_killed_job_resumes_to_the_same_bytes(name: str, max_kills: int, fleet: Path, tmp_path: Path) -> None:
    """A job killed at random moments and repeated writes no finished part again, and its output has the same bytes."""
    flags = ("--quiet", "--part-rows", PART, "--labels", "truth", "--report")
    (tmp_path / "whole").mkdir()
    about = {"part_rows": int(PART), "labels": "truth", "report": tmp_path / "whole" / "report.json"}
    assert 3 == score(fleet, tmp_path / "whole" / name, **about)
    output, moments = tmp_path / "killed" / name, random.Random(name)
    output.parent.mkdir()
    kills, before = 0, journalled_parts(output)
    for _ in range(40):
        with score_process(fleet, output, *flags, tmp_path / "killed" / "report.json") as process:
            aim = len(before) + moments.randint(1, 4)
            while process.poll() is None and (kills >= max_kills or len(journalled_parts(output)) < aim):
                time.sleep(0.01)
            time.sleep(moments.random() / 10)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
        kills, now = kills + 1, journalled_parts(output)
        assert before.items() <= now.items()
        assert len(now) >= len(before)
        before = now
    assert max_kills == kills
    assert 3 == process.returncode
    assert files_of(tmp_path / "whole" / name) == files_of(output)


def test_interrupted_job_resumes_with_same_command(fleet: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM stop a job with one line and exit code 1. Finished parts are kept; no output is written."""
    output, written_parts = tmp_path / "out.parquet", 0
    for number in (signal.SIGINT, signal.SIGTERM):
        with score_process(fleet, output, "--part-rows", PART) as process:
            while len(journalled_parts(output)) <= written_parts:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, message = process.communicate(timeout=60)
        assert (1, "engine-health: stopped; run the same command to resume\n") == (process.returncode, message)
        assert not output.exists()
        written_parts = len(journalled_parts(output))
    assert 3 == run_score(fleet, output, "--part-rows", PART)[0]
    assert [] == list(tmp_path.glob("*.partial"))


def test_job_stopped_before_first_part_leaves_no_file(fleet: Path, tmp_path: Path) -> None:
    """A job that is stopped before its first part is finished leaves no file."""
    with score_process(fleet, tmp_path / "out.parquet") as process:
        while not (tmp_path / "out.parquet.partial" / "job.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    assert (1, "engine-health: stopped\n") == (process.returncode, message)
    assert [] == list(tmp_path.iterdir())


@pytest.fixture
def unfinished_job(windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a job on `a.parquet` that fails after its first part. Return the path of its output."""
    path, written = write(flights(windows), tmp_path / "a.parquet"), list[Path]()

    def full(table: pa.Table, path: Path, write: Any = outputs.write_part) -> None:
        if len(written) == 1:
            raise OSError(28, "No space left on device", str(path))
        write(table, path)
        written.append(path)

    monkeypatch.setattr(outputs, "write_part", full)
    with pytest.raises(ServiceError, match="No space left on device"):
        score(path, tmp_path / "out.parquet", part_rows=100)
    monkeypatch.undo()
    assert 1 == len(journalled_parts(tmp_path / "out.parquet"))
    return tmp_path / "out.parquet"


def test_full_disk_keeps_finished_parts(unfinished_job: Path) -> None:
    """After a full disk, the repeated job keeps the finished parts and writes only the others."""
    before = (unfinished_job.with_name("out.parquet.partial") / "part-00000.arrow").stat()
    written_parts = []

    def spy(table: pa.Table, path: Path, write: Any = outputs.write_part) -> None:
        written_parts.append(path.name)
        write(table, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "write_part", spy)
        assert 0 == score(unfinished_job.with_name("a.parquet"), unfinished_job, part_rows=100)
    assert before.st_size > 0
    assert ["part-00001.arrow", "part-00002.arrow", "part-00003.arrow"] == written_parts[:3]
    assert 400 == read(unfinished_job).num_rows


CHANGES: dict[str, Any] = {
    '--missing was "reject", now it is "hold"': {"missing": "hold"},
    "--latest was false, now it is true": {"latest": True},
    "temperature was": {"temperature": 2.0},
    "--horizon was": {"horizon": 1},
    "--part-rows was 100": {"part_rows": 200},
    "--labels was null": {"labels": "cycle"},
}


@pytest.mark.parametrize("message", CHANGES)
def test_resume_with_other_option_is_rejected(message: str, unfinished_job: Path) -> None:
    """An unfinished job that is repeated with another option is rejected, with the option, and not changed."""
    before = journalled_parts(unfinished_job)
    with pytest.raises(InvalidInput) as error:
        score(unfinished_job.with_name("a.parquet"), unfinished_job, **({"part_rows": 100} | CHANGES[message]))
    assert message in error.value.detail
    assert "use --restart to discard its parts" in error.value.detail
    assert before == journalled_parts(unfinished_job)


def test_resume_with_changed_input_is_rejected(unfinished_job: Path, windows: Readings) -> None:
    """An input with one changed byte, of equal size and time, is rejected. With --restart the job starts over."""
    path = unfinished_job.with_name("a.parquet")
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InvalidInput, match=r"a\.parquet has changed"):
        score(path, unfinished_job, part_rows=100)
    write(flights(windows + np.float32(1)), path)
    assert 0 == score(path, unfinished_job, part_rows=100, restart=True)
    score(path, unfinished_job.with_name("expected.parquet"), part_rows=100)
    assert unfinished_job.with_name("expected.parquet").read_bytes() == unfinished_job.read_bytes()


def test_resume_with_other_model_is_rejected(
    unfinished_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished job that is repeated with another model is rejected."""
    from model import contract
    from model.evaluation.evaluate import ARTEFACT, open_artefact

    manifest = open_artefact(ARTEFACT)[1].model_copy(update={"version": "0.2.0"})
    contract.write(ARTEFACT.read_bytes(), manifest, tmp_path / "other.onnx")
    monkeypatch.setenv("ENGINE_HEALTH_MODEL", str(tmp_path / "other.onnx"))
    with pytest.raises(InvalidInput, match="model was "):
        score(unfinished_job.with_name("a.parquet"), unfinished_job, part_rows=100)


def test_incomplete_journal_line_repeats_one_part(unfinished_job: Path) -> None:
    """An incomplete last line of the journal is not a finished part. The job still completes."""
    journal = unfinished_job.with_name("out.parquet.partial") / "journal"
    journal.write_bytes(journal.read_bytes() + b'{"units": 1, "ro')
    assert 0 == score(unfinished_job.with_name("a.parquet"), unfinished_job, part_rows=100)
    assert 400 == read(unfinished_job).num_rows


def test_finished_job_is_not_repeated(windows: Readings, tmp_path: Path) -> None:
    """A repeated command keeps a complete result and returns its exit code. A changed input is scored."""
    columns = flights(windows).to_pydict()
    columns["sensor_2"][7] = None
    path = write(pa.table(columns), tmp_path / "a.parquet")
    for name in OUTPUTS:
        output = tmp_path / name
        witness = output if output.suffix else output / "part-00000.parquet"
        assert 3 == score(path, output)
        before = witness.stat()
        assert 3 == score(path, output)
        assert (before.st_mtime_ns, before.st_ino) == (witness.stat().st_mtime_ns, witness.stat().st_ino)
        with pytest.raises(InvalidInput, match="sensor_2: missing"):
            score(path, output, strict=True)
    write(flights(windows), path)
    for name in OUTPUTS:
        assert 0 == score(path, tmp_path / name)
        assert not rejected_path(tmp_path / name).exists()


def rejected_path(output: Path) -> Path:
    """Return the path of the rejected rows of an output."""
    return output.with_name(f"{output.name}.errors.{'csv' if output.suffix == '.csv' else 'parquet'}")


def test_finished_job_is_reported(windows: Readings, tmp_path: Path) -> None:
    """A repeated command logs that the job is finished, with the output and how to score again, and exits with 0."""
    path, output = write(flights(windows), tmp_path / "a.parquet"), tmp_path / "out.csv"
    assert 0 == run_score(path, output, "--quiet")[0]
    code, text = run_score(path, output, ENGINE_HEALTH_LOG_LEVEL="info")
    line = json.loads(text)
    assert (0, "already scored", str(output)) == (code, line["event"], line["output"])
    assert "rejected_file" not in line
    assert "use --restart to score again" in line["hint"]
    assert (0, "") == run_score(path, output, "--quiet", ENGINE_HEALTH_LOG_LEVEL="info")
    code, text = run_score(path, output, "--restart", ENGINE_HEALTH_LOG_LEVEL="info")
    assert (0, "scored") == (code, json.loads(text)["event"])


def test_finished_job_with_rejected_rows_is_reported(windows: Readings, tmp_path: Path) -> None:
    """The report of a finished job names the file of rejected rows, and the exit code is 3 as in the first run."""
    columns = flights(windows).to_pydict()
    columns["sensor_2"][7] = None
    path = write(pa.table(columns), tmp_path / "a.parquet")
    for name in OUTPUTS:
        output = tmp_path / name
        assert 3 == run_score(path, output, "--quiet")[0]
        code, text = run_score(path, output, ENGINE_HEALTH_LOG_LEVEL="info")
        line = json.loads(text)
        assert (3, "already scored", str(rejected_path(output))) == (code, line["event"], line["rejected_file"])


def test_csv_output_has_rejected_rows_as_csv(windows: Readings, tmp_path: Path) -> None:
    """Rejected rows of a CSV output are a CSV file with the rows of the Parquet file of a Parquet output."""
    columns = flights(windows).to_pydict()
    columns["sensor_2"][7] = columns["sensor_3"][200] = None
    columns["engine_id"][9] = "a\x01"
    path = write(pa.table(columns), tmp_path / "a.parquet")
    assert (3, 3) == (score(path, tmp_path / "out.csv"), score(path, tmp_path / "out.parquet"))
    rows = pa.csv.read_csv(tmp_path / "out.csv.errors.csv").to_pylist()
    assert [7, 9, 200] == [row["row"] for row in rows]
    assert rejected(tmp_path / "out.parquet") == rows
    assert not (tmp_path / "out.csv.errors.parquet").exists()


@pytest.mark.parametrize("change", ["absent", "other"])
def test_changed_csv_of_rejected_rows_is_written_again(change: str, windows: Readings, tmp_path: Path) -> None:
    """A CSV output whose file of rejected rows is absent, or belongs to another job, is written again."""
    columns = flights(windows).to_pydict()
    columns["sensor_2"][7] = None
    path, output = write(pa.table(columns), tmp_path / "a.parquet"), tmp_path / "out.csv"
    assert 3 == score(path, output)
    before = files_of(output)
    rejected_path(output).unlink()
    if change == "other":
        rejected_path(output).write_text('"row","file","reason"\n9,a.parquet,other\n')
    assert 3 == score(path, output)
    assert before == files_of(output)


def test_folder_of_user_is_not_replaced(windows: Readings, tmp_path: Path) -> None:
    """An output folder with files that no job wrote is not replaced."""
    path = write(flights(windows), tmp_path / "a.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInput, match="so it is not replaced"):
        score(path, tmp_path / "out")
    assert "years of work" == (tmp_path / "out" / "thesis.txt").read_text()


def test_output_folder_with_added_file_is_kept(windows: Readings, tmp_path: Path) -> None:
    """An output folder to which a file was added is not replaced, and no report is written into the folder."""
    path = write(flights(windows), tmp_path / "a.parquet")
    assert 0 == score(path, tmp_path / "out")
    with pytest.raises(InvalidInput, match="choose another name for the report"):
        score(path, tmp_path / "out", labels="cycle", report=tmp_path / "out" / "r.json")
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInput, match="so it is not replaced"):
        score(path, tmp_path / "out", latest=True)
    assert "years of work" == (tmp_path / "out" / "thesis.txt").read_text()


def test_rejected_rows_of_other_job_are_detected(windows: Readings, tmp_path: Path) -> None:
    """An output next to the rejected rows of another job, as a killed job leaves them, is written again."""
    good, bad, output = tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "out.parquet"
    write(flights(windows), good)
    columns = flights(windows).to_pydict()
    for row, path in ((7, bad), (9, tmp_path / "c.parquet")):
        write(
            pa.table(columns | {"sensor_2": [None, *columns["sensor_2"][1:]] if row == 9 else columns["sensor_2"]}),
            path,
        )
        columns["sensor_2"][7] = None
    write(pa.table(columns), bad)
    kept = {}
    for path in (good, bad):
        score(path, output)
        kept[path] = output.read_bytes()
    expected = rejected(output)
    score(tmp_path / "c.parquet", output)
    output.write_bytes(kept[bad])
    assert 3 == score(bad, output)
    assert expected == rejected(output)
    output.write_bytes(kept[good])
    assert 0 == score(good, output)
    assert not rejected_path(output).exists()


def test_csv_without_its_metadata_is_unfinished(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that stops between a CSV and its metadata is unfinished, even next to the metadata of an earlier job."""
    output = tmp_path / "out.csv"
    path = write(flights(windows), tmp_path / "a.parquet")
    assert 0 == score(path, output)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(outputs, "write_metadata", full)
        with pytest.raises(ServiceError, match="No space left"):
            score(path, output, latest=True)
    with pytest.raises(InvalidInput, match="--latest was true, now it is false"):
        score(path, output)
    assert 0 == score(path, output, latest=True)
    assert 4 == read(output).num_rows  # engines


def test_job_killed_during_cleanup_leaves_no_folder(windows: Readings, tmp_path: Path) -> None:
    """The remains of the folder of a finished job are removed by the same command."""
    path, output = write(flights(windows), tmp_path / "a.parquet"), tmp_path / "out"
    folder = tmp_path / "out.partial"
    assert 0 == score(path, output)
    for left in ("job.json", "whole/part-00000.parquet", "before/part-00000.parquet"):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_text("{}")
        assert 0 == score(path, output)
        assert not folder.exists()
    (folder / "before").mkdir(parents=True)
    (folder / "before" / "part-00000.parquet").write_text("")
    assert 0 == score(path, output, latest=True)
    assert not folder.exists()


def test_unwritable_output_is_rejected_before_scoring(windows: Readings, tmp_path: Path) -> None:
    """An output or report that is in an absent folder, or is an input, is rejected before any row is scored."""
    path = write(flights(windows), tmp_path / "a.parquet")
    before = path.read_bytes()
    for output, report, message in (
        (tmp_path / "none" / "out.parquet", None, "none/out.parquet: its folder does not exist"),
        (tmp_path / "out.parquet", tmp_path / "none" / "r.json", "none/r.json: its folder does not exist"),
        (path, None, "a.parquet: is part of the input"),
        (tmp_path / "out.parquet", path, "a.parquet: is part of the input"),
        (tmp_path / ("x" * 244 + ".parquet"), None, "File name too long"),
        (tmp_path / "out.parquet", tmp_path, "is a folder"),
        (tmp_path / "out.csv", tmp_path / "out.csv-metadata.json", "choose another name for the report"),
    ):
        with pytest.raises(ServiceError, match=message):
            score(path, output, report=report, labels="cycle")
    assert (before, ["a.parquet"]) == (path.read_bytes(), os.listdir(tmp_path))


def test_output_folder_reads_as_one_table(windows: Readings, tmp_path: Path) -> None:
    """The part files of an output folder read as one table, equal to that of a single output file."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet", part_rows=150)
    assert 0 == score(path, tmp_path / "out", part_rows=150)
    assert ["_job.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"] == sorted(
        os.listdir(tmp_path / "out")
    )
    assert read(tmp_path / "out.parquet").equals(pa.parquet.read_table(tmp_path / "out"))


def test_second_job_to_same_output_is_rejected(windows: Readings, tmp_path: Path) -> None:
    """A second job with the same output is rejected and changes nothing."""
    folder = tmp_path / "out.parquet.partial"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidInput, match="another job is writing this output"):
            score(write(flights(windows), tmp_path / "a.parquet"), tmp_path / "out.parquet")


def test_strict_job_fails_at_first_rejected_row(windows: Readings, tmp_path: Path) -> None:
    """With `--strict` a job fails with the row and the reason, and writes no output."""
    columns = flights(windows).to_pydict()
    columns["sensor_2"][7] = columns["sensor_3"][200] = None
    path = write(pa.table(columns), tmp_path / "a.csv")
    code, message = run_score(path, tmp_path / "out.parquet", "--strict")
    reason = "sensor_2: missing; --missing hold would repeat the last seen value"
    assert (1, f"engine-health: {path}, row 7: {reason}\n") == (code, message)
    assert ["a.csv"] == os.listdir(tmp_path)


USAGE = [
    ((), "the following arguments are required"),
    (("in.csv",), "the following arguments are required"),
    (("in.csv", "out.xlsx"), "expected .parquet, .csv, or a folder"),
    (("in.csv", "out.csv", "--missing", "guess"), "invalid choice: 'guess'"),
    (("in.csv", "out.csv", "--map", "sensor_2"), "expected CHANNEL=COLUMN"),
    (("in.csv", "out.csv", "--labels", "a", "--rul", "b"), "not allowed with argument"),
    (("in.csv", "out.csv", "--report", "r.json"), "--report needs the true classes: add --labels"),
    (("in.csv", "out.csv", "--labels", "a", "--report", "r.pdf"), "expected a name that ends in .html or .json"),
    (("in.csv", "out.csv", "--horizon", "-1"), "expected rows from 0"),
    (("in.csv", "out.csv", "--part-rows", "0"), "expected rows from 1"),
    (("in.csv", "out.csv", "--threads", "x"), "expected threads from 1 to 1024, got 'x'"),
    (("in.csv", "-"), "not standard output"),
    (("", "out.csv"), "the name of INPUT or OUTPUT is empty"),
    (("in.csv", "."), "the name of INPUT or OUTPUT is empty"),
    (("in.csv", "out.csv", "--engine-column", "cycle"), "must differ"),
    (("in.csv", "out.csv", "--labels", ""), "the name of a column is empty"),
    (("in.csv", "out\udcff.csv"), "the name is not UTF-8"),
    (("in.csv", "out.csv", "--workers", "2"), "need --backend ray"),
    (("in.csv", "out.csv", "--interval", "0"), "expected seconds above 0"),
    (("in.csv", "out.csv", "--temperature", "0"), "expected a number from 0.01"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Absent, unknown, invalid or contradictory arguments exit with 2, and the message names them."""
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["score", *arguments])
    assert 2 == exit_code.value.code
    assert message in capsys.readouterr().err


def test_backend_flag_keeps_its_former_name(capsys: pytest.CaptureFixture[str]) -> None:
    """`--engine` still selects the backend, like `--backend`, but the help does not show it."""
    from service.scoring.command import add_score_command

    parser = argparse.ArgumentParser()
    add_score_command(parser.add_subparsers(), float)
    backends = [
        parser.parse_args(["score", "in.csv", "out.csv", *flags]).backend
        for flags in ((), ("--backend", "ray"), ("--engine", "ray"), ("--backend", "local"))
    ]
    assert ["local", "ray", "ray", "local"] == backends
    with pytest.raises(SystemExit):
        cli.main(["score", "--help"])
    usage = capsys.readouterr().out
    assert "--backend {local,ray}" in usage
    assert "--engine {" not in usage


def test_closed_standard_input_is_one_error_line(tmp_path: Path) -> None:
    """With closed standard input, both commands that read it fail with one line."""
    for command in (["score", "-", str(tmp_path / "out.csv")], ["predict", "-"]):
        words = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "service.cli", *command]
        result = subprocess.run(words, capture_output=True, text=True)
        assert (1, "engine-health: standard input: is closed\n") == (result.returncode, result.stderr)


def test_progress_counts_rows_of_earlier_runs() -> None:
    """The counts of a resumed job include the engines and rejected rows of earlier runs."""
    progress = Progress(quiet=True, interval=1.0)
    progress.skip_rows(10, 2, 3, 1.0)
    assert (10, 2, 3) == tuple(progress.counts[name] for name in ("rows", "engines", "rejected"))


def test_absent_input_exits_with_1_and_one_line(tmp_path: Path) -> None:
    """An absent input gives exit code 1 and one line without a traceback."""
    code, message = run_score(tmp_path / "none.csv", tmp_path / "out.csv")
    assert (1, f"engine-health: {tmp_path}/none.csv: No such file or directory\n") == (code, message)


def test_progress_is_logged_without_a_terminal(fleet: Path, windows: Readings, tmp_path: Path) -> None:
    """Without a terminal, a job logs its counts as JSON lines, and the totals at its end. With --quiet it logs none."""
    flags = ("--interval", "1e-6", "--part-rows", PART)
    code, message = run_score(fleet, tmp_path / "out.csv", *flags, ENGINE_HEALTH_LOG_LEVEL="info")
    lines = [json.loads(line) for line in message.splitlines()]
    assert 3 == code
    assert len(lines) > 2
    assert {"scoring"} == {line["event"] for line in lines[:-1]}
    assert ("scored", 14_985, 150, 15) == tuple(lines[-1][key] for key in ("event", "rows", "engines", "rejected"))
    assert f"{tmp_path}/out.csv.errors.csv" == lines[-1]["rejected_file"]
    assert sorted(line["rows"] for line in lines) == [line["rows"] for line in lines]
    few = write(flights(windows), tmp_path / "few.parquet")
    assert (0, "") == run_score(few, tmp_path / "quiet.csv", *flags, "--quiet", ENGINE_HEALTH_LOG_LEVEL="info")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_progress_is_a_bar_on_a_terminal(no_color: str, windows: Readings, tmp_path: Path) -> None:
    """On a terminal the progress is a bar with rows, rows/s, engines and rejected rows. NO_COLOR removes colours."""
    path, (own_side, terminal) = write(flights(windows), tmp_path / "a.parquet"), pty.openpty()
    command = [sys.executable, "-m", "service.cli", "score", str(path), str(tmp_path / "out.parquet")]
    environment = os.environ | {"COLUMNS": "160", "TERM": "xterm", "NO_COLOR": no_color}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        output = b"".join(read_terminal(own_side))
    os.close(own_side)
    assert 0 == process.returncode
    assert bool(no_color) != bool(COLOUR.search(output))
    for word in (b"100%", b"400 rows", b"rows/s", b"4 engines", b"0 rejected"):
        assert word in (re.sub(rb"\x1b\[[0-9;]*m", b"", output))


def test_missing_package_gives_install_command(windows: Readings, tmp_path: Path) -> None:
    """Without pyarrow, `score` fails with one line that has a command which installs the extra."""
    path = write(flights(windows), tmp_path / "a.parquet")
    code, message = run_score(path, tmp_path / "out.parquet", **absent(tmp_path, "pyarrow"))
    command = f"{sys.executable} -m pip install -e '{Path(cli.__file__).parents[1]}[score]'"
    assert (1, f"engine-health: score needs pyarrow, which is not installed; run: {command}\n") == (code, message)


def test_command_line_imports_no_scoring_package() -> None:
    """The command line imports pyarrow, plotly and ray only when a job starts."""
    probe = "import sys, service.cli; print([x for x in ('pyarrow', 'plotly', 'ray', 'torch') if x in sys.modules])"
    assert "[]\n" == subprocess.check_output([sys.executable, "-c", probe], text=True)


def test_rows_without_finite_prediction_are_rejected(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose prediction overflows is rejected with that reason, also in a resumed job."""
    from service.inference import predictions
    from service.scoring import scorer

    def answer(model: Any, batch: Any, temperature: float) -> Any:
        result = predictions.predict_windows(model, batch, temperature)
        return result._replace(finite=batch[:, -1, 3] != windows[1, 50, 3])

    monkeypatch.setattr(scorer, "predict_windows", answer)
    monkeypatch.setattr(
        run, "open_overlap_graph", lambda *_: None
    )  # then every window is predicted by the patched function
    path, output = write(flights(windows), tmp_path / "a.parquet"), tmp_path / "out.parquet"
    assert 3 == score(path, output, part_rows=100)
    whole, result = output.read_bytes(), rejected(output)
    assert 150 in {item["row"] for item in result}
    assert {"the prediction for these readings is not finite"} == {item["reason"] for item in result}
    output.unlink()
    monkeypatch.setattr(outputs, "assemble_output", raise_disk_full)
    with pytest.raises(ServiceError, match="No space left"):
        score(path, output, part_rows=100)
    monkeypatch.undo()  # the rows are not scored again, so no prediction overflows
    assert 3 == score(path, output, part_rows=100)
    assert (whole, result) == (output.read_bytes(), rejected(output))


def raise_disk_full(*_: Any) -> None:
    raise OSError(28, "No space left on device")
