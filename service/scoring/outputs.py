"""Write parts while a job runs, and the output at its end. A file with its final name is complete and on disk."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROW_GROUP_ROWS = 2**16  # rows of a row group in the file of rejected rows
PART_NAME = re.compile(r"part-\d{5,}\.parquet")
SET_SEPARATOR = "|"  # separates the classes of a prediction set in CSV


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path, then sync the file and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_part(table: Any, path: Path) -> None:
    """Write a part as Parquet, or as Arrow IPC if `assemble_output` reads it later."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with write_atomically(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(table, temporary, compression="zstd", row_group_size=max(table.num_rows, 1))
        else:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)


def read_part(path: Path) -> Any:
    """Read an Arrow IPC part of `write_part`."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def assemble_output(parts: list[Path], target: Path, metadata: dict[str, str]) -> None:
    """Write one file of all parts, with one row group per part and the metadata of the job."""
    write = _write_csv if target.suffix.lower() == ".csv" else _write_parquet
    with write_atomically(target) as temporary:
        write(parts, temporary, metadata)


def _write_parquet(parts: list[Path], target: Path, metadata: dict[str, str]) -> None:
    import pyarrow.parquet as pq

    schema = read_part(parts[0]).schema.with_metadata(metadata)
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for path in parts:
            part = read_part(path)
            writer.write_table(part.replace_schema_metadata(metadata), row_group_size=max(part.num_rows, 1))


def _write_csv(parts: list[Path], target: Path, _: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.csv as pacsv

    with pa.OSFile(str(target), "wb") as sink:
        for k, path in enumerate(parts):
            pacsv.write_csv(
                _lists_to_text(read_part(path)), sink, pacsv.WriteOptions(include_header=k == 0, quoting_style="needed")
            )


def _lists_to_text(part: Any) -> Any:
    """Replace list columns by text columns."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for k, field in enumerate(part.schema):
        if pa.types.is_list(field.type):
            part = part.set_column(k, field.name, pc.binary_join(part.column(k), SET_SEPARATOR))
    return part


def read_metadata(output: Path) -> dict[str, str]:
    """Return the metadata of an output; empty if no job wrote it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if output.suffix.lower() == ".parquet":
            schema_metadata = pq.read_schema(output).metadata or {}
            return {key.decode(): value.decode() for key, value in schema_metadata.items() if key != b"ARROW:schema"}
        metadata = json.loads(metadata_path(output).read_text())
        return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    except (OSError, ValueError, pa.ArrowException):
        return {}


def metadata_path(output: Path) -> Path:
    """Return the path of the metadata of an output that cannot contain it: a CSV file or a folder."""
    return output / "_job.json" if not output.suffix else output.with_name(output.name + "-metadata.json")


def rejected_rows_path(output: Path) -> Path:
    """Return the path of the rejected rows of an output: CSV next to a CSV, else Parquet."""
    return output.with_name(output.name + ".errors" + (".csv" if output.suffix.lower() == ".csv" else ".parquet"))


def file_digest(path: Path) -> str:
    """Return the digest of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def is_job_output(folder: Path) -> bool:
    """Return whether a folder is empty or has only files of a job."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    metadata_name = metadata_path(folder).name
    return not names or (
        metadata_name in names and all(name == metadata_name or PART_NAME.fullmatch(name) for name in names)
    )


def write_metadata(output: Path, metadata: dict[str, str], path: Path | None = None) -> None:
    """Write the metadata of a CSV file or folder."""
    with write_atomically(path or metadata_path(output)) as temporary:
        temporary.write_text(json.dumps(metadata, indent=1) + "\n")


class RejectedRowsFile:
    """File of rejected rows: CSV, or Parquet with the fingerprint of the job."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        import pyarrow as pa

        columns = [("row", pa.int64()), ("file", pa.string()), ("reason", pa.string())]
        self._schema = pa.schema(columns, {"fingerprint": fingerprint})
        self.path, self.count = path, 0
        self._writer: Any = None
        self._rows: list[Any] = []

    def add_rows(self, rejects: list[Any]) -> None:
        """Add rejected rows."""
        self.count += len(rejects)
        self._rows += rejects
        if len(self._rows) >= ROW_GROUP_ROWS:
            self._write_rows()

    def close(self) -> None:
        """Write the remaining rows and close the file."""
        if self._rows:
            self._write_rows()
        if self._writer is not None:
            self._writer.close()

    def _write_rows(self) -> None:
        import pyarrow as pa

        if self._writer is None:
            self._writer = self._open_writer()
        columns = zip(*self._rows, strict=True)
        self._writer.write_table(
            pa.table([pa.array(c, t) for c, t in zip(columns, self._schema.types, strict=True)], schema=self._schema)
        )
        self._rows = []

    def _open_writer(self) -> Any:
        import pyarrow.csv as pacsv
        import pyarrow.parquet as pq

        if self.path.suffix == ".csv":
            return pacsv.CSVWriter(
                str(self.path), self._schema, write_options=pacsv.WriteOptions(quoting_style="needed")
            )
        return pq.ParquetWriter(self.path, self._schema, compression="zstd")
