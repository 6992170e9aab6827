"""What an export looks at before anything is written: how many images a graph takes, what it gives, how that looks."""

import contextlib
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice
from typing import TYPE_CHECKING

import cv2
import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.config import Config
from helpers.errors import BundleError
from helpers.export.evaluation import Engine, compiled_engine
from helpers.export.preparation import name_output, tell_reason
from helpers.export.quantization import compile_exactly
from helpers.images.boundary import attempt
from helpers.images.decoding import Image, decode, fit
from helpers.images.drawing import draw
from helpers.images.spec import InputSpec
from helpers.pipeline.listing import list_images
from helpers.storage import Storage
from helpers.tasks import Arrays, OutputError, get_decoder, parameters_for, predict

if TYPE_CHECKING:
    import openvino as ov

log = logging.getLogger(__name__)

PICTURES = 3
BATCH = 2  # pictures that are tried at a time; enough to see that all give the first one's outputs
TOLERANCE = 1e-2  # of the largest value of an output, between an image alone and in a batch
Outputs = Sequence[Arrays]  # of pictures one by one

SIDES = (480, 640)  # of a picture that stands in for a photograph
PREVIEW_HEIGHT = 360


@dataclass(frozen=True)
class Trial:
    """What a graph gave for pictures."""

    model: "ov.Model"
    pictures: Sequence[Image]  # that were tried, uint8 BGR `[height, width, 3]` each
    outputs: Outputs  # of each picture by name, float32 `[1, ...]`
    batch: int  # what a manifest's `batch` says, 0 or 1
    engine: Engine  # that gave them, for one image at a time; compiling the graph again would take seconds


@cache
def generate_pictures(count: int = PICTURES) -> list[Image]:
    """Pictures with gradients, shapes and noise, uint8 BGR `[480, 640, 3]` each, the same each time."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        picture = cv2.resize(random.integers(0, 256, (5, 7, 3), np.uint8), SIDES[::-1], interpolation=cv2.INTER_CUBIC)
        for _ in range(6):
            center, axes = random.integers(0, SIDES[::-1]).tolist(), random.integers(20, 150, 2).tolist()
            cv2.ellipse(picture, center, axes, 0, 0, 360, random.integers(0, 256, 3).tolist(), cv2.FILLED)
        pictures.append(cv2.add(picture, random.integers(0, 12, picture.shape, np.uint8)))
    return pictures


def load_pictures(storage: Storage, config: Config) -> Iterator[Image]:
    """Decode images of a folder, evenly spread, uint8 BGR `[height, width, 3]` each; see `load_images`."""
    return load_images(storage, config, PICTURES, lambda content: decode(content, config.ingest.max_pixels))


def load_images(
    storage: Storage, config: Config, count: int, prepare: Callable[[bytes], np.ndarray]
) -> Iterator[np.ndarray]:
    """Read images of a folder, evenly spread, and `prepare` each file's content; unreadable ones get a warning."""
    images = list_images(storage, config).images
    paths = sorted(images.filter(images["error"].is_null())["path"].to_pylist())
    for path in paths[:: max(1, len(paths) // count)][:count]:
        image, error = attempt(lambda p: prepare(storage.read(p, config.max_image_bytes)), path)
        if image is None:
            log.warning("%s is left out: %s", path, error)
        else:
            yield image


def try_graph(model: "ov.Model", spec: InputSpec, pictures: Sequence[Image], origin: str) -> Trial:
    """Try a graph, and let it take one image at a time where several do not give what each gives alone; in place.

    Some graphs take any number and return the first image's outputs only, because a reshape in them is for one. The
    graph is as `preparation.prepare` returns it, and errors name its origin. Raises BundleError if it fails, or its
    outputs are not finite.
    """
    try:
        engine = compile_graph(model, origin)
    except BundleError:
        # Some of OpenVINO's own steps fail on an open number of images only.
        model.reshape([1, *list(model.input().get_partial_shape())[1:]])
        engine = compile_graph(model, origin)
    tensors = [fit(picture, spec)[None] for picture in pictures]
    alone = [_infer(engine, tensor, origin) for tensor in tensors]
    for name, values in ((name, values) for outputs in alone for name, values in outputs.items()):
        if not np.isfinite(values).all():
            why = "the file is damaged, or mean and std of its card are not those it was trained with"
            raise BundleError(f"{origin} gives values in {name!r} that are not finite: {why}")
    takes_more = model.input().get_partial_shape()[0].is_dynamic
    shapes = [output.get_partial_shape() for output in model.outputs]
    # Open in the number of images only.
    is_fixed = all(s.rank.is_static and len(s) > 0 and all(side.is_static for side in list(s)[1:]) for s in shapes)
    if takes_more and is_fixed and _is_same_together(engine, tensors, alone):
        return Trial(model, pictures, alone, 0, engine)
    if takes_more:
        model.reshape([1, *list(model.input().get_partial_shape())[1:]])
    # What is not as long for every image counts detections, and pictures may all have one.
    blank = np.zeros_like(tensors[0])
    tried = alone
    with contextlib.suppress(BundleError):
        tried = [*alone, _infer(engine, blank, origin)]
    lacking = _add_batch(model, tried)
    outputs = [_with_batch(own, lacking) for own in alone]
    return Trial(model, pictures, outputs, 1, lambda image: _with_batch(engine(image), lacking))


def compile_graph(model: "ov.Model", origin: str) -> Engine:
    """Compile a graph for trials; raises BundleError, which names its origin, if OpenVINO cannot."""
    try:
        return compiled_engine(compile_exactly(model))
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot compile {origin}: {tell_reason(error)}") from None


def infer(engine: Engine, spec: InputSpec, pictures: Sequence[Image], origin: str) -> Outputs:
    """The outputs of each picture by name, float32 `[1, ...]`; arguments as for `try_graph`."""
    return [_infer(engine, fit(picture, spec)[None], origin) for picture in pictures]


def check_manifest(manifest: Manifest) -> None:
    """Raise BundleError or ConfigError unless outputs, labels and parameters are what the decoder takes."""
    shapes = {output.name: output.shape for output in manifest.outputs}
    try:
        get_decoder(manifest).check_shapes(shapes, len(manifest.labels))
    except OutputError as error:
        remedy = "correct the labels, decoder or outputs of its card"
        raise BundleError(f"{manifest.architecture}: {error}; {remedy}") from None
    parameters_for(replace(manifest, postprocess={}), manifest.postprocess)


def draw_preview(outputs: Outputs, manifest: Manifest, arrays: Arrays, pictures: Sequence[Image]) -> bytes:
    """Draw what is predicted in pictures side by side, as a PNG file.

    Raises BundleError if the outputs, by role for each picture, are not what the labels or the parameters say.
    """
    drawn = []
    for picture, own in zip(pictures, outputs, strict=True):
        size = picture.shape[1], picture.shape[0]
        try:
            (predictions,) = predict(own, [size], manifest, manifest.postprocess, arrays)
        except OutputError as error:
            raise BundleError(f"{manifest.architecture}: {error}") from None
        shown = draw(picture, predictions if manifest.task != "embedding" else [])
        width = max(1, round(PREVIEW_HEIGHT * shown.shape[1] / shown.shape[0]))
        drawn.append(cv2.resize(shown, (width, PREVIEW_HEIGHT), interpolation=cv2.INTER_AREA))
    return cv2.imencode(".png", cv2.hconcat(drawn))[1].tobytes()


def stack(outputs: Outputs) -> Arrays:
    """The outputs of all pictures as float32 `[B, ...]`, or where shapes differ, those of the picture that has most."""
    if len({tuple(values.shape for values in own.values()) for own in outputs}) == 1:
        return {name: np.concatenate([own[name] for own in outputs]) for name in outputs[0]}
    return max(outputs, key=lambda own: sum(values.size for values in own.values()))


def _infer(engine: Engine, tensor: np.ndarray, origin: str) -> Arrays:
    try:
        return engine(tensor)
    except RuntimeError as error:
        problem = f"{origin} fails on an image of {tensor.shape[1:]}: {tell_reason(error)}"
        raise BundleError(f"{problem}; correct the input of its card") from None


def _is_same_together(engine: Engine, tensors: Sequence[np.ndarray], alone: Outputs) -> bool:
    positions = list(islice(cycle(range(len(tensors))), BATCH))
    try:
        together = engine(np.concatenate([tensors[position] for position in positions]))
    except RuntimeError:
        return False
    for name, output in together.items():
        if any(outputs[name].shape[0] != 1 for outputs in alone):
            return False
        expected = np.concatenate([alone[position][name] for position in positions])
        if output.shape != expected.shape:
            return False
        # Sorted, because what is equally probable may come in another order.
        values, wanted = (np.sort(array.reshape(len(positions), -1), axis=1) for array in (output, expected))
        if np.abs(values - wanted).max(initial=0) > TOLERANCE * max(1.0, np.abs(wanted).max(initial=0)):
            return False
    return True


def _add_batch(model: "ov.Model", tried: Outputs) -> set[str]:
    """Let each output of a graph for one image begin with a dimension of 1, in place; `tried` shows which ones lack it.

    Returns their names.
    """
    from openvino import opset13 as ops

    lacking = {name for outputs in tried for name, values in outputs.items() if values.shape[:1] != (1,)}
    for output in model.outputs:
        name, port = output.get_any_name(), output.get_node().input_value(0)
        first = next(iter(port.get_partial_shape()), None) if port.get_partial_shape().rank.is_static else None
        if name not in lacking and first is not None and first.is_static:
            continue
        image = port if name in lacking else ops.squeeze(port, ops.constant([0])).output(0)
        port.set_names(set())
        output.get_node().input(0).replace_source_output(ops.unsqueeze(image, ops.constant([0])).output(0))
        name_output(output, name)
    model.validate_nodes_and_infer_types()
    return lacking


def _with_batch(outputs: Arrays, lacking: Container[str]) -> Arrays:
    return {name: values[None] if name in lacking else values for name, values in outputs.items()}
