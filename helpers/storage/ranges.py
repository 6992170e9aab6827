"""A file of any length to read from any position, fetched by ranges. Executors import this module."""

import io
import os
from typing import Any, BinaryIO, cast

from helpers.storage.interface import Storage

AHEAD_BYTES = 2**20  # of a distant file: a request takes as long as so many bytes, and often they are wanted next


def open_ranges(storage: Storage, path: str, length: int) -> BinaryIO:
    """Open a file without a copy of it: nothing is read but what is asked for, and some bytes ahead.

    Args:
        storage: where it lies.
        path: the file's.
        length: bytes of it that there are to see.
    """
    ahead = AHEAD_BYTES if storage.concurrent_reads > 1 else io.DEFAULT_BUFFER_SIZE
    return cast(BinaryIO, io.BufferedReader(_Ranges(storage, path, length), ahead))


class _Ranges(io.RawIOBase):
    def __init__(self, storage: Storage, path: str, length: int):
        self._storage, self._path, self._length, self._position = storage, path, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if position < 0:
            raise ValueError("there is nothing before the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._length - self._position)
        content = self._storage.read_range(self._path, self._position, wanted) if wanted > 0 else b""
        view[: len(content)] = content
        self._position += len(content)
        return len(content)
