"""What a converted network computes, and names of its layers that one can find in the source."""

import ast
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    import openvino as ov

MULTIPLYING = ("Convolution", "GroupConvolution", "MatMul")
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which module a node comes from


def count_flops(model: "ov.Model") -> int:
    """Floating-point operations of the convolutions and matrix products for one image; all else is small."""
    return sum(flops_of(node) for node in model.get_ops())


def flops_of(node: "ov.Node") -> int:
    """The same of one layer."""
    if node.get_type_name() not in MULTIPLYING:
        return 0
    results = [d.get_length() for d in node.output(0).get_partial_shape() if d.is_static]
    weights = [d.get_length() if d.is_static else 1 for d in node.input(1).get_partial_shape()]
    # Products for each result: all of the weights' dimensions but that of the output channels.
    channels = {"Convolution": 1, "GroupConvolution": 2}.get(node.get_type_name())
    is_transposed = not channels and node.get_attributes().get("transpose_b", False)
    depth = np.prod(weights[channels:]) if channels else weights[-1 if is_transposed else max(-2, -len(weights))]
    return int(2 * np.prod(results) * depth)


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
