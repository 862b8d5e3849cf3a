"""The files of a job, in the order in which they are read, and what each of them is. Knows names and first bytes."""

import glob
import hashlib
import os
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from service.errors import InvalidInput
from service.scoring.options import STDIN

KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = (".gz", ".zst")
SNIFFED = 2**16  # bytes that tell what a file without a telling name is
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_SUBSET = re.compile(r"(train|test)_(FD\d{3})\.txt")


@dataclass(frozen=True)
class Source:
    """One file. `name` is what it is called in messages and in the file of rejected rows."""

    path: Path
    name: str
    kind: str  # parquet, csv, tsv, json or cmapss
    packed: str | None  # gzip, zstd or not
    size: int  # bytes
    partition: dict[str, str | None] = field(default_factory=dict)  # columns that its folders name

    @property
    def subset(self) -> str | None:
        """`FD001` of `test_FD001.txt`: units of different subsets are different engines."""
        found = _SUBSET.search(self.name)
        return found[2] if found and self.kind == "cmapss" else None

    def open(self) -> Any:
        """A binary stream of its content, inflated (pyarrow)."""
        import pyarrow as pa

        return pa.input_stream(str(self.path), compression=self.packed, buffer_size=SNIFFED)

    def digest(self) -> str:
        """Of its bytes as they lie there."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def find(inputs: tuple[str, ...], spooled: Path) -> list[Source]:
    """The files that some inputs mean: files, folders, globs, or `-` for what was kept of standard input.

    Raises:
        InvalidInput: there is none, one cannot be read, or two hold other engines under the same names.
    """
    found = [source for name in inputs for source in _sources(name, spooled)]
    if not found:
        raise InvalidInput(f"{', '.join(inputs)}: no file that could be scored")
    subsets: dict[str, str] = {}
    for source in found:
        other = subsets.setdefault(source.subset or source.name, source.name)
        if source.subset and _SUBSET.search(other)[1] != _SUBSET.search(source.name)[1]:  # type: ignore[index]  # both have a subset
            raise InvalidInput(f"{source.name}: its units are not those of {other}: score them apart")
    return found


def means(name: str, path: Path) -> bool:
    """Whether an input would be, or hold, a file: by its name alone, since the file may not be there yet."""
    if Path(name).exists() or not glob.has_magic(name):
        return path.resolve().is_relative_to(Path(name).resolve())
    parts, pattern = (Path(os.path.abspath(one)).parts for one in (path, name))
    return _fits(parts, pattern)


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the folders and the name of a path fit a glob's, in which `**` is any number of folders, none too."""
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _sources(name: str, spooled: Path) -> list[Source]:
    if name == STDIN:
        return [_source(spooled, "standard input", {})]
    if Path(name).is_dir():
        files = [path for path in Path(name).rglob("*") if path.is_file() and _is_data(path.relative_to(name))]
        files.sort(key=lambda path: _natural(str(path)))
        return [_source(path, str(path), _partition(path.relative_to(name))) for path in files]
    if Path(name).exists() or not glob.has_magic(name):
        return [_source(Path(name), name, {})]
    files = [Path(match) for match in sorted(glob.glob(name, recursive=True), key=_natural)]
    return [_source(path, str(path), _partition(path)) for path in files if path.is_file()]


def _source(path: Path, name: str, partition: dict[str, str | None]) -> Source:
    try:
        name.encode()
    except UnicodeEncodeError:  # it could stand in no metadata, and in no file of rejected rows
        raise InvalidInput(f"{name!a}: a name that is no UTF-8") from None
    try:
        if path.exists() and not path.is_file():  # a pipe can be read once, and a resumed job reads again
            raise InvalidInput(f"{name}: is no regular file; - reads what is piped in")
        with path.open("rb") as file:
            first = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        raise InvalidInput(f"{name}: {error.strerror}") from None
    if size == 0:
        raise InvalidInput(f"{name}: is empty")
    packed = next((kind for magic, kind in PACKED.items() if first.startswith(magic)), None)
    kind = KINDS.get(_suffix(path))
    source = Source(path, name, kind or "", packed, size, partition)
    return source if kind else Source(path, name, _sniffed(source), packed, size, partition)


def _sniffed(source: Source) -> str:
    """What a file is by its first bytes: Parquet, JSON lines, a header with commas or tabs, or nothing but numbers."""
    try:
        with source.open() as stream:
            head: bytes = stream.read(SNIFFED)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{source.name}: {_line(error)}") from None
    if not head.strip():
        raise InvalidInput(f"{source.name}: is empty")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.lstrip().startswith(b"{"):
        return "json"
    line = head.lstrip(b"\xef\xbb\xbf\r\n").partition(b"\n")[0]
    if re.fullmatch(rb"[\s0-9.eE+-]*", line):
        return "cmapss"
    return "tsv" if line.count(b"\t") > line.count(b",") else "csv"


def _suffix(path: Path) -> str:
    """`.csv` of `a.csv.gz`."""
    return (Path(path.stem) if path.suffix.lower() in SUFFIXES else path).suffix.lower()


def _is_data(path: Path) -> bool:
    """Whether a file of a folder is meant: no hidden one, no notes, no truths, but data by its name."""
    hidden = any(part.startswith(("_", ".")) for part in path.parts)
    return not hidden and (_suffix(path) in KINDS or _SUBSET.match(path.name) is not None)


def _partition(path: Path) -> dict[str, str | None]:
    pairs = [part.split("=", 1) for part in path.parts[:-1] if "=" in part]
    return {key: None if value == NO_VALUE else unquote(value) for key, value in pairs}


def _natural(text: str) -> list[tuple[int, str]]:
    """`part-2` before `part-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
