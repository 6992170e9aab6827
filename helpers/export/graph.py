"""What a converted network consists of: layers, parameters, operations, and names one can find in the source."""

import ast
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import onnx
    import openvino as ov

MULTIPLYING = ("Convolution", "GroupConvolution", "MatMul")
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which module a node comes from


def count_flops(model: "ov.Model") -> int:
    """Floating-point operations of the convolutions and matrix products for one image; all else is small."""
    return sum(_flops(node) for node in model.get_ops())


def summarize(model: "ov.Model") -> pd.DataFrame:
    """Count the layers of a graph by their type.

    Returns:
        One row a type, those with the most parameters first, and a row `total`: number of layers, parameters
        (millions) and floating-point operations for one image (billions).
    """
    names: set[str] = set()
    rows = [
        (node.get_type_name(), 1, _parameters(node, names) / 1e6, _flops(node) / 1e9)
        for node in model.get_ordered_ops()
        if node.get_type_name() not in ("Constant", "Convert", "Parameter", "Result")
    ]
    table = pd.DataFrame(rows, columns=["type", "layers", "parameters, M", "GFLOPs"]).groupby("type").sum()
    table = table.sort_values(["parameters, M", "layers"], ascending=False)
    table.loc["total"] = table.sum()
    return table.astype({"layers": int})


def name_by_module(model: "onnx.ModelProto") -> None:
    """Name each node after the PyTorch module it comes from, in place; drop the exporter's notes.

    So a viewer and a list of layers show `backbone.layers.0.0.conv1/Conv` instead of `node_Conv_834`. The notes hold
    paths of the machine that exported, and are not needed after this.
    """
    count: Counter[str] = Counter()
    for node in model.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        modules = ast.literal_eval(notes[SCOPES])[:-1] if SCOPES in notes else [""]
        name = f"{modules[-1].removeprefix('network.')}/{node.op_type}".removeprefix("/")
        count[name] += 1
        # A module that is used several times, as the head is for every level, counts its uses.
        node.name = name if count[name] == 1 else f"{name}.{count[name]}"
        del node.metadata_props[:]
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]


def _flops(node: "ov.Node") -> int:
    if node.get_type_name() not in MULTIPLYING:
        return 0
    results = [d.get_length() for d in node.output(0).get_partial_shape() if d.is_static]
    weights = [d.get_length() if d.is_static else 1 for d in node.input(1).get_partial_shape()]
    # Products for each result: all of the weights' dimensions but that of the output channels.
    channels = {"Convolution": 1, "GroupConvolution": 2}.get(node.get_type_name())
    is_transposed = not channels and node.get_attributes().get("transpose_b", False)
    depth = np.prod(weights[channels:]) if channels else weights[-1 if is_transposed else max(-2, -len(weights))]
    return int(2 * np.prod(results) * depth)


def _parameters(node: "ov.Node", names: set[str]) -> int:
    """Elements of the constants of real numbers that go into a node; what several nodes share is counted once."""
    total = 0
    for value in node.input_values():
        source = value.get_node()
        while source.get_type_name() == "Convert":
            source = source.input_value(0).get_node()
        name = source.get_friendly_name()
        if source.get_type_name() == "Constant" and source.get_element_type().is_real() and name not in names:
            names.add(name)
            total += int(np.prod(list(source.get_output_shape(0))))
    return total
