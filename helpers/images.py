"""The one way from a file's bytes to a model's input: decode, then resize, in OpenCV.

Training pictures, calibration, evaluation and the pipeline all come through here, because two libraries' resizes
differ enough to change predictions. Executors import this module.
"""

import cv2
import numpy as np

from helpers.bundle import InputSpec

cv2.setNumThreads(1)  # Spark runs a task on every core; more threads only wait for each other

Image = np.ndarray  # uint8 [height, width, 3], BGR as OpenCV has it


class UnreadableImageError(ValueError):
    """The bytes are no image that can be used; the message says why, for the row's `error`."""


def decode(content: bytes | memoryview, max_pixels: int) -> Image:
    """Decode an image file to uint8 BGR `[height, width, 3]`.

    EXIF orientation is applied; grey, palette, transparent, CMYK and 16-bit images become three 8-bit channels; an
    animation gives its first frame.

    Raises:
        UnreadableImageError: empty, not an image, cut short, or larger than `max_pixels`.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise UnreadableImageError(f"the image cannot be decoded: {error.err}") from None
    if image is None:
        raise UnreadableImageError("the file is not an image, or is damaged or cut short")
    if image.shape[0] * image.shape[1] > max_pixels:
        raise UnreadableImageError(f"the image has {image.shape[1]} x {image.shape[0]} pixels, more than {max_pixels}")
    return image


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
    scale = max(width / image.shape[1], height / image.shape[0])
    outer = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    resized = _scale(image, *outer)
    top, left = (outer[1] - height) // 2, (outer[0] - width) // 2
    return resized[top : top + height, left : left + width]


_RESIZE = {"stretch": _scale, "letterbox": _letterbox, "crop": _crop}
