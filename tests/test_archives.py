"""Members of archives are images: read by range, a row each, whatever the archive says.

In a copy of the repository each protection was taken out alone, and a test failed.
"""

import io
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from cluster import read_results, read_rows
from dfs_facade import Refusal, Request
from test_video import pictures, write_clip

from helpers import pipeline
from helpers.config import Config, load_config
from helpers.errors import RunError
from helpers.images.archive import find_members, read_member, split_member, split_members
from helpers.images.boundary import LASTING, UnreadableImageError
from helpers.memory import bounded, resident_megabytes
from helpers.pipeline import stages
from helpers.pipeline.listing import LIKE_MEMBERS, list_images
from helpers.pipeline.reading import list_members
from helpers.storage import LocalStorage, open_storage

ZipInfo = zipfile.ZipInfo
SUFFIXES = (".png", ".jpg")
REFUSED = (".zip", ".tar", ".mp4")
MOST = 2**20  # bytes of an image


def settings(**overrides) -> Config:
    return load_config("local", **{"spark.master": "local[2]", "pictures": 0, "report": 0, **overrides})


def picture(number: int = 0) -> bytes:
    return cv2.imencode(".png", pictures(number + 1, width=60, height=40)[number])[1].tobytes()


def tar(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT, change: Callable | None = None) -> bytes:
    """A tar file; `change` is given the header of each member before it is written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change:
                change(info)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, file: io.IOBase | None = None) -> bytes:
    buffer = file or io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return buffer.getvalue()


class Streamed(io.BytesIO):
    """What cannot be sought: sizes then follow the members' bytes."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def members_of(content: bytes) -> tuple[dict[str, bytes | str | None], str | None]:
    """Each member's bytes, or why it has none, and why the archive could not be read to its end."""
    storage = io.BytesIO(content)

    def read(start: int, length: int) -> bytes:
        storage.seek(start)
        return storage.read(length)

    contents: dict[str, bytes | str | None] = {}
    try:
        for member in find_members(io.BytesIO(content)):
            assert 0 <= member.length < 2**63
            try:
                contents[member.name] = member.error or read_member(read, *member[1:4])
            except UnreadableImageError as error:
                contents[member.name] = str(error)
    except UnreadableImageError as error:
        return contents, str(error)
    return contents, None


# ---------------------------------------------------------------- members and their bytes

NAMES = [
    "a.png",
    "deep/er/b.png",
    "./c.png",
    "../d.png",
    "/e.png",
    "new\nline.png",
    "Öl 写真 🙂.png",
    "l" * 300 + ".png",
]
CONTENTS = {name: picture()[: 100 + number] for number, name in enumerate(NAMES)} | {"empty.png": b""}
PACKED: dict[str, Callable[[], bytes]] = {
    "pax": lambda: tar(CONTENTS),
    "gnu": lambda: tar(CONTENTS, tarfile.GNU_FORMAT),
    "ustar": lambda: tar(
        {name: content for name, content in CONTENTS.items() if len(name) < 100}, tarfile.USTAR_FORMAT
    ),
    "deflated": lambda: zipped(CONTENTS),
    "stored": lambda: zipped(CONTENTS, zipfile.ZIP_STORED),
    "streamed": lambda: zipped(CONTENTS, file=Streamed()),
    "streamed, stored": lambda: zipped(CONTENTS, zipfile.ZIP_STORED, Streamed()),
    "behind a program": lambda: b"#!/bin/sh\n" * 99 + zipped(CONTENTS),
}


@pytest.mark.parametrize("kind", PACKED)
def test_members_have_the_bytes_that_were_packed(kind):
    contents, error = members_of(PACKED[kind]())
    expected = {name: content for name, content in CONTENTS.items() if kind != "ustar" or len(name) < 100}
    assert contents == expected and error is None


def test_names_that_are_no_text_or_hold_a_mark_stay_apart():
    names = [b"caf\xe9.png", b"caf\\xe9.png", b"a#member=b.png", b"a\\x23member=b.png", b"plain\\.png"]
    content = tar({os.fsdecode(name): bytes([number]) for number, name in enumerate(names)}, tarfile.GNU_FORMAT)
    contents, error = members_of(content)
    assert contents == {
        "caf\\xe9.png": b"\0",
        "caf\\x5cxe9.png": b"\1",
        "a\\x23member=b.png": b"\2",
        "a\\x5cx23member=b.png": b"\3",
        "plain\\.png": b"\4",
    }
    assert error is None and all(name.encode() for name in contents)


def test_a_members_path_splits_the_same_in_python_and_arrow():
    paths = [
        "s.tar#member=a.png",
        "s\n.tar#member=new\nline.png",
        "a.png",
        "d#member=x/s.tar#member=b.png",
        "c.mp4#frame=3",
    ]
    files, names = split_members(pa.chunked_array([paths]))
    assert list(zip(files.to_pylist(), names.to_pylist(), strict=True)) == list(map(split_member, paths))
    assert split_member(paths[3]) == ("d#member=x/s.tar", "b.png") and split_member(paths[2]) == ("a.png", None)


class CountingFile(io.FileIO):
    """Counts the bytes that are read."""

    bytes = 0

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        self.bytes += count
        return count


class Counting(LocalStorage):
    """Counts the bytes of ranges that are read."""

    bytes = 0

    def read_range(self, path: str, start: int, length: int) -> bytes:
        content = super().read_range(path, start, length)
        self.bytes += len(content)
        return content


@pytest.mark.parametrize("pack", [tar, lambda members: zipped(members, zipfile.ZIP_STORED)], ids=["tar", "zip"])
def test_of_a_large_archive_little_is_read_to_list_it(tmp_path, pack):
    (tmp_path / "a").write_bytes(pack({f"{number}.png": os.urandom(500_000) for number in range(20)}))
    with CountingFile(tmp_path / "a") as file:
        members = list(find_members(io.BufferedReader(file)))
    assert len(members) == 20 and file.bytes < (tmp_path / "a").stat().st_size / 20
    storage = Counting(str(tmp_path))
    content = read_member(lambda *part: storage.read_range("a", *part), *members[7][1:4])
    assert len(content) == 500_000 and storage.bytes < 502_000


# ---------------------------------------------------------------- archives that lie


def link(info: tarfile.TarInfo) -> None:
    if info.name.startswith("bad"):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


def hard_link(info: tarfile.TarInfo) -> None:
    if info.name.startswith("bad"):
        info.type, info.linkname, info.size = tarfile.LNKTYPE, "good.png", 0


def device(info: tarfile.TarInfo) -> None:
    if info.name.startswith("bad"):
        info.type, info.size = tarfile.CHRTYPE, 0


def numbered(value: int) -> bytes:
    """A number in a tar header, of any size and sign."""
    return bytes([0x80 if value >= 0 else 0xFF]) + (value % 2**88).to_bytes(11, "big")


def tar_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


GOOD = {"good.png": b"good"}
START = tar(GOOD)[:1024]
END = bytes(1024)


def directory_entry(content: bytes, name: bytes) -> int:
    return content.rindex(name) - 46


def changed(content: bytes, name: bytes, at: int, form: str, value: int) -> bytes:
    """A zip file with another value in its directory's entry of a member (APPNOTE 4.3.12)."""
    new = bytearray(content)
    struct.pack_into(form, new, directory_entry(content, name) + at, value)
    return bytes(new)


PAIR = zipped({"bad.png": b"x" * 5000, "good.png": b"good"})
FLAGS, METHOD, PACKED_SIZE, SIZE, SYSTEM, ATTRIBUTES, OFFSET = 8, 10, 20, 24, 5, 38, 42


def zip_link() -> bytes:
    return changed(changed(PAIR, b"bad.png", SYSTEM, "<B", 3), b"bad.png", ATTRIBUTES, "<L", 0o120777 << 16)


def overlapping() -> bytes:
    """A hundred members that all are the same bytes."""
    content = zipped({f"bad{number:02}.png": b"x" * 5000 for number in range(100)} | GOOD)
    for number in range(99):
        content = changed(content, b"bad%02d.png" % number, OFFSET, "<L", content.index(b"PK\3\4", 40))
    return content


def wrong_zip64(value: int, *fields: int) -> bytes:
    """Some fields of a member are said to stand in its extra field, where they are absurd."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pack:
        info = zipfile.ZipInfo("bad.png")
        info.extra = struct.pack(f"<2H{len(fields)}Q", 1, 8 * len(fields), *[value] * len(fields))
        pack.writestr(info, b"x" * 5000)
        pack.writestr("good.png", b"good")
    content = buffer.getvalue()
    for at in fields:
        content = changed(content, b"bad.png", at, "<L", 0xFFFFFFFF)
    return content


def zip64_end(entries: int, size: int, offset: int) -> bytes:
    content = zipped(GOOD)
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, offset)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(content) - 22, 1)
    return content[:-22] + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


GOOD_READ = ("good.png", b"good")
OUTSIDE, CUT = "the member is damaged or cut short; it would", "the archive is damaged or cut short"
# What makes each, its members' bytes or the beginning of their error, and the same of the archive's.
HOSTILE: dict[str, tuple[Callable[[], bytes], dict[str, bytes | str], str | None]] = {
    "link.tar": (
        lambda: tar({"bad.png": b"", **GOOD}, change=link),
        {"bad.png": "the member is a link", "good.png": b"good"},
        None,
    ),
    "hard link.tar": (
        lambda: tar({**GOOD, "bad.png": b""}, change=hard_link),
        {"good.png": b"good", "bad.png": "the member is a link"},
        None,
    ),
    "device.tar": (
        lambda: tar({"bad.png": b"", **GOOD}, change=device),
        {"bad.png": "the member is a pipe or a device", "good.png": b"good"},
        None,
    ),
    "folder.tar": (
        lambda: tar(
            {"bad.png/": b"", **GOOD},
            change=lambda info: setattr(info, "type", tarfile.DIRTYPE if info.name[0] == "b" else tarfile.REGTYPE),
        ),
        {"good.png": b"good"},
        None,
    ),
    "sparse.tar": (
        lambda: START + tar_header("bad.png", b"%011o\0" % 0, b"S") + END,
        {"good.png": b"good", "bad.png": "the member is stored with gaps"},
        None,
    ),
    "cut in a member.tar": (
        lambda: tar(GOOD | {"bad.png": b"x" * 5000})[:3000],
        {"good.png": b"good", "bad.png": OUTSIDE},
        CUT,
    ),
    "cut in a header.tar": (lambda: tar(GOOD | {"bad.png": b"x" * 5000})[:1300], {"good.png": b"good"}, CUT),
    "cut before its end.tar": (lambda: START, {"good.png": b"good"}, CUT),
    "other bytes.tar": (lambda: START + b"\xff" * 2000, {"good.png": b"good"}, CUT),
    "longer than the file.tar": (
        lambda: START + tar_header("bad.png", numbered(2**70)),
        {"good.png": b"good", "bad.png": OUTSIDE},
        CUT,
    ),
    "negative.tar": (
        lambda: START + tar_header("bad.png", numbered(-512)) + END,
        {"good.png": b"good"},
        CUT,
    ),
    "negative at first.tar": (lambda: tar_header("bad.png", numbered(-512)) + END, {"bad.png": OUTSIDE}, CUT),
    "slightly negative.tar": (
        lambda: START + tar_header("bad.png", numbered(-1)) + END,
        {"good.png": b"good", "bad.png": OUTSIDE},
        None,
    ),
    "leads back.tar": (
        lambda: START + tar_header("bad.png", numbered(-1024)) + END,
        {"good.png": b"good"},
        CUT,
    ),
    "long name.tar": (lambda: START + tar_header("x", numbered(2**40), b"L"), {"good.png": b"good"}, CUT),
    "attributes.tar": (lambda: START + tar_header("x", numbered(2**40), b"x"), {"good.png": b"good"}, CUT),
    "no attributes.tar": (
        lambda: START + tar_header("x", b"%011o\0" % 512, b"x") + b"\xff" * 512 + END,
        {"good.png": b"good"},
        CUT,
    ),
    "names of names.tar": (
        lambda: START + (tar_header("x", b"%011o\0" % 0, b"L")) * 5000 + END,
        {"good.png": b"good"},
        CUT,
    ),
    "a very long name.tar": (lambda: tar(GOOD | {"n" * 5000 + ".png": b""}), {"good.png": b"good"}, CUT),
    "zeros.tar": (lambda: bytes(10240), {}, "the archive is empty"),
    "packed.tar.gz": (lambda: zlib.compress(tar(GOOD), wbits=31), {}, "the archive is compressed as a whole"),
    "empty.zip": (lambda: zipped({}), {}, "the archive is empty"),
    "nothing.zip": (lambda: b"", {}, "the file is empty"),
    "text.zip": (lambda: b"shopping list: milk, eggs" * 99, {}, "the file is not an archive"),
    "cut.zip": (lambda: PAIR[:-30], {}, CUT),
    "encrypted.zip": (
        lambda: changed(PAIR, b"bad.png", FLAGS, "<H", 1),
        {"bad.png": "the member is encrypted", "good.png": b"good"},
        None,
    ),
    "link.zip": (zip_link, {"bad.png": "the member is a link", "good.png": b"good"}, None),
    "method.zip": (
        lambda: zipped({"bad.png": b"x" * 99}, zipfile.ZIP_LZMA),
        {"bad.png": "the member is compressed by method 14"},
        None,
    ),
    "bomb.zip": (
        lambda: changed(zipped({"bad.png": bytes(50_000_000)} | GOOD), b"bad.png", SIZE, "<L", 40_000),
        {"bad.png": "the member is damaged or cut short; it does not have the length", "good.png": b"good"},
        None,
    ),
    "shorter.zip": (
        lambda: changed(PAIR, b"bad.png", SIZE, "<L", 5001),
        {"bad.png": "the member is damaged or cut short; it does not have the length", "good.png": b"good"},
        None,
    ),
    "much for little.zip": (
        lambda: changed(zipped({"bad.png": os.urandom(50_000)} | GOOD), b"bad.png", SIZE, "<L", 9),
        {"bad.png": "the member is damaged or cut short; the archive has", "good.png": b"good"},
        None,
    ),
    "offset.zip": (
        lambda: changed(zipped(GOOD | {"bad.png": b"x" * 5000}), b"bad.png", OFFSET, "<L", 50),
        {"bad.png": "the member is damaged or cut short; it is not where", "good.png": b"good"},
        None,
    ),
    "offset far away.zip": (
        lambda: changed(PAIR, b"bad.png", OFFSET, "<L", 2**32 - 2),
        {"bad.png": OUTSIDE, "good.png": b"good"},
        None,
    ),
    "packed size.zip": (
        lambda: changed(PAIR, b"bad.png", PACKED_SIZE, "<L", 2**32 - 2),
        {"bad.png": OUTSIDE, "good.png": b"good"},
        None,
    ),
    "overlapping.zip": (
        overlapping,
        {f"bad{n:02}.png": "the member is damaged or cut short; another has" for n in range(98)}
        | {"bad98.png": b"x" * 5000, "bad99.png": b"x" * 5000, "good.png": b"good"},
        None,
    ),
    "flipped.zip": (
        lambda: zipped({"bad.png": b"x" * 99} | GOOD, zipfile.ZIP_STORED).replace(b"xxx", b"xyx", 1),
        {"bad.png": "the member is damaged or cut short; its checksum", "good.png": b"good"},
        None,
    ),
    "no deflate.zip": (
        lambda: b"PK\3\4\x14\0\0\0\x08" + zipped({"bad.png": b"\xff" * 99} | GOOD, zipfile.ZIP_STORED)[9:],
        {"bad.png": "the member is damaged or cut short; Error -3", "good.png": b"good"},
        None,
    ),
    "sizes of 64 bits.zip": (
        lambda: wrong_zip64(2**64 - 1, PACKED_SIZE, SIZE),
        {"bad.png": OUTSIDE, "good.png": b"good"},
        None,
    ),
    "offset of 64 bits.zip": (
        lambda: wrong_zip64(2**64 - 1, OFFSET),
        {"bad.png": OUTSIDE, "good.png": b"good"},
        None,
    ),
    "directory of 64 bits.zip": (lambda: zip64_end(1, 2**60, 0), {}, CUT),
    "directory far away.zip": (lambda: zip64_end(1, 50, 2**60), {}, CUT),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_archive_that_lies_costs_what_it_lies_about_and_no_more(kind):
    make, expected, why = HOSTILE[kind]
    contents, error = members_of(make())
    assert set(contents) == set(expected)
    for name, content in contents.items():
        wanted = expected[name]
        assert content == wanted if isinstance(wanted, bytes) else str(content).startswith(wanted)
    assert (error is None) == (why is None) and (error or "").startswith(why or "")


class Noting(io.BytesIO):
    """Notes how much at once is wanted of it."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.sizes: list[int] = []

    def read(self, size: int | None = -1) -> bytes:
        self.sizes.append(len(self.getvalue()) - self.tell() if size is None or size < 0 else size)
        return super().read(size)


@pytest.mark.parametrize("kind", ["long name.tar", "attributes.tar"])
def test_a_header_is_not_believed_how_long_a_name_is(kind):
    file = Noting(HOSTILE[kind][0]())
    with pytest.raises(UnreadableImageError, match="claims to be endless"):
        list(find_members(file))
    assert max(file.sizes) <= 2**16


def test_a_directory_for_which_there_is_no_memory_is_not_read():
    content = zipped({f"{number:0100}.png": b"" for number in range(3000)})
    for max_memory, is_read in ((2**21, False), (2**23, True), (None, True)):
        file = Noting(content)
        if is_read:
            assert len(list(find_members(file, max_memory))) == 3000
        else:
            with pytest.raises(MemoryError):
                list(find_members(file, max_memory))
        assert (max(file.sizes) > 400_000) == is_read


def test_a_bomb_is_not_unpacked():
    content = HOSTILE["bomb.zip"][0]()
    (member,) = [member for member in find_members(io.BytesIO(content)) if member.name == "bad.png"]
    with bounded(round(resident_megabytes()) + 20), pytest.raises(UnreadableImageError):
        read_member(lambda start, length: content[start : start + length], *member[1:4])


# ---------------------------------------------------------------- rows, without Spark


def write(folder: Path, **files: bytes) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)


def rows_of_members(folder: Path, storage=None, **options) -> list[dict]:
    archives = list_images(open_storage(str(folder)), settings()).archives.sort_by("path")
    options = {"suffixes": SUFFIXES, "refused": REFUSED, "max_bytes": MOST, **options}
    batches = list_members(archives.to_batches(), storage or LocalStorage(str(folder)), **options)
    return [row for batch in batches for row in batch.to_pylist()]


def by_name(rows: list[dict], key: str) -> dict:
    return {row["path"].rpartition("/")[2]: row[key] for row in rows}


def test_archives_are_listed_by_suffix_and_an_empty_list_turns_them_off(tmp_path):
    write(tmp_path, a_png=b"1", b_tar=b"2", c_ZIP=b"3", d_tar_gz=b"4", e_tgz=b"5", f_txt=b"6")
    listing = list_images(open_storage(str(tmp_path)), settings())
    assert sorted(by_name(listing.archives.to_pylist(), "length")) == ["b.tar", "c.ZIP", "d.tar.gz", "e.tgz"]
    assert str(listing) == "1 images, 4 archives; left out: 1 with another suffix"
    listing = list_images(open_storage(str(tmp_path)), settings(**{"ingest.archives": []}))
    assert listing.archives.num_rows == 0 and listing.left_out == {"with another suffix": 5}


def test_a_file_with_the_path_of_a_member_is_left_out_and_counted(tmp_path):
    for name in ("a.png", "s.tar#member=a.png", "s.tar#member=b.mp4", "x#member=y.tar"):
        (tmp_path / name).write_bytes(b"1")
    listing = list_images(open_storage(str(tmp_path)), settings())
    assert listing.left_out == {LIKE_MEMBERS: 3} and listing.images.num_rows == 1


def test_an_archive_is_a_row_per_image_in_it(tmp_path):
    members = {"a.png": picture(), "b/C.PNG": b"12", "./d.jpg": b"1", "notes.txt": b"1", "a.json": b"{}"}
    members |= {".hidden.png": b"1", "__MACOSX/._a.png": b"1", ".git/b.png": b"1"}
    write(tmp_path, one_tar=tar(members), two_zip=zipped(members))
    os.utime(tmp_path / "one.tar", (10**9, 10**9))
    rows = rows_of_members(tmp_path)
    paths = [f"{tmp_path}/{name}#member={member}" for name in ("one.tar", "two.zip") for member in list(members)[:3]]
    assert [row["path"] for row in rows] == paths
    assert [row["length"] for row in rows] == [row["bytes"] for row in rows] == 2 * [len(picture()), 2, 1]
    assert {row["modified"].timestamp() for row in rows[:3]} == {10**9} and not any(row["error"] for row in rows)
    assert [row["packed"] is None for row in rows] == 3 * [True] + 3 * [False]


def test_of_two_members_with_one_name_the_last_counts(tmp_path):
    members = [tar({"a.png": b"first"})[:1024], tar({"b.png": b"b"})[:1024], tar({"a.png": b"2nd"})]
    write(tmp_path, a_tar=b"".join(members))
    rows = rows_of_members(tmp_path)
    assert by_name(rows, "length") == {"a.tar#member=b.png": 1, "a.tar#member=a.png": 3} and len(rows) == 2


def test_what_is_not_opened_within_an_archive_is_an_error(tmp_path):
    write(
        tmp_path,
        a_tar=tar({"b.zip": zipped(GOOD), "c.mp4": b"1", "long.png": bytes(MOST + 1), "good.png": bytes(MOST)}),
    )
    errors = by_name(rows_of_members(tmp_path), "error")
    for name in ("b.zip", "c.mp4"):
        assert errors[f"a.tar#member={name}"].startswith("the member is an archive or a video")
    assert errors["a.tar#member=long.png"].startswith(
        f"the file has {MOST + 1} bytes, more than the {MOST} that ingest"
    )
    assert errors["a.tar#member=good.png"] is None


def test_a_damaged_archive_is_a_row_beside_those_of_its_members(tmp_path):
    write(tmp_path, a_tar=tar(GOOD | {"bad.png": bytes(5000)})[:3000], b_zip=b"no archive", c_tar=b"")
    errors = by_name(rows_of_members(tmp_path), "error")
    assert {name: (error or "").partition(";")[0] for name, error in errors.items()} == {
        "a.tar#member=good.png": "",
        "a.tar#member=bad.png": "the member is damaged or cut short",
        "a.tar": "the archive is damaged or cut short",
        "b.zip": "the file is not an archive: it is neither a tar nor a zip file",
        "c.tar": "the file is empty",
    }
    assert all(error.startswith(LASTING) for error in errors.values() if error)


def test_an_archive_that_goes_before_it_is_looked_at_is_a_row(tmp_path, monkeypatch):
    write(tmp_path, a_tar=tar(GOOD), b_tar=tar(GOOD))
    opened = LocalStorage.open

    def remove(storage, path):
        (tmp_path / "a.tar").unlink(missing_ok=True)
        return opened(storage, path)

    monkeypatch.setattr(LocalStorage, "open", remove)
    errors = by_name(rows_of_members(tmp_path), "error")
    assert errors.pop("a.tar").startswith("the file is gone") and errors == {"b.tar#member=good.png": None}


def test_millions_of_members_take_no_more_memory_than_there_may_be(tmp_path, monkeypatch):
    """A directory of 200,000 entries takes 100 MB as objects; the archive beside it is read."""
    name, entries = b"%07d.png", 200_000
    entry = struct.Struct("<4s4B4HL2L5H2L")
    directory = b"".join(
        entry.pack(b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 1, 1, len(name % i), 0, 0, 0, 0, 0, 0) + name % i
        for i in range(entries)
    )
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, len(directory), 0)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    write(tmp_path, a_zip=directory + end, b_zip=zipped(GOOD))
    entries_seen = []
    with monkeypatch.context() as context:
        context.setattr(zipfile, "ZipInfo", lambda *arguments: entries_seen.append(1) or ZipInfo(*arguments))
        errors = by_name(rows_of_members(tmp_path, memory_megabytes=round(resident_megabytes()) + 40), "error")
    assert len(entries_seen) == 1
    assert errors.pop("a.zip").startswith("there is not enough memory") and errors == {"b.zip#member=good.png": None}
    assert sum(row["error"] is not None for row in rows_of_members(tmp_path)) == entries - 1


def test_tar_headers_are_forgotten_as_they_are_read(tmp_path):
    content = tar({f"{number}.png": b"" for number in range(300)})
    everywhere = tarfile.TarInfo.create_pax_global_header({"comment": "x" * 1000})
    remembered = []
    tarfile_next = tarfile.TarFile.next

    def count(file):
        remembered.append(len(file.members) + len(file.pax_headers))
        return tarfile_next(file)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(tarfile.TarFile, "next", count)
        assert len(list(find_members(io.BytesIO(everywhere + content)))) == 300
    assert len(remembered) >= 300 and set(remembered[2:]) == {0}


def test_many_members_are_rows_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.pipeline.reading.MEMBERS_PER_BATCH", 7)
    write(tmp_path, a_tar=tar({f"{number:02}.png": b"1" for number in range(20)}))
    archives = list_images(open_storage(str(tmp_path)), settings()).archives
    batches = list(list_members(archives.to_batches(), LocalStorage(str(tmp_path)), SUFFIXES, REFUSED, MOST))
    assert max(batch.num_rows for batch in batches) <= 7 and sum(batch.num_rows for batch in batches) == 20


def contents_read(batches: list[pa.RecordBatch], storage, **options) -> dict[str, tuple]:
    rows = pa.Table.from_batches(stages.read_images(batches, storage, 4, 2**20, **options)).to_pylist()
    return {row["path"].rpartition("/")[2]: (row["content"], row["error"]) for row in rows}


@pytest.fixture
def listed(tmp_path) -> tuple[pa.Table, LocalStorage]:
    members = {f"{number}.png": picture(number) for number in range(9)}
    write(tmp_path, a_tar=tar(members), b_zip=zipped(members))
    return pa.Table.from_pylist(rows_of_members(tmp_path)), LocalStorage(str(tmp_path))


def test_members_are_read_by_their_ranges_in_any_order(listed, tmp_path):
    members, _ = listed
    storage = Counting(str(tmp_path))
    shuffled = members.take(np.random.default_rng(0).permutation(members.num_rows))
    contents = contents_read(shuffled.to_batches(max_chunksize=5), storage)
    expected = {f"{name}#member={n}.png": (picture(n), None) for name in ("a.tar", "b.zip") for n in range(9)}
    assert contents == expected
    assert storage.bytes <= sum(members["length"].to_pylist()) + 9 * 1100  # what a zip file has before each


def test_members_without_a_range_are_looked_up(listed):
    members, storage = listed
    bare = members.select(["path", "length", "modified"])
    assert contents_read(bare.to_batches(), storage) == contents_read(members.to_batches(), storage)
    paths = bare["path"].to_pylist()
    for gone, error in ((".png", "the member is gone: its archive"), (".tar#", "the file is gone")):
        others = bare.set_column(0, "path", pa.array([path.replace(gone, f"x{gone}") for path in paths]))
        errors = [error for _, error in contents_read(others.to_batches(), storage).values()]
        assert [why is not None and why.startswith(error) for why in errors] == [gone in path for path in paths]


def test_a_member_that_is_too_long_is_not_read(listed):
    members, storage = listed
    contents = contents_read(members.to_batches(), storage, max_bytes=10)
    assert all(content is None and "ingest.max_bytes" in error for content, error in contents.values())


def test_an_archive_that_changes_after_it_was_listed_is_errors(listed, tmp_path):
    members, storage = listed
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.zip").write_bytes(b"something else")
    errors = [error for _, error in contents_read(members.to_batches(), storage).values()]
    assert all(error.startswith("the file is gone") for error in errors[:9])
    assert all(error.startswith("the member is damaged") for error in errors[9:]) and len(errors) == 18


# ---------------------------------------------------------------- runs


def comparable(output: Path, root: Path | str) -> dict[str, dict]:
    """Rows of the results by name, with the paths that the images have unpacked."""
    rows = read_rows(output)
    names = [
        row["path"].removeprefix(f"{root}/").replace(".tar#member=", "/").replace(".zip#member=", "/") for row in rows
    ]
    return {name: {**row, "path": name, "modified": None} for name, row in zip(names, rows, strict=True)}


CLASSES = 12


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """A folder with images, a video, a tar and a zip file, and the same with folders in the place of archives."""
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    members = {f"class {number % 3}/{number}.png": picture(number) for number in range(CLASSES)} | {
        "bad.png": b"no image"
    }
    for folder in (source, unpacked):
        write(folder, a_png=picture(1), b_png=picture(2))
        write_clip(folder / "clip.mp4", "mp4v", pictures(5))
    write(source, shard_tar=tar(members), pack_zip=zipped(members))
    for name, content in members.items():
        for archive in ("shard", "pack"):
            path = unpacked / archive / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return source, unpacked


def counts(summary: pipeline.RunSummary) -> tuple[int, int, int, int]:
    return summary.images, summary.ok, summary.failed, summary.skipped


def test_members_have_the_rows_that_they_have_as_files_and_a_changed_archive_is_worked_on_again(
    spark, places, bundle_uri, tmp_path
):
    source, unpacked = places
    output, config = tmp_path / "out", settings(**{"partitioning.partitions": 4, "pictures": 100})
    first = pipeline.run(spark, str(source), bundle_uri, str(output), config)
    pipeline.run(spark, str(unpacked), bundle_uri, str(tmp_path / "expected"), settings())
    assert comparable(output, source) == comparable(tmp_path / "expected", unpacked)
    images = 2 + 5 + 2 * (CLASSES + 1)
    assert counts(first) == (images, images - 2, 2, 0) and first.partitions == 4
    assert len(list((output / "pictures").iterdir())) == images - 2
    again = pipeline.run(spark, str(source), bundle_uri, str(output), config)
    assert counts(again) == (images, 0, 0, images)

    # One member goes, one is another, one is new; the zip file and the rest of the folder stay.
    left = {f"class {number % 3}/{number}.png": picture(number) for number in range(1, CLASSES)}
    write(source, shard_tar=tar(left | {"class 1/1.png": picture(20), "new.png": picture(21)}))
    changed = pipeline.run(spark, str(source), bundle_uri, str(output), config)
    assert counts(changed) == (images - 1, CLASSES, 0, images - 1 - CLASSES)
    rows = comparable(output, source)
    expected = {name for name in comparable(tmp_path / "expected", unpacked) if not name.startswith("shard/")}
    assert set(rows) == expected | {f"shard/{name}" for name in [*left, "new.png"]}

    # It is damaged, and mended.
    content = (source / "shard.tar").read_bytes()
    write(source, shard_tar=content[:1024])
    cut = pipeline.run(spark, str(source), bundle_uri, str(output), config)
    assert cut.failed == 2 and set(comparable(output, source)) == expected | {"shard.tar", "shard/class 1/1.png"}
    write(source, shard_tar=content)
    pipeline.run(spark, str(source), bundle_uri, str(output), config)
    assert set(comparable(output, source)) == set(rows)


def test_an_archive_that_could_not_be_read_leaves_its_rows_and_is_tried_again(
    spark, places, bundle_uri, tmp_path, monkeypatch
):
    source, output = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(places[0], source)
    pipeline.run(spark, str(source), bundle_uri, str(output), settings())
    write(source, new_png=picture(0))  # else nothing is looked at again
    before = set(comparable(output, source)) | {"new.png"}
    expand, error = pipeline.runs.expand, "the file cannot be read: permission denied"

    def unreadable(*arguments):
        images = expand(*arguments)
        is_member = pa.compute.match_substring(images["path"], "shard.tar#member=")
        shard = arguments[2].archives.filter(pa.compute.match_substring(arguments[2].archives["path"], "shard.tar"))
        row = {**shard.to_pylist()[0], "error": error}
        return pa.concat_tables(
            [images.filter(pa.compute.invert(is_member)), pa.Table.from_pylist([row], images.schema)]
        )

    with monkeypatch.context() as context:
        context.setattr("helpers.pipeline.runs.expand", unreadable)
        pipeline.run(spark, str(source), bundle_uri, str(output), settings())
    assert set(comparable(output, source)) == before | {"shard.tar"}
    assert comparable(output, source)["shard.tar"]["error"] == error
    pipeline.run(spark, str(source), bundle_uri, str(output), settings())
    assert set(comparable(output, source)) == before


@pytest.mark.parametrize("name", ["shard.tar", "pack.zip"])
def test_the_source_may_be_an_archive(spark, places, bundle_uri, tmp_path, name):
    source = places[0] / name
    summary = pipeline.run(spark, str(source), bundle_uri, str(tmp_path / "out"), settings())
    assert counts(summary) == (CLASSES + 1, CLASSES, 1, 0)
    assert all(row["path"].startswith(f"{source}#member=") for row in read_rows(tmp_path / "out"))


def test_the_reader_spark_leaves_members_to_the_tasks(spark, places, bundle_uri, tmp_path):
    source, _ = places
    for reader in ("files", "spark"):
        pipeline.run(spark, str(source), bundle_uri, str(tmp_path / reader), settings(reader=reader))
    rows = comparable(tmp_path / "spark", source)
    assert rows == comparable(tmp_path / "files", source) and len(rows) == 2 + 5 + 2 * (CLASSES + 1)


@pytest.mark.parametrize("reader", ["files", "spark"])
def test_stage_1_alone_has_the_members_too(spark, places, reader):
    source, _ = places
    rows = pipeline.ingest(spark, str(source), settings(reader=reader)).toArrow().to_pylist()
    contents = {row["path"].removeprefix(f"{source}/"): row["content"] for row in rows}
    assert contents["shard.tar#member=class 1/4.png"] == contents["pack.zip#member=class 1/4.png"] == picture(4)


def test_archives_without_an_image_are_no_source(spark, bundle_uri, tmp_path):
    write(tmp_path / "source", a_zip=zipped({"notes.txt": b"1"}))
    with pytest.raises(RunError, match=r"1 archives.*none of the archives has an image.*\.jpg"):
        pipeline.run(spark, str(tmp_path / "source"), bundle_uri, str(tmp_path / "out"), settings())


def test_a_folder_of_archives_that_lie_is_error_rows(spark, bundle_uri, tmp_path):
    source = tmp_path / "source"
    write(source, good_png=picture())
    for name, (make, _, _) in HOSTILE.items():
        (source / name).write_bytes(make())
    summary = pipeline.run(spark, str(source), bundle_uri, str(tmp_path / "out"), settings())
    errors = {row["path"].removeprefix(f"{source}/"): row["error"] for row in read_rows(tmp_path / "out")}
    expected = {"good.png"} | {name for name, (_, _, why) in HOSTILE.items() if why}
    expected |= {f"{kind}#member={name}" for kind, (_, members, _) in HOSTILE.items() for name in members}
    assert set(errors) == expected and len(errors) == summary.images
    assert [name for name, error in errors.items() if error is None] == ["good.png"]  # members of these are no images
    assert all(error.startswith(LASTING) for error in errors.values() if error)
    again = pipeline.run(spark, str(source), bundle_uri, str(tmp_path / "out"), settings())
    assert again.skipped == summary.images


@pytest.mark.spark
def test_a_run_over_abfss_has_the_rows_of_a_run_over_a_folder(
    here, places, bundle_uri, tmp_path, adls_settings, adls_root
):
    source, _ = places
    storage = open_storage(adls_root, settings(**adls_settings))
    for path in source.iterdir():
        storage.write(path.name, path.read_bytes())
    pipeline.run(here, str(source), bundle_uri, str(tmp_path / "local"), settings())
    pipeline.run(here, adls_root, bundle_uri, str(tmp_path / "abfss"), settings(**adls_settings))
    expected = comparable(tmp_path / "local", str(source))
    assert comparable(tmp_path / "abfss", adls_root) == expected and len(expected) == 2 + 5 + 2 * (CLASSES + 1)


@pytest.mark.parametrize("pack", [tar, zipped])
def test_of_an_archive_in_adls_no_more_is_fetched_than_is_wanted(dfs, adls_settings, adls_root, pack):
    storage = open_storage(adls_root, settings(**adls_settings))
    members = {f"{number}.png": os.urandom(3 * 2**20) for number in range(4)}
    content = pack(members)
    storage.write("a", content)
    fetched: list[str | None] = []

    def note(request: Request) -> None:
        fetched.append(request.headers.get("range"))

    with dfs.disturb(note):
        with storage.open("a") as file:
            found = list(find_members(file))
        listing = len(fetched)
        assert read_member(lambda *part: storage.read_range("a", *part), *found[2][1:4]) == members["2.png"]
    assert [member.name for member in found] == list(members) and listing <= 6
    lengths = [1 + int(end) - int(start) for start, end in (text.removeprefix("bytes=").split("-") for text in fetched)]
    assert sum(lengths[:listing]) < len(content) / 2 and sum(lengths[listing:]) < 3 * 2**20 + 2**12


def test_a_range_of_a_file_in_adls_ends_where_the_file_ends(dfs, adls_settings, adls_root):
    storage = open_storage(adls_root, settings(**adls_settings))
    storage.write("a", b"0123456789")
    assert storage.read_range("a", 7, 10) == b"789" and storage.read_range("a", 2, 3) == b"234"
    assert storage.read_range("a", 10, 10) == storage.read_range("a", 20, 10) == b""
    with dfs.disturb(lambda _: Refusal(416, "InvalidRange").answer):  # as the service answers to both
        assert storage.read_range("a", 10, 10) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range("none", 0, 10)


# ---------------------------------------------------------------- texts beside the members, as in WebDataset


def samples_tar() -> bytes:
    return tar(
        {
            "a/1.cls": b"7",
            "a/1.png": picture(1),
            "a/1.json": '{"name": "grün"}'.encode(),
            "a/2.left.png": picture(2),
            "a/2.right.png": picture(3),
            "a/2.json": b"{}",
            "b/1.png": picture(4),
            "b/1.json": bytes(2**20 + 1),
            "b/2.png": picture(5),
            "b/2.cls": b"\xff8",
        }
    )


TEXTS = {
    "a/1.png": ("7", '{"name": "grün"}'),
    "a/2.left.png": (None, "{}"),
    "a/2.right.png": (None, "{}"),
    "b/1.png": (None, None),  # too long
    "b/2.png": ("\ufffd8", None),
}


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_texts_beside_a_member_are_columns_of_its_row(spark, bundle_uri, tmp_path, form):
    (tmp_path / "in").mkdir()
    content = samples_tar()
    if form == "zip":
        with tarfile.open(fileobj=io.BytesIO(content)) as file:
            members = {info.name: file.extractfile(info).read() for info in file}  # type: ignore[union-attr]
        with zipfile.ZipFile(tmp_path / "in/shard.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        (tmp_path / "in/shard.tar").write_bytes(content)
    (tmp_path / "in/plain.png").write_bytes(picture())
    config = settings(**{"source.keep": ["cls", "json"]})
    summary = pipeline.run(spark, str(tmp_path / "in"), bundle_uri, str(tmp_path / "out"), config)
    assert (summary.images, summary.ok) == (6, 6)
    rows = {row["path"]: (row["cls"], row["json"]) for row in read_results(tmp_path / "out").to_pylist()}
    shard = f"{tmp_path}/in/shard.{form}"
    assert rows == {f"{shard}#member={name}": texts for name, texts in TEXTS.items()} | {
        f"{tmp_path}/in/plain.png": (None, None)
    }
    assert pipeline.run(spark, str(tmp_path / "in"), bundle_uri, str(tmp_path / "out"), config).skipped == 6
