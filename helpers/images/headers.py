"""What an image file says of itself, read without decoding it: its size, and what decoding would take.

A few kilobytes can claim a hundred thousand pixels a side; decoding such a file takes the worker's memory before anyone
can look at the result. Others have few pixels and make the decoder take memory or minutes nevertheless. Sources: the
formats' specifications (ITU-T T.81 annex B, PNG 5 and 11.2, GIF89a 18 to 22 and its annex F, BITMAPCOREHEADER and
BITMAPINFOHEADER, TIFF 6.0 sections 2 and 15, RFC 9649), and how the libraries that OpenCV decodes with read them.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

Content = bytes | memoryview
Size = tuple[int, int]  # width, height as stored, before any EXIF rotation

DAMAGED = "the image is damaged or cut short"

# Bytes per pixel while an image is decoded: what was measured, and some air.
PLAIN = 8
GIF, WEBP, ANIMATED_WEBP = 14, 12, 20

# What is between segments decoders skip, and these markers have no length: fill bytes, stuffed zeros, restarts.
JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
JPEG_SCAN = re.compile(rb"\xff\xda")  # coded data never holds it
SCANS = 100  # encoders write about ten; each of them, be it empty, costs a pass over all pixels
SEGMENTS = 10_000  # before the first scan; a color profile takes up to 255 of them

PNG_CHUNK = struct.Struct(">I4s").unpack_from  # length and name
COMPRESSED_TEXTS = (b"zTXt", b"iTXt", b"iCCP")
TEXT_BYTES = 8_000_000  # of one text: libpng decompresses no more
TEXTS_BYTES = 8 * TEXT_BYTES
ZLIB_RATIO = 1032  # bytes from one byte, at most

GIF_MAX_BITS = 12  # of a code
GIF_TABLES = 20_000  # of codes, however few pixels there are; each takes 10 us
GIF_TABLE_PIXELS = 250  # that each further table serves for, at least: those that do not compress change it so often

BITMAP_CORE_HEADER = 12  # bytes; the older one, with sides of 16 bits

TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_SAMPLES = 256, 257, 258, 277
TIFF_ROWS_PER_STRIP, TIFF_TILE_WIDTH, TIFF_TILE_HEIGHT = 278, 322, 323
TIFF_READ = (TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_SAMPLES, TIFF_ROWS_PER_STRIP, TIFF_TILE_WIDTH, TIFF_TILE_HEIGHT)
TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
TIFF_OTHERS = {2: 1, 5: 8, 10: 8, 11: 4, 12: 8}  # bytes of a value of the other types
TIFF_ENTRIES = 65_535  # of a directory
TIFF_ALL_ROWS = 2**32 - 1
TILED_AIR = 2**26  # pixels that tiles may have beyond four times the image's

WEBP_ANIMATION = 2  # a flag


@dataclass(frozen=True)
class Header:
    """What an image's header says, before it is decoded."""

    width: int  # in pixels, as stored, before any EXIF rotation
    height: int  # likewise
    nbytes: int  # the memory that decoding takes, about and at most
    problem: str | None = None  # why it is not to be decoded; None if nothing is known against it
    animation: tuple[int, int] | None = None  # start and end of the chunk that makes a PNG an animation


def read_header(content: Content) -> Header | None:
    """Return what the file says of its image; None where the format is unknown or the header is damaged."""
    try:
        header = _read_header(content, bytes(content[:32]))
    except (struct.error, IndexError):
        return None  # shorter than its own header says; the decoder will tell what is wrong
    return header if header and min(header.width, header.height) > 0 else None


def _read_header(content: Content, head: bytes) -> Header | None:
    if head.startswith(b"\xff\xd8"):
        return _jpeg(content)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(content)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _gif(content)
    if head.startswith(b"BM"):
        (length,) = struct.unpack_from("<I", head, 14)
        width, height = struct.unpack_from("<HH" if length == BITMAP_CORE_HEADER else "<ii", head, 18)
        return Header(width, abs(height), PLAIN * width * abs(height))  # negative: stored from the top
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _tiff(content, "<" if head.startswith(b"II") else ">")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    return None


def _jpeg(content: Content) -> Header | None:
    frame, position, segments = None, 2, 0
    while (segment := JPEG_SEGMENT.search(content, position)) and segments < SEGMENTS:
        start = segment.start()
        marker = content[start + 1]
        if marker == 0xDA or start + 4 > len(content):
            break
        if marker in JPEG_SIZE_MARKERS and frame is None:
            frame = marker, *struct.unpack_from(">HHB", content, start + 5)
        position = start + 2 + struct.unpack_from(">H", content, start + 2)[0]
        segments += 1
    if frame is None:
        return None
    kind, height, width, components = frame
    # Several scans add to one image, which waits in coefficients of two bytes for the last of them.
    several = kind in JPEG_PROGRESSIVE or any(first < components for first in content[start + 4 : start + 5])
    scans = sum(1 for _ in islice(JPEG_SCAN.finditer(content, start), SCANS + 1)) if several else 1
    problem = f"the image is damaged: it has more than {SCANS} scans" if scans > SCANS else None
    return Header(width, height, max(PLAIN, 5 + 2 * components * several) * width * height, problem)


def _png(content: Content) -> Header:
    width, height = struct.unpack_from(">II", content, 16)
    position, animations, texts, ended = 8, [], 0, False
    size = len(content)
    while position + 12 <= size and not ended:
        length, kind = PNG_CHUNK(content, position)
        end = position + 12 + length
        if end > size:  # OpenCV takes memory for a chunk before it looks whether the file has it
            break
        if kind == b"acTL":
            animations.append((position, end))
        elif kind in COMPRESSED_TEXTS:
            texts += min(TEXT_BYTES, length * ZLIB_RATIO)
        position, ended = end, kind == b"IEND"
    problem = None if ended and len(animations) < 2 else DAMAGED
    if texts > TEXTS_BYTES:
        problem = "the image is damaged: it has too many compressed texts"
    nbytes = PLAIN * width * height + texts + size
    return Header(width, height, nbytes, problem, animations[0] if animations else None)


def _gif(content: Content) -> Header:
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    position = 13 + _table_bytes(flags)
    while content[position : position + 1] == b"!":  # an extension
        position += 2
        for start, length in _blocks(content, position):
            position = start + length
        position += 1
    # The descriptor of the first frame comes next, then its own colors, then the bits of its codes.
    position += 10 + sum(map(_table_bytes, content[position + 9 : position + 10]))
    tables, limit = 0, GIF_TABLES + width * height // GIF_TABLE_PIXELS
    for bits in content[position : position + 1]:
        codes = b"".join(content[start : start + length] for start, length in _blocks(content, position + 1))
        tables = _count_tables(codes, bits, limit) if 1 < bits < GIF_MAX_BITS else 0
    problem = f"the image is damaged: it has more than {limit} tables of codes" if tables > limit else None
    return Header(width, height, GIF * width * height, problem)


def _table_bytes(flags: int) -> int:
    """The length of a GIF's table of colors."""
    return 6 << (flags & 7) if flags & 0x80 else 0


def _blocks(content: Content, position: int) -> Iterator[tuple[int, int]]:
    """Start and length of each block of data; an empty one ends them."""
    while position < len(content) and content[position]:
        yield position + 1, content[position]
        position += 1 + content[position]


def _count_tables(codes: bytes, bits: int, limit: int) -> int:
    """How often the codes of a GIF throw their table away, or end it; the count stops at one more than may be.

    The length of a code follows from the number of codes before it, so numpy looks at all codes of a table at once.
    """
    size, count, place, is_full, looked_at = 8 * len(codes), 0, 0, False, len(codes)
    words = np.ndarray(len(codes), "<u4", codes + bytes(3), strides=(1,))  # of each byte and the three behind it
    # The search ends where not even the shortest codes could come to more than may be.
    while count <= limit < count + (size - place) // (bits + 1):
        start, offset = divmod(place, 8)
        first, shift, mask, ends = _code_places(bits, is_full, offset)
        available = int(np.searchsorted(ends, size - 8 * start, side="right"))
        window = min(available, looked_at)
        if not available:
            break
        is_end = (words[start:][first[:window]] >> shift[:window] & mask[:window]) >> 1 == 1 << bits - 1  # two codes do
        last = int(is_end.argmax())
        if is_end[last]:
            count, is_full, looked_at = count + 1, False, 2 * last + 64  # tables are about as long as the last
        elif window < available:
            looked_at = available
            continue
        else:
            is_full, last = True, available - 1
        place = 8 * start + int(ends[last])
    return count


@lru_cache(maxsize=16)
def _code_places(bits: int, is_full: bool, offset: int) -> tuple[np.ndarray, ...]:
    """First byte, shift, mask and end in bits of each code of a table, or of as many codes behind a full one."""
    lengths = np.arange(bits + 1, GIF_MAX_BITS + 1)
    widths = np.repeat(lengths, [(1 << bits) - 1, *(1 << lengths[:-1])])
    widths = np.full_like(widths, GIF_MAX_BITS) if is_full else widths
    ends = offset + np.cumsum(widths)
    first, shift = np.divmod(ends - widths, 8)
    return first, shift.astype(np.uint32), ((1 << widths) - 1).astype(np.uint32), ends


def _tiff(content: Content, order: str) -> Header | None:
    tags, claimed = _tags(content, order)
    width, height = tags.get(TIFF_WIDTH, 0), tags.get(TIFF_HEIGHT, 0)
    if min(width, height) < 1:
        return None
    problem = "the image is damaged: its tags claim more bytes than the file has" if claimed > len(content) else None
    if {TIFF_TILE_WIDTH, TIFF_TILE_HEIGHT} & set(tags):
        across, down = tags.get(TIFF_TILE_WIDTH) or width, tags.get(TIFF_TILE_HEIGHT) or height
        part = decoded = across * down
        if -(-width // across) * -(-height // down) * part > 4 * width * height + TILED_AIR:
            problem = f"the image is damaged: its {width} x {height} pixels are in tiles of {across} x {down}"
    else:
        rows = tags.get(TIFF_ROWS_PER_STRIP, 0)
        rows = height if rows in (0, TIFF_ALL_ROWS) else rows
        part, decoded = width * rows, width * min(rows, height)
    # libtiff reads, decodes and widens one whole part after the other. OpenCV refuses more and longer samples.
    samples = min(tags.get(TIFF_SAMPLES, 1), 4) * min(tags.get(TIFF_BITS, 1), 16) / 8
    nbytes = max(PLAIN * width * height, int(4 * width * height + 4 * part + 2 * samples * decoded)) + 4 * claimed
    return Header(width, height, nbytes, problem)


def _tags(content: Content, order: str) -> tuple[dict[int, int], int]:
    """The first value of each tag of a TIFF's first image that is a whole number, and what all values together take.

    The first of two entries of one tag counts, as it does for libtiff.
    """
    big = b"+" in bytes(content[:4])  # BigTIFF: counts and offsets of 64 bits
    count_format, offset_format, inline = ("Q", "Q", 8) if big else ("H", "I", 4)
    (directory,) = struct.unpack_from(order + offset_format, content, inline)
    (entries,) = _unpack(order + count_format, content, directory)
    tags: dict[int, int] = {}
    claimed, place = 0, directory + struct.calcsize(count_format)
    for _ in range(min(entries, TIFF_ENTRIES)):
        tag, kind, count = _unpack(f"{order}HH{offset_format}", content, place)
        form = TIFF_INTEGERS.get(kind, "")
        length = count * (struct.calcsize(form) if form else TIFF_OTHERS.get(kind, 0))
        claimed += length
        if tag not in tags:
            at = place + 4 + inline
            if length > inline:
                (at,) = _unpack(order + offset_format, content, at)
            tags[tag] = _unpack(order + form, content, at)[0] if form and tag in TIFF_READ else 0
        place += 4 + 2 * inline
    return tags, claimed


def _unpack(form: str, content: Content, place: int) -> tuple[int, ...]:
    """As `struct.unpack_from`, from any place that a file may name."""
    if not 0 <= place <= len(content):
        raise struct.error("beyond the end of the file")
    return struct.unpack_from(form, content, place)


def _webp(head: bytes) -> Header | None:
    kind, flags = head[12:16], 0
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        flags, width, width_high, height, height_high = struct.unpack_from("<BxxxHBHB", head, 20)
        width, height = 1 + width + (width_high << 16), 1 + height + (height_high << 16)
    else:
        return None
    return Header(width, height, (ANIMATED_WEBP if flags & WEBP_ANIMATION else WEBP) * width * height)
