"""Bundles of graphs whose answers can be told by looking: made with OpenVINO's own operations, in milliseconds."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import openvino as ov
import openvino.opset13 as opset

from helpers.bundle.manifest import Bundle, Manifest, OutputSpec, save_bundle
from helpers.images.spec import InputSpec
from helpers.storage import open_storage

LABELS = ("dark", "bright")


def brightness(folder: Path, side: int = 8, **changes) -> Bundle:
    """A classification of the mean gray level, 0 to 255, as logits: `bright` where it is above 128."""
    pixels = _pixels(side)
    mean = opset.reduce_mean(pixels, [1, 2, 3], keep_dims=False)
    logit = opset.unsqueeze(opset.divide(opset.subtract(mean, np.float32(128)), np.float32(16)), 1)
    logits = opset.concat([opset.negative(logit), logit], 1)
    manifest = _manifest("brightness", "classification", side, {"logits": (2,)}, {"top_k": 2})
    return _save(folder, [("logits", logits)], pixels, replace(manifest, **changes))


def color_scores(folder: Path, side: int = 8) -> Bundle:
    """A classification by the mean of each normalized channel; the bundle has the ONNX graph too."""
    from onnx import TensorProto, helper

    mean, std = np.array([120, 110, 100], np.float32), np.array([50, 60, 70], np.float32)
    weights = np.array([[1, -2], [3, 1], [-2, 2]], np.float32)
    pixels = _pixels(side)
    channels = opset.reduce_mean(opset.divide(opset.subtract(pixels, mean), std), [1, 2], keep_dims=False)
    manifest = _manifest("color_scores", "classification", side, {"logits": (2,)}, {"top_k": 2})
    spec = replace(manifest.input, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    nodes = [
        helper.make_node("ReduceMean", ["images", "sides"], ["channels"], keepdims=0),
        helper.make_node("MatMul", ["channels", "weights"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("sides", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel()),
    ]
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("images", ["batch", 3, side, side]), ("logits", ["batch", 2]))
    ]
    graph = helper.make_graph(nodes, "color_scores", *ports, constants)
    onnx = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    outputs = [("logits", opset.matmul(channels, weights, False, False))]
    return _save(folder, outputs, pixels, replace(manifest, input=spec), {"model.onnx": onnx})


def bright_spot(folder: Path, side: int = 64, **changes) -> Bundle:
    """A detection of one `dark` box around all pixels that are brighter than 200."""
    pixels = _pixels(side)
    is_bright = opset.greater(opset.reduce_max(pixels, [3], keep_dims=False), np.float32(200))
    starts = np.arange(side, dtype=np.float32)
    ends = []
    for reduce, offset, other in ((opset.reduce_min, 0, side), (opset.reduce_max, 1, 0)):
        for places in (starts[None, None, :], starts[None, :, None]):
            ends.append(reduce(opset.select(is_bright, places + np.float32(offset), np.float32(other)), [1, 2]))
    boxes = opset.unsqueeze(opset.concat([opset.unsqueeze(end, 1) for end in ends], 1), 1)
    is_any = opset.reduce_max(opset.convert(is_bright, np.float32), [1, 2])
    scores = opset.multiply(opset.unsqueeze(is_any, 1), np.float32(0.9))
    classes = opset.multiply(scores, np.float32(0))
    outputs = {"boxes": (1, 4), "scores": (1,), "classes": (1,)}
    manifest = _manifest("bright_spot", "detection", side, outputs, {"score_threshold": 0.5})
    nodes = [("boxes", boxes), ("scores", scores), ("classes", classes)]
    return _save(folder, nodes, pixels, replace(manifest, **changes))


def mean_color(folder: Path, side: int = 8, **changes) -> Bundle:
    """An embedding of three numbers, the mean of each channel."""
    pixels = _pixels(side)
    vector = opset.reduce_mean(pixels, [1, 2], keep_dims=False)
    manifest = _manifest("mean_color", "embedding", side, {"embedding": (3,)}, {"normalize": False})
    return _save(folder, [("embedding", vector)], pixels, replace(manifest, labels=(), **changes))


def _pixels(side: int) -> ov.Node:
    pixels = opset.parameter([-1, side, side, 3], np.uint8, name="pixels")
    return opset.convert(pixels, np.float32)


def _manifest(name: str, task: str, side: int, outputs: dict[str, tuple[int, ...]], postprocess: dict) -> Manifest:
    return Manifest(
        name=name,
        architecture=name,
        task=task,
        input=InputSpec(side, side, "rgb", (0.0,) * 3, (1.0,) * 3),
        outputs=tuple(OutputSpec(*output) for output in outputs.items()),
        labels=LABELS,
        postprocess=postprocess,
        precision="fp32",
        arithmetic="f32",
        flops=3 * side * side,
        checkpoint={"file": "none", "sha256": ""},
    )


def _save(
    folder: Path,
    outputs: list[tuple[str, ov.Node]],
    pixels: ov.Node,
    manifest: Manifest,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Bundle:
    results = []
    for name, node in outputs:
        node.output(0).get_tensor().set_names({name})
        results.append(opset.result(node))
    graph = ov.Model(results, [pixels.input_value(0).get_node()], manifest.name)
    with tempfile.TemporaryDirectory() as work:
        ov.save_model(graph, f"{work}/model.xml", compress_to_fp16=False)
        graphs = {path.name: path.read_bytes() for path in sorted(Path(work).iterdir())}
    return save_bundle(open_storage(str(folder)), manifest, {**graphs, **files})
