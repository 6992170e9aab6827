"""Scenes: images with several Fashion-MNIST items on textured backgrounds, and the exact mask of each item.

Anyone can make this data set of instance segmentation: seed, split and number fix a scene. Items lie at random places,
sizes and angles, and later ones cover parts of earlier ones. A mask is the visible part of its item. The splits share
no item. Changes for training are in `augmentation`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count as numbers_from
from typing import Any

import numpy as np

import fashion_data
from helpers.errors import ConfigError
from helpers.images import rle
from yolact.sprites import Sprite, add_grain, make_background

SIZE = 160  # pixels of a side, that item sizes are relative to
ITEMS = (3, 6)  # of a scene: at least and at most, though some may find no place
MARGIN = 0.12  # of the image's side: an item's center keeps off the edge
LEAST_VISIBLE = 0.6  # of an item's area; the rest is behind later items or beyond the edge
ATTEMPTS = 12  # to find a place for an item
VALIDATION_FROM = 55_000  # training images from here on are for validation alone
SPLITS = {"train": (True, slice(None, VALIDATION_FROM)), "val": (True, slice(VALIDATION_FROM, None))}
SPLITS["test"] = (False, slice(None))


@dataclass(frozen=True)
class Scene:
    """One image and the objects in it.

    Attributes:
        image: uint8 `[height, width, 3]`, red, green, blue.
        masks: bool `[n, height, width]`, the visible pixels of each item; no two items of a made scene share one.
        labels: int64 `[n]`, indices into the classes: of a made scene `fashion_data.CLASSES`.
        items: int64 `[n]`, which images of the training or test set they are; empty where the scene was not made.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def boxes(self) -> np.ndarray:
        """Float32 `[n, 4]`: corners in pixels around the visible parts, the high sides exclusive."""
        return boxes_of(self.masks)

    def as_predictions(self) -> list[dict[str, Any]]:
        """The truth in the form of the pipeline's results, so that it can be drawn as they are."""
        return [
            {
                "class_id": label,
                "label": fashion_data.CLASSES[label],
                "score": 1.0,
                "box": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
                "mask": rle.encode(mask),
            }
            for label, box, mask in zip(self.labels.tolist(), self.boxes.tolist(), self.masks, strict=True)
        ]


class Scenes:
    """The scenes of a split by their number: any number from 0 on gives one, and always the same."""

    def __init__(self, root: str, split: str, seed: int = 0, height: int = SIZE, width: int = SIZE):
        """Open the items; each is read when a scene takes it.

        Args:
            root: where `fashion_data.download` put the data set.
            split: `train`, `val` or `test`.
            seed: another seed gives other scenes of the same items.
            height: of the images in pixels; items grow with the shorter side.
            width: likewise.

        Raises:
            ConfigError: there is no such split.
            DataError: the data set is not there.
        """
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}, not one of {', '.join(SPLITS)}")
        train, part = SPLITS[split]
        self.images, self.labels = fashion_data.load(root, train)
        self.candidates = np.arange(len(self.images))[part]
        self.seed, self.split, self.height, self.width = seed, split, height, width
        self.zoom = min(height, width) / SIZE

    def __getitem__(self, number: int) -> Scene:
        """Make a scene."""
        rng = self.generator(number)
        image = make_background(rng, self.height, self.width)
        masks: list[np.ndarray] = []
        items: list[int] = []
        areas: list[int] = []
        for item in rng.choice(self.candidates, rng.integers(ITEMS[0], ITEMS[1] + 1), replace=False):
            sprite = Sprite.of(self.images[item], rng, self.zoom)
            for _ in range(ATTEMPTS):
                cover = sprite.cover(*_place(rng, self.height, self.width), self.height, self.width)
                left = [mask & ~cover.mask for mask in masks] + [cover.mask]
                whole = [*areas, cover.area]
                if all(np.count_nonzero(m) / area >= LEAST_VISIBLE for m, area in zip(left, whole, strict=True)):
                    cover.paint(image)
                    masks, areas = left, whole
                    items.append(int(item))
                    break
        indices = np.array(items, np.int64)
        return Scene(add_grain(rng, image), np.stack(masks), self.labels[indices], indices)

    def generator(self, number: int) -> np.random.Generator:
        """What decides about a scene."""
        return np.random.default_rng([self.seed, list(SPLITS).index(self.split), number])


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Boxes float32 `[n, 4]` around masks bool `[n, height, width]` that are not empty, the high sides exclusive."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    low = [columns.argmax(axis=1), rows.argmax(axis=1)]
    high = [side.shape[1] - side[:, ::-1].argmax(axis=1) for side in (columns, rows)]
    return np.stack([*low, *high], axis=1).astype(np.float32)


def to_coco(
    scenes: Iterable[Scene], first_image: int = 0, labels: Sequence[str] = fashion_data.CLASSES
) -> dict[str, Any]:
    """Describe scenes as COCO does: images, annotations and categories.

    Image ids are the numbers of the scenes and category ids the class indices, both from 0; annotations count from 1.
    """
    images, annotations = [], []
    identities = numbers_from(1)
    for number, scene in enumerate(scenes, start=first_image):
        height, width = scene.image.shape[:2]
        images.append({"id": number, "file_name": file_name(number), "width": width, "height": height})
        for mask, (x1, y1, x2, y2), label in zip(scene.masks, scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": next(identities),
                    "image_id": number,
                    "category_id": label,
                    "segmentation": rle.encode(mask),
                    "area": int(mask.sum()),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(labels)]
    return {"images": images, "annotations": annotations, "categories": categories}


def join_coco(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put descriptions of different images, with the same categories, into one."""
    images = [image for part in parts for image in part["images"]]
    annotations = [annotation for part in parts for annotation in part["annotations"]]
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]
    return {"images": images, "annotations": numbered, "categories": parts[0]["categories"]}


def file_name(number: int) -> str:
    """Name of a scene's image file."""
    return f"{number:05d}.png"


def _place(rng: np.random.Generator, height: int, width: int) -> tuple[float, float]:
    margin = MARGIN * min(height, width)
    return rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
