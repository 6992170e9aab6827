"""Folders of a file system that this process sees."""

import contextlib
import errno
import heapq
import os
import re
import shutil
import stat
import uuid
from collections import deque
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from helpers.errors import StorageError, explain
from helpers.storage.interface import Entry
from helpers.temporary import on_disk

MOUNTS = ("/Volumes/", "/dbfs/")  # of Databricks: a rename there may replace what another process has just written
ESCAPES = re.compile(r"%[0-9A-Fa-f]{2}|\\")
DELETED = re.compile(r"\.[0-9a-f]{32}\.deleted")
SORTED_AT_ONCE = 200_000  # names of a folder, in memory
NO_TIME = datetime.fromtimestamp(0, UTC)
SYSTEM_ERROR = re.compile(r"(?:os error|code:) (\d+)")  # in the words of Rust
ODD_TIME = "its modification time is in no year from 1 to 9999: set another, for example with `touch`"
LEADS_OUT = "the link leads out of the source and is not followed: set ingest.outside_links=true if it should be"
UNCLEAR = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")
ESCAPED = re.compile(rb"\\x(5c|[89a-f][0-9a-f])")


class LocalStorage:
    """A folder of a file system that this process sees, mounts such as `/Volumes` included."""

    concurrent_reads = 1

    def __init__(self, root: str):
        # Absolute, because workers have another working directory; without `..`, so that a file has one path.
        self.root = _to_text(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 - Path.absolute keeps `..`

    def __repr__(self) -> str:
        return f"LocalStorage({self.root!r})"

    def join(self, *parts: str) -> str:  # noqa: D102
        return str(Path(self.root, *parts))

    def list(
        self,
        prefix: str = "",
        directories: bool = False,
        skip: Collection[str] = (),
        *,
        tolerant: bool = False,
        outside_links: bool = True,
    ) -> Iterator[Entry]:
        """List in the order of the paths' UTF-8 bytes, folders right before what is in them, one open at a time.

        Links are followed, but no directory is entered twice: what folders lie behind links comes last, so that what
        has a path of its own is found there. The names of one folder are in memory at once, up to `SORTED_AT_ONCE`;
        those of a larger one are sorted on the disk. Raises StorageError if there is no such folder, or it cannot be
        listed; a folder below it neither, unless `tolerant`.
        """
        start = self._path(prefix)
        if self.exists(prefix) and start.is_file():
            yield _entry(str(start), False)
            return
        if not start.is_dir():
            raise StorageError(f"{start}: no such folder; check the location, or create it first")
        within = None if outside_links else os.path.realpath(self._path(""))
        left_out = [self._path(folder) for folder in skip]
        # Real paths tell folders apart: on some mounts all inodes are 0.
        real_paths = {os.path.realpath(folder) for folder in left_out}
        identities = {_identity(folder) for folder in left_out} - {None}  # the same folder may be mounted twice
        waiting = deque([(str(start), os.path.realpath(start))])  # folders behind links
        below: list[tuple[str, Iterator[_Item]]] = []  # the folders from there down to the one listed: what is left
        while waiting or below:
            if below:
                item = next(below[-1][1], None)
                if item is None:
                    below.pop()
                    continue
                entry, target = _look(item, below[-1][0], within)
                if entry is not None and (directories or not entry.is_directory):
                    yield entry
                if target is None:
                    continue
                if item.is_link:
                    waiting.append((item.path, target))
                    continue
                folder, real = item.path, target
            else:
                folder, real = waiting.popleft()
            if real in real_paths or (identities and _identity(folder) in identities):
                continue
            real_paths.add(real)
            try:
                below.append((real, _in_order(folder)))
            except FileNotFoundError:  # gone since its parent was listed
                continue
            except OSError as error:
                why = f"this folder cannot be listed ({error.strerror or error})"
                if not tolerant or folder == str(start):
                    raise StorageError(f"{_to_text(folder)}: {why}; grant read access, or leave it out") from None
                yield Entry(_to_text(folder), 0, NO_TIME, True, why)

    def open(self, path: str) -> BinaryIO:
        """One file, to read from any position; raises OSError."""
        return open(self._path(path), "rb", opener=_open_file)  # noqa: PTH123, SIM115 - the caller closes it

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

    def read_range(self, path: str, start: int, length: int) -> bytes:  # noqa: D102
        with self.open(path) as file:
            file.seek(start)
            return file.read(length)

    def stat(self, path: str) -> Entry:  # noqa: D102
        status = os.stat(self._path(path))
        return _entry(self.join(path), stat.S_ISDIR(status.st_mode), status)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:  # noqa: D102
        target = self._path(path)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            with self._explained(path, FileNotFoundError):
                with _open_new(temporary) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):  # it was never made, or the next run takes it away
                temporary.unlink(missing_ok=True)

    def write(self, path: str, data: bytes) -> None:  # noqa: D102
        with self.create(path) as file:
            file.write(data)

    def rename(self, source: str, target: str) -> None:  # noqa: D102
        destination = self._path(target)
        with self._explained(target, FileNotFoundError):
            destination.parent.mkdir(parents=True, exist_ok=True)
            self._path(source).replace(destination)

    def delete(self, path: str) -> None:  # noqa: D102
        target = self._path(path)
        with self._explained(path), contextlib.suppress(FileNotFoundError):  # another process was first
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
            return self._path(path).exists()

    def prune(self, path: str) -> None:  # noqa: D102
        try:
            self._path(path).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise StorageError(explain(error, self.join(path))) from None

    def delta_table(self, path: str) -> tuple[str, dict[str, str]]:
        """As in `Storage`.

        On Databricks' mounts nothing keeps two runs that commit in the same moment apart. Raises StorageError if the
        library decodes parts of this path, and would go elsewhere.
        """
        place = self.join(path)
        if ESCAPES.search(place):
            odd = "a folder with a backslash, or with % and two hexadecimal digits in its name"
            raise StorageError(f"{place}: a table cannot lie below {odd}; name another location")
        options = {"allow_unsafe_rename": "true"} if f"{place}/".startswith(MOUNTS) else {}
        return Path(place).as_uri(), options

    def table_error(self, path: str, message: str) -> StorageError | None:  # noqa: D102
        if match := SYSTEM_ERROR.search(message):
            number = int(match[1])
            return StorageError(explain(OSError(number, os.strerror(number)), self.join(path)))
        return None

    @contextlib.contextmanager
    def lock(self, path: str) -> Iterator[None]:
        """Hold a lock that the operating system releases when this process dies.

        Raises BlockingIOError if another process holds it, and StorageError if the root is a file or there are no
        locks.
        """
        import fcntl  # not on Windows, where only this method would miss it

        target = self._path(path)
        with self._explained(path):
            if self._path("").is_file():
                raise StorageError(f"{self.root} is a file, and results need a folder; name another location")
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("ab")
        with file:
            with self._explained(path, BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def _path(self, path: str) -> Path:
        """Where the operating system has what `list` gives as this path, or what lies there relative to the root."""
        return Path(_to_name(self.join(path)))

    @contextlib.contextmanager
    def _explained(self, path: str, *expected: type[OSError]) -> Iterator[None]:
        """Turn the system's errors into ours, but for those that callers expect."""
        try:
            yield
        except expected:
            raise
        except OSError as error:
            raise StorageError(explain(error, self.join(path))) from None


def _open_new(path: Path) -> BinaryIO:
    """A new file; folders that are missing are made, and made again where somebody removes them as empty meanwhile."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            return path.open("xb")
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _open_file(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe, and refuse what has no end, such as a device."""
    # Looked at before it is opened, because opening is enough to start some devices; and after, because it may change.
    _check_is_file(os.stat(path))
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        _check_is_file(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_is_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # of a directory, `open` itself says so
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """Device and inode of a folder, where there are any."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


class _Item(NamedTuple):
    """What is in a folder; sorts as its path does among those of files."""

    key: str
    path: str
    is_link: bool
    is_folder: bool


def _in_order(folder: str) -> Iterator[_Item]:
    """What is in a folder, sorted; raises OSError at once where it cannot be listed."""
    items: list[_Item] = []
    sorted_parts: list[Iterator[_Item]] = []
    with os.scandir(folder) as found:
        for item in found:
            is_folder = _is_directory(item)
            items.append(_Item(_to_text(item.name) + "/" * is_folder, item.path, item.is_symlink(), is_folder))
            if len(items) == SORTED_AT_ONCE:
                sorted_parts.append(on_disk(sorted(items)))
                items.clear()
    return heapq.merge(*sorted_parts, sorted(items))


def _look(item: _Item, folder: str, within: str | None) -> tuple[Entry | None, str | None]:
    """The entry of what is in a folder, None if it has gone, and its real path if it is a folder to list.

    `folder` is the real path of where the item was found; links that lead out of the real path `within` are not
    followed.
    """
    try:
        real = f"{folder.rstrip('/')}/{item.path.rpartition('/')[2]}"
        if item.is_link and not _is_endless(item.path):
            real = os.path.realpath(item.path)
            if within is not None and not f"{real}/".startswith(f"{within.rstrip('/')}/"):
                return _entry(item.path, False, os.lstat(item.path), LEADS_OUT), None
        return _entry(item.path, item.is_folder), real if item.is_folder else None
    except FileNotFoundError:
        return None, None
    except Exception as error:  # whatever is wrong with one entry costs no other
        why = f"it cannot be looked at: {getattr(error, 'strerror', None) or error}"
        return Entry(_to_text(item.path), 0, NO_TIME, error=why), None


def _is_endless(link: str) -> bool:
    """Whether a link leads to itself, or through more links than the kernel follows, which is 40.

    `realpath` follows any number: a folder full of them would take hours.
    """
    try:
        os.stat(link)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _to_text(name: str) -> str:
    """A path as valid Unicode: bytes that are none stand as `\\xNN`, and so does a backslash that looks like one."""
    text = UNCLEAR.sub(r"\\x5c", name) if "\\x" in name else name
    return text if text.isascii() else os.fsencode(text).decode("utf-8", "backslashreplace")


def _to_name(text: str) -> str:
    """The inverse of `_to_text`."""
    name = text.encode("utf-8", "surrogateescape")
    return os.fsdecode(ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), name) if b"\\x" in name else name)


def _is_directory(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads to itself, or where nobody may look: reading it gives the error row
        return False


def _entry(path: str, is_directory: bool, status: os.stat_result | None = None, error: str | None = None) -> Entry:
    try:
        status = status or os.stat(path)
    except OSError:
        status = os.lstat(path)  # a broken or looping link: reading it gives the error row
    length = status.st_size if stat.S_ISREG(status.st_mode) else 0
    try:
        modified = datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, UTC)
    except (ValueError, OverflowError, OSError):
        modified, error = NO_TIME, error or (None if is_directory else ODD_TIME)
    return Entry(_to_text(path), length, modified, is_directory, error)
