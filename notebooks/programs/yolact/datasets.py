"""Augmented training data of YOLACT: scenes made on request, or your own images in COCO's form."""

import json
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch

import fashion_data
from helpers.errors import DataError
from helpers.images.spec import InputSpec
from helpers.training import DataSet, Folder, Group, Shards, is_sharded, load_image, share_batches
from yolact.augmentation import augment
from yolact.coco import ANNOTATIONS, read_annotations, to_mask
from yolact.losses import Target
from yolact.scenes import Scene, Scenes

SceneSet = DataSet[list[Scene]]
GENERATED = {"train": 6000, "val": 200}  # scenes, by default


def open_scenes(
    place: str | None, root: str, split: str, size: int, count: int | None = None, seed: int = 0, config: Any = None
) -> tuple[SceneSet, tuple[str, ...]]:
    """Open a data set of instance segmentation.

    A folder's validation set has images without annotations; its training set leaves them out.

    Args:
        place: a folder with `annotations.json`, COCO's instances, and `images`, or the target of `write_shards`; None
            for scenes of Fashion-MNIST items.
        root: where `fashion_data.download` put these.
        split: `train` or `val`.
        size: side of the scenes in pixels; images are stretched to it, as for inference.
        count: take the first only.
        seed: of scenes that are made.
        config: its `storage` says how object storage is reached.

    Returns:
        The scenes, and the names of the classes.

    Raises:
        DataError: the data set is not there, or has another form.
    """
    if place is None:
        scenes = Scenes(root, split, seed, size, size)
        return GeneratedScenes(scenes, count or GENERATED[split]), fashion_data.CLASSES
    if is_sharded(place, config):
        shards = Shards(place, Annotated(size), count, config)
        if not shards.labels:
            raise DataError(f"{place} does not say which classes its scenes have: give write_shards their labels")
        return shards, shards.labels
    table, labels = read_annotations(place, config, empty=split != "train")
    return Folder(place, Annotated(size), table.slice(0, count), ANNOTATIONS, config), labels


class GeneratedScenes:
    """Scenes of Fashion-MNIST items; each epoch has its own scenes of the same items."""

    def __init__(self, scenes: Scenes, count: int):
        self.scenes, self.count = scenes, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: torch.Tensor) -> list[Scene]:
        return [self.scenes[number] for number in indices.tolist()]

    def shares(self, group: Group, batch_size: int, seed: int, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """Of a random order of the epoch's own."""
        for share in share_batches(self.count, group, batch_size, seed, epoch, first):
            yield epoch * self.count + share


class AugmentedScenes:
    """The scenes of an epoch as training sees them."""

    def __init__(self, scenes: SceneSet, cells: int, seed: int, epoch: int):
        self.scenes, self.cells, self.seed, self.epoch = scenes, cells, seed, epoch

    def __getitems__(self, indices: torch.Tensor) -> tuple[torch.Tensor, list[Target]]:
        numbers, scenes = (indices % len(self.scenes)).tolist(), self.scenes.__getitems__(indices)
        augmented = [self._augment(scene, number) for scene, number in zip(scenes, numbers, strict=True)]
        return torch.from_numpy(np.stack([image for image, _ in augmented])), [target for _, target in augmented]

    def _augment(self, scene: Scene, number: int) -> tuple[np.ndarray, Target]:
        return augment(scene, self.cells, np.random.default_rng([self.seed, self.epoch, number]))


class Annotated:
    """A stored image and its instances, stretched to the network's size."""

    columns = frozenset(("width", "height", "annotations"))

    def __init__(self, size: int):
        self.spec = InputSpec(size, size, "rgb", (0.0,) * 3, (1.0,) * 3)

    def make(self, content: memoryview, row: dict[str, Any]) -> Scene:
        """Of one image."""
        file, expected = row["file"], (row["width"], row["height"])
        image, size = load_image(content, self.spec, file)
        if size != expected:
            raise DataError(
                f"{file} has {size[0]} x {size[1]} pixels (turned upright), its annotations are of {expected[0]} x "
                f"{expected[1]}: annotate this very file, or leave it out"
            )
        masks = [self._mask(annotation["segmentation"], size, file) for annotation in row["annotations"]]
        seen = [index for index, mask in enumerate(masks) if mask.any()]  # what is tiny may vanish
        labels = np.array([row["annotations"][index]["label"] for index in seen], np.int64)
        shape = (len(seen), self.spec.height, self.spec.width)
        return Scene(image, np.array([masks[index] for index in seen], bool).reshape(shape), labels)

    def join(self, items: list[Scene]) -> list[Scene]:
        """Of a batch."""
        return items

    def _mask(self, segmentation: str, size: tuple[int, int], file: str) -> np.ndarray:
        try:
            mask = to_mask(json.loads(segmentation), size[1], size[0])
        except (TypeError, ValueError) as error:
            raise DataError(f"{file}: a segmentation of it cannot be read: {error}; mend or remove it") from None
        sides = (self.spec.width, self.spec.height)
        # A pixel belongs to an object that covers half of it or more.
        return cv2.resize(255 * mask.astype(np.uint8, order="C"), sides, interpolation=cv2.INTER_AREA) >= 128
