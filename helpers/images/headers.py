"""The size of an image from the first bytes of its file, without decoding it.

A few kilobytes can claim a hundred thousand pixels a side; decoding such a file takes the worker's memory before anyone
can look at the result. Sources: the formats' specifications (ITU-T T.81 B.2.2, PNG 11.2.2, GIF89a 18, BITMAPCOREHEADER
and BITMAPINFOHEADER, TIFF 6.0 section 2, RFC 9649).
"""

import struct

Size = tuple[int, int]  # width, height as stored, before any EXIF rotation

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
    if head.startswith((b"II*\0", b"MM\0*")):
        return _tiff(content, "<" if head.startswith(b"II") else ">")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    return None


def _jpeg(content: bytes | memoryview) -> Size | None:
    position = 2
    while content[position] == 0xFF:
        marker = content[position + 1]
        if marker in JPEG_SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", content, position + 5)
            return width, height
        if marker == 0xFF:  # fill byte
            position += 1
        else:
            position += 2 + struct.unpack_from(">H", content, position + 2)[0]
    return None


def _tiff(content: bytes | memoryview, order: str) -> Size | None:
    (directory,) = struct.unpack_from(order + "I", content, 4)
    (entries,) = struct.unpack_from(order + "H", content, directory)
    found = {}
    for entry in range(entries):
        place = directory + 2 + 12 * entry
        tag, kind = struct.unpack_from(order + "HH", content, place)
        found[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), content, place + 8)[0]
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
