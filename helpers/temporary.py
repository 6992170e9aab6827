"""The system's temporary folder: what this user's processes leave there for one another, and what memory cannot hold.

The name of the user's folder is public and the place is everybody's, so another user may have taken it first. Executors
import this module.
"""

import logging
import os
import pickle
import stat
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

READ_AT_ONCE = 1000  # items that are on the disk


def user_folder() -> Path | None:
    """Return this user's temporary folder, which nobody else can read or write; make it where there is none.

    Returns:
        None where something else has its name: a link, another user's folder, or one that others may enter. Then
        nothing can be left for the next process.
    """
    folder = Path(tempfile.gettempdir(), f"spark-vision-{os.geteuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        log.warning("%s cannot be used, and nothing is kept there: %s", folder, error.strerror or error)
        return None
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
        return folder
    log.warning("%s is not this user's alone, and nothing is kept there: remove it", folder)
    return None


def on_disk(items: Iterable[T]) -> Iterator[T]:
    """The same items, all of them taken now, and read back as they are needed from a file without a name."""
    file, source = tempfile.TemporaryFile(), iter(items)  # noqa: SIM115 - closed with the iterator
    while group := list(islice(source, READ_AT_ONCE)):
        pickle.dump(group, file)
    end = file.tell()
    file.seek(0)

    def read() -> Iterator[T]:
        with file:
            while file.tell() < end:
                yield from pickle.load(file)

    return read()
