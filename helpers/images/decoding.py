"""The one way from a file's bytes to a model's input: decode, then resize, in OpenCV.

Training pictures, calibration, evaluation and the pipeline all come through here, because two libraries' resizes
differ enough to change predictions. Executors import this module.
"""

import errno

import cv2
import numpy as np

from helpers.images.headers import Size, read_size
from helpers.models.bundle import InputSpec

cv2.setNumThreads(1)  # Spark runs a task on every core; more threads only wait for each other
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # a damaged image is an error row, not a log line

Image = np.ndarray  # uint8 [height, width, 3], BGR as OpenCV has it

REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
SHOWN_BYTES = 12  # of a file that is no image, in its error
READ_ERRORS = {
    errno.ENOENT: "the file is gone: it was moved or deleted after it was listed, or its link leads nowhere",
    errno.EACCES: "the file cannot be read: permission denied",
    errno.EPERM: "the file cannot be read: permission denied",
    errno.EISDIR: "this is a directory, not an image file",
    errno.ELOOP: "the link leads back to itself",
}
# How errors begin that last until there is another file; what has any other error is worked on again by the next run.
LASTING = (
    "the file is empty",
    "the file is not an image",
    "the image is damaged",
    "the file is not a video",
    "the file has no video",
    "no frame of the video can be decoded",
    "the frame cannot be decoded",
    "this is a directory",
    "the file cannot be read: it is a pipe",
)


class UnreadableImageError(ValueError):
    """The bytes are no image that can be used; the message says why, for the row's `error`."""


def reason(error: Exception) -> str:
    """Why a file could not be read, for the row's `error`."""
    if not isinstance(error, OSError):
        return str(error)
    return READ_ERRORS.get(error.errno or 0, f"the file cannot be read: {error.strerror or error}")


def decode(content: bytes | memoryview, max_pixels: int) -> Image:
    """Decode an image file to uint8 BGR `[height, width, 3]`.

    EXIF orientation is applied; grey, palette, CMYK and 16-bit images become three 8-bit channels; transparency is
    dropped; an animation gives its first frame.

    Raises:
        UnreadableImageError: empty, cut short, larger than `max_pixels`, or not of a format that `headers` knows.
    """
    _checked_size(content, max_pixels)
    return _decode(content, cv2.IMREAD_COLOR)


def load(content: bytes | memoryview, spec: InputSpec, max_pixels: int) -> tuple[np.ndarray, Size]:
    """Decode and resize an image file for a model.

    Where the manifest allows it (`scaled_decoding`), a JPEG that is much larger than the model's input is decoded at a
    half, a quarter or an eighth of its size, which takes a fraction of the time.

    Returns:
        uint8 `[spec.height, spec.width, channels]`, and width and height of the original, turned upright.

    Raises:
        UnreadableImageError: as for `decode`.
    """
    stored = _checked_size(content, max_pixels)
    factor = _reduction(content, stored, spec)
    image = _decode(content, REDUCED.get(factor, cv2.IMREAD_COLOR))
    height, width = image.shape[:2]
    if factor > 1:
        turned = (height < width) != (stored[1] < stored[0])
        width, height = stored[::-1] if turned else stored
    return fit(image, spec), (width, height)


def fit(image: Image, spec: InputSpec) -> np.ndarray:
    """Resize and convert a decoded image to uint8 `[spec.height, spec.width, channels]`, as the manifest says."""
    resized = _RESIZE[spec.resize](image, spec.width, spec.height)
    if spec.color == "gray":
        return cv2.cvtColor(resized, cv2.COLOR_BGR2GRAY)[..., None]
    return cv2.cvtColor(resized, cv2.COLOR_BGR2RGB) if spec.color == "rgb" else resized


def _scale(image: Image, width: int, height: int) -> Image:
    if image.shape[:2] == (height, width):
        return image
    # Linear whatever the ratio, as the networks were trained and checked with.
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _letterbox(image: Image, width: int, height: int) -> Image:
    scale = min(width / image.shape[1], height / image.shape[0])
    inner_width, inner_height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    canvas = np.full((height, width, 3), 114, np.uint8)  # the grey that detectors are trained to ignore
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    canvas[top : top + inner_height, left : left + inner_width] = _scale(image, inner_width, inner_height)
    return canvas


def _crop(image: Image, width: int, height: int) -> Image:
    # Cut first: resizing all of a thin image before would take memory without bound.
    scale = min(image.shape[1] / width, image.shape[0] / height)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    top, left = (image.shape[0] - inner_height) // 2, (image.shape[1] - inner_width) // 2
    return _scale(image[top : top + inner_height, left : left + inner_width], width, height)


_RESIZE = {"stretch": _scale, "letterbox": _letterbox, "crop": _crop}


def _checked_size(content: bytes | memoryview, max_pixels: int) -> Size:
    if not content:
        raise UnreadableImageError("the file is empty")
    size = read_size(content)
    if size is None:  # OpenCV might decode it, JPEG 2000 for example, however many pixels it has
        raise UnreadableImageError(f"the file is not an image; it begins with {bytes(content[:SHOWN_BYTES])!r}")
    if size[0] * size[1] > max_pixels:
        raise UnreadableImageError(
            f"the image has {size[0]} x {size[1]} pixels, more than the {max_pixels} that ingest.max_pixels and "
            "inference.memory_megabytes allow"
        )
    return size


def _decode(content: bytes | memoryview, flags: int) -> Image:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        raise UnreadableImageError(f"the image cannot be decoded: {error.err}") from None
    if image is None:
        raise UnreadableImageError("the image is damaged or cut short")
    return image


def _reduction(content: bytes | memoryview, size: Size, spec: InputSpec) -> int:
    """The largest factor that leaves both sides `scaled_decoding` times the target's; 1 for other formats.

    One that makes the sides of an image alike that are not would hide whether the image was turned.
    """
    if not spec.scaled_decoding or bytes(content[:2]) != b"\xff\xd8":
        return 1
    # A turned image has its sides exchanged, so both must be large enough for either.
    ratio = min(size) / (max(spec.width, spec.height) * spec.scaled_decoding)
    square = size[0] == size[1]
    telling = [factor for factor in REDUCED if square or -(-size[0] // factor) != -(-size[1] // factor)]
    return max((factor for factor in telling if factor <= ratio), default=1)
