"""Tables to files: parts while a job runs, one file at its end. What has its final name is whole, and on the disk."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REJECT_ROWS = 2**16  # of a row group of the rejected rows
OWN_PART = re.compile(r"part-\d{5,}\.parquet")
BETWEEN = "|"  # the classes of a prediction set in CSV, which knows no lists


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside a file; what was written there is on the disk when it gets its name."""
    beside = path.with_name(path.name + ".tmp")
    yield beside
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder be on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_part(table: Any, path: Path) -> None:
    """One part of the output: Parquet, or Arrow's own form for what is written again at the end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole(path) as beside:
        if path.suffix == ".parquet":
            pq.write_table(table, beside, compression="zstd", row_group_size=max(table.num_rows, 1))
        else:
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)


def read_part(path: Path) -> Any:
    """What `write_part` wrote in Arrow's form."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def assemble(parts: list[Path], target: Path, about: dict[str, str]) -> None:
    """One file of all parts, a row group each, with what is to be known about it."""
    write = _csv if target.suffix.lower() == ".csv" else _parquet
    with whole(target) as beside:
        write(parts, beside, about)


def _parquet(parts: list[Path], target: Path, about: dict[str, str]) -> None:
    import pyarrow.parquet as pq

    schema = read_part(parts[0]).schema.with_metadata(about)
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for path in parts:
            part = read_part(path)
            writer.write_table(part.replace_schema_metadata(about), row_group_size=max(part.num_rows, 1))


def _csv(parts: list[Path], target: Path, _: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.csv as pacsv

    with pa.OSFile(str(target), "wb") as sink:
        for k, path in enumerate(parts):
            pacsv.write_csv(
                _flat(read_part(path)), sink, pacsv.WriteOptions(include_header=k == 0, quoting_style="needed")
            )


def _flat(part: Any) -> Any:
    """Lists as texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for k, field in enumerate(part.schema):
        if pa.types.is_list(field.type):
            part = part.set_column(k, field.name, pc.binary_join(part.column(k), BETWEEN))
    return part


def about_of(output: Path) -> dict[str, str]:
    """What is known about a finished output; nothing if there is none that a job wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if output.suffix.lower() == ".parquet":
            found = pq.read_schema(output).metadata or {}
            return {key.decode(): value.decode() for key, value in found.items() if key != b"ARROW:schema"}
        kept = json.loads(about_path(output).read_text())
        return {str(key): str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}
    except (OSError, ValueError, pa.ArrowException):
        return {}


def about_path(output: Path) -> Path:
    """Where it stands what is known about an output that has no room for it: CSV, and folders of parts."""
    return output / "_job.json" if not output.suffix else output.with_name(output.name + "-metadata.json")


def is_ours(folder: Path) -> bool:
    """Whether a folder is the result of a job and nothing else, or empty."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    about = about_path(folder).name
    return not names or (about in names and all(name == about or OWN_PART.fullmatch(name) for name in names))


def write_about(output: Path, about: dict[str, str], under: Path | None = None) -> None:
    """Keep what is known about such an output."""
    with whole(under or about_path(output)) as beside:
        beside.write_text(json.dumps(about, indent=1) + "\n")


class Rejected:
    """The file of rejected rows, written as they come; it says of which job they are."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        import pyarrow as pa

        columns = [("row", pa.int64()), ("file", pa.string()), ("reason", pa.string())]
        self._schema = pa.schema(columns, {"fingerprint": fingerprint})
        self.path, self.count = path, 0
        self._writer: Any = None
        self._rows: list[Any] = []

    def add(self, rejects: list[Any]) -> None:
        """Some more rows."""
        self.count += len(rejects)
        self._rows += rejects
        if len(self._rows) >= REJECT_ROWS:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._rows:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self._schema, compression="zstd")
        columns = zip(*self._rows, strict=True)
        self._writer.write_table(
            pa.table([pa.array(c, t) for c, t in zip(columns, self._schema.types, strict=True)], schema=self._schema)
        )
        self._rows = []
