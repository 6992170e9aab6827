"""From any model's graph to a bundle's: uint8 images `[B, H, W, C]` in, float32 outputs named for their roles out.

The graph normalizes the images itself, so that a quarter of the bytes of float32 goes into it, and no caller can
normalize them differently.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.errors import BundleError, first_line
from helpers.export.cards import CardInput
from helpers.images.spec import COLORS, InputSpec
from helpers.tasks.boxes import STRIDES, make_cells
from helpers.tasks.interface import OutputError

if TYPE_CHECKING:
    import openvino as ov

OPEN = -1
UNTOLD = ("Check ", "Exception from", "FrontEnd API failed", "Model wasn't", "Summary:")  # of OpenVINO's messages
SHAPING = ("Result", "Convert", "FakeQuantize", "Reshape", "Squeeze", "Unsqueeze", "Transpose")
SIGNED_MIDDLE = 128.0  # what 8-bit models with signed input subtract from a gray level


def keep_image(model: "ov.Model", constants: Mapping[str, Any], origin: str) -> "ov.Model":
    """Let a graph have one input, the image; others are a card's constants, or gone where no output needs them.

    Constants are numbers for one image, by the input's name. Raises BundleError if another input has none, or a
    constant does not fit, or is of no input.
    """
    import openvino as ov

    known = {name for parameter in model.get_parameters() for name in _names(parameter.output(0))}
    if unknown := sorted({*constants} - known):
        inputs = ", ".join(_name(port, "?") for port in model.inputs)
        raise BundleError(f"{origin} has no input {unknown[0]!r}, which its card names; its inputs are {inputs}")
    for parameter in model.get_parameters():
        given = [constants[name] for name in _names(parameter.output(0)) if name in constants]
        if given:
            constant = _make_constant(parameter, given[0], origin)
            for use in parameter.output(0).get_target_inputs():
                use.replace_source_output(constant)
    needed = _find_needed(model)
    if len(needed) != 1:
        shapes = {_name(parameter.output(0), "?"): parameter.get_partial_shape() for parameter in needed}
        inputs = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
        others = [name for name, shape in shapes.items() if shape.rank.is_static and len(shape) < 3] or ["NAME"]
        raise BundleError(
            f"{origin} has the inputs {inputs}, and an image fills one: add "
            f"`inputs: {{{', '.join(f'{name}: [...]' for name in others)}}}` to its card, with what they are for every "
            "image, such as the input's height and width, or name `outputs` that need the image only"
        )
    return model if len(model.inputs) == 1 else ov.Model(model.get_results(), needed, model.get_friendly_name())


def find_input(model: "ov.Model", given: CardInput, origin: str) -> tuple[InputSpec, str]:
    """What a graph takes for an image, by its shape, of three dimensions or four with the batch, and by the card.

    The card's height and width may differ from the graph's where that can be reshaped. Returns the input as a manifest
    has it, and the layout, `NCHW` or `NHWC`. Raises BundleError if the graph has another number of inputs, takes no
    images, or its shape leaves something open.
    """
    shape = model.input().get_partial_shape()
    sides = [_length(side) for side in shape][-3:] if shape.rank.is_static else [OPEN] * 3
    if shape.rank.is_static and len(shape) not in (3, 4):
        raise BundleError(f"{origin} takes {shape}, and an image needs height, width and channels")
    wanted = (COLORS[given.color],) if given.color else (1, 3)
    layouts = [name for name, channels in (("NCHW", sides[0]), ("NHWC", sides[2])) if channels in wanted]
    if not layouts and OPEN not in (sides[0], sides[2]):
        raise BundleError(
            f"{origin} takes {shape}, where no side is of {' or '.join(map(str, wanted))} channels: correct `color` in "
            "the input of its card (rgb and bgr have 3 channels, gray has 1), or export the model for such images"
        )
    if not given.layout and len(layouts) != 1:
        remedy = "add `layout: NCHW` or `layout: NHWC` to the input of its card"
        raise BundleError(f"{origin} takes {shape}, which does not say where the channels are: {remedy}")
    layout = given.layout or layouts[0]
    channels, height, width = sides if layout == "NCHW" else (sides[2], sides[0], sides[1])
    if channels not in (OPEN, *wanted):
        raise BundleError(f"{origin} takes {channels} channels, and an image has {wanted}")
    try:
        spec = given.to_spec((max(height, 0), max(width, 0), channels))
    except ValueError as error:
        raise BundleError(f"{origin}: {error}: correct the input of its card") from None
    if not spec.height or not spec.width:
        raise BundleError(f"{origin} takes images of any size ({shape}): add `height` and `width` to its card's input")
    kind = model.input().get_element_type()  # a graph of whole numbers has a normalization of its own
    is_signed = kind.get_type_name() == "i8"
    if not kind.is_real() and (any(value != 1 for value in spec.std) or (any(spec.mean) and not is_signed)):
        remedy = "leave mean and std out of its card"
        raise BundleError(f"{origin} takes whole numbers and normalizes them itself: {remedy}")
    if is_signed and not given.mean:
        spec = replace(spec, mean=(SIGNED_MIDDLE,) * len(spec.mean))
    return spec, layout


def prepare(model: "ov.Model", spec: InputSpec, layout: str = "NCHW", origin: str = "the graph") -> "ov.Model":
    """Let a graph take uint8 `[B, H, W, C]` images of any number, or of 1 where it can take no more; in place.

    Outputs become float32; of an 8-bit model's output they are the real values that its numbers stand for. `layout` is
    of the graph's own input. Raises BundleError if the graph cannot take images of the input's size.
    """
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    _add_batch(model)
    height, width, channels = (OPEN, OPEN, spec.shape[2]) if spec.is_variable else spec.shape
    sides = [channels, height, width] if layout == "NCHW" else [height, width, channels]
    _reshape(model, sides, [1] if spec.is_variable else [OPEN, 1], origin)
    _remove_quantization(model)
    batch = _length(model.input().get_partial_shape()[0])
    graph = PrePostProcessor(model)
    images = graph.input()
    images.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    images.tensor().set_shape([batch, height, width, channels])
    if model.input().get_element_type() != ov.Type.u8:
        images.preprocess().convert_element_type(ov.Type.f32).mean(list(spec.mean)).scale(list(spec.std))
    images.model().set_layout(ov.Layout(layout))
    names = [_name(output, f"output_{position}") for position, output in enumerate(model.outputs)]
    for node in model.get_ops():  # a compiled graph's outputs have the names of what is merged into them too
        for port in node.outputs():
            port.set_names(set())
    for position, (output, name) in enumerate(zip(model.outputs, names, strict=True)):
        name_output(output, name)
        graph.output(position).tensor().set_element_type(ov.Type.f32)
    return graph.build()


def select_outputs(
    model: "ov.Model", outputs: Mapping[str, str | tuple[str, ...]], origin: str
) -> dict[str, list[str]]:
    """Let a graph have the outputs that a card names, by role, in place; any tensor of the graph can be one.

    Returns the new names of the outputs that stand for one role, see `join_strides`. Raises BundleError if there is no
    tensor of a name.
    """
    parts = {role: given for role, given in outputs.items() if not isinstance(given, str)}
    names = {role: given for role, given in outputs.items() if isinstance(given, str)}
    names |= {f"{role}/{i}": name for role, given in parts.items() for i, name in enumerate(given)}
    tensors = {name: port for node in model.get_ops() for port in node.outputs() for name in _names(port)}
    if len(set(names.values())) < len(names):
        raise BundleError(f"{origin}: its card names one output for two roles: {', '.join(names.values())}")
    missing = next((name for name in names.values() if name not in tensors), None)
    if missing is not None:
        known = ", ".join(_name(port, "?") for port in model.outputs)
        raise BundleError(f"{origin} has no output {missing!r}, which its card names; its outputs are {known}")
    results = model.get_results()
    if names:
        for name in names.values():
            if not any(use.get_node().get_type_name() == "Result" for use in tensors[name].get_target_inputs()):
                model.add_outputs([tensors[name]])
        wanted = {tensors[name] for name in names.values()}
        for result in results:
            if result.input_value(0) not in wanted:
                model.remove_result(result)
    roles = {tensors[name]: role for role, name in names.items()}
    for output in model.outputs if names else ():
        name_output(output, roles[output.get_node().input_value(0)])
    return {role: [f"{role}/{i}" for i in range(len(given))] for role, given in parts.items()}


def find_strides(shapes: Mapping[str, tuple[int, ...]], spec: InputSpec, has_anchors: bool) -> dict[str, list[str]]:
    """Tell which outputs are the same numbers for the cells of one grid each, as detectors without a last layer give.

    Shapes are of one image's outputs, by name; where the card has anchors, there may be any number of them per grid.
    Returns names of outputs by one for all, such as `[cls_8, cls_16, cls_32]`, the smallest stride's first; if any.
    """
    if any(len(shape) not in (2, 3) or 0 in shape for shape in shapes.values()):
        return {}
    kinds: dict[tuple[int, int], list[tuple[int, str]]] = {}
    has_maps = _are_maps(shapes.values(), spec)
    for name, shape in shapes.items():
        channels = shape[0 if has_maps else -1]
        kinds.setdefault((len(shape), channels), []).append((int(np.prod(shape)) // channels, name))
    grids = sorted({cells for outputs in kinds.values() for cells, _ in outputs}, reverse=True)
    groups: list[tuple[str, ...]] = []
    for outputs in kinds.values():  # with several outputs of a kind per grid, as cls_8 and obj_8, those in order
        groups += zip_longest(*[[name for cells, name in outputs if cells == grid] for grid in grids])
    if len(grids) < 2 or any(None in group for group in groups):
        return {}
    try:
        if not has_anchors:
            make_cells(sum(grids), (spec.width, spec.height), len(grids))
    except OutputError:
        return {}
    return {f"[{', '.join(group)}]": list(group) for group in groups}


def join_strides(model: "ov.Model", groups: Mapping[str, list[str]], spec: InputSpec, labels: int, origin: str) -> None:
    """Join outputs of one stride each, the smallest first, to one output `[B, A, n]` with a row per anchor; in place.

    `groups` are names of outputs, by what they become, in a graph that was tried. Raises BundleError if outputs are not
    the same numbers for several grids.
    """
    from openvino import opset13 as ops

    results = {result.output(0).get_any_name(): result for result in model.get_results()}
    ports = {name: [results[one].input_value(0) for one in group] for name, group in groups.items()}
    shapes = {
        name: [tuple(_length(side) for side in port.get_partial_shape())[1:] for port in own]
        for name, own in ports.items()
    }
    has_maps = _are_maps(chain(*shapes.values()), spec)
    widths: dict[str, int] = {}
    for name, own in shapes.items():
        channels = {shape[0 if has_maps else -1] if len(shape) in (2, 3) else OPEN for shape in own}
        if len(own) < 2 or len(channels) > 1 or OPEN in channels:
            given = f"{name} is outputs of {', '.join(str(list(shape)) for shape in own)} in its card"
            raise BundleError(f"{origin}: {given}, which are not the same numbers for the cells of several grids")
        (widths[name],) = channels
    # Where each cell has several anchors, their numbers stand side by side, as many as scores say.
    counts = [width // labels for width in widths.values() if labels and len(widths) > 1 and width % labels == 0]
    anchors = min((count for count in counts if not any(width % count for width in widths.values())), default=1)
    for name, width in widths.items():
        order = np.argsort([-np.prod(shape) for shape in shapes[name]])
        parts = [ops.transpose(port, ops.constant([0, 2, 3, 1])) if has_maps else port for port in ports[name]]
        parts = [ops.reshape(parts[i], ops.constant([0, -1, width // anchors]), True) for i in order]
        result = ops.result(ops.concat(parts, 1))
        model.add_results([result])
        name_output(result.output(0), name)
    for group in groups.values():
        for one in group:
            model.remove_result(results[one])
    model.validate_nodes_and_infer_types()


def find_last(model: "ov.Model", name: str) -> str:
    """The kind of the last layer before an output that computes anything."""
    node = next(output for output in model.outputs if name in output.get_names()).get_node()
    while node.get_type_name() in SHAPING:
        node = node.input_value(0).get_node()
    return node.get_type_name()


def rename_outputs(model: "ov.Model", roles: Mapping[str, str]) -> None:
    """Name a graph's outputs for their roles, in the roles' order, and remove the others; in place."""
    results = {result.output(0).get_any_name(): result for result in model.get_results()}
    for result in results.values():
        model.remove_result(result)
    model.add_results([results[name] for name in roles.values()])
    for role, output in zip(roles, model.outputs, strict=True):
        name_output(output, role)


def tell_reason(error: Exception) -> str:
    """The line of OpenVINO's message that says most; its first ones name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(UNTOLD)]
    return first_line(lines[0]) if lines else first_line(error)


def name_output(output: "ov.Output", name: str) -> None:
    """Give an output of a graph one name, which is that of the tensor it shows too."""
    output.get_node().input_value(0).set_names({name})
    output.set_names({name})


def _find_needed(model: "ov.Model") -> list[Any]:
    """The inputs of a graph that its outputs depend on."""
    names: set[str] = set()
    pending = list(model.get_results())
    while pending:
        node = pending.pop()
        if node.get_name() not in names:
            names.add(node.get_name())
            pending += [value.get_node() for value in node.input_values()]
    return [parameter for parameter in model.get_parameters() if parameter.get_name() in names]


def _make_constant(parameter: Any, value: Any, origin: str) -> "ov.Output":
    """An input's constant, of its type; dimensions that the card leaves out are of 1."""
    import openvino as ov
    from openvino import opset13 as ops

    shape, problem = parameter.get_partial_shape(), f"{origin}: its card has {value!r} for the input "
    try:
        array = np.asarray(value).astype(parameter.get_element_type().to_dtype())
    except (ValueError, TypeError):
        raise BundleError(f"{problem}{_name(parameter.output(0), '?')}, which takes numbers: {shape}") from None
    missing = len(shape) - array.ndim if shape.rank.is_static else 0
    array = array.reshape((1,) * missing + array.shape)
    if not shape.compatible(ov.PartialShape(list(array.shape))):
        raise BundleError(f"{problem}{_name(parameter.output(0), '?')}, which takes {shape}")
    return ops.constant(array).output(0)


def _are_maps(shapes: Iterable[tuple[int, ...]], spec: InputSpec) -> bool:
    """Whether shapes are `[n, H, W]` of an input's grids, and not `[H, W, n]` or `[A, n]`."""
    grids = {(-(-spec.height // stride), -(-spec.width // stride)) for stride in STRIDES}
    return all(len(shape) == 3 and shape[1:] in grids for shape in shapes)


def _add_batch(model: "ov.Model") -> None:
    """Let a graph that takes one image without a batch's dimension take a batch of one."""
    from openvino import opset13 as ops

    taken, shape = model.get_parameters()[0], model.input().get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 3:
        return
    batch = ops.parameter([1, *shape], taken.get_element_type(), name=taken.get_friendly_name())
    image = ops.squeeze(batch, ops.constant([0]))
    for use in taken.output(0).get_target_inputs():
        use.replace_source_output(image.output(0))
    model.replace_parameter(0, batch)
    model.validate_nodes_and_infer_types()
    batch.output(0).set_names({"images"})


def _reshape(model: "ov.Model", sides: list[int], batches: list[int], origin: str) -> None:
    for batch in batches:
        try:
            model.reshape([batch, *sides])
            return
        except RuntimeError as error:
            reason = tell_reason(error)
    problem = f"takes {model.input().get_partial_shape()} and cannot take {sides} ({reason})"
    raise BundleError(f"{origin} {problem}: correct height, width and layout in the input of its card")


def _remove_quantization(model: "ov.Model") -> None:
    """Let results that are 8-bit numbers be the real values these stand for."""
    for output in model.outputs:
        node = output.get_node().input_value(0).get_node()
        if node.get_type_name() != "Convert" or node.input_value(0).get_node().get_type_name() != "FakeQuantize":
            continue
        while node.get_type_name() in ("Convert", "FakeQuantize"):  # the last steps only round and scale
            node = node.input_value(0).get_node()
        output.get_node().input(0).replace_source_output(node.output(0))
    model.validate_nodes_and_infer_types()


def _length(side: Any) -> int:
    return side.get_length() if side.is_static else OPEN


def _names(port: Any) -> set[str]:
    """The names a user may know a tensor by: its own, and that of the layer it comes from."""
    names = {*port.get_names(), port.get_node().get_friendly_name()}
    return names | {name.removesuffix(":0") for name in names}


def _name(port: Any, default: str) -> str:
    return min(port.get_names(), key=len, default=default)
