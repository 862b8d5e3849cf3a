"""Tables, files and jobs for tests of batch scoring."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from model.contract import CHANNELS, Manifest
from model.windows import Readings
from service.scoring import job
from service.scoring.options import Options
from service.settings import read_settings

FORMS = ("a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.jsonl.zst")


def flights(windows: Readings) -> pa.Table:
    """Return a table of engines a, b, c ... with one cycle per row of each window."""
    n, length, _ = windows.shape
    columns: dict[str, Any] = {"engine_id": [chr(97 + i) for i in range(n) for _ in range(length)]}
    columns["cycle"] = list(range(1, length + 1)) * n
    columns |= {name: windows.reshape(n * length, -1)[:, k].astype(np.float64) for k, name in enumerate(CHANNELS)}
    return pa.table(columns)


def write(table: pa.Table, path: Path) -> Path:
    """Write a table in the format of the file name."""
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(".parquet"):
        pq.write_table(table, path)
        return path
    if plain.endswith(".jsonl"):
        content = "".join(_json(row) + "\n" for row in table.to_pylist()).encode()
    else:
        sink = pa.BufferOutputStream()
        pacsv.write_csv(table, sink, pacsv.WriteOptions(delimiter="\t" if plain.endswith(".tsv") else ","))
        content = sink.getvalue().to_pybytes()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)
    return path


def _json(row: dict[str, Any]) -> str:
    import orjson

    return orjson.dumps(row).decode()


def score(inputs: Path | Sequence[Path | str], output: Path, **options: Any) -> int:
    """Run a job in this process, and return its exit code."""
    names = [inputs] if isinstance(inputs, Path) else inputs
    return job.score_files(Options(tuple(map(str, names)), output, quiet=True, **options), read_settings())


def read(output: Path) -> pa.Table:
    """Return the output of a job."""
    return pq.read_table(output) if output.suffix == ".parquet" else pacsv.read_csv(output)


def rejected(output: Path) -> list[dict[str, Any]]:
    """Return the rejected rows of a job."""
    rows: list[dict[str, Any]] = pq.read_table(f"{output}.errors.parquet").to_pylist()
    return rows


def probabilities(table: pa.Table, manifest: Manifest) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the class probabilities of an output, of shape (N, C)."""
    return np.stack([table[f"p_{name}"].to_numpy() for name in manifest.classes], axis=1)
