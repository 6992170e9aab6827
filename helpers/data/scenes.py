"""Scenes: images with several Fashion-MNIST items on textured backgrounds, and the exact mask of each item.

A data set of instance segmentation that anyone can make: a scene is fixed by the seed, the split and its number. Items
lie at random places, sizes and angles, and later ones cover parts of earlier ones; a mask is what is left to see of its
item. The splits share no item. It also makes clips of moving items. It does not augment: see `yolact.augmentation`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as numbers_from
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers.data import fashion_mnist
from helpers.data.sprites import Sprite, add_grain, make_background
from helpers.errors import ConfigError, DataError
from helpers.images import rle
from helpers.storage import open_storage

SIZE = 160  # pixels of a side, that item sizes are relative to
ITEMS = (3, 6)  # of a scene: at least and at most, though some may find no place
MARGIN = 0.12  # of the image's side: an item's centre keeps off the edge
LEAST_VISIBLE = 0.6  # of an item's area, the rest being behind later ones or beyond the edge
ATTEMPTS = 12  # to find a place for an item
VALIDATION_FROM = 55_000  # training images from here on are for validation alone
SPLITS = {"train": (True, slice(None, VALIDATION_FROM)), "val": (True, slice(VALIDATION_FROM, None))}
SPLITS["test"] = (False, slice(None))


@dataclass(frozen=True)
class Scene:
    """One image and what is to be found in it.

    Attributes:
        image: uint8 `[height, width, 3]`, red, green, blue.
        masks: bool `[n, height, width]`, the visible pixels of each item; no two items of a made scene share one.
        labels: int64 `[n]`, indices into the classes: of a made scene `fashion_mnist.CLASSES`.
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
                "label": fashion_mnist.CLASSES[label],
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
            root: where `fashion_mnist.download` put the data set.
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
        self.images, self.labels = fashion_mnist.map_files(root, train)
        self.candidates = np.arange(len(self.images))[part]
        self.seed, self.split, self.height, self.width = seed, split, height, width
        self.zoom = min(height, width) / SIZE

    def __getitem__(self, number: int) -> Scene:
        """Make a scene."""
        rng = self._generator(number)
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
        found = np.array(items, np.int64)
        return Scene(add_grain(rng, image), np.stack(masks), self.labels[found], found)

    def frames(self, number: int, count: int) -> Iterator[np.ndarray]:
        """Frames of one clip, uint8 `[height, width, 3]`: items drift, turn and breathe over a still background.

        The path of an item is a sum of slow waves, so that it is smooth, stays within the image and never ends.
        """
        rng = self._generator(number)
        background = make_background(rng, self.height, self.width)
        chosen = rng.choice(self.candidates, ITEMS[1], replace=False)
        sprites = [Sprite.of(self.images[item], rng, self.zoom) for item in chosen]
        phases = rng.uniform(0, 2 * np.pi, (len(sprites), 4))
        speeds = rng.uniform(0.02, 0.06, (len(sprites), 4))  # radians a frame
        for moment in range(count):
            image = background.copy()
            waves = np.sin(phases + speeds * moment)
            for sprite, (across, down, turn, breath) in zip(sprites, waves, strict=True):
                moved = replace(sprite, angle=sprite.angle + 20 * turn, scale=sprite.scale * (1 + 0.15 * breath))
                x, y = self.width * (0.5 + 0.38 * across), self.height * (0.5 + 0.38 * down)
                moved.cover(x, y, self.height, self.width).paint(image)
            yield image.astype(np.uint8)

    def _generator(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, list(SPLITS).index(self.split), number])


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Boxes float32 `[n, 4]` around masks bool `[n, height, width]` that are not empty, the high sides exclusive."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    low = [columns.argmax(axis=1), rows.argmax(axis=1)]
    high = [side.shape[1] - side[:, ::-1].argmax(axis=1) for side in (columns, rows)]
    return np.stack([*low, *high], axis=1).astype(np.float32)


def to_coco(
    scenes: Iterable[Scene], first_image: int = 0, labels: Sequence[str] = fashion_mnist.CLASSES
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


def write_scenes(scenes: Scenes, folder: str, count: int) -> str:
    """Write the first scenes as files: `FOLDER/images/00000.png` and on, and `FOLDER/annotations.json`.

    The annotations are apart, so that the image folder is a source of images as users have them, and come last: where
    they are there and describe these scenes, nothing is written.

    Returns:
        Where the images are.
    """
    storage = open_storage(folder)
    # The first scene shows the split, the seed, the size, and any change to how scenes are made.
    info = {"scenes": count, "first": hashlib.sha256(scenes[0].image.tobytes()).hexdigest()}
    if not (storage.exists("annotations.json") and json.loads(storage.read("annotations.json")).get("info") == info):
        storage.delete("annotations.json")
        storage.delete("images")
        made = [scenes[number] for number in range(count)]
        for number, scene in enumerate(made):
            _, png = cv2.imencode(".png", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR))
            storage.write(f"images/{file_name(number)}", png.tobytes())
        storage.write("annotations.json", json.dumps({"info": info, **to_coco(made)}).encode())
    return f"{folder}/images"


def frames(seed: int, count: int, root: str, height: int = SIZE, width: int = SIZE) -> Iterator[np.ndarray]:
    """Frames of a clip of moving test items, uint8 `[height, width, 3]`, red, green, blue; see `Scenes.frames`."""
    return Scenes(root, "test", seed, height, width).frames(0, count)


def write_video(path: Path, frames: Iterable[np.ndarray], rate: float = 25) -> Path:
    """Write frames as a video file, motion JPEG for `.avi` and MPEG-4 for `.mp4`.

    Raises:
        DataError: OpenCV cannot write such a file there, or there are no frames.
    """
    code = cv2.VideoWriter.fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = None
    for frame in frames:
        if writer is None:
            writer = cv2.VideoWriter(str(path), code, rate, (frame.shape[1], frame.shape[0]))
            if not writer.isOpened():
                raise DataError(
                    f"OpenCV cannot write a video to {path}: use an .avi or .mp4 file in a folder that exists"
                )
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    if writer is None:
        raise DataError(f"there are no frames to write to {path}")
    writer.release()
    return path


def _place(rng: np.random.Generator, height: int, width: int) -> tuple[float, float]:
    margin = MARGIN * min(height, width)
    return rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
