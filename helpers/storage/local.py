"""Folders of a file system that this process sees."""

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from helpers.errors import StorageError, explain
from helpers.storage.interface import Entry

DELETED = re.compile(r"\.[0-9a-f]{32}\.deleted")


class LocalStorage:
    """A folder of a file system that this process sees, mounts such as `/Volumes` included."""

    concurrent_reads = 1

    def __init__(self, root: str):
        # Absolute, because workers have another working directory; without `..`, so that a file has one path.
        self.root = os.path.abspath(Path(root).expanduser())  # noqa: PTH100 - Path.absolute keeps `..`

    def __repr__(self) -> str:
        return f"LocalStorage({self.root!r})"

    def join(self, *parts: str) -> str:  # noqa: D102
        return str(Path(self.root, *parts))

    def list(self, prefix: str = "", directories: bool = False, skip: Collection[str] = ()) -> Iterator[Entry]:
        """List with one directory open at a time, following links but entering no directory twice.

        Raises:
            StorageError: there is no such folder, or it cannot be read.
        """
        start = Path(self.join(prefix))
        if start.is_file():
            yield _entry(str(start))
            return
        if not start.is_dir():
            raise StorageError(f"{start}: no such folder; check the location, or create it first")
        pending, seen = [str(start)], {_identity(folder) for folder in skip if Path(folder).is_dir()}
        while pending:
            folder = pending.pop()
            with contextlib.suppress(FileNotFoundError):  # gone since its parent was listed
                if _identity(folder) in seen:
                    continue
                seen.add(_identity(folder))
                for item in _scan(folder):
                    is_directory = _is_directory(item)
                    if is_directory:
                        pending.append(item.path)
                    if directories or not is_directory:
                        with contextlib.suppress(FileNotFoundError):
                            yield _entry(item.path, is_directory)

    def open(self, path: str) -> BinaryIO:
        """One file, to read from any position; raises OSError."""
        return open(_to_name(self.join(path)), "rb", opener=_open_file)  # noqa: PTH123, SIM115 - the caller closes it

    def read(self, path: str, limit: int | None = None) -> bytes:  # noqa: D102
        with self.open(path) as file:
            if limit is None:
                return file.read()
            length = os.fstat(file.fileno()).st_size
            content = file.read(length + 1) if length <= limit else b""
            if len(content) > length:  # it grows, or is one of those that the system makes while they are read
                content += file.read(limit + 1 - len(content))
            if max(length, len(content)) > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
            return content

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:  # noqa: D102
        target = Path(self.join(path))
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self._explained(path, FileNotFoundError):
                with temporary.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):  # it was never made, or the next run takes it away
                temporary.unlink(missing_ok=True)

    def write(self, path: str, data: bytes) -> None:  # noqa: D102
        with self._explained(path):
            Path(self.join(path)).parent.mkdir(parents=True, exist_ok=True)
        with self.create(path) as file:
            file.write(data)

    def rename(self, source: str, target: str) -> None:  # noqa: D102
        destination = Path(self.join(target))
        with self._explained(target, FileNotFoundError):
            destination.parent.mkdir(parents=True, exist_ok=True)
            Path(self.join(source)).replace(destination)

    def delete(self, path: str) -> None:  # noqa: D102
        target = Path(self.join(path))
        with self._explained(path):
            if not target.is_dir() or target.is_symlink():
                target.unlink(missing_ok=True)
                return
            # An executor that has lost its driver may be writing there: what has another name it cannot reach.
            target.replace(target.with_name(f".{uuid.uuid4().hex}.deleted"))
            # Among them may be those of a process that was killed here.
            for folder in list(target.parent.iterdir()):
                if DELETED.fullmatch(folder.name):
                    shutil.rmtree(folder, ignore_errors=True)

    def exists(self, path: str) -> bool:  # noqa: D102
        with self._explained(path):
            return Path(self.join(path)).exists()

    @contextlib.contextmanager
    def lock(self, path: str) -> Iterator[None]:  # noqa: D102
        import fcntl  # not on Windows, where only this method would miss it

        target = Path(self.join(path))
        with self._explained(path):
            if Path(self.root).is_file():
                raise StorageError(f"{self.root} is a file, and results need a folder; name another location")
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("ab")
        with file:
            with self._explained(path, BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextlib.contextmanager
    def _explained(self, path: str, *expected: type[OSError]) -> Iterator[None]:
        """Turn the system's errors into ours, but for those that callers expect."""
        try:
            yield
        except expected:
            raise
        except OSError as error:
            raise StorageError(explain(error, self.join(path))) from None


def _scan(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            yield from items
    except PermissionError as error:
        raise StorageError(f"{folder}: this folder cannot be listed ({error.strerror}); grant read access") from None


def _open_file(path: str | bytes, flags: int) -> int:
    """Open without waiting for the other end of a pipe, and refuse what has no end, such as a device."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a directory, `open` itself says so
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _to_text(name: str) -> str:
    """A path as valid Unicode: bytes that are none stand as `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _to_name(text: str) -> str | bytes:
    """The inverse of `_to_text`, for the few names that need it."""
    if "\\x" not in text or Path(text).exists():
        return text
    return re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text.encode())


def _is_directory(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads to itself, or where nobody may look: reading it gives the error row
        return False


def _entry(path: str, is_directory: bool = False) -> Entry:
    try:
        status = os.stat(path)
    except OSError:
        status = os.lstat(path)  # a broken or looping link: reading it gives the error row
    length = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Entry(_to_text(path), length, datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, UTC), is_directory)
