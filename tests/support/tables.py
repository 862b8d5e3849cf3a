"""Arrow tables and streams of flights for tests."""

from typing import Any

import numpy as np
import pyarrow as pa

from model.contract import CHANNELS
from model.windows import Readings

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}


def stream(table: Any, rows: int | None = None, compression: str | None = None) -> bytes:
    """Return a table as an Arrow stream in batches of some rows."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, rows)
    return bytes(sink.getvalue())


def flights(histories: dict[str, Readings], **more: Any) -> Any:
    """Return a table of the rows of some engines, one after another, oldest first, cycles from 1."""
    rows = np.concatenate(list(histories.values()))
    columns: dict[str, Any] = {name: pa.array(rows[:, k]) for k, name in enumerate(CHANNELS)}
    columns["engine_id"] = pa.array([name for name, history in histories.items() for _ in history])
    columns["cycle"] = pa.array([cycle for history in histories.values() for cycle in range(1, len(history) + 1)])
    return pa.table(columns | more)
