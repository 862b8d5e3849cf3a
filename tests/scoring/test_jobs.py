import argparse
import fcntl
import json
import os
import pty
import random
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
import pytest

from model.contract import CHANNELS
from model.windows import Readings
from service.errors import InvalidInput, ServiceError
from service.scoring import job as run
from service.scoring import outputs
from service.scoring.progress import Progress
from tests.support.processes import absent, start
from tests.support.scoring import flights, read, rejected, score, write

pytestmark = pytest.mark.slow  # whole scoring jobs in this process

PART = "1500"  # rows of a part: many of them in a file that is scored in seconds
OUTPUTS = ("out.parquet", "out.csv", "out")
KILLS = {"out.parquet": 2, "out.csv": 1, "out": 1}  # `make kills-score` kills twenty times


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen thousand flights, of which every thousandth is wrong."""
    random, n, length = np.random.default_rng(0), 150, 100
    columns: dict[str, Any] = {"engine_id": [f"e{i}" for i in range(n) for _ in range(length)]}
    columns["cycle"] = list(range(length)) * n
    columns |= {name: random.normal(500, 5, n * length) for name in CHANNELS}
    columns["sensor_2"] = [None if k % 1000 == 999 else one for k, one in enumerate(columns["sensor_2"])]
    columns["truth"] = random.integers(0, 3, n * length)
    return write(pa.table(columns), tmp_path_factory.mktemp("fleet") / "fleet.parquet")


def content(output: Path) -> dict[str, bytes]:
    """Every file that a job wrote, by its name after the output's."""
    paths = [path for path in output.parent.rglob("*") if path.is_file() and path.name != "fleet.parquet"]
    return {str(path.relative_to(output.parent)): path.read_bytes() for path in sorted(paths)}


@contextmanager
def job(*arguments: object, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """`engine-health score` in a process of its own, ended however the test ends."""
    process = start("score", *map(str, arguments), **environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(*arguments: object, **environment: str) -> tuple[int, str]:
    """The exit code of a command, and what it said."""
    with job(*arguments, **environment) as process:
        said, errors = process.communicate(timeout=300)
        return process.returncode, said + errors


def parts_of(output: Path) -> dict[str, tuple[int, int]]:
    """The parts in the journal of an unfinished job, each with what tells that it was not written again."""
    folder = output.with_name(output.name + ".partial")
    journal = folder / "journal"
    whole = journal.read_bytes().count(b"\n") if journal.exists() else 0
    paths = sorted(folder.rglob("part-*"))[:whole]
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


@pytest.mark.parametrize(("name", "most"), KILLS.items())
def test_killed_again_and_again_the_result_is_the_same_bytes(name: str, most: int, fleet: Path, tmp_path: Path) -> None:
    """`kill -9` at random moments, then the same command: nothing whole is written again, no byte differs."""
    flags = ("--quiet", "--part-rows", PART, "--labels", "truth", "--report")
    (tmp_path / "whole").mkdir()
    about = {"part_rows": int(PART), "labels": "truth", "report": tmp_path / "whole" / "report.json"}
    assert 3 == score(fleet, tmp_path / "whole" / name, **about)
    output, moments = tmp_path / "killed" / name, random.Random(name)
    output.parent.mkdir()
    kills, before = 0, parts_of(output)
    for _ in range(40):
        with job(fleet, output, *flags, tmp_path / "killed" / "report.json") as process:
            aim = len(before) + moments.randint(1, 4)
            while process.poll() is None and (kills >= most or len(parts_of(output)) < aim):
                time.sleep(0.01)
            time.sleep(moments.random() / 10)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
        kills, now = kills + 1, parts_of(output)
        assert before.items() <= now.items()
        assert len(now) >= len(before)
        before = now
    assert most == kills
    assert 3 == process.returncode
    assert content(tmp_path / "whole" / name) == content(output)


def test_ctrl_c_stops_and_the_same_command_goes_on(fleet: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM end a job with one line, exit code 1, whole parts kept, nothing under the output's name."""
    output, seen = tmp_path / "out.parquet", 0
    for number in (signal.SIGINT, signal.SIGTERM):
        with job(fleet, output, "--part-rows", PART) as process:
            while len(parts_of(output)) <= seen:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert (1, "engine-health: stopped; run the same command to resume\n") == (process.returncode, said)
        assert not output.exists()
        seen = len(parts_of(output))
    assert 3 == finished(fleet, output, "--part-rows", PART)[0]
    assert [] == list(tmp_path.glob("*.partial"))


def test_stopped_before_the_first_part_leaves_nothing(fleet: Path, tmp_path: Path) -> None:
    """A job that has no whole part yet leaves no trace when it is told to stop."""
    with job(fleet, tmp_path / "out.parquet") as process:
        while not (tmp_path / "out.parquet.partial" / "job.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (1, "engine-health: stopped\n") == (process.returncode, said)
    assert [] == list(tmp_path.iterdir())


@pytest.fixture
def begun(windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job over `a.parquet` that failed after its first part; the path of its output."""
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
    assert 1 == len(parts_of(tmp_path / "out.parquet"))
    return tmp_path / "out.parquet"


def test_a_full_disk_is_one_line_and_the_job_goes_on_later(begun: Path) -> None:
    """What was written before the disk was full is kept, and not written again."""
    before = (begun.with_name("out.parquet.partial") / "part-00000.arrow").stat()
    seen = []

    def spy(table: pa.Table, path: Path, write: Any = outputs.write_part) -> None:
        seen.append(path.name)
        write(table, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "write_part", spy)
        assert 0 == score(begun.with_name("a.parquet"), begun, part_rows=100)
    assert before.st_size > 0
    assert ["part-00001.arrow", "part-00002.arrow", "part-00003.arrow"] == seen[:3]
    assert 400 == read(begun).num_rows


CHANGES: dict[str, Any] = {
    '--missing was "reject", now it is "hold"': {"missing": "hold"},
    "--latest was false, now it is true": {"latest": True},
    "temperature was": {"temperature": 2.0},
    "--horizon was": {"horizon": 1},
    "--part-rows was 100": {"part_rows": 200},
    "--labels was null": {"labels": "cycle"},
}


@pytest.mark.parametrize("said", CHANGES)
def test_another_option_is_noticed_and_refused(said: str, begun: Path) -> None:
    """An unfinished job that is started with another option says which, and is left as it is."""
    before = parts_of(begun)
    with pytest.raises(InvalidInput) as refused:
        score(begun.with_name("a.parquet"), begun, **({"part_rows": 100} | CHANGES[said]))
    assert said in refused.value.detail
    assert "--restart starts over" in refused.value.detail
    assert before == parts_of(begun)


def test_a_changed_input_is_noticed_and_refused(begun: Path, windows: Readings) -> None:
    """One byte changed, size and time as before: the job does not go on; with --restart it starts over."""
    path = begun.with_name("a.parquet")
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InvalidInput, match=r"a\.parquet has changed"):
        score(path, begun, part_rows=100)
    write(flights(windows + np.float32(1)), path)
    assert 0 == score(path, begun, part_rows=100, restart=True)
    score(path, begun.with_name("expected.parquet"), part_rows=100)
    assert begun.with_name("expected.parquet").read_bytes() == begun.read_bytes()


def test_another_model_is_noticed_and_refused(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of the model belongs to the job."""
    from model import contract
    from model.evaluation.evaluate import ARTEFACT, open_artefact

    manifest = open_artefact(ARTEFACT)[1].model_copy(update={"version": "0.2.0"})
    contract.write(ARTEFACT.read_bytes(), manifest, tmp_path / "other.onnx")
    monkeypatch.setenv("ENGINE_HEALTH_MODEL", str(tmp_path / "other.onnx"))
    with pytest.raises(InvalidInput, match="model was "):
        score(begun.with_name("a.parquet"), begun, part_rows=100)


def test_a_torn_journal_costs_one_part(begun: Path) -> None:
    """A last line that was cut by a crash is no part; the result is whole all the same."""
    journal = begun.with_name("out.parquet.partial") / "journal"
    journal.write_bytes(journal.read_bytes() + b'{"units": 1, "ro')
    assert 0 == score(begun.with_name("a.parquet"), begun, part_rows=100)
    assert 400 == read(begun).num_rows


def test_a_finished_job_is_not_done_again(windows: Readings, tmp_path: Path) -> None:
    """The same command leaves a whole result untouched and gives its exit code; over a changed input it does not."""
    some = flights(windows).to_pydict()
    some["sensor_2"][7] = None
    path = write(pa.table(some), tmp_path / "a.parquet")
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
        assert not outputs_errors(tmp_path / name).exists()


def outputs_errors(output: Path) -> Path:
    return output.with_name(output.name + ".errors.parquet")


def test_a_folder_with_other_things_in_it_is_left_alone(windows: Readings, tmp_path: Path) -> None:
    """Only a folder that a job wrote is replaced."""
    path = write(flights(windows), tmp_path / "a.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInput, match="it is not replaced"):
        score(path, tmp_path / "out")
    assert "years of work" == (tmp_path / "out" / "thesis.txt").read_text()


def test_what_somebody_put_beside_the_parts_is_left_alone(windows: Readings, tmp_path: Path) -> None:
    """A folder that a job wrote is not replaced once there is anything else in it, and no report is written into it."""
    path = write(flights(windows), tmp_path / "a.parquet")
    assert 0 == score(path, tmp_path / "out")
    with pytest.raises(InvalidInput, match="choose another name for the report"):
        score(path, tmp_path / "out", labels="cycle", report=tmp_path / "out" / "r.json")
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInput, match="it is not replaced"):
        score(path, tmp_path / "out", latest=True)
    assert "years of work" == (tmp_path / "out" / "thesis.txt").read_text()


def test_rejected_rows_of_another_job_are_not_taken_for_those_of_this_one(windows: Readings, tmp_path: Path) -> None:
    """An output beside which the rejected rows of another job lie, as a kill leaves them, is written again."""
    good, bad, output = tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "out.parquet"
    write(flights(windows), good)
    some = flights(windows).to_pydict()
    for row, path in ((7, bad), (9, tmp_path / "c.parquet")):
        write(pa.table(some | {"sensor_2": [None, *some["sensor_2"][1:]] if row == 9 else some["sensor_2"]}), path)
        some["sensor_2"][7] = None
    write(pa.table(some), bad)
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
    assert not outputs_errors(output).exists()


def test_a_csv_without_its_metadata_is_no_finished_job(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that stops between a CSV and its metadata does not pass for the job whose metadata lay there before."""
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


def test_a_job_that_was_killed_as_it_tidied_up_leaves_nothing(windows: Readings, tmp_path: Path) -> None:
    """Whatever is left of the folder of a job that is done is removed by the same command; the next job begins."""
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


def test_where_nothing_can_be_written_a_job_does_not_begin(windows: Readings, tmp_path: Path) -> None:
    """An output or a report in a folder that is not there, or that is the input itself, is refused before any work."""
    path = write(flights(windows), tmp_path / "a.parquet")
    before = path.read_bytes()
    for output, report, said in (
        (tmp_path / "none" / "out.parquet", None, "none/out.parquet: its folder does not exist"),
        (tmp_path / "out.parquet", tmp_path / "none" / "r.json", "none/r.json: its folder does not exist"),
        (path, None, "a.parquet: is part of the input"),
        (tmp_path / "out.parquet", path, "a.parquet: is part of the input"),
        (tmp_path / ("x" * 244 + ".parquet"), None, "File name too long"),
        (tmp_path / "out.parquet", tmp_path, "is a folder"),
        (tmp_path / "out.csv", tmp_path / "out.csv-metadata.json", "choose another name for the report"),
    ):
        with pytest.raises(ServiceError, match=said):
            score(path, output, report=report, labels="cycle")
    assert (before, ["a.parquet"]) == (path.read_bytes(), os.listdir(tmp_path))


def test_parts_of_a_folder_are_a_data_set(windows: Readings, tmp_path: Path) -> None:
    """Several part files in a folder read as one table, that of a single file."""
    path = write(flights(windows), tmp_path / "a.parquet")
    score(path, tmp_path / "out.parquet", part_rows=150)
    assert 0 == score(path, tmp_path / "out", part_rows=150)
    assert ["_job.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"] == sorted(
        os.listdir(tmp_path / "out")
    )
    assert read(tmp_path / "out.parquet").equals(pa.parquet.read_table(tmp_path / "out"))


def test_two_jobs_cannot_write_one_output(windows: Readings, tmp_path: Path) -> None:
    """The second job to an output says that another one is writing it, and touches nothing."""
    folder = tmp_path / "out.parquet.partial"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidInput, match="another job is writing this output"):
            score(write(flights(windows), tmp_path / "a.parquet"), tmp_path / "out.parquet")


def test_strict_makes_the_first_rejected_row_fatal(windows: Readings, tmp_path: Path) -> None:
    """With `--strict` a job fails with the row and its reason, and writes no output."""
    some = flights(windows).to_pydict()
    some["sensor_2"][7] = some["sensor_3"][200] = None
    path = write(pa.table(some), tmp_path / "a.csv")
    code, said = finished(path, tmp_path / "out.parquet", "--strict")
    reason = "sensor_2: missing; --missing hold would repeat the last seen value"
    assert (1, f"engine-health: {path}, row 7: {reason}\n") == (code, said)
    assert ["a.csv"] == os.listdir(tmp_path)


USAGE = [
    ((), "the following arguments are required"),
    (("in.csv",), "the following arguments are required"),
    (("in.csv", "out.xlsx"), "expected .parquet, .csv, or a folder"),
    (("in.csv", "out.csv", "--missing", "guess"), "invalid choice: 'guess'"),
    (("in.csv", "out.csv", "--map", "sensor_2"), "expected CHANNEL=COLUMN"),
    (("in.csv", "out.csv", "--labels", "a", "--rul", "b"), "not allowed with argument"),
    (("in.csv", "out.csv", "--report", "r.json"), "--report needs --labels or --rul"),
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


@pytest.mark.parametrize(("arguments", "said"), USAGE)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that are absent, unknown, out of range or contradict each other exit with 2 and name what is wrong."""
    from service.cli import main

    with pytest.raises(SystemExit) as exit_code:
        main(["score", *arguments])
    assert 2 == exit_code.value.code
    assert said in capsys.readouterr().err


def test_backend_flag_keeps_its_former_name(capsys: pytest.CaptureFixture[str]) -> None:
    """`--engine` still selects the backend, like `--backend`, but the help does not show it."""
    from service.cli import main
    from service.scoring.command import add_score_command

    parser = argparse.ArgumentParser()
    add_score_command(parser.add_subparsers(), float)
    backends = [
        parser.parse_args(["score", "in.csv", "out.csv", *flags]).backend
        for flags in ((), ("--backend", "ray"), ("--engine", "ray"), ("--backend", "local"))
    ]
    assert ["local", "ray", "ray", "local"] == backends
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    usage = capsys.readouterr().out
    assert "--backend {local,ray}" in usage
    assert "--engine {" not in usage


def test_closed_standard_input_is_one_line(tmp_path: Path) -> None:
    """`<&-`: both commands that read standard input say that it is closed."""
    for command in (["score", "-", str(tmp_path / "out.csv")], ["predict", "-"]):
        words = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "service.cli", *command]
        found = subprocess.run(words, capture_output=True, text=True)
        assert (1, "engine-health: standard input: is closed\n") == (found.returncode, found.stderr)


def test_rows_of_an_earlier_run_are_counted_as_well() -> None:
    """A job that finds everything done tells the engines and rejected rows of the whole, not of its own run."""
    progress = Progress(quiet=True, interval=1.0)
    progress.skip_rows(10, 2, 3, 1.0)
    assert (10, 2, 3) == tuple(progress.counts[name] for name in ("rows", "engines", "rejected"))


def test_a_failed_job_is_exit_code_1_and_one_line(tmp_path: Path) -> None:
    """An input that is not there: exit code 1 and one line, no traceback."""
    code, said = finished(tmp_path / "none.csv", tmp_path / "out.csv")
    assert (1, f"engine-health: {tmp_path}/none.csv: No such file or directory\n") == (code, said)


def test_without_a_terminal_there_is_a_line_of_the_log_now_and_then(
    fleet: Path, windows: Readings, tmp_path: Path
) -> None:
    """Off a terminal: JSON lines with rows, rate, engines, rejected rows, the last one at the end; none if quiet."""
    flags = ("--interval", "1e-6", "--part-rows", PART)
    code, said = finished(fleet, tmp_path / "out.csv", *flags, ENGINE_HEALTH_LOG_LEVEL="info")
    lines = [json.loads(line) for line in said.splitlines()]
    assert 3 == code
    assert len(lines) > 2
    assert {"scoring"} == {line["event"] for line in lines[:-1]}
    assert ("scored", 14_985, 150, 15) == tuple(lines[-1][key] for key in ("event", "rows", "engines", "rejected"))
    assert sorted(line["rows"] for line in lines) == [line["rows"] for line in lines]
    few = write(flights(windows), tmp_path / "few.parquet")
    assert (0, "") == finished(few, tmp_path / "quiet.csv", *flags, "--quiet", ENGINE_HEALTH_LOG_LEVEL="info")


def test_on_a_terminal_there_is_a_bar(windows: Readings, tmp_path: Path) -> None:
    """On a terminal progress is a bar with rows, rows/s, engines and rejected rows."""
    path, (ours, theirs) = write(flights(windows), tmp_path / "a.parquet"), pty.openpty()
    command = [sys.executable, "-m", "service.cli", "score", str(path), str(tmp_path / "out.parquet")]
    wide = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=wide) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # how Linux says that nobody writes any more
                break
    os.close(ours)
    assert 0 == process.returncode
    for word in (b"100%", b"400 rows", b"rows/s", b"4 engines", b"0 rejected"):
        assert word in said


def test_without_its_packages_the_command_says_what_to_install(windows: Readings, tmp_path: Path) -> None:
    """Where pyarrow is not installed, scoring names the extra; the rest of the command works."""
    path = write(flights(windows), tmp_path / "a.parquet")
    code, said = finished(path, tmp_path / "out.parquet", **absent(tmp_path, "pyarrow"))
    assert (1, "engine-health: score needs pyarrow: install engine-health[score]\n") == (code, said)


def test_serving_needs_nothing_of_scoring() -> None:
    """The command line imports neither pyarrow nor plotly nor ray before it is asked to score."""
    probe = "import sys, service.cli; print([x for x in ('pyarrow', 'plotly', 'ray', 'torch') if x in sys.modules])"
    assert "[]\n" == subprocess.check_output([sys.executable, "-c", probe], text=True)


def test_rows_without_a_finite_answer_are_rejected(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the network overflows, the row is rejected with that reason, in a resumed job too."""
    from service.inference import predictions
    from service.scoring import scorer

    def answer(model: Any, batch: Any, temperature: float) -> Any:
        found = predictions.predict_windows(model, batch, temperature)
        return found._replace(finite=batch[:, -1, 3] != windows[1, 50, 3])

    monkeypatch.setattr(scorer, "predict_windows", answer)
    monkeypatch.setattr(run, "open_overlap_graph", lambda *_: None)  # every window is answered there
    path, output = write(flights(windows), tmp_path / "a.parquet"), tmp_path / "out.parquet"
    assert 3 == score(path, output, part_rows=100)
    whole, found = output.read_bytes(), rejected(output)
    assert 150 in {one["row"] for one in found}
    assert {"the model has no finite output for these readings"} == {one["reason"] for one in found}
    output.unlink()
    monkeypatch.setattr(outputs, "assemble_output", full_disk)
    with pytest.raises(ServiceError, match="No space left"):
        score(path, output, part_rows=100)
    monkeypatch.undo()  # nothing is scored again, so that nobody overflows
    assert 3 == score(path, output, part_rows=100)
    assert (whole, found) == (output.read_bytes(), rejected(output))


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")
