import io
import struct

import bombs
import numpy as np
import pytest
from bombs import LONG, LONG8, SHORT, tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.images import headers
from helpers.images.decoding import decode
from helpers.images.headers import SCANS, Size, read_header

FORMS = {
    "png": ("PNG", "RGB", {}),
    "png, palette": ("PNG", "P", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg, progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg, gray": ("JPEG", "L", {}),
    "jpeg, cmyk": ("JPEG", "CMYK", {}),
    "jpeg, long metadata": ("JPEG", "RGB", {"icc_profile": bytes(150_000), "comment": b"\xff\xd9\xff\xc0" * 100}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff, packed": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", "RGB", {}),
    "webp, lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp, alpha": ("WEBP", "RGBA", {}),
    "webp, metadata": ("WEBP", "RGB", {"icc_profile": bytes(100)}),
}


def read_size(content: bytes | memoryview) -> Size | None:
    header = read_header(content)
    return (header.width, header.height) if header else None


def encoded(form: str, size: tuple[int, int]) -> bytes:
    name, mode, options = FORMS[form]
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").convert(mode).save(buffer, name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (3, 1000), (259, 513)])
@pytest.mark.parametrize("form", FORMS)
def test_the_header_tells_the_size(form, size):
    content = encoded(form, size)
    assert read_size(content) == read_size(memoryview(content)) == size


def test_both_byte_orders_of_tiff_are_read():
    fields = [(256, 300), (257, 200)]
    for order, mark in (("little", b"II*\0"), ("big", b"MM\0*")):
        directory = len(fields).to_bytes(2, order)
        for tag, value in fields:
            numbers = (tag, 2), (4, 2), (1, 4), (value, 4)  # kind 4: 32 bits
            directory += b"".join(number.to_bytes(length, order) for number, length in numbers)
        assert read_size(mark + (8).to_bytes(4, order) + directory) == (300, 200)


def test_a_bitmap_stored_from_the_top_has_a_positive_height():
    content = bytearray(encoded("bmp", (30, 20)))
    content[22:26] = (-20).to_bytes(4, "little", signed=True)
    assert read_size(bytes(content)) == (30, 20)


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_tiff_of_64_bits_has_its_size_too(order):
    mark = b"II+\0" if order == "little" else b"MM\0+"
    numbers = [(8, 2), (0, 2), (16, 8), (2, 8)]  # of the header, and how many entries follow
    for tag, kind, value in ((256, 3, 300), (257, 16, 200)):
        numbers += [(tag, 2), (kind, 2), (1, 8), (value, 2 if kind == 3 else 8), *([(0, 6)] if kind == 3 else [])]
    content = mark + b"".join(number.to_bytes(length, order) for number, length in numbers)
    assert read_size(content) == (300, 200)


@pytest.mark.parametrize("between", [b"junk", b"\xff\xff", b"\xff\x00", b"\xff\xd0"])
def test_what_a_decoder_skips_between_the_segments_of_a_jpeg_does_not_hide_its_size(between):
    content = encoded("jpeg", (30, 20))
    content = content[:20] + between + content[20:]  # behind the JFIF segment
    assert decode(content, 600).shape == (20, 30, 3)
    assert read_size(content) == (30, 20)


def test_a_bitmap_of_the_oldest_kind_has_sides_of_16_bits():
    width, height, rows = 20, 10, bytes(20 * 3 * 10)
    content = b"BM" + struct.pack("<IHHIIHHHH", 26 + len(rows), 0, 0, 26, 12, width, height, 1, 24) + rows
    assert decode(content, width * height).shape == (height, width, 3)
    assert read_size(content) == (width, height)


@pytest.mark.parametrize("form", FORMS)
def test_a_header_that_is_cut_short_is_no_exception(form):
    content = encoded(form, (300, 200))
    for length in range(200):
        size = read_size(content[:length])
        assert size is None or max(size) <= 300


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("kind", [SHORT, LONG, LONG8])
def test_the_size_of_a_tiff_is_read_whatever_type_it_has_and_wherever_it_lies(kind, big, order):
    content = tiff([(256, kind, [300]), (257, kind, [200])], b"", big, order)
    assert read_size(content) == (300, 200)


def test_of_two_sizes_of_a_tiff_the_first_counts_as_it_does_for_the_decoder():
    pixels = np.asarray(bombs.noise()).tobytes()
    tags = bombs.picture_tags(bombs.WIDTH, bombs.HEIGHT, len(pixels))
    content = tiff([*tags[:2], (256, SHORT, [8]), (257, SHORT, [6]), *tags[2:]], pixels)
    assert read_size(content) == (bombs.WIDTH, bombs.HEIGHT)
    assert decode(content, 10**6).shape[:2] == (bombs.HEIGHT, bombs.WIDTH)


@given(
    st.sampled_from("<>"), st.booleans(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=60)
)
def test_a_tiff_may_name_any_place_and_any_count(order, big, place, count, rest):
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    start = struct.pack(order + "HHQ", 8, 0, place) if big else struct.pack(order + "I", place % 2**32)
    entry = struct.pack(
        order + ("QHHQQ" if big else "HHHIH"), *[v % (2**16 if big is False else 2**64) for v in (count,)], 256, 4, 1, 7
    )
    for content in (
        mark + start + rest,
        mark + struct.pack(order + "HHQ", 8, 0, 16)[: 12 if big else 0] + entry + rest,
    ):
        size = read_size(content)
        assert size is None or min(size) > 0


@pytest.mark.parametrize("form", ["jpeg, progressive", "jpeg", "jpeg, cmyk"])
def test_an_ordinary_jpeg_has_scans_enough(form):
    assert read_header(encoded(form, (300, 200))).problem is None


def test_a_jpeg_may_have_many_scans_but_not_any_number():
    assert read_header(bombs.jpeg_of_scans(40, SCANS - 20)).problem is None
    assert "scans" in read_header(bombs.jpeg_of_scans(40, SCANS + 1)).problem


def test_thumbnails_and_profiles_in_a_jpeg_are_no_scans():
    other = encoded("jpeg", (30, 20))
    content = encoded("jpeg, progressive", (60, 40))
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(other)) + other
    assert read_header(content[:20] + segment * (2 * SCANS) + content[20:]).problem is None


@pytest.mark.parametrize("kind", [b"tEXt", b"iTXt", b"zTXt", b"iCCP", b"eXIf", b"prVt", b"IDAT"])
def test_a_chunk_of_a_png_lies_within_the_file(kind):
    good = bombs.chunk(kind, b"k\0\0\0\0" + bytes(8))
    assert read_header(bombs.png_with(good)).problem is None
    for length in (14, 5000, 2**31 - 1, 2**32 - 1):
        assert read_header(bombs.png_with(bombs.chunk(kind, b"k\0\0\0\0" + bytes(8), length))).problem


def test_the_texts_of_an_ordinary_png_are_no_problem():
    content = bombs.png_with(bombs.text_chunk(0.5), bombs.text_chunk(0.5, b"iTXt"), bombs.text_chunk(0.05, b"iCCP"))
    assert read_header(content).problem is None and decode(content, 10**6).shape == (24, 32, 3)


def clears(codes: bytes, bits: int) -> int:
    """The codes of a GIF one after the other, as its specification has it."""
    stream, place, width, codes_so_far, count = int.from_bytes(codes, "little"), 0, bits + 1, (1 << bits) + 1, 0
    while place + width <= 8 * len(codes):
        code, place = stream >> place & (1 << width) - 1, place + width
        codes_so_far = min(codes_so_far + 1, 4096)
        width += codes_so_far == 1 << width and width < 12
        if code >> 1 == 1 << bits - 1:
            count, width, codes_so_far = count + 1, bits + 1, (1 << bits) + 1
    return count


@given(st.integers(2, 11), st.binary(max_size=400), st.integers(1, 60), st.booleans())
def test_the_tables_of_a_gif_are_counted_as_one_code_after_the_other_gives(bits, codes, times, rare):
    codes = (bytes(c & 3 for c in codes) if rare else codes) * times  # few of them clear, so that tables get full
    expected = clears(codes, bits)
    for most in (0, expected - 1, expected, expected + 1):
        assert (headers._count_tables(codes, bits, most) > most) == (expected > most)


@pytest.mark.parametrize("side", [1, 16, 700])
def test_an_ordinary_gif_has_tables_enough(side, monkeypatch):
    monkeypatch.setattr(headers, "GIF_TABLES", 20)  # as if it were a hundred times as large
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).save(buffer, "GIF")
    assert read_header(buffer.getvalue()).problem is None


@given(
    st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF0000WEBP"]),
    st.binary(),
)
def test_no_bytes_make_it_fail(start, rest):
    size = read_size(start + rest)
    assert size is None or min(size) > 0


@pytest.mark.parametrize("content", [b"", b"a text file", b"<svg/>", bytes(100)])
def test_what_is_no_image_has_no_size(content):
    assert read_size(content) is None
