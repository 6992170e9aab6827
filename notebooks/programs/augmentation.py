"""Changes that keep an image's class, for a whole batch at once."""

import torch
from torch import nn


def augment(
    images: torch.Tensor, epoch: int = 0, horizontal_flip: bool = False, shift: int = 0, cutout: int = 0
) -> torch.Tensor:
    """Change each image of a batch at random, each in its own way.

    Args:
        images: uint8 `[B, side, side]`.
        epoch: the next epoch flips the other half, so that two epochs show all of both (Jordan,
            arXiv:2404.00498, section 3.6).
        horizontal_flip: mirror half of them; their pixels decide which half.
        shift: pixels by which an image moves at most, in each direction; the gap is black.
        cutout: pixels, the side of a black square whose center lies anywhere (DeVries and Taylor,
            arXiv:1708.04552).
    """
    if not (horizontal_flip or shift or cutout):
        return images
    count, side, device = len(images), images.shape[-1], images.device
    places = torch.arange(side, device=device)
    rows, columns = torch.randint(0, 2 * shift + 1, (2, count, 1), device=device) + places
    if horizontal_flip:
        turned = (images.sum((1, 2)) + epoch) % 2 == 1
        columns = torch.where(turned[:, None], columns.flip(1), columns)
    padded = nn.functional.pad(images, (shift,) * 4)
    changed = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if cutout:
        starts = torch.randint(0, side, (2, count, 1), device=device) - cutout // 2
        inside = (places >= starts) & (places < starts + cutout)
        changed = changed.masked_fill(inside[0, :, :, None] & inside[1, :, None, :], 0)
    return changed
