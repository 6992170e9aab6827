"""Scenes as training sees them: mirrored, cropped and in other light (section 6 names SSD's augmentation). No Spark."""

import cv2
import numpy as np
import torch

from yolact.losses import Target
from yolact.scenes import Scene, boxes_of

CROPPED = 0.5  # of the images
SMALLEST_CROP = 0.7  # of the image's side
LEAST_VISIBLE = 0.35  # of an object's visible part; an object with less in a crop counts as background
LEAST_PIXELS = 30  # of an object; the loss of a smaller mask, divided by its box's area, would be out of proportion
LIGHT = 0.25  # largest change of brightness and of contrast, as a share


def augment(scene: Scene, cells: int, rng: np.random.Generator) -> tuple[np.ndarray, Target]:
    """Change an image at random, and its objects with it.

    Args:
        scene: what to change.
        cells: side of the prototypes and of the target's masks.
        rng: decides.

    Returns:
        An image, uint8 of the same shape, and what is in it.
    """
    image, masks = scene.image, scene.masks
    whole = masks.sum(axis=(1, 2))
    if rng.random() < 0.5:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    if rng.random() < CROPPED:
        window = _window(image.shape[0], image.shape[1], rng)
        image = cv2.resize(np.ascontiguousarray(image[window]), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        masks = masks[:, window[0], window[1]]
    areas = masks.sum(axis=(1, 2))
    seen = (areas >= LEAST_VISIBLE * whole) & (areas >= LEAST_PIXELS)
    return _relight(image, rng), make_target(masks[seen], scene.labels[seen], cells)


def make_target(masks: np.ndarray, labels: np.ndarray, cells: int) -> Target:
    """Turn masks, bool `[n, height, width]`, and labels into what the losses compare with."""
    height, width = masks.shape[1:]
    boxes = boxes_of(masks) / np.array([width, height, width, height], np.float32)
    shares = [cv2.resize(mask.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA) for mask in masks]
    small = np.stack(shares) if shares else np.zeros((0, cells, cells), np.float32)
    return Target(torch.from_numpy(boxes), torch.from_numpy(labels.copy()), torch.from_numpy(small))


def _window(height: int, width: int, rng: np.random.Generator) -> tuple[slice, slice]:
    share = rng.uniform(SMALLEST_CROP, 1)
    rows, columns = round(height * share), round(width * share)
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    return slice(top, top + rows), slice(left, left + columns)


def _relight(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # One table per channel, so that the light's color changes too.
    contrast = rng.uniform(1 - LIGHT, 1 + LIGHT, 3)
    shift = 255 * rng.uniform(-LIGHT, LIGHT) / 2
    table = (np.arange(256)[:, None] - 127.5) * contrast + 127.5 + shift
    return cv2.LUT(np.ascontiguousarray(image), np.clip(table, 0, 255).astype(np.uint8)[None])
