"""PyTorch checkpoint -> ONNX -> simplified ONNX -> OpenVINO -> model bundle.

The graph that ends in a bundle takes uint8 images and normalises them itself, so that a quarter of the bytes of
float32 goes into it, and no caller can normalise them differently.
"""

import contextlib
import hashlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.architectures import Architecture, get_architecture
from helpers.bundle import Bundle, Manifest, OutputSpec, save_bundle
from helpers.config import Config
from helpers.errors import BundleError, first_line
from helpers.storage import Storage

if TYPE_CHECKING:
    import onnx
    import openvino as ov
    import torch

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "int8")
OPSET = 18
CALIBRATION_IMAGES = 300


def load_network(architecture: Architecture, checkpoint: Path) -> "torch.nn.Module":
    """Build a network in evaluation mode with a checkpoint's weights.

    Raises:
        BundleError: the file is missing or damaged, or its weights are of another network; names the first that
            differs.
    """
    import torch

    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BundleError(f"{checkpoint}: no such checkpoint; notebook 01 makes one, or name your own") from None
    except Exception as error:  # for bytes that are no checkpoint, torch raises whatever its parsers come across
        raise BundleError(f"{checkpoint} is no PyTorch checkpoint or is damaged: {first_line(error)}") from None
    if not isinstance(weights, dict):
        raise BundleError(f"{checkpoint} holds a {type(weights).__name__}, not a state dictionary")
    weights = architecture.mend(weights)
    network = architecture.build()
    _check_weights(network.state_dict(), weights, checkpoint, architecture.name)
    network.load_state_dict(weights)
    return network.eval()


def to_onnx(network: "torch.nn.Module", architecture: Architecture, opset: int = OPSET) -> "onnx.ModelProto":
    """Export a network with a dynamic batch dimension; the input is normalised float32 `[B, C, H, W]`."""
    import torch

    height, width, channels = architecture.input.shape
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    with _quiet():
        program = torch.onnx.export(
            architecture.heads(network).eval(),
            (torch.zeros(2, channels, height, width),),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(architecture.outputs),
            dynamic_shapes=(batch,),
            verbose=False,
        )
    assert program is not None  # it is None only for the old exporter
    return program.model_proto


def simplify(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Fold constants and remove what computes nothing.

    Raises:
        BundleError: the simplified graph does not give the same outputs on random input.
    """
    import onnxsim

    simplified, same = onnxsim.simplify(model)
    if not same:
        raise BundleError("the simplified ONNX graph gives other outputs than the original")
    return simplified


def to_openvino(model: "onnx.ModelProto", architecture: Architecture) -> "ov.Model":
    """Convert to OpenVINO with uint8 `[B, H, W, C]` input and the normalisation in the graph."""
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    spec = architecture.input
    graph = PrePostProcessor(ov.convert_model(io.BytesIO(model.SerializeToString())))
    images = graph.input()
    images.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_shape([-1, *spec.shape])
    images.preprocess().convert_element_type(ov.Type.f32).mean(list(spec.mean)).scale(list(spec.std))
    images.model().set_layout(ov.Layout("NCHW"))
    converted = graph.build()
    for output, name in zip(converted.outputs, architecture.outputs, strict=True):
        output.set_names({name})
    return converted


def quantize(model: "ov.Model", images: Iterable[np.ndarray]) -> "ov.Model":
    """Quantise weights and activations to 8 bits with NNCF.

    Args:
        model: from `to_openvino`.
        images: calibration images, uint8 `[H, W, C]` each, prepared as the pipeline prepares them.

    Raises:
        BundleError: there are no images.
    """
    import nncf

    batches = [image[None] for image in images]
    if not batches:
        raise BundleError("int8 needs images to calibrate with; name a folder of them with --calibration")
    with _quiet():
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))


def export(
    architecture_name: str,
    checkpoint: Path,
    target: Storage,
    precision: str = "fp32",
    calibration: Iterable[np.ndarray] = (),
) -> Bundle:
    """Convert a checkpoint to a model bundle, every step in one call.

    Args:
        architecture_name: see `helpers.architectures`.
        checkpoint: a PyTorch state dictionary.
        target: where the bundle goes.
        precision: of the weights: `fp32`, `fp16` or `int8`.
        calibration: for int8, see `quantize`.

    Raises:
        BundleError: the checkpoint, the precision or the calibration cannot be used.
    """
    architecture = get_architecture(architecture_name)
    network = load_network(architecture, checkpoint)
    model = to_openvino(simplify(to_onnx(network, architecture)), architecture)
    return make_bundle(model, architecture, checkpoint, target, precision, calibration)


def make_bundle(
    model: "ov.Model",
    architecture: Architecture,
    checkpoint: Path,
    target: Storage,
    precision: str,
    calibration: Iterable[np.ndarray] = (),
) -> Bundle:
    """Save a converted model as a bundle of one precision; arguments as for `export`."""
    if precision not in PRECISIONS:
        raise BundleError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if precision == "int8":
        model = quantize(model, calibration)
    manifest = Manifest(
        name=f"{architecture.name}-{precision}",
        architecture=architecture.name,
        task=architecture.task,
        input=architecture.input,
        outputs=tuple(
            OutputSpec(name, tuple(d.get_length() for d in list(output.get_partial_shape())[1:]))
            for name, output in zip(architecture.outputs, model.outputs, strict=True)
        ),
        labels=architecture.labels,
        postprocess=architecture.postprocess,
        precision=precision,
        arithmetic="f32",  # 8-bit layers stay 8-bit; what is left in floating point is computed as it was checked
        flops=count_flops(model),
        checkpoint={"file": checkpoint.name, "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()},
    )
    arrays = {name: _npy(array) for name, array in architecture.arrays().items()}
    return save_bundle(target, manifest, {**_serialize(model, precision == "fp16"), **arrays})


def count_flops(model: "ov.Model") -> int:
    """Floating-point operations of the convolutions and matrix products for one image; all else is small."""
    total = 0
    for node in model.get_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            results = [d.get_length() for d in node.output(0).get_partial_shape() if d.is_static]
            weights = [d.get_length() for d in node.input(1).get_partial_shape() if d.is_static]
            # Products for each result: all of the weights' dimensions but that of the output channels.
            channels = {"Convolution": 1, "GroupConvolution": 2}.get(node.get_type_name())
            depth = np.prod(weights[channels:]) if channels else np.prod(weights) // results[-1]
            total += int(2 * np.prod(results) * depth)
    return total


def calibration_images(storage: Storage, architecture: Architecture, config: Config) -> Iterator[np.ndarray]:
    """Evenly spread images below a location, prepared as the pipeline prepares them; unreadable ones are left out."""
    from helpers.images import UnreadableImageError, load
    from helpers.ingest import list_images

    paths = sorted(list_images(storage, config).images["path"].to_pylist())
    for path in paths[:: max(1, len(paths) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]:
        try:
            yield load(storage.read(path), architecture.input, config.ingest.max_pixels)[0]
        except (OSError, UnreadableImageError) as error:
            log.warning("%s is not used for calibration: %s", path, error)


def _serialize(model: "ov.Model", compress_to_fp16: bool) -> dict[str, bytes]:
    import openvino as ov

    # Names that OpenVINO made up count on through a process; by position they are the same in each export.
    for position, node in enumerate(model.get_ordered_ops()):
        if re.search(r"_\d+$", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{position}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        ov.save_model(model, path, compress_to_fp16=compress_to_fp16)
        return {name: Path(folder, name).read_bytes() for name in ("model.xml", "model.bin")}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else f"a {type(value).__name__}"


def _check_weights(expected: dict, found: dict, checkpoint: Path, name: str) -> None:
    for key in [*expected, *found]:
        have = _shape(found[key]) if key in found else "missing"
        want = _shape(expected[key]) if key in expected else "unknown"
        if have != want:
            raise BundleError(f"{checkpoint} is not a checkpoint of {name}: {key} is {have}, expected {want}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' progress and notices out of notebooks and logs; errors are exceptions."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
