"""Where an image lies in a network's input, and back: one place for every resize rule.

Coordinates are of pixel edges: an image of width w reaches from 0 to w. Executors import this module.
"""

from dataclasses import dataclass

import numpy as np

from helpers.images.spec import InputSpec


@dataclass(frozen=True)
class Placement:
    """An image in a network's input: `input = image * scale + offset`, in x and y."""

    image: tuple[int, int]  # width and height of the original, in pixels
    resized: tuple[int, int]  # width and height of the whole image at the input's scale
    offset: tuple[int, int]  # of the resized image's left upper corner in the input; negative where `crop` cuts it off
    input: tuple[int, int]  # width and height of the input

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Points x, y in the input's pixels, float32 `[..., 2 * n]`, in those of the original; not clipped."""
        pairs = points.reshape(*points.shape[:-1], points.shape[-1] // 2, 2)  # there may be none
        scale = np.divide(self.image, self.resized, dtype=np.float64)
        return ((pairs - np.array(self.offset)) * scale).astype(np.float32).reshape(points.shape)

    @property
    def window(self) -> tuple[int, int, int, int]:
        """The part of the input that shows the image: left, top, right, bottom, in the input's pixels."""
        left, top = (max(0, offset) for offset in self.offset)
        sides = zip(self.input, self.offset, self.resized, strict=True)
        right, bottom = (min(size, offset + side) for size, offset, side in sides)
        return left, top, right, bottom


def place(spec: InputSpec, size: tuple[int, int]) -> Placement:
    """Place an image of a width and height, in pixels, in the input of a network."""
    width, height = size
    target = spec.width, spec.height
    if spec.resize == "stretch":
        return Placement(size, target, (0, 0), target)
    if spec.resize == "none":
        return Placement(size, size, (0, 0), size)
    if spec.resize == "shortest_edge":
        # As torchvision and its predecessors: the longer side is cut down, not rounded.
        shorter, longer = min(size), max(size)
        edge = spec.height if spec.height * longer <= spec.width * shorter else spec.width * shorter / longer
        resized = tuple(max(1, int(edge * side / shorter)) for side in size)
        return Placement(size, resized, (0, 0), resized)  # type: ignore[arg-type]
    if spec.resize == "letterbox":
        scale = min(spec.width / width, spec.height / height)
        resized = max(1, round(width * scale)), max(1, round(height * scale))
        centered = (spec.width - resized[0]) // 2, (spec.height - resized[1]) // 2
        return Placement(size, resized, centered if spec.position == "center" else (0, 0), target)
    # The shorter side, in proportion to the input's, becomes resize_size; what is beyond the input is cut off.
    enlarged = tuple(spec.resize_size * side // min(target) for side in target) if spec.resize_size else target
    if width * enlarged[1] <= height * enlarged[0]:
        resized = enlarged[0], max(1, height * enlarged[0] // width)
    else:
        resized = max(1, width * enlarged[1] // height), enlarged[1]
    offset = tuple(-round((side - cut) / 2) for side, cut in zip(resized, target, strict=True))
    return Placement(size, resized, offset, target)  # type: ignore[arg-type]
