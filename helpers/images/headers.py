"""The size of an image from the first bytes of its file, without decoding it.

A few kilobytes can claim a hundred thousand pixels a side; decoding such a file takes the worker's memory before anyone
can look at the result. Sources: the formats' specifications (ITU-T T.81 B.2.2, PNG 11.2.2, GIF89a 18, BITMAPCOREHEADER
and BITMAPINFOHEADER, TIFF 6.0 section 2, RFC 9649).
"""

import re
import struct

Size = tuple[int, int]  # width, height as stored, before any EXIF rotation

# What is between segments decoders skip, and these markers have no length: fill bytes, stuffed zeros, restarts.
JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
BITMAP_CORE_HEADER = 12  # bytes; the older one, with sides of 16 bits
TIFF_WIDTH, TIFF_HEIGHT = 256, 257


def read_size(content: bytes | memoryview) -> Size | None:
    """Return width and height in pixels; None where the format is unknown or the header is damaged."""
    try:
        return _read_size(content, bytes(content[:32]))
    except (struct.error, IndexError):
        return None  # shorter than its own header says; the decoder will tell what is wrong


def _read_size(content: bytes | memoryview, head: bytes) -> Size | None:
    if head.startswith(b"\xff\xd8"):
        return _jpeg(content)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack_from(">II", head, 16)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return struct.unpack_from("<HH", head, 6)
    if head.startswith(b"BM"):
        (length,) = struct.unpack_from("<I", head, 14)
        width, height = struct.unpack_from("<HH" if length == BITMAP_CORE_HEADER else "<ii", head, 18)
        return width, abs(height)  # negative: stored from the top
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _tiff(content, "<" if head.startswith(b"II") else ">")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    return None


def _jpeg(content: bytes | memoryview) -> Size | None:
    position = 2
    while found := JPEG_SEGMENT.search(content, position):
        start = found.start()
        if content[start + 1] in JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", content, start + 5)
            return width, height
        position = start + 2 + struct.unpack_from(">H", content, start + 2)[0]
    return None


def _tiff(content: bytes | memoryview, order: str) -> Size | None:
    big = b"+" in bytes(content[:4])  # BigTIFF: counts and offsets of 64 bits
    (directory,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), content, directory)
    found = {}
    for entry in range(entries):
        place = directory + (8 + 20 * entry if big else 2 + 12 * entry)
        tag, kind = struct.unpack_from(order + "HH", content, place)
        value = struct.unpack_from(order + {3: "H", 16: "Q"}.get(kind, "I"), content, place + (12 if big else 8))
        found[tag] = value[0]
    return (found[TIFF_WIDTH], found[TIFF_HEIGHT]) if {TIFF_WIDTH, TIFF_HEIGHT} <= set(found) else None


def _webp(head: bytes) -> Size | None:
    kind = head[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        width, width_high, height, height_high = struct.unpack_from("<HBHB", head, 24)
        return 1 + width + (width_high << 16), 1 + height + (height_high << 16)
    return None
