"""The one way from a file's bytes to a model's input: decode, then resize, in OpenCV.

Training pictures, calibration, evaluation and the pipeline all come through here, because two libraries' resizes
differ enough to change predictions. Executors import this module.
"""

import cv2
import numpy as np

from helpers.images.boundary import MORE_THAN_LEFT, UnreadableImageError
from helpers.images.geometry import Placement, place
from helpers.images.headers import DAMAGED, Header, Size, read_header
from helpers.images.resampling import resample
from helpers.images.spec import InputSpec

cv2.setNumThreads(1)  # Spark runs a task on every core; more threads only wait for each other
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # a damaged image is an error row, not a log line

Image = np.ndarray  # uint8 [height, width, 3], BGR as OpenCV has it

REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
INTERPOLATION = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
SHOWN_BYTES = 12  # of a file that is no image, in its error


def decode(content: bytes | memoryview, max_pixels: int, max_memory: int | None = None) -> Image:
    """Decode an image file to uint8 BGR `[height, width, 3]`.

    EXIF orientation is applied; gray, palette, CMYK and 16-bit images become three 8-bit channels; transparency is
    dropped; an animation gives its first frame, a PNG the one that programs without animations show.

    Raises UnreadableImageError if the file is empty, cut short, not of a format that `headers` knows, larger than
    `max_pixels`, or takes more than `max_memory` bytes to decode; and MemoryError if there is not enough of it.
    """
    return _decode(content, _checked(content, max_pixels, max_memory), cv2.IMREAD_COLOR)


def load(
    content: bytes | memoryview, spec: InputSpec, max_pixels: int, max_memory: int | None = None
) -> tuple[np.ndarray, Size]:
    """Decode and resize an image file for a model; raises as `decode` does.

    Where the manifest allows it (`scaled_decoding`), a JPEG that is much larger than the model's input is decoded at a
    half, a quarter or an eighth of its size, which takes a fraction of the time.

    Returns:
        The input as `fit` returns it, and width and height of the original, turned upright.
    """
    image, size = decode_reduced(content, spec, max_pixels, max_memory)
    return fit(image, spec), size


def decode_reduced(
    content: bytes | memoryview, spec: InputSpec, max_pixels: int, max_memory: int | None = None
) -> tuple[Image, Size]:
    """Decode as `load` does, and leave the rest of the way to the model's input to the caller.

    Returns:
        The image as `decode` returns it, or smaller, and width and height of the original, turned upright.
    """
    header = _checked(content, max_pixels, max_memory)
    stored = header.width, header.height
    factor = _reduction(content, stored, spec)
    image = _decode(content, header, REDUCED.get(factor, cv2.IMREAD_COLOR))
    height, width = image.shape[:2]
    if factor > 1:
        turned = (height < width) != (stored[1] < stored[0])
        width, height = stored[::-1] if turned else stored
    return image, (width, height)


def fit(image: Image, spec: InputSpec) -> np.ndarray:
    """Resize and convert a decoded image to a network's input, as the manifest says.

    Returns:
        uint8 `[spec.height, spec.width, channels]`, or of the image's own size where the rule gives it one.
    """
    placement = place(spec, (image.shape[1], image.shape[0]))
    resized = _resize(image, placement, spec)
    if spec.resize == "letterbox":
        left, top, right, bottom = placement.window
        canvas = np.full((spec.height, spec.width, 3), spec.padding, np.uint8)
        canvas[top:bottom, left:right] = resized
        resized = canvas
    if spec.color == "gray":
        return cv2.cvtColor(resized, cv2.COLOR_BGR2GRAY)[..., None]
    return cv2.cvtColor(resized, cv2.COLOR_BGR2RGB) if spec.color == "rgb" else resized


def _resize(image: Image, placement: Placement, spec: InputSpec) -> Image:
    """The part of the image that the input shows, at its size there."""
    left, top, right, bottom = placement.window
    if (*placement.resized, *placement.input) == (*placement.image, *placement.image):
        return image
    if spec.antialias:
        x, y = placement.offset
        window = left - x, top - y, right - x, bottom - y
        return resample(image, placement.resized, window, spec.interpolation)
    if spec.resize == "crop":
        image = _cut(image, placement)
    if image.shape[:2] == (bottom - top, right - left):
        return image
    # Linear whatever the ratio, as the networks were trained and checked with.
    return cv2.resize(image, (right - left, bottom - top), interpolation=INTERPOLATION[spec.interpolation])


def _cut(image: Image, placement: Placement) -> Image:
    """Cut the center before resizing: resizing all of a thin image would take memory without bound."""
    (width, height), resized = placement.input, placement.resized
    # The side that fits exactly gives the scale; the other was rounded.
    shorter = 0 if placement.image[0] * resized[1] <= placement.image[1] * resized[0] else 1
    scale = placement.image[shorter] / resized[shorter]
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    top, left = (image.shape[0] - inner_height) // 2, (image.shape[1] - inner_width) // 2
    return image[top : top + inner_height, left : left + inner_width]


def _checked(content: bytes | memoryview, max_pixels: int, max_memory: int | None) -> Header:
    if not content:
        raise UnreadableImageError("the file is empty")
    header = read_header(content)
    if header is None:  # OpenCV might decode it, JPEG 2000 for example, however many pixels it has
        raise UnreadableImageError(f"the file is not an image; it begins with {bytes(content[:SHOWN_BYTES])!r}")
    size = f"the image has {header.width} x {header.height} pixels"
    if header.width * header.height > max_pixels:
        raise UnreadableImageError(f"{size}, more than the {max_pixels} that ingest.max_pixels allows")
    if header.problem:
        raise UnreadableImageError(header.problem)
    if max_memory is not None and header.nbytes > max_memory:
        needed = f"which take {header.nbytes / 2**20:.0f} MB to decode"
        raise UnreadableImageError(f"{size}, {needed}, {MORE_THAN_LEFT}")
    return header


def _decode(content: bytes | memoryview, header: Header, flags: int) -> Image:
    if header.animation:  # as a still image it takes less, and OpenCV's player of animations has no part in it
        start, end = header.animation
        content = b"".join((content[:start], content[end:]))
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        raise UnreadableImageError(f"the image cannot be decoded: {error.err}") from None
    if image is None:
        raise UnreadableImageError(DAMAGED)
    return image


def _reduction(content: bytes | memoryview, size: Size, spec: InputSpec) -> int:
    """The largest factor that leaves both sides `scaled_decoding` times the target's; 1 for other formats.

    One that makes the sides of an image alike that are not would hide whether the image was turned.
    """
    if not spec.scaled_decoding or spec.is_variable or bytes(content[:2]) != b"\xff\xd8":
        return 1
    # A turned image has its sides exchanged, so both must be large enough for either.
    ratio = min(size) / (max(spec.width, spec.height) * spec.scaled_decoding)
    square = size[0] == size[1]
    telling = [factor for factor in REDUCED if square or -(-size[0] // factor) != -(-size[1] // factor)]
    return max((factor for factor in telling if factor <= ratio), default=1)
