"""Files anywhere, each under the URI that a table of the user names it by. Executors import this module."""

import errno
import functools
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from helpers.errors import StorageError
from helpers.options import StorageOptions
from helpers.storage import open_storage
from helpers.storage.interface import Entry, Storage

CONTAINER = re.compile(r"(abfss|s3|gs|https?)://[^/]+")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
NO_ROOT = "its path is relative, and source.root does not say to what"


class UriStorage:
    """Read files by their URIs, whatever storages these are of; a path stays as the user has written it.

    Relative paths begin at the root, if there is one; all object storage is reached with one credential.
    """

    concurrent_reads = 8

    def __init__(self, root: str, options: StorageOptions):
        self.root, self.storage = root, options  # the latter under the name that `open_storage` knows

    def stat(self, path: str) -> Entry:
        """What is at a path.

        Raises OSError if nothing is, the path is none of a file, or a web server does not answer; and StorageError if
        another storage does not, or refuses the credential.
        """
        return self._at(path, lambda storage, name: storage.stat(name))._replace(path=path)

    def read(self, path: str, limit: int | None = None) -> bytes:  # noqa: D102
        return self._at(path, lambda storage, name: storage.read(name, limit))

    def read_range(self, path: str, start: int, length: int) -> bytes:  # noqa: D102
        return self._at(path, lambda storage, name: storage.read_range(name, start, length))

    def open(self, path: str) -> BinaryIO:  # noqa: D102
        return self._at(path, lambda storage, name: storage.open(name))

    def exists(self, path: str) -> bool:  # noqa: D102
        return self._at(path, lambda storage, name: storage.exists(name))

    def _at(self, path: str, look: Callable[[Storage, str], Any]) -> Any:
        """Do something with the storage of a path, where a location that is none is an error of this file alone."""
        if not SCHEME.match(path) and not path.startswith("/"):
            if not self.root:
                raise OSError(errno.EINVAL, NO_ROOT, path)
            path = f"{self.root.rstrip('/')}/{path}"
        container = CONTAINER.match(path)
        try:
            storage = _open(container[0] if container else path, self.storage)
        except StorageError as error:
            raise OSError(errno.EINVAL, str(error), path) from None
        try:
            return look(storage, path if container else "")
        except StorageError as error:
            if not path.startswith("http"):  # the credential, or an account, has to be mended for all
                raise
            raise OSError(errno.EIO, str(error), path) from None  # one of many servers


@functools.lru_cache(1024)
def _open(uri: str, options: StorageOptions) -> Storage:
    return open_storage(uri, UriStorage("", options))
