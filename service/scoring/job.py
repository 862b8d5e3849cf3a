"""The job: reading, inference and writing at once, resumed where an earlier run stopped. Knows every other room."""

import os
import shutil
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import onnxruntime as ort

from service.errors import InvalidInput, ServiceError
from service.inference import model_loader
from service.inference.cpu import allowed_cores
from service.inference.drift_bins import DriftBins
from service.inference.model_loader import Model
from service.inference.overlap_graph import open_histories
from service.inference.predictions import Answers
from service.scoring import outputs, scorer
from service.scoring.checkpoint import Job, Part, errors_of, fingerprint
from service.scoring.engine_states import States
from service.scoring.options import STDIN, Options
from service.scoring.progress import Progress
from service.scoring.readers import whole_numbers
from service.scoring.rows import Layout, Reject
from service.scoring.scorer import Scored, Scorer
from service.scoring.sources import Source, find, means
from service.scoring.window_assembly import Unit, units
from service.settings import Settings

DONE, REJECTED = 0, 3
AHEAD = 2  # units whose batches wait for the model, so that it never waits for them


def score(options: Options, settings: Settings) -> int:
    """Score a file to a file; returns the exit code: 0 done, 3 done with rejected rows.

    Raises:
        ServiceError: the job cannot go on; what was done of it is kept.
    """
    proof = (settings.model, settings.model_digest, 1, scorer.BATCH, settings.deterministic)
    model = model_loader.open_model(*proof)
    layout, temperature = Layout(options, model), options.temperature or model.manifest.temperature
    job = Job(options.output)
    try:
        _check(options)
        with job:
            sources = find(options.inputs, _spooled(options, job.folder))
            identity = _identity(options, sources, model, temperature) | {"deterministic": settings.deterministic}
            code = _already(options, identity)
            if code is not None:
                job.forget(identity)
            else:
                job.begin(identity, options.restart)
                code = _Run(options, job, model, layout, sources, temperature, settings).run()
            return code
    except KeyboardInterrupt:
        kept = "; the same command goes on from here" if job.folder.exists() else ""
        raise ServiceError(f"stopped{kept}") from None
    except OSError as error:
        raise ServiceError(f"{error.filename or options.output}: {error.strerror or error}") from None


class _Run:
    """One run of a job."""

    def __init__(
        self,
        options: Options,
        job: Job,
        model: Model,
        layout: Layout,
        sources: list[Source],
        temperature: float,
        settings: Settings,
    ) -> None:
        self.options, self.job, self.model, self.layout, self.sources = options, job, model, layout, sources
        self.files = [source.name for source in sources]
        here = options.engine != "ray"  # else every actor opens its own
        self.scorer = Scorer(model, temperature, open_histories(settings.model, model) if here else None)
        self.settings = settings
        self.whole_numbers = whole_numbers(sources, options.engine_column)
        self.labelled = options.truth_column is not None
        self.rejected = outputs.Rejected(job.folder / "rejected.parquet", fingerprint(job.identity))
        self.progress = Progress(options.quiet, options.interval)
        self._tables: dict[str, list[Any]] = {}
        self._part = Part(0, 0)
        self._writing: Future[None] | None = None
        self._bins = DriftBins(self.model.manifest, self.model.input_shape)

    def run(self) -> int:
        """Everything, in order; returns the exit code."""
        with self.progress, ThreadPoolExecutor(1) as self._writer:
            for scored in self._scored():
                self._keep(scored)
            if self._part.units or not self.job.parts:
                self._close_part()
            self._written()
        self.rejected.close()
        about = self._about | {"fingerprint": fingerprint(self.job.identity), "rejected": str(self.rejected.count)}
        if self.options.report:
            self._report(self.options.report)
        self.job.finish(about, self.rejected.path if self.rejected.count else None)
        self.progress.done(str(self.options.output))
        return REJECTED if self.rejected.count else DONE

    def _scored(self) -> Iterator[Scored]:
        """Every unit that stands in no part yet, with its answers."""
        done, unanswered = self.job.units, self.job.unanswered()
        with closing(self._answered(done)) as answered:
            for number, (unit, found) in enumerate(answered):
                if found is None:
                    self._skip(unit, unanswered.get(number, []))
                else:
                    yield self.scorer.end(unit, found, self.files, self.labelled)

    def _answered(self, done: int) -> Generator[tuple[Unit, Answers | None]]:
        if self.options.engine == "ray":
            from service.scoring import ray_job

            about = (self.settings.model, self.settings.deterministic, self.scorer.temperature, done)
            return ray_job.answered(self.options, self.sources, *about)
        return self._locally(done)

    def _locally(self, done: int) -> Generator[tuple[Unit, Answers | None]]:
        """One thread reads, some infer, and whoever asks here writes."""
        waiting = deque[tuple[Unit, list[Future[Answers]] | None]]()
        reader, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(self.settings.threads or allowed_cores())
        with closing(States.of(self.model, self.job.folder)) as states:
            try:
                found = units(self.options, self.layout, self.sources, states)
                for number, unit in enumerate(_prefetched(reader, found)):
                    begun = None if number < done else [pool.submit(call) for call in self.scorer.batches(unit)]
                    waiting.append((unit, begun))
                    if len(waiting) > AHEAD:
                        yield self._waited(*waiting.popleft())
                while waiting:
                    yield self._waited(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)
                reader.shutdown(cancel_futures=True)

    def _waited(self, unit: Unit, begun: list[Future[Answers]] | None) -> tuple[Unit, Answers | None]:
        return unit, None if begun is None else self.scorer.together(unit, [future.result() for future in begun])

    def _skip(self, unit: Unit, unanswered: list[Reject]) -> None:
        self._reject([*unit.rejects, *unanswered])
        self.progress.skip(len(unit.starts) - len(unanswered), unit.engines, self.rejected.count, unit.fraction)

    def _keep(self, scored: Scored) -> None:
        """Put a unit into the part that is being filled."""
        unit = scored.unit
        self._reject([*unit.rejects, *scored.unanswered])
        tables = {"part": self._table(scored).replace_schema_metadata(self._about)}
        if self.options.report:
            tables["report"] = self._side(scored)
        for kind, table in tables.items():
            self._tables.setdefault(kind, []).append(table)
        if scored.unanswered:
            self._part.unanswered[str(self._part.units)] = [list(row) for row in scored.unanswered]
        self._part.units += 1
        self._part.rows += len(scored.kept)
        self.progress.tell(len(scored.kept), unit.engines, self.rejected.count, unit.fraction)
        if self._part.rows >= self.options.part_rows:
            self._close_part()

    def _table(self, scored: Scored) -> Any:
        options = self.options
        columns = (options.engine_column, options.cycle_column, self.whole_numbers)
        return scorer.table(scored, self.model, *columns)

    def _close_part(self) -> None:
        """Have the part written, once the one before it is."""
        import pyarrow as pa

        self._written()
        tables, part = self._tables, self._part
        self._tables, self._part = {}, Part(0, 0)
        joined = {kind: pa.concat_tables(those).combine_chunks() for kind, those in tables.items()}
        self._writing = self._writer.submit(self.job.add, joined, part)

    def _written(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _reject(self, rejects: list[Reject]) -> None:
        if rejects and self.options.strict:
            first = rejects[0]
            raise InvalidInput(f"{first.file}, row {first.row}: {first.reason}")
        self.rejected.add(rejects)

    def _side(self, scored: Scored) -> Any:
        from service.scoring import report  # what only a report needs

        return report.side(scored, self.model.manifest.window, self._bins)

    def _report(self, path: Path) -> None:
        import pyarrow as pa

        from service.scoring import report

        context = report.context_of(self.model, self.scorer.temperature, self._bins)
        table = pa.concat_tables([outputs.read_part(self.job.part(k, "report")) for k in range(len(self.job.parts))])
        source = "outcome" if self.options.rul else "inspection"
        body = report.measured(table, context, source) | {"fingerprint": fingerprint(self.job.identity)}
        report.write(path, body, self.model.manifest.classes)

    @property
    def _about(self) -> dict[str, str]:
        manifest = self.model.manifest
        names = {"model_name": manifest.name, "model_version": manifest.version, "model_digest": self.model.digest}
        return names | {"temperature": repr(self.scorer.temperature), "command": self.options.command}


def _prefetched(reader: ThreadPoolExecutor, units: Iterator[Unit]) -> Iterator[Unit]:
    """The same, each fetched while the one before is worked on."""
    following = reader.submit(next, units, None)
    while (unit := following.result()) is not None:
        following = reader.submit(next, units, None)
        yield unit


def _check(options: Options) -> None:
    """Refuse an output that could not be written, or that would be read next time."""
    output = options.output
    if not output.suffix and output.exists() and not outputs.is_ours(output):
        raise InvalidInput(f"{output}: is no folder that a job wrote; it is left as it is")
    if options.report in (outputs.about_path(output), errors_of(output)) or _within(options.report, output):
        raise InvalidInput(f"{options.report}: is a name of the output's own; the report needs another one")
    for path in _left(options):
        if path.is_dir() and (path != output or output.suffix):
            raise InvalidInput(f"{path}: is a folder")
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise InvalidInput(f"{path}: its folder is not there, or cannot be written to")
        for name in options.inputs:
            if name != STDIN and means(name, path):
                raise InvalidInput(f"{path}: lies in the input {name}, and would be read the next time")


def _left(options: Options) -> list[Path]:
    """The files that a job leaves."""
    beside = [] if options.report is None else [options.report]
    about = [outputs.about_path(options.output)] if options.form == ".csv" else []
    return [options.output, errors_of(options.output), *about, *beside]


def _within(report: Path | None, folder: Path) -> bool:
    """Whether a report would lie in an output that is a folder, and is replaced as a whole."""
    return report is not None and not folder.suffix and report.resolve().is_relative_to(folder.resolve())


def _spooled(options: Options, folder: Path) -> Path:
    """Where standard input is kept, if it is an input: it can be read twice then, and told from another."""
    kept = folder / "stdin"
    if STDIN in options.inputs:
        if sys.stdin is None:
            raise InvalidInput("standard input: is closed")
        with kept.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return kept


def _identity(options: Options, sources: list[Source], model: Model, temperature: float) -> dict[str, Any]:
    """Everything that the result depends on."""
    import pyarrow as pa

    read = [[source.name, source.size, source.digest()] for source in sources]
    software = f"onnxruntime {ort.__version__}, pyarrow {pa.__version__}"
    about = {"model": model.digest, "temperature": temperature, "input": read}
    return about | options.deciding | {"software": software, "command": options.command}


def _already(options: Options, identity: dict[str, Any]) -> int | None:
    """The exit code of this very job, if its whole result is there already."""
    about, mark = outputs.about_of(options.output), fingerprint(identity)
    if options.restart or about.get("fingerprint") != mark or not options.output.exists():
        return None
    if options.report and not (options.report.exists() and mark in options.report.read_text(errors="replace")):
        return None
    errors = errors_of(options.output)
    if about.get("rejected") == "0":  # else they are of a job that was killed before its output had its name
        return None if errors.exists() else DONE
    return None if options.strict or outputs.about_of(errors).get("fingerprint") != mark else REJECTED
