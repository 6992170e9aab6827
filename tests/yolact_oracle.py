"""YOLACT's steps after the network as its specification states them, one by one and without any short cut.

The tests compare `helpers.yolact` with this, and the benchmark takes its time as the unit. In torch, because the
original is: its bilinear interpolation is the one that masks are defined by.
"""

import numpy as np
import torch
import torch.nn.functional as F


def decode(loc: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Offsets `[n, 4]` and anchors `[n, 4]` to relative corners `[n, 4]`."""
    centre = priors[:, :2] + loc[:, :2] * 0.1 * priors[:, 2:]
    size = priors[:, 2:] * torch.exp(loc[:, 2:] * 0.2)
    low = centre - size / 2
    return torch.cat([low, low + size], dim=1)


def overlaps(boxes: torch.Tensor) -> torch.Tensor:
    """IoU of every box with every other, of the same class: `[classes, n, 4]` to `[classes, n, n]`."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=3)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=2)
    return both / (area[:, :, None] + area[:, None, :] - both)


def detect(loc, conf, mask, priors, confidence=0.05, threshold=0.5, top_k=200, most=100, cross_class=False):
    """Fast NMS over all classes: boxes, classes, scores and coefficients as tensors, or None without detections."""
    loc, conf, mask, priors = map(torch.as_tensor, (loc, conf, mask, priors))
    kept = conf[:, 1:].max(dim=1).values > confidence
    if not kept.any():
        return None
    boxes, scores, mask = decode(loc[kept], priors[kept]), conf[kept, 1:].T, mask[kept]
    if cross_class:
        scores, classes = scores.max(dim=0, keepdim=True)
    ordered, index = scores.sort(dim=1, descending=True, stable=True)
    ordered, index = ordered[:, :top_k], index[:, :top_k]
    worst = overlaps(boxes[index]).triu(diagonal=1).max(dim=1).values
    found = worst <= threshold
    classes = classes[0][index] if cross_class else torch.arange(len(scores))[:, None].expand_as(index)
    classes, index, scores = classes[found], index[found], ordered[found]
    scores, best = scores.sort(descending=True, stable=True)
    best = best[:most]
    return boxes[index[best]], classes[best], scores[:most], mask[index[best]]


def traditional(loc, conf, priors, size=550, confidence=0.05, threshold=0.5, most=100):
    """Greedy NMS a class in pixels with both ends included: list of (score, class, anchor), the best first."""
    boxes = (decode(torch.as_tensor(loc), torch.as_tensor(priors)) * size).numpy()
    found = []
    for c in range(conf.shape[1] - 1):
        scores = conf[:, c + 1]
        kept: list[int] = []
        for i in sorted(np.flatnonzero(scores > confidence), key=lambda i: -scores[i]):
            if all(_pixel_overlap(boxes[i], boxes[j]) < threshold for j in kept):
                kept.append(i)
        found += [(float(scores[i]), c, int(i)) for i in kept]
    return sorted(found, key=lambda item: -item[0])[:most]


def _pixel_overlap(one, other):
    width = max(min(one[2], other[2]) - max(one[0], other[0]) + 1, 0)
    height = max(min(one[3], other[3]) - max(one[1], other[1]) + 1, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def enlarge(proto, coefficients, boxes, width: int, height: int) -> torch.Tensor:
    """Probabilities at the image's size, float32 `[n, height, width]`: assemble, crop, interpolate."""
    proto, coefficients, boxes = map(torch.as_tensor, (proto, coefficients, boxes))
    masks = torch.sigmoid(proto @ coefficients.T)  # [rows, columns, n]
    rows, columns, _ = masks.shape
    x1, x2 = _padded(boxes[:, 0], boxes[:, 2], columns)
    y1, y2 = _padded(boxes[:, 1], boxes[:, 3], rows)
    across, down = torch.arange(columns)[None, :, None], torch.arange(rows)[:, None, None]
    masks = masks * ((across >= x1) & (across < x2) & (down >= y1) & (down < y2))
    masks = masks.permute(2, 0, 1).contiguous()[None]
    return F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)[0]


def _padded(one, other, cells):
    one, other = one * cells, other * cells
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    return (low - 1).clamp(min=0), (high + 1).clamp(max=cells)


def pixel_boxes(boxes, width: int, height: int) -> torch.Tensor:
    """Relative corners to whole pixels, int64 `[n, 4]`."""
    boxes = torch.as_tensor(boxes)
    x, y = boxes[:, ::2] * width, boxes[:, 1::2] * height
    x1, x2 = x.min(dim=1).values.clamp(min=0), x.max(dim=1).values.clamp(max=width)
    y1, y2 = y.min(dim=1).values.clamp(min=0), y.max(dim=1).values.clamp(max=height)
    return torch.stack([x1, y1, x2, y2], dim=1).long()


def postprocess(loc, conf, mask, priors, proto, width: int, height: int):
    """All of it, for one image: boxes, classes, scores and 0/1 masks `[n, height, width]`; None without detections."""
    found = detect(loc, conf, mask, priors)
    if found is None:
        return None
    boxes, classes, scores, coefficients = found
    masks = (enlarge(proto, coefficients, boxes, width, height) > 0.5).float()
    return pixel_boxes(boxes, width, height), classes, scores, masks
