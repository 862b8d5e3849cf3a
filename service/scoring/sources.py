"""Input files of a job in reading order, with the format of each, found by name or first bytes."""

import glob
import os
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from service.errors import InvalidInput
from service.scoring.options import STDIN
from service.scoring.outputs import file_digest

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSION_SUFFIXES = (".gz", ".zst")
DETECTION_BYTES = 2**16  # bytes that are read to detect the format of a file without a known suffix
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_SUBSET_FILE = re.compile(r"(train|test)_(FD\d{3})\.txt")


@dataclass(frozen=True)
class Source:
    """One file. `name` identifies it in messages and in the file of rejected rows."""

    path: Path
    name: str
    kind: str  # parquet, csv, tsv, json or cmapss
    compression: str | None  # gzip or zstd
    size: int  # bytes
    partition: dict[str, str | None] = field(default_factory=dict)  # columns of its Hive folders

    @property
    def subset(self) -> str | None:
        """`FD001` of `test_FD001.txt`: the same unit number of two subsets means two engines."""
        match = _SUBSET_FILE.search(self.name)
        return match[2] if match and self.kind == "cmapss" else None

    def open_stream(self) -> Any:
        """Open a pyarrow stream of the decompressed content."""
        import pyarrow as pa

        return pa.input_stream(str(self.path), compression=self.compression, buffer_size=DETECTION_BYTES)

    def digest(self) -> str:
        """Return the digest of the stored bytes."""
        return file_digest(self.path)


def find_sources(inputs: tuple[str, ...], spooled: Path) -> list[Source]:
    """Return the files of all inputs: files, folders, globs, or `-` for the spooled standard input.

    Raises:
        InvalidInput: there is no file, a file cannot be read, or two files use the same ids for different engines.
    """
    sources = [source for name in inputs for source in _expand_input(name, spooled)]
    if not sources:
        raise InvalidInput(
            f"{', '.join(inputs)}: no file to score; expected Parquet, CSV, TSV, JSON lines or C-MAPSS text"
        )
    subsets: dict[str, str] = {}
    for source in sources:
        other = subsets.setdefault(source.subset or source.name, source.name)
        if source.subset and _SUBSET_FILE.search(other)[1] != _SUBSET_FILE.search(source.name)[1]:  # type: ignore[index]  # both have a subset
            raise InvalidInput(
                f"{source.name}: its engines differ from those of {other} with the same ids; score the files separately"
            )
    return sources


def input_contains(name: str, path: Path) -> bool:
    """Return whether an input is, or contains, a file that need not exist yet."""
    if Path(name).exists() or not glob.has_magic(name):
        return path.resolve().is_relative_to(Path(name).resolve())
    parts, pattern = (Path(os.path.abspath(file)).parts for file in (path, name))
    return _matches_glob(parts, pattern)


def _matches_glob(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether the parts of a path match those of a glob. `**` matches any number of folders."""
    if not pattern or not parts:
        return not parts and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _matches_glob(parts, pattern[1:]) or _matches_glob(parts[1:], pattern)
    return fnmatch(parts[0], pattern[0]) and _matches_glob(parts[1:], pattern[1:])


def _expand_input(name: str, spooled: Path) -> list[Source]:
    if name == STDIN:
        return [_inspect_file(spooled, "standard input", {})]
    if Path(name).is_dir():
        files = [path for path in Path(name).rglob("*") if path.is_file() and _is_data(path.relative_to(name))]
        files.sort(key=lambda path: _natural_key(str(path)))
        return [_inspect_file(path, str(path), _partition_columns(path.relative_to(name))) for path in files]
    if Path(name).exists() or not glob.has_magic(name):
        return [_inspect_file(Path(name), name, {})]
    files = [Path(match) for match in sorted(glob.glob(name, recursive=True), key=_natural_key)]
    return [_inspect_file(path, str(path), _partition_columns(path)) for path in files if path.is_file()]


def _inspect_file(path: Path, name: str, partition: dict[str, str | None]) -> Source:
    try:
        name.encode()
    except UnicodeEncodeError:  # Parquet metadata and the file of rejected rows need UTF-8
        raise InvalidInput(f"{name!a}: the name is not UTF-8") from None
    try:
        if path.exists() and not path.is_file():  # a resumed job reads its input again, which a pipe cannot do
            raise InvalidInput(f"{name}: is not a regular file; use - to read from a pipe")
        with path.open("rb") as file:
            first = file.read(4)
        size = path.stat().st_size
    except OSError as error:
        raise InvalidInput(f"{name}: {error.strerror}") from None
    if size == 0:
        raise InvalidInput(f"{name}: is empty")
    compression = next((kind for magic, kind in COMPRESSION_MAGIC.items() if first.startswith(magic)), None)
    kind = FORMATS.get(_suffix(path))
    source = Source(path, name, kind or "", compression, size, partition)
    return source if kind else Source(path, name, _detect_format(source), compression, size, partition)


def _detect_format(source: Source) -> str:
    """Detect the format by the first bytes: Parquet, JSON lines, a header with commas or tabs, or only numbers."""
    try:
        with source.open_stream() as stream:
            head: bytes = stream.read(DETECTION_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{source.name}: {_first_line(error)}") from None
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
    """Return `.csv` for `a.csv.gz`."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSION_SUFFIXES else path).suffix.lower()


def _is_data(path: Path) -> bool:
    """Return whether a file of a folder is telemetry by its name: not hidden, not notes, not RUL labels."""
    hidden = any(part.startswith(("_", ".")) for part in path.parts)
    return not hidden and (_suffix(path) in FORMATS or _SUBSET_FILE.match(path.name) is not None)


def _partition_columns(path: Path) -> dict[str, str | None]:
    pairs = [part.split("=", 1) for part in path.parts[:-1] if "=" in part]
    return {key: None if value == HIVE_NULL else unquote(value) for key, value in pairs}


def _natural_key(text: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `part-2` before `part-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
