"""From a network's outputs to predictions: a module per task, and a decoder per way to read outputs.

Executors import this package.
"""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.errors import BundleError, ConfigError
from helpers.tasks import classification, detection, embedding, instance_segmentation, keypoints, semantic_segmentation
from helpers.tasks.filters import Filters
from helpers.tasks.interface import NO_ARRAYS, AmbiguityError, Arrays, OutputError, Sizes
from helpers.tasks.interface import Prediction as Prediction
from helpers.tasks.roles import Decoder

# By task and name; the first of a task is its default, which bundles of an empty `decoder` mean.
DECODERS: dict[str, dict[str, Decoder]] = {
    "classification": classification.DECODERS,
    "embedding": embedding.DECODERS,
    "detection": detection.DECODERS,
    "instance_segmentation": instance_segmentation.DECODERS,
    "semantic_segmentation": semantic_segmentation.DECODERS,
    "keypoints": keypoints.DECODERS,
}
# Predictions of other tasks have a place in the image.
FILTERS = {"embedding": (), "classification": ("classes", "min_score")}
NOT_CLASSES = (0, 1, 4, 5)  # numbers beside those of the classes: a background's, a box's, its objectness
ALL_FILTERS = tuple(field.name for field in fields(Filters))

_arrays: dict[str, Arrays] = {}


def get_decoder(manifest: Manifest) -> Decoder:
    """The decoder of a bundle; raises ConfigError if there is no such task, or it has no such decoder."""
    if manifest.task not in DECODERS:
        known = ", ".join(DECODERS)
        raise ConfigError(f"{manifest.name} has task {manifest.task!r}; post-processing exists for {known}")
    decoders = DECODERS[manifest.task]
    if manifest.decoder and manifest.decoder not in decoders:
        known = ", ".join(decoders)
        raise ConfigError(f"{manifest.name} has decoder {manifest.decoder!r}; task {manifest.task} has {known}")
    return decoders[manifest.decoder or next(iter(decoders))]


def parameters_for(manifest: Manifest, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's post-processing parameters with a run's own on top; what neither says has its default.

    Raises ConfigError if the task has no post-processing here, or no parameter of that name or value, and BundleError
    if the bundle's own parameters, or its outputs, are not those of the decoder.
    """
    decoder = get_decoder(manifest)
    try:
        decoder.check_shapes({output.name: output.shape for output in manifest.outputs}, len(manifest.labels))
    except OutputError as error:
        raise BundleError(f"{manifest.name}: {error}; export the bundle again") from None
    known = parameter_names(manifest)
    for name in sorted({*overrides} - {*known}):
        raise ConfigError(f"postprocess.{name}: {manifest.name} has no such parameter; it has {', '.join(known)}")
    for name in sorted({*manifest.postprocess} - {*known}):
        problem = f"its post-processing has the parameter {name[:40]!r}, and the decoder has {', '.join(known)}"
        raise BundleError(f"{manifest.name}: {problem}; export the bundle again")
    parameters = {**manifest.postprocess, **overrides}
    own, filters = _divide(parameters)
    decoder.parameters(**own)
    filters.numbers(manifest.labels)
    return parameters


def predict(
    outputs: Arrays, sizes: Sizes, manifest: Manifest, parameters: Mapping[str, Any], arrays: Arrays = NO_ARRAYS
) -> list[Any]:
    """Decode a network's outputs and keep what the filters let pass.

    Args:
        outputs: of a batch, float32 `[B, ...]`, by role.
        sizes: width and height of each original image, in pixels.
        manifest: task, decoder, input and labels.
        parameters: of the decoder, and filters, as `parameters_for` returns them.
        arrays: that the bundle has beside its graph, from `get_arrays`.

    Returns:
        For each image a list of predictions, as the results' schema has them; for an embedding its numbers.
    """
    own, filters = _divide(parameters)
    predictions = get_decoder(manifest).predict(outputs, sizes, manifest, own, arrays)
    if not _filters(manifest):
        return predictions
    return [filters.apply(one, size, manifest.labels) for one, size in zip(predictions, sizes, strict=True)]


def without_filters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own parameters: what is left where filters are for later."""
    return _divide(parameters)[0]


def apply_filters(predictions: Any, size: tuple[int, int], manifest: Manifest, parameters: Mapping[str, Any]) -> Any:
    """What `predict` returns for one image of a width and height, less what the filters do not let pass."""
    return _divide(parameters)[1].apply(predictions, size, manifest.labels) if _filters(manifest) else predictions


def parameter_names(manifest: Manifest) -> list[str]:
    """What can be set of a bundle's post-processing, the filters included, in alphabetical order."""
    return sorted([*(field.name for field in fields(get_decoder(manifest).parameters)), *_filters(manifest)])


def has_boxes(task: str) -> bool:
    """Whether predictions of a task have a place in the image."""
    return task not in FILTERS


def suggest(task: str, samples: Arrays, labels: int = 0, first: str = "") -> str:
    """The first decoder of a task that a network's outputs fit; one may be tried before the others.

    Samples are outputs of real images by name, float32 `[B, ...]`, and labels how many there are; 0 if nobody has said.
    Raises OutputError if they fit none; the message says what they would fit, or what to look at.
    """
    ambiguities = []
    for name, decoder in sorted(DECODERS[task].items(), key=lambda item: item[0] != first):
        try:
            decoder.assign_roles(samples, labels)
            return name
        except AmbiguityError as error:
            if name == first:
                raise
            shapes = {samples[output].shape[1:] for output in error.names}
            if not labels or len(shapes) == 1 or max(map(len, shapes)) == 1:  # others are one stride's, and a part
                ambiguities.append(f"of decoder {name}, {error}")
        except OutputError:
            continue
    given = ", ".join(f"{name} {list(values.shape[1:])}" for name, values in samples.items())
    if count := _count_labels(task, samples, labels):
        remedy = f"they fit {count} labels: correct these"
    elif other := _find_other(task, samples, labels):
        remedy = f"they fit {other}: correct the task"
    elif ambiguities:
        remedy = ambiguities[0]
    else:
        lists = ", those of several strides as a list" if "anchor_free" in DECODERS[task] else ""
        remedy = f"export the model with its post-processing in it, or name other `outputs`{lists}"
    problem = f"the outputs {given} fit no decoder of task {task}{f' for {labels} labels' if labels else ''}"
    raise OutputError(f"{problem}; {remedy}; conf/cards/README.md lists what decoders take")


def get_arrays(manifest: Manifest, read: Callable[[str], bytes] | None) -> Arrays:
    """Return the arrays that a bundle has beside its graph, by file name, reading them the first time only.

    `read` reads one of them, as `Bundle.read` does; it is None where they are not needed.
    """
    if read is None:
        return NO_ARRAYS
    if manifest.model not in _arrays:
        names = [name for name in manifest.files if name.endswith(".npy")]
        _arrays[manifest.model] = {name: _load_array(name, read(name), manifest) for name in names}
    return _arrays[manifest.model]


def _find_other(task: str, samples: Arrays, labels: int) -> str:
    """A decoder of another task that takes all outputs and as many labels; empty if there is none.

    Those of other tasks take outputs of too many shapes.
    """
    for other in ("detection", "instance_segmentation") if labels else ():
        if other == task:
            continue
        for name, roles in _fitting(other, samples, labels).items():
            if len(roles) == len(samples):
                return f"decoder {name} of task {other}"
    return ""


def _count_labels(task: str, samples: Arrays, labels: int) -> int:
    """The number of labels, nearest to that of the card, with which outputs fit a decoder; 0 if there is none."""
    sides = {side for values in samples.values() for side in values.shape[1:]}
    counts = {side - others for side in sides for others in NOT_CLASSES} if labels else set()
    if has_boxes(task) and task != "semantic_segmentation":
        # Tables of candidates are of any width, so that a number far away says nothing.
        counts = {count for count in counts if abs(count - labels) <= max(2, labels // 4)}
    fitting = [count for count in counts if count > 0 and _fitting(task, samples, count)]
    return min(fitting, key=lambda count: abs(count - labels), default=0)


def _fitting(task: str, samples: Arrays, labels: int) -> dict[str, dict[str, str]]:
    """The decoders of a task that outputs fit, and the name of each role's output."""
    fitting = {}
    for name, decoder in DECODERS[task].items():
        with contextlib.suppress(OutputError):
            fitting[name] = decoder.assign_roles(samples, labels)
    return fitting


def _filters(manifest: Manifest) -> tuple[str, ...]:
    return FILTERS.get(manifest.task, ALL_FILTERS)


def _divide(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], Filters]:
    """The decoder's parameters, and the filters."""
    own = {name: value for name, value in parameters.items() if name not in ALL_FILTERS}
    return own, Filters(**{name: value for name, value in parameters.items() if name in ALL_FILTERS})


def _load_array(name: str, content: bytes, manifest: Manifest) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy raises whatever a header leads to, a MemoryError too
        raise BundleError(f"{manifest.name}: {name} is no array ({type(error).__name__}); export it again") from None
    if not isinstance(array, np.ndarray):
        raise BundleError(f"{manifest.name}: {name} is an archive, not an array; export it again")
    return array
