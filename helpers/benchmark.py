"""One model in several formats side by side: accuracy, difference of the outputs, file size, latency, throughput.

Each format runs with one thread, as in a Spark task, and gets the same uint8 images.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers.bundle import Bundle, InputSpec
from helpers.inference import get_model

if TYPE_CHECKING:
    import torch

Predict = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, C] -> float32 [B, classes]

BATCH = 64
LATENCY_CALLS = 200


def torch_predict(network: "torch.nn.Module", spec: InputSpec) -> Predict:
    """The original network in eager mode."""
    import torch

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(_normalise(images, spec))).numpy()

    torch.set_num_threads(1)
    return predict


def onnx_predict(path: Path, spec: InputSpec) -> Predict:
    """An ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": _normalise(images, spec)})[0]


def bundle_predict(bundle: Bundle) -> Predict:
    """A model bundle in OpenVINO, as a task runs it."""
    model, (output,) = get_model(bundle), [output.name for output in bundle.manifest.outputs]

    def predict(images: np.ndarray) -> np.ndarray:
        ((_, outputs),) = model.infer([(None, images)])
        return outputs[output]

    return predict


def compare(
    formats: dict[str, tuple[Predict, int]], images: np.ndarray, labels: np.ndarray, reference: str
) -> pd.DataFrame:
    """Measure every format on the same images.

    Args:
        formats: by name, how it predicts and its size in bytes.
        images: uint8 `[N, H, W, C]`.
        labels: int `[N]`.
        reference: the format whose outputs the others' are compared with.

    Returns:
        One row a format: accuracy (a share of 1), largest difference of an output, size (KiB), latency of one image
        (median, ms), throughput in batches of 64 (images/s).
    """
    expected = _predict_all(formats[reference][0], images)[0]
    rows = []
    for name, (predict, size) in formats.items():
        outputs, seconds = _predict_all(predict, images)
        rows.append(
            {
                "format": name,
                "accuracy": float((outputs.argmax(axis=1) == labels).mean()),
                "largest difference": float(np.abs(outputs - expected).max()),
                "size, KiB": size / 1024,
                "latency, ms": _latency(predict, images[:1]) * 1000,
                "throughput, images/s": len(images) / seconds,
            }
        )
    return pd.DataFrame(rows)


def _predict_all(predict: Predict, images: np.ndarray) -> tuple[np.ndarray, float]:
    predict(images[:BATCH])  # first calls compile and allocate
    start = time.perf_counter()
    outputs = np.concatenate([predict(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])
    return outputs, time.perf_counter() - start


def _latency(predict: Predict, image: np.ndarray) -> float:
    seconds = []
    for _ in range(LATENCY_CALLS):
        start = time.perf_counter()
        predict(image)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _normalise(images: np.ndarray, spec: InputSpec) -> np.ndarray:
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((images.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))
