"""Files of few bytes that claim many pixels, or make a decoder take memory or minutes in another way."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
WIDTH, HEIGHT = 32, 24
BYTES, SHORT, LONG, LONG8 = 1, 3, 4, 16  # types of TIFF


def noise(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- PNG


def chunk(name: bytes, content: bytes, length: int | None = None) -> bytes:
    """A chunk of a PNG, which may claim another length than it has."""
    claimed = len(content) if length is None else length
    return struct.pack(">I", claimed) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bilevel_png(width: int, height: int) -> bytes:
    """A black PNG, made without its pixels ever being in memory."""
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def png_with(*before: bytes, after: Sequence[bytes] = ()) -> bytes:
    """A small good PNG with more chunks before and behind its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(noise()))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0))
    return b"".join([PNG, header, *before, chunk(b"IDAT", zlib.compress(rows)), *after, chunk(b"IEND", b"")])


@cache
def text_chunk(megabytes: float, kind: bytes = b"zTXt") -> bytes:
    """A text of a PNG that is a thousandth of its length while it is compressed."""
    start = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return chunk(kind, start + zlib.compress(bytes(int(megabytes * 2**20)), 9))


# ---------------------------------------------------------------- JPEG and GIF


def jpeg_of_scans(side: int, scans: int, progressive: bool = True) -> bytes:
    """A JPEG with empty scans before its own, or with such of one color each where it is not progressive."""
    content = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=progressive)
    start = content.index(b"\xff\xda")
    (length,) = struct.unpack_from(">H", content, start + 2)
    one = content[start : start + 2 + length] if progressive else bytes.fromhex("ffda 0008 01 01 00 00 3f 00")
    return content[:start] + one * scans + content[start:]


def gif_of_clears(count: int, side: int = 16) -> bytes:
    """A GIF whose codes do nothing but throw their table away."""
    codes = int("100" * count, 2).to_bytes(-(-3 * count // 8), "little")  # of three bits, the lowest first; 4 clears
    blocks = b"".join(bytes([len(part)]) + part for part in (codes[i : i + 255] for i in range(0, len(codes), 255)))
    header = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x91, 0, 0) + bytes(range(12))
    return header + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\2" + blocks + b"\0;"


# ---------------------------------------------------------------- TIFF


def tiff(entries: list[tuple[int, int, list[int]]], data: bytes, big: bool = False, order: str = "<") -> bytes:
    """A TIFF with these tags (number, type, values) in this order, and its pixels or anything else at its place 16."""
    form, inline, mark = ("Q", 8, b"+") if big else ("I", 4, b"*")
    directory = 16 + len(data)
    place = directory + struct.calcsize(f"={'Q' if big else 'H'}") + (4 + 2 * inline) * len(entries) + inline
    table, values = struct.pack(order + ("Q" if big else "H"), len(entries)), b""
    for tag, kind, numbers in entries:
        packed = struct.pack(
            f"{order}{len(numbers)}{ {BYTES: 'B', SHORT: 'H', LONG: 'I', LONG8: 'Q'}[kind] }", *numbers
        )
        table += struct.pack(f"{order}HH{form}", tag, kind, len(numbers))
        if len(packed) > inline:
            table += struct.pack(order + form, place + len(values))
            values += packed
        else:
            table += packed.ljust(inline, b"\0")
    mark = b"II" + mark + b"\0" if order == "<" else b"MM\0" + mark
    start = struct.pack(order + "HHQ", 8, 0, directory) if big else struct.pack(order + "I", directory) + bytes(8)
    return mark + start + data + table + struct.pack(order + form, 0) + values


def picture_tags(width: int, height: int, length: int, **tags: int | list[int]) -> list[tuple[int, int, list[int]]]:
    """The tags of a TIFF of three colors in one part of so many bytes, or with others of these values."""
    numbers = {"samples": 277, "bits": 258, "packing": 259, "rows": 278, "across": 322, "down": 323, "planar": 284}
    values = {256: width, 257: height, 258: [8, 8, 8], 259: 1, 262: 2, 277: 3, 284: 1}
    tiled = "across" in tags
    values |= {324 if tiled else 273: 16, 325 if tiled else 279: length} | ({} if tiled else {278: height})
    values |= {numbers[name]: value for name, value in tags.items()}
    listed = {tag: value if isinstance(value, list) else [value] for tag, value in values.items()}
    return [(tag, SHORT if max(value) < 2**16 else LONG, value) for tag, value in sorted(listed.items())]


def small_tiff(**tags: int | list[int]) -> bytes:
    """A good one, unless its tags say otherwise."""
    pixels = np.asarray(noise()).tobytes()
    return tiff(picture_tags(WIDTH, HEIGHT, len(pixels), **tags), pixels)


def tiff_of_two_sizes(width: int, height: int) -> bytes:
    """A TIFF that says a large size first, which counts, and a small one behind it."""
    rows = zlib.compress(bytes(width * 3 * 100), 9)
    parts = -(-height // 100)
    tags = picture_tags(width, height, 0, packing=8, rows=100)
    tags = [
        (t, k, v) if t not in (273, 279) else (t, LONG, [16 if t == 273 else len(rows)] * parts) for t, k, v in tags
    ]
    return tiff([*tags[:2], (256, LONG, [WIDTH]), (257, LONG, [HEIGHT]), *tags[2:]], rows)


def tiff_of_one_tile(across: int, down: int) -> bytes:
    """Few pixels in a tile of many."""
    tile = zlib.compress(bytes(across * down * 3), 9)
    return tiff(picture_tags(16, 16, len(tile), packing=8, across=across, down=down), tile)


def tiff_of_tags(count: int, length: int) -> bytes:
    """A TIFF of so many bytes, all of which are the value of each of so many tags."""
    pixels = np.asarray(noise()).tobytes()
    names = range(40_000, 40_000 + count)
    tags = picture_tags(WIDTH, HEIGHT, len(pixels)) + [(name, BYTES, [0] * 5) for name in names]
    content = bytearray(tiff(tags, pixels).ljust(length, b"\0"))
    for name in names:
        place = content.index(struct.pack("<HHI", name, BYTES, 5))
        content[place : place + 12] = struct.pack("<HHII", name, BYTES, length, 0)
    return bytes(content)


# ---------------------------------------------------------------- videos


def riff(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def avi(frames: list[bytes], width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A Motion JPEG whose header says that each frame has this size, whatever size it has."""
    longest, count = max(map(len, frames)), len(frames)
    main = struct.pack("<14I", 40_000, 0, 0, 16, count, 0, 1, longest, width, height, 0, 0, 0, 0)
    rate = struct.pack("<IHHIIIIIIiI4H", 0, 0, 0, 0, 1, 25, 0, count, longest, -1, 0, 0, 0, width, height)
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    places = np.cumsum([4, *(8 + len(frame) + len(frame) % 2 for frame in frames)]).tolist()
    index = b"".join(
        b"00dc" + struct.pack("<III", 16, place, len(frame)) for place, frame in zip(places, frames, strict=False)
    )
    stream = riff(b"LIST", b"strl", riff(b"strh", b"vidsMJPG", rate), riff(b"strf", form))
    header = riff(b"LIST", b"hdrl", riff(b"avih", main), stream)
    movie = riff(b"LIST", b"movi", *(riff(b"00dc", frame) for frame in frames))
    return riff(b"RIFF", b"AVI ", header, movie, riff(b"idx1", index))


def box(name: bytes, *content: bytes, version: bool = False) -> bytes:
    """A box of an MP4; some begin with a version and flags, here 0."""
    body = bytes(4 * version) + b"".join(content)
    return struct.pack(">I", 8 + len(body)) + name + body


def mp4(samples: int, chunks: int = 1, codec: bytes = b"raw ", side: int = 1, data: bytes = bytes(64)) -> bytes:
    """A video of samples of one byte each, in chunks that all are the same place of the file."""
    brand = box(b"ftyp", b"isom", bytes(4), b"isom")
    unity = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    times = struct.pack(">4I", 0, 0, 1000, 1000)
    picture = bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HHIIIH", side, side, 72 << 16, 72 << 16, 0, 1)
    table = box(
        b"stbl",
        box(b"stsd", struct.pack(">I", 1), box(codec, picture, bytes(32), struct.pack(">Hh", 24, -1)), version=True),
        box(b"stts", struct.pack(">3I", 1, samples, 1), version=True),
        box(b"stsc", struct.pack(">4I", 1, 1, samples // chunks, 1), version=True),
        box(b"stsz", struct.pack(">2I", 1, samples), version=True),
        box(b"stco", struct.pack(">I", chunks), struct.pack(">I", len(brand) + 8) * chunks, version=True),
    )
    here = box(b"dinf", box(b"dref", struct.pack(">I", 1), box(b"url ", b"\0\0\0\1"), version=True))
    media = box(
        b"mdia",
        box(b"mdhd", times, bytes(4), version=True),
        box(b"hdlr", bytes(4), b"vide", bytes(13), version=True),
        box(b"minf", box(b"vmhd", bytes(8), version=True), here, table),
    )
    track = box(b"tkhd", struct.pack(">5I", 0, 0, 1, 0, 1000), bytes(16), unity, bytes(8), version=True)
    movie = box(
        b"mvhd", times, struct.pack(">IH", 1 << 16, 256), bytes(10), unity, bytes(24), b"\0\0\0\2", version=True
    )
    return brand + box(b"mdat", data) + box(b"moov", movie, box(b"trak", track, media))


PNG_HEAD = PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0))
FILM = chunk(b"acTL", struct.pack(">II", 3, 0))  # of three frames
CUT = "the image is damaged or cut short"


def small_tiff_of(kind: int, width: int, height: int) -> bytes:
    """A TIFF whose size is of another type than usual, such as 64 bits, which lie elsewhere in the file."""
    pixels = np.asarray(noise()).tobytes()
    tags = picture_tags(width, height, len(pixels), rows=HEIGHT)
    return tiff([(tag, kind if tag in (256, 257) else k, value) for tag, k, value in tags], pixels)


def thin_tiff(width: int, down: int) -> bytes:
    """One row of pixels in as many tall tiles as it takes, which all are the same."""
    tile, count = zlib.compress(bytes(16 * down * 3), 9), -(-width // 16)
    tags = picture_tags(width, 1, 0, packing=8, across=16, down=down)
    tags = [
        (t, k, v) if t not in (324, 325) else (t, LONG, [16 if t == 324 else len(tile)] * count) for t, k, v in tags
    ]
    return tiff(tags, tile)


# ---------------------------------------------------------------- all of them

# Images that take memory or minutes unless somebody looks first: what makes them, and what the error must say.
IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "offset.tif": (lambda: b"II*\0\x08\0\0\0" + b"\xff" * 8, "not an image"),
    "offset of 64 bits.tif": (lambda: b"II+\0\x08\0\0\0" + b"\xff" * 8, "not an image"),
    "text of 2 GB.png": (lambda: PNG_HEAD + chunk(b"tEXt", b"", 2**31 - 64), CUT),
    "pixels of 2 GB.png": (lambda: PNG_HEAD + chunk(b"IDAT", b"", 2**31 - 64), CUT),
    "colors of 2 GB.png": (lambda: PNG_HEAD + chunk(b"PLTE", b"", 2**31 - 64), CUT),
    "transparency of 2 GB.png": (lambda: PNG_HEAD + chunk(b"tRNS", b"", 2**31 - 64), CUT),
    "end of 2 GB.png": (lambda: PNG_HEAD + chunk(b"IEND", b"", 2**31 - 64), CUT),
    "frame of 2 GB.png": (lambda: png_with(FILM, after=[chunk(b"fdAT", b"", 2**31 - 64)]), CUT),
    "texts.png": (lambda: png_with(*[text_chunk(7)] * 100), "too many compressed texts"),
    "texts at the end.png": (lambda: png_with(after=[text_chunk(7)] * 100), "too many compressed texts"),
    "international.png": (lambda: png_with(*[text_chunk(7, b"iTXt")] * 100), "too many compressed texts"),
    "two sizes.tif": (lambda: tiff_of_two_sizes(30_000, 30_000), "30000 x 30000 pixels"),
    "size of 64 bits.tif": (lambda: small_tiff_of(LONG8, 30_000, 30_000), "30000 x 30000 pixels"),
    "tile.tif": (lambda: tiff_of_one_tile(10_000, 10_000), "in tiles of 10000 x 10000"),
    "thin.tif": (lambda: thin_tiff(1_000_000, 4096), "in tiles of 16 x 4096"),
    "tags.tif": (lambda: tiff_of_tags(1000, 2**20), "claim more bytes than the file has"),
    "scans.jpg": (lambda: jpeg_of_scans(2000, 3000), "more than 100 scans"),
    "scans of one color.jpg": (lambda: jpeg_of_scans(2000, 3000, progressive=False), "more than 100 scans"),
    "clears.gif": (lambda: gif_of_clears(10**6), "tables of codes"),
}
