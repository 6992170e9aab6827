"""One network in several formats: each is an engine that takes a task's images and returns the outputs by name.

All engines get the same number of threads, so that a comparison shows the format and not the share of the machine.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers.bundle.manifest import Bundle
from helpers.bundle.runtime import compile_options, get_model, read_graph
from helpers.export.architectures import Architecture
from helpers.export.evaluation import Engine, compiled_engine
from helpers.export.graph import flops_of
from helpers.images.spec import InputSpec

if TYPE_CHECKING:
    import openvino as ov
    import torch


def torch_engine(
    network: "torch.nn.Module", architecture: Architecture, threads: int = 1, compiled: bool = False
) -> Engine:
    """The original network in eager mode, or through `torch.compile`.

    The latter needs a C++ compiler, and compiles at the first call of each batch size.
    """
    import torch

    module = architecture.export_module(network).eval()
    predict = torch.compile(module) if compiled else module
    torch.set_num_threads(threads)

    def infer(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            outputs = predict(torch.from_numpy(_normalize(images, architecture.input)))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: tensor.numpy() for name, tensor in zip(architecture.outputs, tensors, strict=True)}

    return infer


def onnx_engine(path: Path, architecture: Architecture, threads: int = 1) -> Engine:
    """An ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = list(architecture.outputs)
    return lambda images: dict(
        zip(names, session.run(names, {"images": _normalize(images, architecture.input)}), strict=True)
    )


def summarize(model: "ov.Model") -> pd.DataFrame:
    """Count the layers of a graph by their type.

    Returns:
        One row per type, those with the most parameters first, and a row `total`: number of layers, parameters
        (millions) and floating-point operations for one image (billions).
    """
    names: set[str] = set()
    rows = [
        (node.get_type_name(), 1, _parameters(node, names) / 1e6, flops_of(node) / 1e9)
        for node in model.get_ordered_ops()
        if node.get_type_name() not in ("Constant", "Convert", "Parameter", "Result")
    ]
    table = pd.DataFrame(rows, columns=["type", "layers", "parameters, M", "GFLOPs"]).groupby("type").sum()
    table = table.sort_values(["parameters, M", "layers"], ascending=False)
    table.loc["total"] = table.sum()
    return table.astype({"layers": int})


def openvino_engine(bundle: Bundle, threads: int = 1) -> Engine:
    """A model bundle in OpenVINO for the shortest latency, in the arithmetic that its manifest names."""
    return compiled_engine(get_model(bundle, threads=threads).compiled)


def run_parallel(bundle: Bundle, images: Sequence[np.ndarray], threads: int) -> float:
    """Run single images, uint8 `[H, W, C]`, through a bundle for the most images per second, one on each thread.

    Returns:
        Seconds for all of them, without compilation.
    """
    import openvino as ov

    core = ov.Core()
    options = {**compile_options(bundle.manifest.arithmetic, threads), "NUM_STREAMS": threads}
    graph, _ = read_graph(core, bundle)
    queue = ov.AsyncInferQueue(core.compile_model(graph, "CPU", options), 2 * threads)
    for warm_up in (True, False):
        start = time.perf_counter()
        for image in images[: 2 * threads] if warm_up else images:
            queue.start_async({0: image[None]})
        queue.wait_all()
    return time.perf_counter() - start


def _normalize(images: np.ndarray, spec: InputSpec) -> np.ndarray:
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((images.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))


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
