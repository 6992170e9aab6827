"""Time of each decoder's post-processing of one image, on one thread.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=.:tests .venv/bin/python tests/bench/decoders.py

Prints a line per decoder: milliseconds and predictions. Outputs are synthetic, of usual sizes: 60 objects of 80
classes, each with 8 probable candidates among thousands of improbable ones; images have 1280 x 960 pixels.
"""

import time

import cv2
import numpy as np
from manifests import make_manifest

from helpers.tasks import predict

SIZE, SIDE = (1280, 960), 640
OBJECTS, CANDIDATES, CLASSES, MAP_CLASSES = 60, 8, 80, 21
RUNS = 10


def main() -> None:
    random = np.random.default_rng(0)
    for (task, decoder), (outputs, arrays, settings) in cases(random).items():
        labels = [str(i) for i in range({"semantic_segmentation": MAP_CLASSES, "keypoints": 1}.get(task, CLASSES))]
        manifest = make_manifest(task, decoder, labels, SIDE, SIDE, resize="letterbox")
        batch = {name: values[None].astype(np.float32) for name, values in outputs.items()}
        seconds, count = [], 0
        for _ in range(RUNS):
            start = time.perf_counter()
            (predictions,) = predict(batch, [SIZE], manifest, settings, arrays)
            seconds.append(time.perf_counter() - start)
            count = len(predictions)
        print(f"{task:22} {decoder:12} {1000 * min(seconds):8.2f} ms {count:5} predictions", flush=True)


def cases(random) -> dict:
    """Outputs, arrays and parameters by task and decoder."""
    centers, scores = candidates(random, 8400)
    low = centers[:, :2] - centers[:, 2:] / 2
    corners = np.concatenate([low, low + centers[:, 2:]], axis=1)
    best = {"boxes": corners[::CANDIDATES][:OBJECTS], "scores": random.random(OBJECTS), "classes": np.arange(OBJECTS)}
    normal, uniform = random.standard_normal, random.random
    maps = [cv2.resize(normal((6, 6)), (160, 160), interpolation=cv2.INTER_CUBIC) for _ in range(MAP_CLASSES)]
    logits = 8 + np.log(np.concatenate([np.ones((8400, 1)), scores], axis=1))
    priors = {"priors.npy": (centers / SIDE).astype(np.float32)}
    heads = {
        "sizes": 3 * uniform((2, 160, 160)),
        "offsets": uniform((2, 160, 160)),
        "landmarks": uniform((10, 160, 160)),
    }
    heat = np.where(uniform((1, 160, 160)) < OBJECTS / 160**2, 0.9, 0)
    poses = np.concatenate([centers, scores[:, :1], uniform((8400, 51))], axis=1)
    masks = np.concatenate([centers, scores, normal((8400, 32))], axis=1)
    yolo = np.concatenate([centers, scores], axis=1).T.copy()
    return {
        ("detection", "end_to_end"): (best, {}, {}),
        ("detection", "yolo"): ({"predictions": yolo}, {}, {}),
        ("detection", "candidates"): ({"boxes": corners, "scores": scores}, {}, {}),
        ("detection", "ssd"): ({"offsets": normal((8400, 4)), "scores": logits}, priors, {}),
        ("detection", "detr"): (
            {"logits": normal((300, 80)) - 4, "boxes": uniform((300, 4))},
            {},
            {"activation": "sigmoid"},
        ),
        ("instance_segmentation", "mask_rcnn"): ({**best, "masks": uniform((OBJECTS, 28, 28))}, {}, {}),
        ("instance_segmentation", "yolo"): (
            {"predictions": masks.T.copy(), "prototypes": normal((32, 160, 160))},
            {},
            {},
        ),
        ("semantic_segmentation", "logits"): ({"scores": 3 * np.stack(maps)}, {}, {}),
        ("semantic_segmentation", "class_map"): ({"classes": np.argmax(maps, axis=0)}, {}, {}),
        ("keypoints", "yolo"): ({"predictions": poses.T.copy()}, {}, {}),
        ("keypoints", "centernet"): ({"heatmap": heat, **heads}, {}, {}),
    }


def candidates(random, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as centers and sizes in pixels `[count, 4]`, and scores of classes `[count, CLASSES]`."""
    boxes = np.concatenate([random.random((count, 2)) * SIDE, 10 + random.random((count, 2)) * 100], axis=1)
    scores = random.random((count, CLASSES)) * 0.02
    for i in range(OBJECTS):
        rows = slice(i * CANDIDATES, (i + 1) * CANDIDATES)
        boxes[rows] = boxes[rows.start] + random.random((CANDIDATES, 4)) * 4
        scores[rows, i] = 0.3 + 0.6 * random.random(CANDIDATES)
    return boxes, scores


if __name__ == "__main__":
    main()
