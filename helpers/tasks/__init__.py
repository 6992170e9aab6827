"""From a network's outputs to predictions: a module per task, and a line in `TASKS`. Executors import this package."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.errors import BundleError, ConfigError
from helpers.tasks import classification, instance_segmentation
from helpers.tasks.interface import NO_ARRAYS, Arrays, Prediction, Task

__all__ = ["NO_ARRAYS", "TASKS", "Arrays", "Prediction", "Task", "get_arrays", "parameters_for"]

TASKS: dict[str, Task] = {
    "classification": classification.TASK,
    "instance_segmentation": instance_segmentation.TASK,
}

_arrays: dict[str, Arrays] = {}


def parameters_for(manifest: Manifest, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle's post-processing parameters with a run's own on top.

    Raises:
        ConfigError: the task has no post-processing here, or it has no parameter of that name or value.
        BundleError: the bundle's own parameters, or its outputs, are not those of the task.
    """
    if manifest.task not in TASKS:
        raise ConfigError(f"{manifest.name} has task {manifest.task!r}; post-processing exists for {', '.join(TASKS)}")
    _check_outputs(manifest)
    unknown = sorted(set(overrides) - set(manifest.postprocess))
    if unknown:
        known = ", ".join(sorted(manifest.postprocess))
        raise ConfigError(f"postprocess.{unknown[0]}: {manifest.name} has no such parameter; it has {known}")
    parameters = {**manifest.postprocess, **overrides}
    try:
        TASKS[manifest.task].check_parameters(**parameters)
    except TypeError as error:
        raise BundleError(f"{manifest.name}: its post-processing is not as it should be: {error}") from None
    return parameters


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
    expected = TASKS[manifest.task].expected_shapes(shapes, len(manifest.labels))
    for name in sorted({*expected, *shapes}):
        if shapes.get(name) != expected.get(name):
            raise BundleError(
                f"{manifest.name}: its output {name} is {shapes.get(name)}, and {len(manifest.labels)} labels of task "
                f"{manifest.task} need {expected.get(name)}; export the bundle again"
            )
