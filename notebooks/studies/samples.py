"""Images, scenes and videos as files, as users have them, with the annotations apart."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fashion_data import CLASSES, load
from helpers.errors import DataError
from helpers.storage import open_storage
from yolact.scenes import ITEMS, Scenes, file_name, to_coco
from yolact.sprites import Sprite, make_background

SUFFIXES = (".png", ".jpg", ".bmp", ".webp")
SIDES = (28, 56, 112, 224)  # pixels
DAMAGED = {"empty.jpg": b"", "notes.jpg": b"a text file with an image's name", "page.png": b"<html>not found</html>"}
FILES_PER_FOLDER = 1000


def write_images(root: str, folder: str, train: bool = False, count: int | None = None) -> Path:
    """Write images as PNG files, as users have them: names without the class, and labels in a separate table.

    Images go to `FOLDER/images/00/00000.png` and on, labels to `FOLDER/labels.parquet` (file string, relative to
    the image folder; label int32). Complete images are left as they are; others are replaced.

    Args:
        root: where `download` put the data set.
        folder: what to create.
        train: take the training set instead of the test set.
        count: how many images, from the first; all by default.

    Returns:
        The image folder.
    """
    images, labels = load(root, train)
    images, labels = images[:count], labels[:count].astype(np.int32)
    target, table = Path(folder, "images"), Path(folder, "labels.parquet")
    names = [f"{index // FILES_PER_FOLDER:02d}/{index:05d}.png" for index in range(len(images))]
    if not _is_complete(target, table, labels):
        table.unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        _write_pngs(target, names, images)
        # The table comes last, so that its presence shows that all images are there.
        _write_table(table, names, labels)
    return target


def write_samples(root: str, folder: str, count: int = 60) -> Path:
    """Write the first test images of Fashion-MNIST in changing formats and sizes, and a few damaged files.

    Args:
        root: where the data set is.
        folder: where the files go; `bags/` and `clothes/` below it, the damaged files at its top.
        count: good images.

    Returns:
        The folder of the files.
    """
    images, labels = load(root, train=False)
    target = Path(folder)
    for i in range(count):
        place = target / ("bags" if CLASSES[labels[i]] == "Bag" else "clothes")
        place.mkdir(parents=True, exist_ok=True)
        side = SIDES[i // len(SUFFIXES) % len(SIDES)]
        enlarged = cv2.resize(images[i], (side, side), interpolation=cv2.INTER_CUBIC)
        encoded = cv2.imencode(SUFFIXES[i % len(SUFFIXES)], enlarged)[1].tobytes()
        (place / f"sample {i:03d}{SUFFIXES[i % len(SUFFIXES)]}").write_bytes(encoded)
    (target / "cut short.png").write_bytes(cv2.imencode(".png", images[0])[1].tobytes()[:150])
    for name, content in DAMAGED.items():
        (target / name).write_bytes(content)
    return target


def write_scenes(scenes: Scenes, folder: str, count: int) -> str:
    """Write the first scenes as files: `FOLDER/images/00000.png` and on, and `FOLDER/annotations.json`.

    The annotations lie apart, so that the image folder is a source of images as users have them. They come last: if
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
        drawn = [scenes[number] for number in range(count)]
        for number, scene in enumerate(drawn):
            _, png = cv2.imencode(".png", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR))
            storage.write(f"images/{file_name(number)}", png.tobytes())
        storage.write("annotations.json", json.dumps({"info": info, **to_coco(drawn)}).encode())
    return f"{folder}/images"


def make_frames(scenes: Scenes, count: int, number: int = 0) -> Iterator[np.ndarray]:
    """Frames of a clip, uint8 `[height, width, 3]`, red, green, blue: items drift, turn and breathe.

    The path of an item is a sum of slow waves, so that it is smooth, stays within the image and never ends. The
    background is still.
    """
    rng = scenes.generator(number)
    background = make_background(rng, scenes.height, scenes.width)
    chosen = rng.choice(scenes.candidates, ITEMS[1], replace=False)
    sprites = [Sprite.of(scenes.images[item], rng, scenes.zoom) for item in chosen]
    phases = rng.uniform(0, 2 * np.pi, (len(sprites), 4))
    speeds = rng.uniform(0.02, 0.06, (len(sprites), 4))  # radians per frame
    for moment in range(count):
        image = background.copy()
        waves = np.sin(phases + speeds * moment)
        for sprite, (across, down, turn, breath) in zip(sprites, waves, strict=True):
            moved = replace(sprite, angle=sprite.angle + 20 * turn, scale=sprite.scale * (1 + 0.15 * breath))
            x, y = scenes.width * (0.5 + 0.38 * across), scenes.height * (0.5 + 0.38 * down)
            moved.cover(x, y, scenes.height, scenes.width).paint(image)
        yield image.astype(np.uint8)


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


def _is_complete(target: Path, table: Path, labels: np.ndarray) -> bool:
    if not table.is_file():
        return False
    written = pq.read_table(table, columns=["label"])["label"].to_numpy()
    return np.array_equal(written, labels) and sum(1 for _ in target.rglob("*.png")) == len(labels)


def _write_pngs(target: Path, names: list[str], images: np.ndarray) -> None:
    for name in names[::FILES_PER_FOLDER]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        _, png = cv2.imencode(".png", image)
        (target / name).write_bytes(png.tobytes())


def _write_table(table: Path, names: list[str], labels: np.ndarray) -> None:
    unfinished = table.with_suffix(".unfinished")
    pq.write_table(pa.table({"file": names, "label": labels}), unfinished)
    unfinished.replace(table)
