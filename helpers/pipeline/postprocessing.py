"""From a model's outputs to predictions: one function a task, registered in `POSTPROCESSORS`.

A function takes the outputs of a batch, the images' sizes, the manifest, the parameters and the bundle's arrays, and
returns for each image a list of predictions as the results' schema has them. A new task is one more such function.
Executors import this module; it needs numpy only.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from helpers.bundle.manifest import Manifest
from helpers.errors import BundleError, ConfigError
from helpers.images.boundary import attempt
from helpers.pipeline.schemas import PREDICTIONS, RESULT_SCHEMA, Batches, extend
from helpers.yolact.detection import Parameters, find_instances

Prediction = dict[str, Any]
Sizes = Sequence[tuple[int, int]]  # width, height of each original image, in pixels
Arrays = Mapping[str, np.ndarray]
Postprocessor = Callable[[Arrays, Sizes, Manifest, Mapping[str, Any], Arrays], list[list[Prediction]]]

NO_ARRAYS: Arrays = {}
HEADS = ("loc", "conf", "mask", "proto")  # YOLACT's outputs

_arrays: dict[str, Arrays] = {}


def classification(
    outputs: Arrays, sizes: Sizes, manifest: Manifest, parameters: Mapping[str, Any], arrays: Arrays = NO_ARRAYS
) -> list[list[Prediction]]:
    """Return the `top_k` classes of each image with their softmax probabilities, the most probable first.

    Args:
        outputs: one float32 array `[B, classes]` of logits.
        sizes: not used; a class belongs to the whole image.
        manifest: for the labels.
        parameters: `top_k`.
        arrays: not used.
    """
    (logits,) = outputs.values()
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : parameters["top_k"]]
    return [
        [
            {
                "class_id": int(c),
                "label": manifest.labels[c],
                "score": float(row[c]),
                "box": None,
                "mask": None,
            }
            for c in classes
        ]
        for row, classes in zip(scores, best, strict=True)
    ]


def instance_segmentation(
    outputs: Arrays, sizes: Sizes, manifest: Manifest, parameters: Mapping[str, Any], arrays: Arrays = NO_ARRAYS
) -> list[list[Prediction]]:
    """Return the detections of each image with box and mask, the most probable first.

    Args:
        outputs: YOLACT's raw heads: `loc [B, A, 4]`, `conf [B, A, classes]`, `mask [B, A, P]`, `proto [B, H, W, P]`.
        sizes: of the images; boxes are in their pixels and masks of their size.
        manifest: for the labels and the input's size.
        parameters: as `helpers.yolact.detection.Parameters` has them.
        arrays: `priors.npy`, float32 `[A, 4]`.

    Raises:
        BundleError: the bundle has no anchors.
    """
    if "priors.npy" not in arrays:
        raise BundleError(f"{manifest.name} has no priors.npy, the anchors of its boxes; export the bundle again")
    priors, settings = arrays["priors.npy"], Parameters(**parameters)
    if priors.shape != outputs["loc"].shape[1:]:
        raise BundleError(f"{manifest.name}: priors.npy is {priors.shape}, and not as its output loc; export it again")
    return [
        find_instances(heads, priors, settings, manifest.input.width, size, manifest.labels)
        for *heads, size in zip(*(outputs[name] for name in HEADS), sizes, strict=True)
    ]


POSTPROCESSORS: dict[str, Postprocessor] = {
    "classification": classification,
    "instance_segmentation": instance_segmentation,
}


def _check_top_k(top_k: Any = None, **_: Any) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError("postprocess.top_k is not a whole number of 1 or more")


_CHECKS: dict[str, Callable[..., Any]] = {"classification": _check_top_k, "instance_segmentation": Parameters}


def get_arrays(manifest: Manifest, read: Callable[[str], bytes] | None) -> Arrays:
    """Return the arrays that a bundle has beside its graph, by file name, reading them the first time only.

    Args:
        manifest: which bundle, and which files it has.
        read: reads one of them, as `Bundle.read` does; None where they are not needed.
    """
    if read is None:
        return NO_ARRAYS
    if manifest.model not in _arrays:
        names = [name for name in manifest.files if name.endswith(".npy")]
        _arrays[manifest.model] = {name: _load_array(name, read(name), manifest) for name in names}
    return _arrays[manifest.model]


def _load_array(name: str, content: bytes, manifest: Manifest) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises whatever a header leads to, a MemoryError too
        raise BundleError(f"{manifest.name}: {name} is no array ({type(error).__name__}); export it again") from None
    if not isinstance(array, np.ndarray):
        raise BundleError(f"{manifest.name}: {name} is an archive, not an array; export it again")
    return array


def _check_outputs(manifest: Manifest) -> None:
    """Compare a task's outputs with its labels and with each other; raises BundleError at the first difference."""
    shapes = {output.name: output.shape for output in manifest.outputs}
    expected: dict[str, tuple[int, ...]]
    if manifest.task == "classification":
        expected = {name: (len(manifest.labels),) for name in list(shapes)[:1]}
    else:
        anchors, prototypes = shapes.get("mask", (0, 0))[:1], shapes.get("mask", (0, 0))[1:]
        expected = {"loc": (*anchors, 4), "conf": (*anchors, len(manifest.labels) + 1), "mask": (*anchors, *prototypes)}
        expected["proto"] = (*shapes.get("proto", (0, 0))[:2], *prototypes)
    for name in sorted({*expected, *shapes}):
        if shapes.get(name) != expected.get(name):
            raise BundleError(
                f"{manifest.name}: its output {name} is {shapes.get(name)}, and {len(manifest.labels)} labels of task "
                f"{manifest.task} need {expected.get(name)}; export the bundle again"
            )


def parameters_for(manifest: Manifest, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's post-processing parameters with a run's own on top.

    Raises:
        ConfigError: the task has no post-processing here, or it has no parameter of that name or value.
        BundleError: the bundle's own parameters, or its outputs, are not those of the task.
    """
    if manifest.task not in POSTPROCESSORS:
        raise ConfigError(
            f"{manifest.name} has task {manifest.task!r}; post-processing exists for {', '.join(POSTPROCESSORS)}"
        )
    _check_outputs(manifest)
    unknown = sorted(set(overrides) - set(manifest.postprocess))
    if unknown:
        known = ", ".join(sorted(manifest.postprocess))
        raise ConfigError(f"postprocess.{unknown[0]}: {manifest.name} has no such parameter; it has {known}")
    parameters = {**manifest.postprocess, **overrides}
    if manifest.task in _CHECKS:
        try:
            _CHECKS[manifest.task](**parameters)
        except TypeError as error:
            raise BundleError(f"{manifest.name}: its post-processing is not as it should be: {error}") from None
    return parameters


def postprocess(
    batches: Batches,
    manifest: Manifest,
    parameters: Mapping[str, Any],
    model: str,
    read: Callable[[str], bytes] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Stage 4: raw outputs to predictions.

    Args:
        batches: `output_schema(manifest)`.
        manifest: task, outputs and labels.
        parameters: of the task's post-processing.
        model: what the results' `model` column says.
        read: reads a file of the bundle, for tasks that need more than the graph's outputs (`Bundle.read`).

    Yields:
        `RESULT_SCHEMA`; `predictions` is null where `error` is set. What goes wrong with one image is its own error.
    """
    arrays = get_arrays(manifest, read)

    def predict(good: pa.RecordBatch) -> pa.Array:
        outputs = {o.name: _array(good[o.name], o.shape) for o in manifest.outputs}
        sizes = list(zip(good["width"].to_pylist(), good["height"].to_pylist(), strict=True))
        predictions = POSTPROCESSORS[manifest.task](outputs, sizes, manifest, parameters, arrays)
        return pa.array(predictions, PREDICTIONS)

    for batch in batches:
        predictions, errors = _each(predict, batch)
        yield extend(batch, RESULT_SCHEMA, predictions=predictions, error=errors, model=[model] * batch.num_rows)


def _each(predict: Callable[[pa.RecordBatch], pa.Array], batch: pa.RecordBatch) -> tuple[pa.Array, list[str | None]]:
    """Predictions of a batch, all together, or one by one where that fails, and the errors; null where there is one."""
    errors, good = batch["error"].to_pylist(), batch["error"].is_null()
    rows = np.flatnonzero(good)
    if not len(rows):
        return pa.nulls(len(errors), PREDICTIONS), errors
    if len(rows) < len(errors):  # filtering copies, and raw outputs can be large
        batch = batch.filter(good)
    predictions, _ = attempt(predict, batch)
    if predictions is not None and len(predictions) == len(errors):
        return predictions, errors
    if predictions is None:
        alone = [attempt(predict, batch.slice(place, 1)) for place in range(len(rows))]
        for row, (_, error) in zip(rows, alone, strict=True):
            errors[row] = error
        predictions = pa.concat_arrays([pa.array([], PREDICTIONS), *(one for one, _ in alone if one is not None)])
    places = accumulate((error is None for error in errors), initial=0)
    taken = [place if error is None else None for error, place in zip(errors, places, strict=False)]
    return predictions.take(pa.array(taken, pa.int64())), errors


def _array(column: pa.ListArray, shape: tuple[int, ...]) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)
