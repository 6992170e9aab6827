"""Model files of any framework: ONNX, OpenVINO, TensorFlow Lite, TensorFlow and PyTorch's exported programs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers.errors import BundleError, first_line
from helpers.export import preparation
from helpers.export.architectures import Architecture, Converted
from helpers.export.cards import HELP, Card, merge, parse_card, read_arrays, read_entries
from helpers.export.checks import Trial, compile_graph, generate_pictures, infer, stack, try_graph
from helpers.export.metadata import read_metadata
from helpers.images.decoding import Image
from helpers.tasks import DECODERS, Arrays, suggest
from helpers.tasks.interface import OutputError

if TYPE_CHECKING:
    import onnx
    import openvino as ov

log = logging.getLogger(__name__)

SUFFIXES = (".onnx", ".xml", ".tflite", ".pb", ".pt2")
CHECKPOINT = (
    "a checkpoint of PyTorch: name its network with --architecture, and this file with --checkpoint, or export the "
    "network to ONNX"
)
KERAS = "a model of Keras: write it with `model.export(FOLDER)`, and name FOLDER/saved_model.pb"
OTHERS = dict.fromkeys((".pt", ".pth", ".safetensors", ".ckpt"), CHECKPOINT) | dict.fromkeys((".h5", ".keras"), KERAS)
UNKNOWN = f"no model file that can be read; there are {', '.join(SUFFIXES)}: export the model to ONNX"
ACTIVATIONS = {"SoftMax": "probabilities", "Softmax": "probabilities", "Sigmoid": "multi_label"}  # in the graph


def convert_file(path: Path, card: Path | None = None, pictures: Sequence[Image] = ()) -> Converted:
    """Convert a model's file, and find out what a pipeline must know of it.

    The card goes on top of what the file says of itself. Pictures, uint8 BGR `[height, width, 3]` each, or generated
    ones tell outputs apart. Raises BundleError if the file is no model or damaged, the card is missing or wrong, or the
    graph is not of its task.
    """
    pictures = pictures or generate_pictures()
    model = read_graph(path)
    entries = merge(read_metadata(path, model), read_entries(card, path) if card else {})
    if "task" not in entries:
        raise BundleError(f"{path} does not say what it is for: write a card with its task, labels and input; {HELP}")
    origin = card or path
    description = parse_card(entries, origin)
    if description.network:
        raise BundleError(f"{origin}: network is of PyTorch checkpoints: leave it out for a model's file")
    strides = preparation.select_outputs(model, description.outputs, str(path))
    model = preparation.keep_image(model, description.inputs, str(path))
    spec, layout = preparation.find_input(model, description.input, str(path))
    if model.input().get_element_type().is_real() and not (description.input.mean or description.input.std):
        log.warning("%s gets gray levels of 0 to 255: its card has no mean and std, which most networks need", path)
    model = preparation.prepare(model, spec, layout, str(path))
    trial = try_graph(model, spec, pictures, str(path))
    outputs, engine = trial.outputs, trial.engine
    if not description.outputs and "anchor_free" in DECODERS[description.task]:
        shapes = {name: values.shape[1:] for name, values in outputs[0].items()}
        strides = preparation.find_strides(shapes, spec, bool(description.priors))
    if strides:
        preparation.join_strides(model, strides, spec, len(description.labels), str(origin))
        engine = compile_graph(model, str(path))
        outputs = infer(engine, spec, pictures, str(path))
    description, roles = _assign_roles(description, stack(outputs), model, str(origin), bool(strides))
    if "offsets" in roles and description.decoder == "ssd" and not description.priors:
        raise BundleError(f"{origin}: boxes are offsets from anchors: add `priors: FILE.npy` with them; {HELP}")
    if unused := sorted({output.get_any_name() for output in model.outputs} - {*roles.values()}):
        log.warning("%s: outputs %s have no role; if it is theirs, name the card's `outputs`", path, ", ".join(unused))
    preparation.rename_outputs(model, roles)
    tried = [_of_roles(own, roles) for own in outputs]
    trial = Trial(model, pictures, tried, trial.batch, lambda image: _of_roles(engine(image), roles))
    arrays = partial(read_arrays, description)
    architecture = Architecture.of_card(path.stem, description, roles, input=spec, arrays=arrays, trial=trial)
    if layout != "NCHW" or strides:
        return Converted(model, architecture, path, None)
    named = {role: str(description.outputs.get(role, name)) for role, name in roles.items()}
    return Converted(model, architecture, path, _read_onnx(path, named))


def read_graph(path: Path) -> "ov.Model":
    """Read a file with OpenVINO; raises BundleError if it is missing, unknown, damaged or without its weights."""
    import openvino as ov

    if path.suffix not in SUFFIXES:
        raise BundleError(f"{path} is {OTHERS.get(path.suffix, UNKNOWN)}")
    if not path.is_file():
        raise BundleError(f"there is no file {path}: correct --file")
    if path.suffix == ".onnx":
        _check_external_data(path)
    if path.suffix == ".xml" and not path.with_suffix(".bin").is_file():
        raise BundleError(f"{path} has no weights: copy {path.stem}.bin beside it")
    try:
        if path.suffix == ".pt2":
            import torch

            program = torch.export.load(path)
            model = ov.convert_model(program)
            # OpenVINO forgets the sizes that the program was exported for.
            examples = [value for value in program.example_inputs[0] if isinstance(value, torch.Tensor)]
            if len(examples) == len(model.inputs) == 1:
                model.reshape(list(examples[0].shape))
            return model
        if path.name == "saved_model.pb":
            return ov.convert_model(path.parent)
        return ov.Core().read_model(path)
    except Exception as error:  # each framework's reader raises what it comes across
        raise BundleError(
            f"{path} cannot be read as a model: {preparation.tell_reason(error)}; it is damaged, of another kind, or "
            f"has layers that OpenVINO {ov.__version__.partition('-')[0]} lacks: export it without these, perhaps not "
            "quantized"
        ) from None


def _check_external_data(path: Path) -> None:
    """Name the file of weights that an ONNX file lacks."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
    except Exception as error:  # protobuf's
        raise BundleError(f"{path} is no ONNX model or is damaged: {first_line(error)}") from None
    for name in sorted({ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}):
        if not (path.parent / name).is_file():
            raise BundleError(f"{path} keeps its weights in {name!r}, which is not beside it: copy that file too")


def _assign_roles(
    card: Card, outputs: Arrays, model: "ov.Model", origin: str, has_cells: bool
) -> tuple[Card, dict[str, str]]:
    """A card with its decoder, labels and the parameters that the outputs tell, and the name of each role's output.

    `has_cells` says that rows of the outputs are cells of grids, which have boxes around them unless there are anchors.
    """
    try:
        first = "ssd" if card.priors else "anchor_free" if has_cells else ""
        decoder = card.decoder or suggest(card.task, outputs, len(card.labels), first)
        if not card.decoder and card.task == "classification":
            # Numbers from 0 to 1 that do not come to 1 may be anything, but for what the graph computes them with.
            (output,) = DECODERS[card.task][decoder].assign_roles(outputs, len(card.labels)).values()
            decoder = ACTIVATIONS.get(preparation.find_last(model, output), decoder)
        if card.outputs:  # whose names are the roles by now
            roles = {role: role for role in card.outputs}
        else:
            roles = DECODERS[card.task][decoder].assign_roles(outputs, len(card.labels))
        card = replace(card, decoder=decoder)
        samples = _of_roles(outputs, roles)
        shapes = {role: values.shape[1:] for role, values in samples.items()}
        card = replace(card, labels=card.labels or _number_classes(card, shapes, origin))
        DECODERS[card.task][decoder].check_shapes(shapes, len(card.labels))
        suggested = DECODERS[card.task][decoder].suggest_parameters(samples, len(card.labels))
        card = replace(card, postprocess={**suggested, **card.postprocess})
    except (OutputError, ValueError) as error:
        raise BundleError(f"{origin}: {first_line(error)}") from None
    return card, roles


def _of_roles(outputs: Arrays, roles: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {role: outputs[name] for role, name in roles.items()}


def _number_classes(card: Card, shapes: dict[str, tuple[int, ...]], origin: str) -> tuple[str, ...]:
    """Numbers for the labels of a network of which nobody has said any."""
    if card.task == "embedding":
        return ()
    if card.task == "classification":
        (shape,) = shapes.values()
        log.warning("%s has no labels, so that its classes are numbers: add `labels` to its card", origin)
        return tuple(map(str, range(max(shape))))
    raise BundleError(f"{origin} has no labels: add `labels: [...]`, or a file of them, to its card")


def _read_onnx(path: Path, names: Mapping[str, str]) -> "onnx.ModelProto | None":
    """The ONNX graph of a file with its outputs named for their roles; None where it takes no float32 images."""
    if path.suffix != ".onnx":
        return None
    import onnx

    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    images = [value for value in model.graph.input if value.name not in weights]
    if len(images) > 1 or images[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return None
    tensors = {name for node in model.graph.node for name in node.output}
    if any(role in tensors and role != name for role, name in names.items()):
        return None
    del model.graph.output[:]
    for role, name in names.items():
        if role != name:
            model.graph.node.append(onnx.helper.make_node("Identity", [name], [role]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(role, onnx.TensorProto.FLOAT, None))
    return model
