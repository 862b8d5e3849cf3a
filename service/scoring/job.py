"""Run a scoring job: read, infer and write concurrently, and resume an interrupted job."""

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
from service.inference.cpu import available_cpus
from service.inference.drift_bins import DriftBins
from service.inference.onnx_model import Model
from service.inference.overlap_graph import open_overlap_graph
from service.inference.predictions import Predictions
from service.scoring import outputs, scorer
from service.scoring.checkpoint import Checkpoint, PartRecord, compute_fingerprint
from service.scoring.engine_states import EngineStates
from service.scoring.options import STDIN, Options
from service.scoring.progress import Progress, log_already_finished
from service.scoring.readers import engine_ids_are_integers
from service.scoring.rows import Layout, Reject
from service.scoring.scorer import Scored, Scorer
from service.scoring.sources import Source, find_sources, input_contains
from service.scoring.window_assembly import WorkUnit, assemble_units
from service.settings import Settings

EXIT_DONE, EXIT_REJECTED = 0, 3
UNITS_AHEAD = 2  # units queued for the model, so that it is never idle


def score_files(options: Options, settings: Settings) -> int:
    """Score files to an output. Return the exit code: 0 done, 3 done with rejected rows.

    Raises:
        ServiceError: the job failed. Its finished parts stay in the checkpoint.
    """
    model_arguments = (settings.model, settings.model_digest, 1, scorer.BATCH_WINDOWS, settings.deterministic)
    model = model_loader.open_model(*model_arguments)
    layout, temperature = Layout(options, model), options.temperature or model.manifest.temperature
    checkpoint = Checkpoint(options.output)
    try:
        _check_output(options)
        with checkpoint:
            sources = find_sources(options.inputs, _spool_stdin(options, checkpoint.folder))
            identity = _build_identity(options, sources, model, temperature) | {"deterministic": settings.deterministic}
            exit_code = _finished_exit_code(options, identity)
            if exit_code is not None:
                checkpoint.discard_finished(identity)
                if not options.quiet:
                    log_already_finished(str(options.output), _rejected_file(options, exit_code == EXIT_REJECTED))
            else:
                checkpoint.resume_or_start(identity, options.restart)
                job = _ScoringJob(options, checkpoint, model, layout, sources, temperature, settings)
                exit_code = job.run()
            return exit_code
    except KeyboardInterrupt:
        hint = "; run the same command to resume" if checkpoint.folder.exists() else ""
        raise ServiceError(f"stopped{hint}") from None
    except OSError as error:
        raise ServiceError(f"{error.filename or options.output}: {error.strerror or error}") from None


class _ScoringJob:
    """One run of a job, from its checkpoint to its output."""

    def __init__(
        self,
        options: Options,
        checkpoint: Checkpoint,
        model: Model,
        layout: Layout,
        sources: list[Source],
        temperature: float,
        settings: Settings,
    ) -> None:
        self.options, self.checkpoint, self.model = options, checkpoint, model
        self.layout, self.sources = layout, sources
        self.files = [source.name for source in sources]
        local = options.backend != "ray"  # on Ray every actor opens its own graph
        self.scorer = Scorer(model, temperature, open_overlap_graph(settings.model, model) if local else None)
        self.settings = settings
        self.integer_ids = engine_ids_are_integers(sources, options.engine_column)
        self.labelled = options.truth_column is not None
        rejected_path = checkpoint.folder / f"rejected{outputs.rejected_rows_path(options.output).suffix}"
        self.rejected = outputs.RejectedRowsFile(rejected_path, compute_fingerprint(checkpoint.identity))
        self.progress = Progress(options.quiet, options.interval)
        self._tables: dict[str, list[Any]] = {}
        self._part = PartRecord(0, 0)
        self._pending_write: Future[None] | None = None
        self._bins = DriftBins(self.model.manifest, self.model.input_shape)

    def run(self) -> int:
        """Score all units in order, publish the output, and return the exit code."""
        with self.progress, ThreadPoolExecutor(1) as self._writer:
            for scored in self._score_units():
                self._append_unit(scored)
            if self._part.units or not self.checkpoint.parts:
                self._submit_part()
            self._wait_for_part()
        self.rejected.close()
        fingerprint, count = compute_fingerprint(self.checkpoint.identity), self.rejected.count
        metadata = self._metadata | {"fingerprint": fingerprint, "rejected": str(count)}
        if count and self.options.output_format == ".csv":  # a CSV of rejected rows cannot contain the fingerprint
            metadata["rejected_digest"] = outputs.file_digest(self.rejected.path)
        if self.options.report:
            self._write_report(self.options.report)
        self.checkpoint.publish(metadata, self.rejected.path if count else None)
        self.progress.log_finished(str(self.options.output), _rejected_file(self.options, count > 0))
        return EXIT_REJECTED if count else EXIT_DONE

    def _score_units(self) -> Iterator[Scored]:
        """Yield every unit that is in no finished part, with its predictions."""
        finished_units, unanswered = self.checkpoint.finished_units, self.checkpoint.unanswered_rows()
        with closing(self._answer_units(finished_units)) as answered:
            for number, (unit, answers) in enumerate(answered):
                if answers is None:
                    self._skip_unit(unit, unanswered.get(number, []))
                else:
                    yield self.scorer.finish_unit(unit, answers, self.files, self.labelled)

    def _answer_units(self, finished_units: int) -> Generator[tuple[WorkUnit, Predictions | None]]:
        if self.options.backend == "ray":
            from service.scoring import ray_job

            settings = (self.settings.model, self.settings.deterministic, self.scorer.temperature, finished_units)
            return ray_job.stream_answers(self.options, self.sources, *settings)
        return self._answer_locally(finished_units)

    def _answer_locally(self, finished_units: int) -> Generator[tuple[WorkUnit, Predictions | None]]:
        """Read units in one thread and predict them in a pool. The caller writes them."""
        queue = deque[tuple[WorkUnit, list[Future[Predictions]] | None]]()
        reader, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(self.settings.threads or available_cpus())
        with closing(EngineStates.for_model(self.model, self.checkpoint.folder)) as states:
            try:
                assembled = assemble_units(self.options, self.layout, self.sources, states)
                for number, unit in enumerate(_prefetch_units(reader, assembled)):
                    futures = None
                    if number >= finished_units:
                        futures = [pool.submit(call) for call in self.scorer.inference_calls(unit)]
                    queue.append((unit, futures))
                    if len(queue) > UNITS_AHEAD:
                        yield self._wait_for_answers(*queue.popleft())
                while queue:
                    yield self._wait_for_answers(*queue.popleft())
            finally:
                pool.shutdown(cancel_futures=True)
                reader.shutdown(cancel_futures=True)

    def _wait_for_answers(
        self, unit: WorkUnit, futures: list[Future[Predictions]] | None
    ) -> tuple[WorkUnit, Predictions | None]:
        if futures is None:
            return unit, None
        return unit, self.scorer.join_answers(unit, [future.result() for future in futures])

    def _skip_unit(self, unit: WorkUnit, unanswered: list[Reject]) -> None:
        self._add_rejected([*unit.rejects, *unanswered])
        self.progress.skip_rows(
            len(unit.starts) - len(unanswered), unit.engine_count, self.rejected.count, unit.input_fraction
        )

    def _append_unit(self, scored: Scored) -> None:
        """Append a unit to the current part."""
        unit = scored.unit
        self._add_rejected([*unit.rejects, *scored.unanswered])
        tables = {"part": self._output_table(scored).replace_schema_metadata(self._metadata)}
        if self.options.report:
            tables["report"] = self._report_rows(scored)
        for kind, table in tables.items():
            self._tables.setdefault(kind, []).append(table)
        if scored.unanswered:
            self._part.unanswered[str(self._part.units)] = [list(row) for row in scored.unanswered]
        self._part.units += 1
        self._part.rows += len(scored.finite_rows)
        self.progress.advance(len(scored.finite_rows), unit.engine_count, self.rejected.count, unit.input_fraction)
        if self._part.rows >= self.options.part_rows:
            self._submit_part()

    def _output_table(self, scored: Scored) -> Any:
        options = self.options
        columns = (options.engine_column, options.cycle_column, self.integer_ids)
        return scorer.output_table(scored, self.model, *columns)

    def _submit_part(self) -> None:
        """Submit the current part to the writer thread, after the previous part is written."""
        import pyarrow as pa

        self._wait_for_part()
        tables, part = self._tables, self._part
        self._tables, self._part = {}, PartRecord(0, 0)
        joined = {kind: pa.concat_tables(unit_tables).combine_chunks() for kind, unit_tables in tables.items()}
        self._pending_write = self._writer.submit(self.checkpoint.add_part, joined, part)

    def _wait_for_part(self) -> None:
        if self._pending_write is not None:
            self._pending_write.result()

    def _add_rejected(self, rejects: list[Reject]) -> None:
        if rejects and self.options.strict:
            rejected = rejects[0]
            raise InvalidInput(f"{rejected.file}, row {rejected.row}: {rejected.reason}")
        self.rejected.add_rows(rejects)

    def _report_rows(self, scored: Scored) -> Any:
        from service.scoring import report  # only a report needs its packages

        return report.report_rows(scored, self.model.manifest.window, self._bins)

    def _write_report(self, path: Path) -> None:
        import pyarrow as pa

        from service.scoring import report

        context = report.build_context(self.model, self.scorer.temperature, self._bins)
        paths = [self.checkpoint.part_path(k, "report") for k in range(len(self.checkpoint.parts))]
        table = pa.concat_tables([outputs.read_part(path) for path in paths])
        source = "outcome" if self.options.rul else "inspection"
        fingerprint = compute_fingerprint(self.checkpoint.identity)
        body = report.evaluate_rows(table, context, source) | {"fingerprint": fingerprint}
        report.write_report(path, body, self.model.manifest.classes)

    @property
    def _metadata(self) -> dict[str, str]:
        manifest = self.model.manifest
        model_fields = {
            "model_name": manifest.name,
            "model_version": manifest.version,
            "model_digest": self.model.digest,
        }
        return model_fields | {"temperature": repr(self.scorer.temperature), "command": self.options.command}


def _prefetch_units(reader: ThreadPoolExecutor, units: Iterator[WorkUnit]) -> Iterator[WorkUnit]:
    """Yield the units, each read while the caller processes the previous one."""
    next_unit = reader.submit(next, units, None)
    while (unit := next_unit.result()) is not None:
        next_unit = reader.submit(next, units, None)
        yield unit


def _check_output(options: Options) -> None:
    """Reject an output that cannot be written, or that the next run would read as input."""
    output = options.output
    if not output.suffix and output.exists() and not outputs.is_job_output(output):
        raise InvalidInput(
            f"{output}: the folder has files that no job wrote, so it is not replaced; choose another OUTPUT"
        )
    used_paths = (outputs.metadata_path(output), outputs.rejected_rows_path(output))
    if options.report in used_paths or _is_inside(options.report, output):
        raise InvalidInput(f"{options.report}: the output uses this name; choose another name for the report")
    for path in _output_files(options):
        if path.is_dir() and (path != output or output.suffix):
            raise InvalidInput(f"{path}: is a folder; expected the name of a file")
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise InvalidInput(f"{path}: its folder does not exist or is not writable")
        for name in options.inputs:
            if name != STDIN and input_contains(name, path):
                raise InvalidInput(
                    f"{path}: is part of the input {name}, so the next run would read it; choose another name"
                )


def _output_files(options: Options) -> list[Path]:
    """Return the files that a job writes."""
    report = [] if options.report is None else [options.report]
    metadata = [outputs.metadata_path(options.output)] if options.output_format == ".csv" else []
    return [options.output, outputs.rejected_rows_path(options.output), *metadata, *report]


def _rejected_file(options: Options, has_rejected: bool) -> str | None:
    """Return the name of the file of rejected rows, or None if no row was rejected."""
    return str(outputs.rejected_rows_path(options.output)) if has_rejected else None


def _is_inside(report: Path | None, folder: Path) -> bool:
    """Return whether a report is in an output folder, which is replaced as a whole."""
    return report is not None and not folder.suffix and report.resolve().is_relative_to(folder.resolve())


def _spool_stdin(options: Options, folder: Path) -> Path:
    """Copy standard input, if it is an input, to a file, which can be read twice and has a digest."""
    path = folder / "stdin"
    if STDIN in options.inputs:
        if sys.stdin is None:
            raise InvalidInput("standard input: is closed")
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def _build_identity(options: Options, sources: list[Source], model: Model, temperature: float) -> dict[str, Any]:
    """Return everything that the result depends on."""
    import pyarrow as pa

    files = [[source.name, source.size, source.digest()] for source in sources]
    software = f"onnxruntime {ort.__version__}, pyarrow {pa.__version__}"
    values = {"model": model.digest, "temperature": temperature, "input": files}
    return values | options.result_options | {"software": software, "command": options.command}


def _finished_exit_code(options: Options, identity: dict[str, Any]) -> int | None:
    """Return the exit code of this job if its result exists, else None."""
    metadata, fingerprint = outputs.read_metadata(options.output), compute_fingerprint(identity)
    if options.restart or metadata.get("fingerprint") != fingerprint or not options.output.exists():
        return None
    if options.report and not (options.report.exists() and fingerprint in options.report.read_text(errors="replace")):
        return None
    rejected = outputs.rejected_rows_path(options.output)
    if metadata.get("rejected") == "0":  # another job that was killed may have left a file of rejected rows
        return None if rejected.exists() else EXIT_DONE
    if options.strict or not _are_rejected_rows_of(rejected, metadata, fingerprint):
        return None
    return EXIT_REJECTED


def _are_rejected_rows_of(rejected: Path, metadata: dict[str, str], fingerprint: str) -> bool:
    """Return whether a file has the rejected rows of the job with this metadata and fingerprint."""
    if rejected.suffix == ".csv":
        return rejected.exists() and outputs.file_digest(rejected) == metadata.get("rejected_digest")
    return outputs.read_metadata(rejected).get("fingerprint") == fingerprint
