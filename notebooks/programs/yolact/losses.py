"""The losses that YOLACT is trained with (Bolya et al., ICCV 2019, sections 3.3 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from yolact.matching import BACKGROUND, encode, match

# Section 3.3 gives the first three ("1, 1.5, and 6.125"), section 5 the last.
WEIGHTS = {"class": 1.0, "box": 1.5, "mask": 6.125, "semantic": 1.0}
NEGATIVES = 3  # for each positive anchor (SSD, section 2.2, hard negative mining)
MASKS = 100  # positive anchors per image with assembled masks, at most; more take memory and teach little


@dataclass(frozen=True)
class Target:
    """The objects of one image.

    Attributes:
        boxes: float32 `[n, 4]`, corners relative to the image.
        labels: int64 `[n]`, foreground classes from 0.
        masks: float32 `[n, H, W]` at the size of the prototypes: the share of each cell that the object covers.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor

    def to(self, device: torch.device) -> "Target":
        """Return it on a device."""
        return Target(self.boxes.to(device), self.labels.to(device), self.masks.to(device))


def compute_losses(outputs: tuple[torch.Tensor, ...], targets: Sequence[Target]) -> dict[str, torch.Tensor]:
    """Compare what the network gives in training mode with the truth.

    Returns:
        The weighted terms `class`, `box`, `mask` and `semantic`; training minimizes their sum. The first three are
        means over the batch's positive anchors, the last over its images.
    """
    loc, conf, coefficients, priors, proto, semantic = (output.float() for output in outputs)
    matched = torch.stack([match(priors, target.boxes) for target in targets])
    positives = max(int((matched >= 0).sum()), 1)
    boxes = [box_loss(*one, priors) for one in zip(loc, matched, targets, strict=True)]
    masks = [mask_loss(*one) for one in zip(proto, coefficients, matched, targets, strict=True)]
    maps = [semantic_loss(*one) for one in zip(semantic, targets, strict=True)]
    terms = {
        "class": class_loss(conf, _classes(matched, targets)) / positives,
        "box": torch.stack(boxes).sum() / positives,
        "mask": torch.stack(masks).sum() / positives,
        "semantic": torch.stack(maps).mean(),
    }
    return {name: WEIGHTS[name] * value for name, value in terms.items()}


def class_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy of the positive anchors and the hardest negatives of each image, summed.

    Args:
        logits: float32 `[B, A, classes]`, the background first.
        classes: int64 `[B, A]`: 0 the background, negative what is not to be learned.
    """
    with torch.no_grad():
        # A negative's loss: the network's distance from the answer `background`.
        hardness = logits.logsumexp(dim=2) - logits[..., 0]
        hardness[classes != 0] = -1
        ranks = hardness.argsort(dim=1, descending=True).argsort(dim=1)
        positive = classes > 0
        chosen = positive | ((classes == 0) & (ranks < NEGATIVES * positive.sum(dim=1, keepdim=True)))
    return F.cross_entropy(logits[chosen], classes[chosen], reduction="sum")


def box_loss(loc: torch.Tensor, matched: torch.Tensor, target: Target, priors: torch.Tensor) -> torch.Tensor:
    """Smooth L1 between the offsets of one image's positive anchors, `[A, 4]`, and those to their objects, summed."""
    positive = matched >= 0
    targets = encode(target.boxes[matched[positive]], priors[positive])
    return F.smooth_l1_loss(loc[positive], targets, reduction="sum")


def mask_loss(proto: torch.Tensor, coefficients: torch.Tensor, matched: torch.Tensor, target: Target) -> torch.Tensor:
    """Binary cross-entropy of the assembled masks (equation 1), cropped at the objects' boxes, divided by their area.

    The division keeps small objects from counting less (section 3.3, "Cropping Masks"). The
    target of a cell is the share that an object covers, because masks are enlarged before they are cut off at one half.

    Args:
        proto: prototypes of one image, float32 `[H, W, k]`.
        coefficients: float32 `[A, k]`.
        matched: int64 `[A]`, see `match`.
        target: of the image.
    """
    positive = torch.nonzero(matched >= 0)[:, 0]
    count = len(positive)
    if not count:
        return proto.sum() * 0
    if count > MASKS:
        positive = positive[torch.randperm(count, device=positive.device)[:MASKS]]
    owners = matched[positive]
    logits = torch.einsum("hwk,nk->nhw", proto, coefficients[positive])
    scale = proto.new_tensor([proto.shape[1], proto.shape[0]] * 2)
    boxes = target.boxes[owners] * scale
    errors = F.binary_cross_entropy_with_logits(logits, target.masks[owners], reduction="none")
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return ((errors * _inside(boxes, proto.shape[0], proto.shape[1])).sum(dim=(1, 2)) / areas).sum() * (
        count / len(positive)
    )


def semantic_loss(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Binary cross-entropy of each class's map on P3, `[classes, h, w]`, summed over classes (section 5)."""
    truth = torch.zeros_like(logits)
    if len(target.labels):
        covered = F.interpolate(target.masks[None], logits.shape[1:], mode="area")[0] > 0.5
        truth.index_put_((target.labels,), covered.float(), accumulate=True)
    return F.binary_cross_entropy_with_logits(logits, truth.clamp(max=1), reduction="sum") / logits[0].numel()


def _classes(matched: torch.Tensor, targets: Sequence[Target]) -> torch.Tensor:
    """Class of the softmax for each anchor, int64 `[B, A]`: from 1 for objects, 0 background, -1 not to be learned."""
    classes = torch.where(matched == BACKGROUND, 0, -1)
    for row, owners, target in zip(classes, matched, targets, strict=True):
        row[owners >= 0] = target.labels[owners[owners >= 0]] + 1
    return classes


def _inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bool `[n, height, width]`: the cells within each box and one around it, as `masks` crops them."""
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    columns = (x >= boxes[:, :1] - 1) & (x < boxes[:, 2:3] + 1)
    rows = (y >= boxes[:, 1:2] - 1) & (y < boxes[:, 3:] + 1)
    return rows[:, :, None] & columns[:, None]
