"""Archives as sources of images: the members of a tar or zip file, each read by its range of the file.

A member's path is its archive's with its name behind it, `shard.tar#member=cats/1.jpg`. Nothing is ever unpacked to a
disk, so a name is only a name. The first bytes say what an archive is, its suffix does not. A tar file that is
compressed as a whole is refused: its last member is out of reach without all that lies before it, each task would
decompress it again, and images are compressed already. Executors import this module.
"""

import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import SHOWN_BYTES

MARK = "#member="
# What stands as `\xNN` in a name: bytes that are no text, a mark, and a backslash that looks like either.
UNCLEAR = re.compile(rf"\\(?=x(?:23|5c|[89a-f][0-9a-f]))|#(?={MARK[1:]})")
MAX_NAME = 4096  # characters
MAX_LENGTH = 2**63 - 1  # bytes; archives can claim more

DAMAGED = "the archive is damaged or cut short"
MEMBER_DAMAGED = "the member is damaged or cut short"
COMPRESSED = (
    "the archive is compressed as a whole, so no member can be read alone; unpack it, or decompress it to a plain tar "
    "file, for example with `gunzip`"
)
COMPRESSIONS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gzip bzip2 xz zstd lz4
# What the libraries raise for bytes that are no archive.
NO_ARCHIVE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    LookupError,
    ArithmeticError,
    RecursionError,
    NotImplementedError,
)

TAR_BLOCK = 512  # bytes
TAR_HEADER = 2**16  # bytes of a member's long name and further attributes, at most; real ones have some hundred

DIRECTORY_COST = 16  # bytes of memory that a byte of a zip file's directory takes: 9 were measured, and some air
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # before each member of a zip file (APPNOTE 4.3.7)
LOCAL_MAGIC = b"PK\x03\x04"
LOCAL_VARIES = 1024  # bytes of name and extra fields behind it that are read at once with the member
ZIP_ENCRYPTED, ZIP_SIZES_FOLLOW = 0x1, 0x8  # general purpose flags (APPNOTE 4.4.4)
ZIP_UNIX = 3
SEARCHED = 2**16 + 2**8  # bytes at the end of a zip file that may hold its directory's place and a comment


class Member(NamedTuple):
    """A file in an archive."""

    name: str  # as text; bytes that are none stand as `\xNN`, and so does the `#` of `#member=`
    length: int  # bytes
    offset: int  # where it is in the archive: its bytes, or of a zip file its local header
    packed: int | None = None  # bytes that it takes behind that header; None in a tar file, which has it as it is
    error: str | None = None  # why it cannot be read, where the archive says so


def split_member(path: str) -> tuple[str, str | None]:
    """The archive and the name of a member's path; any other path and None."""
    file, mark, name = path.rpartition(MARK)
    return (file, name) if mark else (path, None)


def split_members(paths: pa.Array | pa.ChunkedArray) -> tuple[Any, Any]:
    """`split_member` of an Arrow column: the archives, and names that are null where a path is no member's."""
    groups = pc.extract_regex(paths, rf"(?s)^(?P<file>.*){MARK}(?P<name>.*)\z")
    files, names = (pc.struct_field(groups, field) for field in ("file", "name"))
    return pc.coalesce(files, paths), names


def split_sample(name: str) -> tuple[str, str]:
    """The sample that a member belongs to and what it is of it, as WebDataset has it: `cats/1` and `seg.png`."""
    folder, slash, file = name.rpartition("/")
    sample, _, kind = file.partition(".")
    return f"{folder}{slash}{sample}", kind


def find_members(file: BinaryIO, max_memory: int | None = None) -> Iterator[Member]:
    """List the files in an archive, in its own order; of two with one name the last counts, as for those who unpack it.

    Of a zip file its directory is read, of a tar file the header of each member. The list may take `max_memory` bytes,
    or MemoryError is raised. Raises UnreadableImageError if it is no archive, or damaged; then the members before the
    damage have been listed.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(TAR_BLOCK)
    if not head:
        raise UnreadableImageError("the file is empty")
    if head.startswith(COMPRESSIONS):
        raise UnreadableImageError(COMPRESSED)
    is_empty = True
    try:
        for member in _tar_members(file, length) if _is_tar(head) else _zip_members(file, length, max_memory):
            is_empty = False
            if len(member.name) > MAX_NAME:
                raise UnreadableImageError(f"{DAMAGED}; a name in it has {len(member.name)} characters")
            yield member._replace(name=_to_text(member.name), length=max(0, min(member.length, MAX_LENGTH)))
    except UnreadableImageError:
        raise
    except NO_ARCHIVE as error:
        if is_empty and not (_is_tar(head) or head.startswith(LOCAL_MAGIC)):
            why = "the file is not an archive: it is neither a tar nor a zip file"
            raise UnreadableImageError(f"{why}; it begins with {head[:SHOWN_BYTES]!r}") from None
        raise UnreadableImageError(f"{DAMAGED}; {error or type(error).__name__}") from None
    if is_empty:
        raise UnreadableImageError("the archive is empty")


def read_member(read: Callable[[int, int], bytes], length: int, offset: int, packed: int | None = None) -> bytes:
    """One member's bytes, from its `length`, `offset` and `packed` of `find_members`.

    `read` reads the archive from an offset on, so many bytes or fewer where it ends. Raises UnreadableImageError if
    something else is there.
    """
    content = _read(read, offset, length) if packed is None else _unpack(read, length, offset, packed)
    if len(content) != length:
        raise UnreadableImageError(f"{MEMBER_DAMAGED}; it does not have the length that the archive says")
    return content


class _Bounded:
    """An archive for the standard library, which reads at once whatever a header claims."""

    def __init__(self, file: BinaryIO, most: int | None, error: Exception):
        self._file, self._most, self._error = file, most, error
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if self._most is not None and size > self._most:
            raise self._error
        return self._file.read(size)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return not head.strip(b"\0") and len(head) == TAR_BLOCK  # the end of an empty one
    return True


def _tar_members(file: BinaryIO, length: int) -> Iterator[Member]:
    file.seek(0)
    end = -1
    bounded: Any = _Bounded(file, TAR_HEADER, UnreadableImageError(f"{DAMAGED}; a name in it claims to be endless"))
    with tarfile.TarFile(fileobj=bounded, encoding="utf-8", errors="surrogateescape") as tar:
        while (info := tar.next()) is not None:
            # Else it remembers all that it has seen, a kilobyte per member.
            tar.members.clear()  # type: ignore[attr-defined]
            tar.pax_headers = {}
            if tar.offset <= end:
                raise UnreadableImageError(f"{DAMAGED}; a header in it leads back")
            end = tar.offset
            if not info.isdir():
                yield Member(info.name, info.size, info.offset_data, error=_tar_error(info, length))
        file.seek(tar.offset)
    # `tarfile` takes whatever is no header for the end.
    if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise UnreadableImageError(f"{DAMAGED}; behind byte {tar.offset} there is neither a member nor its end")


def _tar_error(info: tarfile.TarInfo, length: int) -> str | None:
    if info.issym() or info.islnk():
        return "the member is a link; pack the file itself, for example with `tar --dereference --hard-dereference`"
    if not info.isreg():
        return "the member is a pipe or a device, not a file"
    if info.issparse():
        return "the member is stored with gaps; pack it without `--sparse`"
    if info.size < 0 or info.offset_data + info.size > length:
        return f"{MEMBER_DAMAGED}; it would end outside the archive"
    return None


def _zip_members(file: BinaryIO, length: int, max_memory: int | None) -> Iterator[Member]:
    most = None if max_memory is None else max(SEARCHED, max_memory // DIRECTORY_COST)
    bounded: Any = _Bounded(file, most, MemoryError())
    with zipfile.ZipFile(bounded) as archive:
        members = archive.infolist()
    # A claim beyond the file is as wrong as any other, and fits into an array.
    offsets = np.array([min(max(-1, info.header_offset), length) for info in members], np.int64)
    packed = np.array([min(info.compress_size, length) for info in members], np.int64)
    ends = offsets + LOCAL_HEADER.size + packed
    # Members that share their bytes make terabytes of a small file.
    order = np.argsort(offsets, kind="stable")
    overlaps = np.zeros(len(members), bool)
    overlaps[order[:-1]] = ends[order[:-1]] > offsets[order[1:]]
    is_there = (offsets >= 0) & (ends <= length)
    for number, info in enumerate(members):
        if not info.is_dir():
            error = _zip_error(info, bool(is_there[number]), bool(overlaps[number]))
            yield Member(info.filename, info.file_size, int(offsets[number]), int(packed[number]), error)


def _zip_error(info: zipfile.ZipInfo, is_there: bool, overlaps: bool) -> str | None:
    if info.flag_bits & ZIP_ENCRYPTED:
        return "the member is encrypted; pack it without a password"
    if info.create_system == ZIP_UNIX and stat.S_ISLNK(info.external_attr >> 16):
        return "the member is a link; pack the file itself"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"the member is compressed by method {info.compress_type}; pack it stored or deflated"
    if not is_there:
        return f"{MEMBER_DAMAGED}; it would lie outside the archive"
    if overlaps:
        return f"{MEMBER_DAMAGED}; another has its bytes too"
    # Deflating makes nothing much longer.
    most = info.file_size if info.compress_type == zipfile.ZIP_STORED else 2 * info.file_size + LOCAL_VARIES
    if info.compress_size > most:
        return f"{MEMBER_DAMAGED}; the archive has {info.compress_size} bytes for its {info.file_size}"
    return None


def _unpack(read: Callable[[int, int], bytes], length: int, offset: int, packed: int) -> bytes:
    """A zip file's member; it may be a byte longer than it should be."""
    content = read(offset, LOCAL_HEADER.size + LOCAL_VARIES + packed)
    if len(content) < LOCAL_HEADER.size or not content.startswith(LOCAL_MAGIC):
        raise UnreadableImageError(f"{MEMBER_DAMAGED}; it is not where the archive says")
    _, _, flags, method, _, _, checksum, _, _, *varying = LOCAL_HEADER.unpack_from(content)
    start = LOCAL_HEADER.size + sum(varying)
    content = content[start : start + packed]
    if len(content) < packed:
        content = _read(read, offset + start, packed)
    if method == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, length + 1)
        except zlib.error as error:
            raise UnreadableImageError(f"{MEMBER_DAMAGED}; {error}") from None
    if not flags & ZIP_SIZES_FOLLOW and len(content) == length and zlib.crc32(content) != checksum:
        raise UnreadableImageError(f"{MEMBER_DAMAGED}; its checksum is another")
    return content


def _read(read: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
    return read(offset, length) if length else b""  # an empty range is none to a storage


def _to_text(name: str) -> str:
    """A name as valid Unicode, which leaves no two names alike, and none with a mark in it."""
    text = UNCLEAR.sub(lambda match: rf"\x{ord(match[0]):x}", name) if "\\" in name or MARK in name else name
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
