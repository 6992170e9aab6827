"""Bundles of graphs whose answers can be told by looking: made with OpenVINO's own operations, in milliseconds."""

import tempfile
from dataclasses import replace
from pathlib import Path

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


def _save(folder: Path, outputs: list[tuple[str, ov.Node]], pixels: ov.Node, manifest: Manifest) -> Bundle:
    results = []
    for name, node in outputs:
        node.output(0).get_tensor().set_names({name})
        results.append(opset.result(node))
    graph = ov.Model(results, [pixels.input_value(0).get_node()], manifest.name)
    with tempfile.TemporaryDirectory() as work:
        ov.save_model(graph, f"{work}/model.xml", compress_to_fp16=False)
        files = {path.name: path.read_bytes() for path in sorted(Path(work).iterdir())}
    return save_bundle(open_storage(str(folder)), manifest, files)
