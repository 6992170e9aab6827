"""What the pipeline needs of a place where images, models and results lie."""

import contextlib
import re
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import BinaryIO, NamedTuple, Protocol

from helpers.errors import StorageError

UNFINISHED = re.compile(r"\.[0-9a-f]{8,}\.tmp")  # the name of a file that is written, or was when its writer was killed


class Entry(NamedTuple):
    """A file, or a directory where directories were asked for.

    `modified` is in UTC; a broken link has length 0 and the modification time of the link. `error` says why a file is
    not to be read, or that a directory could not be listed; then the other values may be zero.
    """

    path: str
    length: int
    modified: datetime
    is_directory: bool = False
    error: str | None = None


class Files(Protocol):
    """What the pipeline needs to read images. Paths are as `list` gives them, or relative to the root."""

    root: str
    concurrent_reads: int  # how many are worth having under way at once; 1 where reading does not mean waiting

    def read(self, path: str, limit: int | None = None) -> bytes:
        """The whole content of one file; raises OSError, with EFBIG where it is longer than so many bytes."""

    def open(self, path: str) -> BinaryIO:
        """One file of any length, to read from any position, in the memory of a part of it; raises OSError."""

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """So many bytes of one file from a position on, fewer where it ends; raises OSError."""

    def stat(self, path: str) -> Entry:
        """Length and time of one file; raises OSError where there is none."""

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""


class Storage(Files, Protocol):
    """What it needs of a location, to list it and to write there too."""

    def list(
        self,
        prefix: str = "",
        directories: bool = False,
        skip: Collection[str] = (),
        *,
        tolerant: bool = False,
        outside_links: bool = True,
    ) -> Iterator[Entry]:
        """Every file below the prefix, nested folders included but for those to skip.

        The order is the same each time, as long as no file comes or goes: that of the paths' UTF-8 bytes, in which
        `a-1` comes before `a/1`, and this before `a0`. There are two exceptions. On a local disk, what lies in folders
        behind links comes last. ADLS has an order of its own, which may take one folder after the other.

        Where `tolerant`, what is wrong below the prefix is an entry with an `error`, and not a StorageError. Without
        `outside_links`, so is a link that leads out of the location.
        """

    def create(self, path: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to write to, which appears under its name, whole, when the block ends without an exception."""

    def write(self, path: str, data: bytes) -> None:
        """Write one file whole, missing folders too: readers see the old content or the new, never a part."""

    def rename(self, source: str, target: str) -> None:
        """Move one file, replacing the target if it exists."""

    def delete(self, path: str) -> None:
        """Remove a file or a folder with all in it; nothing happens where there is none."""

    def join(self, *parts: str) -> str:
        """The path of something below the root, as `list` would give it."""

    def prune(self, path: str) -> None:
        """Remove a folder that is empty; nothing happens where there is none, or where something is in it."""

    def delta_table(self, path: str) -> tuple[str, dict[str, str]]:
        """The address of a folder and the options by which the library `deltalake` reaches it.

        The options may hold the credential: they are never kept, logged or pickled.
        """

    def table_error(self, path: str, message: str) -> StorageError | None:
        """The error to raise where `deltalake` fails with a message that is of the storage, and not of the table."""
