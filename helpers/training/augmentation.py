"""Changes that leave an image's class as it is, for a whole batch at once."""

import torch
from torch import nn


def augment(
    images: torch.Tensor, generator: torch.Generator, mirror: bool = True, shift: int = 0, cutout: int = 0
) -> torch.Tensor:
    """Change each image of a batch in its own way: mirrored or not, moved, and a square blackened.

    Args:
        images: uint8 `[B, side, side]`.
        generator: of the random choices.
        mirror: turn half of them over.
        shift: pixels by which an image moves at most, in each direction; what comes in is black.
        cutout: pixels, the side of the square, whose centre lies anywhere (DeVries and Taylor, arXiv:1708.04552).
    """
    count, side = len(images), images.shape[-1]
    places = torch.arange(side)
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = offsets + places
    if mirror:
        chosen = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(chosen, columns.flip(1), columns)
    padded = nn.functional.pad(images, (shift,) * 4)
    changed = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if cutout:
        starts = torch.randint(0, side, (2, count, 1), generator=generator) - cutout // 2
        inside = (places >= starts) & (places < starts + cutout)
        changed = changed.masked_fill(inside[0, :, :, None] & inside[1, :, None, :], 0)
    return changed
