"""Parquet files in a storage, whole at a time."""

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.storage.interface import Storage


def read_table(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """Read one file, or some of its columns; of a nested one a part too, as `predictions.list.element.score`."""
    # Not from a Python file object: Arrow's threads can outlive the interpreter with one, and abort the process.
    return pq.ParquetFile(pa.BufferReader(storage.read(path))).read(columns)


def write_table(storage: Storage, path: str, table: pa.Table) -> int:
    """Write one file, and return its length in bytes; readers see the old content or the new."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    content = buffer.getvalue().to_pybytes()
    storage.write(path, content)
    return len(content)
