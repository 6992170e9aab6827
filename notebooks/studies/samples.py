"""A small folder as users have them: pictures of several formats and sizes, nested, and files that are no images."""

from pathlib import Path

import cv2

from helpers.data import fashion_mnist

SUFFIXES = (".png", ".jpg", ".bmp", ".webp")
SIDES = (28, 56, 112, 224)  # pixels
DAMAGED = {"empty.jpg": b"", "notes.jpg": b"a text file with an image's name", "page.png": b"<html>not found</html>"}


def write_samples(root: str, folder: str, count: int = 60) -> Path:
    """Write the first test images of Fashion-MNIST in changing formats and sizes, and a few damaged files.

    Args:
        root: where the data set is.
        folder: where the files go; `bags/` and `clothes/` below it, the damaged files at its top.
        count: good images.

    Returns:
        The folder of the files.
    """
    images, labels = fashion_mnist.load(root, train=False)
    target = Path(folder)
    for i in range(count):
        place = target / ("bags" if fashion_mnist.CLASSES[labels[i]] == "Bag" else "clothes")
        place.mkdir(parents=True, exist_ok=True)
        side = SIDES[i // len(SUFFIXES) % len(SIDES)]
        enlarged = cv2.resize(images[i], (side, side), interpolation=cv2.INTER_CUBIC)
        encoded = cv2.imencode(SUFFIXES[i % len(SUFFIXES)], enlarged)[1].tobytes()
        (place / f"sample {i:03d}{SUFFIXES[i % len(SUFFIXES)]}").write_bytes(encoded)
    (target / "cut short.png").write_bytes(cv2.imencode(".png", images[0])[1].tobytes()[:150])
    for name, content in DAMAGED.items():
        (target / name).write_bytes(content)
    return target
