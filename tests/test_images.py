import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import bombs
import cv2
import numpy as np
import pytest
from bombs import bilevel_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import decode, fit
from helpers.images.geometry import place
from helpers.images.headers import read_header
from helpers.images.spec import InputSpec

MANY = 10**9
BLUE, GREEN, RED = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # BGR
ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6  # lies on its side
CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}


def spec(width: int, height: int, color: str = "bgr", resize: str = "stretch", **others) -> InputSpec:
    zeros, ones = (0.0,) * CHANNELS[color], (1.0,) * CHANNELS[color]
    return InputSpec(height, width, color, zeros, ones, resize, **others)


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """200 x 300 smooth noise, RGB."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    return cv2.GaussianBlur(noise, (9, 9), 3)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGB", "PNG"), ("RGB", "WEBP")]
    + [
        ("L", "JPEG"),
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "BMP"),
        ("P", "GIF"),
        ("RGB", "TIFF"),
        ("CMYK", "TIFF"),
    ],
)
def test_every_kind_of_image_becomes_three_channels_with_the_right_colors(photo, mode, form):
    content = encoded(Image.fromarray(photo).convert(mode), form, **({"lossless": True} if form == "WEBP" else {}))
    image = decode(content, MANY)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[..., ::-1]
    assert image.shape == (200, 300, 3) and image.dtype == np.uint8
    # Two decoders of JPEG round differently.
    assert np.abs(image.astype(int) - expected).max() <= (3 if form == "JPEG" else 1)


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.array([[0, 255, 256, 0x7FFF, 0xFF00, 0xFFFF]], np.uint16)
    image = decode(cv2.imencode(".png", deep)[1].tobytes(), MANY)
    assert np.abs(image[0, :, 0] - deep[0] / 257).max() <= 1
    assert image[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(form, orientation):
    from PIL import ImageOps

    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[:16, 24:], corners[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(corners), form, exif=exif, **({"quality": 100} if form == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image = decode(content, MANY)
    assert image.shape[:2] == ((32, 48) if orientation < 5 else (48, 32))
    quarter_centres = image[8::16, 12::24] if orientation < 5 else image[12::24, 8::16]
    expected = np.asarray(upright)[..., ::-1]
    expected = expected[8::16, 12::24] if orientation < 5 else expected[12::24, 8::16]
    assert np.abs(quarter_centres.astype(int) - expected).max() < 10


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        image = decode(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options), MANY)
        assert image.shape == (10, 20, 3) and (image == RED).all(), form


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_an_animated_png_is_the_picture_that_it_is_without_its_animation(photo, mode):
    frames = [Image.fromarray(np.roll(photo, shift, axis=1)).convert(mode) for shift in (0, 50, 100)]
    still, film = encoded(frames[0], "PNG"), encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert b"acTL" in film and b"acTL" not in still
    np.testing.assert_array_equal(decode(film, MANY), decode(still, MANY))
    np.testing.assert_array_equal(decode(memoryview(film), MANY), decode(still, MANY))


def test_a_gray_png_comes_through_exactly():
    gray = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    gray[0, :] = np.linspace(0, 255, 28)
    image = decode(cv2.imencode(".png", gray)[1].tobytes(), MANY)
    np.testing.assert_array_equal(fit(image, spec(28, 28, "gray")), gray[..., None])


def test_every_gray_value_survives_the_conversion():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(
        fit(decode(cv2.imencode(".png", gray)[1].tobytes(), MANY), spec(16, 16, "gray"))[..., 0], gray
    )


def test_a_memoryview_decodes_like_bytes(photo):
    content = encoded(Image.fromarray(photo))
    np.testing.assert_array_equal(decode(memoryview(content), MANY), decode(content, MANY))


def test_stretch_changes_both_sides():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    stretched = fit(image, spec(10, 10))
    assert stretched.shape == (10, 10, 3)
    assert (stretched[:, :5] == 0).all() and (stretched[:, 5:] == 255).all()


@pytest.mark.parametrize(("shape", "axis"), [((20, 40), 0), ((40, 20), 1)])
def test_letterbox_keeps_the_shape_and_pads_evenly(shape, axis):
    boxed = np.moveaxis(fit(np.full((*shape, 3), RED, np.uint8), spec(20, 20, resize="letterbox")), axis, 0)
    assert (boxed[5:15] == RED).all()
    assert (boxed[:5] == 114).all() and (boxed[15:] == 114).all()


@pytest.mark.parametrize(("shape", "axis"), [((20, 40), 1), ((40, 20), 0)])
def test_crop_takes_the_centre(shape, axis):
    image = np.full((*shape, 3), RED, np.uint8)
    np.moveaxis(image, axis, 0)[10:30] = GREEN
    cropped = fit(image, spec(20, 20, resize="crop"))
    assert cropped.shape == (20, 20, 3) and (cropped == GREEN).all()


def test_an_image_of_the_right_size_is_not_resampled(photo):
    for rule in ("stretch", "letterbox", "crop"):
        np.testing.assert_array_equal(fit(photo, spec(300, 200, resize=rule)), photo)


def test_color_orders():
    image = np.full((4, 4, 3), BLUE, np.uint8)
    assert fit(image, spec(4, 4, "bgr"))[0, 0].tolist() == [255, 0, 0]
    assert fit(image, spec(4, 4, "rgb"))[0, 0].tolist() == [0, 0, 255]
    assert fit(image, spec(4, 4, "gray"))[0, 0].tolist() == [29]  # 0.114 * 255


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(sorted(CHANNELS)),
    st.sampled_from(["stretch", "letterbox", "crop"]),
)
def test_the_result_has_the_manifests_shape_whatever_the_images(height, width, to_height, to_width, color, rule):
    wanted = spec(to_width, to_height, color, rule)
    fitted = fit(np.full((height, width, 3), 200, np.uint8), wanted)
    assert fitted.shape == wanted.shape and fitted.dtype == np.uint8
    assert (fitted == 200).any()
    if rule != "letterbox":
        assert (fitted == 200).all()


@pytest.mark.parametrize("rule", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_a_thin_image_takes_no_more_memory_than_others(shape, rule):
    image, wanted = np.full((*shape, 3), 200, np.uint8), spec(224, 224, resize=rule)
    tracemalloc.start()
    try:
        assert fit(image, wanted).shape == wanted.shape
        assert tracemalloc.get_traced_memory()[1] < 20 * wanted.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", memoryview(b"")])
def test_an_empty_file_is_called_empty(content):
    with pytest.raises(UnreadableImageError, match="the file is empty"):
        decode(content, MANY)


@pytest.mark.parametrize(
    "content", [b"a text file", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(1000), b"GIF89a"]
)
def test_what_is_no_image_is_called_so(content):
    with pytest.raises(UnreadableImageError, match="not an image|damaged|cut short"):
        decode(content, MANY)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_image_is_an_error_not_half_a_picture(photo, form, share):
    content = encoded(Image.fromarray(photo), form)
    assert decode(content, MANY).shape == photo.shape
    with pytest.raises(UnreadableImageError, match="damaged|cut short|not an image"):
        decode(content[: int(share * len(content))], MANY)


def test_an_image_may_have_as_many_pixels_as_allowed_and_no_more(photo):
    content = encoded(Image.fromarray(photo))
    assert decode(content, 60_000).shape == (200, 300, 3)
    with pytest.raises(UnreadableImageError, match="300 x 200 pixels, more than .*59999"):
        decode(content, 59_999)


def test_an_image_beyond_the_decoders_own_limit_is_an_error_with_words():
    with pytest.raises(UnreadableImageError, match="pixels"):
        decode(bilevel_png(40_000, 40_000), 178_956_970)


@pytest.mark.parametrize("form", [".jp2", ".avif", ".hdr"])
def test_a_format_that_does_not_tell_its_size_is_refused_though_opencv_knows_it(form):
    """A JPEG 2000 file of 2 kB, named .jpg, would be 400 MB of pixels, whatever the limit is."""
    pixels = np.zeros((300, 300, 3), np.float32 if form == ".hdr" else np.uint8)
    content = cv2.imencode(form, pixels)[1].tobytes()
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode(content, 100)


def test_a_decompression_bomb_is_refused_before_its_pixels_are_in_memory():
    script = """
import resource, sys
from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import decode
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(content, 178_956_970)
except UnreadableImageError:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    bomb = bilevel_png(16_000, 12_000)  # 23 kB, 576 MB decoded
    answer = subprocess.run([sys.executable, "-c", script], input=bomb, capture_output=True, check=True)
    assert int(answer.stdout) < 100  # megabytes


# ---------------------------------------------------------------- files that mean harm, or might as well

# Memory and seconds that each file of a folder takes, in a process that has no limit of its own.
WATCH = """
import json, re, sys, time
from pathlib import Path
from helpers.images.boundary import attempt
from helpers.images.decoding import decode
from helpers.memory import resident_megabytes

def peak():
    return int(re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) / 1024

attempt(decode, b"BM", 1)  # whatever the first image takes, no later one does
for path in sorted(Path(sys.argv[1]).iterdir()):
    content = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident_megabytes(), time.monotonic()
    image, error = attempt(decode, content, 178_956_970)
    seconds, taken = time.monotonic() - begun, peak() - before
    print(json.dumps([path.name, error or list(image.shape), taken, seconds]), flush=True)
    del image
"""


def watched(folder: Path) -> dict[str, list]:
    """Error or shape, megabytes and seconds of each file, by its name."""
    if not os.path.exists("/proc/self/clear_refs"):  # noqa: PTH110
        pytest.skip("this system does not tell how much memory a process had")
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else the next file takes what one has left
    command = [sys.executable, "-c", WATCH, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=given_back)
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    return {name: row for name, *row in rows}


@pytest.fixture(scope="module")
def harm(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("harm")
    for name, (make, _) in bombs.IMAGES.items():
        (folder / name).write_bytes(make())
    return watched(folder)


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, (_, words) in bombs.IMAGES.items()])
def test_a_file_that_would_take_memory_or_minutes_is_refused_at_once(harm, name, words):
    error, megabytes, seconds = harm[name]
    assert words in error
    assert megabytes < 40 and seconds < 5


SIDE = 1008  # a multiple of 16, as tiles are
# What the decoders take most memory for: modes, formats and their options.
HUNGRY = {
    "plain.jpg": ("RGB", "JPEG", {}),
    "turned.jpg": ("RGB", "JPEG", {"exif": ORIENTED}),
    "gray.jpg": ("L", "JPEG", {"progressive": True}),
    "progressive.jpg": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "turned progressive.jpg": ("RGB", "JPEG", {"progressive": True, "subsampling": 0, "exif": ORIENTED}),
    "print.jpg": ("CMYK", "JPEG", {}),
    "progressive print.jpg": ("CMYK", "JPEG", {"progressive": True}),
    "turned.png": ("RGB", "PNG", {"exif": ORIENTED}),
    "transparent.png": ("RGBA", "PNG", {}),
    "palette.png": ("P", "PNG", {}),
    "deep.png": ("I;16", "PNG", {}),
    "film.png": ("RGBA", "PNG", {"save_all": True}),
    "plain.gif": ("P", "GIF", {}),
    "film.gif": ("P", "GIF", {"save_all": True, "disposal": 3}),
    "plain.bmp": ("RGB", "BMP", {}),
    "lossy.webp": ("RGB", "WEBP", {"method": 0}),
    "transparent.webp": ("RGBA", "WEBP", {"method": 0}),
    "lossless.webp": ("RGBA", "WEBP", {"method": 0, "lossless": True}),
    "film.webp": ("RGBA", "WEBP", {"method": 0, "save_all": True}),
    "lossless film.webp": ("RGBA", "WEBP", {"method": 0, "lossless": True, "save_all": True}),
    "plain.tif": ("RGB", "TIFF", {}),
    "packed.tif": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "photo.tif": ("RGB", "TIFF", {"compression": "jpeg"}),
    "print.tif": ("CMYK", "TIFF", {}),
    "bilevel.tif": ("1", "TIFF", {}),
}
# TIFFs that Pillow does not write: samples, bits of each, and other tags.
HUNGRY_TIFF = {
    "one strip.tif": (3, 8, {}),
    "deep.tif": (4, 16, {"extra": 2}),
    "planes.tif": (4, 16, {"extra": 2, "planar": 2}),
    "one tile.tif": (4, 16, {"extra": 2, "across": SIDE, "down": SIDE}),
    "tiles.tif": (3, 8, {"across": 256, "down": 256}),
}


def hungry_tiff(samples: int, bits: int, extra: int = 0, **tags: int) -> bytes:
    across, down = tags.get("across", SIDE), tags.get("down", SIDE)
    part = across * down * samples * bits // 8 // (samples if tags.get("planar") == 2 else 1)
    parts = (-(-SIDE // across)) * (-(-SIDE // down)) * (samples if tags.get("planar") == 2 else 1)
    listed = bombs.picture_tags(SIDE, SIDE, 0, samples=samples, bits=[bits] * samples, **tags)
    places = {273: 16, 324: 16, 279: part, 325: part}
    listed = [(t, bombs.LONG, [places[t]] * parts) if t in places else (t, k, v) for t, k, v in listed]
    return bombs.tiff(sorted([*listed, *([(338, bombs.SHORT, [extra])] if extra else [])]), os.urandom(part))


@pytest.fixture(scope="module")
def hungry(tmp_path_factory) -> tuple[dict[str, list], dict[str, float], Path]:
    """What decoding each takes, and what its header says of it, in megabytes; and where they lie."""
    folder, said = tmp_path_factory.mktemp("hungry"), {}
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    for name, (mode, form, options) in HUNGRY.items():
        image = Image.fromarray(noise, "RGBA").convert("RGB")
        image = Image.fromarray(noise) if mode == "RGBA" else image.convert(mode)
        films = {"append_images": [Image.new(mode, image.size)]} if "save_all" in options else {}
        (folder / name).write_bytes(encoded(image, form, **options, **films))
    for name, (samples, bits, tags) in HUNGRY_TIFF.items():
        (folder / name).write_bytes(hungry_tiff(samples, bits, **tags))
    for path in folder.iterdir():
        said[path.name] = read_header(path.read_bytes()).nbytes / 2**20
    return watched(folder), said, folder


@pytest.mark.parametrize("name", [*HUNGRY, *HUNGRY_TIFF])
def test_decoding_takes_no_more_memory_than_the_header_says(hungry, name):
    taken, said, _ = hungry
    shape, megabytes, _ = taken[name]
    assert shape == [SIDE, SIDE, 3]
    assert megabytes < said[name] + 2
    assert megabytes > 0.4 * said[name]  # nor is an image refused that there is room for


@pytest.mark.parametrize("limit", ["pixels", "memory"])
def test_an_image_that_would_take_more_than_allowed_is_told_so(photo, limit):
    content = encoded(Image.fromarray(photo))
    most = read_header(content).nbytes
    assert decode(content, 60_000, most).shape == photo.shape
    with pytest.raises(
        UnreadableImageError, match=r"^the image has 300 x 200 pixels, .*more than .*(ingest|inference)\."
    ):
        decode(content, *((59_999, most) if limit == "pixels" else (60_000, most - 1)))


def test_opencv_itself_refuses_more_pixels_than_any_header_may_be_taken_to_say():
    script = """
import sys
import helpers.images.decoding, cv2, numpy as np
try:
    cv2.imdecode(np.frombuffer(sys.stdin.buffer.read(), np.uint8), cv2.IMREAD_COLOR)
except cv2.error as error:
    print(error.err)
"""
    bomb = bilevel_png(20_000, 20_000)
    answer = subprocess.run([sys.executable, "-c", script], input=bomb, capture_output=True, check=True)
    assert b"pixels" in answer.stdout


STARVE = """
import json, resource, sys
from pathlib import Path
from helpers.images.boundary import attempt
from helpers.images.decoding import decode
from helpers.memory import bounded, resident_megabytes

attempt(decode, b"BM", 1)
for path in sorted(Path(sys.argv[1]).iterdir()):
    content, errors = path.read_bytes(), []
    for megabytes in range(0, 30, 2):
        with bounded(int(resident_megabytes()) + megabytes):
            image, error = attempt(decode, content, 10**9)
        errors.append(error)
        del image
    print(json.dumps([path.name, errors]), flush=True)
"""


def test_no_decoder_dies_of_a_lack_of_memory(hungry):
    """The limit makes allocations fail anywhere in them; what they say then is all that counts."""
    folder = hungry[2]
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STARVE, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, env=given_back, check=True)
    found = dict(json.loads(line) for line in answer.stdout.splitlines())
    assert set(found) == {*HUNGRY, *HUNGRY_TIFF}
    for name, errors in found.items():
        assert errors[0] and errors[-1] is None, name


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(90, 100), (640, 480), (333, 1000), (1500, 200), (256, 200)])
def test_antialiased_resizing_equals_pillows(size, interpolation):
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    kind = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.asarray(Image.fromarray(image).resize((256, 200), kind)).astype(int)
    difference = np.abs(fit(image, spec(256, 200, "bgr", interpolation=interpolation, antialias=True)) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (300, 2000), (40, 30)])
def test_cropping_equals_torchvisions_transform(size):
    from torchvision.transforms import functional

    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    resized = functional.resize(Image.fromarray(image), [232])
    expected = np.asarray(functional.center_crop(resized, [224])).astype(int)
    cropped = fit(image, spec(224, 224, "bgr", "crop", antialias=True, resize_size=232))
    assert np.abs(cropped - expected).max() <= 1 and (cropped != expected).mean() < 0.02


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (3000, 100), (64, 64)])
def test_the_shortest_edge_rule_equals_torchvisions(size):
    from torchvision.transforms import functional

    image = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), np.uint8)
    expected = np.asarray(functional.resize(Image.fromarray(image), [100], max_size=400)).astype(int)
    fitted = fit(image, spec(400, 100, "bgr", "shortest_edge", antialias=True))
    assert fitted.shape == expected.shape and np.abs(fitted - expected).max() <= 1


def test_a_network_of_any_size_gets_the_image_as_it_is(photo):
    np.testing.assert_array_equal(fit(photo, spec(10, 10, "bgr", "none")), photo)


def test_a_letterbox_in_the_corner_is_padded_on_one_side():
    boxed = fit(np.full((20, 40, 3), RED, np.uint8), spec(20, 20, "bgr", "letterbox", position="top_left", padding=7))
    assert (boxed[:10] == RED).all() and (boxed[10:] == 7).all()


@pytest.mark.parametrize("rule", ["stretch", "letterbox", "crop", "shortest_edge", "none"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (100, 700), (33, 35)])
def test_a_point_of_the_input_leads_back_to_its_place_in_the_image(rule, size):
    """A bright square in a dark image is where the placement says."""
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    x, y, side = width // 2, height // 2, min(size) // 3
    image[y : y + side, x : x + side] = 255
    wanted = spec(96, 64, "bgr", rule, antialias=True, padding=0)
    bright = np.argwhere(fit(image, wanted)[..., 0] > 100)
    low, high = bright.min(axis=0)[::-1], bright.max(axis=0)[::-1] + 1
    box = place(wanted, size).to_image(np.concatenate([low, high]).astype(np.float32))
    pixel = np.tile(np.divide(size, place(wanted, size).resized), 2)  # of the input, in the image's
    assert (np.abs(box - [x, y, x + side, y + side]) <= pixel + 1e-3).all()
