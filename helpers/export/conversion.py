"""From a PyTorch checkpoint or a model's file to a model bundle.

A PyTorch network goes through ONNX to OpenVINO; files are read by `helpers.export.files`. Both end in `make_bundle`,
which looks at the graph before it writes anything.
"""

import hashlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from helpers.bundle.manifest import OPEN, Bundle, Manifest, OutputSpec, save_bundle
from helpers.bundle.runtime import has_bf16
from helpers.config import Config
from helpers.errors import BundleError
from helpers.export.architectures import Architecture, Converted, get_architecture
from helpers.export.checks import check_manifest, draw_preview, generate_pictures, infer, load_images, try_graph
from helpers.export.files import convert_file as convert_file
from helpers.export.graph import count_flops, name_by_module
from helpers.export.preparation import prepare
from helpers.export.quantization import Validation, quantize, quiet
from helpers.images.decoding import Image, load
from helpers.storage import Storage

if TYPE_CHECKING:
    import onnx
    import openvino as ov
    import torch

log = logging.getLogger(__name__)

# Of what is not 8-bit, as it was checked.
ARITHMETIC: dict[str, Literal["f32", "bf16"]] = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}
PRECISIONS = tuple(ARITHMETIC)
OPSET, OLDEST_OPSET, NEWEST_OPSET = 18, 11, 23  # before 11, bilinear enlargement cannot be expressed
CALIBRATION_IMAGES = 300
PREVIEW = "preview.png"  # beside a bundle's files, and none of them


def load_network(architecture: Architecture, checkpoint: Path) -> "torch.nn.Module":
    """Build a network in evaluation mode with a checkpoint's weights.

    Raises BundleError if the file is damaged, or its weights are of another network: it names the first that differs.
    """
    from helpers.export.weights import find_difference, read_weights, take_by_order

    weights = read_weights(architecture, checkpoint, str(checkpoint))
    network = architecture.build()
    if architecture.weights:  # of a library, to which others' networks were brought
        weights = take_by_order(network.state_dict(), weights, checkpoint.name)
    difference = find_difference(network.state_dict(), weights)
    if difference:
        # Of a YOLACT's layers these first show another number of classes.
        remedy = "; keep the result.json of its training beside it" if "conf_layer" in difference else ""
        raise BundleError(f"{checkpoint} is not a checkpoint of {architecture.name}: {difference}{remedy}")
    network.load_state_dict(weights)
    return network.eval()


def to_onnx(network: "torch.nn.Module", architecture: Architecture, opset: int = OPSET) -> "onnx.ModelProto":
    """Export a network with a dynamic batch dimension; the input is normalized float32 `[B, C, H, W]`.

    Nodes are named after the modules they come from. `opset`, the version of ONNX's operators, is from `OLDEST_OPSET`:
    engines of years ago know the older ones only. Raises BundleError if PyTorch cannot export it.
    """
    import onnx
    import torch

    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise BundleError(f"opset {opset} cannot be exported; choose one from {OLDEST_OPSET} to {NEWEST_OPSET}")
    module = architecture.export_module(network).eval()
    height, width, channels = architecture.input.shape
    # A network that has a size of each image's own takes them one by one.
    is_variable = architecture.input.is_variable
    images = torch.rand(1 if is_variable else 2, channels, height, width)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": list(architecture.outputs), "verbose": False}
    with quiet():
        # PyTorch's newer exporter knows no opset before 18, and would give that one without a word.
        # It knows no size that differs from image to image either, where boxes are chosen in the graph.
        if opset < 18 or is_variable:
            axes = {name: {0: "batch"} for name in ("images", *architecture.outputs)}
            if is_variable:
                axes = {"images": {2: "height", 3: "width"}, **{name: {} for name in architecture.outputs}}
            names |= {"dynamo": False, "opset_version": opset, "dynamic_axes": axes}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.onnx")
                torch.onnx.export(module, (images,), path, **names)
                return onnx.load(path)
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        program = torch.onnx.export(module, (images,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, **names)
    assert program is not None  # it is None only for the old exporter
    model = program.model_proto  # each access makes another
    name_by_module(model)
    return model


def simplify(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Fold constants and remove what computes nothing; raises BundleError where that changes the outputs."""
    import onnxsim

    simplified, same = onnxsim.simplify(model)
    if not same:
        raise BundleError("the simplified ONNX graph gives other outputs than the original")
    return simplified


def to_openvino(model: "onnx.ModelProto", architecture: Architecture) -> "ov.Model":
    """Convert to OpenVINO with uint8 `[B, H, W, C]` input and the normalization in the graph."""
    import openvino as ov

    converted = prepare(ov.convert_model(io.BytesIO(model.SerializeToString())), architecture.input)
    if len(converted.outputs) != len(architecture.outputs):
        raise BundleError(
            f"{architecture.name} has {len(converted.outputs)} outputs, and {len(architecture.outputs)} are named: add "
            "`outputs: {ROLE: NAME, ...}` to its card, in the network's order"
        )
    for output, name in zip(converted.outputs, architecture.outputs, strict=True):
        output.set_names({name})
    return converted


def convert(architecture_name: str, checkpoint: Path | None, opset: int = OPSET, card: Path | None = None) -> Converted:
    """Convert a PyTorch network, with a checkpoint's state dictionary or with the weights of its library.

    A network that was trained on a user's own classes has them from `result.json`, which training leaves beside the
    checkpoint. The opset is of the ONNX graph in between, see `to_onnx`, and the card changes what a library says.
    Raises BundleError if one of these cannot be used.
    """
    architecture = get_architecture(architecture_name, _labels_beside(checkpoint) if checkpoint else (), card)
    network = load_network(architecture, checkpoint) if checkpoint else architecture.build_pretrained().eval()
    onnx = to_onnx(network, architecture, opset)
    if not architecture.input.is_variable:  # of graphs with open sizes nothing is known before they run
        onnx = simplify(onnx)
    return Converted(to_openvino(onnx, architecture), architecture, checkpoint, onnx)


def export(
    architecture_name: str,
    checkpoint: Path | None,
    target: Storage,
    precision: str = "fp32",
    calibration: Iterable[np.ndarray] = (),
    opset: int = OPSET,
) -> Bundle:
    """Convert a PyTorch network and save it as a bundle; arguments as for `convert` and `make_bundle`."""
    converted = convert(architecture_name, checkpoint, opset)
    return make_bundle(converted.model, converted.architecture, checkpoint, target, precision, calibration)


def make_bundle(
    model: "ov.Model",
    architecture: Architecture,
    checkpoint: Path | None,
    target: Storage,
    precision: str,
    calibration: Iterable[np.ndarray] = (),
    validation: Validation | None = None,
    pictures: Sequence[Image] = (),
    onnx: "onnx.ModelProto | None" = None,
) -> Bundle:
    """Check a converted model, and save it as a bundle of one precision; nothing is written before all is checked.

    The model and what it is from are as in `Converted`, and an ONNX graph is kept in the bundle. The precisions `fp32`,
    `fp16` and `int8` are of the weights; `bf16` is half-precision weights and bfloat16 arithmetic. Calibration and
    validation are of int8, see `quantization.quantize`. The model is tried on pictures, which are drawn, uint8 BGR
    `[height, width, 3]` each; without any, on generated ones. Raises BundleError if it does not do what its
    architecture says, or precision or calibration cannot be used.
    """
    if precision not in PRECISIONS:
        raise BundleError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    pictures = pictures or generate_pictures()
    trial = architecture.trial
    if trial is None or trial.model is not model or trial.pictures is not pictures:
        trial = try_graph(model, architecture.input, pictures, architecture.name)
    outputs = trial.outputs
    arrays = architecture.arrays()
    manifest = Manifest(
        name=f"{architecture.name}-{precision}",
        architecture=architecture.name,
        task=architecture.task,
        input=architecture.input,
        outputs=tuple(OutputSpec(output.get_any_name(), _shape(output)) for output in model.outputs),
        labels=architecture.labels,
        postprocess=architecture.postprocess,
        precision=precision,
        arithmetic=ARITHMETIC[precision],
        flops=_count_flops(model, architecture),
        checkpoint=_fingerprint(checkpoint) if checkpoint else {"file": architecture.weights},
        decoder=architecture.decoder,
        batch=trial.batch,
    )
    check_manifest(manifest)
    if precision == "int8":
        model, record, engine = quantize(model, calibration, manifest, arrays, validation, trial.engine)
        manifest = replace(manifest, quantization=asdict(record))
        outputs = infer(engine, architecture.input, pictures, architecture.name)
    preview = draw_preview(outputs, manifest, arrays, pictures)
    if precision == "bf16" and not has_bf16():
        log.warning("this CPU has no bfloat16 units, so it will compute %s in 32 bits", manifest.name)
    files = {name: _npy(array) for name, array in arrays.items()}
    if onnx is not None:
        files["model.onnx"] = onnx.SerializeToString()
    bundle = save_bundle(target, manifest, {**_serialize(model, precision in ("fp16", "bf16")), **files})
    target.write(PREVIEW, preview)
    return bundle


def calibration_images(storage: Storage, architecture: Architecture, config: Config) -> Iterator[np.ndarray]:
    """Evenly spread images below a location, prepared as the pipeline prepares them; unreadable ones are left out."""
    spec, most = architecture.input, config.ingest.max_pixels
    return load_images(storage, config, CALIBRATION_IMAGES, lambda content: load(content, spec, most)[0])


def _shape(output: Any) -> tuple[int, ...]:
    """Of one image's output, -1 for a side that differs from image to image."""
    return tuple(side.get_length() if side.is_static else OPEN for side in list(output.get_partial_shape())[1:])


def _count_flops(model: "ov.Model", architecture: Architecture) -> int:
    """Operations for one image, of a usual size where each has its own."""
    if architecture.input.is_variable:
        model = model.clone()
        model.reshape([1, *architecture.input.shape])
    return count_flops(model)


def _fingerprint(file: Path) -> dict[str, str]:
    with file.open("rb") as content:
        return {"file": file.name, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


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
