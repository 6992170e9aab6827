"""The object that each anchor has to predict (section 3.2: as in SSD, Liu et al., ECCV 2016, section 2.2)."""

import torch

from helpers.yolact.detection import CENTER_VARIANCE, SIZE_VARIANCE

POSITIVE, NEGATIVE = 0.5, 0.4  # intersection over union: an object from the first on, none below the second
BACKGROUND, IGNORED = -1, -2


def match(priors: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Give each anchor an object, the background, or nothing to learn.

    Args:
        priors: anchors float32 `[A, 4]`: center and size.
        boxes: of the objects, float32 `[n, 4]`: corners, relative to the image as the anchors are.

    Returns:
        int64 `[A]`: the object that an anchor overlaps most, if that is by `POSITIVE` or more; `BACKGROUND`, if by
        less than `NEGATIVE`; else `IGNORED`. Each object also has the anchor that overlaps it most, however little,
        and no two have the same: the pair that overlaps most comes first.
    """
    if not len(boxes):
        return torch.full((len(priors),), BACKGROUND, device=priors.device)
    overlaps = box_overlaps(to_corners(priors), boxes)
    best, matched = overlaps.max(dim=1)
    matched[best < POSITIVE] = IGNORED
    matched[best < NEGATIVE] = BACKGROUND
    for _ in range(len(boxes)):
        anchor, owner = divmod(int(overlaps.argmax()), len(boxes))
        matched[anchor] = owner
        overlaps[anchor], overlaps[:, owner] = -1, -1
    return matched


def encode(boxes: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Offsets `[n, 4]` that `detection.decode` turns, with the anchors `[n, 4]`, into boxes (corners, `[n, 4]`)."""
    centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    shifts = (centers - priors[:, :2]) / (float(CENTER_VARIANCE) * priors[:, 2:])
    return torch.cat([shifts, torch.log(sizes / priors[:, 2:]) / float(SIZE_VARIANCE)], dim=1)


def to_corners(priors: torch.Tensor) -> torch.Tensor:
    """Center and size to corners, `[n, 4]` each."""
    return torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], dim=1)


def box_overlaps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Intersection over union `[n, m]` of boxes (corners) `[n, 4]` and `[m, 4]`."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (one, other)]
    return both / (areas[0][:, None] + areas[1][None] - both)
