"""Time of YOLACT's post-processing on one thread, and of the specification's own steps (`tests/yolact_oracle.py`).

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=notebooks:tests .venv/bin/python tests/bench/masks.py

Prints a line for each size of image and of boxes: our milliseconds, the specification's, and their ratio. Heads are
synthetic, 400 probable anchors around 14 objects; `boxes` says which share of the image each box has.
"""

import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
import yolact_oracle as oracle

from helpers.yolact.configurations import CONFIGURATIONS
from helpers.yolact.detection import Detections, Parameters, detect, to_pixels
from helpers.yolact.masks import encode_masks
from helpers.yolact.priors import make_priors

SIZES = [(640, 480), (1920, 1080)]
SIDES = {"as detected": None, "a fifth": 0.2**0.5, "half": 0.5**0.5, "all": 1.0}


def main() -> None:
    torch.set_num_threads(1)
    priors = make_priors(CONFIGURATIONS["yolact_resnet50"])
    loc, conf, mask, proto = heads(priors)

    def ours(width: int, height: int, side: float | None) -> None:
        found = resized(detect(loc, conf, mask, priors, Parameters(), 550), side)
        to_pixels(found.boxes, width, height)
        encode_masks(proto, found.coefficients, found.boxes, width, height)

    def specified(width: int, height: int) -> None:
        oracle.postprocess(loc, conf, mask, priors, proto, width, height)

    for size in SIZES:
        unit = median(lambda size=size: specified(*size), 5)
        for name, side in SIDES.items():
            taken = median(lambda size=size, side=side: ours(*size, side), 15)
            print(f"{size[0]}x{size[1]} boxes {name:12} {taken:6.1f} ms of {unit:7.1f} ms, ratio {taken / unit:.3f}")


def heads(priors: np.ndarray, probable: int = 400, objects: int = 14) -> tuple[np.ndarray, ...]:
    """Raw heads of one image: offsets, probabilities, coefficients and smooth prototypes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (len(priors), 81)) + 9 * np.eye(81)[0]
    centres, sizes, classes = rng.random((objects, 2)), rng.uniform(0.1, 0.6, objects), rng.integers(1, 81, objects)
    place = np.abs(priors[:, None, :2] - centres).max(axis=2) + 0.3 * np.abs(np.log(priors[:, None, 2] / sizes))
    nearest = np.argsort(place.min(axis=1))[:probable]
    logits[nearest, classes[place[nearest].argmin(axis=1)]] += rng.uniform(8, 14, probable)
    conf = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    coarse = 2 * rng.random((9, 9, 32))
    proto = np.stack([cv2.resize(p, (138, 138), interpolation=cv2.INTER_CUBIC) for p in coarse.transpose(2, 0, 1)], 2)
    found = rng.normal(0, 0.5, (len(priors), 4)), conf, np.tanh(rng.normal(0, 1, (len(priors), 32))), proto.clip(0)
    return tuple(array.astype(np.float32) for array in found)


def resized(found: Detections, side: float | None) -> Detections:
    """The same detections with boxes of one size at random places."""
    if side is None:
        return found
    corner = np.random.default_rng(1).random((len(found.scores), 2)) * (1 - side)
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    return Detections(boxes, found.classes, found.scores, found.coefficients)


def median(work: Callable[[], None], repeats: int) -> float:
    """Milliseconds, the first time left out."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds))


if __name__ == "__main__":
    main()
