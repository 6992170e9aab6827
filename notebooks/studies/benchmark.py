"""One network in several formats side by side: accuracy, difference of the outputs, file size, latency, throughput.

The formats take turns, a few images each, so that a disturbance of the machine hits all of them. Times are compared as
ratios.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from helpers.bundle.manifest import Bundle
from helpers.errors import DataError
from helpers.export.evaluation import Engine
from helpers.images.decoding import fit
from helpers.images.spec import InputSpec
from studies.formats import run_parallel

BATCH = 64
LATENCY_CALLS = 200
ROUNDS = 3
PUBLISHED = (0.70, 0.83)  # of PyTorch's time: the published share of a conversion of YOLACT to OpenVINO


def compare(
    formats: Mapping[str, tuple[Engine, int]], images: np.ndarray, labels: np.ndarray, reference: str
) -> pd.DataFrame:
    """Measure every format of a classifier on the same images.

    Args:
        formats: by name, its engine and its size in bytes.
        images: uint8 `[N, H, W, C]`.
        labels: int `[N]`.
        reference: the format whose outputs the others' are compared with.

    Returns:
        One row per format: accuracy (a share of 1), largest difference of an output, size (KiB), latency of one image
        (median, ms), throughput in batches of 64 (images/s).
    """
    expected = _predict_all(formats[reference][0], images)[0]
    rows = []
    for name, (engine, size) in formats.items():
        outputs, seconds = _predict_all(engine, images)
        rows.append(
            {
                "format": name,
                "accuracy": float((outputs.argmax(axis=1) == labels).mean()),
                "largest difference": float(np.abs(outputs - expected).max()),
                "size, KiB": size / 1024,
                "latency, ms": _latency(engine, images[:1]) * 1000,
                "throughput, images/s": len(images) / seconds,
            }
        )
    return pd.DataFrame(rows)


def largest_differences(engines: Mapping[str, Engine], images: Sequence[np.ndarray], reference: str) -> pd.DataFrame:
    """The largest absolute difference of raw outputs from the reference's, over all images uint8 `[H, W, C]`.

    Returns:
        One row per format except the reference, one column per output.
    """
    largest: dict[str, dict[str, float]] = {name: {} for name in engines if name != reference}
    for image in images:
        expected = engines[reference](image[None])
        for name, differences in largest.items():
            actual = engines[name](image[None])
            for output, values in expected.items():
                difference = float(np.abs(actual[output] - values).max())
                differences[output] = max(differences.get(output, 0.0), difference)
    return pd.DataFrame.from_dict(largest, orient="index").rename_axis("format")


def time_frames(engines: Mapping[str, Engine], frames: Sequence[np.ndarray], rounds: int = ROUNDS) -> pd.DataFrame:
    """Time every engine on a clip, one frame at a time, in turns.

    Args:
        engines: by name; the first is the reference for the others.
        frames: uint8 `[H, W, C]` each.
        rounds: how often each plays the clip.

    Returns:
        One row per engine: `clip, s`, the median of the rounds; `frame, ms`, the median of all frames; `of NAME`, that
        as a share of the first engine's.
    """
    for engine in engines.values():
        engine(frames[0][None])  # first calls compile and allocate
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            engine(frames[0][None])  # the engine before may still occupy a core for a moment
            seconds[name].append([_seconds(engine, frame[None]) for frame in frames])
    clip = {name: statistics.median(sum(times) for times in turns) for name, turns in seconds.items()}
    frame = {name: statistics.median(time for times in turns for time in times) for name, turns in seconds.items()}
    table = pd.DataFrame({"clip, s": clip, "frame, ms": {name: 1000 * value for name, value in frame.items()}})
    first = next(iter(engines))
    table[f"of {first}"] = table["frame, ms"] / table.loc[first, "frame, ms"]
    return table.rename_axis("format")


def time_parallel(bundles: Mapping[str, Bundle], frames: Sequence[np.ndarray], threads: int) -> pd.Series:
    """Milliseconds per frame of each bundle when frames may come back in any order."""
    seconds = {name: run_parallel(bundle, frames, threads) for name, bundle in bundles.items()}
    return 1000 * pd.Series(seconds, name="frame in throughput mode, ms") / len(frames)


def matrix_product_rate(threads: int, side: int = 2048) -> float:
    """Floating-point operations per second of a product of float32 matrices, which a CPU can hardly exceed in 32 bits.

    A multiplication and an addition are two operations, as in a manifest's `flops`.

    Args:
        threads: of PyTorch, which computes the product.
        side: of the square matrices.
    """
    import torch

    torch.set_num_threads(threads)
    matrix = torch.ones(side, side)
    torch.mm(matrix, matrix)  # the first call allocates
    return 2 * side**3 / statistics.median(_seconds(lambda _: torch.mm(matrix, matrix), matrix) for _ in range(9))


def ratio_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Time per frame as a share of PyTorch's, one column per network; tables of `time_frames` by the network's name."""
    ratios = pd.DataFrame({name: table.iloc[:, -1].map("{:.2f}".format) for name, table in tables.items()})
    ratios = ratios.reindex(next(iter(tables.values())).index.union([], sort=False)).fillna("not measured")
    ratios.loc["published, OpenVINO"] = "{:.2f} to {:.2f}".format(*PUBLISHED)
    return ratios


def read_frames(video: Path, spec: InputSpec) -> list[np.ndarray]:
    """Read a video file with OpenCV: its frames prepared for a network, uint8 `[height, width, channels]`.

    Raises:
        DataError: OpenCV cannot read it.
    """
    capture, frames = cv2.VideoCapture(str(video)), []
    while (read := capture.read())[0]:
        frames.append(fit(read[1], spec))
    capture.release()
    if not frames:
        raise DataError(f"OpenCV reads no frames from {video}; is it a video file?")
    return frames


def _predict_all(engine: Engine, images: np.ndarray) -> tuple[np.ndarray, float]:
    engine(images[:BATCH])  # first calls compile and allocate
    start = time.perf_counter()
    outputs = [next(iter(engine(images[i : i + BATCH]).values())) for i in range(0, len(images), BATCH)]
    return np.concatenate(outputs), time.perf_counter() - start


def _latency(engine: Engine, image: np.ndarray) -> float:
    return statistics.median(_seconds(engine, image) for _ in range(LATENCY_CALLS))


def _seconds(engine: Callable[[Any], Any], images: Any) -> float:
    start = time.perf_counter()
    engine(images)
    return time.perf_counter() - start
