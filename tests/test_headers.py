import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.images.decoding import decode
from helpers.images.headers import read_size

FORMS = {
    "png": ("PNG", "RGB", {}),
    "png, palette": ("PNG", "P", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg, progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg, grey": ("JPEG", "L", {}),
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


@given(
    st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF0000WEBP"]),
    st.binary(),
)
def test_no_bytes_make_it_fail(start, rest):
    size = read_size(start + rest)
    assert size is None or len(size) == 2


@pytest.mark.parametrize("content", [b"", b"a text file", b"<svg/>", bytes(100)])
def test_what_is_no_image_has_no_size(content):
    assert read_size(content) is None
