"""PyTorch checkpoint -> ONNX -> simplified ONNX -> OpenVINO -> model bundle.

The graph that ends in a bundle takes uint8 images and normalizes them itself, so that a quarter of the bytes of
float32 goes into it, and no caller can normalize them differently.
"""

import hashlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.bundle.manifest import Bundle, Manifest, OutputSpec, save_bundle
from helpers.bundle.runtime import has_bf16
from helpers.config import Config
from helpers.errors import BundleError
from helpers.export.architectures import Architecture, get_architecture
from helpers.export.graph import count_flops, name_by_module
from helpers.export.quantization import Validation, quantize, quiet
from helpers.storage import Storage

if TYPE_CHECKING:
    import onnx
    import openvino as ov
    import torch

log = logging.getLogger(__name__)

ARITHMETIC = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}  # what is not 8-bit, as it was checked
PRECISIONS = tuple(ARITHMETIC)
OPSET, OLDEST_OPSET, NEWEST_OPSET = 18, 11, 23  # before 11, bilinear enlargement cannot be expressed
CALIBRATION_IMAGES = 300


def load_network(architecture: Architecture, checkpoint: Path) -> "torch.nn.Module":
    """Build a network in evaluation mode with a checkpoint's weights.

    Raises:
        BundleError: the file is missing or damaged, or its weights are of another network; names the first that
            differs.
    """
    from helpers.export.weights import find_difference, read_weights

    weights = read_weights(architecture, checkpoint, str(checkpoint))
    network = architecture.build()
    difference = find_difference(network.state_dict(), weights)
    if difference:
        # Of a YOLACT's layers these first show another number of classes.
        remedy = "; keep the result.json of its training beside it" if "conf_layer" in difference else ""
        raise BundleError(f"{checkpoint} is not a checkpoint of {architecture.name}: {difference}{remedy}")
    network.load_state_dict(weights)
    return network.eval()


def to_onnx(network: "torch.nn.Module", architecture: Architecture, opset: int = OPSET) -> "onnx.ModelProto":
    """Export a network with a dynamic batch dimension; the input is normalized float32 `[B, C, H, W]`.

    Nodes are named after the modules they come from.

    Args:
        network: in evaluation mode.
        architecture: of the network.
        opset: version of ONNX's operators, from `OLDEST_OPSET`; engines of years ago know the older ones only.

    Raises:
        BundleError: PyTorch cannot export that opset.
    """
    import onnx
    import torch

    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise BundleError(f"opset {opset} cannot be exported; choose one from {OLDEST_OPSET} to {NEWEST_OPSET}")
    module = architecture.export_module(network).eval()
    height, width, channels = architecture.input.shape
    images = torch.zeros(2, channels, height, width)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": list(architecture.outputs), "verbose": False}
    with quiet():
        # PyTorch's newer exporter knows no opset before 18, and would give that one without a word.
        if opset < 18:
            axes = {name: {0: "batch"} for name in ("images", *architecture.outputs)}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.onnx")
                torch.onnx.export(
                    module, (images,), path, dynamo=False, opset_version=opset, dynamic_axes=axes, **names
                )
                return onnx.load(path)
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        program = torch.onnx.export(module, (images,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, **names)
    assert program is not None  # it is None only for the old exporter
    model = program.model_proto  # each access makes another
    name_by_module(model)
    return model


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
    """Convert to OpenVINO with uint8 `[B, H, W, C]` input and the normalization in the graph."""
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


def export(
    architecture_name: str,
    checkpoint: Path,
    target: Storage,
    precision: str = "fp32",
    calibration: Iterable[np.ndarray] = (),
    opset: int = OPSET,
    onnx_file: Path | None = None,
) -> Bundle:
    """Convert a checkpoint to a model bundle, every step in one call.

    A network that was trained on a user's own classes has them from `result.json`, which training leaves beside the
    checkpoint.

    Args:
        architecture_name: see `helpers.export.architectures`.
        checkpoint: a PyTorch state dictionary.
        target: where the bundle goes.
        precision: `fp32`, `fp16` and `int8` are of the weights; `bf16` is half-precision weights and bfloat16
            arithmetic.
        calibration: images for int8, see `helpers.export.quantization.quantize`.
        opset: of the ONNX graph in between, see `to_onnx`.
        onnx_file: where to leave that graph, simplified.

    Raises:
        BundleError: the checkpoint, the precision, the opset or the calibration cannot be used.
    """
    architecture = get_architecture(architecture_name, _labels_beside(checkpoint))
    network = load_network(architecture, checkpoint)
    simplified = simplify(to_onnx(network, architecture, opset))
    if onnx_file:
        onnx_file.write_bytes(simplified.SerializeToString())
    return make_bundle(to_openvino(simplified, architecture), architecture, checkpoint, target, precision, calibration)


def make_bundle(
    model: "ov.Model",
    architecture: Architecture,
    checkpoint: Path,
    target: Storage,
    precision: str,
    calibration: Iterable[np.ndarray] = (),
    validation: Validation | None = None,
) -> Bundle:
    """Save a converted model as a bundle of one precision; arguments as for `export` and `quantization.quantize`."""
    if precision not in PRECISIONS:
        raise BundleError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    _check_labels(model, architecture)
    arrays = architecture.arrays()
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
        arithmetic=ARITHMETIC[precision],
        flops=count_flops(model),
        checkpoint={"file": checkpoint.name, "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()},
    )
    if precision == "int8":
        model, record = quantize(model, calibration, manifest, arrays, validation)
        manifest = replace(manifest, quantization=record.to_dict())
    if precision == "bf16" and not has_bf16():
        log.warning("this CPU has no bfloat16 units, so it will compute %s in 32 bits", manifest.name)
    files = {name: _npy(array) for name, array in arrays.items()}
    return save_bundle(target, manifest, {**_serialize(model, precision in ("fp16", "bf16")), **files})


def calibration_images(storage: Storage, architecture: Architecture, config: Config) -> Iterator[np.ndarray]:
    """Evenly spread images below a location, prepared as the pipeline prepares them; unreadable ones are left out."""
    from helpers.images.boundary import attempt
    from helpers.images.decoding import load
    from helpers.pipeline.listing import list_images

    def prepare(path: str) -> np.ndarray:
        content = storage.read(path, config.max_image_bytes)
        return load(content, architecture.input, config.ingest.max_pixels)[0]

    images = list_images(storage, config).images
    paths = sorted(images.filter(images["error"].is_null())["path"].to_pylist())
    for path in paths[:: max(1, len(paths) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]:
        image, error = attempt(prepare, path)
        if image is None:
            log.warning("%s is not used for calibration: %s", path, error)
        else:
            yield image


def _check_labels(model: "ov.Model", architecture: Architecture) -> None:
    if architecture.task != "classification":
        return
    (output,) = model.outputs
    width = output.get_partial_shape()[1].get_length()
    if width != len(architecture.labels):
        raise BundleError(
            f"{architecture.name} has {len(architecture.labels)} labels, and its network tells {width} classes apart: "
            "correct the labels of its card"
        )


def _labels_beside(checkpoint: Path) -> list[str]:
    """The classes that training left with its checkpoint; none where it is not a training's, or has no classes."""
    result = checkpoint.with_name("result.json")
    try:
        return json.loads(result.read_text(encoding="utf-8")).get("labels", []) if result.exists() else []
    except (ValueError, AttributeError):
        raise BundleError(f"{result} is not what a training leaves: take the checkpoint away from it") from None


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
