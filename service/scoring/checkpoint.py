"""Checkpoint of a scoring job: its identity, its finished parts and their journal. It survives `kill -9`.

A part is finished when its line is in the journal. The line is written after the part is on disk. A resumed job reads
its input again, which is fast, and scores only rows that are in no finished part.
"""

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from service.errors import InvalidInput
from service.scoring import outputs
from service.scoring.rows import Reject

RESTART_HINT = "use --restart to discard its parts, or choose another OUTPUT"


@dataclass
class PartRecord:
    """Journal entry of a part: its numbers of units and rows, and its rows without a finite prediction, by unit."""

    units: int
    rows: int
    unanswered: dict[str, list[list[Any]]] = field(default_factory=dict)


class Checkpoint:
    """Folder of a job, locked while the job runs. On exit it is removed unless it has finished parts."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.parts: list[PartRecord] = []
        self.suffix = ".arrow" if output.suffix else ".parquet"
        self.identity: dict[str, Any] = {}

    def __enter__(self) -> "Checkpoint":
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"{self.output}: another job is writing this output; wait for it, or choose another OUTPUT"
            ) from None
        except OSError as error:
            raise InvalidInput(f"{self.folder}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self.folder / "journal").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def resume_or_start(self, identity: dict[str, Any], restart: bool) -> None:
        """Resume an earlier run of the same job, or start.

        Raises:
            InvalidInput: the folder belongs to another job. The message states the difference.
        """
        self.identity, identity_path = json.loads(json.dumps(identity)), self.folder / "job.json"
        if restart:
            for path in self.folder.iterdir():
                if path.name not in ("lock", "stdin"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not (self.folder / "journal").exists():
            with outputs.write_atomically(identity_path) as temporary:
                temporary.write_text(json.dumps(self.identity, indent=1))
        elif (stored := _read_json(identity_path)) != self.identity:
            difference = _describe_difference(stored or {}, self.identity)
            raise InvalidInput(f"{self.folder} belongs to another job: {difference}; {RESTART_HINT}")
        self.parts = list(self._read_journal())

    def discard_finished(self, identity: dict[str, Any]) -> None:
        """Remove the folder if a finished job was killed before it removed it."""
        if _read_json(self.folder / "job.json") == json.loads(json.dumps(identity)):
            self._remove_folder()

    @property
    def finished_units(self) -> int:
        """Number of units in finished parts."""
        return sum(part.units for part in self.parts)

    def unanswered_rows(self) -> dict[int, list[Reject]]:
        """Return the rows of finished parts without a finite prediction, by unit number."""
        rows_of_unit: dict[int, list[Reject]] = {}
        first_unit = 0
        for part in self.parts:
            unanswered = part.unanswered.items()
            rows_of_unit |= {first_unit + int(k): [Reject(*row) for row in rows] for k, rows in unanswered}
            first_unit += part.units
        return rows_of_unit

    def part_path(self, k: int, kind: str = "part") -> Path:
        """Return the path of a part. The parts of a folder output are its final files."""
        folder = self.folder / "whole" if self.suffix == ".parquet" and kind == "part" else self.folder
        return folder / f"{kind}-{k:05d}{self.suffix if kind == 'part' else '.arrow'}"

    def add_part(self, tables: dict[str, Any], part: PartRecord) -> None:
        """Write a finished part: its tables by kind, then its line in the journal."""
        for kind, table in tables.items():
            path = self.part_path(len(self.parts), kind)
            path.parent.mkdir(exist_ok=True)
            outputs.write_part(table, path)
        with (self.folder / "journal").open("ab") as journal:
            journal.write(json.dumps(vars(part)).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        if not self.parts:
            outputs.sync_folder(self.folder)
        self.parts.append(part)

    def publish(self, metadata: dict[str, str], rejected: Path | None) -> None:
        """Move the output and the rejected rows to their final names, then remove the folder."""
        parts = [self.part_path(k) for k in range(len(self.parts))]
        rejected_path = outputs.rejected_rows_path(self.output)
        if rejected is None:
            rejected_path.unlink(missing_ok=True)
        else:
            rejected.replace(rejected_path)
        if self.output.suffix:
            ready = self.folder / f"ready{self.output.suffix.lower()}"
            outputs.assemble_output(parts, ready, metadata)
            if self.output.suffix.lower() == ".csv":  # the metadata describe an earlier output
                outputs.metadata_path(self.output).unlink(missing_ok=True)
            ready.replace(self.output)
            if self.output.suffix.lower() == ".csv":
                outputs.write_metadata(self.output, metadata)  # must follow the output that they describe
        else:
            outputs.write_metadata(self.output, metadata, self.folder / "whole" / "_job.json")
            if self.output.exists():  # an earlier result; _check_output rejects a folder with other files
                shutil.rmtree(self.folder / "before", ignore_errors=True)  # left by a run that was killed at this point
                self.output.replace(self.folder / "before")
            (self.folder / "whole").replace(self.output)
        outputs.sync_folder(self.output.parent)
        self._remove_folder()

    def _remove_folder(self) -> None:
        """Remove the folder, the journal first: a folder without a journal has no finished parts."""
        (self.folder / "journal").unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _read_journal(self) -> Any:
        """Yield the parts before the first one whose line is incomplete or whose file is missing."""
        path = self.folder / "journal"
        if not path.exists():
            return
        content, length = path.read_bytes(), 0
        for k, line in enumerate(content.splitlines(keepends=True)):
            fields = _parse_line(line) if line.endswith(b"\n") else None
            if fields is None or not self.part_path(k).exists():
                break
            length += len(line)
            yield PartRecord(**fields)
        os.truncate(path, length)


def compute_fingerprint(identity: dict[str, Any]) -> str:
    """Return a digest of everything that the result depends on."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _describe_difference(stored: dict[str, Any], current: dict[str, Any]) -> str:
    for key, new in current.items():
        old = stored.get(key)
        if old != new and key == "input":
            return _describe_changed_input(old or [], new)
        if old != new:
            return f"{key} was {json.dumps(old)}, now it is {json.dumps(new)}"
    return "another version of engine-health started it"


def _describe_changed_input(old: list[Any], new: list[Any]) -> str:
    old_names, new_names = ([name for name, *_ in files] for files in (old, new))
    if old_names != new_names:
        return f"it read {len(old_names)} files, now {len(new_names)} other files or another order"
    return f"{next(file[0] for file, old_file in zip(new, old, strict=True) if file != old_file)} has changed"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
