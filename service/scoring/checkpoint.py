"""The folder of a job that runs: whose it is, which parts are whole, and what they answer. Survives `kill -9`.

A part counts once its line stands in the journal, which is written after the part is on the disk. A job that is started
again reads its input again, which is quick, and scores only what stands in no part.
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

RESTART = "--restart begins anew"


@dataclass
class Part:
    """What the journal knows of a part: how many units and rows are in it, and which rows had no answer, by unit."""

    units: int
    rows: int
    unanswered: dict[str, list[list[Any]]] = field(default_factory=dict)


class Job:
    """A job's folder, locked while it runs. Left empty-handed it is removed; with whole parts it stays."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.parts: list[Part] = []
        self.suffix = ".arrow" if output.suffix else ".parquet"
        self.identity: dict[str, Any] = {}

    def __enter__(self) -> "Job":
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"{self.output}: another job is writing it") from None
        except OSError as error:
            raise InvalidInput(f"{self.folder}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (self.folder / "journal").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def begin(self, identity: dict[str, Any], restart: bool) -> None:
        """Take up what an earlier run of the same job left, or begin.

        Raises:
            InvalidInput: what lies here is of another job; says what differs.
        """
        self.identity, kept = json.loads(json.dumps(identity)), self.folder / "job.json"
        if restart:
            for path in self.folder.iterdir():
                if path.name not in ("lock", "stdin"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not (self.folder / "journal").exists():
            with outputs.whole(kept) as beside:
                beside.write_text(json.dumps(self.identity, indent=1))
        elif (known := _json(kept)) != self.identity:
            raise InvalidInput(f"{self.folder} is of another job: {_difference(known or {}, self.identity)}; {RESTART}")
        self.parts = list(self._journal())

    def forget(self, identity: dict[str, Any]) -> None:
        """Remove what a killed job left that had finished."""
        if _json(self.folder / "job.json") == json.loads(json.dumps(identity)):
            self._remove()

    @property
    def units(self) -> int:
        """How many units stand in whole parts."""
        return sum(part.units for part in self.parts)

    def unanswered(self) -> dict[int, list[Reject]]:
        """Rows of whole parts that had no answer, by the number of their unit."""
        found: dict[int, list[Reject]] = {}
        before = 0
        for part in self.parts:
            found |= {before + int(k): [Reject(*row) for row in rows] for k, rows in part.unanswered.items()}
            before += part.units
        return found

    def part(self, k: int, kind: str = "part") -> Path:
        """Where a part stands; those of a folder are its files as they will be."""
        within = self.folder / "whole" if self.suffix == ".parquet" and kind == "part" else self.folder
        return within / f"{kind}-{k:05d}{self.suffix if kind == 'part' else '.arrow'}"

    def add(self, tables: dict[str, Any], part: Part) -> None:
        """Keep a whole part: its tables by kind, then its line in the journal."""
        for kind, table in tables.items():
            path = self.part(len(self.parts), kind)
            path.parent.mkdir(exist_ok=True)
            outputs.write_part(table, path)
        with (self.folder / "journal").open("ab") as journal:
            journal.write(json.dumps(vars(part)).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        if not self.parts:
            outputs.sync_folder(self.folder)
        self.parts.append(part)

    def finish(self, about: dict[str, str], rejected: Path | None) -> None:
        """Give the output its name, and the rejected rows theirs; then the folder is gone."""
        parts = [self.part(k) for k in range(len(self.parts))]
        errors = errors_of(self.output)
        if rejected is None:
            errors.unlink(missing_ok=True)
        else:
            rejected.replace(errors)
        if self.output.suffix:
            ready = self.folder / f"ready{self.output.suffix.lower()}"
            outputs.assemble(parts, ready, about)
            if self.output.suffix.lower() == ".csv":  # what stands there is of the output before
                outputs.about_path(self.output).unlink(missing_ok=True)
            ready.replace(self.output)
            if self.output.suffix.lower() == ".csv":
                outputs.write_about(self.output, about)  # behind the output: what it tells of is there
        else:
            outputs.write_about(self.output, about, self.folder / "whole" / "_job.json")
            if self.output.exists():  # an earlier result; a folder with anything else in it was refused at the start
                shutil.rmtree(self.folder / "before", ignore_errors=True)  # of a run that was killed just here
                self.output.replace(self.folder / "before")
            (self.folder / "whole").replace(self.output)
        outputs.sync_folder(self.output.parent)
        self._remove()

    def _remove(self) -> None:
        """Remove the folder, the journal first: without it the rest is a folder in which nothing was done yet."""
        (self.folder / "journal").unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _journal(self) -> Any:
        """Parts whose line is whole and whose files are there, up to the first that is not."""
        path = self.folder / "journal"
        if not path.exists():
            return
        content, length = path.read_bytes(), 0
        for k, line in enumerate(content.splitlines(keepends=True)):
            found = _parsed(line) if line.endswith(b"\n") else None
            if found is None or not self.part(k).exists():
                break
            length += len(line)
            yield Part(**found)
        os.truncate(path, length)


def fingerprint(identity: dict[str, Any]) -> str:
    """One word for everything that the result depends on."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def errors_of(output: Path) -> Path:
    """Where the rejected rows of an output stand."""
    return output.with_name(output.name + ".errors.parquet")


def _difference(known: dict[str, Any], now: dict[str, Any]) -> str:
    for key in now:
        before, after = known.get(key), now[key]
        if before != after and key == "input":
            return _changed(before or [], after)
        if before != after:
            return f"{key} was {json.dumps(before)}, now it is {json.dumps(after)}"
    return "it was begun by another version"


def _changed(before: list[Any], after: list[Any]) -> str:
    files = [[name for name, *_ in listed] for listed in (before, after)]
    if files[0] != files[1]:
        return f"it read {len(files[0])} files, now other ones or in another order ({len(files[1])})"
    return f"{next(a[0] for a, b in zip(after, before, strict=True) if a != b)} has changed"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
