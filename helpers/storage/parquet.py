"""Parquet files in a storage, whole at a time."""

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.storage.interface import Storage


def read_table(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """Read one file."""
    # Not from a Python file object: Arrow's threads can outlive the interpreter with one, and abort the process.
    return pq.read_table(pa.BufferReader(storage.read(path)), columns=columns)


def write_table(storage: Storage, path: str, table: pa.Table) -> None:
    """Write one file; readers see the old content or the new."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    storage.write(path, buffer.getvalue().to_pybytes())
